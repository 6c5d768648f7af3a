"""Texts of a model with adapters, written to stdout token by token."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from .after_settings import TextSettings
from .encode import pad_id
from .errors import UserError
from .opening import Opened, dtype_of, open_model, open_tokenizer

BASE = "base"  # what the base model is called in place of an adapter


class TooLong(Exception):
    """The text does not leave room for a token in the model's positions."""


class Speaker:
    """A model with its adapters and tokenizer, and the way in which texts are chosen.

    UserError when the task writes no text, or when something cannot be loaded.
    """

    def __init__(self, opened: Opened, settings: TextSettings) -> None:
        if opened.task not in ("causal_lm", "seq_2_seq_lm"):
            raise UserError(f"the adapter is for {opened.task}, which writes no text")
        self.tokenizer = open_tokenizer(opened)
        dtype = dtype_of(settings.dtype, settings.cpu)
        self.model: Any = open_model(opened, dtype, settings.load_in, settings.cpu)
        self.settings = settings
        self.names = list(opened.adapters)
        self._encodes = opened.task == "seq_2_seq_lm"

    def by_template(self, turns: list[dict[str, str]]) -> str:
        """The text of a conversation, up to where the model answers."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                "the tokenizer has no chat template: give one with --chat-template, or use "
                "`peftkern generate`"
            )
        how = {"tokenize": False, "add_generation_prompt": True}
        try:
            return str(self.tokenizer.apply_chat_template(turns, **how))
        except Exception as error:  # jinja2's, which a template may raise by itself
            raise UserError(f"the chat template refuses this talk: {error}") from error

    def say(self, text: str, adapter: str, by_template: bool = False) -> str:
        """Write what the model says after ``text`` to stdout, and return it.

        Args:
            text: the prompt.
            adapter: the adapter's name; ``BASE`` for none of them.
            by_template: the text has its special tokens already.

        Raises:
            TooLong: there is no room for a token.
        """
        from transformers import TextStreamer

        tokens = self.tokenizer(text, return_tensors="pt", add_special_tokens=not by_template)
        tokens = {
            name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")
        }
        length = tokens["input_ids"].shape[1]
        new = min(self.settings.max_new_tokens, self._room(0 if self._encodes else length, adapter))
        if new < 1 or length == 0:
            raise TooLong(f"{length} tokens")
        if self.settings.seed is not None:
            torch.manual_seed(self.settings.seed)
        if adapter != BASE and adapter not in self.model.active_adapters:
            self.model.set_adapter(adapter)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        aside = self.model.disable_adapter() if adapter == BASE else nullcontext()
        with torch.no_grad(), aside:
            found = self.model.generate(
                **tokens,
                **self._choice(),
                max_new_tokens=new,
                max_length=None,
                eos_token_id=self._ends(),
                pad_token_id=pad_id(self.tokenizer),
                streamer=streamer,
            )
        start = 0 if self._encodes else length
        return str(self.tokenizer.decode(found[0, start:], skip_special_tokens=True))

    def _choice(self) -> dict[str, Any]:
        asked = self.settings
        if asked.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        limits = {"top_p": asked.top_p, "top_k": asked.top_k}
        return {"do_sample": True, "temperature": asked.temperature, **limits}

    def _ends(self) -> list[int] | None:
        """The tokens that end a text: the model's, and the tokenizer's."""
        known = getattr(self.model.generation_config, "eos_token_id", None)
        ends = {*(known if isinstance(known, list) else [known]), self.tokenizer.eos_token_id}
        return sorted(ends - {None}) or None

    def _room(self, length: int, adapter: str) -> int:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if not isinstance(limit, int):
            return self.settings.max_new_tokens
        config = self.model.peft_config.get(adapter)
        return limit - length - (getattr(config, "num_virtual_tokens", None) or 0)
