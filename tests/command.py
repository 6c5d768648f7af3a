"""Tiny models, data and settings for the tests of ``peftkern train``, and what they compare."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peftkern.cli.settings import TrainSettings
from tests.models import build

WORDS = 60
VOCAB = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i + 3 for i in range(WORDS)}}


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words: VOCAB."""
    inner = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )


def make_folder(root: Path, names: tuple[str, ...] = ("llama", "bert", "t5")) -> Path:
    """Folders with tiny models in ``root``; files lm.jsonl, cls.jsonl, tok.jsonl, s2s.jsonl."""
    for name in names:
        build(name, vocab=len(VOCAB), eos_token_id=1).save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    write = {"lm": [], "cls": [], "tok": [], "s2s": []}
    for i in range(30):
        words = [f"w{(i + k) % WORDS}" for k in range(3 + i % 4)]
        text = " ".join(words)
        write["lm"].append({"prompt": text, "completion": f"w{(i + 9) % WORDS} w1"})
        kind = i % 2
        write["cls"].append({"text": f"w{50 + kind} " * (2 + i % 3), "label": "ab"[kind]})
        write["tok"].append({"tokens": words, "labels": [f"L{len(w) % 2}" for w in words]})
        write["s2s"].append({"prompt": text, "completion": " ".join(words[::-1])})
    for name, rows in write.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


def settings(folder: Path, out: Path, **changes: Any) -> TrainSettings:
    """Ten steps of 2 x 2 examples, not quite two epochs, with dropout; a checkpoint every two."""
    values: dict[str, Any] = {
        "model": str(folder / "llama"),
        "data": str(folder / "lm.jsonl"),
        "out": str(out),
        "steps": 10,
        "save_every": 2,
        "batch_size": 2,
        "grad_accumulation": 2,
        "lora_r": 4,
        "lora_dropout": 0.3,
        "lr": 1e-2,
        "scheduler": "cosine",
        "warmup_steps": 2,
        "eval_split": 0.2,
        "max_length": 32,
        "keep": 3,
        "report": False,
        "cpu": True,
    }
    return TrainSettings(**{**values, **changes})


def command(folder: Path, out: Path, **changes: Any) -> list[str]:
    """The command line that means ``settings(folder, out, **changes)``."""
    args = ["train"]
    defaults = {f.name: f.default for f in fields(TrainSettings)}
    for name, value in vars(settings(folder, out, **changes)).items():
        if value == defaults[name]:
            continue
        if isinstance(value, bool):
            args.append(("--" if value else "--no-") + name.replace("_", "-"))
        else:
            args += ["--" + name.replace("_", "-"), str(value)]
    return args


def losses(record: dict[str, Any]) -> list[float]:
    return [loss for _, loss in record["losses"]]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


def assert_equal_runs(out: Path, record: dict[str, Any], reference: Any) -> None:
    wanted, wanted_record = reference
    ours, theirs = weights(out), weights(wanted)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert any(value.abs().max() > 0 for name, value in ours.items() if "lora_B" in name)
    for key in ("losses", "before", "after", "steps"):
        assert record[key] == wanted_record[key]
