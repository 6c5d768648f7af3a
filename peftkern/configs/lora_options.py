"""The options of a ``LoraConfig``'s initialisations, with HF PEFT's fields, and how a field says
that it has options. Those of variants stand beside their fields, in :mod:`.lora`."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


def holds(options: type) -> dict[str, Any]:
    """Metadata of a field that holds an ``options`` or None; a dict becomes an ``options``."""
    return {"options": options}


def selects(options: type | None = None) -> dict[str, Any]:
    """Metadata of a field that asks for a variant of LoRA when it holds something true, under HF
    PEFT's name; with ``options`` see :func:`holds`."""
    found: dict[str, Any] = {"is_lora_variant": True}
    return found if options is None else {**found, **holds(options)}


def convert_options(config: Any) -> None:
    """Make dicts in the fields of a configuration into the options that the fields hold.

    Raises:
        TypeError: a field holds neither its options, nor a dict, nor None.
    """
    for each in dataclasses.fields(config):
        if options := each.metadata.get("options"):
            setattr(config, each.name, as_subconfig(getattr(config, each.name), options))


def as_subconfig(value: Any, cls: type[T]) -> T | None:
    """``value`` as a ``cls``: an instance, a dict (as a file holds it), or None.

    Raises:
        TypeError: anything else.
    """
    if value is None or isinstance(value, cls):
        return value
    if isinstance(value, dict):
        known = {f.name for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
        unknown = sorted(str(k) for k, v in value.items() if k not in known and v is not None)
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {cls.__name__}, these are "
                "ignored.",
                stacklevel=5,
            )
        return cls(**{k: v for k, v in value.items() if k in known})
    raise TypeError(f"`{cls.__name__}` must be a `{cls.__name__}`, a dict, or None.")


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}")


@dataclass
class LoraRuntimeConfig:
    """Settings that hold for one process and are never written to disk.

    Args:
        ephemeral_gpu_offload: let DoRA's initialisation visit the GPU for weights kept on the CPU.
            It changes no number.
    """

    ephemeral_gpu_offload: bool = field(default=False)


@dataclass
class LoftQConfig:
    """LoftQ (Li et al., 2023, arXiv 2310.08659).

    Args:
        loftq_bits: 4 (NF4) or 8 (int8).
        loftq_iter: alternations of quantisation and low-rank approximation, at least 1.
    """

    loftq_bits: int = field(default=4)
    loftq_iter: int = field(default=1)


@dataclass
class EvaConfig:
    """EVA (Paischer et al., 2024, arXiv 2410.07170).

    Args:
        rho: a layer gets at most rank r * rho, at least 1; 1 leaves every rank as it is.
        tau: the components of two steps count as the same above this cosine similarity, in [0, 1].
        use_label_mask: leave out the positions whose label is ``label_mask_value``.
        label_mask_value: see above.
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
        cache_file: where the decomposition is kept, to be read when it exists.
        covariance_file: where the covariances are kept, to be read when it exists.
        corda_method: "ipm" adapts the leading components, "kpm" the trailing ones.
        verbose: show the progress.
        use_float16_for_covariance: sum the covariances in the input's dtype, not in float32.
        prune_temporary_fields: remove what the preprocessing notes on the modules.
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
        direction: which singular vectors of the gradient A and B get: "ArBr" (A odd, B even),
            "A2rBr" (A the second r, B the first), "ArB2r" (the reverse) or "random".
        scale: "stable", "weight_svd", "gd_scale" or "unit".
        stable_gamma: divisor (under a root) of the "stable" scale.
    """

    direction: str = field(default="ArB2r")
    scale: str = field(default="stable")
    stable_gamma: int = field(default=16)

    def __post_init__(self) -> None:
        _choice("direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random"))
        _choice("scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit"))
