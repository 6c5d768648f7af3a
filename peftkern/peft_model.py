"""HF PEFT's address of :class:`peftkern.PeftModel`, its tasks and their status."""

from .checkpoint.loading import set_peft_model_state_dict
from .checkpoint.state_dicts import get_peft_model_state_dict, load_peft_weights
from .configs.base import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from .model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .model.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from .tuners.base_layer import BaseTunerLayer
from .tuners.base_tuner import BaseTuner
from .tuners.lora.alora import get_alora_offsets_for_forward, get_alora_offsets_for_generate
from .tuners.modules_to_save import AuxiliaryTrainingWrapper, _set_adapter
from .tuners.preparing import shift_tokens_right
from .tuners.registry import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from .tuners.trainable_tokens.wrapper import TrainableTokensWrapper
from .utils.constants import (
    DUMMY_MODEL_CONFIG,
    SAFETENSORS_WEIGHTS_NAME,
    TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,
    WEIGHTS_NAME,
)
from .utils.device import infer_device
from .utils.integrations import init_empty_weights
from .utils.module_tree import batch_size as _get_batch_size
from .utils.module_tree import id_tensor_storage
from .utils.peft_types import PeftType, TaskType

__all__ = [
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "DUMMY_MODEL_CONFIG",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "TaskType",
    "TrainableTokensWrapper",
    "TunerLayerStatus",
    "TunerModelStatus",
    "WEIGHTS_NAME",
    "_get_batch_size",
    "_set_adapter",
    "get_alora_offsets_for_forward",
    "get_alora_offsets_for_generate",
    "get_layer_status",
    "get_model_status",
    "get_peft_model_state_dict",
    "id_tensor_storage",
    "infer_device",
    "init_empty_weights",
    "load_peft_weights",
    "set_peft_model_state_dict",
    "shift_tokens_right",
]
