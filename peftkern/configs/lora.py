"""``LoraConfig``: the fields of HF PEFT 0.21 and 0.6.2, with a check of unsupported settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..utils.peft_types import PeftType
from .base import PeftConfig
from .lora_checks import check_types_of_names, check_values, match_inits, warn_of_settings
from .lora_options import (
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    convert_options,
    holds,
    selects,
)

MAX_RANK = 65536  # for a larger rank the saved tensors are compared before memory is allocated
BIAS_CHOICES = ("none", "all", "lora_only")
# initialisations that change the base weight
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")


@dataclass
class BdLoraConfig:
    """BD-LoRA (Wang et al., 2025, arXiv 2510.23346).

    Args:
        target_modules_bd_a: A is block-diagonal in layers whose names contain one of these. These
            are layers that a server shards by rows, such as "o_proj" and "down_proj".
        target_modules_bd_b: B is block-diagonal in layers whose names contain one of these. These
            are layers that a server shards by columns, such as "q_proj" and "up_proj".
        nblocks: number of blocks, at least 1.
        match_strict: True refuses adapted layers that neither list names; otherwise they get plain
            LoRA.
    """

    target_modules_bd_a: list[str] | None = field(default=None)
    target_modules_bd_b: list[str] | None = field(default=None)
    nblocks: int = field(default=1)
    match_strict: bool = field(default=True)

    def __post_init__(self) -> None:
        a, b = self.target_modules_bd_a or [], self.target_modules_bd_b or []
        if set(a) & set(b):
            raise ValueError(f"Found overlapping modules in target_modules_bd lists: {a} and {b}.")
        if self.nblocks < 1:
            raise ValueError(f"`nblocks` must be at least 1, got {self.nblocks}.")


@dataclass
class KasaConfig:
    """KaSA (Wang et al., 2024, arXiv 2412.06071).

    Adding such an adapter changes the base weights for good, so it cannot be combined with adapters
    of another kind. Both numbers are for ``LoraModel._get_kasa_loss()``, which the training code
    has to add to its loss.

    Args:
        beta: weight of the sum of the squared singular values, at least 0.
        gamma: weight of the distance of A and B from orthogonal, at least 0.
    """

    beta: float = field(default=1e-4)
    gamma: float = field(default=1e-3)

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"`{name}` must be non-negative, got {value}.")


@dataclass
class VeloraConfig:
    """VeLoRA (Miles et al., 2024, arXiv 2405.17991).

    Args:
        num_groups: number of groups into which a layer's inputs are split, at least 1; for each
            group one number is kept.
        scale: factor of the inputs that are rebuilt from these numbers, above 0.
        init_type: the vector on which the groups are projected: "batch_average" (their mean, in
            every training call), "batch_average_once" (their mean in the first one) or "random".
    """

    num_groups: int = field(default=64)
    scale: float = field(default=1.0)
    init_type: str = field(default="batch_average")

    def __post_init__(self) -> None:
        for name in ("num_groups", "scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` should be positive, got {getattr(self, name)}.")
        if self.init_type not in ("batch_average_once", "batch_average", "random"):
            raise ValueError(
                f"Unsupported `init_type` {self.init_type!r}. Supported values are "
                "'batch_average_once', 'batch_average', and 'random'."
            )


@dataclass
class MontecloraConfig:
    """MonteCLoRA (:mod:`.monteclora`).

    Args:
        num_samples: perturbations of A that are averaged in a training call, at least 1.
        use_entropy: add the sum of the squares of their weights to the loss.
        dirichlet_prior: concentration of the prior of their weights, above 0.
        sample_scaler: factor of the perturbations.
        kl_loss_weight: factor of the divergences from the priors in the loss.
        buffer_size: number of calls for which random numbers are drawn together, at least 1. A
            layer with K inputs and rank r keeps buffer_size · num_samples · K · r of them.
    """

    num_samples: int = field(default=8)
    use_entropy: bool = field(default=False)
    dirichlet_prior: float = field(default=0.1)
    sample_scaler: float = field(default=1e-4)
    kl_loss_weight: float = field(default=1e-5)
    buffer_size: int = field(default=150)

    def __post_init__(self) -> None:
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be greater than 0.")


@dataclass
class ArrowConfig:
    """Arrow (:mod:`peftkern.tuners.lora.arrow`); :func:`peftkern.create_arrow_model` makes a model.

    Args:
        top_k: number of adapters that a token is sent to, at least 1.
        router_temperature: divisor of the similarities before their softmax, above 0.
        use_gks: subtract the mean of general adapters from the others (GenKnowSub).
        rng_seed: seed of the power iterations' start; None: torch's generator.

    Attributes:
        task_adapter_names: the adapters among which tokens are routed.
        gks_adapter_names: the general ones. ``create_arrow_model`` sets both.
    """

    top_k: int = field(default=3)
    router_temperature: float = field(default=1.0)
    use_gks: bool = field(default=False)
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = field(default=None)

    def __post_init__(self) -> None:
        if self.top_k <= 0:
            raise ValueError(f"`top_k` must be at least 1, got {self.top_k}")
        if self.router_temperature <= 0:
            raise ValueError(
                f"`router_temperature` must be greater than 0, got {self.router_temperature}"
            )


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
        layers_pattern: names of the module lists that these indices count in.
        rank_pattern: {name or regular expression: another ``r``}.
        alpha_pattern: {name or regular expression: another ``lora_alpha``}.
        lora_bias: give B a bias of its own.
        loftq_config: :class:`LoftQConfig` (or its fields) for "loftq"; kept as a dict.
        eva_config: :class:`EvaConfig` for "eva".
        corda_config: :class:`CordaConfig` for "corda".
        lora_ga_config: :class:`LoraGAConfig` for "lora_ga".
        use_dora: train a magnitude for each output beside A and B (:mod:`.dora`).
        use_bdlora: :class:`BdLoraConfig`, for a block-diagonal A or B (:mod:`.bdlora`).
        kasa_config: :class:`KasaConfig`, for singular values of the update (:mod:`.kasa`).
        velora_config: :class:`VeloraConfig`: keep A's inputs compressed for its gradient.
        monteclora_config: :class:`MontecloraConfig`: train with random perturbations of A.
        arrow_config: :class:`ArrowConfig`: route each token among other adapters (:mod:`.arrow`).
        use_qalora: on layers quantised by GPTQ, adapt the means of ``qalora_group_size`` inputs.
        alora_invocation_tokens: let the adapter act from these tokens on (:mod:`.alora`).
        target_parameters: list of names, or ends of names, of parameters of 2 or 3 dimensions; or
            "all-experts" for all those of a mixture's experts, which is replaced by their names
            when a model is adapted.

    The other fields exist so that configurations of HF PEFT can be read and written. One with a
    setting that is not built yet is refused by :meth:`check_supported` before a model is changed.
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
    init_lora_weights: bool | str = field(default=True, metadata={"lora_variants": ["mica"]})
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_bias: bool = field(default=False)
    # Not built yet; kept for the file format, with PEFT's defaults.
    megatron_config: dict[str, Any] | None = field(default=None)
    megatron_core: str | None = field(default="megatron.core")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(default=None)
    loftq_config: LoftQConfig | dict[str, Any] = field(default_factory=dict)
    eva_config: EvaConfig | None = field(default=None, metadata=holds(EvaConfig))
    corda_config: CordaConfig | None = field(default=None, metadata=holds(CordaConfig))
    lora_ga_config: LoraGAConfig | None = field(default=None, metadata=holds(LoraGAConfig))
    use_dora: bool = field(default=False, metadata=selects())
    velora_config: VeloraConfig | None = field(default=None, metadata=selects(VeloraConfig))
    alora_invocation_tokens: list[int] | None = field(default=None, metadata=selects())
    use_qalora: bool = field(default=False, metadata=selects())
    qalora_group_size: int = field(default=16)
    monteclora_config: MontecloraConfig | None = field(
        default=None, metadata=selects(MontecloraConfig)
    )
    layer_replication: list[tuple[int, int]] | None = field(default=None)
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    target_parameters: list[str] | str | None = field(default=None)
    use_bdlora: BdLoraConfig | None = field(default=None, metadata=selects(BdLoraConfig))
    arrow_config: ArrowConfig | None = field(default=None, metadata=selects(ArrowConfig))
    kasa_config: KasaConfig | None = field(default=None, metadata=selects(KasaConfig))
    ensure_weight_tying: bool = field(default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        check_types_of_names(self)
        # PEFT keeps lists of names as sets, and its users compare them with sets
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        self.loftq_config = self.loftq_config or {}
        convert_options(self)
        if self.runtime_config is None or isinstance(self.runtime_config, dict):
            self.runtime_config = LoraRuntimeConfig(**(self.runtime_config or {}))
        if self.ensure_weight_tying:
            self.modules_to_tie = None
            self.target_modules_to_tie = None
        check_values(self)
        match_inits(self)
        warn_of_settings(self)
        # not a field, so it is neither written to a file nor compared
        self._custom_modules: dict[type[nn.Module], type[nn.Module]] | None = None

    def _register_custom_module(self, mapping: dict[type[nn.Module], type[nn.Module]]) -> None:
        """Adapt layers of the classes in ``mapping`` with the LoRA layer classes that it names.

        Such a class takes HF PEFT's arguments (``base_layer, adapter_name, config, r, lora_alpha,
        **kwargs``) and follows its conventions, as a subclass of ``lora.Linear`` does. Classes in
        ``mapping`` have precedence over the built-in ones. The mapping is not saved: register it
        again after loading.
        """
        self._custom_modules = {**(self._custom_modules or {}), **mapping}

    @property
    def init_name(self) -> str | bool:
        """``init_lora_weights`` in its canonical spelling: True, False or a name."""
        init = self.init_lora_weights
        if not isinstance(init, str):
            return bool(init)
        # PEFT ignores the case of these three names, but not of the others
        return init.lower() if init.lower() in ("gaussian", "olora", "mica") else init

    @property
    def changes_base_weights(self) -> bool:
        """True when the initialisation subtracts the adapter's product from the base weight."""
        init = self.init_name
        return isinstance(init, str) and (init in CHANGES_BASE or init.startswith("pissa"))

    def to_dict(self) -> dict[str, Any]:
        """All fields except the run-time ones, as plain Python values."""
        values = super().to_dict()
        values.pop("runtime_config", None)
        return values

    def unsupported(self) -> list[str]:
        """The settings, each as ``name=value``, that peftkern does not support yet."""
        config = self.megatron_config
        return [f"megatron_config={config!r}"] if config else []

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
