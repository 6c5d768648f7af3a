"""``ModelMerging``: merges, unmerges and unloads a whole model: every layer, or none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ...ops.bases import repack
from ...ops.bases.formats import is_packed
from ...utils.warning import PeftWarning
from ..adapter_calls import BROKEN, check_adapters_to_merge
from ..base_layer import BaseTunerLayer, all_modules
from ..modules_to_save import ModulesToSaveWrapper
from .dequantising import forget_quantization, made_dense, name_quantization
from .merging import KeptPacked, Merging
from .mlp import release_blocks
from .offload import onloaded
from .parting import Parting

TIED = (
    "Model with `tie_word_embeddings=True` and the tied_target_modules={} are part of the adapter. "
    "The weight is shared: what `merge_adapter` adds in one place shows in the others, and outputs "
    "change. `merge_and_unload` gives each its own weight."
)


class ModelMerging:
    """The part of :class:`LoraModel` that merges."""

    model: nn.Module
    peft_config: dict[str, Any]
    targeted_module_names: list[str]

    def _check_merge_allowed(
        self, in_place: bool = True, dense: bool = False, layers: list[Any] | None = None
    ) -> None:
        """Raise a ValueError when adapters cannot be merged.

        With ``in_place``, warn when tied weights are adapted, as they stay tied. ``layers`` are the
        model's adapter layers where the caller has them already.
        """
        adapted = []
        if in_place:
            adapted = Parting(self.model).adapted(layers or self._tuner_layers())
        if adapted:
            warnings.warn(TIED.format(adapted), stacklevel=4)
        if getattr(self.model, "quantization_method", None) == "gptq" and not dense:
            self._check_gptq()
        if any(getattr(c, "layer_replication", None) for c in self.peft_config.values()):
            raise ValueError("Cannot merge LORA layers when base model layers are replicated")

    def _check_gptq(self) -> None:
        bases = [layer.get_base_layer() for layer in self._tuner_layers()]
        reasons = [repack.why_not(base) for base in bases if is_packed(base)]
        refused = next((reason for reason in reasons if reason is not None), None)
        if refused is not None or not reasons:
            raise ValueError(
                "Cannot merge LORA layers when the model is gptq quantized"
                + (f": {refused}." if refused else ": none of these layers is.")
                + " `merge_and_unload(dequantize=True)` merges into dense weights."
            )

    def _tuner_layers(self) -> list[Any]:
        return [m for m in all_modules(self.model) if isinstance(m, BaseTunerLayer)]

    def _check_names(self, adapter_names: Any) -> None:
        if adapter_names is None or isinstance(adapter_names, str):  # layers raise for a str
            return
        unknown = [name for name in adapter_names if name not in self.peft_config]
        if unknown:
            raise ValueError(
                f"`adapter_names` has {unknown}, and the adapters are {sorted(self.peft_config)}"
            )

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        exact: bool = True,
    ) -> None:
        """Add adapters to the base weights, in place; :meth:`unmerge_adapter` restores their bits.

        Memory for that is kept meanwhile: of weights of up to 2^23 elements on a CPU (2^17 on other
        devices) a copy; of larger ones about 0.1 to 0.6 bytes for each bf16 element and 0.1 to 0.8
        for each float32 one (updates of 0.1% to 10% of the weight), never more than a copy. Of a
        quantised weight the packed tensors of before are kept; one warning tells how far quantising
        the sums again has changed them.

        Args:
            adapter_names: the adapters, in this order; None: the active ones. Modules that they
                train in full are used too (if several have one, the active adapter's).
            safe_merge: refuse results with NaN or infinity in them.
            exact: False keeps nothing of dense weights, and :meth:`unmerge_adapter` subtracts, so
                that base weights come back within a rounding, as HF PEFT's do.

        Raises:
            ValueError: an unknown adapter; with ``safe_merge`` a result that is not finite; a base
                weight that cannot be merged into (GPTQ and other quantised ones, replicated
                layers).
            RuntimeError: ``lora_bias`` on a layer without bias.

        After an error only the layers that were merged before are merged.
        """
        layers = self._tuner_layers()
        self._check_merge_allowed(layers=layers)
        self._check_names(adapter_names)
        copies = self._choose_copies(adapter_names, safe_merge)
        before = [(layer, len(layer.merged_adapters)) for layer in layers]
        try:
            for layer in layers:
                known = {"exact": False} if not exact and _by_factors(layer) else {}
                with onloaded(layer):
                    layer.merge(safe_merge=safe_merge, adapter_names=adapter_names, **known)
        except BaseException:
            for layer, count in reversed(before):
                own = isinstance(layer, Merging) and not _by_factors(layer)
                while len(layer.merged_adapters) > count:
                    with onloaded(layer):
                        if own:  # a user's class has no method to take out only the last ones
                            layer.unmerge()
                        else:
                            layer._unmerge_last()
                    if own:
                        break
            raise
        _tell_rounding(layers)
        for wrapper, names in copies:
            wrapper.note_merged(names)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights."""
        # in reverse order: of two layers that share a weight, the later one's record includes the
        # earlier one's merge
        layers = self._tuner_layers()
        merged = [layer for layer in layers if layer.merged]
        for layer in reversed(merged or layers):  # with none merged, each layer warns
            with onloaded(layer):
                layer.unmerge()
        for wrapper in self._wrappers():
            wrapper.note_merged(None)

    def _wrappers(self) -> list[ModulesToSaveWrapper]:
        return [m for m in all_modules(self.model) if isinstance(m, ModulesToSaveWrapper)]

    def _choose_copies(
        self, adapter_names: list[str] | None, safe_merge: bool
    ) -> list[tuple[ModulesToSaveWrapper, list[str]]]:
        """(module that trains in full, the adapter whose copy is used once adapters are merged).

        Raises:
            ValueError: several adapters have a copy of one module; with ``safe_merge``, a copy is
                not finite.
        """
        found = [(wrapper, wrapper.merge_choice(adapter_names)) for wrapper in self._wrappers()]
        for wrapper, names in found if safe_merge else ():
            for name in names:
                tensors = wrapper.modules_to_save[name].parameters()
                if not all(bool(t.isfinite().all()) for t in tensors):
                    raise ValueError(BROKEN.format(name))
        return found

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool | torch.dtype = False,
    ) -> nn.Module:
        """The base model with adapters merged into it and all adapter layers removed.

        The adapters are gone, and :meth:`merge_adapter`'s records are not kept. No memory beyond
        the base model's is held afterwards, and while it runs only that for one layer at a time.
        Embeddings that share a weight get weights of their own when only some of them are adapted;
        the model's configuration then says so.

        Args:
            progressbar: show progress.
            safe_merge: refuse results with NaN or infinity in them; computes every layer twice.
            adapter_names: the adapters, in this order; None: the active ones. Modules that they
                train in full are used too (if several have one, the active adapter's).
            dequantize: make every quantised linear layer of the model a dense ``nn.Linear`` and
                merge into those. The dtype, or True for the model's own. The model then is one
                without quantisation, for export.

        Raises:
            ValueError, RuntimeError: as :meth:`merge_adapter`, before any weight is changed. With
                ``dequantize`` also: a dtype that is not floating point; a quantised layer that
                cannot be read; adapters that are merged already.
        """
        self._check_merge_allowed(in_place=False, dense=bool(dequantize))
        self._check_names(adapter_names)
        self._choose_copies(adapter_names, safe_merge)
        if dequantize is False:
            return self._merge_and_unload(progressbar, safe_merge, adapter_names)
        with made_dense(self.model, None if dequantize is True else dequantize):
            model = self._merge_and_unload(progressbar, safe_merge, adapter_names)
        forget_quantization(model)
        return model

    def _merge_and_unload(
        self, progressbar: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        to_merge: dict[Any, list[str]] = {}
        for layer in self._tuner_layers():
            if not _by_factors(layer):  # it is merged when it is removed
                if not isinstance(layer, Merging):
                    layer._check_mergeable(adapter_names, safe_merge)
                continue
            with onloaded(layer):
                names = layer._check_mergeable(check_adapters_to_merge(layer, adapter_names))
                if safe_merge and names:
                    layer._check_finite(names)
            to_merge[layer] = names
        done: list[Any] = []
        parting = Parting(self.model)
        try:
            parting.part([layer for layer, names in to_merge.items() if names])
            for layer, names in tqdm(
                to_merge.items(), disable=not progressbar, desc="Unloading and merging model"
            ):
                with onloaded(layer):
                    done.append(layer)
                    layer._merge(names, False, keep=False)
        except BaseException:
            for layer in reversed(done):
                if to_merge[layer] and layer._kept and _undone(layer._kept[-1], to_merge[layer]):
                    with onloaded(layer):
                        layer._unmerge_last()
            parting.put_back()
            raise
        _tell_rounding(done)
        parting.join(to_merge, self.peft_config)
        self._strip(True, safe_merge, adapter_names)
        parting.declare_untied()
        return self.model

    def unload(self) -> nn.Module:
        """The base model without adapter layers.

        Modules that were trained in full stay as trained; merged adapters stay merged.
        """
        self._strip(False, False, None)
        return self.model

    def _strip(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Replace adapter layers by the modules that they wrap; LoRA layers are merged already."""
        new: dict[Any, nn.Module] = {}

        def without(module: Any) -> nn.Module:
            if module not in new:
                if hasattr(module, "unload_and_optionally_merge_module"):
                    found = module.unload_and_optionally_merge_module(
                        merge=merge, safe_merge=safe_merge, adapter_names=adapter_names
                    )
                    new[module] = without(found)
                elif isinstance(module, BaseTunerLayer):
                    layer: Any = module
                    if merge and not _by_factors(module):
                        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                    new[module] = layer.get_base_layer()
                else:
                    new[module] = module
                    visit(module)
            return new[module]

        def visit(parent: nn.Module) -> None:
            for name, child in _children(parent):
                replaced = without(child)
                if replaced is not child:
                    setattr(parent, name, replaced)

        visit(self.model)
        release_blocks(self.model)
        name_quantization(self.model)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config


def _undone(record: tuple[list[str], Any], names: list[str]) -> bool:
    """True when the record is of a merge that :meth:`ModelMerging.merge_and_unload` has made."""
    return record[0] == names and (record[1] is None or isinstance(record[1], KeptPacked))


def _tell_rounding(layers: list[Any]) -> None:
    """Warn of what quantising merged weights again has changed, if any were."""
    errors = [getattr(layer, "merge_error", 0.0) for layer in layers]
    packed = [e for e in errors if e > 0.0]
    if packed:
        warnings.warn(
            f"Adapters were merged into {len(packed)} quantised weights, which were quantised "
            "again: generations may differ due to rounding errors, at most "
            f"{max(packed):.2g} of a weight (‖W' - W‖ / ‖W‖), {sum(packed) / len(packed):.2g} on "
            "average.",
            PeftWarning,
            stacklevel=3,
        )


def _by_factors(layer: Any) -> bool:
    """True when the layer merges by :class:`Merging`, and not by a method of a user's class."""
    cls = type(layer)
    return (
        isinstance(layer, Merging)
        and cls._factors is not Merging._factors
        and cls.merge.__module__.startswith("peftkern.")
    )


def _children(parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, child) of every attribute with a module, even when several hold the same one."""
    return ((name, child) for name, child in list(parent._modules.items()) if child is not None)
