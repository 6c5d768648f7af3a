"""QA-LoRA (Xu et al., 2023, arXiv 2309.14717): an update that is the same for a group of inputs.

Y = X Wᵀ + s (K / g) P(X) Aᵀ Bᵀ, where P takes the mean of each g neighbouring inputs, so A is
[r, K / g]. Over a base whose zeros are stored for such groups, the update could be put into them.
As in HF PEFT it works on layers quantised by GPTQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...ops import autocast
from ...ops.bases.formats import reader_of
from .base import in_out_features
from .combination import BY_FACTOR
from .variant import LoraVariant


def is_gptq(base: nn.Module) -> bool:
    """True for a layer quantised by GPTQ, of gptqmodel or auto_gptq, read here or not."""
    reader = reader_of(base)
    return reader is not None and reader.__module__.endswith(".gptq")


class QALoraLinearVariant(LoraVariant, setting="use_qalora", layers=("linear",)):
    """On linear layers quantised by GPTQ: plain LoRA on the means of groups of inputs."""

    name = "QA-LoRA"
    value_stores = {"qalora_group_size": dict}

    @classmethod
    def check(cls, key: str, base: Any, r: int, config: Any) -> None:
        if not is_gptq(base):
            raise NotImplementedError(
                f"`use_qalora=True` works on layers quantised by GPTQ, and `{key}` is a "
                f"{type(base).__name__}. Nothing was changed in the model."
            )
        K, size = in_out_features(base)[0], config.qalora_group_size
        if size < 1 or K is None or K % size:
            raise ValueError(
                f"`use_qalora=True` requires `module.in_features` ({K}) of `{key}` to be divisible "
                f"by 'qalora_group_size' ({size})"
            )

    def init(self, layer: Any, adapter: str, config: Any, trainable: bool) -> None:
        size = config.qalora_group_size
        layer.qalora_group_size[adapter] = size
        plain = layer.lora_A[adapter]
        small = nn.Linear(
            plain.in_features // size,
            plain.out_features,
            bias=False,
            device=plain.weight.device,
            dtype=plain.weight.dtype,
        )
        small.training = plain.training
        layer.lora_A[adapter] = small.requires_grad_(trainable)

    def update(self, layer: Any, adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        A, B = layer.lora_A[adapter], layer.lora_B[adapter]
        if not autocast.is_on(x):
            x = layer._cast_input_dtype(x, A.weight.dtype)
        size = layer.qalora_group_size[adapter]
        pooled = layer.lora_dropout[adapter](x).unflatten(-1, (-1, size)).mean(-1)
        pooled = pooled * pooled.shape[-1]
        return result + B(A(pooled)) * layer.scaling[adapter]

    def merged_weight(self, layer: Any, adapter: str, weight: Tensor, base: Tensor) -> Tensor:
        raise NotImplementedError("QA-LoRA does not support merging.")

    def factors(self, layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
        """B [N, r] and A [r, K] with which plain LoRA would give the same update."""
        B, A = super().factors(layer, adapter)
        size = layer.qalora_group_size[adapter]
        return B, A.repeat_interleave(size, 1) * (A.shape[1] / size)

    def combined_by(self, layer: Any, adapter: str) -> Sequence[str] | None:
        return BY_FACTOR

    def decline(self, layer: Any, adapter: str) -> str:
        return "QA-LoRA: the base layer, then the adapter on means of groups of inputs"
