"""``as_peft``: ``import peft`` gives peftkern, in code that imports HF PEFT by name."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from .faces import Face, Finder
from .real import RealFinder

__all__ = ["as_peft"]

# they decide at import what `peft` is, and whether there is one
_DECIDED = ("trl", "transformers.trainer_utils", "sentence_transformers", "diffusers", "lm_eval")


def as_peft() -> None:
    """Let ``import peft`` and ``from peft.x import y`` give peftkern, in this process.

    Call it before ``transformers``' trainer, ``trl``, ``sentence_transformers``, ``diffusers`` or
    ``peft`` are imported. Trainers and libraries that make adapters themselves then make
    peftkern's: TRL's ``peft_config=``, ``add_adapter`` of transformers, sentence-transformers and
    diffusers. HF PEFT need not be installed. Where it is, its other methods (IA³, LoHa, ...) and
    names that peftkern lacks come from it: it is loaded when the first of them is asked for, under
    another name. Their configurations and models are handed to HF PEFT's own functions, and are
    instances of ``peft.PeftConfig`` and ``peft.PeftModel`` too.

    A second call does nothing.

    Raises:
        RuntimeError: HF PEFT, or a library that has asked for it, was imported before. Nothing is
            changed.
    """
    if isinstance(sys.modules.get("peft"), Face):
        return
    early = [name for name in ("peft", *_DECIDED) if name in sys.modules]
    if early:
        raise RuntimeError(
            f"peftkern.as_peft() must be called before {early[0]} is imported: "
            f"{', '.join(early)} {'has' if len(early) == 1 else 'have'} decided what `peft` is. "
            "Put `import peftkern; peftkern.as_peft()` at the top of the program."
        )
    spec = importlib.util.find_spec("peft")
    real = RealFinder(spec.submodule_search_locations) if spec else None
    finder = Finder(installed=real is not None)
    sys.meta_path[:0] = [finder] if real is None else [real, finder]
    try:
        _check_transformers()
        importlib.import_module("peft")
    except BaseException:
        sys.modules.pop("peft", None)
        sys.meta_path.remove(finder)
        if real is not None:
            sys.meta_path.remove(real)
        raise
    from .handing import hand_on_files

    if real is not None:
        hand_on_files()


def _check_transformers() -> None:
    """RuntimeError if transformers remembers from before that there is no HF PEFT."""
    if "transformers" not in sys.modules:
        return
    from transformers.utils import is_peft_available

    if not is_peft_available():
        raise RuntimeError(
            "peftkern.as_peft() must be called before transformers is used: it has noted that "
            "`peft` is not installed."
        )
