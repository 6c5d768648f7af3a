"""``runner``: the shortest way from one token to the next, for services with unmerged adapters.

``generate`` prepares and checks at each token what does not change while a text grows. A
:class:`Runner` does that once for a text, and a step is the model's forward and the choice of the
next token. On a CUDA device a step is recorded as a CUDA graph over a cache of fixed size: the host
then launches one graph in place of hundreds of kernels.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .model import PeftModel
from .ops.notes import note_once
from .tuners.tuner import Decoding
from .utils.graphs import Graph, why_no_graph
from .utils.private import attention_name, keeps_other_state
from .utils.versions import cache_name

_LONGEST = 4096  # tokens, where nobody says how long texts may get


def runner(model: PeftModel, max_length: int | None = None, graph: bool | None = None) -> Runner:
    """A loop that decodes with ``model``'s adapters at low latency.

    Args:
        model: a PeftModel of a decoder.
        max_length: the longest text, prompt included, in tokens: the size of a graph's cache.
            None: the model's positions, at most 4096.
        graph: record steps as CUDA graphs; False: do not; None: where that can be, and the log
            says once why not.

    Raises:
        NotImplementedError: the model is no decoder with a cache of keys and values; or ``graph``
            is True and there can be none.
        ValueError: ``max_length`` is not positive, or more than the model has positions.
    """
    return Runner(model, max_length, graph)


class Runner:
    """See :func:`runner`. It is for one batch of texts at a time, not for several threads."""

    def __init__(
        self, model: PeftModel, max_length: int | None = None, graph: bool | None = None
    ) -> None:
        base: Any = model.get_base_model()
        _check_decoder(base)
        self.model, self._base = model, base
        self.max_length = _longest(base, max_length)
        parameters = inspect.signature(base.forward).parameters
        self._takes = {n for n in ("position_ids", "logits_to_keep") if n in parameters}
        self._recorded: dict[Any, _Recorded] = {}
        self._graph = graph
        reason = why_no_graph(base.device) or model.tuner.why_no_graph or _why_not_static(base)
        if graph and reason is not None:
            raise NotImplementedError(f"graph=True: {reason}")
        self._why_no_graph = reason if graph is not False else "graph=False"

    def reset(self) -> None:
        """Forget recorded steps: after weights were replaced by other tensors, or merged."""
        self._recorded.clear()

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        **settings: Any,
    ) -> Tensor:
        """The texts [B, T + n] that ``model.generate`` gives for the same settings.

        Args:
            input_ids, attention_mask, max_new_tokens, settings: as of :meth:`stream`.

        Raises:
            ValueError, NotImplementedError: as :meth:`stream`.
        """
        tokens = self.stream(input_ids, attention_mask, max_new_tokens, **settings)
        return torch.cat([input_ids, *(t[:, None] for t in tokens)], 1)

    @torch.no_grad()  # what is prepared and recorded here; each step says it for itself
    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        *,
        adapter_names: Sequence[str] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """The next token of each row, int64 [B], as soon as a step has found it.

        Args:
            input_ids: [B, T], padded on the left.
            attention_mask: [B, T], 0 for padding; None: there is none.
            max_new_tokens: the most tokens of a row.
            adapter_names: the adapter of each row ("__base__" for none); None: the active one.
            eos_token_id: a row ends with one of these. None: the model's; an empty list: none.
            pad_token_id: what a row gets after its end. None: the model's, or the first that ends.
            temperature: 0 takes the likeliest token; else samples of softmax(logits / temperature).
            top_k, top_p: samples are of the k likeliest, of the likeliest that have p together.
            generator: draws the samples.

        Raises:
            ValueError: a shape, name or setting is wrong, or the text would exceed ``max_length``.
            NotImplementedError: the model is trained with a method whose steps it cannot run.
        """
        _check_ids(input_ids, attention_mask, max_new_tokens)
        choose = _chooser(temperature, top_k, top_p, generator)
        if self.model.training:
            raise ValueError("the model is in training mode; call model.eval()")
        padded = attention_mask is not None and not bool(attention_mask.all())
        mask = attention_mask if padded else None
        decoding = self.model.tuner.decoding(self.model, input_ids, adapter_names)
        length = decoding.front + input_ids.shape[1] + max_new_tokens
        if length > self.max_length:
            raise ValueError(
                f"the text would have up to {length} tokens; allowed: max_length, {self.max_length}"
            )
        steps = self._steps(decoding, input_ids, mask, adapter_names)
        ends, pad = self._ends(eos_token_id, pad_token_id, input_ids.device)
        return _tokens(steps, choose, max_new_tokens, ends, pad)

    def _ends(self, eos: Any, pad: int | None, device: Any) -> tuple[Tensor | None, int]:
        config = self._base.generation_config
        found = config.eos_token_id if eos is None else eos
        ends = [] if found is None else [found] if isinstance(found, int) else list(found)
        pad = config.pad_token_id if pad is None else pad
        if pad is None:
            pad = ends[0] if ends else 0
        return (torch.tensor(ends, device=device) if ends else None), pad

    def _steps(
        self, decoding: Decoding, ids: Tensor, mask: Tensor | None, names: Sequence[str] | None
    ) -> Any:
        reason = self._why_no_graph or decoding.why_no_graph
        if reason is not None:
            if self._graph:
                raise NotImplementedError(f"graph=True: {reason}")
            if self._graph is None and ids.device.type != "cpu":
                note_once("a runner's steps are not recorded: %s", reason)
            return _Growing(self._base, decoding, ids, mask, self._takes)
        model = self.model
        key = (
            len(ids),
            None if names is None else tuple(names),
            tuple(model.active_adapters),
            model.has_active_enabled_adapter,
        )
        recorded = self._recorded.get(key)
        if recorded is None:
            size = len(ids), self.max_length
            recorded = self._recorded[key] = _Recorded(self._base, decoding, size, self._takes)
        recorded.begin(ids, mask)
        return recorded


def _tokens(
    steps: Any, choose: Callable[[Tensor], Tensor], count: int, ends: Tensor | None, pad: int
) -> Iterator[Tensor]:
    token = ended = None
    for i in range(count):
        with torch.no_grad():  # not around the yield: the caller's code runs there
            token = choose(steps.next(token))
            if ends is not None:
                if ended is not None:
                    token = token.masked_fill(ended, pad)
                over = torch.isin(token, ends)
                ended = over if ended is None else ended | over
        yield token
        if ended is not None and i + 1 < count and bool(ended.all()):
            return


# ------------------------------------------------------------------------------ steps


def positions_of(mask: Tensor) -> Tensor:
    """Positions [B, T] of tokens behind padding [B, T]; those of padding do not matter."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class _Growing:
    """Steps over a cache that grows."""

    def __init__(
        self, base: Any, decoding: Decoding, ids: Tensor, mask: Tensor | None, takes: set[str]
    ) -> None:
        self.base, self.decoding, self.ids, self.mask, self.takes = base, decoding, ids, mask, takes
        # behind a prompt, tokens count the padding in between, in generate() and in HF PEFT
        self.told_positions = "position_ids" in takes and not decoding.front
        self.cache: Any = None
        self.name: Any = cache_name(base)

    def next(self, token: Tensor | None) -> Tensor:
        """The logits [B, V] behind the prompt, or behind the last step's ``token`` [B]."""
        given: dict[str, Any] = {"use_cache": True}
        if token is None:
            given |= {"input_ids": self.ids, "attention_mask": self.mask}
            given = self.decoding.first(given)
            self.mask = given["attention_mask"]
            if self.mask is None:
                del given["attention_mask"]
            elif self.told_positions:
                given["position_ids"] = positions_of(self.mask)
            if "logits_to_keep" in self.takes:
                given["logits_to_keep"] = 1
        else:
            given |= {"input_ids": token[:, None], self.name: self.cache}
            if self.mask is not None:
                self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], 1)
                given["attention_mask"] = self.mask
                if self.told_positions:
                    given["position_ids"] = self.mask.sum(-1, keepdim=True) - 1
        with self.decoding.context():
            out = self.base(**given)
        self.cache = out[self.name] if self.name in out else out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits


class _Recorded:
    """Steps over a cache of fixed size, recorded as a graph when it is made.

    Each step reads its token, position and place in the cache from tensors that it moves on itself.
    """

    def __init__(
        self, base: Any, decoding: Decoding, size: tuple[int, int], takes: set[str]
    ) -> None:
        from transformers import StaticCache

        rows, length = size
        device = base.device
        self.base, self.decoding, self.takes = base, decoding, takes
        self.name: Any = cache_name(base)
        self.cache = StaticCache(config=base.config, max_cache_len=length)
        self.token = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros_like(self.token)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)  # of the token in the cache
        self.slots = torch.arange(length, device=device)
        self.is_text = torch.ones(rows, length, dtype=torch.bool, device=device)
        self.zero = torch.zeros((), dtype=base.dtype, device=device)
        self.low = torch.full_like(self.zero, torch.finfo(base.dtype).min)
        self.logits: Any = None
        self.begin(self.token, None)
        self.logits = self._first().clone()  # makes the cache's tensors too
        self.graph = Graph(self._step, device)

    def begin(self, ids: Tensor, mask: Tensor | None) -> None:
        """Start on prompts [B, T]; ``mask`` [B, T] is 0 for padding on the left."""
        self.ids, self.mask = ids, mask
        self.is_text.fill_(True)
        T = ids.shape[1]
        if mask is None:
            self.position.fill_(T)
        else:
            self.is_text[:, :T] = mask.bool()
            self.position.copy_(mask.sum(-1, keepdim=True))
        self.place.fill_(T)
        self.cache.reset()

    def _first(self) -> Tensor:
        given: dict[str, Any] = {"input_ids": self.ids, "use_cache": True, self.name: self.cache}
        if self.mask is not None:
            given["attention_mask"] = self.mask
            if "position_ids" in self.takes:
                given["position_ids"] = positions_of(self.mask)
        if "logits_to_keep" in self.takes:
            given["logits_to_keep"] = 1
        with self.decoding.context():
            logits: Tensor = self.base(**given).logits[:, -1]
        return logits

    def _step(self) -> None:
        seen = (self.slots <= self.place) & self.is_text
        mask = torch.where(seen, self.zero, self.low)[:, None, None]
        given = {"input_ids": self.token, "attention_mask": mask, self.name: self.cache}
        if "position_ids" in self.takes:
            given["position_ids"] = self.position
        with self.decoding.context():
            self.logits.copy_(self.base(**given, use_cache=True).logits[:, -1])
        self.position += 1
        self.place += 1

    def next(self, token: Tensor | None) -> Tensor:
        """As :meth:`_Growing.next`; the next step writes over what is returned."""
        if token is None:
            return self._first()
        self.token.copy_(token[:, None])
        self.graph.replay()
        found: Tensor = self.logits
        return found


# ------------------------------------------------------------------------------ the next token


def _chooser(
    temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Callable[[Tensor], Tensor]:
    """A function from logits [B, V] to tokens [B]."""
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; allowed: 0 or more")
    if not temperature:
        if top_k is not None or top_p is not None:
            raise ValueError("top_k and top_p choose among samples; allowed: with a temperature")
        return lambda logits: logits.argmax(-1)
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = [TemperatureLogitsWarper(float(temperature))]
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))

    def sample(logits: Tensor) -> Tensor:
        scores = logits.float()
        for warper in warpers:
            scores = warper(None, scores)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]

    return sample


# ------------------------------------------------------------------------------ what is checked


def _check_ids(ids: Any, mask: Any, count: Any) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(f"input_ids: {_shape(ids)} was given; allowed: [B, T], not empty")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask: {_shape(mask)} was given; allowed: input_ids' {_shape(ids)}"
            )
        if not bool(mask[:, -1].all()):
            raise ValueError("attention_mask ends with padding; allowed: padding on the left")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"max_new_tokens is {count!r}; allowed: a number from 1 on")


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _check_decoder(base: Any) -> None:
    name = type(base).__name__
    if not callable(getattr(base, "generate", None)) or getattr(base, "config", None) is None:
        raise NotImplementedError(f"{name} does not generate; allowed: transformers' decoders")
    if base.config.is_encoder_decoder or cache_name(base) is None:
        raise NotImplementedError(
            f"{name} is no decoder with a cache of keys and values, which a runner needs; "
            "generate() runs it"
        )
    if keeps_other_state(base):
        raise NotImplementedError(
            f"{name} keeps a state other than keys and values; generate() runs it"
        )


def _longest(base: Any, given: int | None) -> int:
    text = base.config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if given is None:
        return min(positions or _LONGEST, _LONGEST)
    if isinstance(given, bool) or operator.index(given) < 1:
        raise ValueError(f"max_length is {given!r}; allowed: a number from 1 on")
    if positions is not None and given > positions:
        raise ValueError(f"max_length is {given}; allowed: up to the model's {positions} positions")
    return given


def _why_not_static(base: Any) -> str | None:
    """The reason that a step over a cache of fixed size cannot be recorded."""
    from transformers import StaticCache

    kinds = set(getattr(base.config.get_text_config(decoder=True), "layer_types", None) or ())
    if kinds - {"full_attention"}:
        return f"layers of several kinds ({', '.join(sorted(kinds))}) need a mask each"
    how = attention_name(base.config)
    if how not in ("sdpa", "eager"):
        return f"attn_implementation={how!r}; allowed: sdpa, eager"
    layer = StaticCache(config=base.config, max_cache_len=1).layers[0]
    if not hasattr(layer, "cumulative_length"):
        return "this transformers' StaticCache does not count its tokens on the device"
    return None
