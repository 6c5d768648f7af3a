"""``explain``: a table of every adapted layer with the backend that runs it and the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import liger
from .fusing import hf_layers, hf_module
from .ops.backend import describe
from .ops.bases.formats import as_weight, read, reader_of
from .ops.bases.weight import Packed
from .ops.fp8_copies import in_fp8
from .ops.library import why_formula
from .tuners.lora.base import LoraLayer
from .tuners.lora.experts_call import describe_mixtures
from .tuners.lora.mlp import describe_blocks
from .tuners.lora.parameter_product import is_product
from .tuners.lora.ran import FUSED, in_parts, last_of, reason_of
from .utils.collectives import local
from .utils.gathering import gathered_device, is_shard


@dataclass(frozen=True)
class LayerReport:
    """A row of :class:`Explanation`: one adapted layer.

    Attributes:
        name: the layer's name in the model.
        kind: the class of its base layer.
        shape: (K, N); for attention with a prefix (P, width of the prefix's keys).
        ranks: {adapter: rank}; for a prefix, P in place of the rank.
        fused: True when the layer runs as one operation.
        backend: the name of what runs it.
        reason: the reason for that, in words.
        compiled: the result of ``torch.compile`` for this layer, in words.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    ranks: dict[str, int]
    fused: bool
    backend: str
    reason: str
    compiled: str


class Explanation(list[LayerReport]):
    """A list of :class:`LayerReport` that prints as a table with a summary below.

    Attributes:
        liger: what liger-kernel does in the model, in words; None for nothing.
    """

    liger: str | None = None

    def __str__(self) -> str:
        head = ("layer", "kind", "K x N", "r", "runs as", "why")
        rows = [
            (
                row.name,
                row.kind,
                f"{row.shape[0]} x {row.shape[1]}",
                " ".join(f"{name}:{r}" for name, r in row.ranks.items()),
                row.backend,
                row.reason,
            )
            for row in self
        ]
        widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in [head, *rows]
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        total = _counted(row.backend for row in self)
        if self:
            total += f"; under torch.compile: {_counted(row.compiled for row in self)}"
        lines.append(f"{len(self)} adapted layers: {total or 'none'}")
        return "\n".join(lines if self.liger is None else [*lines, self.liger])


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(names).most_common())


def _compiled(layer: Any) -> str:
    """The result of ``torch.compile`` for a fused layer, in words.

    The input is assumed to have the weight's dtype and device.
    """
    parameter = getattr(layer, "parameter_name", None)
    if parameter is not None and not is_product(layer.base_layer, parameter):
        return "operators"
    if reader_of(layer.base_layer) is not None:
        return "plain formula (the base weight is quantised)"
    if in_parts(layer):
        return "as its weights are while it is traced"
    if is_shard(layer.base_layer.weight):
        return "plain formula (ranks share the weight out)"
    A = layer.lora_A[next(n for n in layer.active_adapters if n in layer.lora_A)].weight
    why = why_formula(layer.base_layer.weight, A)
    return "one operator" if why is None else f"plain formula ({why})"


def _compiled_formula(layer: Any) -> str:
    """The result of ``torch.compile`` for a layer that is not fused, in words."""
    variants = [layer.lora_variant.get(name) for name in layer.active_adapters]
    measured = any(getattr(variant, "measures_weight", False) for variant in variants)
    if measured and reader_of(layer.get_base_layer()) is not None:
        return "plain formula, in parts: the quantised weight is read between graphs"
    return "plain formula"


def explain(model: nn.Module) -> Explanation:
    """A table of the adapted layers of ``model``: how each runs at present, and why.

    HF PEFT's LoRA layers are included (see :func:`peftkern.fuse`).
    ``print(peftkern.explain(model))`` shows the table; its rows are :class:`LayerReport`.
    """
    backend, why = describe()
    rows = Explanation()
    theirs, blocks, mixtures = hf_layers(model), describe_blocks(model), describe_mixtures(model)
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) and name not in theirs:
            continue
        layer: Any = module
        of_hf = name in theirs
        reason = _kept(layer) if of_hf else layer.decline_reason()
        of_outermost, of_mixture = mixtures.get(id(layer), (None, ""))
        own = None if of_hf else layer.variant_fused_as()
        ran = last_of(layer)
        if ran is None and of_mixture and in_parts(layer):
            ran = FUSED  # the outermost wrapper ran for all
        if ran is not None:
            reason = ran.words or None
            own = reason if ran.fused else None
        reason = reason or of_outermost
        group = layer.__dict__.get("_group")
        whole, of_mlp = blocks.get(id(layer), (False, ""))
        together = "" if reason or group is None or whole else group.describe(layer)
        if ran is not None and ran.fused:
            of_mixture += "; its weights are shards between forwards, and were whole in the last"
        decided = why
        if backend == "auto" and reason is None and not of_mixture:
            decided = _decided(layer, group)
        shared = "" if of_hf else layer.describe_sharing()
        if ran is not None and own is None and reason is not None:
            shared = ", in the last forward"
        slow = "HF PEFT" if name in theirs else "base layer + update"
        rows.append(
            LayerReport(
                name=name,
                kind=type(layer.get_base_layer()).__name__,
                shape=(layer.in_features, layer.out_features),
                ranks=dict(layer.r),
                fused=reason is None or own is not None,
                backend=slow if reason and own is None else f"{backend} fused",
                reason=decided + _format(layer, backend) + together + of_mlp + of_mixture + shared
                if reason is None
                else (own or reason) + shared,
                compiled=_compiled(layer) if reason is None else _compiled_formula(layer),
            )
        )
    rows.extend(_prefix_rows(model))
    rows.liger = liger.describe(model)
    return rows


def _prefix_rows(model: nn.Module) -> list[LayerReport]:
    injection: Any = getattr(getattr(model, "tuner", None), "injection", None)
    if injection is None:
        return []
    from .tuners.prefix_tuning.report import layers_of  # imports transformers

    adapters: Any = getattr(model, "peft_config", {})
    lengths = {name: config.num_virtual_tokens for name, config in adapters.items()}
    return [
        LayerReport(
            name=name,
            kind=type(module).__name__,
            shape=shape,
            ranks=lengths,
            fused=fused,
            backend=backend,
            reason=reason,
            compiled="torch's attention",
        )
        for name, module, shape, (fused, backend, reason) in layers_of(model, injection)
    ]


def _kept(layer: Any) -> str | None:
    """The reason that a LoRA layer of HF PEFT runs HF PEFT's forward; None when it is fused."""
    hf = hf_module()
    if hf.is_fused(layer):
        return layer.decline_reason()
    return hf.why_not(layer) or "HF PEFT's layer; peftkern.fuse(model) fuses it"


def _format(layer: Any, backend: str) -> str:
    """The words for a base weight that is read in its format; none for a dense one."""
    packed = _packed(layer)
    if packed is None:
        return ""
    words = f"; base weight: {packed.format}"
    if backend == "torch":
        return words if in_fp8(packed) is None else f"{words}, X and dY quantised by torch"
    from .ops.quantised_triton import describe as in_words

    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return words
    if in_fp8(packed) is not None and (why := _refused(layer)) is not None:
        return f"{words}, X and dY quantised by torch ({why})"
    dtype = packed.compute_dtype(layer.lora_A[names[0]].weight.dtype)
    return f"{words}, {in_words(packed, dtype)}"


def _packed(layer: Any) -> Packed | None:
    """The base weight of a layer that is read in its format; None for a dense one."""
    base = layer.get_base_layer()
    found = None if reader_of(base) is None else read(base)
    return None if found is None or isinstance(found, str) else found.packed


def _decided(layer: Any, group: Any) -> str:
    """The dispatcher's decisions for a fused layer, alone and in its group, in words."""
    from .ops.auto_report import describe as in_words

    packed = _packed(layer)
    if packed is not None and in_fp8(packed) is not None and _refused(layer) is None:
        return "auto: the kernels, as no race decides products in fp8"
    together = None
    if group is not None and not group.off:
        members = [m for m in group.layers if reason_of(m) is None]
        together = _numbers(members) if len(members) > 1 else None
    adapter = layer.lora_A[next(n for n in layer.active_adapters if n in layer.lora_A)]
    return in_words(_like(layer, adapter.weight), adapter.weight.dtype, _numbers([layer]), together)


def _refused(layer: Any) -> str | None:
    """The reason that the Triton kernels do not take a fused layer; None when they do."""
    from .ops.triton_backend import refusal

    adapter = layer.lora_A[next(n for n in layer.active_adapters if n in layer.lora_A)].weight
    return refusal(_like(layer, adapter), adapter.dtype, _numbers([layer])[2])


def _like(layer: Any, adapter: Tensor) -> Tensor:
    """A tensor of the dtype and device that the layer's activations are expected to have."""
    packed = _packed(layer)
    if packed is None:
        weight: Tensor = getattr(layer, "weight", adapter)
        if not in_parts(layer):
            return local(weight)
        return torch.empty(0, dtype=weight.dtype, device=gathered_device(weight))
    dtype = packed.compute_dtype(adapter.dtype)
    return as_weight(packed, adapter.new_empty(0, dtype=dtype))


def _numbers(layers: list[Any]) -> tuple[int, int, int, int]:
    """(sum of N, K, largest active rank, number of layers)."""
    ranks = [layer.r[name] for layer in layers for name in layer.active_adapters if name in layer.r]
    sizes = [_sizes(layer) for layer in layers]
    return sum(N for _, N in sizes), sizes[0][0], max(ranks, default=0), len(layers)


def _sizes(layer: Any) -> tuple[int, int]:
    """(K, N) of the product that this process computes."""
    weight = layer.get_base_layer()._parameters.get("weight")
    if is_shard(weight) and not in_parts(layer):
        N, K = local(weight).shape
        return K, N
    return layer.in_features, layer.out_features
