"""Two processes that train a small mixture under DistributedDataParallel, and one that does alone.

``python -m tests.ddp FOLDER`` forks two processes, which run every case and save their numbers.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import peftkern
from tests import moe_models
from tests.ranks import fork

RANKS, STEPS, RATE = 2, 3, 0.5
# experts of no token: of the first process, of the second, and of both
AWAY = ((0,), (1,), (4,))
# {name: settings of DistributedDataParallel, and what is special in the training}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "static and views": {"static_graph": True, "gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True},
    "an idle adapter": {"find_unused_parameters": True, "idle": True},
    "a process without experts": {"find_unused_parameters": True, "skips": True},
    "a process without tokens": {"empty": True},
    "two passes a step": {"gradient_as_bucket_view": True, "accumulates": True},
    "checkpoints": {"static_graph": True, "reentrant": False},
    "reentrant checkpoints": {"static_graph": True, "reentrant": True},
}
_OWN = ("idle", "skips", "empty", "accumulates", "reentrant")


class Rank(nn.Module):
    """The model with adapters as one process calls it."""

    def __init__(self, case: str) -> None:
        super().__init__()
        own = CASES[case]
        names = ("default", "other") if own.get("idle") else ("default",)
        self.model = moe_models.alone(names)
        self.skips, self.reentrant = own.get("skips"), own.get("reentrant")
        inner = self.model.base_model.model
        for trained in (inner.embed, inner.router):  # behind the tokens and the routing weights
            trained.requires_grad_(True)
        if own.get("idle"):  # trains, and no call uses it
            for name, parameter in self.model.named_parameters():
                if ".other." in name:
                    parameter.requires_grad_(True)

    def forward(self, ids: Tensor, rank: int | None) -> Tensor:
        inner = self.model.base_model.model
        x = inner.embed(ids)
        if self.skips and rank == 1:
            return inner.head(x + inner.router.weight.sum())
        if self.reentrant is None:
            return self.model(ids)
        weights, index = inner.choose(x)
        flat = x.reshape(-1, x.shape[-1])
        y = checkpoint(inner.experts, flat, index, weights, use_reentrant=self.reentrant)
        return inner.head(x + y.view_as(x))


def batches(case: str) -> list[Tensor]:
    """Token ids [B, S] of each process, which use no expert of :data:`AWAY`."""
    inner = moe_models.tiny()
    _, chosen = inner.choose(inner.embed.weight)
    found = []
    for own in AWAY[:RANKS]:
        without = torch.tensor([*own, *AWAY[RANKS]])
        ids = (~torch.isin(chosen, without).any(1)).nonzero()[:, 0]
        assert len(ids) > 1 and torch.isin(chosen[ids], without).sum() == 0
        found.append(ids[torch.arange(12) % len(ids)].view(3, 4))
    if CASES[case].get("empty"):
        found[1] = found[1][:0]
    return found


def loss_of(out: Tensor, total: int) -> Tensor:
    """The part of a mean over ``total`` tokens."""
    weights = torch.linspace(-1, 1, out[:1].numel(), dtype=out.dtype).cos().view_as(out[:1])
    return (out.tanh() * weights).sum() / total


def numbers(case: str, rank: int | None = None) -> dict[str, Any]:
    """Gradients of the first step, by name (None where there is none), and the trained weights.

    ``rank`` is the process's; None for all tokens in this process, without DDP.
    """
    settings = {k: v for k, v in CASES[case].items() if k not in _OWN}
    own, module = batches(case), Rank(case)
    total = sum(ids.numel() for ids in own)
    call: Any = module
    if rank is not None:
        call, total = DistributedDataParallel(module, **settings), total // RANKS
        parts = [(rank, own[rank])]
    elif module.skips:
        parts = list(enumerate(own))
    else:
        parts = [(None, torch.cat(own))]
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=RATE)
    found: dict[str, Any] = {}
    passes = 2 if CASES[case].get("accumulates") else 1
    for step in range(STEPS):
        optimizer.zero_grad()
        for i in range(passes):
            waits = rank is not None and i + 1 < passes
            with call.no_sync() if waits else contextlib.nullcontext():
                torch.stack([loss_of(call(ids, r), total) for r, ids in parts]).sum().backward()
        if step == 0:
            found = {
                f"{n}.grad": None if p.grad is None else p.grad.clone() for n, p in trained.items()
            }
        optimizer.step()
    return found | {n: p.detach() for n, p in trained.items()}


def main(folder: Path) -> None:
    assert peftkern.explain(Rank("default"))[0].fused
    fork(folder, RANKS, lambda rank: {case: numbers(case, rank) for case in CASES})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
