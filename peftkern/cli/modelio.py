"""Finding and loading a base model and its tokenizer, from a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.base_file import note_gguf, options_for
from .errors import UserError, first_line

AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "seq_cls": "AutoModelForSequenceClassification",
    "token_cls": "AutoModelForTokenClassification",
    "seq_2_seq_lm": "AutoModelForSeq2SeqLM",
}
NOT_HERE = "no such folder here; asking the Hugging Face hub for this name"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def locate_model(model: str, gguf_file: str | None = None) -> tuple[str, str | None]:
    """(folder or hub id, name of the GGUF file or None) for ``from_pretrained``, from ``--model``.

    A folder with no config.json and exactly one .gguf file is a GGUF model. Raises UserError when
    the path does not exist or is no model.
    """
    path = Path(model)
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), path.name
    if path.is_dir():
        if gguf_file is not None:
            if not (path / gguf_file).is_file():
                raise UserError(f"--gguf-file {gguf_file}: no such file in {model}")
            return model, gguf_file
        if (path / "config.json").is_file():
            return model, None
        found = sorted(p.name for p in path.glob("*.gguf"))
        if len(found) == 1:
            return model, found[0]
        if found:
            names = ", ".join(found)
            raise UserError(
                f"--model {model} holds several GGUF files; choose with --gguf-file: {names}"
            )
        raise UserError(f"--model {model}: the folder holds neither config.json nor a .gguf file")
    if path.exists():
        raise UserError(f"--model {model}: must be a folder or a .gguf file")
    # "owner/name" may be a model on the hub; but if "owner" is a folder here, the name is mistyped
    if _HUB_ID.fullmatch(model) and not path.parent.is_dir():
        return model, gguf_file
    raise UserError(f"--model {model}: no such folder")


def load_tokenizer(folder: str, gguf_file: str | None = None) -> Any:
    """The tokenizer of a model folder; UserError when it cannot be read."""
    from transformers import AutoTokenizer

    return _loading("tokenizer", folder, AutoTokenizer.from_pretrained, _gguf(gguf_file))


def load_model(
    folder: str,
    task: str,
    gguf_file: str | None = None,
    label_names: list[str] | None = None,
    dtype: torch.dtype | str = torch.float32,
    load_in: str | None = None,
    device: str = "cpu",
    sharded: bool = False,
) -> Any:
    """The base model with the head of ``task``; UserError when it cannot be read.

    With the dtype "auto" it has that of its files.
    It is on the CPU, or with ``load_in`` ("4bit" or "8bit") quantised on ``device``. Packed weights
    that are to be ``sharded`` are stored in ``dtype``.
    """
    import transformers

    options: dict[str, Any] = {"dtype": dtype, **_gguf(gguf_file)}
    options |= options_for(gguf_file, options)
    if load_in is not None:
        if isinstance(dtype, str):
            raise ValueError(f"with load_in, dtype must be one of torch's, got {dtype!r}")
        options |= {
            "quantization_config": _bits(load_in, dtype, sharded),
            "device_map": {"": device},
        }
    if label_names:
        # with the labels from_pretrained makes a head of the right width
        options["id2label"] = dict(enumerate(label_names))
        options["label2id"] = {name: i for i, name in enumerate(label_names)}
        options["ignore_mismatched_sizes"] = True
    load = getattr(transformers, AUTO_CLASSES[task]).from_pretrained
    return note_gguf(_loading("model", folder, load, options), gguf_file)


def _bits(load_in: str, dtype: torch.dtype, sharded: bool) -> Any:
    """transformers' config of bitsandbytes in "4bit" (NF4, nested statistics) or "8bit"."""
    import transformers

    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"--load-in {load_in} needs the package 'bitsandbytes': pip install bitsandbytes"
        )
    if load_in == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # FSDP makes each shard a parameter, which bytes cannot be in every version of torch
        bnb_4bit_quant_storage=dtype if sharded else None,
    )


def hush_transformers() -> None:
    """Switch off the libraries' loading bars and advice; this program prints its own progress."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Trainer's and accelerate's notes for programmers, of no use to a user of the command
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|accelerate")


def _gguf(gguf_file: str | None) -> dict[str, Any]:
    if gguf_file is None:
        return {}
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("a GGUF model needs the package 'gguf': pip install gguf") from None
    return {"gguf_file": gguf_file}


def _loading(what: str, folder: str, load: Any, options: dict[str, Any]) -> Any:
    # the hub's answer to the name of a folder that was mistyped does not say that there is none
    absent = "" if Path(folder).exists() else "no such folder here, and from the hub "
    try:
        return load(folder, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(
            f"--model {folder}: {absent}the {what} cannot be loaded: {first_line(error)}"
        ) from error
    except Exception as error:
        # safetensors and tokenizers raise classes of their own, derived directly from Exception
        if type(error).__module__.split(".")[0] not in (
            "safetensors",
            "safetensors_rust",
            "builtins",
        ):
            raise
        raise UserError(
            f"--model {folder}: {absent}the {what} cannot be loaded: {first_line(error)}"
        ) from error
