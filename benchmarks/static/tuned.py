"""Configs of shipped tuning tables as cases: a race may have picked a tile that no default uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import (
    decode,
    expand,
    gemm,
    grad_a,
    grad_sb,
    grad_xa,
    shrink,
    shrink_expand,
    tuning,
)
from peftkern.kernels.common import Arch, Launch

from .cases import FP32, INT32, Case, meta


class _Tensors:
    """Meta tensors of one entry, named as in DESIGN: X [M, K], Y [M, N], S [M, r], ..."""

    def __init__(self, key: tuning.Key) -> None:
        self.key = key
        self.dtype, self.adapter = getattr(torch, key.dtype), getattr(torch, key.adapter_dtype)

    def __call__(self, *dims: str) -> Tensor:
        """A matrix of activations, its sides named by fields of the key."""
        return meta(*(getattr(self.key, d) for d in dims), dtype=self.dtype)

    def low(self, *dims: str) -> Tensor:
        """A or B."""
        return meta(*(getattr(self.key, d) for d in dims), dtype=self.adapter)

    def grad(self, *dims: str) -> Tensor:
        return meta(*(getattr(self.key, d) for d in dims), dtype=FP32)

    def words(self) -> list[Tensor | None]:
        k = self.key
        one = meta(k.m, -(-k.k // 32), dtype=INT32) if k.mask else None
        return [one] * k.group


def _shrink(t: _Tensors, config: Any, arch: Arch) -> list[Launch]:
    k = t.key
    out = meta(k.m, k.r * k.group, dtype=t.dtype)
    As, scales = [t.low("r", "k")] * k.group, [1.0] * k.group
    return shrink.plan_shrink(t("m", "k"), As, t.words(), scales, out, config)


def _expand(t: _Tensors, config: Any, arch: Arch) -> list[Launch]:
    y, s, b = t("m", "n"), t("m", "r"), t.low("n", "r")
    return expand.plan_expand(y, [s], [b.T], [None], None, None, config)


def _low_rank_grad_input(t: _Tensors, config: Any, arch: Arch) -> list[Launch]:
    ds, As = [t("m", "r")] * t.key.group, [t.low("r", "k")] * t.key.group
    return expand.plan_expand(t("m", "k"), ds, As, t.words(), None, None, config)


def _shrink_expand(t: _Tensors, config: Any, arch: Arch) -> list[Launch]:
    k, g = t.key, t.key.group
    s = meta(k.m, k.r * g, dtype=t.dtype)
    # n is the sum over the group; how it is shared out does not matter to the compiler
    Bs, ys = [t.low("n", "r")] * g, [t("m", "n")] * g
    As, scales = [t.low("r", "k")] * g, [1.0] * g
    return shrink_expand.plan_shrink_expand(
        t("m", "k"), As, Bs, t.words(), [None] * g, scales, s, ys, config
    )


def _grad_xa(t: _Tensors, config: Any, arch: Arch) -> list[Launch]:
    g = t.key.group
    ds, As, das = [t("m", "r")] * g, [t.low("r", "k")] * g, [t.grad("r", "k")] * g
    return grad_xa.plan_grad_xa(t("m", "k"), ds, As, t.words(), t("m", "k"), das, config)


def _grad_sb(t: _Tensors, config: Any, arch: Arch) -> list[Launch]:
    dy, b, s = t("m", "n"), t.low("n", "r"), t("m", "r")
    return grad_sb.plan_grad_sb(dy, b, s, 1.0, t("m", "r"), t.grad("n", "r"), config)


def _grad_a(t: _Tensors, config: Any, arch: Arch) -> list[Launch]:
    ds, da = [t("m", "r")] * t.key.group, [t.grad("r", "k")] * t.key.group
    return grad_a.plan_grad_a(t("m", "k"), ds, t.words(), da, config)


def _gemm(t: _Tensors, config: Any, arch: Arch) -> list[Launch]:
    y, x, w, s, b = t("m", "n"), t("m", "k"), t("n", "k"), t("m", "r"), t.low("n", "r")
    return gemm.plan_gemm(y, [x], [w], [s], [b.T], [None], None, arch, config)


def _gemm_grad_input(t: _Tensors, config: Any, arch: Arch) -> list[Launch]:
    g = t.key.group
    dys, ws = [t("m", "n")] * g, [t("n", "k").T] * g
    ds, As = [t("m", "r")] * g, [t.low("r", "k")] * g
    return gemm.plan_gemm(t("m", "k"), dys, ws, ds, As, t.words(), None, arch, config)


def _decode(t: _Tensors, config: Any, arch: Arch) -> list[Launch]:
    y, x, w = t("m", "n"), t("m", "k"), t("n", "k")
    a, b = t.low("r", "k"), t.low("n", "r")
    return decode.plan_decode(y, x, w, a, b, None, None, 1.0, config)


Plan = Callable[[_Tensors, Any, Arch], list[Launch]]
PLANS: dict[str, tuple[type, Plan]] = {
    "shrink": (shrink.ShrinkConfig, _shrink),
    "expand": (expand.ExpandConfig, _expand),
    "low_rank_grad_input": (expand.ExpandConfig, _low_rank_grad_input),
    "shrink_expand": (shrink_expand.ShrinkExpandConfig, _shrink_expand),
    "grad_xa": (grad_xa.GradXAConfig, _grad_xa),
    "grad_sb": (grad_sb.GradSBConfig, _grad_sb),
    "grad_a": (grad_a.GradAConfig, _grad_a),
    "gemm": (gemm.GemmConfig, _gemm),
    "gemm_grad_input": (gemm.GemmConfig, _gemm_grad_input),
    "decode": (decode.DecodeConfig, _decode),
}


def tuned_cases(arch: Arch, folder: Path = tuning.FOLDER) -> Iterator[Case]:
    """A case for each launch of each config in the tables for ``arch``'s capability; entries that
    keep the default, or choose a way to run a whole operation, have none.

    Raises:
        ValueError: a table, an entry or its config is not valid; names the file.
    """
    for path in sorted(folder.glob("device_name=*.json")):
        table = tuning.load(path)
        major, minor = table.gpu["capability"]
        if 10 * major + minor != arch.capability:
            continue
        device = path.stem.removeprefix("device_name=")
        for key, entry in table.entries.items():
            if entry.config is None:
                continue
            made, plan = PLANS[key.op]
            try:
                launches = plan(_Tensors(key), entry.make(made), arch)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path.name}, {key.op}: {error}") from None
            fast = made is gemm.GemmConfig and key.dtype != "float32"
            ranks = f"r{key.r}{f'x{key.group}' if key.group > 1 else ''}"
            name = f"{device} {key.op} M{key.m} N{key.n} K{key.k} {ranks}"
            name += f"{' mask' if key.mask else ''} {key.dtype}/{key.adapter_dtype}"
            for i, launch in enumerate(launches):
                yield Case(f"{name} +{i}" if i else name, launch, fast)
