"""Launches every kernel once or twice on the smallest shapes: what compute-sanitizer runs.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitize

Shapes are odd, so that every mask at an edge is needed, and splits are forced, so that partials and
their sum run. Vendor products are left out: they would take the tool's time. Prints the number of
launches and exits 1 when a result is not finite.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import (
    bits,
    decode,
    dora_grad,
    dora_norm,
    expand,
    gemm,
    grad_a,
    grad_sb,
    grad_xa,
    mixed,
    prefix_backward,
    prefix_decode,
    shrink,
    shrink_expand,
)
from peftkern.kernels import prefix_attention as prefix


def runs(device: str) -> Iterator[tuple[str, list[Tensor]]]:
    """(what ran, its outputs)."""
    torch.manual_seed(0)
    M, K, N, r = 37, 80, 72, 5

    def some(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape).to(dtype).to(device)

    x, w, b = some(M, K), some(N, K), some(N, r, dtype=torch.float32)
    a, s, dy = some(r, K, dtype=torch.float32), some(M, r), some(M, N)
    words = bits.dropout_bits(M, K, 0.1, 7, device=device)
    yield "bits", [words.float()]
    seed = torch.tensor([7], device=device)
    yield (
        "bits, three masks, seed on the device",
        [bits.dropout_bits(M, K, 0.3, seed, groups=3, device=device).float()],
    )
    for split in (1, 2):
        config = shrink.ShrinkConfig(16, 32, split, 4, 2)
        yield f"shrink split {split}", [shrink.shrink(x, [a, a], 2.0, words, config=config)]
    yield "expand", [expand.expand(s, b, some(N), config=expand.ExpandConfig(16, 32, 16, 4, 1))]
    yield "dX low-rank", [expand.low_rank_grad_input([s, s], [a, a], words)]
    for split in (1, 2):
        config = grad_sb.GradSBConfig(16, 32, split, 4, 2)
        yield f"grad_sb split {split}", list(grad_sb.grad_sb(dy, b, s, 2.0, config=config))
        grad = grad_a.GradAConfig(16, 32, split, 4, 2)
        yield f"grad_a split {split}", grad_a.grad_a(x, [s, s], words, config=grad)
        joined = grad_xa.GradXAConfig(16, 32, split, 4, 2)
        low, das = grad_xa.grad_xa(x, [s, s], [a, a], words, config=joined)
        yield f"grad_xa split {split}", [low, *das]
    tall = shrink_expand.ShrinkExpandConfig(16, 32, 32, 4, 2)
    done, ys = shrink_expand.shrink_expand(
        x, [a, a], [b, b], 2.0, words, [some(N), None], config=tall
    )
    yield "shrink_expand", [done, *ys]
    wide = some(N, 100, dtype=torch.float32)
    yield "grad_sb, two passes", list(grad_sb.grad_sb(dy, wide, some(M, 100), 2.0))
    for tma in (False, True):
        config = gemm.GemmConfig(64, 64, 32, tma=tma, group_m=2, num_warps=4, num_stages=2)
        yield f"gemm tma={tma}", [gemm.fused_linear(x, w, s, b, config=config)]
        yield (
            f"gemm dX tma={tma}",
            [gemm.fused_grad_input([dy, dy], [w, w], [s, s], [a, a], words, config=config)],
        )
        conv1d = some(K, N).t()
        yield f"gemm [K, N] tma={tma}", [gemm.fused_linear(x, conv1d, s, b, config=config)]
        v, gain = torch.empty_like(dy), torch.rand(N, device=device)
        y = gemm.fused_linear(x, w, s, b, some(N), gain=gain, v=v, config=config)
        yield f"gemm with DoRA's gain tma={tma}", [y, v]
    for split in (1, 2):
        norm = dora_norm.NormConfig(16, 32, split, 4, 2)
        yield f"dora norms split {split}", [dora_norm.row_norms(w, a, b, 2.0, config=norm)]
        scale = dora_grad.ScaleConfig(16, 32, split, 4, 2)
        yield (
            f"dora gradient split {split}",
            list(dora_grad.scale_grad(dy, torch.rand(N, device=device), dy, some(N), config=scale)),
        )
    flat = gemm.GemmConfig(64, 64, 32, tma=True, flatten=True, num_warps=4, num_stages=2)
    yield "gemm flattened", [gemm.fused_linear(x, w, s, b, config=flat)]
    for rows in (1, 3):
        yield f"decode M={rows}", [decode.decode(x[:rows], w, a, b, 2.0)]
        yield f"decode M={rows}, S given", [decode.decode(x[:rows], w, None, b, s=s[:rows])]
    wide_a = some(20, K, dtype=torch.float32)
    adapters = [a, wide_a, None], [b, some(N, 20, dtype=torch.float32), None]
    for samples, choice in ((1, [1]), (4, [1, -1, 0, 7]), (36, [1, -1, 0, 2] * 9)):
        index = torch.tensor(choice, dtype=torch.int32, device=device)  # 7: out of range, none
        for rows in (samples, 36):
            config = mixed.MixedConfig(16, 32, 32, 16, group_m=2)
            yield (
                f"mixed M={rows} of {samples} samples",
                [mixed.mixed(x[:rows], w, *adapters, [2.0] * 3, index, config=config)],
            )
    yield from prefix_runs(device)


def prefix_runs(device: str) -> Iterator[tuple[str, list[Tensor]]]:
    """Prefix attention: edges in every dimension, every mask, tiles smaller than the problem."""
    B, H, H_kv, S, P, D = 2, 4, 2, 37, 19, 24

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape).bfloat16().to(device)

    k, v = (some(B, S, H_kv, D).transpose(1, 2) for _ in range(2))
    keep = torch.arange(S, device=device)[None] >= torch.tensor([[0], [20]], device=device)
    masks: dict[str, dict[str, Any]] = {
        "causal": {},
        "both ways, padded": dict(causal=False, keep=keep),
        "all": dict(
            keep=keep, window=30, softcap=5.0, sinks=some(H),
            no_prefix=torch.tensor([True, False], device=device),
            q_offset=torch.tensor([3, 9], dtype=torch.int32, device=device),
        ),
    }  # fmt: skip
    for name, options in masks.items():
        for lead in ((), (B,)):
            pk, pv = some(*lead, H_kv, P, D), some(*lead, H_kv, P, D)
            q, grad = some(B, H, 21, D), some(B, H, 21, D)
            config = prefix.AttendConfig(16, 16, 4, 2)
            o, lse = prefix.attend(q, k, v, pk, pv, **options, config=config)
            back = prefix_backward.BackwardConfig(16, 16, 16, 16, 2)
            grads = prefix_backward.attend_backward(
                grad, q, k, v, pk, pv, o, lse, **options, config=back
            )
            split = prefix_decode.DecodeConfig(16, 16, 16, 2, 2)
            one, _ = prefix_decode.decode(q[:, :, :2], k, v, pk, pv, **options, config=split)
            shared = "a prefix a row" if lead else "a shared prefix"
            yield f"prefix attention {name}, {shared}", [o, *grads[:5], one]


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    done = 0
    for name, outs in runs(device):
        bad = [o for o in outs if not bool(o.isfinite().all())]
        if bad:
            print(f"{name}: not finite", file=sys.stderr)
            return 1
        done += 1
        print(f"ran {name}", flush=True)
    print(f"{done} launches of every kernel, all finite")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
