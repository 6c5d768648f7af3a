"""Calls of prefix attention and their expected results, for its tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.ops import prefix_blocked
from tests.needs import merging_on_a_cpu

NAMES = ("output", "query", "key", "value", "prefix_key", "prefix_value")
SCALE = 0.3


def force(monkeypatch: Any, implementation: str) -> None:
    """Make the choice between the two exact implementations, which depends on the size alone."""
    if implementation == "merge":
        merging_on_a_cpu()
    rows = {"blocked": 0, "merge": 10**9}[implementation]
    for name in ("ROWS", "HALF_ROWS"):
        monkeypatch.setattr(prefix_blocked, name, rows)
    monkeypatch.setattr(prefix_blocked, "THREADS", 10**9)


def inputs(
    B: int, H: int, H_kv: int, T: int, S: int, P: int, D: int, *, shared: bool = True,
    dtype: torch.dtype = torch.float64, seed: int = 0, sharp: float = 1.0,
) -> list[Tensor]:  # fmt: skip
    """query ([B, T, H, D] in memory, as models make it), key, value, prefix_key, prefix_value."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    query = draw(B, T, H, D).mul_(sharp).transpose(1, 2)
    key, value = draw(B, S, H_kv, D).transpose(1, 2), draw(B, H_kv, S, D)
    shape = (H_kv, P, D) if shared else (B, H_kv, P, D)
    tensors = [query, key, value, draw(*shape), draw(*shape)]
    return [x.requires_grad_() for x in tensors]


def seen(B: int, T: int, S: int, P: int, o: dict[str, Any]) -> Tensor:
    """bool [B, 1, T, P + S], element by element from the definition."""
    offset = o.get("q_offset", S - T)
    offsets = torch.as_tensor(offset if offset is not None else S - T).reshape(-1, 1, 1, 1)
    position = P + offsets + torch.arange(T)[:, None]
    other = torch.arange(P + S)
    own = other >= P
    ok = torch.ones(B, 1, T, P + S, dtype=torch.bool)
    if o.get("causal", True):
        ok = ok & (~own | (other <= position))
    if o.get("window") is not None:
        ok = ok & (other > position - o["window"])
    if o.get("keep") is not None:
        kept = torch.cat([torch.ones(B, P, dtype=torch.bool), o["keep"]], 1)
        ok = ok & kept[:, None, None]
    if o.get("no_prefix") is not None:
        ok = ok & ~(o["no_prefix"][:, None, None, None] & ~own)
    return ok


def truth(tensors: list[Tensor], o: dict[str, Any]) -> Tensor:
    """The output by concatenation in float64, differentiable."""
    query, key, value, kp, vp = (x.double() for x in tensors)
    B, H, T, _ = query.shape
    G, S, P = H // key.shape[1], key.shape[2], kp.shape[-2]
    keys = torch.cat([kp.expand(B, -1, -1, -1), key], 2).repeat_interleave(G, 1)
    values = torch.cat([vp.expand(B, -1, -1, -1), value], 2).repeat_interleave(G, 1)
    ok = seen(B, T, S, P, o)
    scores = (query @ keys.transpose(2, 3) * SCALE).masked_fill(~ok, -1e300)
    return scores.softmax(-1).masked_fill(~ok, 0) @ values


def gradients(out: Tensor, tensors: list[Tensor], seed: int = 7) -> list[Tensor]:
    """[output, its gradient to each tensor], for a random gradient of the output."""
    g = torch.Generator().manual_seed(seed)
    do = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, do)]


def keep_of(kind: str | None, B: int, S: int) -> Tensor | None:
    """Padding: left or right of different lengths, holes, or a row of nothing else."""
    if kind is None:
        return None
    keep = torch.ones(B, S, dtype=torch.bool)
    if kind == "left":
        keep[0, : S // 2] = False
        keep[-1, : S - 1] = False
    elif kind == "right":
        keep[0, S // 2 :] = False
        keep[-1, 1:] = False
    elif kind == "holes":
        keep = torch.rand(B, S, generator=torch.Generator().manual_seed(5)) > 0.4
    else:
        keep[0] = False
    return keep
