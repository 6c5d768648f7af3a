"""peftkern: HF PEFT's adapters on fused operations. Same API, same numbers, same checkpoints.

Names are imported when they are first used, so that ``import peftkern`` takes no longer than
``import torch`` and never uses the network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._version import __version__
from .utils.lazy import lazily

if TYPE_CHECKING:
    from .arrow import create_arrow_model as create_arrow_model
    from .auto import AutoPeftModel as AutoPeftModel
    from .auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from .auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from .auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from .auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from .auto import (
        AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
    )
    from .auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from .checkpoint.base_weights import get_base_model_state_dict as get_base_model_state_dict
    from .checkpoint.base_weights import set_base_model_state_dict as set_base_model_state_dict
    from .checkpoint.loading import set_peft_model_state_dict as set_peft_model_state_dict
    from .checkpoint.state_dicts import get_peft_model_state_dict as get_peft_model_state_dict
    from .checkpoint.state_dicts import load_peft_weights as load_peft_weights
    from .condition_numbers import find_kappa_target_modules as find_kappa_target_modules
    from .configs import PeftConfig as PeftConfig
    from .configs import PromptLearningConfig as PromptLearningConfig
    from .explaining import explain as explain
    from .fuse_callback import FuseCallback as FuseCallback
    from .fusing import fuse as fuse
    from .fusing import unfuse as unfuse
    from .mapping import PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING
    from .mapping import PEFT_TYPE_TO_MIXED_MODEL_MAPPING as PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    from .mapping import PEFT_TYPE_TO_PREFIX_MAPPING as PEFT_TYPE_TO_PREFIX_MAPPING
    from .mapping import PEFT_TYPE_TO_TUNER_MAPPING as PEFT_TYPE_TO_TUNER_MAPPING
    from .mapping import get_peft_config as get_peft_config
    from .mapping import get_peft_model as get_peft_model
    from .mapping import inject_adapter_in_model as inject_adapter_in_model
    from .mixed_model import PeftMixedModel as PeftMixedModel
    from .model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    from .model import PeftModel as PeftModel
    from .model import PeftModelForCausalLM as PeftModelForCausalLM
    from .model import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
    from .model import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
    from .model import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
    from .model import PeftModelForSequenceClassification as PeftModelForSequenceClassification
    from .model import PeftModelForTokenClassification as PeftModelForTokenClassification
    from .model.status import get_layer_status as get_layer_status
    from .model.status import get_model_status as get_model_status
    from .model.wrapping import check_ranks as check_ranks
    from .ops.backend import use_backend as use_backend
    from .ops.lora import lora_linear as lora_linear
    from .quantising import quantize_base as quantize_base
    from .quantising import set_base_compute as set_base_compute
    from .running import Runner as Runner
    from .running import runner as runner
    from .stand_in import as_peft as as_peft
    from .tuners.lora import AdapterNames as AdapterNames
    from .tuners.lora import ArrowConfig as ArrowConfig
    from .tuners.lora import BdLoraConfig as BdLoraConfig
    from .tuners.lora import CordaConfig as CordaConfig
    from .tuners.lora import EvaConfig as EvaConfig
    from .tuners.lora import KasaConfig as KasaConfig
    from .tuners.lora import LoftQConfig as LoftQConfig
    from .tuners.lora import LoraConfig as LoraConfig
    from .tuners.lora import LoraGAConfig as LoraGAConfig
    from .tuners.lora import LoraModel as LoraModel
    from .tuners.lora import LoraRuntimeConfig as LoraRuntimeConfig
    from .tuners.lora import MontecloraConfig as MontecloraConfig
    from .tuners.lora import VeloraConfig as VeloraConfig
    from .tuners.lora import convert_to_lora as convert_to_lora
    from .tuners.lora import get_eva_state_dict as get_eva_state_dict
    from .tuners.lora import initialize_lora_eva_weights as initialize_lora_eva_weights
    from .tuners.lora import preprocess_corda as preprocess_corda
    from .tuners.lora import preprocess_loraga as preprocess_loraga
    from .tuners.lora import reduce_intruder_dimension as reduce_intruder_dimension
    from .tuners.lora import save_as_lora as save_as_lora
    from .tuners.p_tuning import PromptEncoder as PromptEncoder
    from .tuners.p_tuning import PromptEncoderConfig as PromptEncoderConfig
    from .tuners.p_tuning import (
        PromptEncoderReparameterizationType as PromptEncoderReparameterizationType,
    )
    from .tuners.prefix_tuning import PrefixEncoder as PrefixEncoder
    from .tuners.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
    from .tuners.preparing import cast_mixed_precision_params as cast_mixed_precision_params
    from .tuners.preparing import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from .tuners.preparing import shift_tokens_right as shift_tokens_right
    from .tuners.prompt_tuning import PromptEmbedding as PromptEmbedding
    from .tuners.prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from .tuners.prompt_tuning import PromptTuningInit as PromptTuningInit
    from .tuners.trainable_tokens import TrainableTokensLayer as TrainableTokensLayer
    from .tuners.trainable_tokens import TrainableTokensWrapper as TrainableTokensWrapper
    from .utils.constants import (
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,  # noqa: E501
    )
    from .utils.constants import (
        TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,  # noqa: E501
    )
    from .utils.constants import (
        bloom_model_postprocess_past_key_value as bloom_model_postprocess_past_key_value,
    )
    from .utils.error import NoMatchingPeftModuleError as NoMatchingPeftModuleError
    from .utils.error import PeftError as PeftError
    from .utils.loftq_utils import replace_lora_weights_loftq as replace_lora_weights_loftq
    from .utils.other import ModulesToSaveWrapper as ModulesToSaveWrapper
    from .utils.peft_types import PeftType as PeftType
    from .utils.peft_types import TaskType as TaskType
    from .utils.warning import PeftWarning as PeftWarning

_WHERE = {
    ".arrow": "create_arrow_model",
    ".auto": (
        "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction "
        "AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM "
        "AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification"
    ),
    ".configs": "PeftConfig PromptLearningConfig",
    ".explaining": "explain",
    ".fusing": "fuse unfuse",
    ".fuse_callback": "FuseCallback",
    ".mapping": (
        "get_peft_config get_peft_model inject_adapter_in_model PEFT_TYPE_TO_CONFIG_MAPPING "
        "PEFT_TYPE_TO_TUNER_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING"
    ),
    ".condition_numbers": "find_kappa_target_modules",
    ".mixed_model": "PeftMixedModel",
    ".ops.backend": "use_backend",
    ".ops.lora": "lora_linear",
    ".model": (
        "PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction "
        "PeftModelForQuestionAnswering "
        "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification "
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING"
    ),
    ".stand_in": "as_peft",
    ".tuners.lora": (
        "ArrowConfig BdLoraConfig KasaConfig "
        "AdapterNames CordaConfig EvaConfig LoftQConfig LoraConfig LoraGAConfig LoraModel "
        "LoraRuntimeConfig convert_to_lora get_eva_state_dict initialize_lora_eva_weights "
        "preprocess_corda preprocess_loraga reduce_intruder_dimension save_as_lora VeloraConfig "
        "MontecloraConfig"
    ),
    ".tuners.p_tuning": "PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType",
    ".tuners.prefix_tuning": "PrefixEncoder PrefixTuningConfig",
    ".tuners.trainable_tokens": "TrainableTokensLayer TrainableTokensWrapper",
    ".tuners.prompt_tuning": "PromptEmbedding PromptTuningConfig PromptTuningInit",
    ".quantising": "quantize_base set_base_compute",
    ".running": "Runner runner",
    ".model.wrapping": "check_ranks",
    ".model.status": "get_layer_status get_model_status",
    ".utils.constants": (
        "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING "
        "bloom_model_postprocess_past_key_value"
    ),
    ".utils.error": "NoMatchingPeftModuleError PeftError",
    ".utils.loftq_utils": "replace_lora_weights_loftq",
    ".utils.other": "ModulesToSaveWrapper",
    ".utils.peft_types": "PeftType TaskType",
    ".tuners.preparing": (
        "cast_mixed_precision_params prepare_model_for_kbit_training shift_tokens_right"
    ),
    ".checkpoint.base_weights": "get_base_model_state_dict set_base_model_state_dict",
    ".checkpoint.loading": "set_peft_model_state_dict",
    ".checkpoint.state_dicts": "get_peft_model_state_dict load_peft_weights",
    ".utils.warning": "PeftWarning",
}
_names, _find = lazily(__name__, _WHERE)
__all__ = ["__version__", *_names]


if not TYPE_CHECKING:  # with a __getattr__ a type checker would accept any name, misspelt or not
    __getattr__ = _find


def __dir__() -> list[str]:
    return sorted(__all__)
