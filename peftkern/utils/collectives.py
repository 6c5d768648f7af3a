"""Differentiable collectives of tensor parallelism, and shards as plain tensors.

A rank multiplies with its shard of a weight by the same operations as one process with all of it.
What differs is at the border: a sum over the ranks of an output, or of a gradient.

A rank's output y_i of a replicated x has a gradient dX_i that is its part of dX = Σ dX_i: so x goes
through :func:`with_summed_grad`. A sum Y = Σ y_i gives each rank dY itself: :func:`summed`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .gathering import is_shard


class _Layout(NamedTuple):
    """How a DTensor is shared out, and its whole shape."""

    mesh: Any
    placements: Any
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, shard: Any) -> _Layout:
        return cls(shard.device_mesh, shard.placements, shard.shape, shard.stride())

    def around(self, part: Tensor) -> Tensor:
        """A DTensor of this layout with the part of this process."""
        from torch.distributed.tensor import DTensor

        found: Tensor = DTensor.from_local(
            part.contiguous(),
            self.mesh,
            self.placements,
            run_check=False,
            shape=self.shape,
            stride=self.stride,
        )
        return found


class _SummedGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(dy, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        return _sum(y, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, None


class _Local(torch.autograd.Function):
    """The local tensor of a DTensor; its gradient is a DTensor of the same placement."""

    @staticmethod
    def forward(ctx: Any, shard: Any, group: Any) -> Tensor:
        ctx.group, ctx.like = group, _Layout.of(shard)
        local: Tensor = shard.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        dy = dy if ctx.group is None else _sum(dy, ctx.group)
        return ctx.like.around(dy), None


def _sum(x: Tensor, group: Any) -> Tensor:
    """A new tensor with the sum of the ranks' ``x``."""
    from torch import distributed as dist

    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def with_summed_grad(x: Tensor, group: Any) -> Tensor:
    """``x``; its gradient is summed over the ranks of ``group``."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    found: Tensor = _SummedGrad.apply(x, group)  # type: ignore[no-untyped-call]
    return found


def summed(y: Tensor, group: Any) -> Tensor:
    """The sum of the ranks' ``y``, on every rank; each gets the sum's gradient."""
    found: Tensor = _Summed.apply(y, group)  # type: ignore[no-untyped-call]
    return found


def local(shard: Any, sums: bool = False) -> Tensor:
    """The local tensor of a DTensor on a mesh of one dimension; a plain tensor is itself.

    Args:
        shard: the DTensor.
        sums: True for one that is replicated and whose gradient on each rank is a part: the parts
            are summed.
    """
    if is_compiling() and not sums:  # compilers know the class and its method alone
        from torch.distributed.tensor import DTensor

        traced: Tensor = shard.to_local() if isinstance(shard, DTensor) else shard
        return traced
    if not is_shard(shard):
        plain: Tensor = shard
        return plain
    if torch.is_grad_enabled() and shard.requires_grad:
        group = shard.device_mesh.get_group() if sums else None
        found: Tensor = _Local.apply(shard, group)  # type: ignore[no-untyped-call]
        return found
    with torch.no_grad():  # else torch makes a node for a tensor without a gradient too
        kept: Tensor = shard.to_local()
    return kept


def with_part(shard: Any, part: Tensor) -> Tensor:
    """A DTensor shared out as ``shard`` is, of which this process has ``part``."""
    return _Layout.of(shard).around(part)


def from_part(part: Tensor, mesh: Any, size: int | None = None) -> Tensor:
    """A DTensor of a vector of which each rank has a part, or the whole; nothing is sent.

    Args:
        part: this rank's part, cut as :func:`span` says; or the same vector on each rank.
        mesh: a mesh of one dimension.
        size: the number of elements of all parts; None: ``part`` is the whole.
    """
    from torch.distributed.tensor import Replicate, Shard

    placement = Replicate() if size is None else Shard(0)
    return _Layout(mesh, [placement], *_dense((len(part) if size is None else size,))).around(part)


def span(size: int, mesh: Any) -> tuple[int, int]:
    """(start, stop) of this rank's part of a dimension, as DTensors are cut: like torch.chunk."""
    part = -(-size // mesh.size())
    start = min(mesh.get_local_rank() * part, size)
    return start, min(start + part, size)


def own_columns(x: Tensor, mesh: Any) -> Tensor:
    """This rank's columns of an x [..., K] that is the same on all ranks.

    Its gradient is the whole one, on every rank.
    """
    start, stop = span(x.shape[-1], mesh)
    return with_summed_grad(x, mesh.get_group())[..., start:stop]


def norms_of_all(norms: Tensor, group: Any) -> Tensor:
    """‖v‖ of vectors of which each rank has a part, from the norms of the parts."""
    return _sum(norms.square(), group).sqrt_()


def all_columns(y: Tensor, size: int, mesh: Any) -> Tensor:
    """The whole [..., size] of which each rank has the columns y, on every rank.

    A rank takes its columns of the gradient, which must be the same on all ranks.
    """
    from torch.distributed.tensor import Replicate, Shard

    whole: Any = _Layout(mesh, [Shard(y.dim() - 1)], *_dense((*y.shape[:-1], size))).around(y)
    found: Tensor = whole.redistribute(placements=[Replicate()]).to_local()
    return found


def _dense(shape: tuple[int, ...]) -> tuple[torch.Size, tuple[int, ...]]:
    """(shape, strides of a contiguous tensor)."""
    return torch.Size(shape), torch.empty(shape, device="meta").stride()


def from_first_rank(value: Tensor, group: Any) -> Tensor:
    """The first rank's ``value`` on every rank, in its memory when that is contiguous."""
    from torch import distributed as dist

    value = value.contiguous()
    dist.broadcast(value, src=dist.get_global_rank(group, 0), group=group)
    return value


@torch.no_grad()
def shared_out(value: Tensor, mesh: Any, dim: int | None, trainable: bool) -> nn.Parameter:
    """A parameter from the first rank's ``value``: a DTensor.

    Args:
        value: the whole tensor, on each rank; on the meta device its numbers are not sent.
        mesh: a mesh of one dimension.
        dim: the dimension in which it is sharded; None: each rank has all of it.
        trainable: True: it requires a gradient.
    """
    if not value.is_meta:
        value = from_first_rank(value, mesh.get_group())
    return nn.Parameter(placed_like(value, mesh, dim), requires_grad=trainable)


def placed_like(value: Tensor, mesh: Any, dim: int | None) -> Tensor:
    """A DTensor of a ``value`` that every rank has whole; nothing is sent."""
    from torch.distributed.tensor import Replicate, Shard

    part = value
    if dim is not None:
        start, stop = span(value.shape[dim], mesh)
        part = value.narrow(dim, start, stop - start).clone(memory_format=torch.contiguous_format)
    placement = Replicate() if dim is None else Shard(dim)
    return _Layout(mesh, [placement], *_dense(tuple(value.shape))).around(part)
