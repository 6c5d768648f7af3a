"""``LoraConfig``: the fields of HF PEFT 0.21 and of 0.6.2, and a check of what is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...config import PeftConfig
from ...utils.peft_types import PeftType
from .variant import SELECTS

INIT_SUPPORTED = (True, False, "gaussian")
BIAS_CHOICES = ("none", "all", "lora_only")


@dataclass
class LoraRuntimeConfig:
    """Settings that hold for one process and are never written to disk."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(PeftConfig):
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
        init_lora_weights: True (B is zero), False (both random) or "gaussian" (A normal, B zero).
        layers_to_transform: indices of the layers to adapt; needs a list in ``target_modules``.
        layers_pattern: names of the module list that those indices count.
        rank_pattern: name or regular expression -> another ``r``.
        alpha_pattern: name or regular expression -> another ``lora_alpha``.
        lora_bias: give B a bias of its own.
        use_dora: train a magnitude of each output beside A and B (:mod:`.dora`).

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
    loftq_config: dict = field(default_factory=dict)
    eva_config: Any | None = field(default=None)
    corda_config: Any | None = field(default=None)
    lora_ga_config: Any | None = field(default=None)
    use_dora: bool = field(default=False, metadata=SELECTS)
    velora_config: Any | None = field(default=None)
    alora_invocation_tokens: list[int] | None = field(default=None)
    use_qalora: bool = field(default=False)
    qalora_group_size: int = field(default=16)
    monteclora_config: Any | None = field(default=None)
    layer_replication: list[tuple[int, int]] | None = field(default=None)
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    target_parameters: list[str] | None = field(default=None)
    use_bdlora: Any | None = field(default=None)
    arrow_config: Any | None = field(default=None)
    kasa_config: Any | None = field(default=None)
    ensure_weight_tying: bool = field(default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        # PEFT keeps name lists as sets, and its users compare with sets
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        self.loftq_config = self.loftq_config or {}
        if self.runtime_config is None or isinstance(self.runtime_config, dict):
            self.runtime_config = LoraRuntimeConfig(**(self.runtime_config or {}))
        self._check_values()

    def _check_values(self) -> None:
        def positive_int(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value > 0

        if not positive_int(self.r):
            raise ValueError(
                f"`r` should be a positive integer value but the value passed is {self.r}"
            )
        for key, rank in self.rank_pattern.items():
            if not positive_int(rank):
                raise ValueError(
                    f"`rank_pattern[{key!r}]` should be a positive integer value but the value "
                    f"passed is {rank}"
                )
        for name, alpha in [("lora_alpha", self.lora_alpha)] + [
            (f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()
        ]:
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
                raise ValueError(f"`{name}` should be a number but the value passed is {alpha!r}")
        p = self.lora_dropout
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0.0 <= p < 1.0:
            raise ValueError(f"`lora_dropout` should be in [0, 1) but the value passed is {p!r}")
        if self.bias not in BIAS_CHOICES:
            raise ValueError(
                f"`bias` should be one of {BIAS_CHOICES} but the value passed is {self.bias!r}"
            )
        if self.use_dora and self.megatron_config:
            raise ValueError("DoRA does not support megatron_core, please set `use_dora=False`.")
        if self.use_dora and self.lora_bias:
            raise ValueError(
                "The argument lora_bias=True is not supported for DoRA, please pass use_dora=False"
            )
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
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
        names = (
            "megatron_config trainable_token_indices loftq_config eva_config corda_config "
            "lora_ga_config velora_config alora_invocation_tokens use_qalora "
            "monteclora_config layer_replication target_parameters use_bdlora arrow_config "
            "kasa_config ensure_weight_tying"
        ).split()
        found = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name)]
        if self.init_lora_weights not in INIT_SUPPORTED:
            found.append(f"init_lora_weights={self.init_lora_weights!r}")
        if self.runtime_config.ephemeral_gpu_offload:
            found.append("runtime_config.ephemeral_gpu_offload=True")
        return found

    def check_supported(self) -> None:
        found = self.unsupported()
        if found:
            raise NotImplementedError(
                f"LoraConfig asks for what peftkern does not support yet: {', '.join(found)}. "
                "Nothing was changed in the model."
            )
