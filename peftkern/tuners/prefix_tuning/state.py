"""The prefixes that are active in a thread, and the state of one forward call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops.tracing import is_recording

Prefix = tuple[Tensor, Tensor]  # keys and values, each [H_kv, P, D] or [B, H_kv, P, D]


# A thread-local and not a context variable: torch.compile reads and guards a thread-local, and
# breaks the graph at a context variable. It is read once, when a forward call begins. From there
# the state is passed as a keyword, so that a replay under gradient checkpointing (in any thread,
# after any other call) sees the state of its own forward.
class _Local(threading.local):
    def __init__(self) -> None:  # runs in each thread, at its first access
        self.active: tuple[ActivePrefix, ...] = ()
        self.current: tuple[tuple[Any, PrefixState], ...] = ()


_local = _Local()


@dataclass(eq=False)
class ActivePrefix:
    """The prefixes of one ``PrefixInjection.active`` block; ``seen`` is True after a call began."""

    owner: Any
    prefixes: tuple[Prefix | None, ...]
    no_prefix: Tensor | None
    positions_moved: bool = False
    always_visible: bool = False
    seen: bool = False


def offset_behind(virtual: int, no_prefix: Tensor | None) -> int | Tensor:
    """The number to add to positions: P, or int64 [B, 1] when some rows have no prefix."""
    return virtual if no_prefix is None else (~no_prefix).long()[:, None] * virtual


class PrefixState:
    """The state of one forward call: all that its attention layers need to know of the prefix.

    It is no dataclass: FSDP casts the tensors in the arguments of the modules that it gathers for,
    and replaces each dataclass among them by a copy; layers would note their hits on that.

    Args:
        prefixes: for each layer (keys, values), or None.
        no_prefix: bool [B], True for rows that see no prefix; or None.
        virtual: P.
        past: the number of own tokens that are in the cache already.
        positions_moved: True when the caller's ``position_ids`` count the prefix already.
    """

    def __init__(
        self,
        prefixes: tuple[Prefix | None, ...],
        no_prefix: Tensor | None,
        virtual: int,
        past: int | Tensor,
        positions_moved: bool = False,
    ) -> None:
        self.prefixes = prefixes
        self.no_prefix = no_prefix
        self.virtual = virtual
        self.past = past
        self.positions_moved = positions_moved
        self.always_visible = False  # True: no window hides the prefix
        self.weights = False  # True: attention weights are to be returned
        self.positions: Tensor | None = None  # positions of a packed batch's tokens, with P added
        self.bias_module: Any = None  # T5: the attention module with all layers' relative bias
        self.alibi: Tensor | None = None  # Falcon: [B * H, 1, P + S]
        self.made: list[tuple[tuple[Any, ...], Tensor]] = []  # see once()
        # leaves, and the prefixes behind them
        self.collected: tuple[list[Tensor], list[Tensor]] | None = None
        self.hits: set[int] = set()  # slots that have seen their prefix or have none
        self.entered: set[int] = set()  # slots of called layers, if layers are skipped
        self.trains = False  # True: gradients go to the prefixes directly, not through leaves
        self.injection = 0  # number of the PrefixInjection
        self.checkpointed = False  # True: layers run within checkpoints

    def hit(self, slot: int) -> None:
        """Note that the attention of this slot has seen its prefix.

        Raises:
            RuntimeError: the layer runs without gradients in a call whose prefixes need them.
        """
        if self.trains and not torch.is_grad_enabled():
            raise RuntimeError(
                f"layer {slot} runs without gradients in a call with them, as in a reentrant "
                "checkpoint: its prefix would get none. Allowed: "
                "gradient_checkpointing_enable(), or checkpoints with use_reentrant=False"
            )
        if self.checkpointed and torch.compiler.is_compiling():
            _hit_in_trace(self.injection, slot)
        else:
            self.hits.add(slot)

    def once(self, given: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        """The result of ``make``, kept for the next layers that pass the same objects ``given``."""
        if is_recording():  # a compiler shares it itself, and no tensor of a trace may be kept
            return make()
        for known, tensor in self.made:
            if len(known) == len(given) and all(a is b for a, b in zip(known, given, strict=True)):
                return tensor
        del self.made[:-1]  # with the new one two are kept: a mask and a bias, or two masks
        self.made.append((given, make()))
        return self.made[-1][1]

    @property
    def offset(self) -> int | Tensor:
        """The number to add to positions, see :func:`offset_behind`."""
        return offset_behind(self.virtual, self.no_prefix)

    def pair(self, slot: int, key: Tensor, value: Tensor) -> Prefix:
        """The prefix of a layer, on the device and in the dtype of its own keys and values.

        Those are ``key`` and ``value``, [B, H_kv, S, D].

        Raises:
            ValueError: the prefix has another number of heads or another width.
        """
        pair = self.prefixes[slot]
        assert pair is not None
        out = []
        for prefix, own in zip(pair, (key, value), strict=True):
            if prefix.shape[-3] != own.shape[1] or prefix.shape[-1] != own.shape[-1]:
                raise ValueError(
                    f"the prefix of layer {slot} has {prefix.shape[-3]} heads of "
                    f"{prefix.shape[-1]}; the keys of the layer have {key.shape[1]} of "
                    f"{key.shape[-1]}, its values {value.shape[1]} of {value.shape[-1]}"
                )
            out.append(prefix.to(device=own.device, dtype=own.dtype))
        return out[0], out[1]


# {number of an injection: slots traced by a compiler}. Compiled code inside a checkpoint may not
# change objects outside of it, so there a hit is noted once, while the layer is traced. Compiled
# code passes the prefix either at every call or at none, so once is enough.
_traced: dict[int, set[int]] = {}


@torch.compiler.assume_constant_result
def _hit_in_trace(injection: int, slot: int) -> int:
    _traced.setdefault(injection, set()).add(slot)
    return slot


@torch.compiler.assume_constant_result
def traced_slots(injection: int) -> tuple[int, ...]:
    """The slots that saw their prefix while a compiler traced them in a checkpoint."""
    return tuple(sorted(_traced.get(injection, ())))


def active_in(owner: Any) -> ActivePrefix | None:
    """The prefixes of this injection's innermost open block in this thread; None without one."""
    for entry in _local.active:
        if entry.owner is owner:
            return entry
    return None


def push(entry: ActivePrefix) -> tuple[ActivePrefix, ...]:
    """Make ``entry`` the innermost; returns the entries before it, for :func:`restore`."""
    before = _local.active
    _local.active = (entry, *before)
    return before


def restore(before: tuple[ActivePrefix, ...], owner: Any) -> None:
    """End a block: ``before`` is active again, and no call of ``owner`` is noted as running.

    A call that failed is still noted, which would keep the model and its prefixes in memory.
    """
    _local.active = before
    set_current(owner, None)


def set_current(owner: Any, state: PrefixState | None) -> None:
    """Note ``owner``'s forward call that runs in this thread, for hooks deeper in the model."""
    others = tuple(c for c in _local.current if c[0] is not owner)
    _local.current = others if state is None else (*others, (owner, state))


def current_of(owner: Any) -> PrefixState | None:
    for held, state in _local.current:
        if held is owner:
            return state
    return None


def current_with(config: Any) -> PrefixState | None:
    """The forward call that runs in this thread in the module with this configuration, or None."""
    for held, state in _local.current:
        if any(config is one for one in held.configs):
            return state
    return None


def by_row(tensor: Tensor, batch: int, what: str) -> Tensor:
    """``tensor`` [B0, ...] repeated to [B, ...], for B a multiple of B0 (beams, say)."""
    rows = tensor.shape[0]
    if rows == batch:
        return tensor
    if batch % rows:
        raise ValueError(
            f"{what} is for {rows} rows; the batch has {batch}, which is no multiple of it"
        )
    return tensor.repeat_interleave(batch // rows, dim=0)


def begin(entry: ActivePrefix, batch: int, virtual: int, past: int | Tensor) -> PrefixState:
    """The state of a forward call on ``batch`` rows with ``past`` tokens in the cache."""
    prefixes = tuple(
        pair
        if pair is None or pair[0].dim() == 3
        else (by_row(pair[0], batch, "prefixes"), by_row(pair[1], batch, "prefixes"))
        for pair in entry.prefixes
    )
    no_prefix = entry.no_prefix
    if no_prefix is not None:
        no_prefix = by_row(no_prefix, batch, "no_prefix")
    if isinstance(past, torch.Tensor):
        past = past.clone()  # a static cache increases this tensor in place
    state = PrefixState(prefixes, no_prefix, virtual, past, entry.positions_moved)
    state.hits.update(slot for slot, pair in enumerate(prefixes) if pair is None)
    return state
