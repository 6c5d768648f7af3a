"""Adapters on the experts of a mixture: its providers, on layers of Qwen3-30B-A3B and gpt-oss-20b.

transformers' own experts run on tensors without data, with its grouped products; HF PEFT and
peftkern adapt ``gate_up_proj`` and ``down_proj`` of all experts in them. The split form, which adds
two grouped products of the factors to the base's, is written here. The routing is even, and its
weights want a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from peftkern.kernels import checks
from peftkern.kernels.common import Arch

from ..gpu import mixtures
from ..gpu.mixtures import PARAMETERS, Sizes
from ..kernels.experts import LAYERS
from ..kernels.traffic import Traffic
from . import experts_floor
from .cases import BF16, FP32, Provider, backend
from .count import Count, Counter, as_cuda, count
from .experts_floor import Mixture

RANK = 16
PROVIDERS = (
    Provider("floor", "floor"),
    Provider("floor fp32", "floor", FP32),
    Provider("plain frozen", "plain"),
    Provider("HF PEFT bf16", "peft"),
    Provider("HF PEFT default", "peft", FP32),
    Provider("split form", "split"),
    Provider("split form fp32", "split", FP32),
    Provider("torch grouped", "torch"),
    Provider("torch grouped fp32", "torch", FP32),
    Provider("triton", "joined"),
    Provider("triton fp32", "joined", FP32),
)
CASES = {"experts qwen3": "qwen3", "experts gpt-oss": "gpt-oss"}  # the layers by their case
TITLES = {
    "experts qwen3": "Experts of a Qwen3-30B-A3B layer, 8192 tokens, r=16",
    "experts gpt-oss": "Experts of a gpt-oss-20b layer, 8192 tokens, r=16",
}
# a training step's bytes over the floor's may be this much, for these providers and their floors
LIMIT, JUDGED = 1.15, {"triton": "floor", "triton fp32": "floor fp32"}


def mixture(case: str, adapter: torch.dtype, T: int | None = None) -> Mixture:
    """The sizes of a case, for T tokens in place of its own."""
    name = CASES[case]
    layer = LAYERS[name]
    return Mixture(
        T or layer.T, layer.k, layer.experts, layer.width, layer.inner, RANK,
        name == "gpt-oss", adapter,
    )  # fmt: skip


class Layer(nn.Module):
    """Experts with a given routing, whose weights want a gradient."""

    def __init__(self, m: Mixture, device: torch.device | str = "meta") -> None:
        super().__init__()
        sizes = Sizes(m.k, m.E, m.D, m.I, m.bias)
        self.experts = mixtures.experts(sizes, m.dtype, device)
        index = torch.empty((m.T, m.k), dtype=torch.int64, device=device)
        self.register_buffer("index", index)
        self.routing = nn.Parameter(torch.empty((m.T, m.k), dtype=m.dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.experts(x, self.index, self.routing)
        return found


class SplitLinear(nn.Module):
    """Base product and (X A) B for sorted rows, with factors as grouped products want them."""

    def __init__(self, weight: Tensor, bias: Tensor | None, adapter: torch.dtype) -> None:
        super().__init__()
        E, K, N = weight.shape  # a view as products take it, of either layout
        self.weight, self.bias = weight, bias
        self.A = nn.Parameter(torch.empty((E, K, RANK), dtype=adapter, device=weight.device))
        self.B = nn.Parameter(torch.empty((E, RANK, N), dtype=adapter, device=weight.device))

    def forward(self, x: Tensor, ends: Tensor, expert: Tensor) -> Tensor:
        y = grouped_mm(x, self.weight, offs=ends)
        if self.bias is not None:
            y = y + self.bias[expert]
        s = grouped_mm(x, self.A.to(x.dtype), offs=ends) * 2.0
        return y + grouped_mm(s, self.B.to(x.dtype), offs=ends)


class SplitLayer(Layer):
    """The split form in the frame of transformers' grouped experts: sort, products, sum."""

    def __init__(self, m: Mixture, device: torch.device | str = "meta") -> None:
        super().__init__(m, device)
        own: Any = self.experts
        turned = (lambda t: t) if m.bias else (lambda t: t.transpose(1, 2))
        biases = [getattr(own, f"{name}_bias", None) for name in PARAMETERS]
        self.up, self.down = (
            SplitLinear(turned(getattr(own, name)), bias, m.adapter)
            for name, bias in zip(PARAMETERS, biases, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self.experts
        index, (T, k) = self.index.reshape(-1), self.index.shape
        expert, order = torch.sort(index)
        counts = torch.histc(expert.int(), bins=own.num_experts, min=0, max=own.num_experts - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        gu = self.up(x[order // k], ends, expert)
        y = self.down(own._apply_gate(gu), ends, expert)
        y = y * self.routing.reshape(-1)[order][:, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=x.device)
        return y[back].view(T, k, -1).sum(1)


def adapted(library: str, m: Mixture) -> nn.Module:
    """A layer whose experts have the library's adapters on both parameters."""
    model = mixtures.adapted(library, Layer(m), m.r, m.adapter == FP32)
    model.get_parameter("routing").requires_grad_()
    return model


@contextlib.contextmanager
def as_a_gpu(kind: str, arch: Arch) -> Iterator[None]:
    """peftkern's layers on one backend, whose sorts and products take a tensor without data."""
    with (
        backend(kind, arch),
        mock.patch.object(checks, "can_launch", lambda where: True),
        mock.patch.object(
            torch.cuda, "get_device_capability", lambda *a: divmod(arch.capability, 10)
        ),
    ):
        yield


def inferred(who: Provider, case: str, T: int, arch: Arch) -> list[Traffic]:
    """The launches of T tokens without gradients."""
    m = mixture(case, who.adapter, T)
    model = Layer(m)
    if who.kind != "plain":
        model = adapted("peft" if who.kind == "peft" else "peftkern", m)
    x, counter = torch.empty((m.T, m.D), dtype=BF16, device="meta"), Counter()
    ours = who.kind not in ("plain", "peft")
    with as_a_gpu(who.kind, arch) if ours else contextlib.nullcontext():
        model.eval()
        for _ in range(2):  # some tensors are made at their first use
            with as_cuda(), torch.no_grad(), (counter := Counter()):
                model(x)
    return counter.launches


def measure(who: Provider, case: str, arch: Arch) -> Count:
    """Count one provider on one case.

    Raises:
        RuntimeError: the provider did not run the way that its name gives.
    """
    m = mixture(case, who.adapter)
    if who.kind == "floor":
        found = experts_floor
        return Count(found.forward(m), found.backward(m), found.kept(m))
    x = torch.empty((m.T, m.D), dtype=BF16, device="meta", requires_grad=True)
    if who.kind in ("plain", "split"):
        return count(SplitLayer(m) if who.kind == "split" else Layer(m), x)
    if who.kind == "peft":
        return count(adapted("peft", m), x)
    model = adapted("peftkern", m)
    with as_a_gpu(who.kind, arch):
        result = count(model, x)
    ours = any(t.name == "experts gemm" for t in result.forward)
    if ours != (who.kind != "torch"):
        raise RuntimeError(f"{who.name}: the experts did not take the {who.kind} path")
    return result
