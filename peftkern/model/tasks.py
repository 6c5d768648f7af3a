"""The task classes: one mechanism, and for each task the data in which it differs.

``forward_args`` are the names of positional arguments, in HF PEFT's order; ``head_names`` the
modules that train in full because the task's head starts random. The rest is for prompts in front
of the input: ``labels_are_tokens`` says that labels have a place for every token,
``keeps_token_types`` that token types are extended (and not ignored), ``pools_last_token`` that a
head which scores every token is read at the last one (see ``tuners.prompting.pooling``), and
``prompt_in_encoder`` that the prompt is the encoder's. Which it is for which task is HF PEFT's
choice, but for the labels of token classification, with which it fails.
"""

from __future__ import annotations

import inspect
from typing import Any

from ..utils.peft_types import TaskType
from .base import PeftModel

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


def _prepare_inputs_for_generation(self: PeftModel, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The base model's inputs of one step of generation, with the prompt in front of the first."""
    return self.tuner.prepare_inputs(self, args, kwargs)


class PeftModelForSequenceClassification(PeftModel, task=TaskType.SEQ_CLS):
    """A classifier of texts; the head (``classifier`` or ``score``) trains with the adapter."""

    head_names = ("classifier", "score")
    keeps_token_types = True
    pools_last_token = True
    forward_args = (*_TEXT, "labels", *_OUTPUTS, "task_ids")
    forward = _forward(forward_args)


class PeftModelForTokenClassification(PeftModel, task=TaskType.TOKEN_CLS):
    """A classifier of tokens; the head (``classifier`` or ``score``) trains with the adapter."""

    head_names = ("classifier", "score")
    keeps_token_types = True
    labels_are_tokens = True
    forward_args = (*_TEXT, "labels", *_OUTPUTS, "task_ids")
    forward = _forward(forward_args)


class PeftModelForCausalLM(PeftModel, task=TaskType.CAUSAL_LM):
    """A decoder that predicts the next token."""

    labels_are_tokens = True
    finds_invocations = True
    forward_args = (*_TEXT, "labels", *_OUTPUTS, "task_ids")
    forward = _forward(forward_args)
    prepare_inputs_for_generation = _prepare_inputs_for_generation


class PeftModelForSeq2SeqLM(PeftModel, task=TaskType.SEQ_2_SEQ_LM):
    """An encoder and a decoder."""

    prompt_in_encoder = True
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
    prepare_inputs_for_generation = _prepare_inputs_for_generation

    def generate(self, **kwargs: Any) -> Any:
        """The base model's ``generate``; keywords only, as in HF PEFT."""
        return super().generate(**kwargs)


class PeftModelForQuestionAnswering(PeftModel, task=TaskType.QUESTION_ANS):
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


class PeftModelForFeatureExtraction(PeftModel, task=TaskType.FEATURE_EXTRACTION):
    """Hidden states."""

    forward_args = (*_TEXT, *_OUTPUTS, "task_ids")
    forward = _forward(forward_args)
