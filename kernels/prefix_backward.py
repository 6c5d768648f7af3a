"""The backward of prefix attention: dQ, dK, dV, dKp, dVp, from Q, K, V, O, LSE and dO.

No tensor of size T x (P + S) is kept or made. There are two launches. Rows: a program has a tile of
query rows; it computes delta = rowsum(dO * O) and dQ. Keys: a program has a tile of keys, of the
own ones or of the prefix; it reads the query rows of all heads of its group and keeps dK and dV in
registers. The gradient of a shared prefix is a sum over the batch too. If that leaves too few
programs, parts of the batch give fp32 partials, which are added in fixed order. There are no
atomics, so two runs agree bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import checks
from .common import Arch, Launch, arch_of, cdiv
from .launching import planned
from .prefix_grad import _grad_keys_kernel, _grad_rows_kernel
from .prefix_tile import Problem, check, strides, unit_rows
from .reduce import plan_sum


@dataclass(frozen=True)
class BackwardConfig:
    """Tiles of scores, and the number of parts of the batch.

    Tiles are [block_m queries, block_n keys] for programs over rows, [key_m, key_n] for programs
    over keys. A shared prefix is summed in ``parts`` parts of the batch (1: no second stage).
    """

    block_m: int = 64
    block_n: int = 64
    key_m: int = 64
    key_n: int = 64
    parts: int = 1
    num_warps: int = 4
    num_stages: int = 2
    key_warps: int = 4
    key_stages: int = 2

    def __post_init__(self) -> None:
        checks.blocks(
            self, block_m=self.block_m, block_n=self.block_n, key_m=self.key_m, key_n=self.key_n
        )
        for name, value, allowed in (
            ("parts", self.parts, self.parts >= 1),
            ("key_warps", self.key_warps, self.key_warps in (1, 2, 4, 8, 16)),
            ("key_stages", self.key_stages, self.key_stages >= 1),
        ):
            if not allowed:
                raise ValueError(
                    f"BackwardConfig.{name} is {value}; allowed: 1 or more, "
                    "a power of two up to 16 for warps"
                )


def default_config(
    sizes: tuple[int, int, int, int, int, int, int], shared: bool, arch: Arch, itemsize: int = 2
) -> BackwardConfig:
    """A config for ``sizes`` (B, H, H_kv, T, S, P, D).

    The batch has parts if the programs of a shared prefix would not fill the device otherwise.
    """
    B, H, H_kv, T, _, P, D = sizes
    # block_m, block_n, key_m, key_n, num_warps, num_stages, key_warps, key_stages
    if itemsize == 4:
        tiles = (32, 16, 16, 16, 8, 1, 4, 1)
    elif D <= 64:
        tiles = (64, 64, 32, 128, 4, 2, 8, 3) if arch.warpgroups else (64, 64, 32, 64, 4, 2, 8, 1)
        tiles = (64, 64, 32, 128, 4, 3, 8, 3) if arch.blackwell else tiles
    elif D <= 128:
        tiles = (64, 32, 64, 128, 4, 3, 8, 1) if arch.blackwell else (64, 64, 32, 128, 4, 2, 8, 3)
        tiles = tiles if arch.warpgroups else (64, 32, 32, 64, 4, 3, 8, 3)
    elif arch.warpgroups:
        tiles = (64, 32, 64, 32, 8, 1 if arch.blackwell else 2, 8, 2)
    else:
        tiles = (32, 32, 32, 32, 8, 1, 8, 1)
    block_m, block_n, key_m, key_n, num_warps, num_stages, key_warps, key_stages = tiles
    fits = arch.warpgroups and itemsize == 2 and (64 < D <= 128 or not arch.blackwell)
    if fits and B * H * cdiv(T, 128) >= arch.sms:
        block_m, num_warps = 128, 8  # keys and values are loaded half as often
    parts = max(1, min(B, cdiv(arch.sms, max(1, cdiv(P, key_n) * H_kv)))) if shared else 1
    return BackwardConfig(
        block_m, block_n, key_m, key_n, parts, num_warps, num_stages, key_warps, key_stages
    )


def declines(dtype: torch.dtype, D: int) -> str | None:
    """The reason not to choose this backward on a device, where it is right but slow, or None."""
    if dtype == torch.float32 and D > 64:
        return f"float32 with head dimension {D}: over 64 its exact products spill registers"
    return None


class Grads(NamedTuple):
    """The gradients, in the shapes of their tensors; ``sinks`` is None without sinks."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    prefix_key: torch.Tensor
    prefix_value: torch.Tensor
    sinks: torch.Tensor | None = None


def plan_backward(
    problem: Problem,
    o: torch.Tensor,
    lse: torch.Tensor,
    grad_o: torch.Tensor,
    delta: torch.Tensor,
    grads: Grads,
    config: BackwardConfig,
) -> list[Launch]:
    """Launches that fill ``grads`` and ``delta`` [B, H, T] fp32.

    The prefix's gradients are contiguous, [1 or B, H_kv, P, D]; o and grad_o have unit stride along
    D; lse is contiguous.
    """
    x, c = problem, config
    B, H, H_kv, T, S, P, D = x.sizes
    at, offset, offset_stride = x.offsets()
    keep_stride = 0 if x.keep is None else x.keep.stride(0)
    common = (offset, offset_stride, x.window or 0, x.scale, x.softcap)
    sources = (
        strides(x.q), strides(x.k), strides(x.v), strides(x.prefix_key, x.shared),
        strides(x.prefix_value, x.shared),
    )  # fmt: skip
    rows = Launch(
        _grad_rows_kernel,
        (cdiv(T, c.block_m), H, B),
        (
            x.q, x.k, x.v, x.prefix_key, x.prefix_value, x.keep, x.no_prefix, at, o, lse, grad_o,
            grads.q, delta, *sources, strides(o), strides(grad_o), strides(grads.q), keep_stride,
            *common, H // H_kv, T, S, P,
        ),
        x.meta() | dict(BLOCK_M=c.block_m, BLOCK_N=c.block_n, num_warps=c.num_warps,
                        num_stages=c.num_stages),
    )  # fmt: skip
    b_part = cdiv(B, min(c.parts, B)) if x.shared else 1
    parts = cdiv(B, b_part)
    split = x.shared and parts > 1
    prefix = (grads.prefix_key, grads.prefix_value)
    if split:
        shape = (2, parts, H_kv, P, D)
        partials = x.q.new_empty(shape, dtype=torch.float32).unbind()
    else:
        partials = prefix
    programs_p = cdiv(P, c.key_n) * H_kv * parts
    programs_s = cdiv(S, c.key_n) * H_kv * B
    keys = Launch(
        _grad_keys_kernel,
        (programs_p + programs_s,),
        (
            x.q, x.k, x.v, x.prefix_key, x.prefix_value, x.keep, x.no_prefix, at, lse, grad_o,
            delta, grads.k, grads.v, *partials, *sources, strides(grad_o), strides(grads.k),
            strides(grads.v), strides(partials[0]), keep_stride, *common, B, H, H_kv, T, S, P,
            programs_p, b_part,
        ),
        x.meta() | dict(BLOCK_M=c.key_m, BLOCK_N=c.key_n, num_warps=c.key_warps,
                        num_stages=c.key_stages),
    )  # fmt: skip
    launches = [rows]
    if programs_p + programs_s:
        launches.append(keys)
    if split and P:
        launches.append(plan_sum(list(zip(partials, prefix, strict=True))))
    return launches


@planned()
def attend_backward(
    grad_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    *,
    prefix_dtype: torch.dtype | None = None,
    config: BackwardConfig | None = None,
    **options: object,
) -> Grads:
    """The gradients of :func:`.prefix_attention.attend` for dO ``grad_o`` [B, H, T, D].

    ``o`` and ``lse`` are its results. Two runs agree bit for bit. dQ, dK, dV are in q's dtype, in
    the memory order [B, rows, heads, D]. dKp, dVp are in ``prefix_dtype`` (default q's), summed
    over the batch for a shared prefix. The sinks' gradient is fp32. Further arguments and errors
    are those of ``attend``.
    """
    problem = check(q, k, v, prefix_key, prefix_value, **options)  # type: ignore[arg-type]
    B, H, H_kv, T, S, P, D = problem.sizes
    for name, t in (("grad_o", grad_o), ("o", o)):
        checks.shape(name, t, tuple(q.shape), "that of q")
        if t.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {t.dtype}; allowed: {q.dtype}, that of q")
    checks.shape("lse", lse, (B, H, T), "[B, H, T] of q")
    if lse.dtype != torch.float32:
        raise TypeError(f"lse has dtype {lse.dtype}; allowed: torch.float32")
    checks.device(q=q, grad_o=grad_o, o=o, lse=lse)
    o, grad_o, lse = unit_rows(o), unit_rows(grad_o), lse.contiguous()
    lead = 1 if problem.shared else B
    dtype = prefix_dtype or q.dtype
    grads = Grads(
        problem.rows_like_q(),
        *(q.new_empty((B, S, H_kv, D)).transpose(1, 2) for _ in range(2)),
        *(q.new_empty((lead, H_kv, P, D), dtype=dtype) for _ in range(2)),
    )
    delta = torch.empty_like(lse)
    if q.numel() == 0:
        for t in grads[1:5]:
            t.zero_()
    else:
        config = config or default_config(
            problem.sizes, problem.shared, arch_of(q.device), q.element_size()
        )
        for launch in plan_backward(problem, o, lse, grad_o, delta, grads, config):
            launch.run()
    if problem.sinks is not None:  # the gradient of a score whose value is 0
        share = torch.exp(problem.sinks.float()[None, :, None] - lse)
        grads = grads._replace(sinks=-(share * delta).sum((0, 2)))
    if problem.shared:
        grads = grads._replace(prefix_key=grads.prefix_key[0], prefix_value=grads.prefix_value[0])
    return grads
