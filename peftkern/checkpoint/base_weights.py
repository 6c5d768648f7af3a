"""The base model's tensors by the names that they had before it was adapted."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

from torch import Tensor, nn

from ..tuners.base_layer import BaseTunerLayer
from ..tuners.modules_to_save import AuxiliaryTrainingWrapper

LoadedBase = namedtuple("LoadedBase", ["missing_keys", "unexpected_keys"])


def _original_names(model: nn.Module) -> dict[str, str | None]:
    """{name of a module: its name before it was adapted}; None for the adapters' own modules."""
    names: dict[str, str | None] = {}

    def walk(module: nn.Module, now: str, before: str) -> None:
        children = module._modules
        only: str | None = None  # name of the child that is the original module
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
    """{original name: (present name, tensor)} of the model's state dict, without adapters."""
    names = _original_names(model)
    found = {}
    for key, value in model.state_dict().items():
        at = key
        while at and at not in names:  # removes the tensor's name after that of its module
            at = at.rpartition(".")[0]
        before = names[at]
        if before is not None:
            tail = key[len(at) :].removeprefix(".")
            found[f"{before}.{tail}" if before else tail] = key, value
    return found


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The state dict of a PeftModel's base model, by the names from before it was adapted.

    Modules that were trained in full (``modules_to_save``) have their original values.
    """
    return {key: value for key, (_, value) in _renamed(model.get_base_model()).items()}


def set_base_model_state_dict(
    model: Any, state_dict: dict[str, Tensor], strict: bool = True
) -> LoadedBase:
    """Load a base model's state dict into an adapted model.

    Args:
        model: a PeftModel.
        state_dict: tensors by the names from before the model was adapted.
        strict: require every name of the model, and no others.

    Returns:
        ``missing_keys`` and ``unexpected_keys``.

    Raises:
        RuntimeError: with ``strict``, when names are missing or unknown; nothing is loaded then.
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
