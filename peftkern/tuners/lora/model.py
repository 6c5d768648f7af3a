"""``LoraModel``: puts LoRA layers into a model in place, and takes them out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ...configs.checks import check_once
from ...configs.lora import LoraConfig
from ...utils.constants import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from ...utils.handing import TokenNames, handing
from ...utils.module_tree import parameters_of
from ...utils.places import further_names, places_of
from ...utils.private import COMPILED
from ...utils.tied import modules_tied_to_embedding
from ...utils.undo import remember_requires_grad
from ..agreement import added
from ..base_layer import BaseTunerLayer, walk
from ..base_tuner import BaseTuner
from ..modules_to_save import (
    AuxiliaryTrainingWrapper,
    find_modules_to_save,
    wrap_modules_to_save,
)
from ..targets import check_compatible
from ..tensor_parallel import same_on_all_ranks, tensor_parallel
from .base import LoraLayer
from .expert_families import fused_names
from .expert_targets import note_experts_left_out, resolve_experts
from .extra_targets import ExtraTargets, find_targets
from .fused_experts import convert_config
from .group import form_groups
from .inits import collect
from .layer_classes import (
    add_adapter,
    check,
    check_patterns,
    check_saved,
    custom_class,
    layer_class,
    make_custom,
    match_fan_in_fan_out,
    warn,
    warn_of_changed_base,
)
from .linear import Linear
from .mlp import form_blocks, release_blocks
from .parallel_targets import ParallelTargets
from .plain import Starts
from .ranks import rank_and_alpha
from .replication import stacked
from .row_adapters import AdapterNames
from .tying import resolve_tying, share_again
from .unloading import ModelMerging
from .variant import CALL_KWARGS, VariantMethods, check_beside
from .weighted import Weighted


class LoraModel(ModelMerging, Weighted, Starts, VariantMethods, BaseTuner):
    """A model with LoRA layers in the places that the configuration names.

    Args:
        model: the base model, changed in place.
        peft_config: a :class:`LoraConfig`, or {adapter name: LoraConfig}.
        adapter_name: the adapter to make.
        low_cpu_mem_usage: make its weights on the meta device, to be assigned from a checkpoint.
        state_dict: adapt the modules that have tensors in it, and not the configuration's targets.
            Only its names are read.
        autocast_adapter_dtype: keep float32 weights under a float16 or bfloat16 model; without it
            they have the dtype of the layer that they adapt.
        training: True: the layers start in training mode, where dropout is on.

    Raises:
        NotImplementedError: the configuration has a setting that is not built yet.
        ValueError: nothing matches, or a match cannot be adapted. The model is then as it was.
    """

    # function that restores the layers of a stacked model (`layer_replication`)
    _unstack: Callable[[], None] | None = None
    prefix = "lora_"
    tuner_layer_cls = LoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        autocast_adapter_dtype: bool = False,
        training: bool = True,
    ) -> None:
        # it is no module, so it can be set before nn.Module.__init__
        self.__dict__["_autocast_dtype"] = autocast_adapter_dtype
        super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict, training)

    # ---------------------------------------------------------------- putting adapters in

    def _check(
        self,
        model: nn.Module,
        config: LoraConfig,
        name: str,
        state_dict: dict[str, Tensor] | None = None,
    ) -> tuple[list[Any], list[str], ExtraTargets]:
        """Make all checks, before anything is changed.

        Returns (the matches with rank and alpha, the names of the modules to train in full, the
        further targets).
        """
        check_once(config)
        others = [(n, c) for n, c in self.peft_config.items() if n != name]
        if config.bias != "none" and any(getattr(c, "bias", "none") != "none" for _, c in others):
            raise ValueError(
                "LoraModel supports only 1 adapter with bias. When using multiple adapters, set "
                "bias to 'none' for all adapters."
            )
        check_beside(config, others)
        resolve_experts(config, model, others)
        if fused := fused_names(model):
            convert_config(config, model, fused)
        resolve_tying(config, model)
        matches, parameters = find_targets(config, model, others, state_dict)
        check_compatible(config, model, [key for key, _ in matches])
        sites = []
        aliases = further_names(model) if config.rank_pattern or config.alpha_pattern else {}
        names = [name for key, m in matches for name in aliases.get(id(m), (key,))]
        shared = ParallelTargets(tensor_parallel(model), model, config)
        for key, module in matches:
            custom = custom_class(module, config)
            parallel = shared.layer_class(key, module, custom)
            make: Any = None
            if not isinstance(module, LoraLayer):
                make = parallel or custom or layer_class(module)
            r, alpha = rank_and_alpha(config, *aliases.get(id(module), (key,)))
            if custom is None:
                check(key, module, r, config)
            sites.append((key, module, make, r, alpha))
        extra = ExtraTargets(config, model, [key for key, _ in matches], parameters)
        check_patterns(config, names + extra.parameter_names)
        match_fan_in_fan_out(config, [m for _, m, make, *_ in sites if make is not None])
        saved = find_modules_to_save(model, config.modules_to_save)
        check_saved(model, config, name, sites, saved)
        shared.check_others(saved, extra)
        for _, module, *_ in sites:
            warn(module, config)
        warn_of_changed_base([config, *(c for _, c in others)])
        note_experts_left_out(config, model, others, parameters)
        return sites, saved, extra

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        config = self.peft_config[adapter_name]
        assert isinstance(config, LoraConfig)
        others = [c for n, c in self.peft_config.items() if n != adapter_name]
        rest = (config, adapter_name, low_cpu_mem_usage, state_dict)
        if not config.layer_replication:
            self._inject(model, *rest)
            return
        with stacked(model, config, others) as unstack:
            self._inject(model, *rest)
        if unstack is not None:
            self.__dict__["_unstack"] = unstack

    def _inject(
        self,
        model: nn.Module,
        config: LoraConfig,
        adapter_name: str,
        low_cpu_mem_usage: bool,
        state_dict: dict[str, Tensor] | None,
    ) -> None:
        sites, saved, extra = added(
            model,
            self.peft_config,
            adapter_name,
            lambda: self._check(model, config, adapter_name, state_dict),
        )
        put_flags_back = remember_requires_grad(model)
        there = list(self.adapter_layers())
        try:
            with collect() as change_base_weights:
                self._put_in(
                    model, config, adapter_name, sites, saved, extra, low_cpu_mem_usage, there
                )
                change_base_weights()
        except BaseException:
            self.withdraw(adapter_name)
            put_flags_back()
            raise
        if _has_adapters(there):  # earlier adapters keep what trains and what does not
            put_flags_back()
        known = set(self.targeted_module_names)
        names = [key.removeprefix(COMPILED) for key, *_ in sites]
        self.targeted_module_names += [n for n in names if n not in known]
        known = set(self.targeted_parameter_names)
        self.targeted_parameter_names += [n for n in extra.parameter_names if n not in known]

    def _put_in(
        self,
        model: nn.Module,
        config: LoraConfig,
        adapter_name: str,
        sites: list[Any],
        saved: list[str],
        extra: ExtraTargets,
        low_cpu_mem_usage: bool,
        there: list[Any],
    ) -> None:
        active = adapter_name in self.active_adapters
        first = not _has_adapters(there)
        if first:  # the first adapter freezes the model
            keep = {id(p) for m in there for p in m.parameters()}
            for parameter in parameters_of(model):
                if parameter.requires_grad and id(parameter) not in keep:
                    parameter.requires_grad_(False)
        trainable = active and not config.inference_mode
        before = {id(layer) for layer in there}
        how = (self._autocast_dtype, low_cpu_mem_usage, trainable)
        places = places_of(model, (module for _, module, make, *_ in sites if make is not None))
        for key, module, make, r, alpha in sites:
            layer, added = module, False
            if make is not None:
                added = bool(config._custom_modules) and make is custom_class(module, config)
                if added:
                    named = dict(zip(("autocast_dtype", "meta", "trainable"), how, strict=True))
                    layer = make_custom(make, module, adapter_name, key, r, alpha, config, **named)
                    layer.set_adapter(self.active_adapters, inference_mode=not trainable)
                else:
                    layer = make(module)
                layer._active_adapter = self.active_adapters
                for parent, name in places[id(module)]:
                    setattr(parent, name, layer)
            if not added:
                add_adapter(layer, adapter_name, key, r, alpha, config, *how)
        extra.put_layers(model, adapter_name, self.active_adapters, *how)
        if not self.training:
            for layer in self.adapter_layers():
                if isinstance(layer, LoraLayer) and id(layer) not in before:
                    layer.start_in_evaluation()
        if active:
            # before copies are made: in a module that trains in full only the copy's bias trains
            self._train_biases(model, config)
        wrap_modules_to_save(model, adapter_name, saved, config.inference_mode, activate=active)
        extra.put_modules(model, adapter_name, active, self._autocast_dtype)
        same_on_all_ranks(self._drawn(adapter_name), model)
        form_groups(model, Linear)
        form_blocks(model, Linear)
        if active and not first:  # layers of earlier adapters must switch to the active ones too
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _drawn(self, adapter_name: str) -> Iterator[Tensor]:
        """The adapter's tensors."""
        for layer in self.adapter_layers():
            for store in layer._stores() if isinstance(layer, BaseTunerLayer) else ():
                held = store[adapter_name] if adapter_name in store else None
                if isinstance(held, nn.Module):
                    yield from held.parameters()
                elif held is not None:
                    yield held

    def _train_biases(self, model: nn.Module, config: LoraConfig) -> None:
        if config.bias == "all":
            for name, parameter in model.named_parameters():
                if name == "bias" or name.endswith(".bias"):
                    parameter.requires_grad_(True)
        elif config.bias == "lora_only":
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    bias = getattr(module.get_base_layer(), "bias", None)
                    if bias is not None:
                        bias.requires_grad_(True)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the tensors as nn.Module does, one by one, then tie tied adapters again."""
        super()._apply(*args, **kwargs)
        share_again(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        share_again(self)  # copying also separates tied adapters

    # ---------------------------------------------------------------- taking them out

    def withdraw(self, adapter_name: str) -> None:
        """Remove an adapter that could not be completed, and the layers made for it."""
        for layer in self.adapter_layers():
            layer.delete_adapter(adapter_name)
        rest = [name for name in self.peft_config if name != adapter_name]
        self._take_out(only_empty=bool(rest))
        left = {name for name, m in walk(self.model) if isinstance(m, BaseTunerLayer)}
        left = {name.replace(COMPILED, "") for name in left}
        self.targeted_module_names = [n for n in self.targeted_module_names if n in left]

    def _take_out(self, only_empty: bool = True) -> None:
        """Put the original modules back where no adapter is left.

        With ``only_empty=False`` everywhere: the model is then as before its first adapter.
        """
        for parent in list(self.model.modules()):
            for name, child in list(parent._modules.items()):
                original: Any = child
                while isinstance(original, (LoraLayer, AuxiliaryTrainingWrapper)):
                    if only_empty and original._get_available_adapters():
                        break
                    wraps: Any = original
                    within = isinstance(wraps, LoraLayer)
                    original = wraps.base_layer if within else wraps.original_module
                if original is not child:
                    setattr(parent, name, original)
        release_blocks(self.model)
        if not only_empty and self._unstack is not None:
            self._unstack()

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        return modules_tied_to_embedding(self.model)

    # ---------------------------------------------------------------- a name for each row of the
    # batch

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """A context in which layers get ``adapter_names`` and the keywords of variants.

        ``row_repeats``: the number of copies that generate() makes of each row, for beams or
        several returned sequences.
        """
        times = kwargs.get("row_repeats") or kwargs.get("num_beams") or 1
        adapter_names = kwargs.get("adapter_names")
        with ExitStack() as stack:
            for name, variant in CALL_KWARGS.items():
                if (value := kwargs.get(name)) is not None:
                    layers = [m for m in self.adapter_layers() if isinstance(m, LoraLayer)]
                    block = variant.handing(self.model, layers, value, kwargs, times)
                    stack.enter_context(block)
            if adapter_names is not None:
                stack.enter_context(self._handing_names(adapter_names, times))
            yield

    def _handing_names(
        self, adapter_names: Sequence[str], times: int
    ) -> AbstractContextManager[None]:
        """A context in which row i uses ``adapter_names[i // times]``, for ``times`` copies."""
        self.check_names(adapter_names)
        once = AdapterNames.of(adapter_names)
        names = AdapterNames(n for n in once for _ in range(times)) if times > 1 else once
        model: Any = self.model
        encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
        encoder = None if encoder is self.model else encoder
        in_encoder = {id(m) for m in encoder.modules()} if encoder is not None else set()

        # generate() runs the encoder before it repeats the rows
        return handing({m: once if id(m) in in_encoder else names for m in self.adapter_layers()})

    def check_names(self, adapter_names: Iterable[str]) -> None:
        """Raise a ValueError when rows of a batch cannot name these adapters."""
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted({*adapter_names} - {*self.peft_config, "__base__"})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

    def handing_tokens(
        self, names: TokenNames, head_takes_kept: bool
    ) -> AbstractContextManager[None]:
        """A context in which each token of a batch in one row uses its own adapter.

        Args:
            names: the names of the tokens.
            head_takes_kept: the model calls its head on the tokens alone that have logits.
        """
        handed = dict.fromkeys(self.adapter_layers(), names)
        if head_takes_kept:
            base: Any = self.model
            head = base.get_output_embeddings()
            in_head = set() if head is None else set(head.modules())
            handed |= dict.fromkeys(handed.keys() & in_head, names.for_head())
        return handing(handed)


def _has_adapters(modules: list[Any]) -> bool:
    """True when there is an adapter layer among ``modules``, not only modules trained in full."""
    for module in modules:
        if isinstance(module, BaseTunerLayer):
            return True
    return False


__all__ = ["LoraModel", "layer_class"]
