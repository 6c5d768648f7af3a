"""``PeftConfig``: an adapter's configuration, as a dataclass and as ``adapter_config.json``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import PushToHubMixin

from .._version import PEFT_COMPAT_VERSION
from ..files.atomic import read_whole, write_text_atomically
from ..files.base_names import name_for_file, name_from_file, renamed
from ..files.hub import locate_file, split_hub_kwargs
from ..utils.constants import CONFIG_NAME
from ..utils.error import MissingKeysError
from ..utils.peft_types import PeftType, TaskType
from ..utils.two_libraries import joined
from .checks import check_types, one_of

# {method: its configuration class}; filled when the classes are defined, see `PeftConfig`
PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[PeftConfig]] = {}


def format_version() -> str:
    """The version of HF PEFT whose format is written.

    It is ``peftkern.config.__version__``, HF PEFT's address of it, which other code may patch.
    """
    address = sys.modules.get("peftkern.config")
    # the attribute is missing while another thread imports the file
    return getattr(address, "__version__", PEFT_COMPAT_VERSION)


def config_class_for(peft_type: Any) -> type[PeftConfig]:
    """The configuration class of a ``peft_type``; ValueError for an unknown one."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[one_of(PeftType, peft_type, "peft_type")]


def build_config(cls: type[PeftConfig], values: dict[str, Any], source: str) -> PeftConfig:
    """Make ``cls`` from a dict that may have keys of other PEFT versions.

    A key that ``cls`` lacks is dropped. If its value is not None, a warning names it (old versions
    wrote further keys with None).
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


def _new(cls: Any) -> Any:
    return cls.__new__(cls)


def _make(cls: type, *args: Any, **kwargs: Any) -> Any:
    """``__new__`` of a class of both libraries: the object is of peftkern's alone."""
    return cls.__bases__[0](*args, **kwargs)


@dataclass
class PeftConfigMixin(PushToHubMixin):  # type: ignore[misc]  # transformers is not read
    """The part of all configurations that reads and writes ``adapter_config.json``.

    Args:
        task_type: one of :class:`TaskType`, or None for a model without a task.
        peft_type: one of :class:`PeftType`.
        auto_mapping: base model class and library, written for models without a task type.
        peft_version: the version of HF PEFT whose format this has; filled in when None.
    """

    task_type: TaskType | str | None = field(default=None)
    peft_type: PeftType | str | None = field(default=None)
    auto_mapping: dict[str, Any] | None = field(default=None)
    peft_version: str | None = field(default=None)

    def __post_init__(self) -> None:
        if self.task_type is not None:
            one_of(TaskType, self.task_type, "task type")
        if self.peft_version is None:
            self.peft_version = format_version()

    # isinstance() reads this when type(config) does not match. TRL, transformers, diffusers and HF
    # PEFT itself take configurations that are instances of HF PEFT's class.
    @property  # type: ignore[misc]  # nothing sets it
    def __class__(self) -> type:
        # dataclasses.replace() calls what it reads here
        return joined(type(self), "PeftConfig", __new__=_make)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (type(self),), self.__dict__

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values."""
        return asdict(self)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``adapter_config.json`` into ``save_directory``, atomically.

        Args:
            save_directory: a folder, made when missing; AssertionError when it is a file.
            **kwargs: ``auto_mapping_dict`` replaces ``auto_mapping``; ``seen_from`` is the folder
                in which the file will be, if that is another one.

        A base model that is named by an absolute path is written as seen from the folder, see
        :func:`peftkern.files.base_names.name_for_file`.
        """
        if os.path.isfile(save_directory):
            raise AssertionError(
                f"Provided path ({save_directory}) should be a directory, not a file"
            )
        os.makedirs(save_directory, exist_ok=True)
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in self.to_dict().items()}
        if kwargs.get("auto_mapping_dict") is not None:
            values["auto_mapping"] = kwargs["auto_mapping_dict"]
        seen_from = kwargs.get("seen_from") or save_directory
        renamed(values, name_for_file, seen_from)
        text = json.dumps(values, indent=2, sort_keys=True)
        write_text_atomically(Path(save_directory) / CONFIG_NAME, text)

    @classmethod
    def from_json_file(
        cls, path_json_file: str | os.PathLike[str], **kwargs: Any
    ) -> dict[str, Any]:
        """The dict in a config file; ValueError, naming the file, if it is not a JSON object."""
        try:
            values = json.loads(Path(path_json_file).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as exc:
            raise ValueError(f"{os.fspath(path_json_file)} is not valid JSON: {exc}") from exc
        if not isinstance(values, dict):
            kind = type(values).__name__
            raise ValueError(f"{os.fspath(path_json_file)} must hold a JSON object, got {kind}")
        if "runtime_config" in values:  # valid only at run time, never read from disk
            warnings.warn(
                f"{os.fspath(path_json_file)}: `runtime_config` is ignored.", stacklevel=2
            )
            del values["runtime_config"]
        return values

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """A configuration of the class that ``peft_type`` names; without one, of this class."""
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

        A base model that is named as seen from the file's folder is named as seen from the present
        one. As in HF PEFT the result has the class that the file names, not the one on which this
        is called, unless that is a subclass of it.
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
        renamed(values, name_from_file, os.path.dirname(file))
        values = {**{k: v for k, v in rest.items() if k in _field_names(cls)}, **values}
        if not values.get("peft_type"):
            raise MissingKeysError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: "
                f"{{'peft_type'}}. {file} is not an adapter configuration."
            )
        try:
            target = config_class_for(values["peft_type"])
            if issubclass(cls, target):  # a user's class, which may have further fields
                target = cls
            check_types(target, values)
            return build_config(target, values, file)
        except (ValueError, TypeError) as exc:
            raise ValueError(f"{file}: {exc}") from exc

    @property
    def is_prompt_learning(self) -> bool:
        """True when the method trains virtual tokens and not weights."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Always False: peftkern has no adaption prompt."""
        return False


def _field_names(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


@dataclass
class PeftConfig(PeftConfigMixin):
    """The base class of all configurations of adapters.

    A subclass that is defined with ``method=`` (a :class:`PeftType`) is the class of that method:
    files that name the method are read as it. ValueError when the method has another class already.

    Args:
        base_model_name_or_path: the model that the adapter belongs to.
        revision: its revision on the hub.
        inference_mode: True when the adapter is loaded frozen.
    """

    base_model_name_or_path: str | None = field(default=None)
    revision: str | None = field(default=None)
    inference_mode: bool = field(default=False)

    def __init_subclass__(cls, method: PeftType | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if method is None:
            return
        here = PEFT_TYPE_TO_CONFIG_MAPPING.get(method)
        mine = cls.__module__, cls.__qualname__
        if here is not None and (here.__module__, here.__qualname__) != mine:
            raise ValueError(f"{here.__name__} is the configuration of {method.value} already")
        PEFT_TYPE_TO_CONFIG_MAPPING[method] = cls

    def check_supported(self) -> None:
        """Raise one NotImplementedError that names all settings that peftkern does not support."""
        raise NotImplementedError(
            f"{type(self).__name__} alone describes no adapter that can be built"
        )

    def check_loadable(self, is_trainable: bool) -> None:
        """Raise a ValueError if ``is_trainable`` and a saved adapter of this kind cannot train."""

    def check_fits(self, weights: Mapping[str, Any]) -> None:
        """Raise a ValueError when the configuration's sizes are far larger than the saved tensors.

        So a damaged file cannot cause an allocation of terabytes.
        """
