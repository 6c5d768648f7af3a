"""Files of a local folder or of the hub."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

from .atomic import places


def locate_file(
    model_id: str | os.PathLike[str], names: str | Sequence[str], **hub: Any
) -> str | None:
    """The path of the first of ``names`` in the local folder ``model_id`` or on the hub, or None.

    The hub is asked only when there is no such folder. ``hub`` are arguments of
    ``hf_hub_download``.

    Raises:
        ValueError: the hub cannot be reached, or does not give the file.
    """
    names = [names] if isinstance(names, str) else names
    model_id = os.fspath(model_id)
    subfolder = hub.get("subfolder")
    for folder in places(os.path.join(model_id, subfolder) if subfolder else model_id):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                return path
    if os.path.isdir(model_id) or os.path.isabs(model_id) or model_id.startswith("."):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    for name in names:
        try:
            return str(hf_hub_download(model_id, name, **hub))
        except (EntryNotFoundError, HFValidationError):
            continue
        except (HfHubHTTPError, OSError) as exc:
            raise ValueError(f"cannot get '{name}' of '{model_id}' from the hub: {exc}") from exc
    return None


def split_hub_kwargs(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the ``kwargs`` that ``hf_hub_download`` takes, the other ones)."""
    from huggingface_hub import hf_hub_download

    names = inspect.signature(hf_hub_download).parameters
    kwargs = dict(kwargs)
    if "use_auth_token" in kwargs:  # the old name of `token`, which PEFT's callers still use
        kwargs.setdefault("token", kwargs.pop("use_auth_token"))
    hub = {k: v for k, v in kwargs.items() if k in names}
    return hub, {k: v for k, v in kwargs.items() if k not in names}
