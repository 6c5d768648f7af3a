"""The options of ``peftkern bench``."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from ..options import option, setting

PARTS = ("training", "memory", "decoding", "mixed")
DTYPES = ("float32", "bfloat16", "float16")
_MODEL, _WORK = "The model", "The work"


@dataclass
class BenchSettings:
    """What is measured, and on what."""

    model: str | None = setting(
        None, "Folder of the base model (or a .gguf file); none: a small random Llama.", _MODEL
    )
    gguf_file: str | None = setting(None, "Which .gguf file, if there are several.", _MODEL)
    out: str = setting("bench", "Folder for report.html and results.json.")
    dtype: str = setting("float32", "float32, bfloat16 or float16.", _MODEL)
    cpu: bool = setting(False, "Leave the GPU alone.", _MODEL, "--cpu")
    threads: int | None = setting(None, "torch's threads on the CPU.", _MODEL)
    lora_r: int = setting(16, "Rank.", "The adapter")
    lora_dropout: float = setting(0.1, "The dropout of the second training row.", "The adapter")
    target_modules: str = setting("all-linear", "all-linear, or names with commas.", "The adapter")
    only: str | None = setting(None, f"Parts with commas, of {', '.join(PARTS)}; none: all.", _WORK)
    batch_size: int = setting(2, "Texts of a training step.", _WORK)
    length: int = setting(128, "Tokens of a text, and of a prompt.", _WORK)
    new_tokens: int = setting(24, "Tokens of an answer.", _WORK)
    adapters: int = setting(4, "Adapters in a mixed batch.", _WORK)
    rounds: int = setting(9, "Rounds in which all take turns.", _WORK)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that are measured."""
        return PARTS if self.only is None else tuple(self.only.split(","))

    def validate(self) -> None:
        """Raise a UserError for the first option with an impossible value."""
        self._check("dtype", self.dtype in DTYPES, "one of " + ", ".join(DTYPES))
        known = all(part in PARTS for part in self.parts)
        self._check("only", known, "one or more of " + ", ".join(PARTS))
        for name in ("lora_r", "batch_size", "length", "new_tokens", "adapters"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("rounds", self.rounds >= 3, "at least 3")
        self._check("threads", self.threads is None or self.threads >= 1, "at least 1")
        self._check("lora_dropout", 0 <= self.lora_dropout < 1, "from 0 to less than 1")

    def _check(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise UserError(f"{option(name)} is {getattr(self, name)}; it must be {allowed}")
