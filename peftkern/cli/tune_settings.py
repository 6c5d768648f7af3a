"""The settings of ``peftkern tune``, checked before torch is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .errors import UserError
from .options import option, setting

DTYPES = ("bfloat16", "float16", "float32")
MAX_RANK = 256  # the kernels' largest rank; torch runs larger ones
T = TypeVar("T")


@dataclass
class TuneSettings:
    """The options of ``peftkern tune``; lists are texts with commas, as typed."""

    model: str | None = setting(None, "Folder of a model: its config.json gives the shapes.")
    shapes: str | None = setting(None, "OUTxIN of weights instead: 4096x4096,14336x4096.")
    r: int = setting(16, "Rank of the adapters.")
    rows: str = setting("1,16,2048,8192", "Tokens in a batch; each stands for its power of two.")
    dtype: str = setting("bfloat16", "bfloat16, float16 or float32.")
    adapter_dtype: str = setting("float32", "float32, or that of --dtype.")
    dropout: str = setting("0,0.1", "Dropout of A's input; only 0 or not 0 matters.")
    targets: str = setting("all-linear", "all-linear, or names with commas.")
    experts: bool = setting(
        False, "Race the mixtures of experts of --model as well.", flag="--experts"
    )
    show: bool = setting(
        False, "Print what is known for this GPU, and race nothing.", flag="--show"
    )
    export: str | None = setting(None, "Write what is known to a file, as tables ship.")

    def validate(self) -> None:
        """Raise a UserError for the first option with an impossible value."""
        self._require("r", 1 <= self.r <= MAX_RANK, f"an integer from 1 to {MAX_RANK}")
        self._require("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        low = tuple(dict.fromkeys(["float32", self.dtype]))
        self._require(
            "adapter_dtype", self.adapter_dtype in low, f"float32 or --dtype: {', '.join(low)}"
        )
        self.row_list()
        self.dropout_list()
        self.shape_list()
        self._require("targets", bool(self.target_list()), "all-linear, or names with commas")
        if self.experts and self.model is None:
            raise UserError("--experts is given without --model, which has the experts")
        if self.model is not None and self.shapes is not None:
            raise UserError("--model and --shapes are both given; allowed: one of them")
        if self.show and not self.races and self.export is None:
            return
        if self.show and self.races:
            raise UserError("--show races nothing; leave out --model and --shapes")
        if not self.races and self.export is None:
            raise UserError("--model or --shapes is missing (or --show, or --export)")
        if self.export is not None:
            folder = Path(self.export).resolve().parent
            self._require("export", folder.is_dir(), "a file in a folder that exists")

    @property
    def races(self) -> bool:
        return self.model is not None or self.shapes is not None

    def row_list(self) -> list[int]:
        """The numbers of rows M (tokens in a batch) to race."""
        return self._list("rows", int, lambda M: 1 <= M <= 2**20, "integers from 1, with commas")

    def dropout_list(self) -> list[float]:
        return self._list("dropout", float, lambda p: 0 <= p < 1, "numbers in [0, 1), with commas")

    def shape_list(self) -> list[tuple[int, int]]:
        """(N, K) of each of ``shapes``."""
        if self.shapes is None:
            return []

        def shape(text: str) -> tuple[int, int]:
            found = re.fullmatch(r"(\d+)x(\d+)", text.strip())
            if found is None:
                raise ValueError
            return int(found[1]), int(found[2])

        return self._list(
            "shapes", shape, lambda nk: min(nk) >= 1, "OUTxIN of weights, with commas: 4096x4096"
        )

    def target_list(self) -> str | list[str]:
        if self.targets.strip() == "all-linear":
            return "all-linear"
        return [name.strip() for name in self.targets.split(",") if name.strip()]

    def _list(
        self, name: str, make: Callable[[str], T], fine: Callable[[T], bool], allowed: str
    ) -> list[T]:
        try:
            found = [make(part) for part in getattr(self, name).split(",")]
        except ValueError:
            found = []
        self._require(name, bool(found) and all(map(fine, found)), allowed)
        return list(dict.fromkeys(found))

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise UserError(f"{option(name)} is {getattr(self, name)}; it must be {allowed}")
