"""Configuration of prompt tuning."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from ..utils.peft_types import PeftType
from .checks import one_of
from .prompt_learning import PromptLearningConfig


class PromptTuningInit(str, enum.Enum):
    """The source of the first values of the virtual tokens."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig, method=PeftType.PROMPT_TUNING):
    """Prompt tuning: trained embeddings before the input.

    Args:
        prompt_tuning_init: TEXT, SAMPLE_VOCAB or RANDOM.
        prompt_tuning_init_text: the text, for TEXT.
        tokenizer_name_or_path: the tokenizer of that text, for TEXT.
        tokenizer_kwargs: arguments for that tokenizer, for TEXT.
    """

    prompt_tuning_init: PromptTuningInit | str = field(default=PromptTuningInit.RANDOM)
    prompt_tuning_init_text: str | None = field(default=None)
    tokenizer_name_or_path: str | None = field(default=None)
    tokenizer_kwargs: dict[str, Any] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PROMPT_TUNING
        one_of(PromptTuningInit, self.prompt_tuning_init, "prompt_tuning_init")
        if self.prompt_tuning_init == PromptTuningInit.TEXT:
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, name):
                    raise ValueError(
                        f"When prompt_tuning_init='TEXT', {name} can't be {getattr(self, name)}."
                    )
        elif self.tokenizer_kwargs:
            raise ValueError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")
