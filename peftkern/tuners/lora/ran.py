"""What the last forward of a layer did, for ``explain`` where its weights cannot tell.

Between forwards a process has parts of the weights that FSDP shards, and a forward sees them whole.
So what a call will do cannot be told from the weights as they lie there: of such layers the last
forward is told.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ...ops.bases.formats import reader_of
from ...utils.gathering import is_part, is_shard, shares_weights

# the attribute of an MLP: the reason that its last training forward was not one operation, or ""
BLOCK = "peftkern_ran"


class Ran(NamedTuple):
    """One forward of a layer."""

    fused: bool
    words: str  # the operation of a variant, or the reason for running as separate operations


FUSED = Ran(True, "")  # as plain LoRA in one operation
UNTOLD = "the dtypes of input and weights differ, or everything is dropped"


def in_parts(layer: Any) -> bool:
    """True when this process has only parts of a layer's weights now, which a forward gathers.

    False under tensor parallelism, where a process multiplies with its part.
    """
    if not shares_weights() or _is_shared_out(layer):
        return False
    base = layer.get_base_layer()
    parameter = getattr(layer, "parameter_name", "weight")
    if parameter == "weight" and reader_of(base) is not None:
        weight = base._parameters.get("weight")
        return weight is None or is_shard(weight)
    if is_part(base, parameter, 2 if getattr(layer, "num_experts", 1) == 1 else 3):
        return True
    stores = (layer.lora_A, layer.lora_B)
    held = [store[name] for name in layer.active_adapters for store in stores if name in store]
    return any(is_part(module, "weight", 2) for module in held)


def _is_shared_out(layer: Any) -> bool:
    describe = getattr(layer, "describe_sharing", None)  # HF PEFT's layers have none
    return describe is not None and bool(describe())


def last_of(layer: Any) -> Ran | None:
    """What the last forward of a layer did; None where the present state of the layer tells.

    That is where its weights are whole, where adapters are off, and before the first forward.
    """
    names = getattr(layer, "lora_A", None)
    if not names or layer._disable_adapters or layer.merged or not in_parts(layer):
        return None
    if not any(name in names for name in layer.active_adapters):
        return None
    ran: Ran | None = layer.__dict__.get("_ran")
    return ran


def reason_of(layer: Any) -> str | None:
    """The layer's ``decline_reason``; of one in parts, that of its last forward."""
    ran = last_of(layer)
    if ran is None:
        reason: str | None = layer.decline_reason()
        return reason
    return None if ran.fused and not ran.words else ran.words
