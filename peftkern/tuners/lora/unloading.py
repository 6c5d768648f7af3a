"""Merging, unmerging and unloading a whole model: every layer, or none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ..adapter_calls import BROKEN, check_adapters_to_merge
from ..base_layer import BaseTunerLayer
from ..modules_to_save import ModulesToSaveWrapper
from .merging import Merging
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

    def _check_merge_allowed(self, in_place: bool = True) -> None:
        """ValueError where adapters cannot be merged; a warning where tied weights are adapted and
        stay tied (``in_place``)."""
        adapted = Parting(self.model).adapted(self._tuner_layers()) if in_place else []
        if adapted:
            warnings.warn(TIED.format(adapted), stacklevel=4)
        if getattr(self.model, "quantization_method", None) == "gptq":
            raise ValueError("Cannot merge LORA layers when the model is gptq quantized")
        if any(getattr(c, "layer_replication", None) for c in self.peft_config.values()):
            raise ValueError("Cannot merge LORA layers when base model layers are replicated")

    def _tuner_layers(self) -> list[Any]:
        return [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]

    def _check_names(self, adapter_names: Any) -> None:
        if adapter_names is None or isinstance(adapter_names, str):  # the layers refuse a str
            return
        unknown = [name for name in adapter_names if name not in self.peft_config]
        if unknown:
            raise ValueError(
                f"`adapter_names` has {unknown}, and the adapters are {sorted(self.peft_config)}"
            )

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Add adapters to the base weights, in place, until :meth:`unmerge_adapter`, which brings
        back their very bits. What that takes is kept: for bf16 about 0.1 to 0.6 bytes an element
        (updates of 0.1% to 10% of the weight), for float32 about one, never more than a copy.

        Args:
            adapter_names: which adapters, in this order; None: the active ones. What they train in
                full beside the layers is used with them (of several, the active one's).
            safe_merge: refuse results with NaN or infinity in them.

        Raises:
            ValueError: no such adapter; a broken one (``safe_merge``); a base weight that cannot be
                merged into (GPTQ and other quantised ones, replicated layers).
            RuntimeError: ``lora_bias`` on a layer without bias.

        No layer is merged then that was not before.
        """
        self._check_merge_allowed()
        self._check_names(adapter_names)
        layers = self._tuner_layers()
        copies = self._choose_copies(adapter_names, safe_merge)
        before = [(layer, len(layer.merged_adapters)) for layer in layers]
        try:
            for layer in layers:
                with onloaded(layer):
                    layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        except BaseException:
            for layer, count in reversed(before):
                own = isinstance(layer, Merging) and not _by_factors(layer)
                while len(layer.merged_adapters) > count:
                    with onloaded(layer):
                        if own:  # a user's class knows no other way than to take out all
                            layer.unmerge()
                        else:
                            layer._unmerge_last()
                    if own:
                        break
            raise
        for wrapper, names in copies:
            wrapper.note_merged(names)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights."""
        # the last one first: where two layers share a weight, that is what each has recorded
        layers = self._tuner_layers()
        merged = [layer for layer in layers if layer.merged]
        for layer in reversed(merged or layers):  # without any each says that it is not
            with onloaded(layer):
                layer.unmerge()
        for wrapper in self._wrappers():
            wrapper.note_merged(None)

    def _wrappers(self) -> list[ModulesToSaveWrapper]:
        return [m for m in self.model.modules() if isinstance(m, ModulesToSaveWrapper)]

    def _choose_copies(
        self, adapter_names: list[str] | None, safe_merge: bool
    ) -> list[tuple[ModulesToSaveWrapper, list[str]]]:
        """Each module that adapters train in full, with the adapter whose copy goes with the
        merged ones. ValueError: there are several such, or (``safe_merge``) it is broken."""
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
    ) -> nn.Module:
        """The base model with adapters merged into it and all layers of theirs taken out.

        The adapters and what :meth:`merge_adapter` would keep are gone: no memory beyond the base
        model's is held afterwards, or needed but for one layer at a time. Only embeddings that
        share a weight, when some of them are adapted, get weights of their own, and the model's
        configuration says so.

        Args:
            progressbar: show progress.
            safe_merge: refuse results with NaN or infinity in them; computes every layer twice.
            adapter_names: which adapters, in this order; None: the active ones. What they train in
                full beside the layers is used with them (of several, the active one's).

        Raises:
            ValueError, RuntimeError: as :meth:`merge_adapter`, before any weight is changed.
        """
        self._check_merge_allowed(in_place=False)
        self._check_names(adapter_names)
        self._choose_copies(adapter_names, safe_merge)
        to_merge: dict[Any, list[str]] = {}
        for layer in self._tuner_layers():
            if not _by_factors(layer):  # merged when it is taken out
                if not isinstance(layer, Merging):
                    layer._check_mergeable(adapter_names, safe_merge)
                continue
            with onloaded(layer):
                names = layer._check_mergeable(check_adapters_to_merge(layer, adapter_names))
                if safe_merge and names:
                    layer._merged(names, True)
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
                if to_merge[layer] and layer._kept and layer._kept[-1] == (to_merge[layer], None):
                    with onloaded(layer):
                        layer._unmerge_last()
            parting.put_back()
            raise
        parting.join(to_merge, self.peft_config)
        self._strip(True, safe_merge, adapter_names)
        parting.declare_untied()
        return self.model

    def unload(self) -> nn.Module:
        """The base model without adapter layers; modules that were trained in full stay as
        trained. What is merged stays merged."""
        self._strip(False, False, None)
        return self.model

    def _strip(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Put what the adapter layers wrap in their places; LoRA layers are merged already."""
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
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config


def _by_factors(layer: Any) -> bool:
    """Whether the layer merges by what :class:`Merging` does, and not in a way of its own, as the
    class of a user may."""
    cls = type(layer)
    return (
        isinstance(layer, Merging)
        and cls._factors is not Merging._factors
        and cls.merge.__module__.startswith("peftkern.")
    )


def _children(parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every place that holds a module, also those that hold the same one."""
    return ((name, child) for name, child in list(parent._modules.items()) if child is not None)
