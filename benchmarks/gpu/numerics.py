"""Checks every provider against float64 before it is timed.

The check covers the outputs, dX, dA and dB of one forward and backward. The reference is the same
block with linears in float64 and the dropout mask that the provider drew. A hook on PEFT's dropout
gives its mask; for peftkern it is among the tensors that autograd saved. A provider whose mask
cannot be seen (torch.compile) is compared with dropout off, and its row tells that.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import blocks as gpu_blocks
from .cases import Case
from .device import Device
from .providers import ALPHA, PEFT_BF16, PEFT_COMPILED, PEFT_FP32, PLAIN, Provider

# the largest correct ‖out - ref‖ / ‖ref‖ of one linear; blocks also round between linears
LIMITS = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-3}
BLOCK_FACTOR = {"linear": 1.0, "qkv": 1.0, "mlp": 2.0, "layer": 3.0}


class _Reference(nn.Module):
    """A LoRA linear in float64; ``keep`` is the mask of X, or None."""

    def __init__(self, weight: Tensor, A: Tensor | None, B: Tensor | None, p: float) -> None:
        super().__init__()
        self.weight, self.A, self.B, self.p = weight, A, B, p
        self.keep: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        if self.A is None or self.B is None:
            return y
        dropped = x if self.keep is None else x * self.keep.view(x.shape)
        scale = ALPHA / (1 - self.p) if self.keep is not None else ALPHA
        return y + scale * (dropped @ self.A.T) @ self.B.T


def _wide(t: Tensor) -> Tensor:
    return t.detach().double()


def reference_block(plain: nn.Module, case: Case, adapters: Any) -> tuple[nn.Module, Any]:
    """(the block in float64, {projection: its reference linear})."""
    memo = {id(layer.weight): None for layer in gpu_blocks.linears(plain, case).values()}
    block = copy.deepcopy(plain, memo).double()  # without the linears' weights, converted below
    made = {}
    for name, layer in gpu_blocks.linears(plain, case).items():
        A, B = (_wide(t).requires_grad_(True) for t in adapters[name]) if adapters else (None, None)
        made[name] = _Reference(_wide(layer.weight), A, B, case.p)
    for module in list(block.modules()):
        for name in made:
            if name in module._modules:
                module._modules[name] = made[name]
    return block, made


@contextlib.contextmanager
def _peft_masks(provider: Provider, case: Case) -> Iterator[dict[str, Tensor]]:
    """Collect the masks that PEFT's dropout modules draw, by projection."""
    masks: dict[str, Tensor] = {}
    handles = []
    if provider.name in (PEFT_BF16, PEFT_FP32):  # a hook would change the compiled model
        for name, layer in gpu_blocks.linears(provider.modules[0], case).items():

            def hook(module: Any, args: Any, out: Tensor, name: str = name) -> None:
                masks[name] = (out != 0) | (args[0] == 0)

            handles.append(layer.lora_dropout["default"].register_forward_hook(hook))
    try:
        yield masks
    finally:
        for handle in handles:
            handle.remove()


def _saved_masks(outs: Iterable[Tensor], provider: Provider, case: Case) -> dict[str, Tensor]:
    """{projection: mask} from the packed masks that autograd saved, each beside its A."""
    from peftkern.ops.bits import unpack_bits

    owners = {A.data_ptr(): name for name, (A, _) in provider.adapters[0].items()}
    masks: dict[str, Tensor] = {}
    seen, todo = set(), [out.grad_fn for out in outs]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [n for n, _ in node.next_functions]
        # only peftkern's Functions have saved_tensors; generated nodes use other names
        saved = [t for t in getattr(node, "saved_tensors", ()) if isinstance(t, Tensor)]
        names = [owners[t.data_ptr()] for t in saved if t.data_ptr() in owners]
        words = [t for t in saved if t.dtype == torch.int32 and t.dim() in (2, 3)]
        packed = [w for t in words for w in (t if t.dim() == 3 else t[None])]
        if len(packed) == len(names):
            for name, word in zip(names, packed, strict=True):
                masks[name] = unpack_bits(word, case.shapes[name][0], torch.bool)
    return masks


def run(provider: Provider, i: int, x: Tensor, dys: Any, case: Case) -> tuple[Any, ...]:
    """(outputs, gradients of x and of each A and B) on weight copy ``i``.

    There are no gradients in a case of inference.
    """
    if case.what == "infer":
        with torch.no_grad():
            return provider.calls[i](x), ()
    outs = provider.calls[i](x)
    wanted = [x, *(t for pair in provider.adapters[i].values() for t in pair)]
    return outs, torch.autograd.grad(outs, wanted, dys)


def relative(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖; NaN if any value is NaN."""
    return ((got.double() - want).norm() / want.norm()).item()


def check(
    provider: Provider,
    plain: nn.Module,
    x: Tensor,
    dys: Any,
    case: Case,
    device: Device,
    beside: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The errors and the memory of a provider's forward and backward on weight copy 0.

    Returns {"errors": {"y", "dx", "da", "db"}, "ok", "limit", "checked", "peak_bytes",
    "kept_bytes"}. An error is None when it is not finite. The provider is ok when each error is at
    most the limit, or twice the error in ``beside``, which is PEFT's in the same block and dtype.

    ``peak_bytes`` is the memory of a forward and backward beyond X and the weights, ``kept_bytes``
    the part that stays allocated after the forward, without the outputs.
    """
    device.poison(sum(t.numel() * t.element_size() for t in (x, *dys)))
    with provider.mode(), _peft_masks(provider, case) as masks:
        if case.what == "train":
            outs = provider.calls[0](x)
            masks.update(_saved_masks(outs, provider, case) if case.p else {})
            wanted = [x, *(t for pair in provider.adapters[0].values() for t in pair)]
            grads = torch.autograd.grad(outs, wanted, dys)
        else:
            outs, grads = run(provider, 0, x, dys, case)
        got = [o.detach() for o in outs]
        names = list(provider.adapters[0])
        dropped = case.p > 0 and case.what == "train" and provider.name != PLAIN
        checked = "float64" if not dropped else "float64 with its own mask"
        off = dropped and set(masks) != set(names)
        if off:
            with _eval(provider):
                outs = provider.calls[0](x)
                grads = torch.autograd.grad(outs, wanted, dys)
            got, masks = [o.detach() for o in outs], {}
            checked = "float64, dropout off: its mask cannot be seen"
    del outs
    result = _compare(provider, plain, x, dys, case, got, grads, {} if off else masks)
    del got, grads
    limit = LIMITS[case.dtype] * BLOCK_FACTOR[case.block]
    if provider.name in (PLAIN, PEFT_BF16, PEFT_FP32, PEFT_COMPILED) and case.block != "linear":
        limit *= 5  # torch itself rounds within a block, and the check is not about the rivals
    allowed = {k: max(limit, 2 * ((beside or {}).get(k) or 0.0)) for k in result["errors"]}
    result["ok"] = all(e is not None and e <= allowed[k] for k, e in result["errors"].items())
    result["checked"], result["limit"] = checked, limit
    result.update(memory(provider, x, dys, case, device))
    device.synchronize()
    return result


@contextlib.contextmanager
def _eval(provider: Provider) -> Iterator[None]:
    for module in provider.modules:
        module.eval()
    try:
        yield
    finally:
        for module in provider.modules:
            module.train()


def _compare(
    provider: Provider,
    plain: nn.Module,
    x: Tensor,
    dys: Any,
    case: Case,
    got: list[Tensor],
    grads: Any,
    masks: dict[str, Tensor],
) -> dict[str, Any]:
    block, made = reference_block(plain, case, provider.adapters[0])
    for name, mask in masks.items():
        made[name].keep = mask
    wide_x = _wide(x).requires_grad_(case.what == "train")
    outs = block(wide_x)
    errors = {"y": max(relative(g, o.detach()) for g, o in zip(got, outs, strict=True))}
    if case.what == "train":
        leaves = [wide_x]
        for name in provider.adapters[0]:
            leaves += [made[name].A, made[name].B]
        exact = torch.autograd.grad(outs, leaves, [_wide(d) for d in dys])
        errors["dx"] = relative(grads[0], exact[0])
        for what, first in (("da", 1), ("db", 2)):
            pairs = list(zip(grads[first::2], exact[first::2], strict=True))
            if pairs:
                errors[what] = max(relative(g, e) for g, e in pairs)
    return {"errors": {k: e if math.isfinite(e) else None for k, e in errors.items()}}  # JSON


def memory(provider: Provider, x: Tensor, dys: Any, case: Case, device: Device) -> dict[str, int]:
    """{"kept_bytes", "peak_bytes"} of one call of copy 0, beyond the memory in use before."""
    with provider.mode():
        device.synchronize()
        before = device.allocated()
        device.watch_peak()
        if case.what == "infer":
            run(provider, 0, x, dys, case)
            return {"peak_bytes": device.peak() - before}
        outs = provider.calls[0](x)
        kept = device.allocated() - before - sum(o.numel() * o.element_size() for o in outs)
        wanted = [x, *(t for pair in provider.adapters[0].values() for t in pair)]
        grads = torch.autograd.grad(outs, wanted, dys)
        peak = device.peak() - before
        del outs, grads
        return {"kept_bytes": max(kept, 0), "peak_bytes": peak}
