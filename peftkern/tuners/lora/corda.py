"""CorDA (Yang et al., 2024, arXiv 2406.05223): starts A and B from W and the inputs' covariance.

With C the covariance of the layer's inputs, W C = U S Vᵀ and W = U S (C⁻¹ V)ᵀ. The components are
ordered by their effect on the data. "ipm" adapts the r leading ones, "kpm" the r trailing ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ...configs.lora import LoraConfig
from ...ops.bases.formats import is_packed
from ...utils.undo import in_mode, unchanged_on_error
from ...utils.zero3 import whole_shape
from .inits.calibration import has_content, linear_targets, load_tensors, model_device, save_tensors
from .inits.residual import Start, minus_product
from .ranks import rank_and_alpha

PARTS = ("S_WC", "U_WC", "V_WC")
TEMPORARY = ("sample_count", "covariance_matrix", "corda_method", "rank")


@dataclass
class CordaEigens:
    """The value of a layer's ``eigens`` after :func:`preprocess_corda`.

    ``S_WC`` is S [r], ``U_WC`` is U [N, r], ``V_WC`` is C⁻¹ V [K, r].
    """

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


def check_eigens(base: Any, r: int) -> None:
    """Raise a ValueError when the layer has no ``eigens``, or ones of another rank or shape."""
    eigens = getattr(base, "eigens", None)
    if eigens is None:
        raise ValueError(
            "`eigens` attribute not found for layer, please run `preprocess_corda` first."
        )
    shape = whole_shape(base.weight)
    n, k = shape if isinstance(base, nn.Linear) else shape[::-1]
    sizes = {"U": (eigens.U_WC, (n, r)), "S": (eigens.S_WC, (r,)), "V": (eigens.V_WC, (k, r))}
    for name, (matrix, size) in sizes.items():
        if not matrix.isfinite().all():
            raise ValueError(f"Invalid value found in matrix {name} of `preprocess_corda`.")
        if tuple(matrix.shape) != size:
            raise ValueError(
                f"Matrix {name} size mismatch: {tuple(matrix.shape)} vs. {size}. Please make sure "
                "the `lora_config` and `model` argument of `preprocess_corda` is consistent with "
                "`get_peft_model`. If you're using cache in `preprocess_corda`, please make sure "
                "the cache is built with the same model and LoRA rank."
            )


def corda(layer: Any, adapter: str, config: LoraConfig) -> Start:
    """The start A = √(S/s) (C⁻¹ V)ᵀ and B = U √(S/s); removes the layer's ``eigens``."""
    base, s = layer.get_base_layer(), layer.scaling[adapter]
    root = (base.eigens.S_WC / s).sqrt()
    A = base.eigens.V_WC.T * root[:, None]
    B = base.eigens.U_WC * root
    del base.eigens
    return minus_product(A.contiguous(), B.contiguous(), s, layer.fan_in_fan_out)


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Decompose every targeted linear layer of ``model``; the parts become its ``eigens``.

    Args:
        model: the model to be adapted afterwards. Its training mode does not change.
        lora_config: names the layers and ranks; must have ``corda_config``.
        run_model: runs the model on samples of the task, one sequence [1, T, K] or [T, K] at a
            time. Not needed when the covariance file or the cache exists.
        hooked_model: the model that ``run_model`` runs, if it is another one with the same names.

    The files of ``corda_config`` are safetensors. Memory: a covariance [K, K] for each layer.

    Raises:
        TypeError: the weight of a layer is quantised.
        ValueError: no ``corda_config``, ``run_model`` is missing, an input is not finite or holds
            several sequences, ``corda_method`` is unknown, or a file was made for other layers.

    After an error the model is as it was.
    """
    settings = lora_config.corda_config
    if settings is None:
        raise ValueError(
            "preprocess_corda needs a `lora_config` with corda_config=CordaConfig(...), but its "
            "`corda_config` is None"
        )
    targets = linear_targets(model, lora_config)
    for name, layer in targets:
        if is_packed(layer):
            raise TypeError(
                "Please initialize CorDA under float32, float16, or bfloat16. Subsequently, "
                "re-quantize the residual model to help minimize quantization errors. The weight "
                f"of `{name}`, a {type(layer).__name__}, is quantised."
            )
    device = model_device(model)
    if has_content(settings.cache_file):
        names = {name: [f"{name}.eigens.{part}" for part in PARTS] for name, _ in targets}
        found = load_tensors(settings.cache_file, device, chain(*names.values()))  # type: ignore[arg-type]
        for name, layer in targets:
            layer.eigens = CordaEigens(*(found[part] for part in names[name]))
        return
    if settings.corda_method not in ("ipm", "kpm"):
        raise ValueError(
            f"Invalid corda_method found: {settings.corda_method}, it should be 'ipm' or 'kpm'."
        )
    hooked = hooked_model or model
    with unchanged_on_error(model), unchanged_on_error(hooked, when=hooked is not model):
        for name, layer in targets:
            layer.corda_method = settings.corda_method
            layer.rank, _ = rank_and_alpha(lora_config, name)
        if has_content(settings.covariance_file):
            names_of = [name for name, _ in targets]
            found = load_tensors(settings.covariance_file, device, names_of)  # type: ignore[arg-type]
            for name, layer in targets:
                layer.covariance_matrix = found[name]
        else:
            _covariances(model, lora_config, run_model, hooked)
            if settings.covariance_file is not None:
                matrices = {name: layer.covariance_matrix for name, layer in targets}
                save_tensors(settings.covariance_file, matrices)
        for _, layer in tqdm(targets, desc="CorDA", disable=not settings.verbose):
            layer.eigens = _decompose(layer, device)
    if settings.prune_temporary_fields:
        for _, layer in targets:
            for field in TEMPORARY:
                layer.__dict__.pop(field, None)
    if settings.cache_file is not None:
        save_tensors(
            settings.cache_file,
            {
                f"{name}.eigens.{part}": getattr(layer.eigens, part)
                for name, layer in targets
                for part in PARTS
            },
        )


def _covariances(
    model: nn.Module,
    config: LoraConfig,
    run_model: Callable[[], Any] | None,
    hooked: nn.Module,
) -> None:
    """Set ``covariance_matrix`` of the layers to C = Σ xᵀ x / samples, [K, K].

    Each input x is divided by the absolute value of its largest entry before.
    """
    if run_model is None:
        raise ValueError(
            "run_model must be specified when covariance file and cache file aren't built."
        )
    settings = config.corda_config
    wide = settings is not None and not settings.use_float16_for_covariance

    def add(layer: Any, args: Any, _: Any) -> None:
        x = args[0].detach()
        x = x[0] if x.ndim == 3 and len(x) == 1 else x
        if x.ndim != 2:
            raise ValueError(
                f"CorDA takes one sequence at a time, [1, T, K] or [T, K], but `run_model` gave a "
                f"layer an input {tuple(args[0].shape)}: let it run the model on each row alone"
            )
        x = x.float() if wide else x
        x = x / x.max().abs()
        if not x.isfinite().all():
            raise ValueError("Invalid value found in input, please check your input data.")
        covariance = x.T @ x
        if not covariance.isfinite().all():
            raise ValueError("Invalid value found in covariance: the inputs are too large.")
        layer.sample_count += 1
        layer.covariance_matrix = layer.covariance_matrix + covariance

    watched = linear_targets(hooked, config)
    handles = []
    try:
        for _, layer in watched:
            layer.sample_count, layer.covariance_matrix = 0, 0
            handles.append(layer.register_forward_hook(add))
        with in_mode(hooked, training=False):
            run_model()
    finally:
        for handle in handles:
            handle.remove()
    seen = dict(watched)
    for name, layer in linear_targets(model, config):
        source = seen.get(name)
        if source is None or not source.sample_count:
            raise ValueError(f"run_model never ran the layer `{name}`")
        layer.sample_count = source.sample_count
        layer.covariance_matrix = source.covariance_matrix / source.sample_count


def _decompose(layer: Any, device: torch.device) -> CordaEigens:
    """The r components of W C that the layer's method selects.

    1% of the mean variance is added to the diagonal of C, and doubled until the inverse of C is
    accurate.
    """
    W = layer.weight.detach().float()
    W = W if isinstance(layer, nn.Linear) else W.T
    C = layer.covariance_matrix.float()
    one = torch.eye(len(C), device=C.device)
    damping = 0.01
    while True:
        damped = C + one * (C.diagonal().mean() * damping)
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, one) < 0.05:
            break
        damping *= 2
        if damping > 1e6:
            raise ValueError("CorDA: the covariance of a layer's inputs has no stable inverse")
    U, S, Vh = torch.linalg.svd(W @ damped, full_matrices=False)
    V = (Vh @ inverse).T
    r = layer.rank
    part = slice(0, r) if layer.corda_method == "ipm" else slice(-r, None)
    return CordaEigens(
        S_WC=S[part].clone(), U_WC=U[:, part].clone().to(device), V_WC=V[:, part].clone().to(device)
    )
