"""``--trainer sft`` and ``dpo``: TRL's trainers with the command's model, data and checkpoints.

SFT gets the examples that the command encodes; DPO gets texts or turns, which TRL encodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .settings import TrainSettings

_TRAINERS = {"sft": ("SFTTrainer", "SFTConfig"), "dpo": ("DPOTrainer", "DPOConfig")}


def arguments(settings: TrainSettings) -> tuple[Any, dict[str, Any]]:
    """(TRL's class of arguments, what it takes besides transformers' arguments)."""
    import trl

    # TRL's own defaults are True
    more: dict[str, Any] = {"gradient_checkpointing": False, "max_length": settings.max_length}
    if settings.trainer == "dpo":
        more["beta"] = settings.beta
    else:
        more["dataset_kwargs"] = {"skip_prepare_dataset": True}
    return getattr(trl, _TRAINERS[settings.trainer][1]), more


def make_trainer(
    settings: TrainSettings,
    tokenizer: Any,
    collate: Callable[[Any], Any],
    training: list[dict[str, Any]],
    held: list[dict[str, Any]],
    **ours: Any,
) -> Any:
    """TRL's trainer of ``settings``, which saves and goes on as the command's own does."""
    import datasets
    import trl

    from .engine import AdapterFiles

    datasets.disable_progress_bars()
    dpo = settings.trainer == "dpo"
    kind: Any = type(
        _TRAINERS[settings.trainer][0],
        (AdapterFiles, getattr(trl, _TRAINERS[settings.trainer][0])),
        {
            "rows_per_example": 2 if dpo else 1,
            # the adapter has its own card
            "create_model_card": lambda self, *args, **kwargs: None,
        },
    )
    if dpo:
        ours["eval_dataset"] = datasets.Dataset.from_list(held) if held else None
    else:
        ours["data_collator"] = collate
    rows = datasets.Dataset.from_list(training)
    return kind(train_dataset=rows, processing_class=tokenizer, **ours)


def measured(trainer: Any) -> dict[str, float]:
    """DPO's loss on the held-out examples, and how often the chosen answer is the likelier one.

    Likelier means: by more than in the model as it was.
    """
    said = trainer.evaluate()
    return {"loss": said["eval_loss"], "accuracy": said["eval_rewards/accuracies"]}
