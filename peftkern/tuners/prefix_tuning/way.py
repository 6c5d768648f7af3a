"""The choice of the way that a model's prefix takes: into its attention, or through its cache.

It goes into the attention where our tests, or a comparison with the cache (check.py), show that
this is right.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from ...ops.notes import first_time, note_once
from ...ops.tracing import is_recording
from ...utils.versions import TESTED, is_tested
from .cached import NO_CACHE, CachedPrefix
from .check import KINDS, judge, random_prefix, run_cached, why_not_now
from .families import NotInjectable, find, is_verified, refuse
from .inject import PrefixInjection
from .state import Prefix

Divide = Callable[[list[Prefix]], tuple[list[Prefix | None], list[Prefix | None]]]

choosing = threading.RLock()  # held while a way is chosen, and from the decision to choose again


def choose(
    model: Any,
    *,
    num_layers: int,
    kv_heads: int,
    head_dim: int,
    num_virtual_tokens: int,
    always_visible: bool,
    divide: Divide,
) -> PrefixInjection | CachedPrefix:
    """Choose the way of prefixes into ``model``, install it and return it.

    Args:
        model, num_layers, kv_heads, head_dim, num_virtual_tokens, always_visible: as
            :class:`PrefixInjection`.
        divide: a function of a prefix for each of ``num_layers`` layers; it returns the prefixes
            that the attention layers see and those of the layers that write keys of their own.

    Raises:
        ValueError: neither way works with this model and these settings; the model is as it was.
    """
    sizes = {
        "num_layers": num_layers,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "num_virtual_tokens": num_virtual_tokens,
    }
    with choosing:
        if not is_tested():
            _warn_of_version()
        inject = functools.partial(PrefixInjection, model, **sizes, always_visible=always_visible)
        why = ""
        try:
            if is_verified(model, find(model, num_layers)) and is_tested():
                return inject()
        except NotInjectable as refusal:
            why = refusal.why
        shape = {name: n for name, n in sizes.items() if name != "num_layers"}
        try:
            cached = CachedPrefix(model, **shape, why=why)
        except ValueError:
            if why:
                raise
            injection = inject()
            injection.note = "not compared with its cache, which it has none of"
            return injection
        try:
            chosen = _chosen(model, None if why else inject, cached, sizes, divide)
        except BaseException:
            cached.remove()
            raise
        if chosen is not cached:
            cached.remove()
            return chosen
        try:
            cached.allow(num_virtual_tokens, always_visible)
            cached.refuse_checkpoints(training=False)
        except BaseException:
            cached.remove()
            raise
        _note(model, cached)
        return cached


def _chosen(
    model: Any,
    inject: Callable[[], PrefixInjection] | None,
    cached: CachedPrefix,
    sizes: dict[str, int],
    divide: Divide,
) -> PrefixInjection | CachedPrefix:
    name = type(model).__name__
    pending = why_not_now(model) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user's own calls give the same warnings
        prefixes, own = divide(_random_pairs(model, sizes))
        found = run_cached(model, cached, own)
    if inject is None:
        if found.ran and found.through is None:
            raise refuse(model, f"{cached.why}; through its cache: {found.why}")
        if found.through is None and not cached.named:
            raise refuse(model, f"{cached.why}. {NO_CACHE}")
        return cached
    injection = inject()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            right, why = judge(model, injection, prefixes, found)
    except BaseException:
        injection.remove()
        raise
    if right is not False:
        injection.pending = pending
        injection.note = "" if right else f"not compared with the cache: {why}"
        return injection
    injection.remove()
    if found.through is None:
        raise refuse(model, f"{why}; through its cache: {found.why}")
    cached.why = why
    warnings.warn(
        f"The prefix of {name} goes through its cache, as in HF PEFT: {why}.", stacklevel=2
    )
    return cached


def _warn_of_version() -> None:
    if first_time("transformers"):
        first, last = (".".join(map(str, version)) for version in TESTED)
        warnings.warn(
            f"peftkern's prefixes were tested with transformers {first} to {last}, this is "
            f"{transformers.__version__}: each model is compared with its own cache first (see "
            "peftkern.explain).",
            stacklevel=2,
        )


def _note(model: Any, cached: CachedPrefix) -> None:
    """Log, once for each reason, that the prefix goes through the cache."""
    note_once("the prefix of %s goes through its cache: %s", type(model).__name__, cached.why)


def _random_pairs(model: nn.Module, sizes: dict[str, int]) -> list[Prefix]:
    """A prefix of normal numbers for each layer, in the weights' dtype and on their device."""
    like = next((p for p in model.parameters() if p.dtype in KINDS), torch.empty(0))
    drawn = random_prefix(
        like,
        sizes["kv_heads"],
        sizes["num_virtual_tokens"],
        sizes["head_dim"],
        2 * sizes["num_layers"],
    )
    return list(zip(drawn[::2], drawn[1::2], strict=True))


def again(way: PrefixInjection | CachedPrefix, model: nn.Module) -> bool:
    """True when the way must be chosen again.

    That is when a model that could not be run at the first choice can be run now, or when somebody
    has set an attention function since that is not transformers' own.
    """
    if not isinstance(way, PrefixInjection) or is_recording():
        return False
    return (way.pending and why_not_now(model) is None) or not way.foreign() <= way.judged
