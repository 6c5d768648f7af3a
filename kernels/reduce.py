"""The second stage of split sums: fp32 partials [P, n] -> [n].

They are added in index order, so two runs agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .common import Launch, cast, cdiv

BLOCK = 1024
AHEAD = 4  # parts that are loaded before the first of them is added, to hide their latency


@triton.jit
def _sum_kernel(
    partials, outs, counts, sizes, G: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr
):
    segment = tl.program_id(1)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    for i in tl.static_range(G):
        if segment == i:
            ok = at < sizes[i]  # [BLOCK]
            total = tl.zeros((BLOCK,), tl.float32)
            source = partials[i] + at  # [BLOCK]
            for p0 in range(0, counts[i], AHEAD):
                parts = ()
                for j in tl.static_range(AHEAD):
                    parts = parts + (tl.load(source, mask=ok & (p0 + j < counts[i]), other=0.0),)
                    source += sizes[i]
                for j in tl.static_range(AHEAD):
                    total += parts[j]
            tl.store(outs[i] + at, cast(total, outs[i].dtype.element_ty), mask=ok)


def plan_sum(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Launch:
    """One launch that sums each fp32 partial [P, ...] into its out [...], both contiguous.

    Each out has its own dtype.
    """
    partials = tuple(p for p, _ in pairs)
    outs = tuple(o for _, o in pairs)
    counts = tuple(p.shape[0] for p in partials)
    sizes = tuple(o.numel() for o in outs)
    grid = (cdiv(max(sizes), BLOCK), len(outs))
    # three sums into two dtypes spill with four parts on sm_90 (Triton 3.9)
    ahead = 3 if len(outs) == 3 and len({o.dtype for o in outs}) > 1 else AHEAD
    meta = dict(G=len(outs), BLOCK=BLOCK, AHEAD=ahead, num_warps=4, num_stages=1)
    return Launch(_sum_kernel, grid, (partials, outs, counts, sizes), meta)


def sums_last(launches: Sequence[Launch]) -> list[Launch]:
    """``launches`` with all their sums joined into one launch at the end.

    None of the launches may read the result of a sum.
    """
    sums = [launch for launch in launches if launch.kernel is _sum_kernel]
    if len(sums) < 2:
        return list(launches)
    pairs = [pair for launch in sums for pair in zip(*launch.args[:2], strict=True)]
    return [launch for launch in launches if launch.kernel is not _sum_kernel] + [plan_sum(pairs)]
