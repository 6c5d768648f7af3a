"""Attention over a prefix, of one layer: as HF PEFT has it done, and without concatenation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peftkern.ops.prefix_attention import prefix_attention

from .measure import BARE, OURS, PEFT, Work, check_equal, kept_bytes

HEADS, D = 8, 64
SCALE = D**-0.5


def tensors(B: int, T: int, S: int, H_kv: int, P: int) -> list[Tensor]:
    """query, key, value [B, heads, rows, D], as [B, rows, heads, D] in memory, and Kp, Vp [H_kv, P,
    D]."""
    g = torch.Generator().manual_seed(0)
    shapes = [(B, T, HEADS, D), (B, S, H_kv, D), (B, S, H_kv, D)]
    own = [torch.randn(s, generator=g).transpose(1, 2) for s in shapes]
    prefix = [torch.randn(H_kv, P, D, generator=g) for _ in range(2)]
    return [x.requires_grad_() for x in (*own, *prefix)]


def peft(
    layer: Any, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *prefix: Tensor
) -> Tensor:
    """PEFT's way: the prefix, repeated over the batch, goes into the cache, which concatenates."""
    cache = DynamicCache()
    if prefix:
        kp, vp = (x.unsqueeze(0).repeat(q.shape[0], 1, 1, 1) for x in prefix)
        cache.update(kp, vp, 0)
    k, v = cache.update(k, v, 0)
    return sdpa_attention_forward(layer, q, k, v, mask, scaling=SCALE)[0].transpose(1, 2)


def ours(*args: Tensor) -> Tensor:
    return prefix_attention(*args, scale=SCALE, causal=True)


def of_kv_heads(H_kv: int) -> Any:
    """What the attention function of transformers asks a layer for."""
    return SimpleNamespace(num_key_value_groups=HEADS // H_kv, is_causal=True)


@pytest.mark.parametrize("H_kv", [8, 2], ids="kv{}".format)
def test_training(compare: Callable[..., Any], count: Callable[..., Any], H_kv: int) -> None:
    B, T, P = 16, 256, 64
    args = tensors(B, T, T, H_kv, P)
    layer = of_kv_heads(H_kv)
    # what transformers hands to its attention for P cached and T new tokens without padding; built
    # once a model, so outside the clock
    mask = torch.ones(T, P + T, dtype=torch.bool).tril(P).expand(B, 1, T, P + T)
    calls = {
        BARE: (partial(peft, layer, None), args[:3]),
        PEFT: (partial(peft, layer, mask), args),
        OURS: (ours, args),
    }
    do = torch.randn(B, HEADS, T, D)
    found = {}
    for name in (PEFT, OURS):
        out = calls[name][0](*calls[name][1])
        found[name] = (out, *torch.autograd.grad(out, args, do))
    names = ("output", "dQ", "dK", "dV", "dKp", "dVp")
    for what, a, b in zip(names, found[OURS], found[PEFT], strict=True):
        check_equal(what, a, b)

    kept = {n: float(kept_bytes(partial(call, *given), [])) for n, (call, given) in calls.items()}
    count(f"bytes kept, attention {B}x{T}, P={P}, {H_kv} kv heads", kept, note="inputs included")

    def step(name: str) -> tuple[Tensor, ...]:
        call, given = calls[name]
        return torch.autograd.grad(call(*given), given, do)

    compare(
        f"attention forward+backward {B}x{T}, P={P}, {H_kv} kv heads",
        {name: Work(partial(step, name)) for name in calls},
        target=1.0,
        note="8 heads of 64; bare: without a prefix",
    )


@pytest.mark.parametrize("H_kv", [8, 2], ids="kv{}".format)
def test_decode(compare: Callable[..., Any], H_kv: int) -> None:
    B, S, P = 8, 80, 64
    q, k, v, kp, vp = (x.detach() for x in tensors(B, 1, S, H_kv, P))
    layer = of_kv_heads(H_kv)
    keys, values = (
        torch.cat([p.expand(B, -1, -1, -1), x], 2) for p, x in ((kp, k), (vp, v))
    )  # PEFT's cache holds both
    k, v = k.contiguous(), v.contiguous()
    works = {
        BARE: Work(partial(sdpa_attention_forward, layer, q, k, v, None, scaling=SCALE)),
        PEFT: Work(partial(sdpa_attention_forward, layer, q, keys, values, None, scaling=SCALE)),
        OURS: Work(partial(ours, q, k, v, kp, vp)),
    }
    with torch.no_grad():
        check_equal("output", works[OURS].run(), works[PEFT].run()[0].transpose(1, 2))
        compare(
            f"attention of one token {B}x{S}, P={P}, {H_kv} kv heads",
            works,
            calls=50,
            rounds=21,
            note="8 heads of 64, no gradients; bare: without a prefix",
        )
