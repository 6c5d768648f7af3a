"""The results of races on disk: one file for each machine and code, shared by several processes."""

import json
import logging
import os
from pathlib import Path

import pytest

from peftkern.kernels.tuning import Entry, Key
from peftkern.ops import tuned

US = {"p20": 1.0, "p50": 2.0, "p80": 3.0}


def entry(k, choice="fused", op="infer", **more):
    return Entry(Key(op, "bfloat16", "float32", 16, 64, k, 8), choice, None, US, **more)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "cache"))
    tuned.forget()
    yield tmp_path / "cache"
    tuned.forget()


def reopened():
    tuned.forget()
    return tuned.book(-1)


def test_a_race_is_found_by_the_next_process(folder):
    book = tuned.book(-1)
    raced = entry(32, times={"torch": 3.0, "fused": 2.0}, left_out={"x": "why"}, date="2026-01-02")
    book.keep([raced])
    again = reopened()
    assert again is not book and again.find(raced.key) == (raced, "raced here on 2026-01-02")
    near = Key("infer", "bfloat16", "float32", 4, 64, 32, 8)
    assert again.find(near) is None and again.find_near(near)[0] == raced
    assert again.find_near(near, 1) is None  # two powers of two away
    for other in (
        Key("infer", "bfloat16", "float32", 16, 64, 32, 8, graph=True),
        Key("infer", "bfloat16", "float32", 16, 64, 32, 8, group=2),
        Key("infer", "float32", "float32", 16, 64, 32, 8),
    ):
        assert again.find_near(other) is None
    (path,) = folder.rglob("*.json")
    assert json.loads(path.read_text())["versions"]["torch"] and not list(folder.rglob("*.tmp"))


def test_a_config_for_one_row_is_none_for_several():
    """They are two kernels, one with tensor cores and one without."""
    table = tuned.Table({}, {}, "", "")
    key = Key("decode", "bfloat16", "float32", 1, 64, 32, 8)
    table.add([Entry(key, None, {"block_n": 4}, US)])
    assert table.find_near(key) and not table.find_near(key._replace(m=2))
    other = key._replace(op="shrink", m=2)
    table.add([Entry(other, None, None, US)])
    assert table.find_near(other._replace(m=1))


@pytest.mark.parametrize("what", ["gpu", "driver", "torch", "triton"])
def test_another_machine_or_version_has_another_file(folder, monkeypatch, what):
    tuned.book(-1).keep([entry(32)])
    other = tuned.machine(-1)._replace(**{what: "other"})
    monkeypatch.setattr(tuned, "machine", lambda index: other)
    assert reopened().find(entry(32).key) is None
    tuned.book(-1).keep([entry(40)])
    assert len(list(folder.rglob("*.json"))) == 2


def test_other_code_or_another_shipped_table_has_another_file(folder, monkeypatch):
    paths = [tuned.book(-1).path]
    monkeypatch.setattr(tuned, "sources", lambda: "other")
    paths.append(reopened().path)
    table = folder / "table.json"
    monkeypatch.setattr(tuned, "path_for", lambda name: table)
    for date in ("1", "2"):
        made = tuned.Table({"name": "CPU"}, {}, "other", date)
        made.add([entry(32)])
        made.save(table)
        paths.append(reopened().path)
        assert tuned.book(-1).find(entry(32).key)[1] == "shipped table of CPU"
    assert len({p.name for p in paths}) == 4


def test_the_hash_is_of_what_is_timed(monkeypatch, tmp_path):
    seen = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: seen.append(self.name) or real(self))
    tuned.sources.cache_clear()
    tuned.sources()
    tuned.sources.cache_clear()
    assert {"gemm.py", "shrink.py", "common.py", "torch_backend.py", "triton_backend.py"} < set(
        seen
    )
    assert "tuning.py" not in seen and "auto_backend.py" not in seen


CONTENTS = {
    "cut off": '{"schema": 1, "entr',
    "other schema": '{"schema": 7}',
    "no table": "[1, 2]",
    "bytes": b"\xff\xfe\x00",
    "of another machine": None,
}


@pytest.mark.parametrize("what", CONTENTS)
def test_a_file_that_cannot_be_used_is_named_once_and_written_anew(folder, caplog, what):
    book = tuned.book(-1)
    book.keep([entry(32)])
    if what == "of another machine":
        data = json.loads(book.path.read_text())
        data["versions"]["driver"] = "other"
        book.path.write_text(json.dumps(data))
    else:
        content = CONTENTS[what]
        book.path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with caplog.at_level(logging.WARNING, logger="peftkern"):
        book = reopened()
        assert book.find(entry(32).key) is None
        book.keep([entry(40)])
        book.keep([entry(48)])
    assert len(caplog.records) == 1 and str(book.path) in caplog.text
    assert [k.k for k in reopened().cached.entries] == [40, 48]


def test_a_folder_that_cannot_be_written_costs_a_line(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, logger="peftkern"):
        book = reopened()
        book.keep([entry(32)])
        book.keep([entry(40)])
    assert len(caplog.records) == 1 and "not kept on disk" in caplog.text
    assert book.find(entry(32).key) and book.find(entry(40).key)
    tuned.forget()


def test_where_the_folder_is(monkeypatch, tmp_path):
    for name in ("PEFTKERN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned.cache_folder() == tmp_path / ".cache" / "peftkern"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert tuned.cache_folder() == tmp_path / "x" / "peftkern"
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "own"))
    assert tuned.cache_folder() == tmp_path / "own"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_that_write_at_once_lose_nothing(folder):
    waiting, start = os.pipe()
    writers = []
    for i in range(3):
        writers.append(os.fork())
        if writers[-1] == 0:
            try:
                os.close(start)
                book = reopened()
                os.read(waiting, 1)  # until the last one has closed the other end
                for k in range(20):
                    book.keep([entry(1000 * i + k)])
                os._exit(0)
            finally:
                os._exit(1)
    os.close(waiting)
    os.close(start)
    assert [os.waitpid(writer, 0)[1] for writer in writers] == [0, 0, 0]
    found = {key.k for key in reopened().cached.entries}
    assert found == {1000 * i + k for i in range(3) for k in range(20)}


@pytest.mark.parametrize(
    ("op", "choice", "says"),
    [
        ("infer", None, "a name"),
        ("shrink", "fused", "None"),
        ("grad_sb", None, "one_pass, two_pass"),
    ],
)
def test_an_entry_chooses_what_its_operation_has(op, choice, says):
    with pytest.raises(ValueError, match=f"choice of {op} is {choice!r}; allowed: {says}"):
        entry(32, choice, op)


@pytest.mark.parametrize("answer, said", [(0, "CUDA 13020"), (3, "none"), (None, "none")])
def test_the_driver_is_asked_where_no_file_tells(monkeypatch, answer, said):
    """Under WSL, say, where a result must not outlive the driver either."""

    class Cuda:
        def cuDriverGetVersion(self, number):
            number._obj.value = 13020
            return answer

    def load(name):
        if answer is None:
            raise OSError(f"{name}: cannot open shared object file")
        return Cuda()

    monkeypatch.setattr(tuned.ctypes, "CDLL", load)
    monkeypatch.setattr(tuned, "_DRIVER_FILES", ())
    assert tuned._driver() == said
