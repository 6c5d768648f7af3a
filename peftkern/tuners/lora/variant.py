"""Variants of LoRA: other ways to apply A and B (and more) to a layer's output.

A variant is one class for each kind of layer that it works on, with one object for each adapter.
Defining the class enters it into ``TABLES``, under the field of the configuration that selects it.
The rest of the package reads only the tables, so a variant's code runs only when a configuration
selects it. `docs/extending.md` shows how to write one. A call with an active variant never takes
the fused path of plain LoRA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, ClassVar

from torch import Tensor

from ..base_tuner import BaseTuner

# {kind of layer (`LoraLayer.layer_kind`): {sorted names of settings: class; None for plain LoRA}}
TABLES: dict[str, dict[tuple[str, ...], type[LoraVariant] | None]] = {}
# {setting: class whose class methods serve the whole model; None for plain LoRA}
SETTINGS: dict[str, type[LoraVariant] | None] = {}
# {keyword of a model's call: variant that gets it}; layers never pass it to their base layers
CALL_KWARGS: dict[str, type[LoraVariant]] = {}


def register(setting: str, layers: Iterable[str], variant: type[LoraVariant] | None) -> None:
    """Let the field ``setting`` of a configuration select ``variant`` on these kinds of layers.

    None is plain LoRA with another start. A class that is defined again replaces its old version.

    Raises:
        ValueError: the setting selects another class on one of the kinds already.
    """
    kinds = (layers,) if isinstance(layers, str) else tuple(layers)
    for kind in kinds:
        old = _another(TABLES.get(kind, {}).get((setting,)), variant)
        if old is not None:
            raise ValueError(f"`{setting}` asks for {old.__name__} on {kind!r} layers already")
    for kind in kinds:
        table_of(kind)[(setting,)] = variant
    first = SETTINGS.setdefault(setting, variant)
    if first is not None and _another(first, variant) is None:
        SETTINGS[setting] = variant


def _another(owner: type[Any] | None, cls: type | None) -> type[Any] | None:
    """``owner``; None when it is None or an earlier definition of ``cls``, which may replace it."""
    if owner is None or cls is None:
        return owner
    same = (owner.__module__, owner.__qualname__) == (cls.__module__, cls.__qualname__)
    return None if same else owner


class VariantMethods:
    """A base class of :class:`LoraModel` that gets the methods of ``LoraVariant.model_methods``."""


# {name of such a method: the variant that added it}
_METHODS: dict[str, type[LoraVariant]] = {}


class LoraVariant:
    """The computation of one adapter in one layer, in place of adding B A x.

    Methods get the layer and the adapter's name, since one class may serve several kinds of layers.
    Class methods are called before the adapter is made. Those that concern the whole model
    (``refusals``, :meth:`check_beside`, :meth:`forward_kwargs`, ...) are a setting's first class's.

    Args (of the class statement):
        setting: the field of the configuration that selects the variant when its value is true; it
            has the metadata :func:`peftkern.configs.lora_options.selects`.
        layers: the kinds of layers: "linear" (transformers' ``Conv1D`` too), "embedding",
            "conv1d", "conv2d", "conv3d".
    """

    # its name in `explain` and in errors
    name: ClassVar[str] = ""
    setting: ClassVar[str] = ""
    # {attribute: its factory}: stores {adapter: module or parameter, trained and saved} of a layer
    weight_stores: ClassVar[Mapping[str, Callable[[], Any]]] = {}
    # the same for stores {adapter: value}; of these a persistent `BufferDict` is saved
    value_stores: ClassVar[Mapping[str, Callable[[], Any]]] = {}
    # {kind of layer: message of the ValueError when the variant does not work on it}
    refusals: ClassVar[Mapping[str, str]] = {}
    # keywords of a model's call that go to the variant, see `handing`
    call_kwargs: ClassVar[tuple[str, ...]] = ()
    # {name: function that becomes a method of LoraModel}
    model_methods: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    # True: `init` reads the base weight, which must have its final value by then
    measures_weight: ClassVar[bool] = False
    # True: the update minus that of a start is, for all inputs, that of an adapter with both A (and
    # both B) stacked
    stacks: ClassVar[bool] = False

    # the layer's name in the model, for `init`
    target_name = ""

    def __init_subclass__(
        cls, setting: str | None = None, layers: Iterable[str] = (), **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if setting is None:
            return
        for name in cls.call_kwargs:
            owner = _another(CALL_KWARGS.get(name), cls)
            if owner is not None:
                raise ValueError(f"the keyword `{name}` is {owner.__name__}'s already")
        for name in cls.model_methods:
            if _another(_METHODS.get(name), cls) or hasattr(BaseTuner, name):
                raise ValueError(f"`{name}` is a method of the LoraModel already")
        cls.setting = setting
        register(setting, layers, cls)
        CALL_KWARGS.update(dict.fromkeys(cls.call_kwargs, cls))
        for name, method in cls.model_methods.items():
            _METHODS[name] = cls
            setattr(VariantMethods, name, method)

    # ---------------------------------------------------------------- before there is an adapter

    @classmethod
    def check(cls, key: str, base: Any, r: int, config: Any) -> None:
        """Raise a ValueError or TypeError when the layer ``base``, named ``key``, cannot have it.
        ``r`` is the adapter's rank. Nothing has been changed yet."""

    @classmethod
    def check_beside(cls, config: Any, others: Sequence[tuple[str, Any]]) -> None:
        """Raise a ValueError when ``config`` cannot be used beside ``others``.
        Those are (name, configuration). Called when any of them selects the variant."""

    # ---------------------------------------------------------------- in a layer

    def init(self, layer: Any, adapter: str, config: Any, trainable: bool) -> None:
        """Make the adapter's further weights and values; A, B and the stores are made already.
        Weights may be on the meta device, to be assigned later."""

    def update(self, layer: Any, adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The layer's output with this adapter.

        Args:
            layer: the LoRA layer that is called.
            adapter: the adapter's name.
            x: the layer's input as given.
            result: the output so far: the base layer's, with the adapters before this one.
            **kwargs: those of ``CALL_KWARGS`` that the call had.
        """
        raise NotImplementedError

    def fused(self, layer: Any, adapter: str, x: Tensor) -> Tensor | None:
        """The output for x from one operation; None when it needs :meth:`update`.
        Called for the only active adapter, when :meth:`fused_as` is not None."""
        return None

    def fused_as(self, layer: Any, adapter: str) -> str | None:
        """The name of that operation in ``explain``; None when there is none for this layer."""
        return None

    def decline(self, layer: Any, adapter: str) -> str:
        """The reason, for ``explain`` and logs, that calls are not plain LoRA's one operation."""
        return f"{self.name}: the base layer, then the adapter by torch's operations"

    def merged_weight(self, layer: Any, adapter: str, weight: Tensor, base: Tensor) -> Tensor:
        """``weight`` with this adapter merged into it.

        Args:
            layer: the LoRA layer.
            adapter: the adapter's name.
            weight: the base weight with the adapters merged so far, at least float32.
            base: the base weight without any adapter, which is ``weight`` for the first one.
        """
        return layer._delta_weight(adapter).to(weight.device, weight.dtype).add_(weight)

    def factors(self, layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
        """B [N, r] and A [r, K], whose scaled product is the update of a linear layer's weight."""
        return layer.lora_B[adapter].weight, layer.lora_A[adapter].weight

    def combined_by(self, layer: Any, adapter: str) -> Sequence[str] | None:
        """The rules of ``add_weighted_adapter`` that keep the form of the adapter's A and B.
        None when they are plain matrices, which all rules keep."""
        return None

    def ready(self, layer: Any, adapter: str) -> None:
        """Do the work that needs the final base weight, before a call or a merge reads it."""

    def refuses_mixed(self) -> str | None:
        """The reason that rows of a batch cannot name the adapter; None when they can."""
        return None

    def supports_lora_conversion(self) -> bool:
        """True when the adapter can be converted to plain LoRA."""
        return True

    # ---------------------------------------------------------------- in calls of the whole model

    @classmethod
    def forward_kwargs(cls, model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The ``kwargs`` of a PeftModel's forward, with missing ``call_kwargs`` added.
        Called when an adapter of the model selects the variant."""
        return kwargs

    @classmethod
    def generate_kwargs(
        cls, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """:meth:`forward_kwargs` for ``generate``."""
        return kwargs

    @classmethod
    def handing(
        cls, model: Any, layers: Sequence[Any], value: Any, kwargs: dict[str, Any], repeats: int
    ) -> AbstractContextManager[None]:
        """A context in which the layers' calls get a keyword of ``call_kwargs``.

        Args:
            model: the base model.
            layers: its LoRA layers.
            value: the keyword's value in the model's call.
            kwargs: all keywords of that call.
            repeats: number of copies that ``generate`` makes of each row of the batch.
        """
        raise NotImplementedError


# -------------------------------------------------------------------- what a configuration asks for


@cache
def _selecting(config_class: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(fields that select a variant when true, values of ``init_lora_weights`` that select one)."""
    fields = dataclasses.fields(config_class)
    by_value = [n for f in fields for n in f.metadata.get("lora_variants", ())]
    return tuple(f.name for f in fields if f.metadata.get("is_lora_variant")), tuple(by_value)


def settings_asked(config: Any) -> tuple[str, ...]:
    """The settings of a configuration that select a variant, sorted; empty for plain LoRA."""
    cls: Any = type(config)
    by_truth, by_value = _selecting(cls)
    asked = []
    for name in by_truth:  # plain loops for speed: this runs for every new layer
        if getattr(config, name):
            asked.append(name)
    if by_value:
        init = getattr(config, "init_name", config.init_lora_weights)
        for name in by_value:
            if name == init:
                asked.append(name)
    return tuple(sorted(asked))


def variants_asked(*configs: Any) -> list[type[LoraVariant]]:
    """The first class of each setting with which one of these configurations selects a variant."""
    names = dict.fromkeys(name for config in configs for name in settings_asked(config))
    found = (SETTINGS.get(name) for name in names)
    return [variant for variant in found if variant is not None]


def variant_class(table: Any, kind: str, config: Any) -> type[LoraVariant] | None:
    """The class of ``table`` that ``config`` selects on a kind of layer; None for plain LoRA.

    Raises:
        ValueError: the table has no such class.
    """
    asked = settings_asked(config)
    if asked in table:
        return table[asked]
    for name in asked:
        of_setting = SETTINGS.get(name)
        if of_setting is not None and kind in of_setting.refusals:
            raise ValueError(of_setting.refusals[kind])
    raise ValueError(f"Invalid or unsupported variant combination: {asked}")


def table_of(kind: str) -> dict[tuple[str, ...], type[LoraVariant] | None]:
    """The table of a kind of layer: the same object at every call, extended by later classes."""
    return TABLES.setdefault(kind, {(): None})


def select(known: Any, kind: str, config: Any) -> LoraVariant | None:
    """A new variant as ``config`` selects it; None for plain LoRA.

    Args:
        known: {sorted names of settings that select it: class of the variant, None for plain
            LoRA}.
        kind: the kind of layer.
        config: a :class:`LoraConfig`.

    Raises:
        ValueError: the settings name no variant of ``known``, or ``known`` itself is wrong.
    """
    if known is not TABLES.get(kind):  # the table of a user's layer class
        _check_table(known, config)
    variant = variant_class(known, kind, config)
    return None if variant is None else variant()


def _check_table(known: Any, config: Any) -> None:
    cls: Any = type(config)
    by_truth, by_value = _selecting(cls)
    if any(tuple(sorted(names)) != names for names in known):
        raise ValueError("Keys of lora_variants must be sorted tuples.")
    if unknown := {n for names in known for n in names}.difference(by_truth, by_value):
        raise ValueError(
            f"{sorted(unknown)} found in lora_variants, but no field of "
            f"{type(config).__name__} selects a variant of that name."
        )


def check_beside(config: Any, others: Sequence[tuple[str, Any]]) -> None:
    """Raise an error when the variants of these adapters cannot be used beside each other.

    Args:
        config: the new adapter's configuration.
        others: (name, configuration) of the adapters that the model has.
    """
    for variant in variants_asked(config, *(other for _, other in others)):
        variant.check_beside(config, others)


# -------------------------------------------------------------------- in layers


def put_variant(
    layer: Any, adapter: str, variant: LoraVariant, config: Any, trainable: bool
) -> None:
    """Make the adapter, whose A and B exist already, one of this variant in a layer."""
    for names, stores in (
        ("adapter_layer_names", variant.weight_stores),
        ("other_param_names", variant.value_stores),
    ):
        for attribute, make in stores.items():
            if attribute not in getattr(layer, names):
                setattr(layer, attribute, make())
                setattr(layer, names, (*getattr(layer, names), attribute))
    layer.lora_variant[adapter] = variant
    variant.init(layer, adapter, config, trainable)


def take_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove the variants' keywords from a call's ``kwargs`` and return them."""
    return {name: kwargs.pop(name) for name in CALL_KWARGS if name in kwargs}


def rows_of(kwargs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Variants' keywords, each a list with one value for each row, cut to the given ``rows``."""
    if not kwargs:
        return kwargs
    indices = rows.tolist()
    return {k: v if v is None else [v[i] for i in indices] for k, v in kwargs.items()}


def is_added(variant: LoraVariant) -> bool:
    """True when merging the variant adds the product of its factors to the weight."""
    return type(variant).merged_weight is LoraVariant.merged_weight


def make_ready(layer: Any) -> None:
    """Call :meth:`LoraVariant.ready` for all variants of a layer."""
    for name, variant in layer.lora_variant.items():
        variant.ready(layer, name)


def active_variant(layer: Any) -> tuple[str, LoraVariant] | None:
    """(adapter, variant) of the first active adapter that is not plain LoRA."""
    for name in layer.active_adapters:
        variant = layer.lora_variant.get(name)
        if variant is not None:
            return name, variant
    return None


# -------------------------------------------------------------------- in calls of the whole model


def with_call_kwargs(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a PeftModel's forward, after its adapters' variants have added theirs."""
    for variant in _with_calls(model):
        kwargs = variant.forward_kwargs(model, kwargs)
    return kwargs


def with_generate_kwargs(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """:func:`with_call_kwargs` for ``generate``."""
    for variant in _with_calls(model):
        kwargs = variant.generate_kwargs(model, args, kwargs)
    return kwargs


def _with_calls(model: Any) -> list[type[LoraVariant]]:
    """The variants with keywords that the model's adapters select; runs in every forward."""
    found, configs = [], model.peft_config.values()
    for variant in dict.fromkeys(CALL_KWARGS.values()):
        for config in configs:
            if getattr(config, variant.setting, None):
                found.append(variant)
                break
    return found
