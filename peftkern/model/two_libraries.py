"""``joined``: makes peftkern's PeftModel an instance of HF PEFT's class too.

Trainer, accelerate and TRL decide by ``isinstance(model, peft.PeftModel)``. When an object's type
does not match, isinstance reads its ``__class__``. So ``PeftModel.__class__`` is a property that
returns a class derived from both. A common base class would need an import of peft, which is not a
dependency; a registration as a virtual subclass needs an ABC, which HF PEFT's class is not.
"""

from __future__ import annotations

import sys

from torch import nn

from ..tuners.base_layer import BaseTunerLayer

_claimed: dict[tuple[type, type], type] = {}


def joined(cls: type) -> type:
    """A class derived from ``cls`` and HF PEFT's class of the same name, if HF PEFT is loaded.

    Otherwise ``cls`` itself. Code that tests for ``peft.PeftModel`` has imported peft, so a look
    into ``sys.modules`` is enough, and nothing is imported here.
    """
    peft = sys.modules.get("peft")
    # torch's fully_shard puts a class of another name before ours
    found = (getattr(peft, base.__name__, None) for base in cls.__mro__)
    theirs = next((base for base in found if base is not None), None)
    if not isinstance(theirs, type) or not issubclass(theirs, nn.Module) or issubclass(cls, theirs):
        return cls
    if (cls, theirs) not in _claimed:
        names = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        _claimed[cls, theirs] = type(cls.__name__, (cls, theirs), names)
        # TRL also tests isinstance(lm_head, BaseTunerLayer), as its losses would bypass an adapter
        # there
        layers = sys.modules.get("peft.tuners.tuners_utils")
        register = getattr(getattr(layers, "BaseTunerLayer", None), "register", None)
        if register is not None:
            register(BaseTunerLayer)
    return _claimed[cls, theirs]


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
