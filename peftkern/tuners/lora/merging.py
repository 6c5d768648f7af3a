"""``Merging``: adds adapters to a layer's base weight and takes them out again."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ...ops.bases import repack
from ...ops.bases.experts import reader_of as experts_reader
from ...ops.bases.formats import is_packed, numbers
from ...utils.warning import PeftWarning
from ..adapter_calls import BROKEN, check_adapters_to_merge
from .adding import Sum
from .linear_kinds import is_linear_kind
from .own_forward import own_forward
from .restore import Kept, KeptCopy, at_least_float32
from .variant import is_added, make_ready


def _is_packed(module: Any) -> bool:
    if not isinstance(module, nn.Module):
        return False
    return is_packed(module) or experts_reader(module) is not None


class KeptPacked(NamedTuple):
    """What a quantised layer held before a merge: references to its packed tensors, no copies."""

    state: repack.State
    bias: Tensor | None
    error: float


class Merging:
    """The part of :class:`LoraLayer` that merges, the same for all kinds of layers.

    W' = round(W + Σ delta). The sum is in at least float32, is rounded once for each call of
    :meth:`merge`, and is written into the base weight's own storage. A quantised weight is
    dequantised, and the sum quantised again by the owner's own code (:mod:`...ops.bases.repack`);
    the packed tensors of before are kept beside. A kind of layer defines where the weight is
    (:meth:`_merge_target`) and the factors of an adapter's update (:meth:`_factors`).
    """

    merged_adapters: list[str]
    lora_variant: dict[str, Any]
    # (adapters, record to restore the weight) of each merge() that is not undone yet; a record of
    # None means to subtract
    _kept: list[tuple[list[str], Kept | KeptPacked | None]]
    # the relative error of quantising the merged weight again; 0 for a dense weight
    merge_error: float = 0.0

    # ---------------------------------------------------------------- what a kind of layer answers

    def _merge_target(self) -> tuple[Any, str]:
        """The module and the name of the parameter that adapters are merged into."""
        layer: Any = self
        return layer.get_base_layer(), "weight"

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """(left [..., r], right [r, ...]) in the adapter's dtype.

        Their product times the scaling is the adapter's update, in the base weight's shape.
        """
        raise NotImplementedError

    def _cannot_merge(self, adapter: str) -> str | None:
        """The reason that this adapter cannot be merged into this kind of layer, or None."""
        return None

    def _bias_update(self, adapter: str) -> Tensor:
        """The bias of ``lora_B``, which ``lora_bias`` adds to the base layer's."""
        layer: Any = self
        bias: Tensor = layer.lora_B[adapter].bias
        return bias

    def _agreed(self, ok: bool) -> bool:
        """``ok``, or with a layer that ranks share out whether it is true on all of them."""
        return ok

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True when the adapter's update can be written as plain LoRA's on a linear layer."""
        return False

    # ---------------------------------------------------------------- the update of the weight

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's update, in the base weight's shape and the adapter's dtype."""
        return self._delta_weight(adapter).to(self._factors(adapter)[0].dtype)

    def _delta_weight(self, adapter: str) -> Tensor:
        """:meth:`get_delta_weight` before rounding, as a new tensor.

        float32, or float64 when the adapter or the base weight is float64.
        """
        left, right = (at_least_float32(factor) for factor in self._factors(adapter))
        module, attribute = self._merge_target()
        weight: Any = getattr(module, attribute, None)
        scaling = self.scaling[adapter]  # type: ignore[attr-defined]
        if _is_packed(module) or is_linear_kind(module):
            return (left @ right).mul_(scaling)
        if weight.dtype == torch.float64:
            left, right = left.double(), right.double()
        return (left @ right).mul_(scaling).reshape(weight.shape)

    def _merged_weight(self, adapter: str, weight: Tensor, base: Tensor | None = None) -> Tensor:
        """The base weight with one more adapter in it.

        Args:
            adapter: the adapter's name.
            weight: the weight with the adapters so far, at least float32; it is not changed.
            base: the weight without any adapter; None: ``weight`` has none.
        """
        variant = self.lora_variant.get(adapter)
        if variant is None:
            return self._delta_weight(adapter).to(weight.device, weight.dtype).add_(weight)
        return variant.merged_weight(self, adapter, weight, weight if base is None else base)

    # ---------------------------------------------------------------- in and out

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        exact: bool = True,
    ) -> None:
        """Add adapters to the base weight, in place; :meth:`unmerge` restores it bit for bit.

        A record for that is kept meanwhile, see :mod:`peftkern.tuners.lora.restore`.

        Args:
            safe_merge: refuse a result with NaN or infinity in it.
            adapter_names: the adapters, in this order; None: the active ones. Adapters that have no
                weights here, or are merged already, are skipped.
            exact: False keeps no record of a dense weight: :meth:`unmerge` subtracts, within
                rounding.

        Raises:
            ValueError: with ``safe_merge`` a result that is not finite; a base weight that cannot
                be written (quantised, on the meta device).
            RuntimeError: ``lora_bias`` with a base layer that has no bias.
            NotImplementedError: the kind of layer cannot be merged.

        After an error the weight is as it was.
        """
        names = check_adapters_to_merge(self, adapter_names)  # type: ignore[arg-type]
        self._merge(names, safe_merge, keep=exact)

    def _check_mergeable(self, names: list[str]) -> list[str]:
        """Make all checks that need no arithmetic; returns the ``names`` that have weights here."""
        layer: Any = self
        have = layer._get_available_adapters()
        names = [name for name in names if name in have]
        make_ready(layer)
        if not names:
            return names
        module, attribute = self._merge_target()
        if _is_packed(module):
            self._check_packed(module, attribute, names)
            return names
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
        made_of = (f"{attribute}_g", f"{attribute}_orig")  # parameters of torch's older weight_norm
        if attribute in getattr(module, "parametrizations", ()) or any(
            name in module._parameters for name in made_of
        ):
            raise ValueError(
                f"Cannot merge adapters: the {attribute} of a {kind} is parametrized, so that what "
                "is written to it is lost."
            )
        self._check_adapters(module, names)
        if (said := own_forward(module)) is not None:
            warnings.warn(
                f"Merging into {said}: outputs change unless both compute the same.",
                PeftWarning,
                stacklevel=4,
            )
        return names

    def _check_adapters(self, module: Any, names: list[str]) -> None:
        layer: Any = self
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

    def _check_packed(self, module: Any, attribute: str, names: list[str]) -> None:
        """:meth:`_check_mergeable` for a quantised base weight."""
        if (reason := repack.why_not(module, attribute)) is not None:
            said = f"Cannot merge adapters into a {type(module).__name__}: {reason}."
            experts = experts_reader(module)
            found = numbers(module) if experts is None else experts.read(module)
            if not isinstance(found, str):
                said += " `merge_and_unload(dequantize=True)` merges into dense weights."
            raise ValueError(said)
        self._check_adapters(module, names)

    def _sum(self, names: list[str]) -> Sum | None:
        """What merging these adapters writes; None: the result is not a sum of a dense weight."""
        module, attribute = self._merge_target()
        variants: Any = [self.lora_variant[name] for name in names if name in self.lora_variant]
        if _is_packed(module) or any(not is_added(variant) for variant in variants):
            return None
        scaling: dict[str, float] = self.scaling  # type: ignore[attr-defined]
        factors = [(*self._factors(name), scaling[name]) for name in names]
        return Sum(getattr(module, attribute).data, factors)

    def _merged(self, names: list[str], safe_merge: bool) -> tuple[Tensor, list[bool]]:
        """(the weight with these adapters, in the base's dtype; see :meth:`Sum.finite`)."""
        module, attribute = self._merge_target()
        packed = _is_packed(module)
        before = (
            repack.dense_value(module, attribute) if packed else getattr(module, attribute).data
        )
        base = None
        if any(name in self.lora_variant for name in names) and (self._kept or len(names) > 1):
            base = at_least_float32(self._unmerged_weight())
        weight, finite = at_least_float32(before), []
        for name in names:
            weight = self._merged_weight(name, weight, base)
            finite.append(not safe_merge or bool(weight.to(before.dtype).isfinite().all()))
        return weight.to(before.dtype), finite

    def _merged_bias(self, names: list[str]) -> tuple[Tensor | None, list[bool]]:
        """(bias with these adapters or None, whether it is finite with the first 1, 2, ...)."""
        layer: Any = self
        module: Any = self._merge_target()[0]
        bias: Tensor | None = None
        finite = []
        for name in names:
            if layer.lora_bias.get(name):
                extra = at_least_float32(self._bias_update(name)) * layer.scaling[name]
                bias = (at_least_float32(module.bias.data) if bias is None else bias) + extra
            finite.append(bias is None or bool(bias.to(module.bias.dtype).isfinite().all()))
        return None if bias is None else bias.to(module.bias.dtype), finite

    @torch.no_grad()
    def _check_finite(self, names: list[str]) -> None:
        """Raise a ValueError when the result of merging is not finite; nothing is written."""
        plain = self._sum(names)
        finite = self._merged(names, True)[1] if plain is None else plain.finite()
        self._agree_on(names, finite, self._merged_bias(names)[1])

    def _agree_on(self, names: list[str], *finite: list[bool]) -> None:
        for name, *found in zip(names, *finite, strict=True):
            if not self._agreed(all(found)):
                raise ValueError(BROKEN.format(name))

    @torch.no_grad()
    def _merge(self, names: list[str], safe_merge: bool, keep: bool) -> None:
        names = self._check_mergeable(names)
        if not names:
            return
        module, attribute = self._merge_target()
        plain = self._sum(names)
        weight, finite = (None, []) if plain is not None else self._merged(names, safe_merge)
        bias, bias_finite = self._merged_bias(names)
        if safe_merge:
            finite = finite if plain is None else plain.finite()
            self._agree_on(names, finite, bias_finite)
        if _is_packed(module):
            assert weight is not None
            self._merge_packed(module, names, weight, bias)
            return
        old_bias = None if bias is None or not keep else module.bias.data.clone()
        if plain is not None:
            kept = plain.write(keep)
        else:
            assert weight is not None
            target = getattr(module, attribute).data
            kept = KeptCopy(target) if keep else None
            target.copy_(weight)
            if kept is not None:
                kept.seal(target)
        if kept is not None:
            kept.bias = old_bias
        if bias is not None:
            module.bias.data.copy_(bias)
        self._kept.append((names, kept))
        self.merged_adapters.extend(names)

    def _merge_packed(
        self, module: Any, names: list[str], weight: Tensor, bias: Tensor | None
    ) -> None:
        try:
            before, error = repack.write(module, weight, self._merge_target()[1])
        except ValueError as e:
            raise ValueError(f"Cannot merge adapters {names}: {e}") from e
        kept = KeptPacked(before, None if bias is None else module.bias.data.clone(), error)
        if bias is not None:
            module.bias.data.copy_(bias)
        self.merge_error = error
        self._kept.append((names, kept))
        self.merged_adapters.extend(names)

    def _without_last(self, weight: Tensor, names: list[str], kept: Kept | None) -> Tensor:
        """The value of ``weight`` from before these adapters were merged into it."""
        if kept is not None:
            return kept.restored(weight)
        rest = at_least_float32(weight)
        for name in names:
            rest = rest - self._delta_weight(name).to(weight.device)
        return rest.to(weight.dtype)

    def _unmerged_weight(self) -> Tensor:
        """The base weight without any adapter, in its own dtype; nothing is unmerged."""
        module, attribute = self._merge_target()
        if _is_packed(module):
            return self._unmerged_packed(module)
        weight = getattr(module, attribute).data
        if self._kept and isinstance(self._kept[0][1], KeptPacked):  # dense only since then
            return repack.value_of(module, self._kept[0][1].state).to(weight.dtype)
        for names, kept in reversed(self._kept):
            weight = self._without_last(weight, names, kept)
        return weight

    def _base_parameter(self) -> Tensor:
        """The tensor that adapters are merged into, as a state dict has it."""
        module, attribute = self._merge_target()
        found: Tensor = getattr(module, attribute)
        return found

    def _unmerged_parameter(self) -> Tensor:
        """:meth:`_base_parameter` as it is without any adapter."""
        return self._unmerged_weight()

    def _unmerged_packed(self, module: Any) -> Tensor:
        if not self._kept:
            return repack.dense_value(module, self._merge_target()[1])
        first: Any = self._kept[0][1]
        now = first.state.put(module)
        try:
            return repack.dense_value(module, self._merge_target()[1])
        finally:
            now.put(module)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take every merged adapter out of the base weight, which gets its former bits.

        This holds even when the adapters were changed or deleted meanwhile.
        """
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            self._unmerge_last()

    @torch.no_grad()
    def _unmerge_last(self) -> None:
        """Undo the last call of :meth:`merge`."""
        layer: Any = self
        # without a record (other code filled the list of names) all names count as one call
        names, kept = self._kept[-1] if self._kept else (self.merged_adapters[:], None)
        module, attribute = self._merge_target()
        bias: Any = getattr(module, "bias", None)
        target: Any
        if isinstance(kept, KeptPacked):
            if _is_packed(module):
                kept.state.put(module)
            else:
                target = getattr(module, attribute)
                target.data.copy_(repack.value_of(module, kept.state))
            self.merge_error = 0.0 if len(self._kept) < 2 else self._kept[-2][1].error  # type: ignore
        elif _is_packed(module):
            raise ValueError(
                f"Cannot unmerge {names}: no record of a {type(module).__name__}'s packed weight "
                "from before is here"
            )
        else:
            target = getattr(module, attribute)
            target.data.copy_(self._without_last(target.data, names, kept))
        if kept is not None and kept.bias is not None:
            bias.data.copy_(kept.bias)
        elif kept is None:
            for name in names:
                if layer.lora_bias.get(name):
                    bias.data -= self._bias_update(name) * layer.scaling[name]
        del self._kept[-1:]
        del self.merged_adapters[-len(names) :]
