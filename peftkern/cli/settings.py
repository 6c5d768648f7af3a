"""What one training run was asked to do: every option of ``peftkern train``, checked, and
comparable.

A checkpoint carries these values, so that a run is only ever continued with the settings it began
with.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import UserError

TASKS = ("causal_lm", "seq_cls", "token_cls", "seq_2_seq_lm")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")

# These do not change the weights that come out, only where they lie and how often they are written.
_FREE_TO_CHANGE = frozenset({"out", "save_every", "keep", "data"})


@dataclass
class TrainSettings:
    """The options of ``peftkern train``. Lengths in tokens, ``save_every`` and ``steps`` in
    optimizer steps.
    """

    model: str
    data: str
    out: str
    task: str = "causal_lm"
    gguf_file: str | None = None
    lora_r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: str = "all-linear"
    rslora: bool = False
    lr: float = 2e-4
    scheduler: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 4
    grad_accumulation: int = 1
    max_length: int = 512
    eval_split: float = 0.1
    seed: int = 0
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    cpu: bool = False
    save_every: int = 100
    keep: int = 2

    def validate(self) -> None:
        """Raise UserError for the first option whose value cannot be meant."""
        for name in ("lora_r", "batch_size", "grad_accumulation", "save_every", "keep"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        if self.steps is not None:
            self._require("steps", self.steps >= 1, "at least 1")
        self._require("max_length", self.max_length >= 2, "at least 2")
        for name in ("lr", "epochs", "lora_alpha"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value > 0, "a number above 0")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value >= 0, "0 or above")
        for name in ("warmup_steps", "seed"):
            self._require(name, 0 <= getattr(self, name) < 2**32, "an integer of 0 or above")
        for name in ("lora_dropout", "eval_split"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._require("task", self.task in TASKS, "one of " + ", ".join(TASKS))
        self._require("scheduler", self.scheduler in SCHEDULERS, "one of " + ", ".join(SCHEDULERS))
        self._require(
            "target_modules", bool(self.target_list()), "all-linear, or names with commas"
        )

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise UserError(f"{option(name)} is {getattr(self, name)}; it must be {allowed}")

    def target_list(self) -> str | list[str]:
        """``target_modules`` as LoraConfig takes it: ``"all-linear"`` or a list of module names."""
        if self.target_modules.strip() == "all-linear":
            return "all-linear"
        return [name.strip() for name in self.target_modules.split(",") if name.strip()]

    def identity(self, data_sha256: str) -> dict[str, Any]:
        """The settings that decide the resulting weights, as JSON values.

        The data stand by their content, not by their path; a local model by its resolved path.
        """
        record = {k: v for k, v in asdict(self).items() if k not in _FREE_TO_CHANGE}
        if Path(self.model).exists():
            record["model"] = str(Path(self.model).resolve())
        if self.steps is not None:
            del record["epochs"]  # not looked at when the number of steps is given
        record["data"] = data_sha256
        return record


def option(field: str) -> str:
    """``lora_r`` -> ``--lora-r``: the name under which a user knows a setting."""
    return "--" + field.replace("_", "-")


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """One phrase about the first setting that differs between two identities; None when all are
    equal.
    """
    for name in [*new, *(k for k in old if k not in new)]:
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        if name == "data":
            return "the content of --data has changed since"
        return f"{option(name)} was {_said(before)} there and is {_said(now)} now"
    return None


def _said(value: Any) -> str:
    return "not given" if value is None else str(value)
