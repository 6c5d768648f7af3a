"""What transformers calls or does otherwise from one version to the next, asked in one place.

Answers come from the signatures and the behaviour of what is installed, not from version numbers:
a model with code of its own may keep an old name under a new transformers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .private import CHECKPOINT_RUNNER

# The transformers that the tests have verified, first and last: within them whatever the third
# number is.
TESTED = ((5, 15), (5, 24))


def is_tested() -> bool:
    """Whether the tests have verified this version of transformers."""
    import transformers

    first, last = TESTED
    return first <= release(transformers.__version__) <= last


def release(version: str) -> tuple[int, int]:
    """(5, 24) of "5.24.0.dev0"."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


# What a forward calls the keys of earlier tokens: first the name that transformers takes since
# 5.24, then those before it, in models and in the layers of some (Bloom, GPT-J, ...).
CACHE_NAMES = ("cache", "past_key_values", "layer_past")
# What M2M-100's table of positions calls the number of earlier tokens.
CACHE_LENGTHS = ("cache_length", "past_key_values_length")


# no functools.cache, which torch.compile warns of where a hook runs between two of its graphs
_known: dict[type, tuple[str, ...]] = {}


def _parameters(kind: type) -> tuple[str, ...]:
    if kind not in _known:
        _known[kind] = tuple(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]
    return _known[kind]


F = TypeVar("F", bound=Callable[..., Any])


def _asked_once(function: F) -> F:
    """torch.compile asks this while it traces, and keeps the answer."""
    return cast(F, torch.compiler.assume_constant_result(function))


@_asked_once
def _own_parameters(kind: type) -> tuple[str, ...]:
    return _parameters(kind)[1:]


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of its class's ``forward``, ``self`` left out; read once a class."""
    return _own_parameters(type(module))


_cache_names: dict[type, str | None] = {}


@_asked_once
def _cache_name(kind: type) -> str | None:
    if kind not in _cache_names:
        own = _parameters(kind)
        _cache_names[kind] = next((name for name in CACHE_NAMES if name in own), None)
    return _cache_names[kind]


def cache_name(module: nn.Module) -> str | None:
    """What ``module.forward`` calls the cache; None for a module that takes none (encoders)."""
    return _cache_name(type(module))


def cache_of(module: nn.Module, kwargs: dict[str, Any]) -> Any:
    """The cache among the keywords of a call of ``module``, or None.

    Where the name is ``cache``, transformers goes on to take ``past_key_values``, with a warning.
    """
    name = cache_name(module)
    if name is None:
        return None
    found = kwargs.get(name)
    if found is None and name == "cache":
        found = kwargs.get("past_key_values")
    return found


def cached_tokens(cache: Any) -> int:
    """How many tokens a cache holds; 0 for none."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2])


def how_checkpointed(base: Any) -> tuple[bool, bool]:
    """(hooks run inside, also without gradients) of layers of a class with transformers' way of
    checkpointing, found by running one without weights."""

    class Layer(base):  # type: ignore[misc]  # transformers is not read, so it may be anything
        def forward(self, x: Tensor) -> Tensor:
            return x

    hooked: list[bool] = []
    hooked_before: list[int] = []

    def run(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        hooked_before.append(len(hooked))
        return function(x)

    layer: Any = Layer()
    layer.gradient_checkpointing = True
    setattr(layer, CHECKPOINT_RUNNER, run)
    layer.register_forward_pre_hook(lambda *_: hooked.append(True))
    x = torch.zeros(())
    with torch.enable_grad():
        layer(x)
    if not hooked_before:
        raise RuntimeError(f"a {base.__name__} of transformers runs in no checkpoint")
    with torch.no_grad():
        layer(x)
    return hooked_before[0] == 0, len(hooked_before) == 2


@functools.cache
def _checkpoints() -> tuple[bool, bool]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return how_checkpointed(GradientCheckpointingLayer)


@_asked_once
def hooks_in_checkpoints() -> bool:
    """Whether a layer's hooks are within its gradient checkpoint (before 5.23), so that a
    replay runs them again; later versions checkpoint ``forward`` alone."""
    return _checkpoints()[0]


@_asked_once
def checkpoints_without_gradients() -> bool:
    """Whether layers run within checkpoints under ``torch.no_grad`` as well (before 5.24)."""
    return _checkpoints()[1]


def in_checkpoint(layer: nn.Module) -> bool:
    """Whether transformers will run this layer within a checkpoint now."""
    if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
        return False
    return torch.is_grad_enabled() or checkpoints_without_gradients()


@functools.cache
def _ignores_softcap(function: Any) -> bool:
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 1, False  # type: ignore[assignment]
    x = torch.eye(2)[None, None]
    try:
        with torch.no_grad():
            capped, plain = (
                function(module, x, x, x, None, dropout=0.0, scaling=1.0, **more)[0]
                for more in ({"softcap": 1e-3}, {})
            )
    except Exception:
        return False
    return torch.equal(capped, plain)


@_asked_once
def sdpa_ignores_softcap() -> bool:
    """Whether transformers' "sdpa" drops the cap on scores without a word, as in 5.17, where
    Gemma 2 takes it by default; later versions refuse it, and Gemma 2 takes "eager"."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return _ignores_softcap(sdpa_attention_forward)
