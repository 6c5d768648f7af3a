"""A comparison of an injected prefix with the same keys and values in the model's cache.

Injection depends on how a model calls its attention. A model that does it in another way would
compute something else without an error. So a model that our tests do not know runs four times on a
few tokens before its first prefix: (1) without a prefix, (2) with one in its cache, (3) with the
one in the cache changed by two roundings, and (4) with the prefix injected. Outputs 4 must be about
as close to outputs 2 as outputs 3 are.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.tracing import is_recording
from ...utils.private import hook_of
from .cached import CachedPrefix
from .inject import PrefixInjection
from .state import Prefix

TOKENS = 3
# Changing the prefix by two roundings changes the outputs as much as another order of sums does:
# within a factor of 1.3 where measured (random Llamas of 2 to 24 layers, float32, float16,
# bfloat16).
_SLACK = 4
KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes of computation
_SMALL = 2**20  # bytes; larger buffers are weights (GPTQ's, for one), which no forward changes
_SHARE = 1e-3  # of the prefix's effect; a mistake in its place, order or mask changes more


class _CannotRun(Exception):
    pass


def why_not_now(model: nn.Module) -> str | None:
    """The reason that the model cannot be run at present; None when it can."""
    if is_recording():
        return "it is being compiled or traced"
    for module in model.modules():
        for tensor in itertools.chain(module._parameters.values(), module._buffers.values()):
            # ds_id: a parameter that ZeRO-3 has sharded
            if hasattr(tensor, "ds_id") or (_is_meta(tensor) and not _brings_weights(module)):
                return "some of its weights are not here (sharded or on the meta device)"
    return None


def _is_meta(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_meta


def _brings_weights(module: nn.Module) -> bool:
    """True when accelerate offloaded this module's weights and loads them for each call."""
    hook = hook_of(module)
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))


@dataclass(frozen=True)
class Cached:
    """The outputs of a model with a prefix in its cache, and the distances to judge others by.

    Args:
        ran: False when the model could not be run at all.
        why: the reason that ``through`` is None.
        call: the inputs.
        through: the outputs; None when the run failed or the prefix had no effect.
        effect: distance of the outputs from those without a prefix.
        rounding: distance that another order of sums may make.
    """

    ran: bool
    why: str = ""
    call: dict[str, Tensor] | None = None
    through: list[Tensor] | None = None
    effect: float = 0.0
    rounding: float = 0.0


def run_cached(model: Any, cached: CachedPrefix, own: list[Prefix | None]) -> Cached:
    """Run ``model`` on a few tokens with a prefix in its cache, without gradients, in eval mode.

    The model, its hooks and buffers, and the random number generators are as before afterwards.

    Args:
        cached: the prefix's way through the cache.
        own: keys and values of each layer that writes some.
    """
    reason = why_not_now(model)
    if reason is not None:
        return Cached(False, reason)
    with _quietly(model, cached):
        try:
            call = _inputs(model)
            plain = _run(model, call)
        except Exception as error:  # for example, the model needs other inputs than tokens
            return Cached(False, f"it does not run on {TOKENS} tokens alone ({_said(error)})")
        through, why = _try(model, call, cached, own)
        if through is None:
            return Cached(True, why, call)
        effect = _distance(through, plain)
        if effect == 0:
            return Cached(True, "its cache has no effect on what it computes", call)
        step = 2 * _spacing(model)
        nudged, _ = _try(model, call, cached, [_nudged(pair, step) for pair in own])
        assert nudged is not None
        return Cached(True, "", call, through, effect, _SLACK * _distance(nudged, through))


def judge(
    model: Any, injection: PrefixInjection, prefixes: list[Prefix | None], cached: Cached
) -> tuple[bool | None, str]:
    """(True when the injected prefix gives the right outputs, the reason when it does not).

    None in place of the bool, with a reason, when the comparison is not possible.

    Args:
        prefixes: the prefix that ``cached`` was run with, for every attention layer.
    """
    if cached.call is None:
        return None, cached.why
    with _quietly(model, injection):
        inside, error = _try(model, cached.call, injection, prefixes)
    if inside is None:
        return False, error
    if cached.through is None:
        return None, cached.why
    if cached.effect <= 1.5 * cached.rounding:
        return None, "the prefix is lost in the rounding of this model"
    apart = _distance(inside, cached.through)
    if apart <= cached.rounding + _SHARE * cached.effect:
        return True, ""
    share = f"{100 * apart / cached.effect:.3g}%"
    return False, f"injected, it comes out otherwise than through the cache ({share} of its effect)"


def random_prefix(like: Tensor, heads: int, length: int, width: int, slices: int) -> list[Tensor]:
    """``slices`` tensors [heads, length, width] of normal numbers; dtype and device of ``like``."""
    g = torch.Generator().manual_seed(20)
    shape = (slices, heads, length, width)
    drawn = torch.randn(shape, generator=g, dtype=torch.float32)
    return list(drawn.to(device="cpu" if like.is_meta else like.device, dtype=like.dtype).unbind(0))


# -------------------------------------------------------------------------------- runs


def _inputs(model: Any) -> dict[str, Tensor]:
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    marks: set[Any] = set()
    for name, value in (*vars(config).items(), *vars(text).items()):
        if name.endswith(("_token_id", "_token_index")):
            marks.update(value if isinstance(value, (list, tuple)) else [value])
    words = (n for n in range(3, int(text.vocab_size)) if n not in marks)
    ids = list(itertools.islice(words, TOKENS))
    if len(ids) < TOKENS:
        raise _CannotRun("its vocabulary is too small")
    seq2seq = getattr(config, "is_encoder_decoder", False)
    if seq2seq and isinstance(getattr(text, "eos_token_id", None), int):
        ids[-1] = text.eos_token_id  # classifiers read at this token
    # offloaded weights are loaded to the device of the inputs
    tokens = torch.tensor([ids], device=None if model.device.type == "meta" else model.device)
    call = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if seq2seq:
        call["decoder_input_ids"] = tokens.clone()
    return call


def _run(model: Any, call: dict[str, Tensor]) -> list[Tensor]:
    """All floating-point tensors of a call's output except its cache."""
    output = model(**{name: value.clone() for name, value in call.items()})
    parts = output.values() if hasattr(output, "values") else output
    found = [x.detach() for x in parts if isinstance(x, Tensor) and x.is_floating_point()]
    if not found:
        raise _CannotRun(f"its output, a {type(output).__name__}, has no tensor to compare")
    return found


def _try(
    model: Any, call: dict[str, Tensor], way: Any, prefixes: list[Prefix | None]
) -> tuple[list[Tensor] | None, str]:
    try:
        with way.active(prefixes):
            return _run(model, call), ""
    except Exception as error:
        return None, _said(error)


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def _nudged(pair: Prefix | None, step: float) -> Prefix | None:
    return None if pair is None else (pair[0] * (1 + step), pair[1] * (1 + step))


def _spacing(model: nn.Module) -> float:
    """The relative spacing of the numbers that the model computes with.

    It is that of the coarsest dtype of the weights, or of the one in which matrices are multiplied
    (under autocast or with TF32), if that is coarser.
    """
    here = (p for p in model.parameters() if p.dtype in KINDS)
    kinds = {("cpu" if p.is_meta else p.device, p.dtype) for p in here}
    random = torch.Generator().manual_seed(20)
    spacing = 0.0
    for device, dtype in kinds:
        x = torch.randn(64, 64, generator=random, dtype=torch.float64).to(dtype)
        exact = x.double() @ x.double()
        error = (x.to(device) @ x.to(device)).cpu().double() - exact
        # rounding before and after the product makes an error of about half a spacing
        measured = 2 * float(error.abs().max() / exact.abs().max())
        spacing = max(spacing, torch.finfo(dtype).eps, measured)
    return spacing


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference of two lists of tensors, relative to each tensor's largest number."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    most = 0.0
    for x, y in zip(a, b, strict=True):
        if x.numel():
            scale = float(y.double().abs().max())
            most = max(most, float((x.double() - y.double()).abs().max()) / (scale or 1.0))
    return most


# -------------------------------------------------------------------------------- no trace left


@contextlib.contextmanager
def _quietly(model: nn.Module, way: Any) -> Iterator[None]:
    """A context in eval mode, without gradients, in which only the hooks of ``way`` run.

    The model and the random number generators are as before afterwards.
    """
    modules = list(model.modules())
    attributes = [dict(vars(m)) for m in modules]
    tables = ("_modules", "_parameters", "_buffers")
    held = [{name: dict(vars(m)[name]) for name in tables} for m in modules]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if _kept(b)]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=[d for d in devices if d is not None]), torch.no_grad():
            for module in modules:
                module.__dict__["training"] = False
                for name in ("_forward_hooks", "_forward_pre_hooks"):
                    module.__dict__[name] = _only(vars(module)[name], way)
            yield
    finally:
        for module, before, kept in zip(modules, attributes, held, strict=True):
            for name in set(vars(module)) - set(before):
                del module.__dict__[name]
            module.__dict__.update(before)
            for name in tables:
                table = vars(module)[name]
                if table != kept[name] if name == "_modules" else _moved(table, kept[name]):
                    table.clear()
                    table.update(kept[name])
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _kept(buffer: Tensor) -> bool:
    return buffer.nbytes <= _SMALL and not buffer.is_meta


def _moved(table: dict[str, Any], kept: dict[str, Any]) -> bool:
    return table.keys() != kept.keys() or any(table[name] is not kept[name] for name in kept)


def _only(hooks: Any, way: Any) -> Any:
    """Those of ``hooks`` that are methods of ``way`` or objects that belong to it."""
    kept = type(hooks)()
    for key, hook in hooks.items():
        holder = getattr(hook, "__self__", hook)
        if holder is way or getattr(holder, "injection", None) is way:
            kept[key] = hook
    return kept
