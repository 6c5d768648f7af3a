"""``peftkern bench``: what is measured, what it says of it, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peftkern
from peftkern.cli.app import run
from peftkern.cli.bench.contest import Contest, Step
from peftkern.cli.bench.host import Host
from peftkern.cli.bench.measure import BARE, OURS, PEFT
from peftkern.cli.bench.page import losses, render, verdict
from peftkern.cli.bench.settings import BenchSettings
from tests.tiny import make

CPU = torch.device("cpu")


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


def test_the_page():
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
