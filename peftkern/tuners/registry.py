"""Tables of the classes that implement each method."""

from __future__ import annotations

from typing import Any

from ..utils.peft_types import PeftType
from .lora import LoraModel
from .lora.tuner import LoraTuner
from .p_tuning import PromptEncoder
from .prefix_tuning import PrefixEncoder
from .prompt_tuning import PromptEmbedding
from .prompting.tuner import PromptTuner
from .tuner import Tuner

PEFT_TYPE_TO_TUNER_MAPPING: dict[PeftType, Any] = {  # a tuner, or an encoder of prompts
    PeftType.LORA: LoraModel,
    PeftType.PREFIX_TUNING: PrefixEncoder,
    PeftType.PROMPT_TUNING: PromptEmbedding,
    PeftType.P_TUNING: PromptEncoder,
}
PEFT_TYPE_TO_PREFIX_MAPPING: dict[PeftType, str] = {PeftType.LORA: LoraModel.prefix}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[PeftType, Any] = {PeftType.LORA: LoraModel}


def tuner_for(peft_type: Any) -> Tuner:
    """A new :class:`Tuner` for a PeftModel with adapters of this method."""
    return LoraTuner() if PeftType(peft_type) is PeftType.LORA else PromptTuner()
