"""The names of adapter methods and tasks, as they stand in ``adapter_config.json``."""

from __future__ import annotations

import enum


class PeftType(str, enum.Enum):
    """Adapter methods that peftkern knows by name;
    the value is what ``peft_type`` holds on disk."""

    LORA = "LORA"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"


class TaskType(str, enum.Enum):
    """Tasks that choose the :class:`~peftkern.PeftModel` subclass."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"
