"""The settings of ``peftkern demo``; printing its help loads no large library."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..options import option, setting

if TYPE_CHECKING:
    from .data import Kind


@dataclass
class DemoSettings:
    """The options of ``peftkern demo``."""

    task: str = setting("lm", "lm: write docstrings. seqcls: sort docstrings by topic.")
    steps: int | None = setting(None, "Optimizer steps.")
    out: str = setting("demo-out", "Folder for the report and the adapter.")
    lora_dropout: float = setting(0.0, "Dropout before A.")
    seed: int = setting(0, "Selection and order of the data, initial weights.")
    cpu: bool = setting(False, "Leave the GPU alone.", flag="--cpu")

    def validate(self) -> Kind:
        """The demo to run; UserError for an option with an impossible value."""
        from .data import KINDS

        self._require("task", self.task in KINDS, f"one of {', '.join(KINDS)}")
        if self.steps is not None:
            self._require("steps", self.steps >= 1, "at least 1")
        self._require("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)")
        self._require("seed", 0 <= self.seed < 2**32, "an integer of 0 or above")
        if Path(self.out).exists() and not Path(self.out).is_dir():
            raise UserError(f"--out {self.out}: exists and is not a folder")
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError(
                "the report needs matplotlib, which is not installed: pip install matplotlib"
            )
        return KINDS[self.task]

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise UserError(f"{option(name)} is {getattr(self, name)}; it must be {allowed}")
