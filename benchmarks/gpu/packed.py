"""Linears with quantised weights for benchmarks: one whose owner dequantises, and real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peftkern.ops.bases import formats
from peftkern.ops.bases.compressed_numbers import PackedInt
from peftkern.ops.bases.formats import Found
from peftkern.ops.bases.int8 import Int8
from peftkern.ops.bases.mx import Mx4
from peftkern.ops.bases.weight import Packed

BF16, FP32, U8 = torch.bfloat16, torch.float32, torch.uint8
BASES = ("nf4", "fp8", "int8", "int4", "mxfp4")


class Owned(nn.Linear):
    """A frozen linear with a packed weight, which its own forward dequantises for each product."""

    def __init__(self, packed: Packed) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.packed = packed
        self.weight = nn.Parameter(packed.tensors[0], requires_grad=False)
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = _OwnersProduct.apply(input, self)  # type: ignore[no-untyped-call]
        return found

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K], for one product."""
        return self.packed.dense(dtype)


class _OwnersProduct(torch.autograd.Function):
    """x Wᵀ and dY W, each with a weight that is dequantised for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Owned) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.dense(x.dtype))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        return dys[0] @ ctx.layer.dense(dys[0].dtype), None


@contextlib.contextmanager
def owned_is_read(kind: type[Owned] = Owned) -> Iterator[None]:
    """Let peftkern read the packed weight of such a layer, within the block."""

    def read(module: Any) -> Found:
        return Found(module.packed, None)

    with mock.patch.dict(formats._readers, {(kind, nn.Parameter, type(None)): read}):
        yield


def base_linear(base: str, dense: Tensor) -> nn.Module:
    """A frozen linear of this base for W [N, K]: bitsandbytes' own for nf4, ours for fp8.

    MXFP4 holds random numbers in place of W's.

    Raises:
        ImportError: the base's owner is not installed.
    """
    N, K = dense.shape
    if base == "nf4":
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=dense.dtype, quant_type="nf4")
        weight = bnb.nn.Params4bit(dense.cpu(), requires_grad=False, quant_type="nf4")
        layer.weight = weight
        found: nn.Module = layer.to(dense.device)
        return found
    if base == "fp8":
        from peftkern.ops.bases.fp8_linear import Fp8Linear

        plain = nn.Linear(1, 1, bias=False)
        plain.weight = nn.Parameter(dense, requires_grad=False)
        return Fp8Linear(plain)
    return Owned(_packed(base, dense))


def _packed(base: str, dense: Tensor) -> Packed:
    N, K = dense.shape
    if base == "int8":
        scale = (dense.float().abs().amax(1, keepdim=True) / 127).to(dense.dtype)
        q = (dense.float() / scale.float()).round_().clamp_(-127, 127).to(torch.int8)
        return Int8(q, scale, "torchao")
    if base == "int4":
        group = min(128, K)
        wide = dense.float().view(N, K // group, group)
        scale = (wide.abs().amax(2) / 7).to(dense.dtype)
        codes = (wide / scale.float()[:, :, None]).round_().clamp_(-8, 7).view(N, -1, 8).int() + 8
        words = torch.zeros(N, K // 8, dtype=torch.int32, device=dense.device)
        for i in range(8):
            words |= codes[:, :, i] << 4 * i
        return PackedInt(words, 4, (N, K), scale, None, (1, group), "int4")
    if base != "mxfp4":
        raise ValueError(f"base is {base!r}; allowed: {', '.join(BASES)}")
    bits = torch.randint(0, 256, (N, K // 2), dtype=U8, device=dense.device)
    return Mx4(bits, torch.randint(117, 121, (N, K // 32), dtype=U8, device=dense.device))


def without_data(base: str, N: int, K: int) -> Packed:
    """A weight of this base on the meta device, as its owner keeps it.

    nf4 has nested statistics in blocks of 64 and 256, fp8 blocks of 128 x 128, int8 a scale a row,
    int4 groups of 128.
    """
    from peftkern.ops.bases.bnb4 import Bnb4
    from peftkern.ops.bases.fp8 import Fp8

    def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if base == "nf4":
        blocks = N * K // 64
        inner = SimpleNamespace(
            absmax=meta(-(-blocks // 256), dtype=FP32), code=meta(256, dtype=FP32), blocksize=256,
            dtype=FP32,
        )  # fmt: skip
        state = SimpleNamespace(
            absmax=meta(blocks, dtype=U8), code=meta(16, dtype=FP32), blocksize=64,
            quant_type="nf4", nested=True, state2=inner, offset=meta(1, dtype=FP32),
        )  # fmt: skip
        layer = SimpleNamespace(out_features=N, in_features=K, compute_type_is_set=False)
        bits = meta(N * K // 2, 1, dtype=U8)
        return Bnb4(bits, bits, state, layer, False)
    if base == "fp8":
        scale = meta(-(-N // 128), -(-K // 128), dtype=FP32)
        return Fp8(meta(N, K, dtype=torch.float8_e4m3fn), scale, (128, 128), "fp8")
    if base == "int8":
        return Int8(meta(N, K, dtype=torch.int8), meta(N, 1), "torchao")
    if base == "int4":
        words = meta(N, K // 8, dtype=torch.int32)
        return PackedInt(words, 4, (N, K), meta(N, K // 128), None, (1, 128), "int4")
    return Mx4(meta(N, K // 2, dtype=U8), meta(N, K // 32, dtype=U8))


def packed_bytes(packed: Packed) -> int:
    """Bytes that a product has to read of the weight.

    Raises:
        RuntimeError: no kernel reads it.
    """
    found = packed.for_kernels(BF16)
    if isinstance(found, str):
        raise RuntimeError(f"no kernel reads {packed.format}: {found}")
    return found.nbytes
