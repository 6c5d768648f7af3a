"""The entry of the kernels for a mixture of few tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import experts_decode
from peftkern.kernels.common import Arch, Launch
from peftkern.kernels.experts_decode import FewLinear

from .entry import BF16, FP32, Case, KernelEntry, Operands, meta, named, tag
from .experts_gate import ALONE, GPT_OSS, QWEN3, Experts
from .experts_races import DECODE
from .traffic import Facts, Traffic, nbytes


def _each(ts: Any) -> int:
    """Bytes of the largest expert's part of a tensor for all experts, or of such tensors."""
    ts = ts if isinstance(ts, tuple) else (ts,)
    return max((nbytes(t) // t.shape[0] for t in ts if t is not None), default=0)


def _shrink(f: Facts) -> Traffic:
    """As for all three launches, each pair is counted as one of another expert."""
    pairs, chunks, _ = f["grid"]
    a, xs = pairs * _each(f["As"]), f["index"].shape[0] * f["K"] * f["x"].element_size()
    return Traffic(
        "experts_few_shrink", 1,
        read=xs + a + nbytes(f["index"]),
        written=nbytes(f["parts"]),
        flops=2 * pairs * f["K"] * f["R"],
        unit="fp32",
        requested=a + chunks * f["k"] * xs,
    )  # fmt: skip


def _up(f: Facts) -> Traffic:
    P, (programs,) = f["P"], f["grid"]
    low, next_a = P * _each(f["Bs"]), P * _each(f["As"])
    w = P * (_each(f["w"]) + _each(f["bias"]))
    parts, xs = nbytes(f["parts"]), f["K"] * f["x"].element_size()
    rows = f["w"].shape[1]
    return Traffic(
        "experts_few_up", 1,
        read=w + low + next_a + parts + nbytes(f["x"]) + nbytes(f["index"]),
        written=nbytes(f["h"]) + nbytes(f["next_parts"]),
        flops=2 * P * (rows * (f["K"] + f["R"]) + f["WIDTH"] * f["NEXT_R"]),
        unit="fp32",
        requested=w + low + next_a + programs // P * parts + programs * xs,
    )  # fmt: skip


def _down(f: Facts) -> Traffic:
    T, (programs,) = f["T"], f["grid"]
    P, tiles = T * f["k"], programs // f["T"]
    w = P * (_each(f["w"]) + _each(f["bias"]) + _each(f["Bs"]))
    again = nbytes(f["h"]) + nbytes(f["parts"]) + nbytes(f["index"]) + nbytes(f["weights"])
    return Traffic(
        "experts_few_down", 1,
        read=w + again,
        written=nbytes(f["y"]),
        flops=2 * P * f["N"] * (f["K"] + f["R"]),
        unit="fp32",
        requested=w + tiles * again,
    )  # fmt: skip


def linear(
    E: int, N: int, K: int, r: int, *, bias: bool = False, transposed: bool = False,
    adapters: int = 1, dtype: torch.dtype = BF16, adapter: torch.dtype = FP32,
) -> FewLinear:  # fmt: skip
    """A linear on meta tensors, its factors as PEFT has them; r is 0 without an adapter."""
    w = meta(E, K, N, dtype=dtype).transpose(1, 2) if transposed else meta(E, N, K, dtype=dtype)
    a = [meta(E, r, K, dtype=adapter) for _ in range(adapters if r else 0)]
    b = [meta(N, r * E, dtype=adapter).view(N, r, E).permute(2, 0, 1) for _ in a]
    return FewLinear(w, meta(E, N, dtype=dtype) if bias else None, a, b, [1.0] * len(a))


def launches(
    shape: Experts, r: int, name: str, arch: Arch, *,
    bias: bool = False, transposed: bool = False, adapters: int = 1,
    dtype: torch.dtype = BF16, adapter: torch.dtype = FP32,
) -> list[Launch]:  # fmt: skip
    """The launches of one call on meta tensors."""
    T, k, E, D, width = shape[:5]
    made: dict[str, Any] = dict(
        bias=bias, transposed=transposed, adapters=adapters, dtype=dtype, adapter=adapter
    )
    choice = meta(T, dtype=torch.int64) if adapters > 1 else None
    config = experts_decode.default_config(
        T, k, width, D, D, arch, dtype.itemsize, transposed, shape.layout == "interleaved"
    )
    return experts_decode.plan_decode(
        meta(T, D, dtype=dtype), meta(T, k, dtype=torch.int64), meta(T, k, dtype=FP32),
        linear(E, shape.N, D, r, **made), linear(E, D, width, r, **made), name, shape.layout,
        choice, shape.clamp, meta(T, D, dtype=dtype), config, arch,
    )  # fmt: skip


def _cases(arch: Arch) -> Iterator[Case]:
    stored: dict[str, Any] = dict(bias=True, transposed=True)  # as gpt-oss has them
    for what, shape, r, name, change in (
        ("qwen3 T1", QWEN3.few(1), 16, "silu", {}), ("qwen3 T8", QWEN3.few(8), 16, "silu", {}),
        ("qwen3 T1", QWEN3.few(1), 0, "silu", {}), ("qwen3 T1", QWEN3.few(1), 64, "silu", {}),
        ("qwen3 T1", QWEN3.few(1), 256, "silu", {}),
        ("qwen3 T1", QWEN3.few(1), 16, "silu", dict(dtype=FP32)),
        ("qwen3 T1", QWEN3.few(1), 16, "silu", dict(adapter=BF16)),
        ("qwen3 T8", QWEN3.few(8), 16, "silu", dict(adapters=4)),
        ("gpt-oss T1", GPT_OSS.few(1), 16, "silu", stored),
        ("gpt-oss T16", GPT_OSS.few(16), 16, "silu", stored),
        ("relu2 alone T1", ALONE.few(1), 16, "relu2", {}),
    ):  # fmt: skip
        plan = launches(shape, r, name, arch, **change)
        ends = tag(r, change.get("adapters", 1), False, change.get("dtype", BF16),
                   change.get("adapter", FP32))  # fmt: skip
        yield from named(f"experts_decode {what} {ends}", plan)


def _small(o: Operands, r: int, T: int = 3, adapters: int = 1) -> tuple[Any, ...]:
    """The arguments of a call whose first pair belongs to another process."""
    E, k, width = 4, 2, 40
    index = torch.arange(T * k, device=o.device).view(T, k) % (E + 1)
    index[0, 0] = E
    made = [(2 * width, o.K), (o.N, width)]
    parts = []
    for n, c in made:
        a = [o(E, r, c, dtype=FP32) for _ in range(adapters)]
        b = [o(n, r * E, dtype=FP32).view(n, r, E).permute(2, 0, 1) for _ in a]
        parts.append(FewLinear(o(E, n, c), o(E, n), a, b, [2.0] * adapters))
    return o.x[:T], index, o(T, k, dtype=FP32), *parts


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    for layout, r in (("halves", 5), ("interleaved", 5), ("halves", 150)):
        config = experts_decode.ExpertsDecodeConfig(16, 32, 16, 32, 4, 2)
        y = experts_decode.decode(*_small(o, r), "silu", layout, config=config)
        yield f"experts_decode {layout} r{r}", [y]
    choice = torch.tensor([0, -1, 1], device=o.device)
    y = experts_decode.decode(*_small(o, 5, adapters=2), choice=choice)
    yield "experts_decode of several adapters", [y]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    yield lambda: experts_decode.decode(*_small(o, o.r, T=1))


ENTRY = KernelEntry(
    traffic={
        "_experts_few_shrink_kernel": _shrink,
        "_experts_few_up_kernel": _up,
        "_experts_few_down_kernel": _down,
    },
    cases=_cases,
    ops=DECODE,
    sanitize=_sanitize,
    counted=_counted,
)
