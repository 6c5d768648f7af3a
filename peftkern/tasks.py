"""The task classes: one mechanism, and for each task the data in which it differs.

``forward_args`` are the names of positional arguments, in HF PEFT's order; ``head_names`` the
modules that train in full because the task's head starts random.
"""

from __future__ import annotations

import inspect
from typing import Any

from .peft_model import PeftModel
from .utils.peft_types import TaskType

_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict")
_TEXT = ("input_ids", "attention_mask", "inputs_embeds")


def _forward(names: tuple[str, ...]) -> Any:
    """PeftModel's forward with a signature that names the task's arguments,
    for callers that inspect it."""

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return PeftModel.forward(self, *args, **kwargs)

    kind = inspect.Parameter
    parameters = [kind("self", kind.POSITIONAL_OR_KEYWORD)]
    parameters += [kind(n, kind.POSITIONAL_OR_KEYWORD, default=None) for n in names]
    forward.__signature__ = inspect.Signature([*parameters, kind("kwargs", kind.VAR_KEYWORD)])  # type: ignore
    forward.__doc__ = PeftModel.forward.__doc__
    return forward


class PeftModelForSequenceClassification(PeftModel):
    """A classifier of texts; the head (``classifier`` or ``score``) trains with the adapter."""

    head_names = ("classifier", "score")
    forward_args = (*_TEXT, "labels", *_OUTPUTS, "task_ids")
    forward = _forward(forward_args)


class PeftModelForTokenClassification(PeftModel):
    """A classifier of tokens; the head (``classifier`` or ``score``) trains with the adapter."""

    head_names = ("classifier", "score")
    forward_args = (*_TEXT, "labels", *_OUTPUTS, "task_ids")
    forward = _forward(forward_args)


class PeftModelForCausalLM(PeftModel):
    """A decoder that predicts the next token."""

    forward_args = (*_TEXT, "labels", *_OUTPUTS, "task_ids")
    forward = _forward(forward_args)


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder and a decoder."""

    forward_args = (
        *_TEXT,
        "decoder_input_ids",
        "decoder_attention_mask",
        "decoder_inputs_embeds",
        "labels",
        *_OUTPUTS,
        "task_ids",
    )
    forward = _forward(forward_args)


class PeftModelForQuestionAnswering(PeftModel):
    """Start and end of an answer; the head ``qa_outputs`` trains with the adapter."""

    head_names = ("qa_outputs",)
    forward_args = (
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "inputs_embeds",
        "start_positions",
        "end_positions",
        *_OUTPUTS,
    )
    forward = _forward(forward_args)


class PeftModelForFeatureExtraction(PeftModel):
    """Hidden states."""

    forward_args = (*_TEXT, *_OUTPUTS, "task_ids")
    forward = _forward(forward_args)


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[Any, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}
