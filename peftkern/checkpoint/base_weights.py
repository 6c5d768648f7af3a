"""The base model's tensors by the names that they had before it was adapted."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

from torch import Tensor, nn

from ..tuners.base_layer import BaseTunerLayer
from ..tuners.modules_to_save import AuxiliaryTrainingWrapper

LoadedBase = namedtuple("LoadedBase", ["missing_keys", "unexpected_keys"])


def _original_names(model: nn.Module) -> dict[str, str | None]:
    """{name of a module: name before adapters came}; None for what adapters brought with them."""
    names: dict[str, str | None] = {}

    def walk(module: nn.Module, now: str, before: str) -> None:
        children = module._modules
        only: str | None = None  # the child that is the module which was here
        if isinstance(module, BaseTunerLayer):
            only = "base_layer"
        elif isinstance(module, AuxiliaryTrainingWrapper):
            only = next(
                (n for n, child in children.items() if isinstance(child, BaseTunerLayer)),
                "original_module",
            )
        names[now] = before if only is None else None
        for name, child in children.items():
            if child is None or (only is not None and name != only):
                continue
            here = f"{now}.{name}" if now else name
            was = before if only else (f"{before}.{name}" if before else name)
            walk(child, here, was)

    walk(model, "", "")
    return names


def _renamed(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """{original name: (name now, tensor)} of the model's state dict, adapters left out."""
    names = _original_names(model)
    found = {}
    for key, value in model.state_dict().items():
        at = key
        while at and at not in names:  # a tensor's name, or a part of one, ends it
            at = at.rpartition(".")[0]
        before = names[at]
        if before is not None:
            tail = key[len(at) :].removeprefix(".")
            found[f"{before}.{tail}" if before else tail] = key, value
    return found


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The state dict of a PeftModel's base model, by the names it had before it was adapted.

    What was trained in full beside an adapter (``modules_to_save``) is there as it was before.
    """
    return {key: value for key, (_, value) in _renamed(model.get_base_model()).items()}


def set_base_model_state_dict(
    model: Any, state_dict: dict[str, Tensor], strict: bool = True
) -> LoadedBase:
    """Load a base model's state dict into an adapted model.

    Args:
        model: a PeftModel.
        state_dict: by the names that the model had before it was adapted.
        strict: every name must be given, and no other.

    Returns:
        ``missing_keys`` and ``unexpected_keys``.

    Raises:
        RuntimeError: with ``strict``, names are missing or unknown; nothing was loaded then.
    """
    base = model.get_base_model()
    places = _renamed(base)
    missing = [key for key in places if key not in state_dict]
    unexpected = [key for key in state_dict if key not in places]
    if strict and (missing or unexpected):
        said = [f"Missing key(s) in state_dict: {missing}"] if missing else []
        said += [f"Unexpected key(s) in state_dict: {unexpected}"] if unexpected else []
        raise RuntimeError("Error(s) in loading state_dict:\n\t" + "\n\t".join(said))
    given = {places[key][0]: value for key, value in state_dict.items() if key in places}
    base.load_state_dict(given, strict=False)
    return LoadedBase(missing, unexpected)
