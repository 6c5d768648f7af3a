"""``joined``: a class that is peftkern's and HF PEFT's of the same name, for ``isinstance``.

Other code decides by ``isinstance(model, peft.PeftModel)`` and ``isinstance(config,
peft.PeftConfig)``. When an object's type does not match, isinstance reads its ``__class__``. So
``__class__`` of models and configurations is a property that returns a class derived from both. A
common base class would need an import of peft, which is not a dependency; a registration as a
virtual subclass needs an ABC, which HF PEFT's classes are not.
"""

from __future__ import annotations

import sys
from typing import Any

_joined: dict[tuple[type, type], type] = {}


def joined(cls: type, root: str, **members: Any) -> type:
    """A class derived from ``cls`` and HF PEFT's class of the same name, if HF PEFT is loaded.

    Otherwise ``cls`` itself. Code that tests for a class of ``peft`` has imported it, so a look
    into ``sys.modules`` is enough, and nothing is imported here.

    Args:
        cls: a class of peftkern, or one derived from it.
        root: the name in ``peft`` of the class that the one found must be derived from.
        **members: attributes of the class that is made.
    """
    peft = sys.modules.get("peft")
    # torch's fully_shard, and users, put a class of another name before ours
    found = (getattr(peft, base.__name__, None) for base in cls.__mro__)
    theirs = next((base for base in found if base is not None), None)
    kind = getattr(peft, root, None)
    if not isinstance(theirs, type) or not isinstance(kind, type) or not issubclass(theirs, kind):
        return cls
    return both(cls, theirs, **members)


def both(cls: type, other: type, **members: Any) -> type:
    """A class derived from ``cls`` and ``other``, made once; ``cls`` itself if it is ``other``'s.

    Args:
        cls: the class that an object has, whose methods come first.
        other: the class that it is to be an instance of as well.
        **members: attributes of the class that is made.
    """
    if issubclass(cls, other):
        return cls
    if (cls, other) not in _joined:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        kind: Any = type(cls) if issubclass(type(cls), type(other)) else type(other)
        _joined[cls, other] = kind(
            cls.__name__, (cls, other), {**names, "__doc__": cls.__doc__, **members}
        )
    return _joined[cls, other]
