"""``peftkern bench``: what is measured, what it says of it, and what it refuses."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peftkern
from peftkern.cli import figures
from peftkern.cli.app import run
from peftkern.cli.bench import peers, rows
from peftkern.cli.bench.base import base_of
from peftkern.cli.bench.contest import Answer, Contest, Step
from peftkern.cli.bench.host import Host
from peftkern.cli.bench.measure import BARE, OURS, PEFT, Work, interleave
from peftkern.cli.bench.page import losses, render, verdict
from peftkern.cli.bench.remote import PeerGone
from peftkern.cli.bench.settings import BenchSettings
from peftkern.cli.bench.worker import Worker
from peftkern.cli.errors import RunError
from tests.tiny import make

CPU = torch.device("cpu")
TINY = {"batch_size": 2, "length": 5, "lora_r": 2, "new_tokens": 2}


def contest_of(**changes):
    sizes = {"batch_size": 2, "length": 5, "lora_r": 2, "adapters": 3}
    return Contest(make("llama").double(), BenchSettings(**sizes, **changes), CPU)


def row(name, ours, theirs, **more):
    return {"row": name, "unit": "s", "values": {PEFT: theirs, OURS: ours, **more}}


def test_the_models_compute_one_function():
    step = Step(contest_of(), 0.0)
    assert list(step.works) == [BARE, PEFT, OURS]
    losses = {}
    for name, work in step.works.items():
        losses[name] = work.run(*work.prepare())
    torch.testing.assert_close(losses[OURS], losses[PEFT], rtol=1e-6, atol=0)
    assert abs(losses[OURS] - losses[BARE]) > 1e-6  # the adapters take part


def test_dropout_drops_the_same():
    step = Step(contest_of(), 0.5)
    losses = [w.run(*w.prepare()) for n, w in step.works.items() if n != BARE]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    again = step.works[OURS]
    torch.manual_seed(0)
    assert again.run() != losses[1]


def test_adapters_of_a_mixed_batch():
    models = contest_of().with_adapters(3)
    ids, names = torch.tensor([[5, 6], [5, 6], [5, 6]]), ["default", "a1", "a2"]
    ours, theirs = (models[n](ids, adapter_names=names).logits for n in (OURS, PEFT))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours[0], ours[1])


def test_differences_are_told():
    contest = contest_of()
    host = Host(contest)
    agree = Host.agree.__wrapped__(host)
    agree("loss", torch.tensor(1.0), torch.tensor(1.00001))
    assert host.wrong == []
    for bad in (1.01, float("nan")):
        agree("loss", torch.tensor(bad), torch.tensor(1.0))
    assert len(host.wrong) == 2
    assert verdict([row("step", 1.0, 2.0)], host.wrong).startswith(
        "the numbers of peftkern and HF PEFT differ: loss by 1.0e-02 of the largest"
    )


def test_the_verdict_names_losses():
    rows = [row("step", 0.9, 1.0), row("decode", 1.1, 1.0, Liger=1.0), row("mixed", 1.01, 1.0)]
    assert losses(rows) == [("decode", PEFT, 1.1), ("decode", "Liger", 1.1)]
    assert verdict(rows) == (
        "peftkern / HF PEFT: step 0.90, decode 1.10, mixed 1.01. "
        "It loses: decode (1.10 of HF PEFT); decode (1.10 of Liger)."
    )
    assert verdict(rows[:1]) == "peftkern / HF PEFT: step 0.90. It loses none."
    assert verdict([]) == "nothing was measured"
    assert verdict([], failed=["mixed"]) == "nothing was measured. Failed: mixed."
    assert verdict(rows[:1], failed={"mixed": "why"}).endswith("It loses none. Failed: mixed.")


def test_the_page(monkeypatch):
    content = {
        "title": "a <model>",
        "rows": [row("step", 0.9, 1.0, bare=0.5), row("a & b", 1.5, 1.0)],
        "missing": {"Unsloth": "not installed"},
        "machine": {"cpu": "X", "versions": {"torch": "2"}},
    }
    page = render(content)
    for part in ("a &lt;model&gt;", "a &amp; b", "data:image/svg+xml", "Unsloth", "torch 2"):
        assert part in page
    assert "1.50 of HF PEFT" in page and "http" not in page.replace("http-equiv", "")
    assert 'class="verdict ok"' in page
    failed = render({**content, "failed": {"decode": "out of <memory>"}})
    assert 'class="verdict bad"' in failed and "out of &lt;memory&gt;" in failed
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    without = render(content)
    assert "<img" not in without and "a &amp; b" in without


def plain(contest, dropout):
    """HF PEFT's model, as a library in a process of its own would make it."""
    return contest.adapted("peft", dropout)


def off(contest, dropout):
    """A model that computes something else; what it prints is no answer."""
    print("not JSON")
    model = contest.adapted("peft", dropout)
    model.get_base_model().lm_head.weight.data *= 2
    return model


def ends(contest, dropout):
    print("the device is gone", file=sys.stderr)
    os._exit(3)


PLACED = "peftkern.cli.bench.contest.PEERS"
OTHERS = {
    name: peers.Peer("torch", f"{__name__}:{name}", needs_gpu=False)
    for name in ("plain", "off", "ends")
}


def test_a_library_in_a_process_of_its_own_does_the_same_work(tmp_path, monkeypatch):
    settings = BenchSettings(**TINY, dtype="float32")
    monkeypatch.setattr(peers, "PEERS", {})
    monkeypatch.setattr(PLACED, {})
    worker = Worker()
    setup = {"settings": vars(settings), "device": "cpu", "threads": torch.get_num_threads()}
    assert worker.answer({"name": "plain", **OTHERS["plain"]._asdict(), **setup}) == {}
    contest = Contest(base_of(settings), settings, CPU)
    try:
        for dropout in (0.0, 0.5):
            step = Step(contest, dropout)
            weights = contest._weights()
            said = worker.answer({"do": "step", "dropout": dropout, "weights": weights})
            assert said == {"loss": contest.loss(PEFT)}
            assert worker.answer({"do": "memory"})["kept"] == step.memory(PEFT)[0]
            mine, theirs = (s.works[n] for s, n in ((worker._chosen, "plain"), (step, PEFT)))
            torch.testing.assert_close(mine.run(*mine.prepare()), theirs.run(*theirs.prepare()))
        said = worker.answer({"do": "answer", "new_tokens": 2, "weights": contest._weights()})
        made = worker._chosen.works["plain"].run()
        assert made.shape == (1, 7) and min(worker.answer({"do": "round", "calls": 2}).values()) > 0
    finally:
        gc.enable()
        gc.unfreeze()
        contest.__exit__()


@pytest.mark.slow
def test_other_libraries_take_turns_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", OTHERS)
    monkeypatch.setattr(PLACED, OTHERS)
    settings = BenchSettings(**TINY)
    with Contest(base_of(settings), settings, CPU) as contest:
        assert contest.missing == {}
        step = Step(contest, 0.5)
        assert list(step.works) == [BARE, PEFT, OURS, "plain"]
        apart = contest.missing.pop("off")
        assert apart.startswith("its loss differs from HF PEFT's by ")
        assert contest.missing == {
            "ends": "its process ended: the device is gone",
        }
        contest.missing["off"] = apart
        samples = interleave(step.works, rounds=2, warmup=0)
        assert min(samples["plain"].wall + samples["plain"].cpu) > 0
        # the same model on the same data keeps the same bytes
        assert contest.memory_of_others()["plain"][0] == step.memory(PEFT)[0]
        answer = Answer(contest, 2)
        answer.works["plain"].run()
        process = contest._remotes["plain"]._process
        process.kill()
        process.wait()
        assert list(Step(contest, 0.0).works) == [BARE, PEFT, OURS]
        assert contest.missing["plain"].startswith("its process ended")
    assert contest._remotes == {}


def test_a_library_that_fails_in_a_round_leaves_the_row():
    from peftkern.cli.bench.suite.bench_model import timed

    contest, rows_made = contest_of(), []

    def compare(name, works, **more):
        for work in works.values():
            work.run()
        rows_made.append(list(works))

    def fails():
        raise PeerGone("X", "out of memory")

    works = {PEFT: Work(lambda: None), "X": Work(fails), OURS: Work(lambda: None)}
    timed(compare, contest, "a row", works, "")
    assert rows_made == [[PEFT, OURS]] and contest.missing["X"] == "out of memory"


def test_libraries_that_are_missing_say_why(monkeypatch):
    found = peers.missing_peers(CPU)
    assert list(found) == list(peers.PEERS)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert peers.missing_peers(CPU)["Unsloth"] == "unsloth is not installed"
    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    assert peers.missing_peers(CPU) == dict.fromkeys(peers.PEERS, "its kernels need a GPU")
    assert peers.missing_peers(torch.device("cuda")) == {}


def test_liger_without_a_patch_for_the_family_is_an_error_of_its_own():
    contest = contest_of()
    contest.base.config.model_type = "strange"
    with pytest.raises(RunError, match="liger-kernel has nothing for strange"):
        peers.with_liger(contest, 0.0)


def test_the_gpu_is_named_where_it_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert rows.machine()["gpu"] == "a GPU"
    assert rows.machine(gpu=False)["gpu"] is None


@pytest.mark.long
def test_the_command(tmp_path):
    """On a folder's model, in a process of its own: pytest runs within it."""
    make("llama").save_pretrained(tmp_path / "model")
    sizes = "--rounds 3 --length 8 --new-tokens 2 --adapters 2 --threads 1"
    args = ["--model", "model", "--out", "out", *sizes.split()]
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "peftkern", "bench", *args],
        cwd=tmp_path,
        env={**outside, "PYTHONPATH": str(Path(peftkern.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [r["row"] for r in content["rows"]] == [
        "training step without dropout",
        "training step with dropout",
        "bytes kept for backward",
        "peak memory of a training step, beyond the weights",
        "first token of an answer",
        "answer of 2 tokens",
        "answer of 2 tokens, by peftkern.runner",
        "mixed batch of 2 adapters",
    ]
    for measured in content["rows"]:
        assert min(measured["values"].values()) > 0
    assert content["wrong"] == [] and content["failed"] == {}
    assert content["rows"][2]["values"][OURS] < content["rows"][2]["values"][PEFT]
    assert verdict(content["rows"]) in done.stdout
    assert "data:image/svg+xml" in (tmp_path / "out" / "report.html").read_text()
    assert str(tmp_path) not in json.dumps(content)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--only", "memory,speed"], "--only is memory,speed; it must be one or more of training,"),
        (["--rounds", "1"], "--rounds is 1; it must be at least 3"),
        (["--dtype", "fp4"], "--dtype is fp4; it must be one of float32, bfloat16, float16"),
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--out", "file"], "--out file: is a file; it must be a folder"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert run(["bench", *args]) == 2
    assert words in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
