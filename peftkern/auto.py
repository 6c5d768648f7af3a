"""``AutoPeftModel*``: loads base model and adapter from the adapter's name alone."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from typing import Any

import transformers

from .checkpoint.base_file import gguf_file_in, note_gguf, options_for
from .configs.base import PeftConfig
from .files.base_names import is_place
from .files.hub import locate_file, split_hub_kwargs
from .model import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .model.base import PeftModel
from .utils.constants import TOKENIZER_CONFIG_NAME

# arguments of `from_pretrained` that the base model's does not have, or uses in another sense
_ADAPTER_ALONE = ("subfolder", "autocast_adapter_dtype", "ephemeral_gpu_offload", "torch_device")
# An adapter's configuration names the module of its base model's class. A file from anyone must not
# be able to import any module, so only these packages and modules inside them are allowed.
IMPORT_ALLOWLIST = ("diffusers", "lerobot", "megatron-core", "transformers")


def get_default_import_allowlist() -> list[str]:
    """The packages that an adapter's configuration may name by default."""
    return list(IMPORT_ALLOWLIST)


def check_import_allowlist(allowlist: Sequence[str], parent_name: str) -> bool:
    """True when the module ``parent_name`` is one of ``allowlist`` or inside one of them."""
    return any(parent_name == a or parent_name.startswith(f"{a}.") for a in allowlist)


def _class_of_base_model(mapping: Any, allowlist: Sequence[str]) -> Any:
    """The class that a configuration's ``auto_mapping`` names; ValueError if it is not allowed."""
    library, name = (
        mapping.get(key) if isinstance(mapping, dict) else None
        for key in ("parent_library", "base_model_class")
    )
    if not isinstance(library, str) or not isinstance(name, str):
        raise ValueError(
            "`auto_mapping` of the adapter's configuration must name `parent_library` and "
            f"`base_model_class`, got {mapping!r}"
        )
    if not check_import_allowlist(allowlist, library):
        raise ValueError(
            f"The auto mapping wants to import '{library}' which is not in the import allowlist. "
            "If you trust it, name it: "
            f"`import_allowlist=['{library}']` in `from_pretrained()`."
        )
    return getattr(importlib.import_module(library), name)


def _base_model(name: str, source: str) -> str:
    """``name``; ValueError when it can only be a folder, and there is none."""
    if is_place(name) and not os.path.exists(name):
        raise ValueError(
            f"the configuration of {source} names the base model {name!r}, as seen from its folder,"
            " and there is none. Load the base model, then the adapter: "
            "`PeftModel.from_pretrained(base_model, adapter)`"
        )
    return name


def add_tokens_of(model: Any, source: str, hub: dict[str, Any], trust: bool) -> None:
    """Enlarge the embeddings of ``model`` to the tokenizer that was saved with the adapter."""
    if not hasattr(model, "get_input_embeddings"):
        return
    if locate_file(source, TOKENIZER_CONFIG_NAME, **hub) is None:
        return
    asked = {k: hub[k] for k in ("revision", "token", "subfolder", "cache_dir") if hub.get(k)}
    if hub.get("local_files_only"):
        asked["local_files_only"] = True
    load = transformers.AutoTokenizer.from_pretrained
    try:
        tokenizer = load(source, trust_remote_code=trust, **asked)
    except OSError as exc:  # offline, with only a part of the tokenizer in the cache
        warnings.warn(
            f"the tokenizer of {source} cannot be loaded, so the embeddings keep their size: {exc}",
            stacklevel=3,
        )
        return
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))


class _BaseAutoPeftModel:
    _target_class: Any = None  # class of transformers whose from_pretrained loads the base model
    _target_peft_class: type[PeftModel] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(
            f"{name} is designed to be instantiated using the "
            f"`{name}.from_pretrained(pretrained_model_name_or_path)` method."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that the adapter's configuration names, and the adapter into it.

        If a tokenizer was saved with the adapter and has more tokens than the base model has
        embeddings, the embeddings are enlarged first.

        Args:
            pretrained_model_name_or_path: folder of the adapter, or ``owner/name`` on the hub.
            adapter_name: its name in the model.
            is_trainable: True lets it train; otherwise it is frozen.
            config: use this configuration instead of the saved one.
            revision: revision of the adapter; that of the base model is in the configuration.
            import_allowlist: packages of the base model's class that a configuration without a task
                type may name; None: see :func:`get_default_import_allowlist`.
            **kwargs: for the base model's ``from_pretrained`` (``dtype``, ``device_map``, …; a
                ``gguf_file`` that the configuration names need not be given), for
                :meth:`PeftModel.from_pretrained`, and for the hub (``token``, ``cache_dir``, …).
                ``subfolder`` is the adapter's folder inside the repository.

        Raises:
            ValueError: the task type belongs to another class; or there is none, and the
                configuration names no class of the base model, or one outside of
                ``import_allowlist``.
        """
        source = os.fspath(pretrained_model_name_or_path)
        hub, _ = split_hub_kwargs({**kwargs, "revision": revision})
        adapter = config or PeftConfig.from_pretrained(source, revision=revision, **kwargs)
        target = cls._target_class
        if adapter.task_type is not None:
            if target is None:
                raise ValueError(
                    "Cannot use `AutoPeftModel` with a task type, please use a specific class for "
                    "your task type. (e.g. `AutoPeftModelForCausalLM` for `task_type='CAUSAL_LM'`)"
                )
            expected = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[adapter.task_type]
            if cls._target_peft_class is not expected:
                raise ValueError(
                    f"Expected target PEFT class: {expected.__name__}, but you have asked for: "
                    f"{cls._target_peft_class.__name__}. `task_type` of the adapter is "
                    f"{adapter.task_type!r}."
                )
        elif adapter.auto_mapping is not None:
            allowed = IMPORT_ALLOWLIST if import_allowlist is None else import_allowlist
            target = _class_of_base_model(adapter.auto_mapping, allowed)
        else:
            raise ValueError(
                "Cannot infer the auto class from the config, please make sure that you are "
                "loading the correct model for your task type."
            )
        if not adapter.base_model_name_or_path:
            raise ValueError(f"the configuration of {source} has no `base_model_name_or_path`")
        gguf_file = kwargs.pop("gguf_file", None) or gguf_file_in(adapter.auto_mapping)
        base = target.from_pretrained(
            _base_model(adapter.base_model_name_or_path, source),
            revision=adapter.revision,
            **{k: v for k, v in kwargs.items() if k not in _ADAPTER_ALONE},
            **options_for(gguf_file, kwargs),
        )
        note_gguf(base, gguf_file)
        add_tokens_of(base, source, hub, bool(kwargs.get("trust_remote_code")))
        return cls._target_peft_class.from_pretrained(
            base,
            source,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
            **kwargs,
        )


class AutoPeftModel(_BaseAutoPeftModel):
    """Loads adapters without a task type, whose configuration names the base model's class."""


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    _target_class = transformers.AutoModelForCausalLM
    _target_peft_class = PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    _target_class = transformers.AutoModelForSeq2SeqLM
    _target_peft_class = PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    _target_class = transformers.AutoModelForSequenceClassification
    _target_peft_class = PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    _target_class = transformers.AutoModelForTokenClassification
    _target_peft_class = PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    _target_class = transformers.AutoModelForQuestionAnswering
    _target_peft_class = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    _target_class = transformers.AutoModel
    _target_peft_class = PeftModelForFeatureExtraction
