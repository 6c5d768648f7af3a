"""Hooks of a layer that stay outside its gradient checkpoint, in every version of transformers.

What a hook hands to a layer must be handed over before the checkpoint begins: a replay then gets
the very same objects, in whatever thread and after whatever other call, and a reentrant checkpoint
sees the tensors that gradients go to. Where transformers checkpoints a layer's ``__call__``, with
its hooks in it, such a hook does nothing within a checkpoint, and what runs the checkpoint calls it
first.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ...utils.private import CHECKPOINT_RUNNER
from ...utils.versions import hooks_in_checkpoints, in_checkpoint


class Outside:
    """Forward pre-hooks (with keywords) of one layer, in the order in which they are to run, on
    behalf of an injection."""

    def __init__(self, injection: Any, layer: nn.Module, *hooks: Any) -> None:
        self.injection = injection
        self.layer = layer
        self.hooks = hooks
        self._handle = layer.register_forward_pre_hook(self._before, with_kwargs=True)

    def prepare(self) -> None:
        """To call before a call of the layer: whoever asks for checkpoints sets what runs them, at
        any time."""
        layer: Any = self.layer
        if not (hooks_in_checkpoints() and in_checkpoint(layer)):
            return
        run = getattr(layer, CHECKPOINT_RUNNER)
        if not isinstance(run, _Runner):
            setattr(layer, CHECKPOINT_RUNNER, _Runner(self, run))

    def remove(self) -> None:
        self._handle.remove()
        run = self.layer.__dict__.get(CHECKPOINT_RUNNER)
        if isinstance(run, _Runner) and run.outside is self:
            setattr(self.layer, CHECKPOINT_RUNNER, run.run)

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if hooks_in_checkpoints() and in_checkpoint(layer):
            return None
        return self.run(args, kwargs)

    def run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for hook in self.hooks:
            args, kwargs = hook(self.layer, args, kwargs) or (args, kwargs)
        return args, kwargs


class _Runner:
    """Stands for what transformers runs a layer with that it checkpoints."""

    def __init__(self, outside: Outside, run: Any) -> None:
        self.outside, self.run = outside, run

    def __call__(self, function: Any, *args: Any) -> Any:
        """function: a partial of the layer's call, with its keywords."""
        args, kwargs = self.outside.run(args, function.keywords)
        return self.run(partial(function.func, *function.args, **kwargs), *args)

    @property
    def keywords(self) -> dict[str, Any]:
        return getattr(self.run, "keywords", {})
