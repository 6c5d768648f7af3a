"""Checks of the arguments of kernels' public functions, made before any launch.

The errors name the argument, what was given and what is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .common import INTERPRET, cdiv

MAX_ADAPTERS = 64  # of a batch; each is a few arguments of a launch
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_RANK = 256


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def blocks(config: Any, low: int = 16, **sizes: int) -> None:
    """Check a config: blocks are powers of two >= low, warps a power of two <= 16, stages >= 1."""
    name = type(config).__name__
    for field, value in sizes.items():
        if not is_power_of_two(value) or value < low:
            raise ValueError(f"{name}.{field} is {value}; allowed: a power of two, at least {low}")
    if not is_power_of_two(config.num_warps) or config.num_warps > 16:
        raise ValueError(f"{name}.num_warps is {config.num_warps}; allowed: 1, 2, 4, 8, 16")
    one_or_more(config, num_stages=config.num_stages)


def one_or_more(config: Any, **counts: int) -> None:
    """Check fields of a config (numbers of parts or stages) to be 1 or more."""
    for field, value in counts.items():
        if value < 1:
            raise ValueError(f"{type(config).__name__}.{field} is {value}; allowed: 1 or more")


def rows(name: str, t: torch.Tensor, dtypes: Sequence[torch.dtype] = DTYPES) -> torch.Tensor:
    """``t``, checked to be a float matrix; a copy only if it has no unit stride along its rows."""
    matrix(name, t)
    if t.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} has dtype {t.dtype}; allowed: {allowed}")
    if t.stride(1) == 1 or t.shape[1] <= 1:
        return t
    return t.contiguous()


def matrix(name: str, t: torch.Tensor) -> None:
    if not isinstance(t, torch.Tensor) or t.dim() != 2:
        got = (
            f"shape {tuple(t.shape)}" if isinstance(t, torch.Tensor) else f"type {type(t).__name__}"
        )
        raise ValueError(f"{name} has {got}; allowed: a matrix (2 dimensions)")


def shape(name: str, t: torch.Tensor, want: tuple[int, ...], why: str) -> None:
    if tuple(t.shape) != want:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; allowed: {want} ({why})")


def rank(name: str, r: int) -> None:
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"{name} has rank {r}; allowed: 1 to {MAX_RANK}")


def adapter_dtype(name: str, t: torch.Tensor, activation: torch.dtype) -> None:
    if t.dtype not in (torch.float32, activation):
        raise TypeError(
            f"{name} has dtype {t.dtype}; allowed: torch.float32 or the activation's {activation}"
        )


def can_launch(where: torch.device) -> bool:
    """True where kernels run: on CUDA, and everywhere in the interpreter."""
    return where.type == "cuda" or bool(INTERPRET.value)


def device(**tensors: torch.Tensor | None | Sequence[torch.Tensor | None]) -> torch.device:
    """The device of all tensors and lists of them; ValueError for one that Triton cannot use."""
    given: list[tuple[str, torch.Tensor]] = []
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor):
            given.append((name, value))
        elif value is not None:
            given += [(f"{name}[{i}]", t) for i, t in enumerate(value) if t is not None]
    first, found = given[0][0], given[0][1].device
    for name, t in given[1:]:
        if t.device != found:
            raise ValueError(f"{name} is on {t.device}; allowed: {found}, where {first} is")
    if found.type != "meta" and not can_launch(found):
        raise ValueError(
            f"{first} is on {found}; allowed: a CUDA device "
            "(or the CPU, with TRITON_INTERPRET=1 set before import)"
        )
    return found


def words(name: str, t: torch.Tensor | None, M: int, K: int) -> torch.Tensor | None:
    """Checked packed keep bits int32 [M, ceil(K / 32)], contiguous; None for no mask."""
    if t is None:
        return None
    if t.dtype != torch.int32:
        raise TypeError(
            f"{name} has dtype {t.dtype}; allowed: torch.int32 (packed by bits.pack_bits)"
        )
    shape(name, t, (M, cdiv(K, 32)), "packed words of [M, K]")
    return t.contiguous()


# ----------------------------------------------------------------- of a group, one for each adapter


def per_adapter(name: str, value: Any, count: int) -> list[Any]:
    """``value`` as a list with an entry for each adapter; None and single values are repeated."""
    if value is None or isinstance(value, (int, float, torch.Tensor)):
        return [value] * count
    values: list[Any] = list(value)
    if len(values) != count:
        raise ValueError(
            f"{name} has {len(values)} entries; allowed: {count}, one for each adapter"
        )
    return values


def masks(bits: Any, count: int, M: int, K: int) -> list[torch.Tensor | None]:
    """The packed words [M, ceil(K / 32)] of each adapter; ``bits`` has one for all or for each."""
    return [words(f"bits[{i}]", w, M, K) for i, w in enumerate(per_adapter("bits", bits, count))]


def counts(allowed: str = "equal counts, 1 or more", **lists: Sequence[Any]) -> None:
    """Check that two lists have the same length and are not empty."""
    (a, first), (b, second) = lists.items()
    if not first or len(first) != len(second):
        raise ValueError(f"{a} has {len(first)} entries, {b} {len(second)}; allowed: {allowed}")


def low_rank(
    name: str, ts: Sequence[torch.Tensor], M: int, dtype: torch.dtype, why: str
) -> list[torch.Tensor]:
    """Checked S or dS of each adapter, [M, r_i] in ``dtype`` with unit stride along rows."""
    checked = [rows(f"{name}[{i}]", t, (dtype,)) for i, t in enumerate(ts)]
    for i, t in enumerate(checked):
        rank(f"{name}[{i}]", t.shape[1])
        shape(f"{name}[{i}]", t, (M, t.shape[1]), why)
    return checked


def adapters(
    name: str,
    ts: Sequence[torch.Tensor],
    shapes: Sequence[tuple[int | None, int]],
    why: str,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Checked A or B of each adapter, of the given shapes (None: any number of rows).

    Each is fp32 or ``dtype``. If these are mixed, which is rare, all are returned as fp32, because
    a launch has one signature. ``{i}`` in ``why`` is the adapter's number.
    """
    for i, (t, (first, second)) in enumerate(zip(ts, shapes, strict=True)):
        matrix(f"{name}[{i}]", t)
        want = (t.shape[0] if first is None else first, second)
        shape(f"{name}[{i}]", t, want, why.format(i=i))
        adapter_dtype(f"{name}[{i}]", t, dtype)
    return [t.float() for t in ts] if len({t.dtype for t in ts}) > 1 else list(ts)


def ranks(name: str, As: Sequence[torch.Tensor]) -> None:
    """Check that A of each adapter has a rank that the kernels support."""
    for i, a in enumerate(As):
        matrix(f"{name}[{i}]", a)
        rank(f"{name}[{i}]", a.shape[0])
