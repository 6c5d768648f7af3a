"""``PeftConfig``: what an adapter is, as a dataclass and as ``adapter_config.json``."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers.utils import PushToHubMixin

from ._io import places, read_whole, write_text_atomically
from ._version import PEFT_COMPAT_VERSION as __version__  # of HF PEFT, whose format is written
from .utils.config_values import as_names
from .utils.constants import CONFIG_NAME
from .utils.error import MissingKeysError
from .utils.peft_types import PeftType, TaskType

MAX_TOKENS = 65536  # above it a saved prompt must show its length before memory is taken for it


def one_of(enum_cls: type, value: Any, what: str) -> Any:
    """``value`` as a member of the string enum ``enum_cls``,
    or a ValueError naming what is allowed."""
    try:
        return enum_cls(value)
    except ValueError:
        allowed = ", ".join(member.value for member in enum_cls)  # type: ignore[attr-defined]
        raise ValueError(
            f"Invalid {what}: {value!r}. Must be one of the following {what}s: {allowed}."
        ) from None


def positive(name: str, value: Any, optional: bool = False) -> None:
    """Raise a ValueError, naming the field, unless ``value`` is an integer above 0."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}")


def config_class_for(peft_type: Any) -> type[PeftConfig]:
    """The configuration class of a ``peft_type``;
    ValueError when peftkern does not have the method."""
    from .mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING[one_of(PeftType, peft_type, "peft_type")]


def build_config(cls: type[PeftConfig], values: dict[str, Any], source: str) -> PeftConfig:
    """Make ``cls`` from a dict that may hold keys of other PEFT versions.

    A key that ``cls`` lacks is dropped silently when it is None (old versions wrote such keys) and
    with a warning that names it when it has a value.
    """
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(k for k, v in values.items() if k not in known and v is not None)
    if unknown:
        warnings.warn(
            f"Unexpected keyword arguments {unknown} for class {cls.__name__}, these are ignored. "
            f"They come from {source}, may be of another version of PEFT, and what they ask for is "
            "not done.",
            stacklevel=3,
        )
    return cls(**{k: v for k, v in values.items() if k in known})


def fits_type(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is what a field's type hint describes."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits_type(value, h) for h in args)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is Literal:
        return value in args
    if origin in (list, set, Sequence) or hint in (list, set):
        return isinstance(value, list) and all(fits_type(v, h) for v in value for h in args[:1])
    if origin is tuple:
        return (
            isinstance(value, list) and len(value) == len(args) and all(map(fits_type, value, args))
        )
    if origin is dict or hint is dict:
        return isinstance(value, dict) and all(
            fits_type(v, h) for v in value.values() for h in args[1:]
        )
    if isinstance(hint, type) and issubclass(hint, Enum):
        return True  # its own check says what is allowed
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    return isinstance(value, hint if hint in (str, bool) else (str, dict))


def check_types(cls: type[PeftConfig], values: dict[str, Any]) -> None:
    """Raise a ValueError, naming the key, for a value from a file that is of a wrong type."""
    hints = get_type_hints(cls)
    for name, value in values.items():
        # old files hold null for what had no default then
        if name in hints and value is not None and not fits_type(value, hints[name]):
            shown = str(hints[name]).replace("typing.", "").replace("NoneType", "None")
            raise ValueError(f"`{name}` must be {shown}, got {value!r}")


def locate_file(
    model_id: str | os.PathLike[str], names: str | Sequence[str], **hub: Any
) -> str | None:
    """Path of the first of ``names`` (one or several) that is in the local folder ``model_id``, or
    that the hub has; None when there is none.

    A local folder is always taken first, and the hub is asked only when there is none.
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
            return hf_hub_download(model_id, name, **hub)
        except (EntryNotFoundError, HFValidationError):
            continue
        except (HfHubHTTPError, OSError) as exc:
            raise ValueError(f"cannot get '{name}' of '{model_id}' from the hub: {exc}") from exc
    return None


def split_hub_kwargs(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``kwargs`` parted into what ``hf_hub_download`` takes and the rest."""
    from huggingface_hub import hf_hub_download

    names = inspect.signature(hf_hub_download).parameters
    kwargs = dict(kwargs)
    if "use_auth_token" in kwargs:  # the old name, which PEFT's callers still use
        kwargs.setdefault("token", kwargs.pop("use_auth_token"))
    hub = {k: v for k, v in kwargs.items() if k in names}
    return hub, {k: v for k, v in kwargs.items() if k not in names}


@dataclass
class PeftConfigMixin(PushToHubMixin):
    """Reading and writing of ``adapter_config.json``, common to all methods.

    Args:
        task_type: one of :class:`TaskType`, or None for a model without a task.
        peft_type: one of :class:`PeftType`.
        auto_mapping: base model class and library, written for models without a task type.
        peft_version: the version of HF PEFT whose format this follows; filled in when None.
    """

    task_type: TaskType | str | None = field(default=None)
    peft_type: PeftType | str | None = field(default=None)
    auto_mapping: dict | None = field(default=None)
    peft_version: str | None = field(default=None)

    def __post_init__(self) -> None:
        if self.task_type is not None:
            one_of(TaskType, self.task_type, "task type")
        if self.peft_version is None:
            self.peft_version = __version__

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values."""
        return asdict(self)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``adapter_config.json`` into ``save_directory`` (made when missing), in one step.

        Args:
            save_directory: a folder; AssertionError when it is a file.
            **kwargs: ``auto_mapping_dict`` replaces ``auto_mapping``.
        """
        if os.path.isfile(save_directory):
            raise AssertionError(
                f"Provided path ({save_directory}) should be a directory, not a file"
            )
        os.makedirs(save_directory, exist_ok=True)
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in self.to_dict().items()}
        if kwargs.get("auto_mapping_dict") is not None:
            values["auto_mapping"] = kwargs["auto_mapping_dict"]
        text = json.dumps(values, indent=2, sort_keys=True)
        write_text_atomically(Path(save_directory) / CONFIG_NAME, text)

    @classmethod
    def from_json_file(
        cls, path_json_file: str | os.PathLike[str], **kwargs: Any
    ) -> dict[str, Any]:
        """The dict in a config file. ValueError, naming the file, when it is not a JSON object."""
        try:
            values = json.loads(Path(path_json_file).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as exc:
            raise ValueError(f"{os.fspath(path_json_file)} is not valid JSON: {exc}") from exc
        if not isinstance(values, dict):
            kind = type(values).__name__
            raise ValueError(f"{os.fspath(path_json_file)} must hold a JSON object, got {kind}")
        if "runtime_config" in values:  # only valid at run time, never from disk
            warnings.warn(
                f"{os.fspath(path_json_file)}: `runtime_config` is ignored.", stacklevel=2
            )
            del values["runtime_config"]
        return values

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """The configuration of the class that ``peft_type`` names (or
        of this class without one)."""
        target = config_class_for(kwargs["peft_type"]) if kwargs.get("peft_type") else cls
        return build_config(target, kwargs, target.__name__)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftConfig:
        """Read the configuration from a local folder or a hub repository.

        Args:
            pretrained_model_name_or_path: folder, or ``owner/name`` on the hub.
            subfolder: folder inside it.
            **kwargs: passed to ``hf_hub_download`` (``revision``, ``token``, ``cache_dir``, …).

        Raises:
            ValueError: no such file, bad JSON, or a ``peft_type`` that peftkern does not have.

        As in HF PEFT the class is the one that the file names, whichever this is called on.
        """
        hub, rest = split_hub_kwargs({**kwargs, "subfolder": subfolder})
        where = os.fspath(pretrained_model_name_or_path)
        found = read_whole(
            lambda: locate_file(where, CONFIG_NAME, **hub),
            lambda path: (path, cls.from_json_file(path)),
        )
        if found is None:
            raise ValueError(f"Can't find '{CONFIG_NAME}' at '{where}'")
        file, values = found
        values = {**{k: v for k, v in rest.items() if k in _field_names(cls)}, **values}
        if not values.get("peft_type"):
            raise MissingKeysError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: "
                f"{{'peft_type'}}. {file} is not an adapter configuration."
            )
        try:
            target = config_class_for(values["peft_type"])
            check_types(target, values)
            return build_config(target, values, file)
        except (ValueError, TypeError) as exc:
            raise ValueError(f"{file}: {exc}") from exc

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method trains virtual tokens rather than weights."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Always False: peftkern has no adaption prompt."""
        return False


def _field_names(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


@dataclass
class PeftConfig(PeftConfigMixin):
    """What every adapter configuration has.

    Args:
        base_model_name_or_path: the model that the adapter belongs to.
        revision: its revision on the hub.
        inference_mode: True when the adapter is loaded frozen.
    """

    base_model_name_or_path: str | None = field(default=None)
    revision: str | None = field(default=None)
    inference_mode: bool = field(default=False)

    def check_supported(self) -> None:
        """Raise one NotImplementedError that names everything asked for that peftkern cannot do."""
        raise NotImplementedError(
            f"{type(self).__name__} alone describes no adapter that can be built"
        )

    def check_loadable(self, is_trainable: bool) -> None:
        """Raise a ValueError when a saved adapter of this kind cannot be trained on."""

    def check_fits(self, weights: Mapping[str, Any]) -> None:
        """Raise a ValueError when sizes in the configuration are far beyond the saved tensors, so
        that a damaged file cannot make us ask for terabytes."""


@dataclass
class PromptLearningConfig(PeftConfig):
    """What prefix tuning, prompt tuning and p-tuning share.

    Args:
        num_virtual_tokens: length of the learned prompt, in tokens.
        token_dim: size of one virtual token; inferred from the model when None.
        num_transformer_submodules: 1, or 2 for encoder-decoder models.
        num_attention_heads: heads of keys and values.
        num_layers: layers of the base model.
        modules_to_save: modules trained and saved in full beside the prompt.
    """

    num_virtual_tokens: int | None = field(default=None)
    token_dim: int | None = field(default=None)
    num_transformer_submodules: int | None = field(default=None)
    num_attention_heads: int | None = field(default=None)
    num_layers: int | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.modules_to_save = as_names("modules_to_save", self.modules_to_save)
        for name in (
            "num_virtual_tokens",
            "token_dim",
            "num_transformer_submodules",
            "num_attention_heads",
            "num_layers",
        ):
            positive(name, getattr(self, name), optional=True)
        if self.num_transformer_submodules not in (None, 1, 2):
            raise ValueError(
                "`num_transformer_submodules` must be 1, or 2 for an encoder-decoder model, got "
                f"{self.num_transformer_submodules}"
            )

    @property
    def is_prompt_learning(self) -> bool:
        return True

    @property
    def trains_network(self) -> bool:
        """Whether the prompt is the output of a network, whose weights no checkpoint holds."""
        return False

    def check_supported(self) -> None:
        """Raise one ValueError for what is missing to build the adapter."""
        positive("num_virtual_tokens", self.num_virtual_tokens)
        if self.task_type is None:
            raise ValueError(
                f"`task_type` must be given for {PeftType(self.peft_type or '').value}: what is "
                "done to masks and labels depends on it. Must be one of: "
                f"{', '.join(t.value for t in TaskType)}."
            )

    def check_fits(self, weights: Mapping[str, Any]) -> None:
        prompt = weights.get("prompt_embeddings")
        if prompt is None or prompt.dim() != 2:
            return  # which is reported with all keys that are missing or wrong
        if (self.num_virtual_tokens or 0) > max(MAX_TOKENS, prompt.shape[0]):
            raise ValueError(
                f"`num_virtual_tokens` is {self.num_virtual_tokens}, and the saved prompt has "
                f"{prompt.shape[0]} rows"
            )

    def check_loadable(self, is_trainable: bool) -> None:
        if is_trainable and self.trains_network:
            raise ValueError(
                "Cannot set a prompt learning adapter to trainable when loading pretrained adapter."
                " The file holds the prompt, and not the network of "
                f"{PeftType(self.peft_type or '').value} that made it: load it with "
                "is_trainable=False."
            )
