"""Differences between versions of transformers, in one place.

They are found from the signatures and the behaviour of the installed code, not from version
numbers: a model with code of its own may use an old name under a new transformers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .private import CHECKPOINT_RUNNER

# the first and the last transformers that the tests have verified; the third number does not count
TESTED = ((5, 15), (5, 24))


def is_tested() -> bool:
    """True when the tests have verified the installed version of transformers."""
    import transformers

    first, last = TESTED
    return first <= release(transformers.__version__) <= last


def release(version: str) -> tuple[int, int]:
    """The first two numbers of a version: (5, 24) of "5.24.0.dev0"."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


# A forward's names for the keys of earlier tokens: first the name since transformers 5.24, then
# those before it, in models and in the layers of some (Bloom, GPT-J, ...).
CACHE_NAMES = ("cache", "past_key_values", "layer_past")
# The names of M2M-100's table of positions for the number of earlier tokens.
CACHE_LENGTHS = ("cache_length", "past_key_values_length")


# not functools.cache, of which torch.compile warns when a hook runs between two of its graphs
_known: dict[type, tuple[str, ...]] = {}


def _parameters(kind: type) -> tuple[str, ...]:
    if kind not in _known:
        _known[kind] = tuple(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]
    return _known[kind]


F = TypeVar("F", bound=Callable[..., Any])


def _asked_once(function: F) -> F:
    """Make torch.compile call ``function`` while it traces, and use the result as a constant."""
    return cast(F, torch.compiler.assume_constant_result(function))


@_asked_once
def _own_parameters(kind: type) -> tuple[str, ...]:
    return _parameters(kind)[1:]


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of the class's ``forward`` without ``self``; read once a class."""
    return _own_parameters(type(module))


_cache_names: dict[type, str | None] = {}


@_asked_once
def _cache_name(kind: type) -> str | None:
    if kind not in _cache_names:
        own = _parameters(kind)
        _cache_names[kind] = next((name for name in CACHE_NAMES if name in own), None)
    return _cache_names[kind]


def cache_name(module: nn.Module) -> str | None:
    """The name of ``module.forward``'s argument for the cache; None without one (encoders)."""
    return _cache_name(type(module))


def cache_of(module: nn.Module, kwargs: dict[str, Any]) -> Any:
    """The cache among the keywords of a call of ``module``, or None.

    If the argument is named ``cache``, transformers accepts ``past_key_values`` too, with a
    warning.
    """
    name = cache_name(module)
    if name is None:
        return None
    found = kwargs.get(name)
    if found is None and name == "cache":
        found = kwargs.get("past_key_values")
    return found


def cached_tokens(cache: Any) -> int:
    """The number of tokens in a cache; 0 for None."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2])


def how_checkpointed(base: Any) -> tuple[bool, bool]:
    """(True if hooks run inside a checkpoint, True if layers are checkpointed without gradients).

    This is for layers with the base class ``base``, found by running one without weights.
    """

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
    """True when a layer's hooks run inside its gradient checkpoint, and again in a replay.

    That is so before transformers 5.23; later versions checkpoint only ``forward``.
    """
    return _checkpoints()[0]


@_asked_once
def checkpoints_without_gradients() -> bool:
    """True when layers run within checkpoints under ``torch.no_grad`` too (before 5.24)."""
    return _checkpoints()[1]


def in_checkpoint(layer: nn.Module) -> bool:
    """True when transformers will run this layer within a checkpoint now."""
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
    """True when transformers' "sdpa" ignores the cap on scores without an error, as in 5.17.

    There it is Gemma 2's default. Later versions refuse the cap, and Gemma 2 uses "eager".
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return _ignores_softcap(sdpa_attention_forward)
