"""``peftkern tune`` without a GPU: its options, the shapes that it finds, its messages."""

import pytest
import torch

from peftkern.cli import tune
from peftkern.cli.app import run
from peftkern.cli.tune_settings import TuneSettings
from peftkern.kernels.tuning import Entry, Key, Table
from peftkern.ops import tuned
from tests.models import config

US = {"p20": 1.0, "p50": 2.0, "p80": 3.0}


@pytest.fixture(autouse=True)
def no_device(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "cache"))
    tuned.forget()
    yield
    tuned.forget()


BAD = {
    "--r is 0": ["--shapes", "8x8", "--r", "0"],
    "--r is 257; it must be an integer from 1 to 256": ["--shapes", "8x8", "--r", "257"],
    "--rows is 1,x": ["--shapes", "8x8", "--rows", "1,x"],
    "--rows is 0": ["--shapes", "8x8", "--rows", "0"],
    "--rows is ;": ["--shapes", "8x8", "--rows", ""],
    "--dtype is int8; it must be one of bfloat16,": ["--shapes", "8x8", "--dtype", "int8"],
    "--adapter-dtype is float16; it must be float32": ["--shapes", "8x8", "--adapter-dtype",
                                                      "float16"],
    "--dropout is 1;": ["--shapes", "8x8", "--dropout", "1"],
    "--shapes is 8by8; it must be OUTxIN": ["--shapes", "8by8"],
    "--shapes is 8x0;": ["--shapes", "8x0"],
    "--targets is ,": ["--shapes", "8x8", "--targets", ","],
    "--model and --shapes are both given": ["--shapes", "8x8", "--model", "."],
    "--model or --shapes is missing": [],
    "--experts is given without --model": ["--shapes", "8x8", "--experts"],
    "--show races nothing": ["--show", "--shapes", "8x8"],
    "--export is no/such/folder/t.json": ["--export", "no/such/folder/t.json"],
    "needs a CUDA device, and there is none": ["--shapes", "8x8"],
    "No such option": ["--speed", "11"],
}  # fmt: skip


@pytest.mark.parametrize("says", BAD)
def test_bad_input_is_one_line_and_exit_code_2(says, capsys):
    assert run(["tune", *BAD[says]]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and says.removesuffix(";") in err, err


def test_show_works_without_a_gpu(capsys, monkeypatch, tmp_path):
    assert run(["tune", "--show"]) == 0
    out = capsys.readouterr().out
    assert "There is no CUDA device here" in out
    from peftkern.kernels import tuning

    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    assert run(["tune", "--show"]) == 0
    assert "No table ships" in capsys.readouterr().out
    for name, sources in (("NVIDIA A", tuned.sources()), ("NVIDIA B", "other")):
        table = Table({"name": name}, {}, sources, "2026-01-02T00:00")
        table.add([Entry(Key("infer", "bfloat16", "float32", 1, 8, 8, 4), "decode", None, US)])
        table.save(tuning.path_for(name, tmp_path))
    assert run(["tune", "--show"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "ships for NVIDIA A: 1 entries, 2026-01-02 ships" in out
    assert "ships for NVIDIA B: 1 entries, 2026-01-02, of other kernels: not used" in out


CONFIGS = {
    "llama": config("llama", inner=32, heads=4, kv=2),
    "gpt2": config("gpt2", layers=1),
    "t5": config("t5", layers=1, d_kv=4),
}
SHAPES = {
    "llama": ({(16, 16), (8, 16), (32, 16), (16, 32)}, {((16, 8, 8), 16), ((32, 32), 16)}),
    "gpt2": ({(48, 16), (16, 16), (64, 16), (16, 64)}, set()),
    "t5": ({(8, 16), (16, 8), (24, 16), (16, 24)}, {((8, 8, 8), 16)}),
}
MLPS = {
    "llama": [(16, (32, 32, 16), "silu")],
    "gpt2": [(16, (64, 16), "gelu_tanh")],
    "t5": [],  # its forward has more in it
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target")
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_shapes_of_a_model_come_from_its_config_alone(kind, tmp_path):
    CONFIGS[kind].save_pretrained(tmp_path)
    settings = TuneSettings(model=str(tmp_path), r=4)
    alone, together, mlps, mixtures = tune.shapes_of(str(tmp_path), settings)
    assert not mixtures
    assert {(ns[0], k) for ns, k in alone} == SHAPES[kind][0]
    assert set(together) == SHAPES[kind][1]
    assert [(m.K, m.ns, m.act) for m in mlps] == MLPS[kind]
    assert all(set(m.adapted) == {True} for m in mlps)


def test_jobs_are_each_bucket_of_each_shape(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    settings = TuneSettings(
        model=str(tmp_path), targets="q_proj,k_proj,v_proj", rows="4,1", dropout="0,0.1"
    )
    jobs = list(tune.jobs_of(settings))
    assert len(jobs) == len(set(jobs)) and [j.M for j in jobs] == sorted(j.M for j in jobs)
    one = [(j.op, j.ns, j.K, j.p) for j in jobs if j.M == 1]
    assert [j for j in one if j[0] == "infer"] == [
        ("infer", (16,), 16, None),
        ("infer", (8,), 16, None),
        ("infer", (16, 8, 8), 16, None),  # q, k and v decode together
    ]
    assert ("backward", (16, 8, 8), 16, 0.1) in one and ("forward", (8,), 16, 0.0) in one
    assert len(one) == 3 + 3 * 2 * 2
    (job,) = (j for j in tune.jobs_of(TuneSettings(shapes="5x7", rows="2")) if j.op == "infer")
    assert job == tune.Job("infer", 2, (5,), 7)


@pytest.mark.parametrize("what", ["absent", "no config", "broken", "targets", "gguf"])
def test_a_model_that_cannot_be_read_is_named(what, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "_device", lambda: torch.device("cpu"))
    folder, says = tmp_path / "m", "--model"
    more = []
    if what != "absent":
        folder.mkdir()
    if what == "broken":
        (folder / "config.json").write_text("{")
    if what == "gguf":
        (folder / "m.gguf").write_text("")
        says = "a GGUF file cannot be tuned for"
    if what == "targets":
        CONFIGS["llama"].save_pretrained(folder)
        more, says = ["--targets", "nobody"], "--targets is nobody"
    assert run(["tune", "--model", str(folder), *more]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
