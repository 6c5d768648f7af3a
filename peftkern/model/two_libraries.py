"""One class of two libraries: what makes a PeftModel of ours an instance of HF PEFT's.

Trainer, accelerate and TRL decide by ``isinstance(model, peft.PeftModel)``, which asks the object's
``__class__`` where its type does not match. So ``PeftModel.__class__`` is a property that answers
with a class joined from both. A common base class would need an import of peft, which is not a
dependency; a registration as a virtual subclass needs an ABC, which HF PEFT's class is not.
"""

from __future__ import annotations

import sys

from torch import nn

from ..tuners.base_layer import BaseTunerLayer

_claimed: dict[tuple[type, type], type] = {}


def joined(cls: type) -> type:
    """``cls``, joined with HF PEFT's class of the same name when HF PEFT is loaded.

    Trainer, accelerate and TRL decide by ``isinstance(model, peft.PeftModel)``. Whoever asks has
    imported peft, so looking into ``sys.modules`` is enough and nothing is imported here.
    """
    peft = sys.modules.get("peft")
    theirs = getattr(peft, cls.__name__, None) or getattr(peft, "PeftModel", None)
    if not isinstance(theirs, type) or not issubclass(theirs, nn.Module) or issubclass(cls, theirs):
        return cls
    if (cls, theirs) not in _claimed:
        names = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        _claimed[cls, theirs] = type(cls.__name__, (cls, theirs), names)
        # TRL also asks, by isinstance(layer, BaseTunerLayer), whether lm_head has an adapter, which
        # its losses would not see
        layers = sys.modules.get("peft.tuners.tuners_utils")
        register = getattr(getattr(layers, "BaseTunerLayer", None), "register", None)
        if register is not None:
            register(BaseTunerLayer)
    return _claimed[cls, theirs]
