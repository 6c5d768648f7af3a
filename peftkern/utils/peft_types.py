"""The names of adapter methods and tasks in ``adapter_config.json``."""

from __future__ import annotations

import enum


class PeftType(str, enum.Enum):
    """The adapter methods that peftkern knows; the value is that of ``peft_type`` on disk."""

    LORA = "LORA"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"


class TaskType(str, enum.Enum):
    """The tasks; each selects a subclass of :class:`~peftkern.PeftModel`."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"
