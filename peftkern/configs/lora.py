"""``LoraConfig``: the fields of HF PEFT 0.21 and of 0.6.2, and a check of what is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..utils.patterns import Pattern
from ..utils.peft_types import PeftType
from .base import PeftConfig
from .lora_options import (
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
    as_subconfig,
)
from .names import as_names, check_ints, check_names, check_pattern, is_int, is_number, shown

# set on fields of LoraConfig that select a variant when they hold something true
SELECTS: dict[str, Any] = {"is_lora_variant": True}
MAX_RANK = 65536  # above it a saved adapter must show its rank before memory is taken for it
BIAS_CHOICES = ("none", "all", "lora_only")
_FLAGS = (
    "fan_in_fan_out use_rslora lora_bias use_dora use_qalora ensure_weight_tying inference_mode"
).split()
# initialisations that change the base weight
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")


@dataclass
class LoraConfig(PeftConfig, method=PeftType.LORA):
    """Low-rank adaptation (Hu et al., 2021): Y = X Wᵀ + s · drop(X) Aᵀ Bᵀ.

    Args:
        r: rank of the update, at least 1.
        target_modules: list of module names or suffixes, a regular expression, "all-linear", or
            None for the defaults of the model's architecture.
        exclude_modules: list of names or suffixes, or a regular expression, never adapted.
        lora_alpha: s = lora_alpha / r (or / √r with ``use_rslora``).
        lora_dropout: probability of dropping an input of A, in [0, 1).
        fan_in_fan_out: True when the weight is stored [in, out] (transformers' ``Conv1D``).
        bias: which biases train: "none", "all" or "lora_only".
        use_rslora: rank-stabilised scaling.
        modules_to_save: modules trained and saved in full.
        init_lora_weights: True (B is zero), False (both random), "gaussian" (A normal, B zero),
            "pissa", "pissa_niter_<k>", "olora", "mica", "loftq", "eva", "corda", "orthogonal",
            "lora_ga": see :mod:`peftkern.tuners.lora.inits`.
        layers_to_transform: indices of the layers to adapt; needs a list in ``target_modules``.
        layers_pattern: names of the module list that those indices count.
        rank_pattern: name or regular expression -> another ``r``.
        alpha_pattern: name or regular expression -> another ``lora_alpha``.
        lora_bias: give B a bias of its own.
        loftq_config: :class:`LoftQConfig` (or its fields) of "loftq"; kept as a dict.
        eva_config: :class:`EvaConfig` of "eva".
        corda_config: :class:`CordaConfig` of "corda".
        lora_ga_config: :class:`LoraGAConfig` of "lora_ga".
        use_dora: train a magnitude of each output beside A and B (:mod:`.dora`).
        use_bdlora: :class:`BdLoraConfig`, for a block-diagonal A or B (:mod:`.bdlora`).
        kasa_config: :class:`KasaConfig`, for singular values of its own (:mod:`.kasa`).
        velora_config: :class:`VeloraConfig`: keep A's inputs compressed for its gradient.
        monteclora_config: :class:`MontecloraConfig`: train with random perturbations of A.
        alora_invocation_tokens: let the adapter work from these tokens on (:mod:`.alora`).

    The other fields exist so that configurations of HF PEFT can be read and written; one that asks
    for something not built yet is refused by :meth:`check_supported` before a model is touched.
    """

    r: int = field(default=8)
    target_modules: list[str] | set[str] | str | None = field(default=None)
    exclude_modules: list[str] | set[str] | str | None = field(default=None)
    lora_alpha: float = field(default=8)
    lora_dropout: float = field(default=0.0)
    fan_in_fan_out: bool = field(default=False)
    bias: str = field(default="none")
    use_rslora: bool = field(default=False)
    modules_to_save: list[str] | None = field(default=None)
    init_lora_weights: bool | str = field(default=True)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_bias: bool = field(default=False)
    # Not built yet, kept for the file format; the defaults are PEFT's.
    megatron_config: dict | None = field(default=None)
    megatron_core: str | None = field(default="megatron.core")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(default=None)
    loftq_config: LoftQConfig | dict = field(default_factory=dict)
    eva_config: EvaConfig | None = field(default=None)
    corda_config: CordaConfig | None = field(default=None)
    lora_ga_config: LoraGAConfig | None = field(default=None)
    use_dora: bool = field(default=False, metadata=SELECTS)
    velora_config: VeloraConfig | None = field(default=None, metadata=SELECTS)
    alora_invocation_tokens: list[int] | None = field(default=None, metadata=SELECTS)
    use_qalora: bool = field(default=False)
    qalora_group_size: int = field(default=16)
    monteclora_config: MontecloraConfig | None = field(default=None, metadata=SELECTS)
    layer_replication: list[tuple[int, int]] | None = field(default=None)
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    target_parameters: list[str] | None = field(default=None)
    use_bdlora: BdLoraConfig | None = field(default=None, metadata=SELECTS)
    arrow_config: Any | None = field(default=None)
    kasa_config: KasaConfig | None = field(default=None, metadata=SELECTS)
    ensure_weight_tying: bool = field(default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        self._check_names()
        # PEFT keeps name lists as sets, and its users compare with sets
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        self.loftq_config = self.loftq_config or {}
        self.velora_config = as_subconfig(self.velora_config, VeloraConfig)
        self.monteclora_config = as_subconfig(self.monteclora_config, MontecloraConfig)
        self.eva_config = as_subconfig(self.eva_config, EvaConfig)
        self.corda_config = as_subconfig(self.corda_config, CordaConfig)
        self.lora_ga_config = as_subconfig(self.lora_ga_config, LoraGAConfig)
        self.use_bdlora = as_subconfig(self.use_bdlora, BdLoraConfig)
        self.kasa_config = as_subconfig(self.kasa_config, KasaConfig)
        if self.runtime_config is None or isinstance(self.runtime_config, dict):
            self.runtime_config = LoraRuntimeConfig(**(self.runtime_config or {}))
        if self.ensure_weight_tying:
            self.modules_to_tie = None
            self.target_modules_to_tie = None
        self._check_values()
        self._settle_inits()
        self._warn()
        # no field: not written to a file, and not compared
        self._custom_modules: dict[type[nn.Module], type[nn.Module]] | None = None

    def _register_custom_module(self, mapping: dict[type[nn.Module], type[nn.Module]]) -> None:
        """Adapt layers of the classes in ``mapping`` with the LoRA layer classes that it names.

        Such a class takes HF PEFT's arguments (``base_layer, adapter_name, config, r, lora_alpha,
        **kwargs``) and follows its conventions; a subclass of ``lora.Linear`` does. A listed class
        goes before the built-in ones. Nothing of this is saved: register again after loading.
        """
        self._custom_modules = {**(self._custom_modules or {}), **mapping}

    @property
    def init_name(self) -> str | bool:
        """``init_lora_weights`` in the spelling that decides: True, False or a name."""
        init = self.init_lora_weights
        if not isinstance(init, str):
            return bool(init)
        # PEFT takes these three in any case, the others as they are
        return init.lower() if init.lower() in ("gaussian", "olora", "mica") else init

    @property
    def changes_base_weights(self) -> bool:
        """Whether the initialisation subtracts the adapter's product from the base weight."""
        init = self.init_name
        return isinstance(init, str) and (init in CHANGES_BASE or init.startswith("pissa"))

    def _settle_inits(self) -> None:
        """Bring ``init_lora_weights`` and its configurations into line, with PEFT's warnings."""
        init = self.init_lora_weights
        if init == "loftq":
            if not self.loftq_config:
                raise ValueError(
                    "`loftq_config` must be specified when `init_lora_weights` is 'loftq'."
                )
            if not isinstance(self.loftq_config, dict):
                self.loftq_config = vars(self.loftq_config)
        elif self.loftq_config:
            self.loftq_config = {}
            self._ignored("loftq")
        elif init == "eva" and self.eva_config is None:
            self._default("eva", "EVA")
            self.eva_config = EvaConfig()
        elif init != "eva" and self.eva_config is not None:
            self._ignored("eva")
        elif init == "corda" and self.corda_config is None:
            self._default("corda", "CorDA")
            self.corda_config = CordaConfig()
        elif init != "corda" and self.corda_config is not None:
            self._ignored("corda")
        if self.lora_bias and init not in (True, False):
            raise ValueError(
                "The argument lora_bias=True is only supported with init_lora_weights=True or "
                f"False, got init_lora_weights={init} instead."
            )
        if self.lora_bias and self.use_dora:
            raise ValueError(
                "The argument lora_bias=True is not supported for DoRA, please pass use_dora=False"
            )

    @staticmethod
    def _ignored(name: str) -> None:
        warnings.warn(
            f"`{name}_config` specified but will be ignored when `init_lora_weights` is not "
            f"'{name}'.",
            stacklevel=5,
        )

    @staticmethod
    def _default(name: str, shown: str) -> None:
        warnings.warn(
            f"`init_lora_weights` is '{name}' but `{name}_config` is not specified. Using default "
            f"{shown} config.",
            stacklevel=5,
        )

    def _warn(self) -> None:
        if self.alora_invocation_tokens is not None and self.task_type != "CAUSAL_LM":
            warnings.warn("aLoRA is currently only supported for CAUSAL_LM task.", stacklevel=4)
        if (
            self.use_rslora
            and (self.rank_pattern or self.alpha_pattern)
            and self.changes_base_weights
        ):
            # the scale of a layer is not in the file, so the conversion could not know it
            warnings.warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training "
                "conversion of modified base weights PiSSA/CorDA/OLoRA/LoRA-GA means that you "
                "won't be able to pass `path_initial_model_for_weight_conversion` to "
                "`save_pretrained` to restore the initial values of the base weights; if you "
                "intend to do this, please ensure not to use rslora or rank_pattern/alpha_pattern.",
                stacklevel=4,
            )

    def _check_names(self) -> None:
        """The types of everything that holds names, indices or patterns."""
        pattern = "a regular expression"
        check_names("target_modules", self.target_modules, one=f"{pattern} or 'all-linear'")
        check_names("exclude_modules", self.exclude_modules, one=pattern)
        check_names("layers_pattern", self.layers_pattern, one="one name")
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        check_names("target_parameters", self.target_parameters)
        self.modules_to_save = as_names("modules_to_save", self.modules_to_save)
        for name in ("rank_pattern", "alpha_pattern"):
            setattr(self, name, getattr(self, name) or {})
            check_pattern(name, getattr(self, name))
        tokens: Any = self.trainable_token_indices
        layers: Any = self.layers_to_transform
        if isinstance(tokens, dict):
            check_names("trainable_token_indices", tokens)
            for key, indices in tokens.items():
                check_ints(f"trainable_token_indices[{key!r}]", indices)
        else:
            check_ints("trainable_token_indices", tokens)
            if isinstance(tokens, (set, frozenset)):  # rows of a file have an order
                self.trainable_token_indices = sorted(tokens)
        check_ints("layers_to_transform", layers, one=True)
        if isinstance(layers, range):
            self.layers_to_transform = list(layers)
        for name in _FLAGS:
            if isinstance(getattr(self, name), str):  # "no" would be taken for a yes
                raise ValueError(
                    f"`{name}` must be True or False, got {shown(getattr(self, name))}"
                )

    def _check_values(self) -> None:
        ranks = {"r": self.r}
        ranks |= {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}
        for name, rank in ranks.items():
            if not is_int(rank) or rank <= 0:
                raise ValueError(
                    f"`{name}` should be a positive integer value but the value passed is "
                    f"{rank if is_number(rank) else shown(rank)}"
                )
        for name, alpha in [("lora_alpha", self.lora_alpha)] + [
            (f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()
        ]:
            if not is_number(alpha):
                raise ValueError(
                    f"`{name}` should be a number but the value passed is {shown(alpha)}"
                )
        p = self.lora_dropout
        if not is_number(p) or not 0.0 <= p < 1.0:
            given = p if is_number(p) else shown(p)
            raise ValueError(f"`lora_dropout` should be in [0, 1) but the value passed is {given}")
        if self.use_dora and self.megatron_config:
            raise ValueError("DoRA does not support megatron_core, please set `use_dora=False`.")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            for pattern in (value,) if isinstance(value, str) else value or ():
                if isinstance(value, set):  # names, not patterns
                    break
                Pattern(pattern, name)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified. "
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields but the run-time ones, as plain Python values."""
        values = super().to_dict()
        values.pop("runtime_config", None)
        return values

    def unsupported(self) -> list[str]:
        """Every setting, as ``name=value``, that peftkern cannot honour yet."""
        names = ("megatron_config use_qalora arrow_config").split()
        found = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name)]
        return found

    def check_supported(self) -> None:
        found = self.unsupported()
        if found:
            raise NotImplementedError(
                f"LoraConfig asks for what peftkern does not support yet: {', '.join(found)}. "
                "Nothing was changed in the model."
            )
        if self.bias not in BIAS_CHOICES:
            raise NotImplementedError(
                f"Requested bias: {self.bias}, is not implemented. It should be one of "
                f"{', '.join(BIAS_CHOICES)}."
            )

    def check_fits(self, weights: Mapping[str, Tensor]) -> None:
        largest = max([MAX_RANK, *(n for w in weights.values() for n in w.shape)])
        for name, r in (("r", self.r), *self.rank_pattern.items()):
            if r > largest:
                raise ValueError(
                    f"the rank `{name}` is {r}, and the weights have no dimension above {largest}"
                )
