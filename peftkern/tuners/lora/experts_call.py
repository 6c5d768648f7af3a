"""A call of nested wrappers of experts' parameters as one operation (:mod:`peftkern.ops`).

The outermost wrapper runs the operation with the adapters of all of them. That is decided in every
call, from the wrappers and the module as they are then (:mod:`.experts`). The functions read only
attributes that HF PEFT's ``ParamWrapper`` has too.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ...ops import autocast
from ...ops.bases.experts import reader_of
from ...ops.experts.choosing import describe
from ...ops.experts.parts import Call, ExpertLinear, Factors
from ...ops.lora_experts import lora_experts
from ...ops.tracing import is_tracing
from ..base_layer import as_names
from .experts import (
    Mixture,
    describe_implementation,
    form_of,
    is_traced_value,
    mixture_of,
    parameters_of,
    why_never,
)
from .offload import is_only_placed
from .plan import is_hooked
from .ran import last_of
from .row_adapters import AdapterNames

__all__ = ["chain_of", "describe_mixtures", "run", "why_never", "why_separate"]

NOTHING_ACTIVE = "no active adapter has weights here"


class Chain(NamedTuple):
    """Nested wrappers, the outermost first, and the module within them."""

    wrappers: tuple[Any, ...]
    module: Any

    def of(self, parameter: str) -> Any:
        """The wrapper of a parameter, or None."""
        return next((w for w in self.wrappers if w.parameter_name == parameter), None)


def chain_of(outer: Any) -> Chain:
    wrappers, module = [outer], outer._modules["base_layer"]
    while getattr(module.__class__, "layer_kind", None) == "parameter":
        wrappers.append(module)
        module = module._modules["base_layer"]
    return Chain(tuple(wrappers), module)


def active_names(wrapper: Any) -> list[str]:
    """The active adapters that a wrapper adds to its parameter in a call."""
    state = wrapper.__dict__
    if state["_disable_adapters"] or state["merged_adapters"]:
        return []
    held = state["_modules"]["lora_A"]._modules
    return [name for name in as_names(state["_active_adapter"]) if name in held]


def read(
    chain: Chain,
    rows: AdapterNames | None,
    away: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Mixture, list[ExpertLinear]] | str:
    """(the mixture, [up, down] with their adapters); or the reason for separate calls.

    With ``rows`` the adapters of up and down are those of ``rows.order``, else the active ones.
    ``away``, ``dtype``: as in :func:`.experts.mixture_of`.
    """
    outer, module = chain.wrappers[0], chain.module
    if is_tracing():
        return "torch.jit.trace records the plain formula"
    for inner in chain.wrappers[1:]:
        apart = inner.is_called_apart() and not (away and is_only_placed(inner))
        if apart or inner.__class__.forward is not outer.__class__.forward:
            return f"the wrapper of `{inner.parameter_name}` has hooks or an overridden forward"
    mixture = mixture_of(module, away, dtype)
    if isinstance(mixture, str):
        return mixture
    names = parameters_of(module)
    for wrapper in chain.wrappers:
        if wrapper.parameter_name not in names and (rows is not None or active_names(wrapper)):
            return f"`{wrapper.parameter_name}` is not the weight of a linear of the experts"
    parts = [mixture.up, mixture.down]
    for i, name in enumerate(names):
        wrapper = chain.of(name)
        if rows is not None:
            found = _of_rows(parts[i], wrapper, rows)
        elif wrapper is not None:
            found = _of_active(wrapper, parts[i].weight.dtype, away)
        else:
            continue
        if isinstance(found, str):
            return f"{name}: {found}"
        weight, bias, _ = parts[i]
        parts[i] = ExpertLinear(weight, bias, found)
    return mixture, parts


def _of_active(wrapper: Any, dtype: torch.dtype, away: bool) -> tuple[Factors, ...] | str:
    found = []
    for name in active_names(wrapper):
        factors = _factors(wrapper, name, dtype, away)
        if isinstance(factors, str):
            return factors
        found.append(factors)
    return tuple(found)


def _of_rows(part: ExpertLinear, wrapper: Any, rows: AdapterNames) -> tuple[Factors, ...] | str:
    """The factors of each of ``rows.order``, of rank 0 for an adapter without weights here."""
    held = {}
    if wrapper is not None and not wrapper._disable_adapters:
        held = wrapper._modules["lora_A"]._modules
    _, N, K = part.weight.shape
    none = Factors(part.weight.new_empty((0, K)), part.weight.new_empty((N, 0)), 0.0)
    found = []
    for name in rows.order:
        factors = _factors(wrapper, name, part.weight.dtype) if name in held else none
        if isinstance(factors, str):
            return factors
        found.append(factors)
    return tuple(found)


def _factors(wrapper: Any, name: str, dtype: torch.dtype, away: bool = False) -> Factors | str:
    """One adapter's factors for weights of ``dtype``, or why an operation cannot read them."""
    modules = wrapper.__dict__["_modules"]
    a, b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    A, B = a._parameters.get("weight"), b._parameters.get("weight")
    for what, module, weight in (("lora_A", a, A), ("lora_B", b, B)):
        if module.__class__ is not nn.Linear:
            return f"{what} is a {type(module).__name__}, not an nn.Linear"
        if type(weight) is not Parameter and not is_traced_value(weight):
            return f"the weight of {what} is a {type(weight).__name__}, not a plain Parameter"
        placed = away and is_only_placed(module)
        if is_hooked(module) and not placed:
            return f"{what} has hooks or an overridden forward"
        if weight.is_meta and not placed:
            return f"the weight of {what} is on the meta device (offloaded or not loaded yet)"
        if weight.dtype is not dtype and weight.dtype is not torch.float32:
            return f"dtypes: experts {dtype}, {what} {weight.dtype}"
    if A.dtype is not B.dtype:
        return f"dtypes: lora_A {A.dtype}, lora_B {B.dtype}"
    if b._parameters.get("bias") is not None:
        return "lora_bias"
    if name in wrapper.lora_variant:
        return (
            f"adapter {name!r} has {wrapper.lora_variant[name].name}, which changes whole rows of W"
        )
    drop = modules["lora_dropout"]._modules[name]
    p = 0.0
    if drop.__class__ is nn.Dropout:
        p = drop.p if drop.training else 0.0
    elif drop.__class__ is not nn.Identity:
        return f"dropout is a {type(drop).__name__}"
    if is_hooked(drop):
        return "lora_dropout has hooks"
    scale = wrapper.scaling[name]
    if isinstance(scale, Tensor):  # the operation takes a number
        B, scale = B * scale, 1.0
    if p >= 1.0:  # everything is dropped, and 1 / (1 - p) is not defined
        p, scale = 0.0, 0.0
    return Factors(A, B, scale, p)


# ------------------------------------------------------------------------------ a call


def run(outer: Any, args: Any, kwargs: Any, names: Sequence[str] | None = None) -> Tensor | str:
    """The output of the outermost wrapper's call; or the reason that it is not one operation.

    Args:
        args, kwargs: the tokens [T, K], the experts' index [T, k] and the routing weights [T, k],
            as the module takes them.
        names: the adapter of each of T / S samples, whose S tokens are neighbours.

    Raises:
        ValueError: the tokens cannot be shared out to so many samples; or adapters are merged, and
            ``names`` are given.
    """
    chain = chain_of(outer)
    if torch.compiler.is_compiling() and reader_of(chain.module) is not None:
        # the loop over chosen experts reads the routing on the host: a break in the graph
        found_: Tensor | str = torch.compiler.disable(run)(outer, args, kwargs, names)
        return found_
    rows = None if names is None else AdapterNames.of(names)
    packed = reader_of(chain.module) is not None
    if rows is None and not packed and not any(map(active_names, chain.wrappers)):
        return NOTHING_ACTIVE
    given = args if len(args) == 3 and not kwargs else _bound(chain.module, args, kwargs)
    tokens = given is not None and _are_tokens(*given)
    found = read(chain, rows, dtype=given[0].dtype if given and tokens else torch.float32)
    if isinstance(found, str):
        return found
    if given is None or not tokens:
        return "the experts are called with other arguments"
    mixture, parts = found
    x, index, weights = given
    dtype = mixture.up.weight.dtype
    if x.dtype is not dtype and not autocast.is_on(x):
        return f"dtypes: tokens {x.dtype}, experts {dtype}"
    choice = None
    if rows is not None:
        choice = _choice(chain, rows, x)
        if not packed and not any(f.A.shape[0] for part in parts for f in part.factors):
            return chain.module(*args, **kwargs)
    up, down = parts
    norm, sentinels = mixture.norm, mixture.sentinels
    return lora_experts(
        x, index, weights, up, down, mixture.gate, norm=norm, choice=choice, sentinels=sentinels
    )


def _are_tokens(x: Any, index: Any, weights: Any) -> bool:
    """True for tokens [T, K], index [T, k] and weights [T, k]."""
    return (
        isinstance(x, Tensor)
        and isinstance(index, Tensor)
        and isinstance(weights, Tensor)
        and x.dim() == 2
        and index.dim() == 2
        and index.shape == weights.shape
        and index.shape[0] == x.shape[0]
    )


def _bound(module: Any, args: Any, kwargs: Any) -> tuple[Any, ...] | None:
    """(tokens, index, weights) of a call with keywords; None for other arguments."""
    form = form_of(module.__class__)
    eager = type(module).forward if form is None else form.eager
    try:
        bound = inspect.signature(eager).bind(module, *args, **kwargs)
    except TypeError:
        return None
    given = tuple(bound.arguments.values())[1:]
    return given if len(given) == 3 else None


def _choice(chain: Chain, rows: AdapterNames, x: Tensor) -> Tensor:
    """The number in ``rows.order`` of each token's adapter, -1 for none; int32 [T]."""
    if any(w.merged_adapters for w in chain.wrappers):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call "
            "`unmerge_adapter` first."
        )
    T, samples = x.shape[0], len(rows)
    if not samples or T % samples:
        raise ValueError(
            f"`adapter_names` has {samples} entries for {T} tokens of experts; allowed: the number "
            "of samples, each of the same number of tokens"
        )
    of_samples = rows.samples.on(x.device)
    if T == samples:
        return of_samples
    return of_samples[:, None].expand(samples, T // samples).reshape(-1)


def why_separate(outer: Any) -> str | None:
    """The reason that calls of the outermost wrapper are not one operation; None when they are."""
    chain = chain_of(outer)
    found = read(chain, None, away=True, dtype=_expected_dtype(chain))
    return found if isinstance(found, str) else None


def _expected_dtype(chain: Chain) -> torch.dtype:
    """The dtype that the activations of quantised experts are expected to have: an adapter's."""
    for wrapper in chain.wrappers:
        for name in active_names(wrapper):
            found: torch.dtype = wrapper.lora_A[name].weight.dtype
            return found
    return torch.float32


def describe_mixtures(model: nn.Module) -> dict[int, tuple[str | None, str]]:
    """{id of a wrapper of experts: (the reason of its outermost wrapper, words for ``explain``)}.

    The reason is None, and there are words, when it is one operation.
    """
    found: dict[int, tuple[str | None, str]] = {}
    for outer in model.modules():
        if getattr(outer.__class__, "layer_kind", None) != "parameter" or id(outer) in found:
            continue
        chain = chain_of(outer)
        if form_of(chain.module.__class__) is None and reader_of(chain.module) is None:
            continue
        read_ = read(chain, None, away=True, dtype=_expected_dtype(chain))
        ran = last_of(outer)
        if ran is not None and not ran.fused:
            read_ = ran.words
        if isinstance(read_, str) and (ran is None or not ran.fused):
            found.update({id(w): (read_, "") for w in chain.wrappers})
            continue
        names = ", ".join(w.parameter_name for w in chain.wrappers if active_names(w))
        words = f"; one operation for the mixture ({names}) {describe_implementation(chain.module)}"
        if not isinstance(read_, str):
            words += f": {_way(*read_)}"
        found.update({id(w): (None, words) for w in chain.wrappers})
    return found


def _way(mixture: Mixture, parts: list[ExpertLinear]) -> str:
    """What computes the mixture, and why, in words."""
    up, down = parts
    weight = up.weight
    if weight.is_meta:
        return "what computes it is chosen where accelerate places its weights"
    x = weight.new_empty((0, weight.shape[2]))  # no token: a way depends on the rest alone
    index, weights = x.new_empty((0, 0), dtype=torch.int64), x.new_empty((0, 0))
    norm, sentinels = mixture.norm, mixture.sentinels
    return describe(Call(x, index, weights, up, down, mixture.gate, norm, None, sentinels))
