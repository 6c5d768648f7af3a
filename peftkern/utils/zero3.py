"""Weights that DeepSpeed's ZeRO-3 divides: empty but while a module runs that they belong to.

ZeRO-3 hooks every module. Before a module's forward, and before its backward, the hooks gather the
weights in the module itself and those that are registered with it; after each they let them go. An
operation of several modules' weights runs in the call of a module around them, and registers them
with that one. The modules within are not called, so that their hooks do not run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn


def is_gathered_alone(module: nn.Module) -> bool:
    """True for a module that ZeRO-3 hooks, and False where it gathers with a module around it."""
    return "ds_id" in module.__dict__


def whole_shape(weight: Tensor) -> tuple[int, ...]:
    """The shape of a weight when it is whole."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def has_only_its_hooks(module: nn.Module) -> bool:
    """True when a call of the module runs its class's forward and ZeRO-3's hooks alone."""
    return (
        is_gathered_alone(module)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and "forward" not in module.__dict__
        and all(
            (getattr(hook, "__module__", None) or "").startswith("deepspeed.")
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
            for hook in hooks.values()
        )
    )


def gather_for(module: nn.Module, weights: Iterable[Tensor | None]) -> bool:
    """Let ``weights`` be whole in this call of ``module``, and in all later ones and backwards.

    In the first call each is gathered here, so that all processes must call; in later ones the
    hooks of ``module`` have done so, for all together.

    Returns:
        True when they are whole; False when one is on its way here for another module. That
        happens where several modules have used it until now.
    """
    known: dict[int, Any] = module.__dict__.setdefault("peftkern_gathers", {})
    for weight in weights:
        of: Any = weight
        if of is None or not hasattr(of, "ds_id"):
            continue
        if known.get(of.ds_id) is not of:
            import deepspeed  # type: ignore[import-not-found, unused-ignore]

            deepspeed.zero.register_external_parameter(module, of)
            known[of.ds_id] = of
        if of.ds_status.name == "NOT_AVAILABLE":
            of.all_gather()
        if of.ds_status.name != "AVAILABLE":
            return False
    return True


@contextlib.contextmanager
def gathered(weights: Iterable[Any], changes: bool = False) -> Iterator[None]:
    """A block outside of all calls in which ``weights`` are whole; all processes must enter it.

    With ``changes`` they become what the first process makes them. Weights that are not divided, or
    that a block around this one has gathered, are left alone.
    """
    divided = [
        weight
        for weight in weights
        if hasattr(weight, "ds_id") and weight.ds_status.name == "NOT_AVAILABLE"
    ]
    if not divided:
        yield
        return
    import deepspeed  # type: ignore[import-not-found, unused-ignore]

    with deepspeed.zero.GatheredParameters(divided, modifier_rank=0 if changes else None):
        yield
