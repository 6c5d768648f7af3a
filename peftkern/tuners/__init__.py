"""Adapter methods: the changes that each makes to a model, and the modules that it changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazily

if TYPE_CHECKING:
    from .lora import ArrowConfig as ArrowConfig
    from .lora import BdLoraConfig as BdLoraConfig
    from .lora import EvaConfig as EvaConfig
    from .lora import KasaConfig as KasaConfig
    from .lora import LoftQConfig as LoftQConfig
    from .lora import LoraConfig as LoraConfig
    from .lora import LoraGAConfig as LoraGAConfig
    from .lora import LoraModel as LoraModel
    from .lora import LoraRuntimeConfig as LoraRuntimeConfig
    from .lora import MontecloraConfig as MontecloraConfig
    from .lora import VeloraConfig as VeloraConfig
    from .lora import convert_to_lora as convert_to_lora
    from .lora import get_eva_state_dict as get_eva_state_dict
    from .lora import initialize_lora_eva_weights as initialize_lora_eva_weights
    from .lora import preprocess_loraga as preprocess_loraga
    from .lora import save_as_lora as save_as_lora
    from .p_tuning import PromptEncoder as PromptEncoder
    from .p_tuning import PromptEncoderConfig as PromptEncoderConfig
    from .p_tuning import PromptEncoderReparameterizationType as PromptEncoderReparameterizationType
    from .prefix_tuning import PrefixEncoder as PrefixEncoder
    from .prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
    from .prompt_tuning import PromptEmbedding as PromptEmbedding
    from .prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from .prompt_tuning import PromptTuningInit as PromptTuningInit

_WHERE = {
    ".lora": (
        "ArrowConfig BdLoraConfig KasaConfig "
        "LoraConfig LoraModel LoraRuntimeConfig EvaConfig LoftQConfig LoraGAConfig convert_to_lora "
        "get_eva_state_dict initialize_lora_eva_weights preprocess_loraga save_as_lora "
        "VeloraConfig MontecloraConfig"
    ),
    ".p_tuning": "PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType",
    ".prefix_tuning": "PrefixEncoder PrefixTuningConfig",
    ".prompt_tuning": "PromptEmbedding PromptTuningConfig PromptTuningInit",
}
__all__, _find = lazily(__name__, _WHERE)


if not TYPE_CHECKING:  # with a __getattr__ a type checker would accept any name, misspelt or not
    __getattr__ = _find
