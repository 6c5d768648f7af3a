"""``PrefixInjection``: hands prefixes to the attention of every layer of a transformers model.

A prefix then needs no tokens, no place in the cache and no copy for each row of the batch.
``PrefixInjection`` puts hooks on the module that owns the layers (in an encoder-decoder model, the
decoder's) and replaces its attention implementation. Calls change only inside ``active``, which is
given the prefixes; ``remove`` takes the hooks out again.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...utils.private import KEEPS_CACHE, attention_name, keep_cache, set_attention
from ...utils.versions import cache_of, in_checkpoint, parameters_of
from . import attention, blocks, deberta, positions, reentrant
from .families import find
from .masks import name_state
from .outside import Outside
from .state import (
    ActivePrefix,
    Prefix,
    PrefixState,
    active_in,
    begin,
    current_of,
    push,
    restore,
    set_current,
    traced_slots,
)

_numbers = itertools.count(1)


class PrefixInjection:
    """The hooks and marks by which a model takes prefixes.

    Args:
        model: a transformers model (with or without a head); it keeps its weights and its class.
        num_layers: how many layers the prefixes are for.
        kv_heads: heads of the keys (H_kv); those of the largest layer, where layers differ.
        head_dim: width of a head (D); that of the largest layer, where layers differ.
        num_virtual_tokens: length of the prefix (P); :meth:`allow` adds further lengths.
        always_visible: see :meth:`allow`.

    Raises:
        NotInjectable: the model's attention cannot be reached; names the model's class.
        ValueError: the sizes are not the model's, or the model takes prefixes already.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        num_virtual_tokens: int,
        always_visible: bool = False,
    ) -> None:
        found = find(model, num_layers)
        if any(hasattr(m, attention.SLOT) for m in found.attentions):
            raise ValueError(
                f"prefix tuning does not support {type(model).__name__}: it takes prefixes "
                "already; remove the first injection"
            )
        self.note = ""  # for explain: the reason that no comparison with the cache was made
        self.pending = False  # True: the comparison was not possible yet and may be later
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.num_virtual_tokens = num_virtual_tokens
        self.lengths: set[int] = set()
        self.family = found.family
        self.stack = found.stack
        self.layers = found.layers
        self.attentions = found.attentions
        self._number = next(_numbers)
        self._model_name = type(model).__name__
        self._parameters = tuple(inspect.signature(found.stack.forward).parameters)
        self._blocks = found.family.block is not None
        self._handles: list[Any] = []
        self._outside: list[Outside] = []  # hooks of layers
        self._removed = False  # a bool because torch.compile cannot read the handles
        self.configs = found.configs
        self.judged = self.foreign()  # attention functions in place when this way was chosen
        self.allow(num_virtual_tokens, always_visible)
        self._install()

    # -------------------------------------------------------------------------- on and off

    def allow(self, num_virtual_tokens: int, always_visible: bool = False) -> None:
        """Take prefixes of this length (P) as well.

        Adapters of different lengths are active one after the other, or at the same time in
        different threads.

        Raises:
            ValueError: the length is not positive; or with ``always_visible``, the model has
                windows that would hide the prefix nevertheless.
        """
        if num_virtual_tokens <= 0:
            raise ValueError(f"num_virtual_tokens must be positive, got {num_virtual_tokens}")
        reason = blocks.why_not_always_visible(self.attentions) if always_visible else None
        if reason:
            raise ValueError(f"prefix tuning does not support {self._model_name}: {reason}")
        self.lengths.add(num_virtual_tokens)

    def _install(self) -> None:
        for slot, module in enumerate(self.attentions):
            setattr(module, attention.SLOT, slot)
        if self.family.block == "relative_pos":
            for module in self.attentions:
                deberta.stand_before(module)
        if self._blocks:
            for slot, block in enumerate(self.layers):
                # a replay may use the object in place of the cache, as that writes to no cache
                keep_cache(block)
                own = (_BlockHook(self, slot), *([self._at_first] if slot == 0 else []))
                self._outside.append(Outside(self, block, *own))
        else:
            self._stand_before()
            self._outside.append(Outside(self, self.layers[0], self._at_first))
        if hasattr(self.stack, "layerdrop"):
            for slot, layer in enumerate(self.layers):
                self._handles.append(layer.register_forward_pre_hook(_Entered(self, slot)))
        if self.family.positions == "table":
            table = self.stack.embed_positions
            self._handles.append(table.register_forward_pre_hook(self._at_table, with_kwargs=True))
            self._handles.append(table.register_forward_hook(self._after_table, with_kwargs=True))
        stack = self.stack
        self._handles.append(stack.register_forward_pre_hook(self._before, with_kwargs=True))
        self._handles.append(stack.register_forward_hook(self._after, with_kwargs=True))

    def foreign(self) -> set[str]:
        """Names of the functions that now replace transformers' own attention."""
        return {name for config in self.configs if (name := attention.foreign(config))}

    def _stand_before(self) -> None:
        """Replace the attention implementation that is set now, also one set by the user later."""
        for config in self.configs:
            name = attention_name(config)
            if name not in attention.REGISTERED:
                set_attention(config, attention.register(name or "eager"))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._number = next(_numbers)  # numbers are counted for each process
        for config in self.configs:  # unpickled in another process: its name is not registered yet
            original = attention.original_of(attention_name(config))
            if original is not None:
                attention.register(original)

    def remove(self) -> None:
        """Remove hooks and marks and restore the attention implementation of the model."""
        for handle in (*self._handles, *self._outside):
            handle.remove()
        self._handles.clear()
        self._outside.clear()
        self._removed = True
        for module in self.attentions:
            if hasattr(module, attention.SLOT):
                delattr(module, attention.SLOT)
            deberta.step_aside(module)
        if self._blocks:
            for block in self.layers:
                block.__dict__.pop(KEEPS_CACHE, None)
        for config in self.configs:
            original = attention.original_of(attention_name(config))
            if original is not None:
                set_attention(config, original)
        self.configs.clear()

    # ----------------------------------------------------------------------------- prefixes

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

        It gives an :class:`ActivePrefix`, whose ``seen`` is True once the model was called.

        Args:
            prefixes: for each layer (keys, values), each [H_kv, P, D] for all rows or
                [B, H_kv, P, D]; None for a layer without a prefix. In a batch of n * B rows (beams)
                each of the B prefixes serves n rows.
            no_prefix: bool [B], True for rows that see no prefix and keep their positions.
            positions_moved: True when the ``position_ids`` of the call count the prefix already;
                positions that the model counts itself are moved in any case.
            always_visible: True keeps the prefix outside of sliding windows, which then hide own
                tokens alone.

        Raises:
            ValueError: the number of prefixes or a shape does not fit the model; within the block,
                a call that would be wrong with a prefix.
            RuntimeError: within the block, a layer of the model did not see its prefix.
        """
        self._check(prefixes, no_prefix)
        given = ActivePrefix(self, tuple(prefixes), no_prefix, positions_moved, always_visible)
        before = push(given)
        try:
            yield given
        finally:
            restore(before, self)

    def _check(self, prefixes: list[Prefix | None], no_prefix: Tensor | None) -> None:
        if self._removed:
            raise RuntimeError("this injection was removed from its model")
        if len(prefixes) != len(self.attentions):
            raise ValueError(
                f"prefixes has {len(prefixes)} entries; {self._model_name} has "
                f"{len(self.attentions)} layers that take one"
            )
        given = next((int(pair[0].shape[-2]) for pair in prefixes if pair is not None), 0)
        P = given if given in self.lengths else self.num_virtual_tokens
        tail = (self.kv_heads, P, self.head_dim)
        for slot, pair in enumerate(prefixes):
            for tensor in pair or ():
                heads, virtual, width = tensor.shape[-3:] if tensor.dim() in (3, 4) else (0, 0, 0)
                # where layers differ a prefix may be smaller; the layer checks its own size
                fits = 0 < heads <= tail[0] and 0 < width <= tail[2]
                if not fits or virtual != P:
                    raise ValueError(
                        f"prefixes[{slot}] has shape {tuple(tensor.shape)}; allowed is "
                        f"{tail} or (batch, {', '.join(map(str, tail))})"
                    )
        if no_prefix is not None and (no_prefix.dim() != 1 or no_prefix.dtype != torch.bool):
            raise ValueError(
                f"no_prefix must be bool [batch], got {no_prefix.dtype} {tuple(no_prefix.shape)}"
            )

    # -------------------------------------------------------------------------------- hooks

    def _before(
        self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        for layer in self._outside:
            layer.prepare()
        entry = active_in(self)
        given, kwargs = kwargs, {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        if entry is None:
            set_current(self, None)
            name_state(kwargs.get("attention_mask"), None)  # forget the state of a failed call
            return args, given
        entry.seen = True
        if not self._blocks:
            self._stand_before()
        tokens = positions.tokens_of(kwargs)
        cache = cache_of(stack, kwargs)
        past = 0 if cache is None else cache.get_seq_length()
        P = next((pair[0].shape[-2] for pair in entry.prefixes if pair is not None), 0)
        state = begin(entry, tokens.shape[0], P, past)
        state.always_visible = entry.always_visible
        state.injection = self._number
        state.checkpointed = self._checkpointed()
        wanted = kwargs.get("output_attentions")
        config = self.stack.config
        state.weights = bool(
            getattr(config, "output_attentions", False) if wanted is None else wanted
        )
        positions.move(self.family, self.stack, kwargs, state)
        if self._blocks:
            blocks.prepare(self.family, self.stack, kwargs, state)
        elif hasattr(self.attentions[0], "compute_bias"):
            state.bias_module = self.attentions[0]
        if torch.is_grad_enabled() and reentrant.is_reentrant(self.layers[0]):
            if any(getattr(m, "is_kv_shared_layer", False) for m in self.attentions):
                raise ValueError(
                    f"reentrant gradient checkpointing loses the gradients of the keys that layers "
                    f"of {self._model_name} share: choose use_reentrant=False"
                )
            reentrant.use_leaves(state)
        state.trains = state.collected is None and torch.is_grad_enabled() and _train(entry)
        name_state(kwargs.get("attention_mask"), state)
        kwargs[attention.KEYWORD] = state
        set_current(self, state)
        return (), kwargs

    def _checkpointed(self) -> bool:
        return in_checkpoint(self.layers[0])

    def _after(self, stack: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        state: PrefixState | None = kwargs.get(attention.KEYWORD)
        if state is None:
            return
        set_current(self, None)
        dropped = getattr(stack, "layerdrop", 0.0) > 0.0 and stack.training
        seen = state.hits
        if state.checkpointed:
            seen = seen.union(traced_slots(self._number))
        called = state.entered if dropped else range(len(self.attentions))
        missed = [slot for slot in sorted(called) if slot not in seen]
        if missed:
            raise RuntimeError(
                f"{self._model_name} did not hand the prefix to the attention of layers {missed}: "
                "what it computed is not what was asked for, and prefix tuning of this model is "
                "not supported"
            )

    def _at_first(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A hook before the first layer, outside its checkpoint: see :func:`reentrant.collect`."""
        state = current_of(self)
        if state is None or state.collected is None:
            return None
        return (reentrant.collect(args[0], state), *args[1:]), kwargs

    def _at_table(
        self, table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        state = current_of(self)
        if state is None:
            return None
        return positions.move_in_table(table, args, kwargs, state.virtual)

    def _after_table(
        self, table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """The table's output with unmoved positions in rows without a prefix.

        The table is called with one row of positions for all.
        """
        state = current_of(self)
        if state is None or state.no_prefix is None:
            return None
        args, kwargs = positions.move_in_table(table, args, kwargs, -state.virtual)
        plain = type(table).forward(table, *args, **kwargs)
        return torch.where(state.no_prefix[:, None, None], plain, output)


def _train(entry: ActivePrefix) -> bool:
    return any(x.requires_grad for pair in entry.prefixes if pair is not None for x in pair)


class _Entered:
    """A hook that notes a layer's call, for models that skip layers while they train."""

    def __init__(self, injection: PrefixInjection, slot: int) -> None:
        self.injection = injection
        self.slot = slot

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        state = current_of(self.injection)
        if state is not None:
            state.entered.add(self.slot)


class _BlockHook:
    """The hook of one layer that computes attention itself."""

    def __init__(self, injection: PrefixInjection, slot: int) -> None:
        self.injection = injection
        self.slot = slot

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        state = current_of(self.injection)
        if len(args) > 1:
            names = parameters_of(block)
            kwargs = {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
            args = args[:1]
        hidden = args[0] if args else kwargs["hidden_states"]
        owner = self.injection
        config = owner.stack.config
        return args, blocks.enter(owner.family, block, self.slot, hidden, kwargs, state, config)
