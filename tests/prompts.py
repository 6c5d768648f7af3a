"""Pairs of models with prompts, and a stand-in for the injection of prefixes.

The stand-in takes HF PEFT's way, a cache that holds the prefix in front of every row, so that what
``PeftModel`` hands to the injection can be judged without the injection.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import types
import warnings
from typing import Any

import peft
import torch
from transformers import DynamicCache, EncoderDecoderCache

import peftkern
from tests.tiny import make

KINDS = {
    "prompt": ("PromptTuningConfig", {}),
    "sample": ("PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "lstm": ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM"}),
    "prefix": ("PrefixTuningConfig", {}),
    "projection": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 12}),
}
PREFIXES = ("prefix", "projection")


def config_of(library: Any, kind: str, task: str = "CAUSAL_LM", P: int = 5, **more: Any) -> Any:
    name, settings = KINDS[kind]
    return getattr(library, name)(
        **{"task_type": task, "num_virtual_tokens": P, **settings, **more}
    )


def prompt_model(
    library: Any, kind: str, family: str = "llama", task: str = "CAUSAL_LM", **more: Any
) -> Any:
    """A tiny model with one prompt; equal seeds, so equal first values in both libraries."""
    base = more.pop("base", None)
    base = make(family, task) if base is None else copy.deepcopy(base)
    name = more.pop("adapter_name", "default")
    seed = more.pop("seed", 3)
    config = config_of(library, kind, task, **more)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.get_peft_model(base, config, adapter_name=name)


def prompt_pair(kind: str, family: str = "llama", task: str = "CAUSAL_LM", **more: Any) -> Any:
    """(peftkern's, HF PEFT's)."""
    return tuple(prompt_model(lib, kind, family, task, **more) for lib in (peftkern, peft))


class PastInjection:
    """Hands the prefixes over in ``past_key_values``, and remembers what it was asked."""

    last: PastInjection
    refuse = ""

    def __init__(
        self, model, *, num_layers, kv_heads, head_dim, num_virtual_tokens, always_visible=False
    ):
        if self.refuse:
            raise ValueError(self.refuse)
        self.model, self.P, self.removed = model, num_virtual_tokens, False
        self.sizes = (num_layers, kv_heads, head_dim, num_virtual_tokens)
        self.prefixes = self.no_prefix = None
        self.lengths = {num_virtual_tokens}
        PastInjection.last = self

    def allow(self, num_virtual_tokens, always_visible=False):
        self.lengths.add(num_virtual_tokens)

    @contextlib.contextmanager
    def active(self, prefixes, *, no_prefix=None, positions_moved=False):
        assert not self.removed
        self.P = prefixes[0][0].shape[-2]
        assert self.P in self.lengths
        self.prefixes, self.no_prefix = prefixes, no_prefix
        handle = self.model.register_forward_pre_hook(self.add, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def add(self, module, args, kwargs):
        names = ("input_ids", "inputs_embeds", "decoder_input_ids")
        B, T = next(kwargs[n] for n in names if kwargs.get(n) is not None).shape[:2]
        pairs = [
            tuple(
                x.repeat_interleave(B // len(x), 0) if x.dim() == 4 else x.expand(B, *x.shape)
                for x in pair
            )
            for pair in self.prefixes
        ]
        assert all(k.shape[-2] == self.P for k, _ in pairs)
        cache = DynamicCache(pairs)
        kwargs = dict(kwargs)
        given = kwargs.get("past_key_values")
        if given is not None and given.get_seq_length():  # a later step of generation
            cache = given
        if module.config.is_encoder_decoder:
            if cache is not given:
                kwargs["past_key_values"] = EncoderDecoderCache(cache, DynamicCache())
            return args, kwargs
        kwargs["past_key_values"] = cache
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(B, T, dtype=torch.long)
        seen = torch.ones(B, self.P, dtype=mask.dtype)
        if self.no_prefix is not None:
            seen[self.no_prefix.repeat_interleave(B // len(self.no_prefix))] = 0
        kwargs["attention_mask"] = torch.cat((seen, mask), 1)
        return args, kwargs

    def remove(self):
        self.removed = True


def stand_in(monkeypatch: Any, cls: type = PastInjection) -> None:
    """Let PeftModel use :class:`PastInjection`."""
    module = types.ModuleType("inject")
    module.PrefixInjection = cls  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "peftkern.tuners.prefix_tuning.inject", module)
