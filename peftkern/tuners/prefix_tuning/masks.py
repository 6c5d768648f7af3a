"""What transformers' models say about who sees whom, kept as said until attention needs it.

A model builds its masks before its layers run and hands them down. The mask function registered
here returns the description of a mask in place of a mask: for most calls (causal or bidirectional,
padding or none, a window or none) the attention needs no [T, S] tensor at all, and where one is
needed (packed sequences, overlays, an attention that has no prefix) it is built from the same
description, once for all layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
)

from ...ops.tracing import is_recording
from .state import PrefixState, current_with


class MaskSpec:
    """One mask over T queries and S own keys, as the arguments of transformers' mask functions.

    It stands where models expect None or a mask [B, 1, T, S], and answers what they ask of one.
    """

    ndim = 4

    def __init__(self, arguments: dict[str, Any], original: str, skipped: int = 0) -> None:
        self.arguments = arguments
        self.skipped = skipped  # queries before the first, which have no row
        self.original = original
        self.q_length: int = arguments["q_length"]
        self.kv_length: int = arguments["kv_length"]
        self.q_offset: int | Tensor = arguments["q_offset"]
        self.kv_offset: int = arguments["kv_offset"]
        self.padding: Tensor | None = arguments["attention_mask"]  # [B, past + T]
        function = arguments["mask_function"]
        self.causal = "allow_is_bidirectional_skip" not in arguments
        self.window: int | None = arguments.get("local_size")
        known = function is (causal_mask_function if self.causal else bidirectional_mask_function)
        # A skip is not allowed once anything was laid over the pattern, a packed batch included.
        windowed = (
            self.causal and self.window is not None and arguments.get("allow_is_causal_skip", False)
        )
        self.plain = known or windowed
        self.joined: Tensor | None = None  # [B, 1, T, P + S], kept here for the other layers
        self.state: PrefixState | None = None  # of the call, for layers that hand no keyword down
        self._keep: tuple[Tensor | None] | None = None
        self._visible: Tensor | None = None
        self._unprefixed: Any = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.arguments["batch_size"], 1, self.q_length, self.kv_length)

    def contiguous(self) -> MaskSpec:
        return self

    def __getitem__(self, index: tuple[slice, slice, slice, slice]) -> MaskSpec:
        """The mask of the last queries alone: Gemma 4 leaves out the others where it can."""
        parts = [part.indices(n) for part, n in zip(index, self.shape, strict=True)]
        start = parts[2][0]
        if parts != [(start if i == 2 else 0, n, 1) for i, n in enumerate(self.shape)]:
            raise ValueError(f"a mask behind a prefix cannot be cut to {index}")
        if not start:
            return self
        arguments = {
            **self.arguments,
            "q_length": self.q_length - start,
            "q_offset": self.q_offset + start,
        }
        cut = MaskSpec(arguments, self.original, self.skipped + start)
        cut.state = self.state
        return cut

    def keep(self) -> Tensor | None:
        """[B, S], False on padding; None when there is none (not looked at under tracing)."""
        if is_recording():  # nothing may be kept from within a checkpoint
            return self._padding()
        if self._keep is None:  # asked by every layer, and looking costs a GPU a stop
            self._keep = (self._padding(),)
        return self._keep[0]

    def _padding(self) -> Tensor | None:
        if self.padding is None:
            return None
        if not is_recording() and bool(self.padding.all()):
            return None  # what a static cache has not reached yet is hidden by causality
        end = self.kv_offset + self.kv_length
        short = end - self.padding.shape[-1]
        padding = F.pad(self.padding, (0, short), value=False) if short > 0 else self.padding
        return padding[:, self.kv_offset : end]

    def visible(self) -> Tensor:
        """bool [B, 1, T, S], the own part."""
        if is_recording():
            return self._own_part()
        if self._visible is None:
            self._visible = self._own_part()
        return self._visible

    def _own_part(self) -> Tensor:
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return masking_utils.sdpa_mask(**{**self.arguments, **skips})

    def unprefixed(self) -> Any:
        """What the model's own implementation would have been given."""
        if is_recording():
            return self._of_original()
        if self._unprefixed is None:
            self._unprefixed = (self._of_original(),)
        return self._unprefixed[0]

    def _of_original(self) -> Any:
        function = ALL_MASK_ATTENTION_FUNCTIONS.get(self.original)
        # an implementation without a mask function takes none, as in transformers
        return None if function is None else function(**self.arguments)


def prefix_mask(original: str, *args: Any, **arguments: Any) -> MaskSpec:
    """The mask function registered with transformers for a model whose implementation was
    ``original``. Takes what ``masking_utils.sdpa_mask`` takes."""
    names = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function")
    arguments.update(zip(names, args, strict=False))
    arguments.setdefault("q_offset", 0)
    arguments.setdefault("kv_offset", 0)
    arguments.setdefault("mask_function", causal_mask_function)
    if isinstance(arguments.setdefault("attention_mask", None), MaskSpec):
        return arguments["attention_mask"]  # made by `generate` before the model was called
    if isinstance(arguments["q_offset"], Tensor):
        arguments["q_offset"] = arguments["q_offset"].clone()  # the cache counts on in it
    spec = MaskSpec(arguments, original)
    spec.state = current_with(arguments.get("config"))
    return spec


def name_state(masks: Any, state: PrefixState | None) -> None:
    """For masks that `generate` made before the model was called."""
    for mask in masks.values() if isinstance(masks, dict) else (masks,):
        if isinstance(mask, MaskSpec):
            mask.state = state


def prefix_visible(
    virtual: int,
    length: int,
    past: int | Tensor,
    window: int | None,
    positions: Tensor | None,
    causal: bool,
    device: torch.device,
) -> Tensor:
    """bool [B or 1, 1, T, P]: the part of the prefix that is in each query's window.

    Prefix tokens count as positions 0..P-1, as in PEFT: they slide out of view.
    """
    if window is None:
        return torch.ones(1, 1, length, virtual, dtype=torch.bool, device=device)
    if positions is None:
        positions = (torch.arange(length, device=device) + past + virtual)[None]
    columns = torch.arange(virtual, device=device)
    rows = positions[:, None, :, None]  # [B or 1, 1, T, 1]
    return columns > rows - window if causal else rows - columns <= window
