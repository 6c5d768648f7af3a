"""What comes home from a machine with a GPU: the archive of results, rows that were cut off."""

import json
import math
import string
import tarfile
import time

import pytest

from benchmarks.gpu import archive as gpu_archive
from benchmarks.gpu import extra as gpu_extra
from benchmarks.gpu import headline as gpu_headline
from benchmarks.gpu import model as gpu_model
from benchmarks.gpu import prefix as gpu_prefix
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu.device import Dry
from benchmarks.gpu.store import Store, Watch
from tests import children

RESULTS = "benchmarks/results/NVIDIA_H200"
TABLE = "kernels/tuning/device_name=NVIDIA_H200.json"
PLAIN_NAME = set(string.ascii_letters + string.digits + "._-")  # all that some machines give back


def members(archive):
    with tarfile.open(archive) as tar:
        return {m.name: json.load(tar.extractfile(m)) for m in tar}


def test_an_archive_brings_results_and_tables_into_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    archive = gpu_archive.path_for("NVIDIA_H200")
    assert archive.parent == tmp_path / "out" and set(archive.name) <= PLAIN_NAME
    store = Store.create(tmp_path / "1-linear.json", "linear", gpu={"name": "NVIDIA H200"})
    table = tmp_path / "table"
    table.write_text('{"schema": 1}')
    gpu_archive.pack({f"{RESULTS}/1-linear.json": store.path, TABLE: table}, archive)
    checkout = tmp_path / "checkout"
    written = gpu_archive.unpack(archive, checkout)
    assert written == [checkout / RESULTS / "1-linear.json", checkout / TABLE]
    assert json.loads(written[0].read_text()) == store.data
    assert written[1].read_text() == '{"schema": 1}'
    monkeypatch.delenv("OUT")
    assert gpu_archive.path_for("NVIDIA_H200") is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("../x.json", "{}"),
        ("benchmarks/results/../../x.json", "{}"),
        ("benchmarks/results/../x.json", "{}"),
        ("/etc/x.json", "{}"),
        ("kernels/gemm.py", "{}"),
        ("kernels/tuning/a.json", "{"),
    ],
)
def test_an_archive_with_anything_else_is_refused_whole(tmp_path, name, content, capsys):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text("{}")
    bad.write_text(content)
    archive = tmp_path / "a.tar.gz"
    gpu_archive.pack({TABLE: good, name: bad}, archive)
    with pytest.raises(ValueError, match="allowed|is no JSON"):
        gpu_archive.unpack(archive, tmp_path / "checkout")
    assert not (tmp_path / "checkout").exists()
    assert gpu_archive.main([str(archive)]) == 1 and name in capsys.readouterr().err


def test_a_link_in_an_archive_is_refused(tmp_path):
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo(TABLE)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ValueError, match="allowed: files"):
        gpu_archive.unpack(archive, tmp_path / "checkout")


def test_the_archive_holds_a_row_soon_after_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_archive, "EVERY_S", 0.05)
    archive = tmp_path / "out" / "a.tar.gz"
    store = Store.create(tmp_path / "r" / "1-linear.json", "linear", gpu={"name": "g"})
    keeper = gpu_archive.Keeper(archive, lambda: gpu_archive.files(tmp_path / "r", "g"))
    keeper.start()
    try:
        store.put({"key": "a", "part": "linear"})
        name, until = "benchmarks/results/g/1-linear.json", time.time() + 30
        while not (archive.exists() and members(archive)[name]["rows"]):
            assert time.time() < until
            time.sleep(0.02)
    finally:
        store.put({"key": "b", "part": "linear"})
        keeper.close()
    assert [r["key"] for r in members(archive)[name]["rows"]] == ["a", "b"]


def test_a_row_that_was_cut_off_is_kept_and_measured_again(tmp_path):
    store = Store.create(tmp_path / "1-e2e.json", "e2e", gpu={"name": "g"})
    store.begin("case", 10)
    store.watch("case").keep({"key": "case", "part": "e2e", "providers": {"a": {"ok": True}}})
    again = Store.open(store.path)
    assert again.rows[0]["providers"] == {"a": {"ok": True}} and not again.done()
    assert again.data["current"]["key"] == "case"
    assert any(line.startswith("case, cut off ") for line in gpu_report.table(again.rows))
    again.blame("ended with status -9")  # without a culprit the case is closed: with what it has
    (row,) = Store.open(store.path).rows
    assert row["error"] == "ended with status -9" and row["providers"] and again.done() == {"case"}


@pytest.mark.slow
def test_a_model_is_told_provider_by_provider():
    seen = []

    class Kept(Watch):
        def keep(self, row):
            timed = [
                n for n, e in row["providers"].items() if e.get("alone") and e["us"]["p50"] > 0
            ]
            seen.append((len(row["providers"]), timed))

    case = gpu_model.cases()[1]
    row = gpu_model.measure(case, Dry(), seconds=0.1, watch=Kept())
    assert [count for count, _ in seen] == list(range(1, len(row["providers"]) + 1))
    assert all(len(timed) == count for count, timed in seen)
    assert not any("alone" in entry for entry in row["providers"].values())
    assert all(entry["ok"] for entry in row["providers"].values())


def judged(losses):
    row = {"providers": {name: {} for name in losses}}
    gpu_model._judge(row, losses)
    return {name: (entry["ok"], entry["checked"]) for name, entry in row["providers"].items()}


def test_losses_are_compared_also_when_hf_peft_has_none():
    first = judged({"plain frozen": 9.0, "PEFT bf16": 2.0, "peftkern torch": 2.001, "x": 3.0})
    said = "first loss against that of PEFT bf16"
    assert first["peftkern torch"] == (True, said) and first["x"] == (False, said)
    alone = judged({"plain frozen": 9.0, "peftkern torch": 2.0, "peftkern joined": 2.001, "x": 3.0})
    said = "first loss against that of peftkern torch"
    assert alone["peftkern joined"] == (True, said) and alone["x"] == (False, said)
    none = judged({"plain frozen": 9.0, "peftkern torch": math.nan, "peftkern joined": 2.0})
    assert none["plain frozen"][0] and none["peftkern joined"] == (False, "no loss to compare with")
    assert not none["peftkern torch"][0]


def test_the_headline_judges_every_goal():
    keys = [case.key for case in gpu_headline.cases()]
    assert len(keys) == len(set(keys))
    for goal in gpu_report.GOALS:
        assert any(gpu_report._is_of(key, goal) for key in keys), goal.text
    kinds = {type(case) for case in gpu_headline.cases()}
    assert {gpu_extra.MixedCase, gpu_extra.HostCase, gpu_prefix.PrefixCase} < kinds
    assert gpu_headline.cases()[0].compiled  # HF PEFT under torch.compile stands in the table


@pytest.mark.slow
def test_first_runs_dry_to_the_last_line(tmp_path):
    out = children.python(
        "-m", "benchmarks.gpu", "--part", "first", "--dry-run", "--budget", "1800",
        "--out", str(tmp_path / "results"), without=("PEFTKERN", "TRITON"), OUT=str(tmp_path),
    )  # fmt: skip
    assert out.returncode == 0, out.stdout[-4000:] + out.stderr[-4000:]
    archive = tmp_path / "peftkern-dry_run.tar.gz"
    assert out.stdout.rstrip().endswith(f"all results: {archive}")
    contents = {data["part"]: data for data in members(archive).values() if "part" in data}
    assert set(contents) == {"tests", "headline"} and contents["headline"]["finished"]
    rows = contents["headline"]["rows"]
    assert {r["key"] for r in rows} == {case.key for case in gpu_headline.cases()}
    assert not gpu_report.wrong(rows)
    timed = {n for r in rows for n, e in r["providers"].items() if "us" in e}
    rivals = {"plain frozen", "PEFT bf16", "PEFT default (fp32)", "PEFT compiled"}
    assert rivals | {"peftkern joined", "peftkern auto"} <= timed
    assert "not measured" not in out.stdout.split("== goals")[1].split("==")[0]
