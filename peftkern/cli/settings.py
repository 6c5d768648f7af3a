"""The settings of one training run: every option of ``peftkern train``, with checks.

A checkpoint contains these values, so that a run is continued only with the settings with which it
began.
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from .chat import read_template
from .errors import UserError
from .forms import DPO, FORM_NAMES
from .methods import METHODS, applies, names_in, refuse_inapplicable, refuse_with_trl
from .options import option, options_of, setting, unlisted

TASKS = ("causal_lm", "seq_cls", "token_cls", "seq_2_seq_lm")
LOAD_IN = ("4bit", "8bit", "fp8")
# where --report-to sends the log, and the packages of which it needs one
REPORT_TO: dict[str, tuple[str, ...]] = {
    "none": (),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
TRAINERS = ("transformers", "sft", "dpo")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")

# the boxes of --help
_LORA = "The adapter"
_LOOP = "The training"
PLACE = "Saving and going on"

# settings that do not change the resulting weights, only where and how often they are written
_FREE_TO_CHANGE = frozenset(
    {"out", "save_every", "keep", "data", "data_format", "config", "given", "report_to", "report"}
)

_COUNTS = ("batch_size", "grad_accumulation", "save_every", "keep")

# which examples a step sees: a number that grows when the same settings give another order
ORDER = 2


@dataclass
class TrainSettings:
    """The options of ``peftkern train``.

    Lengths are in tokens, ``save_every`` and ``steps`` in optimizer steps.
    """

    # of two, the one on the command line puts out the other's line in the file of --config
    INSTEAD: ClassVar = {"steps": "epochs", "epochs": "steps"}

    model: str = setting(help="Folder of the base model (or a .gguf file).")
    data: str = setting(help="A .jsonl, .json, .csv, .parquet or .txt file, or a folder of them.")
    out: str = setting(help="Folder for checkpoints and the adapter.")
    config: str | None = setting(None, "A file of options (run.yaml); the command line beats it.")
    task: str = setting("causal_lm", "causal_lm, seq_cls, token_cls or seq_2_seq_lm.")
    data_format: str = setting("auto", "What the examples are; auto tells it by their fields.")
    chat_template: str | None = setting(None, "A file with a chat template (Jinja).")
    gguf_file: str | None = setting(None, "Which .gguf file, if the model folder holds several.")
    method: str = setting("lora", "lora, dora, prefix, prompt or p-tuning.", _LORA)
    lora_r: int = setting(16, "Rank.", _LORA)
    lora_alpha: float = setting(32.0, "Scale: alpha / r.", _LORA)
    lora_dropout: float = setting(0.0, "Dropout before A.", _LORA)
    target_modules: str = setting("all-linear", "all-linear, or names with commas.", _LORA)
    target_parameters: str | None = setting(
        None, "Names of parameters with commas, such as experts.down_proj.", _LORA
    )
    rslora: bool = setting(False, "Scale: alpha / sqrt(r).", _LORA, "--rslora")
    num_virtual_tokens: int = setting(20, "Length of a prefix or prompt.", _LORA)
    prefix_projection: bool = setting(
        False, "Compute the prefix by a network.", _LORA, "--prefix-projection"
    )
    encoder_hidden_size: int | None = setting(None, "Width of that network, or p-tuning's.", _LORA)
    prompt_tuning_init_text: str | None = setting(None, "The text a prompt begins as.", _LORA)
    trainer: str = setting("transformers", "transformers, or TRL's: sft, dpo.", _LOOP)
    beta: float = setting(0.1, "DPO's: how near to stay to the model as it was.", _LOOP)
    lr: float = setting(2e-4, "Learning rate.", _LOOP)
    scheduler: str = setting("linear", "linear, cosine, constant or constant_with_warmup.", _LOOP)
    warmup_steps: int = setting(0, panel=_LOOP)
    weight_decay: float = setting(0.0, panel=_LOOP)
    max_grad_norm: float = setting(1.0, "Gradient clipping; 0: none.", _LOOP)
    steps: int | None = setting(None, "Optimizer steps; instead of --epochs.", _LOOP)
    epochs: float = setting(3.0, "Passes over the data.", _LOOP)
    batch_size: int = setting(4, "Examples per forward pass of each process.", _LOOP)
    grad_accumulation: int = setting(1, "Forward passes of each process per optimizer step.", _LOOP)
    max_length: int = setting(512, "Longest example, in tokens.", _LOOP)
    packing: bool = setting(
        False, "Several examples in a row of up to --max-length tokens.", _LOOP, "--packing"
    )
    eval_split: float = setting(0.1, "Share of the examples held out.", _LOOP)
    seed: int = setting(0, panel=_LOOP)
    bf16: bool | None = setting(
        None, "Base in bfloat16 (default: on a GPU that has it).", _LOOP, "--bf16/--no-bf16"
    )
    load_in: str | None = setting(
        None, "Base in 4bit or 8bit (bitsandbytes), or its adapted layers in fp8.", _LOOP
    )
    gradient_checkpointing: bool = setting(
        False, "Less memory, more time.", _LOOP, "--gradient-checkpointing"
    )
    fsdp: bool = setting(
        False, "Divide weights and optimizer among the processes (FSDP2).", _LOOP, "--fsdp"
    )
    deepspeed: str | None = setting(None, "A configuration of DeepSpeed (a .json file).", _LOOP)
    liger: bool = setting(False, "liger-kernel's norms, rope and loss, on a GPU.", _LOOP, "--liger")
    cpu: bool = setting(False, "Leave the GPU alone.", _LOOP, "--cpu")
    save_every: int = setting(100, "Steps between checkpoints.", PLACE)
    keep: int = setting(2, "How many checkpoints stay on disk.", PLACE)
    report_to: str = setting("none", "none, tensorboard, wandb, mlflow, with commas.", PLACE)
    report: bool = setting(True, "Write report.html with plots.", PLACE, "--report/--no-report")
    # the names of the options that were given; None: those that differ from their default
    given: frozenset[str] | None = unlisted(None)

    def validate(self) -> None:
        """Raise a UserError for the first option with an impossible value."""
        self._require("method", self.method in METHODS, "one of " + ", ".join(METHODS))
        self._require("trainer", self.trainer in TRAINERS, "one of " + ", ".join(TRAINERS))
        refuse_inapplicable(self)
        refuse_with_trl(self)
        if self.encoder_hidden_size is not None:
            self._require("encoder_hidden_size", self.encoder_hidden_size >= 1, "at least 1")
        for name in (
            "num_virtual_tokens",
            "lora_r",
            "batch_size",
            "grad_accumulation",
            "save_every",
            "keep",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        if self.steps is not None:
            self._require("steps", self.steps >= 1, "at least 1")
        self._require("max_length", self.max_length >= 2, "at least 2")
        for name in ("lr", "epochs", "lora_alpha", "beta"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value > 0, "a number above 0")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value >= 0, "0 or above")
        for name in ("warmup_steps", "seed"):
            self._require(name, 0 <= getattr(self, name) < 2**32, "an integer of 0 or above")
        for name in ("lora_dropout", "eval_split"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._require("task", self.task in TASKS, "one of " + ", ".join(TASKS))
        self._require(
            "data_format", self.data_format in FORM_NAMES, "one of " + ", ".join(FORM_NAMES)
        )
        if self.packing and self.task != "causal_lm":
            raise UserError(f"--packing does not go with --task {self.task}: causal_lm alone")
        if self.chat_template is not None:
            if self.task != "causal_lm":
                raise UserError(f"--chat-template does not go with --task {self.task}")
            read_template(self.chat_template)
        self._require("scheduler", self.scheduler in SCHEDULERS, "one of " + ", ".join(SCHEDULERS))
        told = names_in(self.report_to)
        known = bool(told) and all(name in REPORT_TO for name in told)
        self._require("report_to", known, "one or several of " + ", ".join(REPORT_TO))
        self._require("load_in", self.load_in in (None, *LOAD_IN), "one of " + ", ".join(LOAD_IN))
        self._require(
            "target_modules",
            bool(self.target_list() or self.target_parameters),
            "all-linear, or names with commas (none with --target-parameters alone)",
        )

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise UserError(f"{option(name)} is {getattr(self, name)}; it must be {allowed}")

    def target_list(self) -> str | list[str]:
        """``target_modules`` for LoraConfig: ``"all-linear"`` or a list of module names."""
        listed = self.target_modules.strip()
        return listed if listed == "all-linear" else names_in("" if listed == "none" else listed)

    def forms_of(self) -> str:
        """What decides which forms of data are taken: the task, or DPO."""
        return DPO if self.trainer == DPO else self.task

    def was_given(self, name: str) -> bool:
        """True for an option that the command line or the file of --config gives."""
        if self.given is not None:
            return name in self.given
        return bool(getattr(self, name) != _DEFAULTS.get(name))

    def options(self) -> dict[str, Any]:
        """The options that repeat the run, by name, with the paths as they were given."""
        names = [f.name for f in options_of(self) if f.name != "config" and applies(self, f.name)]
        if self.steps is not None:
            names.remove("epochs")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}

    def identity(self, data_sha256: str, processes: int = 1) -> dict[str, Any]:
        """The settings that determine the resulting weights, as JSON values.

        The data is identified by its content, not by its path; a local model by its resolved path.
        The number of processes is there when it is not 1.
        """
        record = {k: v for k, v in asdict(self).items() if k not in _FREE_TO_CHANGE}
        if Path(self.model).exists():
            record["model"] = str(Path(self.model).resolve())
        if self.steps is not None:
            del record["epochs"]  # not used when the number of steps is given
        record["data"] = data_sha256
        record["order"] = ORDER
        if self.chat_template is not None:
            record["chat_template"] = read_template(self.chat_template)[1]
        if processes != 1:
            record["processes"] = processes
        if not self.fsdp:
            del record["fsdp"]
        del record["deepspeed"]
        if self.deepspeed is not None:
            record["deepspeed"] = deepspeed_config(self.deepspeed)
        return record


def deepspeed_config(path: str) -> dict[str, Any]:
    """The content of a configuration of DeepSpeed; UserError when it cannot be read."""
    try:
        content = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"--deepspeed {path}: no such file") from None
    except OSError as error:
        raise UserError(f"--deepspeed {path}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise UserError(f"--deepspeed {path}: not valid JSON: {where}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--deepspeed {path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--deepspeed {path}: must hold a JSON object")
    return content


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """A phrase about the first setting that differs between two identities, or None."""
    name = differing(old, new)
    if name is None:
        return None
    if name == "order":
        return (
            f"it saw the examples in the order of version {old.get(name) or 1}, and peftkern's is "
            f"version {ORDER} now"
        )
    if name in ("data", "deepspeed", "chat_template") and old.get(name) and new.get(name):
        return f"the content of {option(name)} has changed since"
    before, now = old.get(name), new.get(name)
    if name == "processes":
        return f"it had {before or 1} processes and there are {now or 1} now"
    return f"{option(name)} was {_said(before)} there and is {_said(now)} now"


def differing(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The name of the first setting that differs between two identities, or None.

    A setting that an older version did not have was then what is now its default.
    """
    names = ["order", *new, *(k for k in old if k not in new)]

    def value(of: dict[str, Any], name: str) -> Any:
        # the number of epochs is not there when that of steps is given
        return of.get(name, _DEFAULTS.get(name) if name != "epochs" else None)

    return next((name for name in names if value(old, name) != value(new, name)), None)


_DEFAULTS: dict[str, Any] = {
    f.name: f.default for f in fields(TrainSettings) if f.default is not MISSING
}


def _said(value: Any) -> str:
    return "not given" if value is None else str(value)
