"""The settings of the commands for a trained adapter: inspect, generate, chat, merge, export."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import UserError
from .options import option, setting


def require(settings: object, name: str, ok: bool, allowed: str) -> None:
    """Raise a UserError that names the option, its value and what is allowed, unless ``ok``."""
    if not ok:
        raise UserError(f"{option(name)} is {getattr(settings, name)}; it must be {allowed}")


@dataclass
class InspectSettings:
    """The options of ``peftkern inspect``."""

    all: bool = setting(False, "Every layer and tensor.", flag="--all")
    json: bool = setting(False, "As JSON, with every layer.", flag="--json")
    max_rank: int | None = setting(None, "The rank that the server is started for (512).")

    def validate(self) -> None:
        """Raise a UserError for the first option with an impossible value."""
        ok = self.max_rank is None or self.max_rank >= 1
        require(self, "max_rank", ok, "at least 1")


_BASE = "The base model"
_LOAD_IN = ("4bit", "8bit")


@dataclass
class MergeSettings:
    """The options of ``peftkern merge``."""

    adapter: list[str] = setting(help="Folder of an adapter, or name=folder; may be repeated.")
    out: str = setting(help="Folder for the merged model.")
    model: str | None = setting(None, "Folder or .gguf file; else as the adapter says.", _BASE)
    gguf_file: str | None = setting(None, "Which .gguf file, if there are several.", _BASE)
    load_in: str | None = setting(None, "Base in 4bit or 8bit, as it was trained on.", _BASE)
    weights: str | None = setting(None, "A share for each adapter: 0.7,0.3.")
    dtype: str | None = setting(None, "float32, bfloat16 or float16; else the base's.")
    cpu: bool = setting(False, "Leave the GPU alone.", flag="--cpu")

    def validate(self) -> None:
        """Raise a UserError for the first option with an impossible value."""
        _check_dtype(self)
        require(self, "load_in", self.load_in in (None, *_LOAD_IN), "one of " + ", ".join(_LOAD_IN))


@dataclass
class ExportSettings:
    """The options of ``peftkern export``."""

    adapter: str = setting(help="Folder of the adapter.")
    to: str = setting(help="vllm, sglang, gguf or merged.")
    out: str = setting(help="A new folder; a .gguf file for gguf.")
    model: str | None = setting(None, "Folder or .gguf file; else as the adapter says.", _BASE)
    gguf_file: str | None = setting(None, "Which .gguf file, if there are several.", _BASE)
    load_in: str | None = setting(None, "merged: base in 4bit or 8bit.", _BASE)
    initial: str | None = setting(None, "The adapter before training (PiSSA and its kin).")
    max_rank: int = setting(512, "The --max-lora-rank that vLLM is started with.")
    dtype: str | None = setting(None, "float32, bfloat16 or float16.")
    cpu: bool = setting(False, "Leave the GPU alone.", flag="--cpu")

    def validate(self) -> None:
        """Raise a UserError for the first option with an impossible value."""
        targets = ("vllm", "sglang", "gguf", "merged")
        require(self, "to", self.to in targets, "one of " + ", ".join(targets))
        require(self, "max_rank", self.max_rank >= 1, "at least 1")
        _check_dtype(self)
        require(self, "load_in", self.load_in in (None, *_LOAD_IN), "one of " + ", ".join(_LOAD_IN))
        if self.load_in is not None and self.to != "merged":
            raise UserError("--load-in is for --to merged")


def _check_dtype(settings: MergeSettings | ExportSettings | TextSettings) -> None:
    dtypes = ("float32", "bfloat16", "float16")
    require(settings, "dtype", settings.dtype in (None, *dtypes), "one of " + ", ".join(dtypes))


_HOW = "The text"


@dataclass
class TextSettings:
    """The options of ``peftkern generate``, and most of those of ``peftkern chat``."""

    adapter: list[str] = setting(help="Folder of an adapter, or name=folder; may be repeated.")
    model: str | None = setting(None, "Folder or .gguf file; else as the adapter says.", _BASE)
    gguf_file: str | None = setting(None, "Which .gguf file, if there are several.", _BASE)
    load_in: str | None = setting(None, "Base in 4bit or 8bit (bitsandbytes).", _BASE)
    dtype: str | None = setting(None, "float32, bfloat16 or float16; else the device's.", _BASE)
    cpu: bool = setting(False, "Leave the GPU alone.", _BASE, "--cpu")
    compare_base: bool = setting(False, "The base model's text as well.", _HOW, "--compare-base")
    max_new_tokens: int = setting(256, "Longest text, in tokens.", _HOW)
    temperature: float = setting(0.0, "Above 0: sampled; 0: greedy.", _HOW)
    top_p: float = setting(1.0, "Sample among this share of the probability.", _HOW)
    top_k: int = setting(0, "Sample among this many tokens; 0: all.", _HOW)
    seed: int | None = setting(None, "For the same samples again.", _HOW)

    def validate(self) -> None:
        """Raise a UserError for the first option with an impossible value."""
        require(self, "max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        require(self, "temperature", 0 <= self.temperature < math.inf, "0 or above")
        require(self, "top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        require(self, "top_k", self.top_k >= 0, "0 or above")
        require(self, "seed", self.seed is None or 0 <= self.seed < 2**32, "0 or above")
        _check_dtype(self)
        require(self, "load_in", self.load_in in (None, *_LOAD_IN), "one of " + ", ".join(_LOAD_IN))
        for name in ("top_p", "top_k"):
            if self.temperature == 0 and getattr(self, name) != getattr(TextSettings, name):
                raise UserError(f"{option(name)} is for sampling; give --temperature above 0")


@dataclass
class GenerateSettings(TextSettings):
    """The options of ``peftkern generate``."""

    prompt_file: str | None = setting(None, "A file with the prompt.")
    chat: bool = setting(False, "The prompt as a user's turn, by the chat template.", flag="--chat")


@dataclass
class ChatSettings(TextSettings):
    """The options of ``peftkern chat``."""

    system: str | None = setting(None, "What the system says first.")
    chat_template: str | None = setting(None, "A file with a chat template (Jinja).")
