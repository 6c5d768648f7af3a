"""The parts of a ``LoraConfig`` that are configurations themselves, with HF PEFT's fields."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


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
class BdLoraConfig:
    """BD-LoRA (Wang et al., 2025, arXiv 2510.23346).

    Args:
        target_modules_bd_a: A is block-diagonal in layers whose names contain one of these; those
            that a server shards by rows, such as "o_proj" and "down_proj".
        target_modules_bd_b: B is, likewise; those sharded by columns, such as "q_proj", "up_proj".
        nblocks: number of blocks, at least 1.
        match_strict: refuse adapted layers that neither list names; they get plain LoRA otherwise.
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
    """KaSA (Wang et al., 2024, arXiv 2412.06071). Adding such an adapter changes the base weights
    for good, so it does not go with adapters of another kind. Both numbers are for
    ``LoraModel._get_kasa_loss()``, which training adds to its loss itself.

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
        num_groups: into how many groups a layer's inputs are split before each is kept as one
            number, at least 1.
        scale: factor of the inputs that are made again of those numbers, above 0.
        init_type: what the groups are projected on: "batch_average" (their mean, in every call of a
            training), "batch_average_once" (their mean in the first) or "random".
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
class LoftQConfig:
    """LoftQ (Li et al., 2023, arXiv 2310.08659).

    Args:
        loftq_bits: 4 (NF4) or 8 (int8).
        loftq_iter: alternations of quantisation and low-rank approximation, at least 1.
    """

    loftq_bits: int = field(default=4)
    loftq_iter: int = field(default=1)


@dataclass
class MontecloraConfig:
    """MonteCLoRA (:mod:`.monteclora`).

    Args:
        num_samples: perturbations of A that are averaged in a call of a training, at least 1.
        use_entropy: add the sum of the squares of their weights to the loss.
        dirichlet_prior: concentration of the prior of their weights, above 0.
        sample_scaler: factor of the perturbations.
        kl_loss_weight: factor of the divergences from the priors in the loss.
        buffer_size: for how many calls random numbers are drawn at once, at least 1. A layer with K
            inputs and rank r keeps buffer_size · num_samples · K · r of them.
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
