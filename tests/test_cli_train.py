"""``peftkern train`` on tiny models: it learns, and a killed run resumes to the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from peftkern.cli import modelio, resume
from peftkern.cli.app import run
from peftkern.cli.errors import RunError, UserError
from peftkern.cli.train import train
from tests.closeness import assert_same_number, differ
from tests.command import assert_equal_runs, command, losses, make_folder, settings, weights

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with tiny models, and files of data."""
    return make_folder(tmp_path_factory.mktemp("train"))


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights, and all that is trained, in float64."""

    def load(*args: Any) -> Any:
        return modelio.load_model(*args).double()

    monkeypatch.setattr("peftkern.cli.prepare.load_model", load)


@pytest.fixture(scope="module")
def reference(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The uninterrupted run that every interrupted one has to equal."""
    out = tmp_path_factory.mktemp("reference") / "out"
    return out, train(settings(folder, out))


def test_training_learns_and_saves_the_adapter_alone(folder: Path, reference: Any) -> None:
    out, record = reference
    assert record["steps"] == 10 and len(record["losses"]) == 10
    assert record["after"]["loss"] < record["before"]["loss"]
    base = len(load_file(folder / "llama" / "model.safetensors"))
    checkpoints = sorted(p.name for p in out.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-10", "checkpoint-6", "checkpoint-8"]  # --keep 3
    for place in (out, out / "checkpoint-10"):
        state = load_file(place / "adapter_model.safetensors")
        assert len(state) == 2 * 7 * 2 and all("lora_" in name for name in state)
        assert not (place / "model.safetensors").exists()
    assert base > 0
    total = sum(p.stat().st_size for p in (out / "checkpoint-10").glob("*.safetensors"))
    assert total == (out / "adapter_model.safetensors").stat().st_size
    for name, value in load_file(out / "checkpoint-10" / "adapter_model.safetensors").items():
        assert torch.equal(value, weights(out)[name])


def test_adapter_loads_again(folder: Path, reference: Any) -> None:
    import peft

    import peftkern

    ids = torch.arange(3, 12)[None]
    logits = []
    for library in (peftkern, peft):
        base = LlamaForCausalLM.from_pretrained(folder / "llama", dtype=torch.float64)
        model = library.PeftModel.from_pretrained(base, str(reference[0])).eval()
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    assert_same_number(*logits)
    with torch.no_grad(), model.disable_adapter():
        assert differ(model(input_ids=ids).logits, logits[0])


# Run in a child without HF peft. Its own child dies by SIGKILL at the third save, after Trainer has
# written its files and before the checkpoint is sealed; when told to, it goes on from there.
CHILD = """
import os, signal, sys
sys.modules["peft"] = None
from peftkern.cli import app, engine, resume
seal, calls = resume.seal, []
def deadly(*args):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    seal(*args)
killed = os.fork()
if killed == 0:
    resume.seal = deadly
    os._exit(app.run(sys.argv[1:]))
print(os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]), flush=True)
sys.stdin.readline()
sys.exit(app.run(sys.argv[1:]))
"""


def child(code: str, folder: Path, out: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    args = [sys.executable, "-c", code, *command(folder, out)]
    return subprocess.Popen(args, env=env, text=True, **pipes)


@pytest.mark.long
def test_killed_while_saving_without_peft(folder: Path, tmp_path: Path, reference: Any) -> None:
    out = tmp_path / "out"
    process = child(CHILD, folder, out)
    said = process.stdout.readline()
    while said and not said.strip().lstrip("-").isdigit():  # what the run that was killed printed
        said = process.stdout.readline()
    assert said and int(said) == -signal.SIGKILL, process.communicate()[1]
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    half = out / resume.PARTIAL / "checkpoint-6"
    assert (half / "optimizer.pt").exists()
    # without HF peft, Trainer itself would have written the whole model
    names = {p.name for p in half.iterdir()} | {p.name for p in (out / "checkpoint-4").iterdir()}
    assert "model.safetensors" not in names and "training_args.bin" not in names
    state = load_file(out / "checkpoint-4" / "adapter_model.safetensors")
    assert state and all("lora_" in name for name in state)

    printed, errors = process.communicate("\n", timeout=200)
    assert process.returncode == 0, errors
    record = json.loads((out / resume.FINISHED).read_text())
    assert "checkpoint-6: the run was killed while writing it; skipped" in printed
    assert "going on from checkpoint-4" in printed
    assert record["steps_of_this_call"] == 6
    assert not (out / resume.PARTIAL).exists()
    assert_equal_runs(out, record, reference)


@pytest.mark.slow
def test_killed_from_outside(folder: Path, tmp_path: Path, reference: Any) -> None:
    out = tmp_path / "out"
    process = child("import sys; from peftkern.cli import app; app.main(sys.argv[1:])", folder, out)
    # at the first checkpoint, wherever the process then is
    deadline = time.monotonic() + 200
    while not (out / "checkpoint-2").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / resume.FINISHED).exists()
    record = train(settings(folder, out))
    assert record["steps_of_this_call"] <= 8
    assert_equal_runs(out, record, reference)


def test_damaged_and_half_written_checkpoints_are_skipped(
    folder: Path, tmp_path: Path, reference: Any, capsys: Any
) -> None:
    out = tmp_path / "out"
    train(settings(folder, out))
    for name in (resume.FINISHED, "adapter_model.safetensors"):
        (out / name).unlink()
    (out / "checkpoint-10" / resume.MANIFEST).unlink()
    optimizer = out / "checkpoint-8" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    capsys.readouterr()
    record = train(settings(folder, out))
    printed = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-10: half-written (no peftkern_checkpoint.json); skipped" in printed
    assert "checkpoint-8: damaged (optimizer.pt has 100 bytes, not " in printed
    assert "going on from checkpoint-6" in printed
    assert_equal_runs(out, record, reference)


def test_resume_at_the_end_of_an_epoch(folder: Path, tmp_path: Path) -> None:
    # 24 training examples in batches of 4: the checkpoints of the steps 6 and 12 end an epoch
    changes = {"batch_size": 4, "grad_accumulation": 1, "save_every": 6, "steps": 14}
    whole = train(settings(folder, tmp_path / "whole", **changes))
    out = tmp_path / "cut"
    train(settings(folder, out, **changes))
    (out / resume.FINISHED).unlink()
    (out / "checkpoint-14" / "rng_state.pth").unlink()
    record = train(settings(folder, out, **changes))
    assert record["steps_of_this_call"] == 2
    assert_equal_runs(out, record, (tmp_path / "whole", whole))


def test_other_settings_are_refused_and_named(
    folder: Path, tmp_path: Path, reference: Any, capsys: Any
) -> None:
    out, _ = reference
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    args = command(folder, out)
    assert run(args) == 0
    assert "Already trained" in capsys.readouterr().out
    assert run([*args, "--lr", "0.5"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--lr was 0.01 there and is 0.5 now" in error
    other = tmp_path / "other.jsonl"
    other.write_text((folder / "lm.jsonl").read_text() + '{"prompt": "w1", "completion": "w2"}\n')
    assert run([*args, "--data", str(other)]) == 2
    assert "the content of --data has changed since" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before

    half = tmp_path / "half"
    (half / "checkpoint-6").mkdir(parents=True)
    for file in (out / "checkpoint-6").iterdir():
        (half / "checkpoint-6" / file.name).write_bytes(file.read_bytes())
    assert run([*command(folder, half), "--lora-r", "5"]) == 2
    error = capsys.readouterr().err
    assert "checkpoint-6 was made with other settings: --lora-r was 4 there and is 5 now" in error


def test_fresh_starts_over(folder: Path, tmp_path: Path, reference: Any) -> None:
    out = tmp_path / "out"
    train(settings(folder, out, seed=3, steps=4))
    (out / "mine.txt").write_text("not the command's")
    record = train(settings(folder, out), fresh=True)
    assert record["steps_of_this_call"] == 10
    assert (out / "mine.txt").exists()
    assert_equal_runs(out, record, reference)


def test_an_adapter_of_another_program_is_not_overwritten(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert run(command(folder, tmp_path)) == 2
    assert "holds an adapter that peftkern train did not make" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["adapter_config.json"]


@pytest.mark.parametrize(
    "task, model, data, extra",
    [
        ("seq_cls", "bert", "cls.jsonl", {}),
        ("seq_cls", "llama", "cls.jsonl", {"rslora": True}),
        ("token_cls", "bert", "tok.jsonl", {"target_modules": "query,value"}),
        ("seq_2_seq_lm", "t5", "s2s.jsonl", {"gradient_checkpointing": True}),
        ("causal_lm", "llama", "lm.jsonl", {"gradient_checkpointing": True, "bf16": True}),
        ("seq_cls", "llama", "cls.jsonl", {"bf16": True}),
    ],
)
def test_every_task_trains(
    folder: Path, tmp_path: Path, task: str, model: str, data: str, extra: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    changes = {"model": str(folder / model), "data": str(folder / data), "task": task, **extra}
    record = train(settings(folder, out, steps=12, scheduler="constant", **changes))
    assert record["after"]["loss"] < record["before"]["loss"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["task_type"] == task.upper()
    state = weights(out)
    heads = {name for name in state if "lora_" not in name}
    assert bool(heads) == (task in ("seq_cls", "token_cls"))
    if heads:
        assert 0 <= record["after"]["accuracy"] <= 1
        width = {state[n].shape[0] for n in heads}
        assert width == {2}
    # all of it comes back: the head, too
    (out / resume.FINISHED).unlink()
    again = train(settings(folder, out, steps=12, scheduler="constant", **changes))
    assert again["steps_of_this_call"] == 0
    assert again["after"] == record["after"]


@pytest.mark.parametrize(
    "task, model, data",
    [
        ("causal_lm", "llama", "lm.jsonl"),
        ("seq_cls", "bert", "cls.jsonl"),
        ("seq_2_seq_lm", "t5", "s2s.jsonl"),
    ],
)
def test_accumulation_equals_a_larger_batch(
    folder: Path, tmp_path: Path, double: None, task: str, model: str, data: str
) -> None:
    # BERT and T5 drop elements of their own accord, which depends on how a batch is cut
    path = tmp_path / "model"
    path.mkdir()
    for file in (folder / model).iterdir():
        text = file.read_bytes()
        if file.name == "config.json":
            config = json.loads(text)
            for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate"):
                config[name] = 0.0
            text = json.dumps(config).encode()
        (path / file.name).write_bytes(text)
    changes = {"model": str(path), "data": str(folder / data), "task": task, "lora_dropout": 0.0}
    runs = [
        train(settings(folder, tmp_path / f"{size}", batch_size=size, grad_accumulation=parts,
                       steps=4, save_every=10, **changes))
        for size, parts in ((6, 1), (2, 3))
    ]  # fmt: skip
    assert_same_number(losses(runs[0]), losses(runs[1]))


def test_gradient_checkpointing_changes_nothing(folder: Path, tmp_path: Path, double: None) -> None:
    runs = [
        train(settings(folder, tmp_path / f"{on}", steps=4, gradient_checkpointing=on))
        for on in (True, False)
    ]
    assert_same_number(losses(runs[0]), losses(runs[1]))


def test_a_loss_that_is_no_number_stops_the_run(folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    broken = tmp_path / "model"
    broken.mkdir()
    for file in (folder / "llama").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    model = LlamaForCausalLM.from_pretrained(folder / "llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(broken)
    with pytest.raises(RunError, match="the loss became nan at step 1: try a smaller --lr"):
        train(settings(folder, out, model=str(broken), eval_split=0.0))
    assert not list(out.glob("checkpoint-*")) and not (out / "adapter_model.safetensors").exists()


def test_bad_models_and_targets(folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    args = command(folder, out)
    assert run([*args, "--target-modules", "no_such_layer"]) == 2
    error = capsys.readouterr().err
    assert "--target-modules no_such_layer: " in error and error.count("\n") == 1
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in (folder / "llama").iterdir():
        (cut / file.name).write_bytes(file.read_bytes()[: 2000 if "model" in file.name else None])
    assert run([*args, "--model", str(cut)]) == 2
    error = capsys.readouterr().err
    assert f"--model {cut}: the model cannot be loaded" in error and error.count("\n") == 1
    assert run([*args, "--model", str(folder / "bert"), "--task", "seq_2_seq_lm",
                "--data", str(folder / "s2s.jsonl")]) == 2  # fmt: skip
    assert "cannot be loaded" in capsys.readouterr().err
    assert run([*args, "--max-length", "2"]) == 2
    assert "keeps a target within --max-length 2" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("load_in", ["4bit", "8bit", "fp8"])
def test_a_quantised_base(folder: Path, tmp_path: Path, load_in: str) -> None:
    if load_in != "fp8":
        pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    record = train(settings(folder, out, load_in=load_in, steps=4))
    losses = [loss for _, loss in record["losses"]]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert any("lora_B" in name for name in load_file(out / "adapter_model.safetensors"))
    assert record["identity"]["load_in"] == load_in


def test_quantised_bases_that_cannot_be_had(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--load-in is 2bit; it must be one of 4bit, 8bit, fp8"):
        train(settings(folder, tmp_path / "out", load_in="2bit"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="--load-in 4bit needs the package 'bitsandbytes'"):
        train(settings(folder, tmp_path / "out", load_in="4bit"))
    assert not (tmp_path / "out").exists()
