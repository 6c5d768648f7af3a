"""BD-LoRA (Wang et al., 2025, arXiv 2510.23346): LoRA with a block-diagonal A or B.

Each device of a sharded server then needs only its own block. The layer's name decides which of the
two factors is block-diagonal. It is stored as its blocks, one below the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import autocast
from ...ops.lora import lora_linear
from .base import in_out_features
from .combination import BY_FACTOR
from .variant import LoraVariant


class BlockDiagonalLinear(nn.Module):
    """x -> x Mᵀ with M = diag(blocks) [N, K].

    ``weight`` [N, K / nblocks] holds the blocks, one below the other.

    Args:
        in_features: K, a multiple of ``nblocks``.
        out_features: N, a multiple of ``nblocks``.
        nblocks: number of blocks.
        init_zero: True: start at zero; False: at random (He et al., 2015, uniform).
        dtype, device: those of the weight; the CPU by default.

    Raises:
        ValueError: ``nblocks`` does not divide both.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        init_zero: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if nblocks < 1 or in_features % nblocks or out_features % nblocks:
            raise ValueError(
                f"self.in_features={in_features} or self.out_features={out_features} not divisible "
                f"by {nblocks}"
            )
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        blocks = torch.empty(
            (out_features, in_features // nblocks), dtype=dtype, device=device or "cpu"
        )
        self.weight = nn.Parameter(blocks)
        if init_zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The product x Mᵀ: x [..., K] -> [..., N]."""
        blocks = self.weight.unflatten(0, (self.nblocks, -1))
        parts = x.unflatten(-1, (self.nblocks, -1))
        return torch.einsum("...bk,bnk->...bn", parts, blocks).flatten(-2)

    def weight_as_blockdiagonal_matrix(self) -> Tensor:
        """M [N, K], with zeros outside of the blocks."""
        return torch.block_diag(*self.weight.chunk(self.nblocks))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, nblocks={self.nblocks}"


def has_blocks(layer: Any, adapter: str) -> bool:
    """True when one of the adapter's factors in this layer is block-diagonal."""
    stores = (layer._modules.get(name, {}) for name in ("lora_A", "lora_B"))
    return any(adapter in s and isinstance(s[adapter], BlockDiagonalLinear) for s in stores)


def dense(module: Any) -> Tensor:
    """The matrix by which a factor (a linear layer, block-diagonal or not) multiplies."""
    if isinstance(module, BlockDiagonalLinear):
        return module.weight_as_blockdiagonal_matrix()
    return module.weight


def diagonal_factor(config: Any, key: str) -> str | None:
    """The block-diagonal factor of the layer named ``key``: "A", "B" or None.

    Raises:
        ValueError: the patterns of ``config.use_bdlora`` match both, or with ``match_strict``
            neither.
    """
    settings = config.use_bdlora
    a = any(pattern in key for pattern in settings.target_modules_bd_a or ())
    b = any(pattern in key for pattern in settings.target_modules_bd_b or ())
    if a and b:
        raise ValueError(f"Target {key} matches both A and B block-diagonal patterns")
    if settings.match_strict and not (a or b):
        raise ValueError(
            f"Target {key} matches neither A nor B block-diagonal patterns. If this is "
            "intentional, set match_strict=False in BdLoraConfig during initialization."
        )
    return "A" if a else "B" if b else None


class BdLoraLinearVariant(LoraVariant, setting="use_bdlora", layers=("linear",)):
    """BD-LoRA on linear layers: plain LoRA with one factor a :class:`BlockDiagonalLinear`."""

    name = "BD-LoRA"

    @classmethod
    def check(cls, key: str, base: Any, r: int, config: Any) -> None:
        factor = diagonal_factor(config, key)
        if factor is not None:  # the number of blocks must divide both of its sizes
            K, N = in_out_features(base)
            k, n = (K, r) if factor == "A" else (r, N)
            BlockDiagonalLinear(k, n, config.use_bdlora.nblocks, device="meta")  # type: ignore

    def init(self, layer: Any, adapter: str, config: Any, trainable: bool) -> None:
        factor = diagonal_factor(config, self.target_name)
        if factor is None:
            return
        store = layer.lora_A if factor == "A" else layer.lora_B
        plain: Any = store[adapter]
        base, weight = layer._some_weight(), plain.weight
        blocks = BlockDiagonalLinear(
            plain.in_features,
            plain.out_features,
            config.use_bdlora.nblocks,
            init_zero=factor == "B",
            # drawn in the base weight's dtype, as in HF PEFT
            dtype=base.dtype if base.is_floating_point() and base.itemsize > 1 else weight.dtype,
            device=weight.device,
        )
        blocks.to(weight.dtype).requires_grad_(trainable)
        blocks.training = plain.training
        store[adapter] = blocks
        if factor == "B":
            layer.lora_bias[adapter] = False  # a block-diagonal B has no bias

    def update(self, layer: Any, adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        A, B = layer.lora_A[adapter], layer.lora_B[adapter]
        if not autocast.is_on(x):
            x = layer._cast_input_dtype(x, A.weight.dtype)
        return result + B(A(layer.lora_dropout[adapter](x))) * layer.scaling[adapter]

    def factors(self, layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
        return dense(layer.lora_B[adapter]), dense(layer.lora_A[adapter])

    def combined_by(self, layer: Any, adapter: str) -> Sequence[str] | None:
        return BY_FACTOR if has_blocks(layer, adapter) else None

    def fused(self, layer: Any, adapter: str, x: Tensor) -> Tensor | None:
        call = layer.product_call(x, adapter)
        return None if call is None else lora_linear(x, *call)

    def fused_as(self, layer: Any, adapter: str) -> str | None:
        # without blocks (match_strict=False) the layer is a plain LoRA layer
        if layer.product_reason(adapter) is not None:
            return None
        return "BD-LoRA without blocks here: one operation, as plain LoRA"

    def decline(self, layer: Any, adapter: str) -> str:
        for name, store in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            if isinstance(store[adapter], BlockDiagonalLinear):
                return f"BD-LoRA: {name} is block-diagonal; base and update one after the other"
        reason = layer.product_reason(adapter)
        return "BD-LoRA without blocks here" if reason is None else f"BD-LoRA; {reason}"
