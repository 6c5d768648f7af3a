"""Prefixes that go through the model's cache, as in HF PEFT: keys and values of P earlier tokens.

This way serves models whose attention cannot be reached. The tokens come after P tokens that are in
the cache, so masks get P more columns and positions move by P. A hook on the module that takes the
cache does this, in ``forward`` and in each step of ``generate``.

Calls that need the other way are refused: layers within a checkpoint do not write to a cache, a
static cache has no room for a prefix, and tokens in a caller's own cache have not seen the prefix.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedModel,
)

from ...utils.private import recurrent_start
from ...utils.versions import CACHE_NAMES, cache_name, cache_of, cached_tokens
from .state import (
    ActivePrefix,
    Prefix,
    active_in,
    by_row,
    current_of,
    push,
    restore,
    set_current,
)

NO_CACHE = "Model does not support past key values which are required for prefix tuning."
_MARK = "_peftkern_prefix"  # attribute of a cache's first layer: the length of the prefix in it


def taker(model: nn.Module) -> tuple[nn.Module, str] | None:
    """The module that takes a cache and the name of that argument; None when no module does.

    It is the model, or the first transformers model in it that takes one (for a classifier the
    part below its head, but no encoder that a decoder follows), or else a model that hands any
    keyword on to its layers.
    """
    parts = [m for m in model.children() if isinstance(m, PreTrainedModel)]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        parts = [part for part in parts if part is not getattr(model, "encoder", None)]
    for module in (model, *parts):
        name = cache_name(module)
        if name is not None:
            return module, name
    kinds = (p.kind for p in inspect.signature(model.forward).parameters.values())
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        return None
    steps = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return model, next(name for name in CACHE_NAMES if name in steps)


def prefix_cache(
    pairs: Sequence[Prefix | None], rows: int, model: Any, seq2seq: bool = False
) -> Cache:
    """A cache that holds the prefix for ``rows`` rows.

    Args:
        pairs: keys and values of each layer, [H_kv, P, D] or [B, H_kv, P, D] with B a divisor of
            ``rows``; None for a layer that writes to no cache.
        model: the transformers model that the cache is for.
        seq2seq: return an ``EncoderDecoderCache``, whose encoder part is empty.
    """
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind = str(getattr(text, "model_type", ""))
    # these models need their own kinds of layers: those with a window keep no more keys than that
    own = any(name in kind for name in ("gemma2", "gemma3_text", "gemma4"))
    recurrent = recurrent_start(model) is not None
    cache = DynamicCache(config=text) if own or recurrent else DynamicCache()
    places = _layer_devices(model)
    for layer, pair in enumerate(pairs):
        if pair is None or (recurrent and not hasattr(cache.layers[layer], "keys")):
            continue
        both = (
            by_row(x, rows, "prefixes") if x.dim() == 4 else x.expand(rows, -1, -1, -1)
            for x in pair
        )
        key, value = (x.to(places[layer]) if layer in places else x for x in both)
        cache.update(key, value, layer)
    return EncoderDecoderCache(cache, DynamicCache()) if seq2seq else cache


def _layer_devices(model: Any) -> dict[int, Any]:
    """{layer: its device} of a model that accelerate spread over devices; else empty."""
    places: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    found: dict[int, Any] = {}
    for name, place in places.items():
        parts = name.split(".")
        number = next((int(part) for part in parts if part.isdigit()), None)
        # offloaded layers ("cpu", "disk") run on the device of their input
        if number is not None and "encoder" not in parts and place not in ("cpu", "disk", "meta"):
            found[number] = place
    return found


@dataclass(eq=False)
class _Call:
    """The parts that one call of the module leaves out of its output."""

    drops_cache: bool


class CachedPrefix:
    """The hook by which a model takes prefixes through its cache, in place of an injection.

    It has the methods of :class:`PrefixInjection`.

    Args:
        model: a transformers model (with or without a head).
        kv_heads, head_dim, num_virtual_tokens: as :class:`PrefixInjection`.
        why: the reason that the model is not injected, for ``explain`` and errors.

    Attributes:
        stack: the module that takes the cache.
        named: True when the cache is a named argument of ``stack``; False when ``stack`` takes any
            keyword.

    Raises:
        ValueError: the model takes no cache. The message is ``why``, then HF PEFT's words.
    """

    through_cache = True
    configs = ()  # as in PrefixInjection; this way replaces no attention function

    def __init__(
        self, model: Any, *, kv_heads: int, head_dim: int, num_virtual_tokens: int, why: str
    ) -> None:
        self.why = why
        self.model = model
        self._model_name = type(model).__name__
        found = taker(model)
        if found is None:
            raise ValueError(
                f"prefix tuning does not support {self._model_name}: {why}. {NO_CACHE}"
            )
        self.stack, self.name = found
        self.named = cache_name(self.stack) is not None
        self.seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self._parameters: tuple[str, ...] = tuple(inspect.signature(self.stack.forward).parameters)
        # a whole encoder-decoder model's arguments for the decoder begin with "decoder_"
        self._side = "decoder_" if "decoder_input_ids" in self._parameters else ""
        self._kept = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self.shape = (num_virtual_tokens, kv_heads * head_dim)
        self.allow(num_virtual_tokens)
        self._handles: list[Any] = [
            self.stack.register_forward_pre_hook(self._before, with_kwargs=True),
            self.stack.register_forward_hook(self._after, with_kwargs=True),
        ]

    # -------------------------------------------------------------------------- on and off

    def allow(self, num_virtual_tokens: int, always_visible: bool = False) -> None:
        """Take prefixes of this length as well; ValueError with ``always_visible``."""
        if num_virtual_tokens <= 0:
            raise ValueError(f"num_virtual_tokens must be positive, got {num_virtual_tokens}")
        if always_visible:
            raise ValueError(
                f"prefix_always_visible is not possible for {self._model_name}, whose prefix goes "
                f"through its cache: {self.why}"
            )

    def remove(self) -> None:
        """Remove the hooks, which leaves the model as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextlib.contextmanager
    def active(
        self,
        prefixes: list[Prefix | None],
        *,
        no_prefix: Tensor | None = None,
        positions_moved: bool = False,
        always_visible: bool = False,
    ) -> Iterator[ActivePrefix]:
        """A context in which this thread's calls of the model see the prefixes.

        Arguments are those of :meth:`PrefixInjection.active`, except that ``prefixes`` is None for
        layers that share another layer's keys.

        Raises:
            ValueError: rows without a prefix; within the block, a call that this way cannot do.
        """
        if no_prefix is not None:
            raise ValueError(
                "`adapter_names`: '__base__' cannot share a batch with prefixes that go through "
                f"the cache of {self._model_name} ({self.why}); call the model apart for those rows"
            )
        given = ActivePrefix(self, tuple(prefixes), None, positions_moved)
        before = push(given)
        try:
            yield given
        finally:
            restore(before, self)

    def refuse_checkpoints(self, training: bool = True) -> None:
        """Raise a ValueError when layers of the model run in checkpoints now.

        With ``training=False`` also when they would do so once the model trains.
        """
        if any(m.gradient_checkpointing and (m.training or not training) for m in self._kept):
            raise ValueError(
                f"PREFIX_TUNING does not work with gradient checkpointing for {self._model_name}, "
                f"whose prefix goes through its cache: {self.why}"
            )

    # -------------------------------------------------------------------------------- hooks

    def _before(
        self, stack: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        entry = active_in(self)
        set_current(self, None)
        if entry is None:
            return None
        entry.seen = True
        self.refuse_checkpoints()
        kwargs = {**dict(zip(self._parameters, args, strict=False)), **given}
        P = next(pair[0].shape[-2] for pair in entry.prefixes if pair is not None)
        kwargs[self.name] = self._with_prefix(kwargs, entry, P)
        self._lengthen_mask(kwargs, P)
        ids = f"{self._side}position_ids"
        moved = entry.positions_moved and not self.seq2seq
        if kwargs.get(ids) is not None and not moved:
            kwargs[ids] = kwargs[ids] + P
        drops = False
        if "use_cache" in self._parameters:
            wanted = kwargs.get("use_cache")
            if wanted is None:
                wanted = getattr(getattr(stack, "config", None), "use_cache", True)
            if not wanted:  # with use_cache=False some models ignore the cache, or parts of it
                kwargs["use_cache"], drops = True, True
        set_current(self, _Call(drops))  # type: ignore[arg-type]
        return (), kwargs

    def _with_prefix(self, kwargs: dict[str, Any], entry: ActivePrefix, P: int) -> Cache:
        """The cache to call the module with; the caller's own one, filled, where one is given."""
        cache = cache_of(self.stack, kwargs)
        if self.name != "past_key_values":
            kwargs.pop("past_key_values", None)  # the other name, for models that take both
        if cache is None:
            return self._made(kwargs, entry, P)
        own = getattr(cache, "self_attention_cache", cache)
        held = cached_tokens(own)
        layers = getattr(own, "layers", None) or (None,)
        if held and getattr(layers[0], _MARK, None) == P:
            return cache  # it holds this prefix: the call continues an earlier one
        if held or type(own) is not DynamicCache:
            what = f"a {type(own).__name__} of {held} tokens without the prefix of {P}"
            raise ValueError(
                f"the prefix of {self._model_name} goes through its cache ({self.why}), and the "
                f"call has {what}. Allowed: none, an empty DynamicCache, or one that an earlier "
                "call with the prefix has filled"
            )
        made = self._made(kwargs, entry, P)
        own.layers = getattr(made, "self_attention_cache", made).layers  # fills the caller's object
        return cache

    def _made(self, kwargs: dict[str, Any], entry: ActivePrefix, P: int) -> Cache:
        rows = _rows(kwargs)
        cache = prefix_cache(entry.prefixes, rows, self.model, self.seq2seq)
        layers: Any = getattr(cache, "self_attention_cache", cache).layers
        setattr(layers[0], _MARK, P)
        begin = recurrent_start(self.model)
        if begin is not None:  # recurrent layers reset their state at position 0, so not after P
            begin(self.model.config, rows, self.model.device, self.model.dtype)
        return cache

    def _lengthen_mask(self, kwargs: dict[str, Any], P: int) -> None:
        name = f"{self._side}attention_mask"
        mask = kwargs.get(name)
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"`{name}` must be [batch, tokens] so that the prefix can be put in front of it, "
                f"got {shape}"
            )
        kwargs[name] = torch.cat((mask.new_ones(mask.shape[0], P), mask), dim=1)

    def _after(self, stack: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call: Any = current_of(self)
        set_current(self, None)
        if not isinstance(call, _Call) or not call.drops_cache:
            return None
        if isinstance(output, tuple):
            return tuple(part for part in output if not isinstance(part, Cache))
        if hasattr(output, "items"):
            kept = {k: v for k, v in output.items() if not isinstance(v, Cache)}
            return type(output)(**kept)
        return None


def _rows(kwargs: dict[str, Any]) -> int:
    """Number of rows in a call's batch; in an encoder-decoder model's, the decoder's."""
    names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds", "labels")
    for name in names:
        if kwargs.get(name) is not None:
            return kwargs[name].shape[0]
    given = (x for x in kwargs.values() if isinstance(x, Tensor) and x.dim() > 0)
    first = next(given, None)
    if first is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    return first.shape[0]
