"""``LoraLayer``: the base class of LoRA layers; holds adapters by name in PEFT's attributes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ...configs.lora import LoraConfig
from ...ops.notes import logger, note_new
from ...utils.gathering import shares_weights
from ...utils.zero3 import gathered, whole_shape
from ..base_layer import BaseTunerLayer
from .frozen import Frozen
from .linear_kinds import features, is_linear_kind
from .merging import Merging
from .ran import UNTOLD, Ran
from .ranks import scaling_of
from .variant import LoraVariant, active_variant, put_variant, select, table_of

# an empty store, for attributes that a kind of layer never fills; read-only, so all can share it
NOTHING: Any = MappingProxyType({})


def in_out_features(base: Any) -> tuple[int, int] | tuple[None, None]:
    """(K, N) of a layer; (None, None) for a class that has no such numbers.

    A LoRA layer for such a class must know them itself.
    """
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    if isinstance(base, nn.Embedding):
        return base.num_embeddings, base.embedding_dim
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return base.in_channels, base.out_channels
    if isinstance(base, nn.MultiheadAttention):
        return base.embed_dim, 3 * base.embed_dim
    if hasattr(base, "nf"):  # Conv1D: weight is [K, N]
        k, n = whole_shape(base.weight)
        return k, n
    if is_linear_kind(base):
        return features(base)
    warnings.warn(
        f"Unsupported layer type '{type(base)}' encountered, proceed at your own risk.",
        UserWarning,
        stacklevel=5,
    )
    if hasattr(base, "in_features") and hasattr(base, "out_features"):
        return base.in_features, base.out_features
    return None, None


class LoraLayer(Merging, Frozen, BaseTunerLayer):
    """The state of a LoRA layer: its adapters by name, in PEFT's attributes.

    ``lora_A[name].weight`` is [r, K], ``lora_B[name].weight`` [N, r]; an embedding keeps
    ``lora_embedding_A[name]`` [r, num_embeddings] and ``lora_embedding_B[name]`` [embedding_dim,
    r].
    """

    # key of the table of variants for this kind of layer, see `variant.TABLES`
    layer_kind = ""
    adapter_layer_names = (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )
    other_param_names = (
        "r",
        "lora_alpha",
        "scaling",
        "lora_dropout",
        "use_dora",
        "use_rslora",
        "lora_bias",
        "lora_variant",
    )

    # filled by _init_lora
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    lora_dropout: nn.ModuleDict
    use_dora: dict[str, bool]
    use_rslora: dict[str, bool]
    lora_bias: dict[str, bool]
    lora_variant: dict[str, LoraVariant]
    _ran: Ran | None  # its last forward; see `ran`
    training: bool
    in_features: Any
    out_features: Any

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        """Set up an empty layer; for users' classes, which call ``nn.Module.__init__`` before.

        ``kwargs`` are not used.
        """
        self._init_lora(
            base_layer,
            lora_A=nn.ModuleDict(),
            lora_B=nn.ModuleDict(),
            lora_embedding_A=nn.ParameterDict(),
            lora_embedding_B=nn.ParameterDict(),
        )

    def _init_lora(self, base_layer: nn.Module, **stores: nn.Module) -> None:
        """Set up an empty layer around ``base_layer`` with ``stores``, {adapter: weight} modules.

        For speed the values are put where nn.Module's __setattr__ would put them, as that checks
        every value and a model has hundreds of layers.
        """
        module: Any = self
        module._modules.update(
            base_layer=base_layer,
            lora_dropout=nn.ModuleDict(),
            **stores,
            lora_magnitude_vector=nn.ModuleDict(),  # for DoRA
        )
        names = ("r", "lora_alpha", "scaling", "use_dora", "use_rslora", "lora_bias")
        self.__dict__.update({name: {} for name in names})
        self.__dict__.update(
            merged_adapters=[],
            _kept=[],
            lora_variant={},
            _disable_adapters=False,
            _active_adapter=[],
            _plan=None,
            _ran=None,
            _group=None,
            _held=None,
        )
        self.in_features, self.out_features = self._in_out_features()

    def _first_adapter(
        self,
        adapter_name: str | None,
        config: LoraConfig | None,
        r: int,
        lora_alpha: float,
        kwargs: dict[str, Any],
    ) -> None:
        """Make the adapter that a constructor with HF PEFT's arguments asks for.

        It has the base's dtype unless ``kwargs`` says otherwise. Without ``adapter_name`` nothing
        happens.
        """
        if adapter_name is None:
            return
        if config is None:
            raise TypeError(f"{type(self).__name__}: `config` is missing for `{adapter_name}`")
        kinds = ("autocast_dtype", "meta", "trainable", "target_name")
        given = {k: kwargs[k] for k in kinds if k in kwargs}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config, **{"autocast_dtype": False, **given})

    def start_in_evaluation(self) -> None:
        """Put the layer and its adapters, but not the base layer, into evaluation mode.

        (A layer is made in training mode, as in HF PEFT.)
        """
        module: Any = self
        module.training = False
        for name, child in module._modules.items():
            if name != "base_layer" and child is not None:
                child.train(False)

    def _in_out_features(self) -> tuple[int, int] | tuple[None, None]:
        return in_out_features(self.get_base_layer())

    def _adapter_placement(self, autocast_dtype: bool, meta: bool) -> dict[str, Any]:
        """{"device", "dtype"} of new adapter weights: those of the base weight.

        The dtype is float32 for integer and 8-bit base weights, and with ``autocast_dtype`` for
        float16 and bfloat16. ``meta`` asks for the meta device.
        """
        weight = self._some_weight()
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        if weight.dtype.itemsize == 1 or (
            autocast_dtype and dtype in (torch.float16, torch.bfloat16)
        ):
            dtype = torch.float32
        return {"device": "meta" if meta else weight.device, "dtype": dtype}

    def _some_weight(self) -> Tensor:
        """The base layer's weight, else its first parameter, else an empty tensor."""
        base = self.get_base_layer()
        weight: Any = getattr(base, "weight", None)
        if isinstance(weight, Tensor):
            return weight
        if is_linear_kind(base):
            if isinstance(dtype := getattr(weight, "dtype", None), torch.dtype):
                # gptqmodel's stand-in for a weight; HF PEFT reads all these dtypes too
                return torch.empty(0, dtype=dtype, device=weight.device)
            for name in ("qweight", "W_q", "codes"):  # integers, whatever they are viewed as
                if isinstance(held := getattr(base, name, None), Tensor):
                    dtype = getattr(base, "compute_dtype", None) if name == "qweight" else None
                    return torch.empty(0, dtype=dtype or torch.uint8, device=held.device)
        return next(base.parameters(), torch.empty(0))

    def _base_dtype(self) -> torch.dtype:
        return self._some_weight().dtype

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: LoraConfig,
        autocast_dtype: bool = True,
        meta: bool = False,
        trainable: bool = True,
        **kwargs: Any,
    ) -> None:
        """Add an adapter of rank ``r``; the active adapter stays the same.

        Args:
            adapter_name: its name; an adapter of that name is replaced.
            r: rank, at least 1.
            lora_alpha: numerator of the scaling.
            config: gives dropout, bias, scaling rule and initialisation.
            autocast_dtype: keep float32 weights under a float16 or bfloat16 base.
            meta: make the weights on the meta device, to be assigned from a checkpoint.
            trainable: True makes its weights require a gradient.
            **kwargs: ``target_name``, the layer's name in the model, for variants that need it;
                other keywords that callers written for HF PEFT pass are ignored.
        """
        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        variant = self.resolve_lora_variant(config=config)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = scaling_of(r, lora_alpha, config.use_rslora)
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = config.use_dora
        self.lora_bias[adapter_name] = config.lora_bias
        p = config.lora_dropout
        dropout: nn.Module = nn.Dropout(p=p) if p > 0.0 else nn.Identity()
        self.lora_dropout._modules[adapter_name] = dropout
        if adapter_name in self.frozen_peft_weight_names:
            del self.frozen_peft_weight_names[adapter_name]
        starts = isinstance(config.init_name, str)
        read = self.get_base_layer().parameters() if starts or variant is not None else ()
        with torch.no_grad(), gathered(read, changes=starts):
            place = self._adapter_placement(autocast_dtype, meta)
            self._make_weights(adapter_name, r, config, place, trainable)
            old: Any = self.lora_variant.pop(adapter_name, None)
            if variant is not None:
                variant.target_name = str(
                    kwargs.get("target_name") or getattr(old, "target_name", "")
                )
                put_variant(self, adapter_name, variant, config, trainable)
        if not self.training:
            self._evaluate(adapter_name)

    def _evaluate(self, adapter_name: str) -> None:
        """Put an adapter's modules in this layer into evaluation mode."""
        for store in (self.lora_dropout, *self._stores()):
            held: Any = store[adapter_name] if adapter_name in store else None
            if isinstance(held, nn.Module):
                held.train(False)

    def _make_weights(
        self, name: str, r: int, config: LoraConfig, place: dict[str, Any], trainable: bool
    ) -> None:
        raise NotImplementedError

    # ---------------------------------------------------------------- how strong it is

    def _initial_scaling(self, adapter: str) -> float:
        rslora = self.use_rslora.get(adapter, False)
        return scaling_of(self.r[adapter], self.lora_alpha[adapter], rslora)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's scaling to ``scale`` times its scaling by rank and ``lora_alpha``.

        Nothing happens in a layer without the adapter.
        """
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._initial_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the active adapters' scaling by ``scale``."""
        if scale == 1:
            return
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] = self.scaling[adapter] * scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the active adapters' scaling by ``scale``.

        None restores the scaling that follows from their ranks and ``lora_alpha``.
        """
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] = (
                    self._initial_scaling(adapter)
                    if scale is None
                    else self.scaling[adapter] / scale
                )

    # ---------------------------------------------------------------- variants of LoRA

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        """{sorted names of settings: the variant that they select}; None is plain LoRA."""
        return table_of(self.layer_kind)

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> LoraVariant | None:
        """A new variant as ``config`` selects it; None for plain LoRA.

        Raises:
            ValueError: this kind of layer has no such variant.
        """
        return select(self.lora_variants, self.layer_kind, config)

    # ---------------------------------------------------------------- why a call is fused, or not

    def _variant_operation(self, x: Tensor) -> Tensor | None:
        """The output from the active variant's own operation; None when it has none for the call.

        None also when several adapters are active.
        """
        if self._disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name = self.active_adapters[0]
        variant = self.lora_variant.get(name)
        words = None if variant is None else variant.fused_as(self, name)
        if variant is None or words is None:
            return None
        y = variant.fused(self, name, x)
        if y is not None and shares_weights():
            self.__dict__["_ran"] = Ran(True, words)
        return y

    def variant_fused_as(self) -> str | None:
        """The name of the active variant's own operation; None when it has none or is not used."""
        names = self.active_adapters
        if self._disable_adapters or self.merged or len(names) != 1:
            return None
        variant = self.lora_variant.get(names[0])
        return None if variant is None else variant.fused_as(self, names[0])

    def _variant_reason(self) -> str | None:
        """The reason that the first active variant gives for not running as plain LoRA, or None."""
        found = active_variant(self)
        return None if found is None else found[1].decline(self, found[0])

    def decline_reason(self) -> str | None:
        """The reason, in a few words, that calls are not fused at present; None when they are.

        This default is for users' classes that do not override it.
        """
        return f"{type(self).__name__} has a forward of its own"

    def describe_sharing(self) -> str:
        """The words that ``explain`` adds for a layer that ranks share out; none for others."""
        return ""

    def _note_decline(self) -> None:
        """Log the reason of a slow call, once for each new reason of this layer.

        It is kept for ``explain`` where other processes may have parts of the weights.
        """
        shared, told = shares_weights(), logger.isEnabledFor(logging.INFO)
        # making the words costs more than a product
        reason = self.decline_reason() if shared or told else None
        self.__dict__["_ran"] = Ran(False, reason or UNTOLD) if shared else None
        if told:
            note_new(self, "_noted_reason", reason, "a %s layer is not fused: %s")

    def _check_adapter_names(self, x: Tensor, adapter_names: Sequence[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        self._check_named(adapter_names)

    def _check_named(self, adapter_names: Sequence[str]) -> None:
        """Raise a ValueError when rows of a batch cannot name these adapters in this layer."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )
        if self.lora_variant:
            for name in dict.fromkeys(adapter_names):
                variant = self.lora_variant.get(name)
                if variant is not None and (reason := variant.refuses_mixed()) is not None:
                    raise ValueError(reason)
