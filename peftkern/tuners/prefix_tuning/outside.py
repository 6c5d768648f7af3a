"""Hooks of a layer that run outside its gradient checkpoint, in every version of transformers.

A hook must hand its objects to a layer before the checkpoint begins. Then a replay gets the same
objects, in any thread and after any other call, and a reentrant checkpoint sees the tensors that
gradients go to. Some versions of transformers checkpoint a layer's ``__call__``, which includes its
hooks. There such a hook does nothing within the checkpoint; the function that runs the checkpoint
calls it first.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ...utils.private import CHECKPOINT_RUNNER
from ...utils.versions import hooks_in_checkpoints, in_checkpoint


class Outside:
    """The forward pre-hooks (with keywords) of one layer for an injection, run in their order."""

    def __init__(self, injection: Any, layer: nn.Module, *hooks: Any) -> None:
        self.injection = injection
        self.layer = layer
        self.hooks = hooks
        self._handle = layer.register_forward_pre_hook(self._before, with_kwargs=True)

    def prepare(self) -> None:
        """Wrap the function that runs the layer's checkpoint, if it has one; call before each call.

        (A user may switch checkpoints on, which sets that function, at any time.)
        """
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
    """A wrapper of the function with which transformers runs a checkpointed layer."""

    def __init__(self, outside: Outside, run: Any) -> None:
        self.outside, self.run = outside, run

    def __call__(self, function: Any, *args: Any) -> Any:
        """Run the hooks, then the checkpoint of ``function``, a partial of the layer's call."""
        args, kwargs = self.outside.run(args, function.keywords)
        return self.run(partial(function.func, *function.args, **kwargs), *args)

    @property
    def keywords(self) -> dict[str, Any]:
        return getattr(self.run, "keywords", {})
