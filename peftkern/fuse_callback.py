"""``FuseCallback``: fuses models of trainers that create HF PEFT's adapters themselves."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .fusing import fuse, unfuse


class FuseCallback(TrainerCallback):
    """Fuses the trainer's model when training begins, see :func:`peftkern.fuse`.

    ``SFTTrainer(peft_config=peft.LoraConfig(...), callbacks=[FuseCallback()])``: TRL calls HF
    PEFT's own ``get_peft_model``, and this callback gets the model that it makes.

    Args:
        unfuse_at_end: give the layers HF PEFT's forward again when training ends. By default the
            model stays fused, so that later evaluation is fast too.
        liger: as in :func:`peftkern.fuse`.

    Raises:
        ValueError: when training begins, the model holds no LoRA layer of HF PEFT, or ``liger``
            does not go with it.
        ImportError: when training begins with ``liger``, liger-kernel is not installed.
    """

    def __init__(self, unfuse_at_end: bool = False, liger: bool = False) -> None:
        self.unfuse_at_end = unfuse_at_end
        self.liger = liger

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        fuse(kwargs["model"], liger=self.liger)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.unfuse_at_end:
            unfuse(kwargs["model"])
