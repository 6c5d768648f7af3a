"""The records of one case of the race and of what runs in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from peftkern.kernels import tuning

from .cases import TINY

SCALE = 2.0


@dataclass(frozen=True)
class RaceCase:
    """One operation on one bucket; ``n`` or ``k`` is 0 if the operation has no such dimension."""

    op: str
    m: int
    n: int
    k: int
    r: int
    mask: bool = False
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    group: int = 1
    ns: tuple[
        int, ...
    ] = ()  # outputs of each projection in whole operations and shrink_expand; n is their sum
    graph: bool = False  # True: a whole operation in a CUDA graph, where kernels always run
    experts: int = 0  # of a mixture, whose tokens are m
    top: int = 0  # experts of a token
    what: str = ""  # of a mixture's kernel: peftkern.ops.experts.configs.told

    @property
    def rows(self) -> int:
        """Rows of a mask: tokens, or of a mixture pairs."""
        return self.m * max(1, self.top)

    @property
    def whole(self) -> bool:
        return self.op in tuning.WHOLE

    @property
    def table_key(self) -> tuning.Key:
        grads = "xab" if self.op == "backward" else self.what
        return tuning.Key(
            self.op, self.dtype, self.adapter_dtype, tuning.bucket(self.m), self.n, self.k, self.r,
            self.group, self.mask, grads, self.graph, self.experts, self.top,
        )  # fmt: skip

    @property
    def key(self) -> str:
        tail = f"{' mask' if self.mask else ''}{f' x{self.group}' if self.group > 1 else ''}"
        tail += " graph" if self.graph else ""
        tail += f" of {self.top} in {self.experts} experts, {self.what}" if self.experts else ""
        return f"{self.op} m={self.m} n={self.n} k={self.k} r={self.r}{tail}"

    def tiny(self) -> RaceCase:
        """The same case in shapes that are fast in Triton's interpreter."""
        n, k = (TINY.hidden if v else 0 for v in (self.n, self.k))
        ns = (TINY.hidden,) * len(self.ns)
        case = asdict(self) | {"m": min(self.m, 8), "n": sum(ns) or n, "k": k, "ns": ns}
        case |= {"experts": min(self.experts, 3), "top": min(self.top, 2)}
        return RaceCase(**case | {"r": min(self.r, 4)})


Make = Callable[[Any], Callable[[int], Any]]  # config -> (buffer index -> outputs)


@dataclass
class Contest:
    """The functions that run one case on its tensors, of which it holds several copies."""

    run: Callable[[Any, int], Any]  # (config or choice, copy) -> outputs
    exact: Callable[[], list[Tensor]]  # the outputs of copy 0 in float64
    entrants: dict[str, Any]  # label -> config object, None for the default, or choice
