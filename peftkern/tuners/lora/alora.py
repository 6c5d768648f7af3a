"""aLoRA (Greenewald et al., 2025, arXiv 2504.12397): an adapter that acts from its invocation on.

The invocation is a sequence of tokens in the input. Tokens before it are the base model's, so that
the base model's cache can be used for them.

A row's offset is the number of tokens from the start of its last invocation to the row's end; None
for a row without an invocation.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...ops import autocast
from ...utils.handing import HERE, handing
from ...utils.private import CHECKPOINT_RUNNER, checkpoint_runners
from .variant import LoraVariant

BASE = "__base__"


class ALoraLinearVariant(LoraVariant, setting="alora_invocation_tokens", layers=("linear",)):
    """On linear layers: plain LoRA for each row's last ``alora_offsets[row]`` tokens."""

    name = "aLoRA"
    call_kwargs = ("alora_offsets",)

    def update(self, layer: Any, adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        A, B = layer.lora_A[adapter], layer.lora_B[adapter]
        rows = _active_rows(result, kwargs.get("alora_offsets"))
        # also with no rows: the weights then get gradients of 0, which distributed training needs
        part = x.reshape(-1, x.shape[-1])[rows]
        if not autocast.is_on(x):
            part = part.to(A.weight.dtype)
        update = B(A(layer.lora_dropout[adapter](part))) * layer.scaling[adapter]
        wide = torch.promote_types(result.dtype, update.dtype)
        flat = result.reshape(-1, result.shape[-1]).to(wide)
        return flat.index_add(0, rows, update.to(wide)).view(result.shape)

    def merged_weight(self, layer: Any, adapter: str, weight: Tensor, base: Tensor) -> Tensor:
        raise NotImplementedError("aLoRA does not support merging.")

    def supports_lora_conversion(self) -> bool:
        """False: plain LoRA would act on every token."""
        return False

    def decline(self, layer: Any, adapter: str) -> str:
        return "aLoRA: the base layer, then the adapter on the tokens from its invocation on"

    @classmethod
    def forward_kwargs(cls, model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if not model.finds_invocations:
            return kwargs
        found = get_alora_offsets_for_forward(model, **kwargs)
        for name in ("input_ids", "inputs_embeds"):  # the call above removes them
            if name in kwargs:
                found[name] = kwargs[name]
        return found

    @classmethod
    def generate_kwargs(
        cls, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        if not model.finds_invocations:
            return kwargs
        return get_alora_offsets_for_generate(model, *args, **kwargs)

    @classmethod
    def handing(
        cls, model: Any, layers: Sequence[Any], value: Any, kwargs: dict[str, Any], repeats: int
    ) -> AbstractContextManager[None]:
        if (kwargs.get("num_beams") or 1) > 1:
            raise ValueError("Beam search not yet supported for aLoRA.")
        return handing_offsets(layers, model, [offset for offset in value for _ in range(repeats)])


def _active_rows(result: Tensor, offsets: Sequence[int | None] | None) -> Tensor:
    """Indices, int64 [n], of the tokens that are among the last ``offsets[b]`` of their row b.

    They index the B * T tokens of ``result`` [B, T, N], or the B tokens of [B, N].
    """
    if offsets is None:
        return torch.zeros(0, dtype=torch.long, device=result.device)
    batch, length = result.shape[0], result.shape[1] if result.dim() == 3 else 1
    if len(offsets) != batch:
        raise ValueError(
            f"`alora_offsets` must have one number (or None) for each row: got {len(offsets)} for "
            f"{batch} rows"
        )
    counts = [0 if o is None else min(int(o), length) for o in offsets]
    starts = length - torch.tensor(counts, device=result.device)
    active = torch.arange(length, device=result.device) >= starts[:, None]
    return active.flatten().nonzero().squeeze(1)


# -------------------------------------------------------------------- where an adapter is invoked


def calculate_alora_offsets(
    peft_config: dict[str, Any],
    active_adapter: str,
    input_ids: Tensor | None,
    adapter_names: Sequence[str] | None = None,
) -> list[int | None]:
    """Each row's offset: the number of tokens from the start of its last invocation to its end.

    None for a row without an invocation.

    Args:
        peft_config: {adapter: configuration}.
        active_adapter: the adapter of rows that name none.
        input_ids: token ids [B, T]; None: no rows.
        adapter_names: the adapter of each row; fewer than B names leave the last rows to the active
            adapter.
    """
    if input_ids is None:
        return []
    rows = list(adapter_names or [])
    rows += [active_adapter] * (input_ids.shape[0] - len(rows))
    ids = input_ids.tolist()
    return [_offset(peft_config, name, row) for name, row in zip(rows, ids, strict=False)]


def _offset(peft_config: dict[str, Any], name: str, row: list[int]) -> int | None:
    if name != BASE and name not in peft_config:
        warnings.warn(
            f"Adapter '{name}' not found in peft_config. Its row runs through the base model.",
            stacklevel=4,
        )
    tokens = getattr(peft_config.get(name), "alora_invocation_tokens", None)
    if not tokens:
        return None
    for start in range(len(row) - len(tokens), -1, -1):
        if row[start : start + len(tokens)] == list(tokens):
            return len(row) - start
    return None


def is_alora_relevant_in_batch(model: Any, adapter_names: Sequence[str] | None = None) -> bool:
    """True when the active adapter, or one that a row names, is an aLoRA."""
    names = {*model.active_adapters, *(adapter_names or ())}
    configs = (model.peft_config.get(name) for name in names)
    return any(getattr(config, "alora_invocation_tokens", None) for config in configs)


def get_alora_offsets_for_forward(
    model: Any, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """The ``kwargs`` of a forward; with ``alora_offsets`` added when an aLoRA takes part."""
    names = kwargs.get("adapter_names")
    if not is_alora_relevant_in_batch(model, names) or kwargs.get("alora_offsets") is not None:
        return kwargs
    found = None
    if input_ids is not None:
        found = calculate_alora_offsets(model.peft_config, _first(model), input_ids, names)
    elif inputs_embeds is not None:
        warnings.warn(
            "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA "
            "for this forward pass.",
            stacklevel=2,
        )
    return {**kwargs, "alora_offsets": found}


def get_alora_offsets_for_generate(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The ``kwargs`` of a generate; with ``alora_offsets`` added when an aLoRA takes part.

    The offsets are those of the prompt; they serve for all generated tokens.
    """
    names = kwargs.get("adapter_names")
    if not is_alora_relevant_in_batch(model, names) or kwargs.get("alora_offsets") is not None:
        return kwargs
    ids = kwargs.get("input_ids")
    if ids is None:
        ids = kwargs.get("inputs")
    if ids is None and args and isinstance(args[0], Tensor):
        ids = args[0]
    if ids is None:
        warnings.warn(
            "Cannot calculate aLoRA offsets during generate as input_ids are not available. "
            "Disabling aLoRA.",
            stacklevel=2,
        )
        return {**kwargs, "alora_offsets": None}
    ids = ids[None] if ids.dim() == 1 else ids
    found = calculate_alora_offsets(model.peft_config, _first(model), ids, names)
    return {**kwargs, "alora_offsets": found}


def _first(model: Any) -> str:
    """The adapter whose invocation counts: the active one; with several, the first aLoRA."""
    names = list(model.active_adapters)
    tokens = [n for n in names if getattr(model.peft_config[n], "alora_invocation_tokens", None)]
    return (tokens or names or [BASE])[0]


# -------------------------------------------------------------------- how layers hear of it


_LOCK = threading.Lock()
# {module: number of running calls for which its checkpoints must pass offsets to recomputations}
_CARRYING: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@contextmanager
def handing_offsets(layers: Sequence[Any], model: nn.Module, offsets: Any) -> Iterator[None]:
    """A context in which calls of these layers get ``alora_offsets``.

    So do the recomputations, in a later backward, of blocks that are checkpointed in it.
    """
    runs = checkpoint_runners(model)
    # all threads share the modules, so only the function is set on them, and no offsets
    with _LOCK:
        for module in runs:
            count = _CARRYING.get(module, 0)
            if count == 0:
                module.__dict__[CHECKPOINT_RUNNER] = functools.partial(
                    _checkpoint, module.__dict__[CHECKPOINT_RUNNER]
                )
            _CARRYING[module] = count + 1
    try:
        with handing({layer: {"alora_offsets": offsets} for layer in layers}):
            yield
    finally:
        with _LOCK:
            for module in runs:
                _CARRYING[module] -= 1
                run = module.__dict__.get(CHECKPOINT_RUNNER)
                if not _CARRYING[module] and getattr(run, "func", None) is _checkpoint:
                    module.__dict__[CHECKPOINT_RUNNER] = run.args[0]  # type: ignore[union-attr]


def _checkpoint(run: Callable[..., Any], function: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a checkpoint whose recomputation gets the same keywords as its forward gets here."""
    blocks = HERE.blocks

    def handed(*inner: Any, **more: Any) -> Any:
        before, HERE.blocks = HERE.blocks, blocks
        try:
            return function(*inner, **more)
        finally:
            HERE.blocks = before

    return run(handed, *args, **kwargs)
