"""Arrow (Ostapenko et al., 2024, arXiv 2405.11157): each token is sent to the adapters it suits.

The prototype of an adapter in a layer is the first right singular vector p_e of B_e A_e: the input
that its update answers most. A token x goes to the ``top_k`` adapters of largest |x p_e|, with the
softmax c_e of these over the temperature:

    Y = X Wᵀ + Σ_e c_e s_e X A_eᵀ B_eᵀ.

GenKnowSub (Amini et al., ACL 2025) first subtracts from each of them the mean of general adapters.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import autocast
from .base import LoraLayer
from .variant import LoraVariant

ROUTER = "arrow_router"
TASK, GENERAL = "task_", "gks_"
_GENERAL_NAME = re.compile(rf"{GENERAL}\d+")
_STEPS = 15  # of the power iteration, as in HF PEFT


class ArrowLoraLinearLayer(nn.Module):
    """A layer's router: which adapters it knows, and their prototypes.

    Args:
        in_features: K.
        arrow_config: the settings, with the names of the adapters.

    Attributes:
        prototypes: [number of adapters, K], made in the first call; not saved.
    """

    prototypes: Tensor | None

    def __init__(self, in_features: int, arrow_config: Any) -> None:
        super().__init__()
        self.in_features = in_features
        self.top_k = arrow_config.top_k
        self.temperature = arrow_config.router_temperature
        self.rng_seed = arrow_config.rng_seed
        self.use_gks = arrow_config.use_gks
        self.task_adapter_names = list(arrow_config.task_adapter_names or ())
        self.gks_adapter_names = list(arrow_config.gks_adapter_names or ())
        self.register_buffer("prototypes", None, persistent=False)
        self._subtracted: set[str] = set()
        self._made_of: Any = None

    # not inference tensors, as the prototypes are used in later training calls too
    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, lora_A: Any, lora_B: Any) -> None:
        """Take in the adapters that the layer has now.

        What is general in a new one is subtracted, once. Prototypes are made again when an adapter
        has come, gone or been trained.
        """
        names = [n for n in lora_A if n != ROUTER and not _GENERAL_NAME.fullmatch(n)]
        if sorted(names) != sorted(self.task_adapter_names):
            self.task_adapter_names = names
        if self.use_gks:
            for store in (lora_A, lora_B):
                mean = torch.stack([store[n].weight for n in self.gks_adapter_names]).mean(0)
                for name in self.task_adapter_names:
                    if name not in self._subtracted:
                        store[name].weight.sub_(mean)
            self._subtracted.update(self.task_adapter_names)
        weights = [store[n].weight for n in self.task_adapter_names for store in (lora_A, lora_B)]
        made_of = [(id(w), 0 if w.is_inference() else w._version) for w in weights]
        if self.prototypes is None or made_of != self._made_of:
            pairs = zip(weights[::2], weights[1::2], strict=True)
            found = [self.top_right_singular_vec_from_BA(a, b).to(a) for a, b in pairs]
            self.prototypes, self._made_of = torch.stack(found), made_of

    def top_right_singular_vec_from_BA(self, A: Tensor, B: Tensor) -> Tensor:
        """The first right singular vector [K] of B A, float32, up to its sign.

        By power iteration on Aᵀ (Bᵀ B) A, so that no matrix of the weight's size is made.

        Args:
            A: [r, K].
            B: [N, r].
        """
        A, B = A.float(), B.float()
        gram = B.T @ B
        generator = None
        if self.rng_seed is not None:
            generator = torch.Generator(A.device.type).manual_seed(int(self.rng_seed))
        v = torch.randn(A.shape[1], device=A.device, generator=generator)
        v = v / (v.norm() + 1e-8)
        for _ in range(_STEPS):
            v = A.T @ (gram @ (A @ v))
            v = v / (v.norm() + 1e-8)
        return v

    def coefficients(self, x: Tensor) -> Tensor:
        """c [T, number of adapters] for tokens x [T, K]; zero but for ``top_k`` of each row."""
        assert self.prototypes is not None
        similar = (x @ self.prototypes.T).abs()
        best, index = torch.topk(similar, self.top_k, dim=1)
        scores = torch.full_like(similar, float("-inf")).scatter_(1, index, best)
        return torch.softmax(scores / self.temperature, dim=1)


class ArrowLinearVariant(LoraVariant, setting="arrow_config", layers=("linear",)):
    """On linear layers: the update of the other adapters, each token's own mixture of them."""

    name = "Arrow"
    value_stores = {"lora_arrow": nn.ModuleDict}

    def init(self, layer: Any, adapter: str, config: Any, trainable: bool) -> None:
        device = layer.lora_A[adapter].weight.device
        router = ArrowLoraLinearLayer(layer.in_features, config.arrow_config)
        layer.lora_arrow[adapter] = router.to(device)

    def update(self, layer: Any, adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        router = layer.lora_arrow[adapter]
        router.prepare(layer.lora_A, layer.lora_B)
        names = router.task_adapter_names
        A = torch.cat([layer.lora_A[n].weight for n in names])  # [E r, K]
        B = torch.cat([layer.lora_B[n].weight for n in names], 1)  # [N, E r]
        if layer.cast_input_dtype_enabled and not autocast.is_on(x):
            x = x.to(A.dtype)
        tokens = x.reshape(-1, x.shape[-1])
        share = router.coefficients(tokens)
        share = share * share.new_tensor([layer.scaling[n] for n in names])
        ranks = torch.tensor([layer.r[n] for n in names], device=share.device)
        hidden = (tokens @ A.T) * share.repeat_interleave(ranks, 1)
        update = layer.lora_dropout[adapter](hidden @ B.T)
        return result + update.view(*x.shape[:-1], update.shape[-1])

    def merged_weight(self, layer: Any, adapter: str, weight: Tensor, base: Tensor) -> Tensor:
        raise RuntimeError("Cannot merge an active Arrow router adapter. Remove it first.")

    def supports_lora_conversion(self) -> bool:
        """False: each token has an update of its own."""
        return False

    def decline(self, layer: Any, adapter: str) -> str:
        return "Arrow: the base layer, then each token's mixture of adapters"


# -------------------------------------------------------------------- of the whole model


def check_loaded_lora_compatibility_arrow(
    model: nn.Module, adapter_names: Sequence[str]
) -> tuple[list[str], int]:
    """(sorted last parts of the names of the adapted layers, the rank) that the adapters share.

    Raises:
        ValueError: two of them differ in the rank, in the shapes or in the layers.
    """
    reference: Any = None
    for name in adapter_names:
        modules, rank, shapes = set(), None, None
        for key, module in model.named_modules():
            layer: Any = module
            if isinstance(module, LoraLayer) and name in layer.lora_A:
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                modules.add(key.split(".")[-1])
                rank, shapes = a.shape[0], (a.shape, b.shape)
        if reference is None:
            reference = rank, shapes, modules
        elif rank != reference[0]:
            raise ValueError(f"[{name}] rank mismatch: {rank} != {reference[0]}")
        elif shapes != reference[1]:
            raise ValueError(f"[{name}] shape mismatch: {shapes} != {reference[1]}")
        elif modules != reference[2]:
            raise ValueError(
                f"[{name}] target_modules mismatch:\n"
                f"  this adapter -> {sorted(modules)}\n"
                f"  reference   -> {sorted(reference[2])}"
            )
    return sorted(reference[2]), int(reference[0])


def ensure_adapters_target_linear_layers_only(
    model: nn.Module, adapter_names: Sequence[str]
) -> None:
    """Raise a TypeError that names the layers that are not linear among those adapted."""
    offenders = [
        f"  - adapter '{name}' on module '{key}' of type {type(layer.get_base_layer()).__name__}"
        for key, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and layer.layer_kind != "linear"
        for name in adapter_names
        if name in layer.r
    ]
    if offenders:
        raise TypeError(
            "LoRA adapters must only target Linear-like layers (nn.Linear, transformers' Conv1D, "
            "or quantised ones). Found:\n" + "\n".join(offenders)
        )


def _resolve_adapter_source(path: str) -> tuple[str, str | None]:
    """(folder or repository, folder inside the repository or None) of an adapter.

    Raises:
        ValueError: a folder without an adapter.
    """
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "adapter_config.json")):
            raise ValueError(f"Local adapter path '{path}' does not contain 'adapter_config.json'.")
        return path, None
    parts = path.strip("/").split("/")
    if len(parts) < 2:
        return path, None
    return "/".join(parts[:2]), "/".join(parts[2:]) or None
