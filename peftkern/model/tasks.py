"""The classes of ``PeftModel`` for each task: one mechanism, with different data.

- ``forward_args``: names of positional arguments, in HF PEFT's order.
- ``head_names``: modules that train in full, because the task's head starts at random.

The rest is for prompts before the input:

- ``labels_are_tokens``: labels have a place for every token.
- ``keeps_token_types``: token types are extended for the prompt, and not ignored.
- ``pools_last_token``: the head scores every token, and the last one is read (see
  ``tuners.prompting.pooling``).
- ``prompt_in_encoder``: the prompt is put before the encoder's input.

The values for each task are HF PEFT's, except for the labels of token classification, with which HF
PEFT fails.
"""

from __future__ import annotations

import inspect
from typing import Any

from ..utils.peft_types import TaskType
from .base import PeftModel

_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict")
_TEXT = ("input_ids", "attention_mask", "inputs_embeds")


def _forward(names: tuple[str, ...]) -> Any:
    """PeftModel's forward with a signature of the task's arguments, for callers that inspect it."""

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return PeftModel.forward(self, *args, **kwargs)

    kind = inspect.Parameter
    parameters = [kind("self", kind.POSITIONAL_OR_KEYWORD)]
    parameters += [kind(n, kind.POSITIONAL_OR_KEYWORD, default=None) for n in names]
    forward.__signature__ = inspect.Signature([*parameters, kind("kwargs", kind.VAR_KEYWORD)])  # type: ignore
    forward.__doc__ = PeftModel.forward.__doc__
    return forward


def _prepare_inputs_for_generation(self: PeftModel, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The base model's inputs of one step of generation; the first step gets the prompt."""
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
    """An encoder-decoder model that generates text."""

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
    """A model that finds start and end of an answer; its head ``qa_outputs`` trains too."""

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
    """A model that returns hidden states."""

    forward_args = (*_TEXT, *_OUTPUTS, "task_ids")
    forward = _forward(forward_args)
