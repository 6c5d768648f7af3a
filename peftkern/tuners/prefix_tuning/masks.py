"""``MaskSpec``: the description of an attention mask, kept until attention needs a tensor.

A transformers model builds its masks before its layers run and hands them down. The mask function
registered here returns a description in place of a mask. For most calls (causal or bidirectional,
with padding or a window or without) the attention needs no [T, S] tensor at all. Where it needs one
(packed sequences, overlays, an attention without a prefix), that is built from the description,
once for all layers.
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
    """A mask over T queries and S own keys, as the arguments of transformers' mask functions.

    Models pass it where they expect None or a mask [B, 1, T, S]; it has the attributes and methods
    that they use of a mask.
    """

    ndim = 4

    def __init__(self, arguments: dict[str, Any], original: str, skipped: int = 0) -> None:
        self.arguments = arguments
        self.skipped = skipped  # number of earlier queries for which this mask has no rows
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
        # transformers sets this to False when the mask is more than the pattern (a packed batch)
        windowed = (
            self.causal and self.window is not None and arguments.get("allow_is_causal_skip", False)
        )
        self.plain = known or windowed
        self.joined: Tensor | None = None  # [B, 1, T, P + S], made by one layer for all others
        self.state: PrefixState | None = None  # the call's, for layers that pass no keywords on
        self._keep: tuple[Tensor | None] | None = None
        self._visible: Tensor | None = None
        self._unprefixed: Any = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.arguments["batch_size"], 1, self.q_length, self.kv_length)

    def contiguous(self) -> MaskSpec:
        return self

    def __getitem__(self, index: tuple[slice, slice, slice, slice]) -> MaskSpec:
        """The mask of the last queries alone, which Gemma 4 asks for where it needs no others.

        Raises:
            ValueError: an index of any other part.
        """
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
        """bool [B, S], False on padding; None without padding (a trace does not read values)."""
        if is_recording():  # a tensor made inside a checkpoint must not be kept
            return self._padding()
        if self._keep is None:  # kept for all layers: reading the values makes a GPU wait
            self._keep = (self._padding(),)
        return self._keep[0]

    def _padding(self) -> Tensor | None:
        if self.padding is None:
            return None
        if not is_recording() and bool(self.padding.all()):
            return None  # the unused end of a static cache is hidden by the causal mask
        end = self.kv_offset + self.kv_length
        short = end - self.padding.shape[-1]
        padding = F.pad(self.padding, (0, short), value=False) if short > 0 else self.padding
        return padding[:, self.kv_offset : end]

    def visible(self) -> Tensor:
        """The mask of the own keys, bool [B, 1, T, S], True where a key is visible."""
        if is_recording():
            return self._own_part()
        if self._visible is None:
            self._visible = self._own_part()
        return self._visible

    def _own_part(self) -> Tensor:
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return masking_utils.sdpa_mask(**{**self.arguments, **skips})

    def unprefixed(self) -> Any:
        """The mask that the model's own implementation would have been given."""
        if is_recording():
            return self._of_original()
        if self._unprefixed is None:
            self._unprefixed = (self._of_original(),)
        return self._unprefixed[0]

    def _of_original(self) -> Any:
        function = ALL_MASK_ATTENTION_FUNCTIONS.get(self.original)
        # an implementation without a mask function gets no mask, as in transformers
        return None if function is None else function(**self.arguments)


def prefix_mask(original: str, *args: Any, **arguments: Any) -> MaskSpec:
    """The mask function that is registered with transformers in place of that of ``original``.

    Arguments are those of ``masking_utils.sdpa_mask``.
    """
    names = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function")
    arguments.update(zip(names, args, strict=False))
    arguments.setdefault("q_offset", 0)
    arguments.setdefault("kv_offset", 0)
    arguments.setdefault("mask_function", causal_mask_function)
    if isinstance(arguments.setdefault("attention_mask", None), MaskSpec):
        return arguments["attention_mask"]  # `generate` made it before it called the model
    if isinstance(arguments["q_offset"], Tensor):
        arguments["q_offset"] = arguments["q_offset"].clone()  # the cache increases it in place
    spec = MaskSpec(arguments, original)
    spec.state = current_with(arguments.get("config"))
    return spec


def name_state(masks: Any, state: PrefixState | None) -> None:
    """Set the state of ``masks`` that `generate` made before it called the model."""
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
    """The part of the prefix inside each query's window, bool [B or 1, 1, T, P].

    Prefix tokens have positions 0..P-1, as in PEFT, so later queries no longer see them.
    """
    if window is None:
        return torch.ones(1, 1, length, virtual, dtype=torch.bool, device=device)
    if positions is None:
        positions = (torch.arange(length, device=device) + past + virtual)[None]
    columns = torch.arange(virtual, device=device)
    rows = positions[:, None, :, None]  # [B or 1, 1, T, 1]
    return columns > rows - window if causal else rows - columns <= window
