"""Calls of a model with prompts: the changes to their inputs and to each step of generation."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...utils.generation import generation_setting, row_repeats
from ...utils.handing import handing
from ...utils.versions import cache_name, cache_of, cached_tokens
from ..modules_to_save import ModulesToSaveWrapper
from ..prefix_tuning import PrefixTuningConfig
from ..prefix_tuning.state import offset_behind
from ..tuner import Decoding
from ..wrapped import innermost
from .pooling import reading_last_tokens
from .prompts import BASE

# -------------------------------------------------------------------- what is checked


def batch_and_length(model: Any, kwargs: dict[str, Any]) -> tuple[int, int]:
    """(rows, tokens) of a call's inputs; ValueError without inputs.

    The input of a model with a prefix need not be tokens (Whisper's is features).
    """
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            return kwargs[name].shape[0], kwargs[name].shape[1]
    given = kwargs.get(getattr(innermost(model), "main_input_name", None) or "")
    if given is not None and isinstance(model.active_peft_config, PrefixTuningConfig):
        return given.shape[0], 0
    raise ValueError("You have to provide either input_ids or inputs_embeds")


def _cached(model: Any, kwargs: dict[str, Any]) -> int:
    """Number of tokens in the cache among a call's keywords; 0 without a cache."""
    return cached_tokens(cache_of(innermost(model), kwargs))


# -------------------------------------------------------------------- what the inputs become


def _longer(tensor: Tensor, P: int, value: int) -> Tensor:
    """``tensor`` [B, T] with P columns of ``value`` in front, [B, P + T]."""
    front = tensor.new_full((tensor.shape[0], P), value)
    return torch.cat((front, tensor), dim=1)


def _drop(kwargs: dict[str, Any], name: str, words: str) -> None:
    if kwargs.get(name) is not None:
        warnings.warn(
            f"{words} are not supported for parameter efficient tuning. Ignoring {words.lower()}.",
            stacklevel=4,
        )
        kwargs[name] = None


def _masked(kwargs: dict[str, Any], P: int) -> None:
    mask = kwargs.get("attention_mask")
    if mask is None:
        return
    if mask.dim() != 2:
        raise ValueError(
            "`attention_mask` must be [batch, tokens] so that virtual tokens can be put in front "
            f"of it, got {tuple(mask.shape)}"
        )
    kwargs["attention_mask"] = _longer(mask, P, 1)


def with_prompt(model: Any, kwargs: dict[str, Any], prompts: Tensor) -> dict[str, Any]:
    """``kwargs`` with the virtual tokens ``prompts`` [B, P, dim] in front of the input.

    For these P tokens masks get ones, labels of tokens -100 and token types 0. When the call has a
    cache with tokens, the prompt is among these and is not added again.
    """
    kwargs = dict(kwargs)
    P = prompts.shape[1]
    _drop(kwargs, "position_ids", "Position ids")
    if not model.keeps_token_types:
        _drop(kwargs, "token_type_ids", "Token type ids")
    _masked(kwargs, P)
    if not model.prompt_in_encoder and _cached(model, kwargs):
        return kwargs
    if kwargs.get("token_type_ids") is not None:
        kwargs["token_type_ids"] = _longer(kwargs["token_type_ids"], P, 0)
    if model.labels_are_tokens and kwargs.get("labels") is not None:
        kwargs["labels"] = _longer(kwargs["labels"], P, -100)
    ids, embeds = kwargs.pop("input_ids", None), kwargs.get("inputs_embeds")
    embeds = model.word_embeddings(ids) if embeds is None else embeds
    kwargs["inputs_embeds"] = torch.cat((prompts.to(embeds), embeds), dim=1)
    return kwargs


@contextmanager
def named_rows(model: Any, rows: list[str] | None, times: int = 1) -> Iterator[None]:
    """A context in which each row of the batch goes through the heads of its own adapter.

    ``times``: the number of copies that generate() makes of each row after it has run the encoder.
    """
    if rows is None:
        yield
        return
    base = innermost(model)
    encoder = base.get_encoder() if times > 1 and hasattr(base, "get_encoder") else None
    once = set() if encoder in (None, base) else set(encoder.modules())

    repeated = [name for name in rows for _ in range(times)]
    heads = [m for m in base.modules() if isinstance(m, ModulesToSaveWrapper)]
    with handing({module: rows if module in once else repeated for module in heads}):
        yield


# -------------------------------------------------------------------- forward


def prompted_forward(tuner: Any, model: Any, kwargs: dict[str, Any]) -> Any:
    """The base model's forward, with the active adapter's prompt or each row's own."""
    names = kwargs.pop("adapter_names", None)
    base = model.base_model
    if not model.has_active_enabled_adapter:
        return base(**kwargs)
    batch, tokens = batch_and_length(model, kwargs)
    rows = tuner.rows(names, batch)
    config = model.active_peft_config
    with named_rows(model, rows):
        if isinstance(config, PrefixTuningConfig):
            if not model.keeps_token_types:
                _drop(kwargs, "token_type_ids", "Token type ids")
            _check_prefix_room(tuner, model, kwargs, rows, tokens)
            with prefixed(tuner, model, batch, rows, kwargs):
                return base(**kwargs)
        prompts = tuner.prompts(model, batch, rows)
        if prompts is None:
            return base(**kwargs)
        if _cached(model, kwargs):
            return base(**with_prompt(model, kwargs, prompts))
        tuner.room.check(prompts.shape[1], tokens)
        with reading_last_tokens(model, kwargs, prompts.shape[1]):
            return base(**with_prompt(model, kwargs, prompts))


def _check_prefix_room(
    tuner: Any, model: Any, kwargs: dict[str, Any], rows: Any, tokens: int
) -> None:
    cache = cache_of(innermost(model), kwargs)
    if kwargs.get("position_ids") is not None or cache is not None:
        return  # positions do not depend on the input's length then
    if getattr(innermost(model).config, "is_encoder_decoder", False):  # count the decoder's tokens
        labels = ("labels",) if model.prompt_in_encoder else ()
        given = (kwargs.get(n) for n in ("decoder_input_ids", "decoder_inputs_embeds", *labels))
        target = next((x for x in given if x is not None), None)
        if target is not None:
            tokens = target.shape[1]
        elif model.prompt_in_encoder:  # generation starts with one token
            tokens = 1
    tuner.room.check(tuner.virtual_tokens(model, rows), tokens)


@contextmanager
def prefixed(
    tuner: Any,
    model: Any,
    batch: int,
    rows: list[str] | None,
    kwargs: dict[str, Any] | None = None,
) -> Iterator[None]:
    """A context in which the base model's attention sees the prefixes.

    Adds P to the ``position_ids`` in ``kwargs`` (those of a call of the base model), because HF
    PEFT calls the base model with positions that count the prefix.
    """
    named = [name for name in rows or [model.active_adapter] if name != BASE]
    if not named:  # no row has a prefix
        yield
        return
    config = model.peft_config[named[0]]
    injection = tuner.inject(model, config)
    prefixes, no_prefix = tuner.prefix_layers(model, batch, rows)
    more: dict[str, Any] = {} if no_prefix is None else {"no_prefix": no_prefix}
    if config.prefix_always_visible:
        more["always_visible"] = True
    if kwargs is not None and kwargs.get("position_ids") is not None:
        move = offset_behind(config.num_virtual_tokens, no_prefix)
        kwargs["position_ids"] = kwargs["position_ids"] + move
        more["positions_moved"] = True
    with injection.active(prefixes, **more) as given:
        yield
    if not given.seen:
        stack = type(injection.stack).__name__
        raise RuntimeError(
            f"the call did not reach the {stack} whose attention takes the prefix (or went to its "
            "`forward`, past its hooks): what was computed is without the prefix"
        )


# -------------------------------------------------------------------- generation


def prompted_generate(tuner: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The base model's ``generate``, with the active adapter's prompt or each row's own."""
    names = kwargs.pop("adapter_names", None)
    base = model.base_model
    if not model.has_active_enabled_adapter:
        return base.generate(*args, **kwargs)
    if args:
        if any(kwargs.get(n) is not None for n in ("inputs", "input_ids")):
            raise TypeError("generate got input_ids both by position and by name")
        kwargs["input_ids"], args = args[0], args[1:]
    if kwargs.get("inputs") is not None:
        kwargs["input_ids"] = kwargs.pop("inputs")
    batch, tokens = batch_and_length(model, kwargs)
    rows = tuner.rows(names, batch)
    times = (
        1 if rows is None else row_repeats(base, args, kwargs)
    )  # generate() repeats rows for the beams
    with named_rows(model, rows, times):
        if rows is not None and set(rows) == {BASE}:
            return base.generate(*args, **kwargs)
        if isinstance(model.active_peft_config, PrefixTuningConfig):
            return _prefixed_generate(tuner, model, args, kwargs, batch, rows)
        tuner.room.check(tuner.virtual_tokens(model, rows), tokens)
        if model.prompt_in_encoder:
            return _encoder_generate(model, args, kwargs, tuner.prompts(model, batch, rows))
        _check_cache(innermost(model), kwargs)
        with _prepared_by(tuner, model, rows):
            return base.generate(*args, **kwargs)


def _prefixed_generate(
    tuner: Any, model: Any, args: Any, kwargs: dict[str, Any], batch: int, rows: Any
) -> Any:
    if not model.keeps_token_types:
        _drop(kwargs, "token_type_ids", "Token type ids")
    _check_prefix_room(tuner, model, kwargs, rows, batch_and_length(model, kwargs)[1])
    with prefixed(tuner, model, batch, rows):  # a row's prefix serves all of its beams
        return model.base_model.generate(*args, **kwargs)


def _encoder_generate(model: Any, args: Any, kwargs: dict[str, Any], prompts: Tensor) -> Any:
    kwargs.pop("task_ids", None)
    if kwargs.pop("encoder_outputs", None) is not None:
        warnings.warn(
            "`encoder_outputs` should not be passed to `generate` when using prompt tuning. "
            "Ignoring it.",
            stacklevel=4,
        )
    kwargs = with_prompt(model, kwargs, prompts)
    given = {name: value for name, value in kwargs.items() if value is not None}
    return model.base_model.generate(*args, **given)


def _check_cache(base: Any, kwargs: dict[str, Any]) -> None:
    how = generation_setting(base, kwargs, "cache_implementation")
    if isinstance(how, str) and "static" in how:
        raise ValueError(
            f"cache_implementation={how!r} makes a cache without room for the virtual tokens; "
            f"pass `{cache_name(base)}=StaticCache(config, max_cache_len=...)` with room for them"
        )


class _Here(threading.local):
    def __init__(self) -> None:  # runs once in each thread, see `utils.handing`
        # {id of a transformers model: the function that prepares its steps} in this thread
        self.prepare: dict[int, Callable[..., dict[str, Any]]] = {}


_here = _Here()
_installing = threading.Lock()


@contextmanager
def _prepared_by(tuner: Any, model: Any, rows: list[str] | None) -> Iterator[None]:
    """A context in which the transformers model prepares this thread's steps with the prompts."""
    base = innermost(model)
    was = _here.prepare
    _here.prepare = {**was, id(base): lambda *a, **k: prepare_step(tuner, model, rows, a, k)}
    with _installing:
        found = base.__dict__.get("prepare_inputs_for_generation")
        if not hasattr(found, "threads_inside"):
            base.prepare_inputs_for_generation = found = _by_thread(model, base, found)
        found.threads_inside += 1
    try:
        yield
    finally:
        _here.prepare = was
        with _installing:
            found.threads_inside -= 1
            if not found.threads_inside:
                del base.prepare_inputs_for_generation
                if found.own is not None:
                    base.prepare_inputs_for_generation = found.own


def _by_thread(model: Any, base: Any, own: Any) -> Any:
    """A ``prepare_inputs_for_generation`` for ``base`` that calls the current thread's function.

    It is set while any thread generates with prompts. ``own`` is the attribute of that name that
    ``base`` itself (not its class) had before, if any.
    """
    original = model.base_model_prepare_inputs_for_generation

    @functools.wraps(original)  # generate() reads its names
    def prepare(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return _here.prepare.get(id(base), original)(*args, **kwargs)

    prepare.threads_inside = 0  # type: ignore[attr-defined]
    prepare.own = own  # type: ignore[attr-defined]
    return prepare


def prepare_step(
    tuner: Any,
    model: Any,
    rows: list[str] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """The inputs of one step of generation: the first step gets the prompt, all get its mask.

    Args:
        tuner: the tuner of ``model``.
        model: a PeftModel with a prompt in front of the input.
        rows: the adapter of each row before generate() repeated them, or None.
        args, kwargs: those of the base model's ``prepare_inputs_for_generation``.
    """
    prepare: Callable[..., dict[str, Any]] = model.base_model_prepare_inputs_for_generation
    on = model.has_active_enabled_adapter and not model.prompt_in_encoder
    if not on or isinstance(model.active_peft_config, PrefixTuningConfig):
        return prepare(*args, **kwargs)
    kwargs = dict(kwargs)
    ids = args[0] if args else kwargs.pop("input_ids", None)
    P = tuner.virtual_tokens(model, rows)
    for name in ("position_ids", "token_type_ids", "task_ids"):  # these do not count the prompt
        kwargs.pop(name, None)
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        kwargs["attention_mask"] = _longer(mask, P, 1)
    extended = kwargs.get("attention_mask")
    before = _cached(model, kwargs)
    if before:
        if kwargs.get("is_first_iteration"):  # starts with a cache, which holds the prompt
            kwargs["next_sequence_length"] = ids.shape[1] - (before - P)
        return prepare(ids, **kwargs)
    embeds = kwargs.pop("inputs_embeds", None)
    embeds = model.word_embeddings(ids) if embeds is None else embeds
    batch = embeds.shape[0]
    if rows is not None:
        rows = [name for name in rows for _ in range(batch // len(rows))]
    prompts = tuner.prompts(model, batch, rows)
    embeds = torch.cat((prompts.to(embeds), embeds), dim=1)
    first = {**kwargs, "is_first_iteration": True, "next_sequence_length": None}
    out = prepare(ids, inputs_embeds=embeds, **first)
    out["inputs_embeds"], out["input_ids"] = embeds, None
    made = out.get("attention_mask")
    if isinstance(made, Tensor) and made.dim() == 4 and made.shape[-1] < embeds.shape[1]:
        out["attention_mask"] = extended  # replaces a mask that was made without the prompt
    return out


# -------------------------------------------------------------------- single steps


def decoding(tuner: Any, model: Any, ids: Tensor, names: Any) -> Decoding:
    """How single steps of the base model get the prompts of their rows."""
    if not model.has_active_enabled_adapter:
        return Decoding(nullcontext, dict)
    rows = tuner.rows(names, len(ids))
    heads = functools.partial(named_rows, model, rows)
    if rows is not None and set(rows) == {BASE}:
        return Decoding(heads, dict)
    if isinstance(model.active_peft_config, PrefixTuningConfig):

        @contextmanager
        def step() -> Iterator[None]:
            with heads(), prefixed(tuner, model, len(ids), rows):
                yield

        return Decoding(step, dict)

    def first(kwargs: dict[str, Any]) -> dict[str, Any]:
        return with_prompt(model, kwargs, tuner.prompts(model, len(ids), rows))

    return Decoding(heads, first, tuner.virtual_tokens(model, rows))
