"""What ``peftkern train`` is asked for and this machine or these processes cannot have."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from .. import liger
from .errors import UserError, first_line
from .methods import names_in
from .options import option
from .prepare import device_of
from .ranks import Ranks
from .settings import REPORT_TO, TrainSettings, deepspeed_config


def resolve_bf16(settings: TrainSettings) -> bool:
    """True to compute in bf16: the default on GPUs that have it (a CPU is slower than in fp32)."""
    gpu = device_of(settings) == "cuda"
    if settings.bf16 is None:
        return gpu and torch.cuda.is_bf16_supported()
    if settings.bf16 and gpu and not torch.cuda.is_bf16_supported():
        raise UserError("--bf16: this GPU has no bfloat16; leave the option out")
    return settings.bf16


def refuse_sharding(settings: TrainSettings, ranks: Ranks) -> None:
    """Raise a UserError when --fsdp or --deepspeed is given and cannot be had."""
    if settings.deepspeed is not None:
        deepspeed_config(settings.deepspeed)
        if settings.fsdp:
            raise UserError("--deepspeed does not go with --fsdp; give one of them")
        if settings.load_in is not None:
            raise UserError(f"--deepspeed does not go with --load-in {settings.load_in}")
        for package in ("deepspeed", "peft"):  # Trainer saves adapters alone for HF PEFT's class
            if find_spec(package) is None:
                raise UserError(f"--deepspeed needs the package '{package}': pip install {package}")
    for name in ("fsdp", "deepspeed"):
        if getattr(settings, name) and ranks.count == 1:
            raise UserError(
                f"{option(name)} divides the model among several processes, and this is one; start "
                "it with torchrun or accelerate launch"
            )
    if settings.deepspeed is not None and device_of(settings) == "cpu":
        raise UserError("--deepspeed runs on GPUs alone; --fsdp divides a model on CPUs too")
    if settings.fsdp and settings.load_in == "8bit":
        raise UserError("--fsdp does not go with --load-in 8bit: FSDP cannot divide int8 weights")


def refuse_liger(settings: TrainSettings) -> None:
    """Raise a UserError when --liger is given and cannot be had on this machine."""
    if not settings.liger:
        return
    try:
        liger.patches()
    except ImportError as error:
        raise UserError(f"--{first_line(error)}") from error
    if not liger.runs_on(device_of(settings)):
        raise UserError("--liger: liger-kernel needs a GPU, and the training is on the CPU")


def refuse_reports(settings: TrainSettings) -> None:
    """Raise a UserError for a program in --report-to that is not installed."""
    for name in names_in(settings.report_to):
        packages = REPORT_TO[name]
        if packages and not any(map(find_spec, packages)):
            needed = packages[0]
            raise UserError(
                f"--report-to {name} needs the package '{needed}': pip install {needed}"
            )


def refuse_trl(settings: TrainSettings, ranks: Ranks) -> None:
    """Raise a UserError when --trainer asks for TRL and it cannot be had."""
    if settings.trainer == "transformers":
        return
    for package in ("trl", "peft"):  # TRL takes a model with adapters for one where HF PEFT is
        if find_spec(package) is None:
            needs = f"the package '{package}': pip install {package}"
            raise UserError(f"--trainer {settings.trainer} needs {needs}")
    if ranks.count > 1:
        raise UserError(
            f"--trainer {settings.trainer} runs in one process; --trainer transformers in several"
        )
