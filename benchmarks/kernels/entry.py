"""The record of a kernel's benchmarks and checks, and the tensors that its parts are given.

Every field but ``traffic`` is optional: a kernel without a race has no ``ops``, and a second stage
that other kernels launch has no cases of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern.kernels import bits, fp8_rows, tuning
from peftkern.kernels.common import Arch, Launch

from ..gpu.contest import RaceCase
from ..gpu.device import Device, randn
from .traffic import Facts, Rule

BF16, FP16, FP32, INT32 = torch.bfloat16, torch.float16, torch.float32, torch.int32
# the shape in docs/goals.md; of sizes, specialisation uses only divisibility by 16
M, K, N = 8192, 4096, 4096


class Case(NamedTuple):
    """A launch on meta tensors for ``benchmarks.static`` to compile."""

    name: str
    launch: Launch
    matrix_bound: bool = False  # must use the architecture's fastest matrix instruction


class Bucket(NamedTuple):
    """Shapes of one race: M rows, rank r, K inputs, and the outputs N of each projection.

    ``kind`` is "low_rank" (kernels over X or dY alone), "joined" (kernels that make S and Y, or dX
    and dA), "product" (with W), "few" (with W, at most 16 rows), "mlp" (K is the inner width), or
    "experts" (M tokens of K columns, each with ``top`` of the experts, of inner width Ns[0]).
    """

    kind: str
    M: int
    r: int
    K: int
    Ns: tuple[int, ...]
    mask: bool = False
    experts: int = 0
    top: int = 0
    layout: str = ""  # of the gate of experts


Run = Callable[[Any, int], Sequence[Tensor]]  # (config or choice, copy) -> outputs
Exact = Callable[[], list[Tensor]]  # the outputs of copy 0 in float64


@dataclass(frozen=True)
class Raced:
    """The race of one op of the tuning tables."""

    kind: str  # the kind of its buckets
    cases: Callable[[Bucket], Iterable[RaceCase]]  # no case for a bucket that it does not take
    candidates: Callable[[RaceCase], list[Any]]  # at most a dozen configs besides the default
    contest: Callable[[RaceCase, Drawn], tuple[Run, Exact]]
    plan: Callable[[TableTensors, Any, Arch], list[Launch]]  # the launches of a table's config
    matrix_bound: bool = False
    choices: tuple[str, ...] = ()  # values of its ``config=`` that are no configs


class Timing(NamedTuple):
    """What ``benchmarks.cost.model``, the model of time, has to know beside a kernel's traffic.

    ``streams``: it writes within its main loop, not after it. ``near``: it reads what the launch in
    front of it has just written, so from L2. ``pieces``: the equal pieces of work that the programs
    of a persistent grid share. ``integers``: integer operations, for a kernel whose time they are.
    """

    streams: bool = False
    near: bool = False
    pieces: Callable[[Facts], int] | None = None
    integers: Callable[[Facts], int] | None = None


@dataclass(frozen=True)
class KernelEntry:
    """The benchmarks and checks of the kernels in one file of ``kernels/``."""

    # {name of each @triton.jit kernel: rule that gives bytes and operations of a launch}
    traffic: Mapping[str, Rule]
    # {name of a kernel: what the model of time has to know of it}; most need nothing
    timing: Mapping[str, Timing] = field(default_factory=dict)
    # the launches that ship, one for each shape class, rank and mask, to compile ahead of time
    cases: Callable[[Arch], Iterator[Case]] = lambda arch: iter(())
    # {op of the tuning tables: how it is raced}
    ops: Mapping[str, Raced] = field(default_factory=dict)
    # runs for the sanitizer, as (name, outputs): incomplete tiles everywhere, splits forced
    sanitize: Callable[[Operands], Iterator[tuple[str, list[Tensor]]]] = lambda o: iter(())
    # calls whose launches the hardware's counters count too
    counted: Callable[[Operands], Iterator[Callable[[], Any]]] = lambda o: iter(())


def configs(cls: Any, names: str, rows: Iterable[tuple[Any, ...]]) -> list[Any]:
    """An object of ``cls`` for each row of values of the fields in ``names``."""
    fields = names.split()
    return [cls(**dict(zip(fields, row, strict=True))) for row in rows]


# ------------------------------------------------------------------------- compiled ahead of time


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def room(m: int, k: int) -> fp8_rows.Fp8Rows:
    """Room for an fp8 copy of X [m, k]."""
    return fp8_rows.empty(m, k, torch.device("meta"))


def named(name: str, launches: list[Launch], matrix_bound: bool = False) -> Iterator[Case]:
    """A case for each launch of one call."""
    for i, launch in enumerate(launches):
        yield Case(name if i == 0 else f"{name} +{i}", launch, matrix_bound)


def tag(
    rank: int,
    group: int = 1,
    masked: bool = False,
    dtype: torch.dtype = BF16,
    adapter: torch.dtype = FP32,
) -> str:
    """The end of a case's name, such as "r16x3 mask bf16/fp32"."""
    short = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
    ranks = f"r{rank}x{group}" if group > 1 else f"r{rank}"
    return f"{ranks}{' mask' if masked else ''} {short[dtype]}/{short[adapter]}"


class Adapters(NamedTuple):
    """A group of equal adapters that read one X; it makes their meta tensors."""

    r: int
    group: int = 1
    masked: bool = False
    dtype: torch.dtype = BF16
    adapter: torch.dtype = FP32

    @property
    def tag(self) -> str:
        return tag(*self)

    def words(self, m: int = M, k: int = K) -> list[Tensor | None]:
        one = meta(m, k // 32, dtype=INT32) if self.masked else None
        return [one] * self.group

    def ds(self) -> list[Tensor]:
        """S or dS of each adapter: columns of one matrix."""
        s = meta(M, self.r * self.group, dtype=self.dtype)
        return [s[:, i * self.r : i * self.r + self.r] for i in range(self.group)]

    def low(self, *shape: int) -> list[Tensor]:
        """A or B of each adapter."""
        return [meta(*shape, dtype=self.adapter)] * self.group

    def grads(self, *shape: int) -> list[Tensor]:
        return [meta(*shape, dtype=FP32)] * self.group


DRAW = bits.Draw(0.1, 7)  # masks that a shrink draws

ADAPTERS = (
    Adapters(16), Adapters(16, 1, True), Adapters(64, 1, True),
    Adapters(128), Adapters(128, 1, True),
    Adapters(16, 3), Adapters(16, 3, True), Adapters(64, 2, True, BF16, BF16),
    Adapters(16, 1, True, FP32),
)  # fmt: skip
# the adapters of passes that also write an fp8 copy, compiled where a product takes such a copy
COPIED = (Adapters(16), Adapters(16, 1, True), Adapters(64, 1, True), Adapters(16, 3, True))
FP8_PRODUCTS = 90  # the compute capability
# for kernels that hold a whole group, whose ranks may sum to at most 128
JOINED = (
    Adapters(16), Adapters(16, 1, True), Adapters(16, 3, True), Adapters(64, 2, True, BF16, BF16),
    Adapters(128, 1, True), Adapters(16, 1, True, FP32),
)  # fmt: skip


class TableTensors:
    """Makes meta tensors of one entry of a tuning table, by names of its key: X is ("m", "k")."""

    def __init__(self, key: tuning.Key) -> None:
        self.key = key
        self.dtype, self.adapter = getattr(torch, key.dtype), getattr(torch, key.adapter_dtype)

    def __call__(self, *dims: str) -> Tensor:
        """A matrix of activations; each side is the value of a field of the key."""
        return meta(*(getattr(self.key, d) for d in dims), dtype=self.dtype)

    def low(self, *dims: str) -> Tensor:
        """A or B, its sides given as for activations."""
        return meta(*(getattr(self.key, d) for d in dims), dtype=self.adapter)

    def grad(self, *dims: str) -> Tensor:
        return meta(*(getattr(self.key, d) for d in dims), dtype=FP32)

    def words(self) -> list[Tensor | None]:
        k = self.key
        one = meta(k.m, -(-k.k // 32), dtype=INT32) if k.mask else None
        return [one] * k.group


# --------------------------------------------------------------------------------- run on a device


class Drawn:
    """Draws the tensors of one case of the race, each ``copies`` times."""

    def __init__(self, case: RaceCase, device: Device, copies: int) -> None:
        self._device, self._copies = device, copies
        self.dtype, self._adapter = (getattr(torch, d) for d in (case.dtype, case.adapter_dtype))
        self.words: list[Tensor] | None = None
        self.keeps: list[Tensor | None] = [None] * case.group
        if case.mask:
            drawn = bits.dropout_bits(
                case.rows, case.k, 0.1, 11, groups=case.group, device=device.torch
            )
            self.words = list(drawn)
            self.keeps = [bits.unpack_bits(w, case.k) for w in drawn]

    def some(
        self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0
    ) -> list[Tensor]:
        dtype = dtype or self.dtype
        return [randn(self._device, *shape, dtype=dtype, scale=scale) for _ in range(self._copies)]

    def adapters(self, *shape: int) -> list[Tensor]:
        """Copies of A or B with bf16's values, in the adapter's dtype."""
        drawn = self.some(*shape, dtype=torch.float32, scale=0.1)
        return [t.bfloat16().to(self._adapter) for t in drawn]


class Operands:
    """One X [M, K], W [N, K], A [r, K] and B [N, r] (fp32), S [M, r], dY [M, N], packed mask."""

    def __init__(self, device: str, M: int, K: int, N: int, r: int) -> None:
        self.device, self.M, self.K, self.N, self.r = device, M, K, N, r
        self.x, self.w, self.dy, self.s = self(M, K), self(N, K), self(M, N), self(M, r)
        self.a, self.b = self(r, K, dtype=FP32), self(N, r, dtype=FP32)
        self.words = bits.dropout_bits(M, K, 0.1, 7, device=device)

    def __call__(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        """A tensor of normal numbers on the device."""
        return torch.randn(*shape, dtype=FP32, device=self.device).to(dtype)
