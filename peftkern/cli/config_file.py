"""Files of options: ``--config run.yaml``, and the one that every run writes.

A key is an option's name (``lora-r`` or ``lora_r``), a value what the option takes.
"""

from __future__ import annotations

import difflib
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from .errors import UserError

# how others call an option, for the hint at an unknown key
_ELSEWHERE = {
    "model": "model_name_or_path base_model model_name pretrained_model_name_or_path",
    "data": "dataset dataset_name datasets dataset_path train_file",
    "out": "output_dir output",
    "lr": "learning_rate",
    "scheduler": "lr_scheduler_type lr_scheduler",
    "steps": "max_steps",
    "epochs": "num_train_epochs num_epochs",
    "batch_size": "per_device_train_batch_size micro_batch_size",
    "grad_accumulation": "gradient_accumulation_steps",
    "max_length": "max_seq_length sequence_len cutoff_len",
    "eval_split": "val_set_size val_size",
    "lora_r": "r rank lora_rank",
    "target_modules": "lora_target_modules lora_target",
    "target_parameters": "lora_target_parameters",
    "rslora": "use_rslora",
    "method": "finetuning_type adapter peft_type",
    "trainer": "stage rl",
    "beta": "pref_beta rl_beta",
    "packing": "sample_packing",
    "load_in": "load_in_4bit load_in_8bit quantization_bit",
    "chat_template": "chat_template_path chat_template_jinja template",
    "save_every": "save_steps",
    "keep": "save_total_limit",
    "liger": "use_liger_kernel enable_liger_kernel",
}


def read_config(path: str, settings: type) -> dict[str, Any]:
    """The values in a file of options for the dataclass ``settings``, by the names of its fields.

    UserError, with file and line, for a key that is unknown or there twice, and for a value of
    another type.
    """
    import yaml

    where = f"--config {path}"
    try:
        node = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: not valid UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or error
        raise UserError(f"{where}{line}: not valid YAML: {reason}") from None
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{where}:{node.start_mark.line + 1}: must hold keys with values")
    # options.py asks this file, so what is no option is told by the field itself
    options = [f for f in fields(settings) if not f.metadata.get("unlisted")]
    known = {f.name: f for f in options if f.name != "config"}
    hints = get_type_hints(settings)
    found: dict[str, Any] = {}
    for key, value in node.value:
        at = f"{where}:{key.start_mark.line + 1}"
        name = str(key.value).replace("-", "_")
        if name not in known:
            near = _nearest(name, list(known))
            hint = f"did you mean {near}?" if near else f"the keys are {', '.join(known)}"
            raise UserError(f"{at}: unknown key {key.value!r}; {hint}")
        if name in found:
            raise UserError(f"{at}: the key {key.value!r} is there twice")
        loader = yaml.SafeLoader("")
        try:
            made = loader.construct_object(value, deep=True)
        except yaml.YAMLError as error:
            raise UserError(f"{at}: not valid YAML: {error}") from None
        found[name] = _value(at, str(key.value), made, known[name], hints[name])
    return found


def as_yaml(values: dict[str, Any], version: str) -> str:
    """The options as a file that ``--config`` reads."""
    import yaml

    head = f"# peftkern {version}: peftkern train --config run.yaml repeats this run\n"
    return f"{head}{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"


def _nearest(name: str, known: list[str]) -> str | None:
    for ours, theirs in _ELSEWHERE.items():
        if ours in known and name in theirs.split():
            return ours
    close = difflib.get_close_matches(name, known, n=1)
    return close[0] if close else None


def _value(at: str, key: str, value: Any, of: Field[Any], hint: Any) -> Any:
    kinds = get_args(hint) if get_origin(hint) is Union or hasattr(hint, "__args__") else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and number and isinstance(value, int):
        return value
    if kind is float:
        try:  # YAML takes 2e-4 for a text
            if number or isinstance(value, str):
                return float(value)
        except ValueError:
            pass
    if kind is str:
        if isinstance(value, list) and all(isinstance(x, str) for x in value):
            return ",".join(value)
        if isinstance(value, str) or number:
            return str(value)
    allowed = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}[kind]
    raise UserError(f"{at}: {key} is {value!r}; it must be {allowed}")
