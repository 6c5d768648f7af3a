"""LoRA on a quantised base: bytes of a Llama-8B layer's seven linears, decoding and training.

    python -m benchmarks.cost --base nf4 [fp8 int8 int4 mxfp4] [--gpu H100 H200] [--json]
    python -m benchmarks.cost --base nf4 --time

The linears are those of one X each: q, k, v together, o, gate and up together, down. Adapters are
float32, as HF PEFT and peftkern make them there. peftkern's real layers run on packed weights
without data: up to 64 rows in the kernel that reads packed weights, more rows by a dequantisation
into memory that lives for one product, forward and backward.

HF PEFT's real layers run on linears that are dequantised as their owners do at best: one launch
that reads the packed weight and writes a dense one, for each product. One row on NF4 is
bitsandbytes' own product, which reads the packed weight alone. Owners that take several launches to
dequantise, as most do, move more. No speed was measured.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from peftkern.kernels import checks
from peftkern.kernels.common import Arch

from ..gpu.cases import LLAMA_8B
from ..gpu.packed import Owned, owned_is_read, packed_bytes, without_data
from ..kernels.entry import meta
from ..kernels.traffic import Traffic, nbytes
from .cases import BF16, FP32, Projections, Provider, adapt, backend
from .count import Count, Counter, as_cuda, count, record

RANK, TOKENS = 16, 8192
ROWS = (1, 16)  # of a decode step
LIMIT = 1.1  # a decode step's bytes over those of the packed weights
PLAIN, ADAPTED, PEFT, OURS = "frozen bf16", "peftkern on bf16", "HF PEFT", "peftkern"
ON_BF16 = (Provider(PLAIN, "plain"), Provider(ADAPTED, "joined", FP32))  # of no quantised base
PROVIDERS = (*ON_BF16, Provider(PEFT, "peft", FP32), Provider(OURS, "joined", FP32))


class Counted(Owned):
    """One whose owner dequantises in a launch that is recorded."""

    def __init__(self, base: str, N: int, K: int) -> None:
        super().__init__(without_data(base, N, K))
        self.fused = base == "nf4"

    def forward(self, input: Tensor) -> Tensor:
        if self.fused and input.numel() == input.shape[-1] and not torch.is_grad_enabled():
            y = input.new_empty((*input.shape[:-1], self.out_features))
            read, flops = packed_bytes(self.packed) + nbytes(input), 2 * y.numel() * input.numel()
            record([Traffic("gemv_4bit", 1, read, nbytes(y), flops, "fp32")])
            return y
        return super().forward(input)

    def dense(self, dtype: torch.dtype) -> Tensor:
        w = meta(*self.packed.shape, dtype=dtype)
        record([Traffic("dequantise (owner)", 1, packed_bytes(self.packed), nbytes(w))])
        return w


def groups() -> list[tuple[int, tuple[int, ...]]]:
    """(K, N of each projection) of a layer's linears, those of one X together."""
    all_of = LLAMA_8B.linears()
    members = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"),
               ("down_proj",))  # fmt: skip
    return [(all_of[names[0]][0], tuple(all_of[n][1] for n in names)) for names in members]


def weight_bytes(base: str) -> int:
    """Bytes of the layer's packed weights."""
    return sum(packed_bytes(without_data(base, n, K)) for K, Ns in groups() for n in Ns)


@contextlib.contextmanager
def _model(
    who: Provider, base: str | None, K: int, Ns: tuple[int, ...], arch: Arch
) -> Iterator[Any]:
    """A provider's projections of one X, within the block; in bf16 without a base."""
    model = Projections(K, Ns)
    with owned_is_read(Counted), mock.patch.object(checks, "can_launch", lambda where: True):
        if base is not None:
            for name, n in zip(model.names, Ns, strict=True):
                setattr(model, name, Counted(base, n, K))
        model.requires_grad_(False)
        if who.kind == "plain":
            yield model
            return
        library = importlib.import_module("peft" if who.kind == "peft" else "peftkern")
        adapt(library, model, model.names, who, RANK, 0.0)
        with backend(who.kind, arch) if who.kind != "peft" else contextlib.nullcontext():
            yield model


def decoded(who: Provider, base: str, rows: int, arch: Arch) -> list[Traffic]:
    """The launches of the layer's linears on ``rows`` rows without gradients.

    Raises:
        RuntimeError: peftkern did not read the packed weights in its kernel.
    """
    return [*_decoded(who, None if who in ON_BF16 else base, rows, arch)]


@functools.cache
def _decoded(who: Provider, base: str | None, rows: int, arch: Arch) -> tuple[Traffic, ...]:
    found: list[Traffic] = []
    for K, Ns in groups():
        with _model(who, base, K, Ns, arch) as model:
            x, counter = meta(rows, K), Counter()
            model.eval()
            for _ in range(2):  # some tensors are made at their first use
                with as_cuda(), torch.no_grad(), (counter := Counter()):
                    model(x)
        if who.name == OURS and counter.launches[-1].name != "decode_quantised":
            raise RuntimeError(f"{base}: {rows} rows did not take the kernel for packed weights")
        found += counter.launches
    return tuple(found)


def trained(who: Provider, base: str, arch: Arch) -> Count:
    """The launches of the layer's linears forward and backward, without dropout.

    Raises:
        RuntimeError: peftkern did not dequantise in its kernel.
    """
    return _trained(who, None if who in ON_BF16 else base, arch)


@functools.cache
def _trained(who: Provider, base: str | None, arch: Arch) -> Count:
    total = Count([], [], 0)
    for K, Ns in groups():
        with _model(who, base, K, Ns, arch) as model:
            x = torch.empty((TOKENS, K), dtype=BF16, device="meta", requires_grad=True)
            one = count(model.train(), x)
        total = Count(
            total.forward + one.forward, total.backward + one.backward, total.kept + one.kept
        )
    for phase in (total.forward, total.backward) if who.name == OURS else ():
        made = sum(t.name == "dequantise" for t in phase)
        if made != sum(len(Ns) for _, Ns in groups()):
            raise RuntimeError(f"{base}: {made} dequantisations in peftkern's kernel")
    return total


# -------------------------------------------------------------------------------------- the figures


class Base(NamedTuple):
    """What is counted of one base: launches by provider, for each number of rows, and training."""

    name: str
    packed: int
    decoding: dict[int, dict[str, list[Traffic]]]
    training: dict[str, Count]


class Verdict(NamedTuple):
    """A ratio of bytes; without a limit it is told and not judged."""

    base: str
    target: str
    value: float
    limit: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.limit is None else self.value <= self.limit


def measure(base: str, arch: Arch) -> Base:
    decoding = {m: {w.name: decoded(w, base, m, arch) for w in PROVIDERS} for m in ROWS}
    training = {w.name: trained(w, base, arch) for w in PROVIDERS}
    return Base(base, weight_bytes(base), decoding, training)


def moved(launches: Sequence[Traffic]) -> int:
    return sum(t.bytes for t in launches)


def step_bytes(found: Count) -> int:
    """Bytes of a forward and a backward."""
    return moved(found.forward) + moved(found.backward)


def verdicts(b: Base) -> list[Verdict]:
    """Decoding over the packed weights, and both ways over others'."""
    out = [
        Verdict(b.name, f"M={m}: bytes / packed weights", moved(d[OURS]) / b.packed, LIMIT)
        for m, d in b.decoding.items()
    ]
    out += [
        Verdict(b.name, f"M={m}: bytes / HF PEFT's", moved(d[OURS]) / moved(d[PEFT]))
        for m, d in b.decoding.items()
    ]
    step = step_bytes(b.training[OURS])
    for name, words in ((ADAPTED, "peftkern's on bf16"), (PEFT, "HF PEFT's")):
        value = step / step_bytes(b.training[name])
        out.append(Verdict(b.name, f"training, M={TOKENS}: bytes / {words}", value))
    return out
