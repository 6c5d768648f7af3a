"""transformers' continuous batching on an adapted model, each request with its own adapter.

``generate_batch`` and its manager take requests in as others finish. A step's tokens of all
requests lie one after the other in one row, so the layers get the adapter of each token
(:class:`~peftkern.utils.handing.TokenNames`), and the mixed product computes them together.

A request's adapter travels with it as one of its ``logit_processor_kwargs``: transformers carries
those along when it forks a request, puts it off or sends it to other ranks.

Blocks of keys and values are not shared between requests here. transformers finds them by their
tokens alone, and the same tokens have other keys and values under another adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from itertools import chain, groupby, repeat
from operator import itemgetter
from typing import Any

from ..tuners.lora.row_adapters import AdapterNames
from ..tuners.wrapped import Adapted
from ..utils.handing import TokenNames

NAME = "adapter_name"  # a request's keyword
# settings under which a step would run with the adapters of an earlier one
_FIXED = (
    "use_cuda_graph",
    "use_async_batching",
    "varlen_compile_config",
    "decode_compile_config",
    "default_compile_level",
    "use_default_compile_configs",
)
_KEPT = 64  # how many batches' names are kept; a batch of unchanged requests comes at each step


class BatchedGeneration:
    """The doors of continuous batching, for a ``PeftModel`` that generates text."""

    def generate_batch(
        self: Adapted,
        inputs: list[list[int]],
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate_batch``: texts of many requests, which start as others end.

        Args:
            inputs: the prompts' tokens.
            adapter_names: the adapter of each prompt ("__base__" for none); None: the active one
                for all.
            args, kwargs: as of transformers' method.

        Returns:
            {request: its output}, in the order of ``inputs``.

        Raises:
            ValueError: as many names as prompts are needed; one is unknown, merged or of a variant
                that cannot share a batch; or the model is in training mode.
            NotImplementedError: the method is none of LoRA, transformers has no continuous
                batching, or a layer takes its tokens together.
        """
        if adapter_names is None:
            return _base_of(self).generate_batch(inputs, *args, **kwargs)
        _check_count(adapter_names, inputs)
        _base_of(self, adapter_names)
        return _host(self, adapter_names).generate_batch(inputs, *args, **kwargs)

    def init_continuous_batching(self: Adapted, *args: Any, **kwargs: Any) -> Any:
        """transformers' manager of requests, whose requests may name their adapters.

        ``add_request(tokens, adapter_name="a")`` and ``add_requests(list_of_tokens,
        adapter_names=["a", "__base__"])``; a request without a name takes the active adapter.

        Raises:
            NotImplementedError: as :meth:`generate_batch`.
        """
        return _host(self, None).init_continuous_batching(*args, **kwargs)

    def continuous_batching_context_manager(self: Adapted, *args: Any, **kwargs: Any) -> Any:
        """transformers' context of a started manager; see :meth:`init_continuous_batching`."""
        return _host(self, None).continuous_batching_context_manager(*args, **kwargs)


def _base_of(host: Adapted, names: Sequence[str] | None = None) -> Any:
    """The transformers model, when its continuous batching can run it with its adapters.

    ``names``: as of :meth:`~peftkern.tuners.tuner.Tuner.check_requests`.
    """
    base: Any = host.get_base_model()
    if not hasattr(base, "generate_batch"):
        raise NotImplementedError(
            f"{type(base).__name__} has no generate_batch: continuous batching is for models of "
            "transformers that generate text, in a version that has it"
        )
    host.tuner.check_requests(host, names)
    return base


def _check_count(names: Sequence[str], inputs: Sequence[Any]) -> None:
    if len(names) != len(inputs):
        raise ValueError(
            f"adapter_names has {len(names)} entries for {len(inputs)} inputs; allowed: one for "
            "each"
        )


def _host(model: Adapted, names: Sequence[str] | None) -> Any:
    """The model's continuous batching, with managers whose requests may name adapters.

    ``names``: the adapters of the requests that come first, all together.
    """
    base = _base_of(model)
    from transformers.generation.continuous_batching import ContinuousMixin

    class Host(ContinuousMixin):
        """What transformers' methods run on in place of the model."""

        def __getattr__(self, name: str) -> Any:
            return getattr(base, name)

        def init_continuous_batching(
            self,
            generation_config: Any = None,
            continuous_batching_config: Any = None,
            **kwargs: Any,
        ) -> Any:
            config = _settings(continuous_batching_config, generation_config)
            made = base.init_continuous_batching(generation_config, config, **kwargs)
            return _adopt(made, model, names)

    return Host()


def _settings(config: Any, generation_config: Any) -> Any:
    """A copy of transformers' ``ContinuousBatchingConfig`` for requests that name adapters.

    Raises:
        ValueError: it asks for what would keep one step's adapters for others.
    """
    from transformers import ContinuousBatchingConfig

    found = config or getattr(generation_config, "continuous_batching_config", None)
    found = copy.copy(found) if found is not None else ContinuousBatchingConfig()
    for name in _FIXED:
        if getattr(found, name, None):
            raise ValueError(
                f"continuous_batching_config.{name} is {getattr(found, name)!r}; allowed where "
                "requests name their adapters: None or False, as a step's adapters are chosen on "
                "the host. Without names call get_base_model().init_continuous_batching"
            )
    found.allow_block_sharing = found.use_cuda_graph = found.use_async_batching = False
    return found


def _adopt(manager: Any, model: Adapted, names: Sequence[str] | None) -> Any:
    """The manager, whose requests can name adapters from now on."""
    base: Any = type(manager)
    kind = _manager_class(base)
    if kind is not base:
        if manager.continuous_batching_config.allow_block_sharing:
            raise RuntimeError(
                "the model keeps a manager of continuous batching that shares blocks between "
                "requests, which may not name adapters then; call "
                "destroy_cached_continuous_batching_manager() first"
            )
        manager.logit_processor.supported_keys[NAME] = str
        manager.__class__ = kind
        manager.model = _NamedModel(model, manager)
    manager.adapted, manager.first_names = model, names
    return manager


@cache
def _manager_class(base: Any) -> Any:
    """transformers' manager with requests that name adapters."""
    if issubclass(base, _Requests):
        return base
    return type(base.__name__, (_Requests, base), {})


class _Requests:
    """A manager's requests with names of adapters."""

    adapted: Any
    first_names: Sequence[str] | None

    def add_request(
        self, input_ids: list[int], *args: Any, adapter_name: str | None = None, **kwargs: Any
    ) -> Any:
        """transformers' ``add_request``, with the request's adapter (None: the active one).

        Raises:
            ValueError: the name is unknown; or there is none, and several adapters are active.
        """
        name = _active(self.adapted) if adapter_name is None else adapter_name
        self.adapted.tuner.check_requests(self.adapted, [name])
        parent: Any = super()
        return parent.add_request(input_ids, *args, **kwargs, **{NAME: name})

    def add_requests(
        self,
        inputs: list[list[int]],
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """transformers' ``add_requests``, with each request's adapter."""
        names, self.first_names = adapter_names or self.first_names, None
        parent: Any = super()
        if names is None:
            return parent.add_requests(inputs, *args, **kwargs)
        _check_count(names, inputs)
        self.adapted.tuner.check_requests(self.adapted, names)
        ids = []
        for name, run in groupby(zip(names, inputs, strict=True), itemgetter(0)):
            tokens = [given for _, given in run]
            ids += parent.add_requests(tokens, *args, **kwargs, **{NAME: name})
        return ids


def _active(model: Adapted) -> str:
    """The name of the adapter that a request without one takes."""
    if not model.has_active_enabled_adapter:
        return "__base__"
    active = model.active_adapters
    if len(active) > 1:
        raise ValueError(
            f"several adapters are active ({', '.join(active)}), of which a request can take one; "
            "name it with adapter_name"
        )
    return active[0]


class _NamedModel:
    """The model as a manager calls it: the tokens of each request take its adapter."""

    def __init__(self, model: Adapted, manager: Any) -> None:
        known: dict[Any, TokenNames] = {}
        self.__dict__.update(adapted=model, manager=manager, known=known)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapted.get_base_model(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.adapted.get_base_model(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.adapted.get_base_model(), name)

    def __call__(self, **batch: Any) -> Any:
        model: Any = self.adapted
        base = model.get_base_model()
        parts = tuple(
            (r.state.logit_processor_kwargs.get(NAME, "__base__"), r.query_length, r.has_new_token)
            for r in self.manager.batch_processor.inputs_and_outputs.requests_in_batch
        )
        if {name for name, _, _ in parts} == {_only_active(model)}:
            return base(**batch)  # no layer needs to be told
        names = self.known.get(parts)
        if names is None:
            if len(self.known) >= _KEPT:
                self.known.clear()
            each = AdapterNames(chain.from_iterable(repeat(n, count) for n, count, _ in parts))
            kept = [name for name, _, new in parts if new]
            # one place for each request; the last ones stay at token 0, and nobody reads them
            kept += each[:1] * (len(parts) - len(kept))
            names = self.known[parts] = TokenNames(each, AdapterNames(kept))
        # a model that is not told which logits to keep computes all, and transformers takes some
        with model.base_model.handing_tokens(names, "logits_to_keep" in batch):
            return base(**batch)


def _only_active(model: Adapted) -> str | None:
    """The adapter with which a call without names would compute; None if there are several."""
    if not model.has_active_enabled_adapter:
        return "__base__"
    active = model.active_adapters
    return active[0] if len(active) == 1 else None
