"""The cases (a LoRA linear, a q,k,v group, one Llama-8B layer) and their providers."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from peftkern.kernels import common, launching
from peftkern.kernels.registry import KERNELS
from peftkern.ops import bits as mask_bits

from ..kernels.traffic import Traffic
from . import floor as cost_floor
from . import fp8 as cost_fp8
from .count import Count, Counter, Launched, as_cuda, count, record

BF16, FP32 = torch.bfloat16, torch.float32
CASES = ("linear", "group", "layer")
_FLASH = "peftkern_cost_flash"


class Shape(NamedTuple):
    """M rows, K inputs, N outputs of each projection, rank r; the layer has Llama-8B's widths."""

    M: int = 8192
    K: int = 4096
    N: int = 4096
    r: int = 16


class Provider(NamedTuple):
    """An implementation whose launches are counted.

    ``kind`` is "peft", "plain" (no adapters), "floor" (``cost_floor``), or for peftkern's layers
    their backend or product: "torch", "hybrid", "joined" or "fused". ``base`` is "" for bf16, or
    one of :data:`.fp8.WAYS` of quantising X and dY for a base in fp8.
    """

    name: str
    kind: str
    adapter: torch.dtype = BF16
    base: str = ""


PROVIDERS = (
    Provider("floor", "floor"),
    Provider("plain frozen", "plain"),
    Provider("HF PEFT bf16", "peft"),
    Provider("HF PEFT default", "peft", FP32),
    Provider("torch backend", "torch"),
    Provider("torch backend fp32", "torch", FP32),
    Provider("triton hybrid", "hybrid"),
    Provider("triton hybrid fp32", "hybrid", FP32),
    Provider("triton joined", "joined"),
    Provider("triton joined fp32", "joined", FP32),
    Provider("triton fused", "fused"),
    Provider("triton fused fp32", "fused", FP32),
)


class Projections(nn.Module):
    """Frozen projections q, k, v, … of one X."""

    def __init__(self, K: int, Ns: Sequence[int]) -> None:
        super().__init__()
        self.names = list("qkv")[: len(Ns)]
        for name, n in zip(self.names, Ns, strict=True):
            setattr(self, name, nn.Linear(K, n, bias=False, device="meta", dtype=BF16))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name)(x) for name in self.names)


def _flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention in one fused kernel that takes grouped heads, the same for every provider."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    out = attend(query, key, value, 0.0, True, scale=scaling)[0]
    return out.transpose(1, 2), None


class LlamaBlock(nn.Module):
    """transformers' MLP with Llama-3-8B's sizes."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaMLP

        config = LlamaConfig(hidden_size=4096, intermediate_size=14336)
        with torch.device("meta"):
            self.mlp = LlamaMLP(config).to(BF16)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class LlamaLayer(nn.Module):
    """transformers' decoder layer with Llama-3-8B's sizes and given rotary angles."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import AttentionInterface, LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        AttentionInterface.register(_FLASH, _flash)
        config = LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
            num_key_value_heads=8, attn_implementation=_FLASH,
        )  # fmt: skip
        with torch.device("meta"):
            self.layer = LlamaDecoderLayer(config, layer_idx=0).to(BF16)

    def forward(self, x: Tensor) -> Tensor:
        angles = x.new_empty((1, x.shape[1], 128))
        return self.layer(x, position_embeddings=(angles, angles))


_LAYER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _build(case: str, shape: Shape) -> tuple[nn.Module, Tensor, list[str]]:
    """(frozen model, X, names of the projections to adapt)."""
    if case == "layer":
        tokens = min(2048, shape.M)
        size = (shape.M // tokens, tokens, 4096) if shape.M % tokens == 0 else (1, shape.M, 4096)
        model, targets = LlamaLayer(), _LAYER_TARGETS
    elif case == "mlp":
        model, targets, size = LlamaBlock(), _LAYER_TARGETS[-3:], (shape.M, 4096)
    else:
        Ns = {"linear": [1], "group": [1, 1, 1], "qkv": [1, 4, 4]}[case]  # as shares of N
        model = Projections(shape.K, [shape.N // n for n in Ns])
        size, targets = (shape.M, shape.K), model.names
    model.requires_grad_(False)
    return model, torch.empty(size, dtype=BF16, device="meta", requires_grad=True), targets


class _Floor(torch.autograd.Function):
    """Stands for a group: records the floor's launches, keeps X alone, makes empty outputs."""

    @staticmethod
    def forward(ctx: Any, module: FloorGroup, x: Tensor, *weights: Tensor) -> Any:
        g, rows = module.group, x.shape[:-1]
        record([cost_floor.forward(g)])
        ctx.save_for_backward(x, *weights)
        ctx.module, ctx.shapes = module, [tuple(w.shape) for w in weights]
        return tuple(x.new_empty((*rows, n)) for n in g.Ns)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        x = ctx.saved_tensors[0]
        for dy in dys:
            dy.reshape(-1, dy.shape[-1])  # a copy in some layouts, which is then counted
        record([cost_floor.backward(ctx.module.group)])
        grads = [
            x.new_empty(shape, dtype=ctx.module.group.adapter) if needed else None
            for shape, needed in zip(ctx.shapes, ctx.needs_input_grad[2:], strict=True)
        ]
        return None, torch.empty_like(x), *grads


class FloorGroup(nn.Module):
    """Projections of one X that launch the floor of their group."""

    def __init__(self, group: cost_floor.Group) -> None:
        super().__init__()
        self.group = group
        for i, n in enumerate(group.Ns):
            for name, rows, cols in (("w", n, group.K), ("A", group.r, group.K), ("B", n, group.r)):
                dtype = BF16 if name == "w" else group.adapter
                t = torch.empty(rows, cols, dtype=dtype, device="meta")
                self.register_parameter(f"{name}{i}", nn.Parameter(t, requires_grad=name != "w"))
        self.outputs: tuple[Tensor | None, list[Tensor]] = (None, [])

    def member(self, i: int, x: Tensor) -> Tensor:
        """Output i; the first call with an X makes all outputs."""
        if self.outputs[0] is not x:
            self.outputs = (x, list(_Floor.apply(self, x, *self.parameters())))
        y = self.outputs[1][i]
        if i == len(self.group.Ns) - 1:
            self.outputs = (None, [])
        return y


class _Member(nn.Module):
    def __init__(self, group: FloorGroup, i: int) -> None:
        super().__init__()
        self.group, self.i = group, i

    def forward(self, x: Tensor) -> Tensor:
        return self.group.member(self.i, x)


def _to_floor(model: nn.Module, shape: Shape) -> None:
    """Replace the projections of ``model`` by floors; those that share an X become one group."""
    groups: list[tuple[nn.Module, list[str]]]
    if isinstance(model, (LlamaLayer, LlamaBlock)):
        mlp = model.layer.mlp if isinstance(model, LlamaLayer) else model.mlp
        groups = [(mlp, ["gate_proj", "up_proj"]), (mlp, ["down_proj"])]
        if isinstance(model, LlamaLayer):
            attention = model.layer.self_attn
            groups = [
                (attention, ["q_proj", "k_proj", "v_proj"]), (attention, ["o_proj"]), *groups
            ]  # fmt: skip
    else:
        groups = [(model, model.names)]
    for owner, names in groups:
        Ns = tuple(getattr(owner, name).out_features for name in names)
        K = getattr(owner, names[0]).in_features
        floor = FloorGroup(cost_floor.Group(shape.M, K, Ns, shape.r))
        for i, name in enumerate(names):
            setattr(owner, name, _Member(floor, i))


def adapt(
    library: Any, model: nn.Module, targets: list[str], who: Provider, r: int, p: float
) -> None:
    config = library.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=p, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.get_peft_model(model, config, autocast_adapter_dtype=who.adapter == FP32)
    found = {q.dtype for q in model.parameters() if q.requires_grad}
    if found != {who.adapter}:
        raise RuntimeError(f"{who.name}: adapters came out as {found}, not {who.adapter}")


@contextlib.contextmanager
def backend(kind: str, arch: common.Arch) -> Iterator[None]:
    """Run peftkern's real layers on one backend; Triton launches are recorded, not run."""
    from peftkern.ops import backend as ops_backend
    from peftkern.ops import triton_backend, tuned

    with contextlib.ExitStack() as stack:
        stack.enter_context(launching.as_written())
        tuned.forget()  # with it what was decided for another architecture
        stack.callback(tuned.forget)
        stack.enter_context(ops_backend.use_backend("torch" if kind == "torch" else "triton"))
        stack.enter_context(mock.patch.dict(mask_bits._TABLES, clear=True))
        if kind != "torch":
            stack.enter_context(mock.patch.object(triton_backend, "product", kind))
            stack.enter_context(
                mock.patch.object(common.Launch, "run", lambda self: record([Launched.of(self)]))
            )
            kernels = [importlib.import_module(f"peftkern.kernels.{name}") for name in KERNELS]
            for module in (triton_backend, *(k for k in kernels if hasattr(k, "arch_of"))):
                stack.enter_context(mock.patch.object(module, "arch_of", lambda device: arch))
        yield


def inferred(who: Provider, shape: Shape, arch: common.Arch) -> dict[str, list[Traffic]]:
    """{"fwd": launches} of one LoRA linear in eval mode without gradients."""
    model, x, targets = _build("linear", shape)
    if who.kind != "plain":
        adapt(importlib.import_module("peft" if who.kind == "peft" else "peftkern"),
               model, targets, who, shape.r, 0.0)  # fmt: skip
    ours = who.kind not in ("plain", "peft")
    with backend(who.kind, arch) if ours else contextlib.nullcontext():
        with as_cuda(), torch.no_grad(), Counter() as counter:
            model.eval()(x.detach())
    return {"fwd": counter.launches}


def measure(who: Provider, case: str, shape: Shape, p: float, arch: common.Arch) -> Count:
    """Count one provider on one case, in training mode with dropout ``p``.

    Raises:
        RuntimeError: the provider did not run the way that its name gives.
    """
    model, x, targets = _build(case, shape)
    if who.kind == "plain":
        return count(model, x)
    if who.kind == "peft":
        import peft

        adapt(peft, model, targets, who, shape.r, p)
        return count(model.train(), x)
    if who.kind != "floor":
        import peftkern

        if who.base:
            cost_fp8.quantise(model, targets)
        adapt(peftkern, model, targets, who, shape.r, p)
        with backend(who.kind, arch), cost_fp8.way(who.base):
            result = count(model.train(), x)
        if (who.kind != "torch") != any(t.requested for t in result.forward):
            raise RuntimeError(f"{who.name}: the layers did not take the {who.kind} path")
        return result
    _to_floor(model, shape)
    return count(model, x)
