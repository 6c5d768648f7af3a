"""Adding adapters to a layer's base weight, and taking them out again."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from transformers.pytorch_utils import Conv1D

from ...utils.private import CONV_FORWARD
from ...utils.warning import PeftWarning
from ..adapter_calls import BROKEN, check_adapters_to_merge
from .restore import Kept, at_least_float32
from .variant import make_ready

# how torch's and transformers' layers compute with their weight
_FORWARDS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("forward",),
    Conv1D: ("forward",),
    nn.Embedding: ("forward",),
    nn.Conv1d: ("forward", CONV_FORWARD),
    nn.Conv2d: ("forward", CONV_FORWARD),
    nn.Conv3d: ("forward", CONV_FORWARD),
}


def own_forward(base: Any) -> str | None:
    """Words for a subclass of a known layer that computes in a way of its own, so that nothing
    says that adding to its weight adds to its output; None for what is known."""
    for kind, methods in _FORWARDS.items():
        if not isinstance(base, kind):
            continue
        cls: Any = type(base)
        if all(getattr(cls, name, None) is getattr(kind, name, None) for name in methods):
            return None
        if kind is nn.Embedding and hasattr(base, "embed_scale"):  # which the update is given too
            return None
        return f"a {cls.__name__}, which has another forward than {kind.__name__}"
    return None


class Merging:
    """What a LoRA layer does to merge: mixed into :class:`LoraLayer`, written once for all kinds.

    W' = round(W + Σ delta), the sum in at least float32 and rounded once for each call of
    :meth:`merge`, then written into the base weight's own storage. A kind of layer says where the
    weight is (:meth:`_merge_target`) and what an adapter's update is made of (:meth:`_factors`).
    """

    merged_adapters: list[str]
    lora_variant: dict[str, Any]
    # (adapters, what undoes it) of each merge() that has not been taken back; None: subtraction
    _kept: list[tuple[list[str], Kept | None]]

    # ---------------------------------------------------------------- what a kind of layer answers

    def _merge_target(self) -> tuple[Any, str]:
        """The module and the name of the parameter that adapters are merged into."""
        layer: Any = self
        return layer.get_base_layer(), "weight"

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """(left [..., r], right [r, ...]): their product, in the base weight's shape, times the
        scaling is the adapter's update. Both in the adapter's dtype."""
        raise NotImplementedError

    def _cannot_merge(self, adapter: str) -> str | None:
        """Why this adapter cannot be merged into this kind of layer, None when it can."""
        return None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter's update can be written as that of plain LoRA on a linear layer."""
        return False

    # ---------------------------------------------------------------- the update of the weight

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's update of the base weight, in its shape and the adapter's dtype."""
        return self._delta_weight(adapter).to(self._factors(adapter)[0].dtype)

    def _delta_weight(self, adapter: str) -> Tensor:
        """:meth:`get_delta_weight` before it is rounded: float32, or float64 where the adapter or
        the base weight is. A tensor of its own."""
        left, right = (at_least_float32(factor) for factor in self._factors(adapter))
        module, attribute = self._merge_target()
        weight = getattr(module, attribute)
        if weight.dtype == torch.float64:
            left, right = left.double(), right.double()
        scaling = self.scaling[adapter]  # type: ignore[attr-defined]
        return (left @ right).mul_(scaling).reshape(weight.shape)

    def _merged_weight(self, adapter: str, weight: Tensor, base: Tensor | None = None) -> Tensor:
        """The base weight with one more adapter in it.

        Args:
            adapter: its name.
            weight: the weight with the adapters so far, at least float32; left as it is.
            base: the weight without any adapter; None: ``weight`` is that.
        """
        variant = self.lora_variant.get(adapter)
        if variant is None:
            return self._delta_weight(adapter).to(weight.device, weight.dtype).add_(weight)
        return variant.merged_weight(self, adapter, weight, weight if base is None else base)

    # ---------------------------------------------------------------- in and out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, in place; :meth:`unmerge` brings back its very bits.

        What it takes to do so is kept until then, see :class:`peftkern.tuners.lora.restore.Kept`.

        Args:
            safe_merge: refuse a result with NaN or infinity in it.
            adapter_names: which adapters, in this order; None: the active ones. Those that have no
                weights here, or are merged already, are passed over.

        Raises:
            ValueError: a broken adapter (``safe_merge``), or a base weight that cannot be written
                (quantised, on the meta device).
            RuntimeError: ``lora_bias`` and a base layer without bias.
            NotImplementedError: the kind of layer cannot be merged.
            The weight is then as it was.
        """
        names = check_adapters_to_merge(self, adapter_names)  # type: ignore[arg-type]
        self._merge(names, safe_merge, keep=True)

    def _check_mergeable(self, names: list[str]) -> list[str]:
        """Those of ``names`` that have weights here, after all checks that need no arithmetic."""
        layer: Any = self
        have = layer._get_available_adapters()
        names = [name for name in names if name in have]
        make_ready(layer)
        if not names:
            return names
        module, attribute = self._merge_target()
        weight = getattr(module, attribute, None)
        kind = type(module).__name__
        if not isinstance(weight, Tensor) or weight.is_meta:
            found = "on the meta device (offloaded?)" if isinstance(weight, Tensor) else "missing"
            raise ValueError(f"Cannot merge adapters: the {attribute} of a {kind} is {found}.")
        if not weight.is_floating_point() or weight.dtype.itemsize == 1:
            raise ValueError(
                f"Cannot merge adapters: the {attribute} of a {kind} is {weight.dtype}, and only "
                "float64, float32, bfloat16 and float16 weights can be merged into."
            )
        if type(weight) not in (Tensor, Parameter):
            raise ValueError(
                f"Cannot merge adapters: the {attribute} of a {kind} is a {type(weight).__name__}."
            )
        made_of = (f"{attribute}_g", f"{attribute}_orig")  # what torch's older normalisations keep
        if attribute in getattr(module, "parametrizations", ()) or any(
            name in module._parameters for name in made_of
        ):
            raise ValueError(
                f"Cannot merge adapters: the {attribute} of a {kind} is parametrized, so that what "
                "is written to it is lost."
            )
        for name in names:
            if reason := self._cannot_merge(name):
                raise NotImplementedError(reason)
            if any(factor.is_meta for factor in self._factors(name)):
                raise ValueError(
                    f"Cannot merge adapters: the weights of {name!r} are on the meta device."
                )
            if layer.lora_bias.get(name) and getattr(module, "bias", None) is None:
                raise RuntimeError(
                    "Impossible to merge LoRA with `lora_bias=True` because the base layer has no "
                    "bias."
                )
        if (said := own_forward(module)) is not None:
            warnings.warn(
                f"Merging into {said}: outputs change unless both compute the same.",
                PeftWarning,
                stacklevel=4,
            )
        return names

    @torch.no_grad()
    def _merged(self, names: list[str], safe_merge: bool) -> tuple[Tensor, Tensor | None]:
        """(weight, bias or None) with these adapters, in the base's dtype. Nothing is written.
        ValueError: ``safe_merge`` and not finite."""
        layer: Any = self
        module, attribute = self._merge_target()
        before = getattr(module, attribute).data
        variants = self.lora_variant
        base = None
        if any(name in variants for name in names) and (self._kept or len(names) > 1):
            base = at_least_float32(self._unmerged_weight())
        weight, bias = at_least_float32(before), None
        for name in names:
            weight = self._merged_weight(name, weight, base)
            ok = not safe_merge or bool(weight.to(before.dtype).isfinite().all())
            if layer.lora_bias.get(name):
                extra = at_least_float32(layer.lora_B[name].bias) * layer.scaling[name]
                bias = (at_least_float32(module.bias.data) if bias is None else bias) + extra
                ok = ok and (not safe_merge or bool(bias.to(module.bias.dtype).isfinite().all()))
            if not ok:
                raise ValueError(BROKEN.format(name))
        return weight.to(before.dtype), None if bias is None else bias.to(module.bias.dtype)

    @torch.no_grad()
    def _merge(self, names: list[str], safe_merge: bool, keep: bool) -> None:
        names = self._check_mergeable(names)
        if not names:
            return
        weight, bias = self._merged(names, safe_merge)
        module, attribute = self._merge_target()
        target = getattr(module, attribute)
        kept = None
        if keep:
            factors = None
            if not any(name in self.lora_variant for name in names):
                factors = [(*self._factors(n), self.scaling[n]) for n in names]  # type: ignore
            kept = Kept(target.data, weight, factors)
            kept.bias = None if bias is None else module.bias.data.clone()
        target.data.copy_(weight)
        if bias is not None:
            module.bias.data.copy_(bias)
        self._kept.append((names, kept))
        self.merged_adapters.extend(names)

    def _without_last(self, weight: Tensor, names: list[str], kept: Kept | None) -> Tensor:
        """``weight`` before these adapters were merged into it."""
        if kept is not None:
            return kept.restored(weight)
        rest = at_least_float32(weight)
        for name in names:
            rest = rest - self._delta_weight(name).to(weight.device)
        return rest.to(weight.dtype)

    def _unmerged_weight(self) -> Tensor:
        """The base weight without any adapter, in its own dtype; what is merged stays so."""
        module, attribute = self._merge_target()
        weight = getattr(module, attribute).data
        for names, kept in reversed(self._kept):
            weight = self._without_last(weight, names, kept)
        return weight

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take every merged adapter out of the base weight, which gets the bits it had before,
        whatever became of the adapters meanwhile."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            self._unmerge_last()

    @torch.no_grad()
    def _unmerge_last(self) -> None:
        """Take the last call of :meth:`merge` back."""
        layer: Any = self
        # a list of names that somebody else filled is one call without a record
        names, kept = self._kept[-1] if self._kept else (self.merged_adapters[:], None)
        module, attribute = self._merge_target()
        target: Any = getattr(module, attribute)
        bias: Any = getattr(module, "bias", None)
        target.data.copy_(self._without_last(target.data, names, kept))
        if kept is not None and kept.bias is not None:
            bias.data.copy_(kept.bias)
        elif kept is None:
            for name in names:
                if layer.lora_bias.get(name):
                    bias.data -= layer.lora_B[name].bias * layer.scaling[name]
        del self._kept[-1:]
        del self.merged_adapters[-len(names) :]
