"""``AdapterFiles``: the part of ``PeftModel`` that saves and loads adapters, and uses the hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, Self, cast

from torch import Tensor, nn

from ..configs.base import PeftConfig
from ..configs.checks import checked
from ..files.hub import split_hub_kwargs
from ..tuners.base_tuner import BaseTuner
from ..tuners.checks import check_adapter_name, check_model
from ..tuners.lora.inits import collect
from ..tuners.wrapped import Adapted
from ..utils.module_tree import checkpoints_activations, training_modules
from ..utils.private import RENAMED
from ..utils.undo import remember_requires_grad, unchanged_on_error
from .card import create_or_update_model_card
from .loading import LoadResult, check_keys, check_shapes, fill, match_weights
from .shards import by_one, meet_to_save, refuse_together, saved_by_all, told_of_the_lost
from .state_dicts import (
    check_named,
    check_whole,
    get_peft_model_state_dict,
    load_peft_weights,
    state_dict_of,
)
from .writing import write_adapters


def evaluate(model: nn.Module) -> None:
    """Put the model into evaluation mode; ``model.eval()`` only when it is needed.
    That takes as long as loading a small adapter, and often only the outer wrappers train."""
    training = training_modules(model)
    if all(isinstance(module, (AdapterFiles, BaseTuner)) for module in training):
        for module in training:
            module.training = False
    else:
        model.eval()


def _fill(
    model: Adapted,
    weights: dict[str, Tensor],
    adapter_name: str,
    source: Any,
    assign: bool,
    options: dict[str, Any],
    change_base_weights: Callable[[], None],
) -> LoadResult:
    """Check names and shapes of all ``weights`` against the adapter, then copy them into it.
    In between ``change_base_weights`` changes the base as the adapter's start (PiSSA, …) needs."""
    match = match_weights(model, weights, adapter_name)
    check_keys(match, adapter_name, os.fspath(source), model.peft_config[adapter_name])
    ignore = options.get("ignore_mismatched_sizes", False)
    if not ignore:
        check_shapes(match)
    change_base_weights()
    return fill(model, match, adapter_name, ignore, assign)


def _names_to_save(
    model: Any, folder: str | os.PathLike[str], selected: list[str] | None
) -> list[str]:
    """The adapters to save; a ValueError for unknown ones, or for a folder that is a file."""
    if os.path.isfile(folder):
        raise ValueError(f"Provided path ({folder}) should be a directory, not a file")
    names = list(model.peft_config) if selected is None else list(selected)
    if unknown := [n for n in names if n not in model.peft_config]:
        raise ValueError(
            "You passed an invalid `selected_adapters` arguments, current supported adapter "
            f"names are {list(model.peft_config)} - got {unknown}."
        )
    for name in names:
        check_adapter_name(name)  # it becomes a folder's name; users may edit `peft_config`
    return names


class AdapterFiles:
    """The mixin of :class:`PeftModel` for files and the hub."""

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write or update the adapter's ``README.md`` in ``output_dir``."""
        create_or_update_model_card(self, output_dir)

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        # transformers' push_to_hub overwrites the card just saved with its own or the hub's
        self.create_or_update_model_card(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(
        self: Adapted,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters: weights, configuration and model card.

        Files are written under a temporary name and renamed. The adapter "default" goes to
        ``save_directory``, any other to a folder of its name inside it.

        One line is logged ("peftkern", once) where vLLM or SGLang would refuse an adapter for text
        generation or classification of sequences, or read it wrongly.

        Args:
            save_directory: folder, made when missing.
            safe_serialization: True writes ``adapter_model.safetensors``, False a torch pickle of
                plain tensors, ``adapter_model.bin``. The other file is removed if it exists.
            selected_adapters: names; None saves all.
            save_embedding_layers: see :func:`get_peft_model_state_dict`.
            is_main_process: with False nothing is written. Of a model that processes share out
                (FSDP2, tensor parallelism) every process must call: all gather, the first with True
                writes, and the others return when it is done.
            path_initial_model_for_weight_conversion: folder of the adapter as saved before
                training, if its start changed the base weights (PiSSA, OLoRA, …). Then a plain
                LoRA adapter of twice the rank for the unchanged base model is saved, see
                :mod:`peftkern.tuners.lora.plain`.
            **kwargs: ``state_dict``, to save instead of the model's own: names as in
                ``model.state_dict()``, or as in a file of one adapter.

        Raises:
            ValueError: the folder is a file, an adapter is unknown, ``state_dict`` lacks tensors of
                an adapter, or tensors are empty, as those of a sharded model are. Of a model that
                processes share out: these have different adapters, or one has refused. Nothing is
                written then.
            RuntimeError: of such a model, another process has not come within the group's time-out,
                has ended, or has failed to write. The folder holds the last complete save.
        """
        assert isinstance(self, nn.Module)
        given = kwargs.get("state_dict")
        try:
            names = _names_to_save(self, save_directory, selected_adapters)
        except ValueError as error:
            refuse_together(self, given, error)
            raise
        tensors: dict[str, dict[str, Tensor]] = {}
        shared = saved_by_all(self, given, names)
        if shared:
            meet_to_save(self, names, given is not None)
        start_folder = path_initial_model_for_weight_conversion

        def write() -> None:
            write_adapters(self, save_directory, names, tensors, safe_serialization, start_folder)

        with told_of_the_lost(save_directory) if shared else nullcontext():
            if not (is_main_process or shared):
                # this process may have only parts of tensors; with FSDP all processes must gather
                for _ in names if given is None else ():
                    state_dict_of(self)
            elif given is not None and len(names) > 1:
                check_named(self, given, names)
            for name in names if is_main_process or shared else ():  # all gather what they share
                tensors[name] = get_peft_model_state_dict(
                    self, given, name, save_embedding_layers=save_embedding_layers
                )
                check_whole(tensors[name], name, given is not None)
            if isinstance(self.base_model, AdapterFiles) and selected_adapters is None:
                # a prompt on top of LoRA adapters, which may train too and are saved as well
                inner = kwargs | {"is_main_process": is_main_process}
                if given is not None:
                    inner["state_dict"] = {
                        key.removeprefix("base_model."): value
                        for key, value in given.items()
                        if key.startswith("base_model.")
                    }
                below: Any = self.base_model
                below.save_pretrained(
                    save_directory, safe_serialization, None, save_embedding_layers, **inner
                )
            if shared:
                by_one(write, is_main_process)
            elif is_main_process:
                write()

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Wrap ``model`` with a saved adapter.

        Args:
            model: the base model, changed in place. It may be a PeftModel only if the adapter is a
                prompt, which is put on top of LoRA adapters.
            model_id: folder of the adapter, or ``owner/name`` on the hub; an existing folder is
                preferred.
            adapter_name: its name in this model.
            is_trainable: True lets it train; otherwise it is frozen.
            config: use this configuration instead of the saved one.
            autocast_adapter_dtype: keep adapter weights in float32 under a float16 or bfloat16
                model.
            ephemeral_gpu_offload: not supported, must be False.
            low_cpu_mem_usage: use the loaded tensors themselves instead of copying them.
            key_mapping: {regular expression: replacement} for names in the file.
            **kwargs: ``torch_device``, ``ignore_mismatched_sizes`` and arguments of
                ``hf_hub_download``.

        Raises:
            ValueError: files are missing, damaged, of another method, not finite, or have missing
                or extra keys; the model is a PeftModel.
            RuntimeError: shapes differ from the model's.
            TypeError: ``model`` is no module.

        After an error the base model is as it was.
        """
        check_adapter_name(adapter_name)
        check_model(model)
        if ephemeral_gpu_offload:
            raise NotImplementedError("ephemeral_gpu_offload=True is not supported")
        hub, rest = split_hub_kwargs(kwargs)
        if config is None:
            config = PeftConfig.from_pretrained(model_id, **hub)
        elif not isinstance(config, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {config.__class__}")
        if isinstance(model, AdapterFiles) and not config.is_prompt_learning:
            inside: Any = model
            raise ValueError(
                f"`model` is a {type(model).__name__} already, with the adapters "
                f"{sorted(inside.peft_config)}: use `model.load_adapter(model_id, name)` to "
                "load another one into it, or `model.unload()` first. Nothing was changed."
            )
        config.check_loadable(is_trainable)
        # in inference mode a prompt draws no first values, which might need a tokenizer
        config.inference_mode = not is_trainable or config.is_prompt_learning
        if key_mapping is None and not config.is_prompt_learning:
            key_mapping = getattr(model, RENAMED, None)
        with checked(config):
            weights = load_peft_weights(model_id, rest.get("torch_device"), key_mapping, **hub)
            config.check_fits(weights)
            put_flags_back = remember_requires_grad(model)
            before = model.__dict__.get("peft_config")  # set if the model has adapters already
            settings: Any = getattr(model, "config", None)
            split = getattr(settings, "pretraining_tp", None)
            # take_down() alone does not restore existing adapters and hooks after an error
            kept = before is not None or isinstance(model, AdapterFiles)
            kept = kept or checkpoints_activations(model)
            made_by: Any = cls
            peft_model = None
            try:
                with (
                    unchanged_on_error(model, when=kept),
                    collect() as change_base_weights,
                ):
                    peft_model = made_by.class_for(config.task_type)(
                        model,
                        config,
                        adapter_name,
                        autocast_adapter_dtype=autocast_adapter_dtype,
                        low_cpu_mem_usage=low_cpu_mem_usage,
                    )
                    _fill(
                        peft_model,
                        weights,
                        adapter_name,
                        model_id,
                        low_cpu_mem_usage,
                        rest,
                        change_base_weights,
                    )
            except BaseException:
                if peft_model is not None:
                    peft_model.tuner.take_down(peft_model, adapter_name, model, kept)
                put_flags_back()
                if split is not None:
                    settings.pretraining_tp = split
                raise
        peft_model.tuner.loaded(peft_model, adapter_name, is_trainable, first=True)
        if not is_trainable:
            evaluate(peft_model)
        return cast(Self, peft_model)

    def load_adapter(
        self: Adapted,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> LoadResult:
        """Load a saved adapter beside the others, or new weights into the one of that name.

        The active adapter stays the same. Arguments and errors are those of
        :meth:`from_pretrained`; an error adds no adapter and changes no weight.

        Returns:
            ``missing_keys``, ``unexpected_keys`` and ``mismatched_keys``; they are empty except for
            tensors that ``ignore_mismatched_sizes`` left out.
        """
        if ephemeral_gpu_offload:
            raise NotImplementedError("ephemeral_gpu_offload=True is not supported")
        hub, rest = split_hub_kwargs(kwargs)
        assert isinstance(self, nn.Module)
        new = adapter_name not in self.peft_config
        if new:
            config = PeftConfig.from_pretrained(model_id, **hub)
            config.check_loadable(is_trainable)
            config.inference_mode = not is_trainable or config.is_prompt_learning
        else:
            config = self.peft_config[adapter_name]
        if key_mapping is None and not config.is_prompt_learning:
            key_mapping = getattr(self.get_base_model(), RENAMED, None)
        with checked(config) if new else nullcontext():
            weights = load_peft_weights(model_id, torch_device, key_mapping, **hub)
            if new:
                config.check_fits(weights)
            added, active = False, self.tuner.active_state(self)
            try:
                with collect() as change_base_weights:
                    if new:
                        self.add_adapter(
                            adapter_name,
                            config,
                            low_cpu_mem_usage=low_cpu_mem_usage,
                            autocast_adapter_dtype=autocast_adapter_dtype,
                        )
                        added = True
                    with self.tuner.loading(self, adapter_name, is_trainable):
                        result = _fill(
                            self,
                            weights,
                            adapter_name,
                            model_id,
                            low_cpu_mem_usage,
                            rest,
                            change_base_weights,
                        )
            except BaseException:
                if added:
                    self.tuner.withdraw(self, adapter_name, active)
                raise
        if new:
            self.tuner.loaded(self, adapter_name, is_trainable, first=False)
        if not is_trainable:
            evaluate(self)
        return result
