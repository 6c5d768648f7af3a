"""Options of a ``LoraConfig``'s initialisations, with HF PEFT's fields, and the fields' metadata.

Options of variants are in :mod:`.lora`, beside their fields.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


def holds(options: type) -> dict[str, Any]:
    """Metadata for a field with an ``options`` object or None; a dict is converted to one."""
    return {"options": options}


def selects(options: type | None = None) -> dict[str, Any]:
    """Metadata, with HF PEFT's key, for a field that selects a variant of LoRA by a true value.

    For ``options`` see :func:`holds`.
    """
    found: dict[str, Any] = {"is_lora_variant": True}
    return found if options is None else {**found, **holds(options)}


def convert_options(config: Any) -> None:
    """Convert dicts in the fields of a configuration to the options that the fields hold.

    Raises:
        TypeError: a field holds neither its options, nor a dict, nor None.
    """
    for each in dataclasses.fields(config):
        if options := each.metadata.get("options"):
            setattr(config, each.name, as_subconfig(getattr(config, each.name), options))


def as_subconfig(value: Any, cls: type[T]) -> T | None:
    """``value`` as a ``cls`` or None; it may be an instance, a dict (as in a file) or None.

    Raises:
        TypeError: anything else.
    """
    if value is None or isinstance(value, cls):
        return value
    if isinstance(value, dict):
        fields = {f.name: f.init for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        known = {name for name, init in fields.items() if init}
        unknown = sorted(str(k) for k, v in value.items() if k not in fields and v is not None)
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {cls.__name__}, these are "
                "ignored.",
                stacklevel=5,
            )
        made = cls(**{k: v for k, v in value.items() if k in known})
        for name in fields.keys() & value.keys() - known:  # what other code sets later
            setattr(made, name, value[name])
        return made
    raise TypeError(f"`{cls.__name__}` must be a `{cls.__name__}`, a dict, or None.")


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}")


@dataclass
class LoraRuntimeConfig:
    """Settings for one process, which are never written to disk.

    Args:
        ephemeral_gpu_offload: let DoRA's initialisation use the GPU for weights on the CPU. The
            numbers do not change.
    """

    ephemeral_gpu_offload: bool = field(default=False)


@dataclass
class LoftQConfig:
    """LoftQ (Li et al., 2023, arXiv 2310.08659).

    Args:
        loftq_bits: 4 (NF4) or 8 (int8).
        loftq_iter: number of steps of quantisation and low-rank approximation, at least 1.
    """

    loftq_bits: int = field(default=4)
    loftq_iter: int = field(default=1)


@dataclass
class EvaConfig:
    """EVA (Paischer et al., 2024, arXiv 2410.07170).

    Args:
        rho: a layer's rank is at most r * rho; rho is at least 1, and 1 changes no rank.
        tau: components of two steps count as equal above this cosine similarity, in [0, 1].
        use_label_mask: leave out the positions whose label is ``label_mask_value``.
        label_mask_value: the label of the positions to leave out.
        whiten: divide each component by the square root of its singular value.
        adjust_scaling_factors: scale ``lora_alpha`` with the new rank.
    """

    rho: float = field(default=2.0)
    tau: float = field(default=0.99)
    use_label_mask: bool = field(default=True)
    label_mask_value: int = field(default=-100)
    whiten: bool = field(default=False)
    adjust_scaling_factors: bool = field(default=True)

    def __post_init__(self) -> None:
        if self.rho < 1.0:
            raise ValueError("`rho` must be >= 1.0")
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError("`tau` must be between 0.0 and 1.0.")


@dataclass
class CordaConfig:
    """CorDA (Yang et al., 2024, arXiv 2406.05223).

    Args:
        cache_file: file for the decomposition; it is read when it exists, else written.
        covariance_file: file for the covariances; it is read when it exists, else written.
        corda_method: "ipm" adapts the leading components, "kpm" the trailing ones.
        verbose: show progress.
        use_float16_for_covariance: sum the covariances in the input's dtype, not in float32.
        prune_temporary_fields: remove the attributes that the preprocessing sets on modules.
    """

    cache_file: str | None = field(default=None)
    covariance_file: str | None = field(default=None)
    corda_method: str = field(default="ipm")
    verbose: bool = field(default=False)
    use_float16_for_covariance: bool = field(default=False)
    prune_temporary_fields: bool = field(default=True)


@dataclass
class LoraGAConfig:
    """LoRA-GA (Wang et al., 2024, arXiv 2407.05000).

    Args:
        direction: the singular vectors of the gradient for A and B: "ArBr" (A odd, B even),
            "A2rBr" (A the second r, B the first r), "ArB2r" (the reverse) or "random".
        scale: "stable", "weight_svd", "gd_scale" or "unit".
        stable_gamma: divisor (under a root) of the "stable" scale.
    """

    direction: str = field(default="ArB2r")
    scale: str = field(default="stable")
    stable_gamma: int = field(default=16)

    def __post_init__(self) -> None:
        _choice("direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random"))
        _choice("scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit"))
