"""``joined``: makes peftkern's PeftModel an instance of HF PEFT's class too.

Trainer, accelerate and TRL decide by ``isinstance(model, peft.PeftModel)``;
:mod:`peftkern.utils.two_libraries` says how it becomes true.
"""

from __future__ import annotations

import sys
from typing import Any

from ..tuners.base_layer import BaseTunerLayer
from ..utils.two_libraries import joined as joined_with


def joined(cls: type) -> type:
    """A class derived from ``cls`` and HF PEFT's class of the same name, if HF PEFT is loaded.

    Otherwise ``cls`` itself.
    """
    both = joined_with(cls, "PeftModel")
    if both is cls:
        both = joined_with(cls, "PeftMixedModel")
    if both is not cls:
        # TRL also tests isinstance(lm_head, BaseTunerLayer), as its losses would bypass an adapter
        # there
        layers = sys.modules.get("peft.tuners.tuners_utils")
        theirs: Any = getattr(layers, "BaseTunerLayer", None)
        if hasattr(theirs, "register") and not issubclass(BaseTunerLayer, theirs):
            theirs.register(BaseTunerLayer)
    return both


def apart(cls: type, own: type) -> type:
    """The class that an object of type ``own`` gets when ``__class__`` is set to ``cls``.

    torch's fully_shard derives a class from the one that it reads there, which may be
    :func:`joined`; it is derived from ``own`` then, so that no method of HF PEFT's is found.
    """
    read = joined(own)
    if read is own or read not in cls.__bases__:
        return own if cls is read else cls
    bases = tuple(own if base is read else base for base in cls.__bases__)
    members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, members)
