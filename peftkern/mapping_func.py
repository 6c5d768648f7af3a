"""HF PEFT's second address of :func:`peftkern.get_peft_model`."""

from .configs.base import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from .configs.prompt_learning import PromptLearningConfig
from .mapping import get_peft_model
from .mixed_model import PeftMixedModel
from .model.base import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from .tuners.base_layer import BaseTunerLayer
from .tuners.base_tuner import BaseTuner
from .tuners.registry import PEFT_TYPE_TO_PREFIX_MAPPING

__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PeftConfig",
    "PeftMixedModel",
    "PeftModel",
    "PromptLearningConfig",
    "get_peft_model",
]
