"""Calls of every kernel's function, and what is compared of them, for checks of plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.host import standin
from benchmarks.host.standin import Started
from benchmarks.kernels import quantised
from peftkern.kernels import (
    experts_grad,
    experts_route,
    experts_shrink,
    fp8_rows,
    launching,
    prefix_attention,
    prefix_backward,
    prefix_decode,
)
from peftkern.kernels.bits import Draw
from peftkern.kernels.decode import decode, decode_group
from peftkern.kernels.decode_quantised import decode_quantised
from peftkern.kernels.dequantise import dequantise
from peftkern.kernels.dora_grad import scale_grad
from peftkern.kernels.dora_norm import row_norms
from peftkern.kernels.expand import expand, low_rank_grad_input
from peftkern.kernels.experts_combine import combine
from peftkern.kernels.experts_gemm import gemm as experts_gemm
from peftkern.kernels.experts_route import Route, by_sorting
from peftkern.kernels.gemm import fused_grad_input, fused_linear
from peftkern.kernels.grad_a import grad_a
from peftkern.kernels.grad_sb import grad_sb, grad_sb_group
from peftkern.kernels.grad_xa import grad_xa
from peftkern.kernels.mixed import mixed
from peftkern.kernels.mixed_config import MixedConfig
from peftkern.kernels.mlp import mlp
from peftkern.kernels.mlp_arguments import MlpMember
from peftkern.kernels.mlp_grad import mlp_grad
from peftkern.kernels.shrink import shrink
from peftkern.kernels.shrink_expand import shrink_expand

BF16, FP32, CPU = torch.bfloat16, torch.float32, torch.device("cpu")
M, K, N, R = 40, 64, 96, 16


def drawn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def low(*shape: int) -> Tensor:
    return drawn(*shape, dtype=FP32)


def unaligned(*shape: int) -> Tensor:
    """A tensor whose first element is not on 16 bytes."""
    return drawn(*shape[:-1], shape[-1] + 8)[..., 1 : shape[-1] + 1]


def of_b(*shape: int) -> Tensor:
    """A factor [E, N, r] in the layout of PEFT's B."""
    experts, n, r = shape
    return low(n, r, experts).permute(2, 0, 1)


def prefix_problem(T: int) -> tuple[Tensor, ...]:
    return (drawn(2, 4, T, 32), *(drawn(2, 2, 20, 32) for _ in range(2)),
            *(drawn(2, 8, 32) for _ in range(2)))  # fmt: skip


_make = quantised.drawn("cpu")


def routed(adapters: int = 1) -> Route:
    """M pairs of M / 2 tokens and 4 experts."""
    choice = torch.arange(M // 2) % adapters if adapters > 1 else None
    return by_sorting(torch.randint(0, 4, (M // 2, 2)), 4, 16, choice, adapters)


# {name: function that makes new arguments, and the function that is called with them}
CALLS: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
    "linear": (fused_linear, lambda: (drawn(M, K), drawn(N, K), drawn(M, R), low(N, R))),
    "linear bias": (
        fused_linear, lambda: (drawn(M, K), drawn(K, N).t(), drawn(M, R), low(N, R), drawn(N)),
    ),
    "linear gain": (
        lambda *a, gain, v: fused_linear(*a, gain=gain, v=v),
        lambda: ((drawn(M, K), drawn(N, K), drawn(M, R), low(N, R), drawn(N)),
                 dict(gain=low(N), v=drawn(M, N))),
    ),
    "linear unaligned": (
        fused_linear, lambda: (unaligned(M, K), drawn(N, K), drawn(M, R), low(N, R)),
    ),
    "grad input": (
        fused_grad_input,
        lambda: ([drawn(M, N), drawn(M, N)], [drawn(N, K), drawn(N, K)],
                 list(drawn(M, 2 * R).split(R, 1)), [low(R, K), low(R, K)],
                 list(torch.ones(2, M, K // 32, dtype=torch.int32))),
    ),
    "expand": (expand, lambda: (drawn(M, 2 * R)[:, R:], low(N, R), drawn(N))),
    "low rank": (
        low_rank_grad_input,
        lambda: ([drawn(M, R)], [low(R, K)], torch.ones(M, K // 32, dtype=torch.int32)),
    ),
    "norms": (row_norms, lambda: (drawn(N, K), low(R, K), low(N, R), 1.5)),
    "norms split": (row_norms, lambda: (drawn(8, 4096), low(R, 4096), low(8, R), 1.5)),
    "shrink": (
        shrink, lambda: (drawn(M, K), [low(R, K), low(8, K)], [0.5, 2.0],
                         list(torch.ones(2, M, K // 32, dtype=torch.int32))),
    ),
    "shrink that draws": (
        shrink, lambda: (drawn(M, K), [low(R, K), low(8, K)], 0.5,
                         list(torch.ones(2, M, K // 32, dtype=torch.int32).unbind()),
                         dict(draw=Draw(0.1, 7))),
    ),
    "shrink expand that draws": (
        shrink_expand, lambda: (drawn(M, K), [low(R, K)], [low(N, R)], 0.5,
                                [torch.ones(M, K // 32, dtype=torch.int32)],
                                dict(draw=Draw(0.3, torch.tensor([7])))),
    ),
    "shrink with fp8": (
        shrink, lambda: (drawn(M, 128), [low(R, 128), low(8, 128)], 0.5,
                         dict(copy=fp8_rows.empty(M, 128, CPU))),
    ),
    "grad sb group with fp8": (
        grad_sb_group, lambda: ([(drawn(M, 128), low(128, R), drawn(M, R), 0.5)] * 2, [FP32, FP32],
                                None, [fp8_rows.empty(M, 128, CPU) for _ in range(2)]),
    ),
    "grad xa added": (
        grad_xa, lambda: (drawn(M, K), [drawn(M, R)], [low(R, K)], dict(add=drawn(M, K))),
    ),
    "mlp with fp8": (
        mlp, lambda: (drawn(M, 128), drawn(M, 128), "silu", low(R, 128), 0.5,
                      dict(copy=fp8_rows.empty(M, 128, CPU))),
    ),
    "mlp with fp8, low-rank parts and a drawn mask": (
        mlp, lambda: (drawn(M, 128), drawn(M, 128), "silu", low(R, 128), 0.5,
                      torch.zeros(M, 4, dtype=torch.int32),
                      dict(copy=fp8_rows.empty(M, 128, CPU), draw=Draw(0.1, 7),
                           inner=((drawn(M, R), low(128, R)), None))),
    ),
    "mlp gradients with fp8 and low-rank parts": (
        mlp_grad,
        lambda: (drawn(M, 128), drawn(M, 128), drawn(M, 128), "silu",
                 [MlpMember(low(128, R), drawn(M, R), 0.5), None], drawn(M, 8),
                 dict(copies=(fp8_rows.empty(M, 128, CPU), fp8_rows.empty(M, 128, CPU)),
                      a=low(8, 128), add=True)),
    ),
    "mlp gradients with fp8": (
        mlp_grad,
        lambda: (drawn(M, 128), drawn(M, 128), drawn(M, 128), "silu",
                 [MlpMember(low(128, R), drawn(M, R), 0.5), None],
                 dict(copies=(fp8_rows.empty(M, 128, CPU), fp8_rows.empty(M, 128, CPU)))),
    ),
    "shrink, large ranks": (shrink, lambda: (drawn(M, K), [low(200, K), low(40, K)], 0.5)),
    "shrink expand": (
        shrink_expand, lambda: (drawn(M, K), [low(R, K), low(8, K)], [low(N, R), low(32, 8)],
                                [0.5, 2.0], None, [drawn(N), None]),
    ),
    "grad a": (grad_a, lambda: (drawn(4096, K), list(drawn(4096, 24).split([16, 8], 1)),
                                torch.ones(4096, K // 32, dtype=torch.int32))),
    "grad a, large rank": (
        grad_a, lambda: (drawn(M, K), [drawn(M, 200)], None, dict(out_dtypes=[BF16])),
    ),
    "grad sb": (grad_sb, lambda: (drawn(M, N), low(N, R), drawn(M, R), 0.5)),
    "grad sb, two passes": (
        grad_sb, lambda: (drawn(M, N), low(N, R), drawn(M, R), 0.5, dict(config="two_pass")),
    ),
    "grad sb group": (
        grad_sb_group, lambda: ([(drawn(M, N), low(N, R), drawn(M, R), 0.5),
                                 (drawn(M, 32), low(32, 8), drawn(M, 8), 2.0)], [FP32, BF16]),
    ),
    "grad xa": (grad_xa, lambda: (drawn(M, K), list(drawn(M, 24).split([16, 8], 1)),
                                  [low(R, K), low(8, K)])),
    "decode": (decode, lambda: (drawn(1, K), drawn(N, K), low(R, K), low(N, R), 0.5, drawn(N))),
    "decode rows": (decode, lambda: (drawn(5, K), drawn(N, K), low(R, K), low(N, R), 0.5)),
    "decode a group": (
        decode_group,
        lambda: (drawn(1, K), [drawn(N, K), drawn(32, K)], [low(R, K), low(4, K)],
                 [low(N, R), low(32, 4)], [0.5, 2.0], [drawn(N), None]),
    ),
    "dequantise": (dequantise, lambda: (quantised.nf4(_make, N, K), BF16)),
    "dequantise fp8": (dequantise, lambda: (quantised.fp8(_make, N, K), BF16)),
    "decode quantised": (
        decode_quantised,
        lambda: (drawn(1, K), [quantised.nf4(_make, n, K) for n in (N, 32)],
                 [low(R, K), low(4, K)], [low(N, R), low(32, 4)], [0.5, 2.0], [drawn(N), None]),
    ),
    "decode quantised rows": (
        decode_quantised,
        lambda: (drawn(5, K), [quantised.int4(_make, N, K)], [low(R, K)], [low(N, R)], 0.5),
    ),
    "mlp": (
        mlp,
        lambda: (drawn(M, K), drawn(M, K), "silu", low(R, K), 0.5,
                 torch.ones(M, K // 32, dtype=torch.int32)),
    ),
    "mlp of large rank": (mlp, lambda: (drawn(M, K), drawn(M, K), "gelu", low(200, K), 0.5)),
    "mlp without gate": (mlp, lambda: (drawn(M, K), None, "gelu_tanh")),
    "mlp gradients": (
        mlp_grad,
        lambda: (drawn(M, K), drawn(M, K), drawn(M, K), "silu",
                 [MlpMember(low(K, R), drawn(M, R), 0.5), MlpMember(low(K, R), None, 2.0)],
                 drawn(M, R), torch.ones(M, K // 32, dtype=torch.int32)),
    ),
    "mlp gradients of large rank": (
        mlp_grad,
        lambda: (drawn(M, K), drawn(M, K), drawn(M, K), "silu",
                 [MlpMember(low(K, 200), drawn(M, 200), 0.5), None], drawn(M, 200)),
    ),
    "mixed": (mixed, lambda: (drawn(6, K), drawn(N, K), [low(R, K), None, low(8, K)],
                              [low(N, R), None, low(N, 8)], [0.5, 0.0, 2.0],
                              torch.tensor([0, 2, -1], dtype=torch.int32))),
    "mixed in parts": (
        mixed, lambda: (drawn(6, 512), drawn(N, 512), [low(R, 512)], [low(N, R)], [0.5],
                        torch.tensor([0, -1, 0], dtype=torch.int32),
                        dict(config=MixedConfig(split_k=2))),
    ),
    "experts": (
        experts_gemm, lambda: (drawn(M // 2, K), routed(), drawn(4, N, K), drawn(M, R),
                               [low(4, N, R)],
                               dict(gather=True, scatter=False, bias=drawn(4, N))),
    ),
    "experts' adapters": (
        experts_gemm, lambda: (drawn(M, K), routed(3), drawn(4, K, N).mT, drawn(M, R),
                               [low(4, R, N).mT, None, low(4, N, 8)],
                               dict(gather=False, scatter=True,
                                    bits=torch.ones(M, N // 32, dtype=torch.int32))),
    ),
    "experts' sum": (combine, lambda: (drawn(M, N), low(M // 2, 2), dict(dtype=FP32))),
    "experts' plain sum": (combine, lambda: (drawn(M, N), None, dict(k=4))),
    "experts' route": (
        experts_route.tables, lambda: (torch.arange(2 * M).view(M, 2) % 8, 8, 32),
    ),
    "experts' route, several adapters": (
        experts_route.tables,
        lambda: (torch.arange(2 * M).view(M, 2) % 8, 8, 32, torch.arange(M) % 3, 3),
    ),
    "experts' shrink": (
        experts_shrink.shrink,
        lambda: (drawn(M // 2, K), routed(), [low(4, R, K)], 0.5,
                 dict(gather=True, bits=torch.ones(M, K // 32, dtype=torch.int32))),
    ),
    "experts' shrink, several adapters": (
        experts_shrink.shrink,
        lambda: (drawn(M, K), routed(3), [low(4, R, K), None, low(4, 4, K)], [0.5, 1.0, 2.0],
                 dict(gather=False)),
    ),
    "experts' grad sb": (
        experts_grad.grad_sb,
        lambda: (drawn(M // 2, 2 * N), routed(), of_b(4, 2 * N, R), drawn(M, R), 0.5,
                 dict(gather=True, row_weight=drawn(M // 2, 2))),
    ),
    "experts' grad sb, large rank": (
        experts_grad.grad_sb,
        lambda: (drawn(M, N), routed(), of_b(4, N, 100), drawn(M, 100), 0.5, dict(gather=False)),
    ),
    "experts' grad a": (
        experts_grad.grad_a,
        lambda: (drawn(M, R), drawn(M // 2, K), routed(),
                 dict(gather=True, bits=torch.ones(M, K // 32, dtype=torch.int32))),
    ),
    "attend": (prefix_attention.attend, lambda: prefix_problem(20)),
    "attend backward": (prefix_backward.attend_backward, lambda: (
        drawn(2, 4, 20, 32), *prefix_problem(20), drawn(2, 4, 20, 32), low(2, 4, 20))),
    "decode a prefix": (prefix_decode.decode, lambda: prefix_problem(1)),
    "scale grad": (scale_grad, lambda: (drawn(4096, N), low(N), drawn(4096, N), drawn(N))),
}  # fmt: skip


def split(args: Any) -> tuple[Any, dict[str, Any]]:
    """(positional, named) arguments; the latter are the last one if that is a dict."""
    if type(args[-1]) is not dict:
        return args, {}
    given = args[:-1]
    return (given[0] if len(given) == 1 and type(given[0]) is tuple else given), args[-1]


def outcome(function: Callable[..., Any], args: Any) -> tuple[Any, list[Started]]:
    """(the result, or the error, and the launches of a call)."""
    args, kwargs = split(args)
    with standin.listening() as heard:
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
    return result, heard


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return tensors_in(list(value.values()))
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (list, tuple)) else []


def told(args: Any, result: Any, heard: list[Started]) -> list[Any]:
    """What launches are told and a call gives, comparable between calls on the same tensors.

    An address that is not one of the call's tensors is of a new tensor: these are numbered as they
    appear. Triton's dispatch passes tensors where a plan passes addresses.
    """
    storages = [t.untyped_storage() for t in tensors_in(args)]
    inputs = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
    new: list[int] = []

    def address(at: int) -> Any:
        if any(first <= at < end for first, end in inputs):
            return "input", at
        if at not in new:
            new.append(at)
        return "new", new.index(at)

    def plain(value: Any, kind: Any) -> Any:
        if isinstance(value, Tensor):
            return address(value.data_ptr())
        if isinstance(value, TensorDescriptor):
            fields = {k: v for k, v in vars(value).items() if k != "base"}
            return "described", address(value.base.data_ptr()), fields
        if isinstance(value, tuple) and kind != "constexpr":
            return [plain(v, k) for v, k in zip(value, kind, strict=True)]
        if isinstance(kind, str) and kind.startswith("*") and value is not None:
            return address(value)
        return type(value).__name__, getattr(value, "value", value)

    def shape(value: Any) -> Any:
        if isinstance(value, Tensor):
            return address(value.data_ptr()), tuple(value.shape), value.stride(), value.dtype
        if isinstance(value, (list, tuple)):
            return type(value).__name__, [shape(v) for v in value]
        return value

    lines: list[Any] = []
    for s in heard:
        # the kernel's own objects: the same compiled form is started
        kinds = tuple(s.kernel.src.signature.values())
        assert len(kinds) == len(s.args)
        values = [plain(v, k) for v, k in zip(s.args, kinds, strict=True)]
        lines.append([s.kernel.name, s.grid, s.stream, id(s.function), s.metadata, values])
    return [*lines, shape(result)]


def as_written(function: Callable[..., Any], args: Any) -> list[Any]:
    with launching.as_written():
        result, heard = outcome(function, args)
    return told(args, result, heard)


def now(function: Callable[..., Any], args: Any) -> list[Any]:
    result, heard = outcome(function, args)
    return told(args, result, heard)


def planned_kinds() -> int:
    """How many kinds of calls have a plan."""
    return sum(type(v) is not str for cache in launching._caches for v in cache.values())


def settle(function: Callable[..., Any], make: Callable[[], Any], calls: int = 3) -> None:
    for _ in range(calls):
        outcome(function, make())


def not_run(*_: Any, **__: Any) -> Any:
    raise AssertionError("the function ran")
