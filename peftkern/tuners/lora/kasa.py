"""KaSA (Wang et al., 2024, arXiv 2412.06071): an update with trained singular values of its own.

    Y = X W'ᵀ + s · drop(X) Aᵀ diag(λ) Bᵀ        W' = Σ_{i ≤ k-r} σ_i u_i v_iᵀ,  k = min(N, K)

W' is the base weight without its r smallest singular values. λ is ``lora_diag[name]`` [r] and
trains with A and B. Adding the adapter replaces W by W' for good: from then on the base model is
another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ...ops import autocast
from ...ops.lora import lora_linear
from ...utils.shards import put_data
from ...utils.zero3 import whole_shape
from .inits.residual import Start, note
from .variant import LoraVariant

PENDING = (
    "KaSA could not apply its SVD base-weight truncation because the base weight is still on the "
    "meta device. Materialize the base model weights before running a forward pass or merging."
)


def split(weight: Tensor, r: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(``weight`` [N, K] without its r smallest singular values, the part that is left out).

    The first is in the weight's dtype, the second as float32 factors [N, r] and [r, K].
    """
    u, s, vh = torch.linalg.svd(weight.detach().to(torch.float32), full_matrices=False)
    k = len(s) - r
    kept = ((u[:, :k] * s[:k]) @ vh[:k]).to(weight.dtype)
    return kept, (u[:, k:] * s[k:], vh[k:].clone())


def truncation(A: Tensor, B: Tensor, r: int) -> Start:
    """A start with these A and B that truncates the base weight, and can undo that."""
    lost: list[tuple[Tensor, Tensor]] = []

    def cut(weight: Tensor) -> Tensor:
        kept, rest = split(weight, r)
        lost[:] = [rest]
        return kept

    def back(weight: Tensor) -> Tensor:
        left, right = lost[0]
        return torch.addmm(weight.to(torch.float32), left, right).to(weight.dtype)

    return Start(A, B, cut, back)


def layer_loss(layer: Any, adapter: str, beta: float, gamma: float) -> Tensor:
    """β Σ λ² + γ (‖Bᵀ B - I‖ + ‖A Aᵀ - I‖), Frobenius norms, in float32 (equations 9 to 11)."""
    A = layer.lora_A[adapter].weight.float()
    B = layer.lora_B[adapter].weight.float()
    eye = torch.eye(A.shape[0], device=A.device)
    apart = torch.linalg.norm(B.T @ B - eye) + torch.linalg.norm(A @ A.T - eye)
    return beta * layer.lora_diag[adapter].float().square().sum() + gamma * apart


def kasa_loss(model: Any, adapter_names: str | list[str] | None = None) -> Tensor | float:
    """The loss that KaSA adds to a task's loss: the sum of :func:`layer_loss` over the layers.

    β and γ are ``beta`` and ``gamma`` of each adapter's ``kasa_config``.

    Args:
        model: a LoraModel.
        adapter_names: the adapters; None: the active ones.

    Returns:
        A scalar tensor with a graph, or 0.0 when none of them uses KaSA.
    """
    names = model.active_adapters if adapter_names is None else adapter_names
    total: Tensor | float = 0.0
    for layer in model.modules():
        stored: Any = layer._modules.get("lora_diag", ())
        for name in [names] if isinstance(names, str) else names:
            if name in stored:
                settings = model.peft_config[name].kasa_config
                total = total + layer_loss(layer, name, settings.beta, settings.gamma)
    return total


class KasaLinearVariant(LoraVariant, setting="kasa_config", layers=("linear",)):
    """KaSA on ``nn.Linear``: plain LoRA's fused operation with B diag(λ) in place of B."""

    name = "KaSA"
    weight_stores = {"lora_diag": nn.ParameterDict}
    refusals = {
        "attention": "MultiheadAttention does not support KaSA, please set `kasa_config=None`.",
        "parameter": "lora.ParamWrapper does not work when `kasa_config` is set.",
    }
    model_methods = {"_get_kasa_loss": kasa_loss}

    @classmethod
    def check(cls, key: str, base: Any, r: int, config: Any) -> None:
        if config.fan_in_fan_out or hasattr(base, "nf"):
            raise ValueError(
                "KaSA does not support `fan_in_fan_out=True` layers (e.g. Conv1D). Please target "
                "nn.Linear layers."
            )
        weight = base.weight
        if not weight.is_floating_point():
            raise TypeError(
                f"KaSA takes the singular values of the weight, and that of a "
                f"{type(base).__name__} is {weight.dtype}; allowed: floating point"
            )
        k = min(whole_shape(weight))
        if r >= k:  # no singular value of the weight would be left
            raise ValueError(
                f"KaSA requires `r` ({r}) to be smaller than min(in_features, out_features) ({k}) "
                "so that at least one singular component of the base weight is preserved after "
                "truncation."
            )

    @classmethod
    def check_beside(cls, config: Any, others: Sequence[tuple[str, Any]]) -> None:
        """Refuse KaSA beside adapters without it, for which the order of adding would matter."""
        new = getattr(config, "kasa_config", None) is not None
        for name, other in others:
            if (getattr(other, "kasa_config", None) is not None) is not new:
                raise ValueError(
                    "KaSA cannot be combined with adapters that don't use KaSA, since KaSA "
                    f"modifies the base weights: the new adapter "
                    f"{'uses' if new else 'does not use'} KaSA but adapter '{name}' "
                    f"{'does not' if new else 'does'}."
                )

    def init(self, layer: Any, adapter: str, config: Any, trainable: bool) -> None:
        waiting: set[str] = layer.__dict__.setdefault("_lora_kasa_truncation_deferred", set())
        waiting.discard(adapter)
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        weight, r = layer.get_base_layer().weight, layer.r[adapter]
        # drawn in the base weight's dtype, as in HF PEFT
        drawn = torch.float32 if weight.itemsize == 1 else weight.dtype
        diag = torch.randn(r, device=A.device, dtype=drawn).to(A.dtype)
        layer.lora_diag[adapter] = Parameter(diag, requires_grad=trainable)
        if weight.is_meta:
            waiting.add(adapter)
        else:
            note(weight, truncation(A, B, r))

    def ready(self, layer: Any, adapter: str) -> None:
        if adapter not in layer._lora_kasa_truncation_deferred:
            return
        weight = layer.get_base_layer().weight
        if weight.is_meta:
            if layer._disable_adapters:
                return
            raise RuntimeError(PENDING)
        put_data(weight, split(weight.data, layer.r[adapter])[0])
        layer._lora_kasa_truncation_deferred.discard(adapter)

    def update(self, layer: Any, adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        A, B = layer.lora_A[adapter], layer.lora_B[adapter]
        if not autocast.is_on(x):
            x = layer._cast_input_dtype(x, A.weight.dtype)
        h = A(layer.lora_dropout[adapter](x)) * layer.lora_diag[adapter]
        return result + B(h) * layer.scaling[adapter]

    def factors(self, layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
        diag = layer.lora_diag[adapter]
        return layer.lora_B[adapter].weight * diag, layer.lora_A[adapter].weight

    def fused(self, layer: Any, adapter: str, x: Tensor) -> Tensor | None:
        call = layer.product_call(x, adapter)
        if call is None:
            return None
        diag = layer.lora_diag[adapter].to(call.B.dtype)
        return lora_linear(x, *call._replace(B=call.B * diag))

    def fused_as(self, layer: Any, adapter: str) -> str | None:
        if layer.product_reason(adapter) is not None or layer._lora_kasa_truncation_deferred:
            return None
        return "KaSA: one operation, with its singular values in B"

    def decline(self, layer: Any, adapter: str) -> str:
        reason = layer.product_reason(adapter)
        return "KaSA has its singular values in B" if reason is None else f"KaSA; {reason}"

    def supports_lora_conversion(self) -> bool:
        return False  # the update is for the truncated base weight
