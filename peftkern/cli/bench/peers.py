"""Other libraries beside HF PEFT and peftkern: which are here, and how each makes its model.

They take the place of parts of transformers for the whole process, so each one runs in a process of
its own (:mod:`.remote`), on the same weights.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import RunError

if TYPE_CHECKING:
    from .contest import Contest

LIGER = "PEFT and Liger"


class Peer(NamedTuple):
    """A library that is measured where it is installed.

    Args:
        package: the module that it is imported by.
        build: "module:function"; the function takes a contest and a dropout probability and
            returns a model with adapters, whose parameters have HF PEFT's names.
        first: a module that must be imported before transformers.
        needs_gpu: True when its kernels run on a GPU alone.
    """

    package: str
    build: str
    first: str = ""
    needs_gpu: bool = True


PEERS = {
    LIGER: Peer("liger_kernel", f"{__name__}:with_liger"),
    "Unsloth": Peer("unsloth", f"{__name__}:of_unsloth", first="unsloth"),
    "LoRAFusion": Peer("lorafusion", f"{__name__}:of_lorafusion"),
}


def missing_peers(device: torch.device) -> dict[str, str]:
    """{peer: the reason that it is not measured here}."""
    found = {}
    for name, peer in PEERS.items():
        if find_spec(peer.package) is None:
            found[name] = f"{peer.package.replace('_', '-')} is not installed"
        elif peer.needs_gpu and device.type != "cuda":
            found[name] = "its kernels need a GPU"
    return found


def with_liger(contest: Contest, dropout: float) -> Any:
    """HF PEFT's model with all that liger-kernel has for its family."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = contest.base.config.model_type
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(kind)
    if apply is None:
        raise RunError(f"liger-kernel has nothing for {kind}")
    model = contest.adapted("peft", dropout)
    apply(model=model.get_base_model())
    return model


def of_unsloth(contest: Contest, dropout: float) -> Any:
    """The model that Unsloth reads and adapts, without its gradient checkpointing."""
    from unsloth import FastLanguageModel

    settings = contest.settings
    targets = contest.adapted("peft", dropout).peft_config["default"].target_modules
    with tempfile.TemporaryDirectory() as folder:
        base = contest.base
        base.save_pretrained(Path(folder))
        model, _ = FastLanguageModel.from_pretrained(
            folder,
            max_seq_length=max(2048, settings.length + settings.new_tokens),
            dtype=base.dtype,
            load_in_4bit=False,
            use_gradient_checkpointing=False,
        )
        return FastLanguageModel.get_peft_model(
            model,
            r=settings.lora_r,
            lora_alpha=2 * settings.lora_r,
            lora_dropout=dropout,
            target_modules=sorted(targets),
            use_gradient_checkpointing=False,
        )


def of_lorafusion(contest: Contest, dropout: float) -> Any:
    """HF PEFT's model, whose linear layers LoRAFusion computes from then on."""
    from lorafusion.patch.patch_lora import apply_lora

    apply_lora()
    return contest.adapted("peft", dropout)
