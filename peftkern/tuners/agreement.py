"""All ranks have the same adapters: what a rank says of its own, and the error when they differ.

The notes go through :mod:`..utils.notes`, which waits for a rank that does not come no longer than
it is told to. Every rank sees all notes, so that all of them raise, or none.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from ..utils.notes import Note, exchange, time_out
from ..utils.private import WRAPPERS
from ..utils.zero3 import whole_shape
from .base_layer import BaseTunerLayer, all_modules, walk
from .modules_to_save import AuxiliaryTrainingWrapper
from .tensor_parallel import ranks_of
from .wrapped import Wrapped

T = TypeVar("T")
log = logging.getLogger("peftkern")
# of where a model comes from and goes to, which may differ from machine to machine
_OWN = frozenset(
    "base_model_name_or_path revision tokenizer_name_or_path auto_mapping peft_version "
    "inference_mode".split()
)
ADAPTERS, _ERROR = "adapters", "error"
_SHOWN = 3  # differences in an error


def _plain(value: Any) -> str:
    """A value in words that are the same in every process, whatever order a set has there."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        inside = sorted((_plain(k), _plain(v)) for k, v in value.items())
        return f"{{{', '.join(f'{k}: {v}' for k, v in inside)}}}"
    if isinstance(value, (set, frozenset)):
        return f"[{', '.join(sorted(map(_plain, value)))}]"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plain, value))}]"
    if value is None or isinstance(value, (str, bytes, bool, int, float)):
        return repr(value)
    named = value if isinstance(value, type) or callable(value) else type(value)
    return str(getattr(named, "__qualname__", type(value).__qualname__))


def of_config(config: Any, adapter_name: str) -> dict[str, str]:
    """All fields of a configuration that change what an adapter computes, in words."""
    fields = {k: v for k, v in config.to_dict().items() if k not in _OWN}
    return {f"`{k}` of {adapter_name!r}": _plain(fields[k]) for k in sorted(fields)}


def _configs(model: nn.Module) -> Iterator[tuple[Mapping[str, Any], list[str] | None]]:
    """(configurations, active adapters) of each PeftModel in ``model``, or of the one around it.

    Of layers that were put into a model without one, the active adapters are None.
    """
    injected: Mapping[str, Any] | None = None
    for module in all_modules(model):
        found: Any = module
        if isinstance(module, Wrapped):
            yield found.peft_config, list(found.active_adapters)
            injected = {}
        elif injected is None and isinstance(module.__dict__.get("peft_config"), Mapping):
            injected = module.__dict__["peft_config"]
    if injected:
        yield injected, None


def of_model(
    model: nn.Module,
    shapes: bool = True,
    names: Sequence[str] | None = None,
    training: bool = True,
) -> Note:
    """A note of the adapters in ``model``: names, configurations, layers, what trains.

    Args:
        model: a model, or what is around it.
        shapes: False where ranks may have parts of different sizes.
        names: the adapters to speak of; None: all.
        training: False leaves out which adapters are active, and what trains.
    """
    methods: dict[str, str] = {}
    fields: dict[str, str] = {}
    layers: dict[str, str] = {}
    active: dict[str, str] = {}
    found: set[str] = set()

    def asked(adapters: Iterable[str]) -> list[str]:
        return sorted(n for n in adapters if names is None or n in names)

    for i, (configs, at_work) in enumerate(_configs(model)):
        inner = f" (of the model within {i})" if i else ""  # a prompt on top of LoRA adapters
        active[f"the active adapters{inner}"] = _plain(at_work)
        for name in asked(configs):
            found.add(name)
            methods[f"the method of {name!r}{inner}"] = _plain(configs[name].peft_type)
            of_one = of_config(configs[name], name)
            fields |= {f"{field}{inner}": value for field, value in of_one.items()}
    for key, layer in walk(model):
        if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            held = asked(layer._get_available_adapters())
            found.update(held)
            layers[f"the adapters in `{_clean(key)}`"] = _plain(held)
    note: dict[str, dict[str, str]] = {ADAPTERS: {"the adapters": _plain(sorted(found))}}
    if not found:
        return note
    note |= {"methods": methods, "configurations": fields, "layers": layers}
    if training:
        trained = {
            f"what trains of `{_clean(key)}`": str(tuple(whole_shape(p))) if shapes else "all"
            for key, p in model.named_parameters()
            if p.requires_grad
        }
        note |= {"active": active, "trained": trained}
    return note


def _clean(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def has_adapters(note: Note) -> bool:
    """True when a note of a model tells of adapters."""
    return note[ADAPTERS]["the adapters"] != "[]"


def compare(
    place: str, what: str, ranks: Sequence[int], note: Note, limit: float | None = None
) -> None:
    """Leave this rank's note at ``place`` and raise, on every rank, when theirs differ.

    Args:
        place: a name of the place; all ``ranks`` come there equally often.
        what: what the ranks do there, for errors.
        ranks: global ranks, in the same order on each.
        note: what this rank says of its adapters.
        limit: seconds to wait for the others. Those that have not come then are left out, and a
            warning is logged. None: the time-out of the process group, and then an error.

    Raises:
        ValueError: two ranks differ; or the work before this place failed on another rank.
        RuntimeError: with ``limit=None``, a rank has not come.
    """
    seconds = time_out() if limit is None else limit
    found = exchange(place, ranks, note, seconds)
    if found is None:
        return
    there = {rank: said for rank, said in found.items() if said is not None}
    for rank, said in there.items():
        if _ERROR in said:
            words = said[_ERROR][_ERROR].rstrip(".")
            raise ValueError(f"{what}: rank {rank} has failed: {words}. Nothing was changed")
    first = next(iter(there))
    for rank, said in there.items():
        if said != there[first]:
            raise ValueError(_difference(what, first, there[first], rank, said))
    absent = [rank for rank, said in found.items() if said is None]
    if not absent:
        return
    late = f"{what}: {_ranks(absent)} not come within {seconds:g} seconds"
    if limit is None:
        raise RuntimeError(f"{late}, and all ranks must. Have they failed, or done something else?")
    if has_adapters(note):
        log.warning("%s: their adapters are not compared with those of this rank", late)


def _ranks(numbers: Sequence[int]) -> str:
    few = ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
    return f"rank {few} has" if len(numbers) == 1 else f"ranks {few} have"


def _difference(what: str, first: int, one: Note, second: int, other: Note) -> str:
    # what comes first in a note makes the rest differ
    topic = next(t for t in {**one, **other} if one.get(t) != other.get(t))
    ours, theirs = one.get(topic, {}), other.get(topic, {})
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    shown = "; ".join(
        f"{key}: {ours.get(key, 'nothing')} on rank {first}, {theirs.get(key, 'nothing')} on rank "
        f"{second}"
        for key in keys[:_SHOWN]
    )
    more = f"; and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return (
        f"{what}: ranks {first} and {second} have different adapters: {shown}{more}. Give all "
        "ranks the same adapters with the same configurations"
    )


def group_of(tensor: Any) -> list[int]:
    """The global ranks among which a DTensor is shared out, by all dimensions of its mesh."""
    return [int(rank) for rank in tensor.device_mesh.mesh.flatten().tolist()]


def refuse(place: str, ranks: Sequence[int], error: Exception) -> None:
    """Leave a note that this rank has failed before it could come to ``place``."""
    exchange(place, ranks, {_ERROR: {_ERROR: f"{type(error).__name__}: {error}"}}, 0.0)


def together(
    place: str,
    what: str,
    ranks: Sequence[int],
    work: Callable[[], T],
    note: Callable[[T], Note],
) -> T:
    """``work()``, which all ranks do before they change anything; then their notes are compared.

    Where it fails on one rank, all raise. Ranks that do not come within the group's time-out are
    an error, so that this is for places where all ranks work together in any case.
    """
    try:
        done = work()
    except Exception as error:
        refuse(place, ranks, error)
        raise
    compare(place, what, ranks, note(done))
    return done


def added(
    model: nn.Module, configs: Mapping[str, Any], adapter_name: str, checks: Callable[[], T]
) -> T:
    """``checks()``, all that comes before a new adapter changes ``model``.

    Under tensor parallelism the ranks then compare it, as they send each other its tensors.

    Args:
        model: the model that gets the adapter.
        configs: {adapter: configuration}, the new one's included.
        adapter_name: the new one.
        checks: what raises when the adapter is refused.
    """
    ranks = ranks_of(model)
    if len(ranks) < 2:
        return checks()

    def note(_: T) -> Note:
        config = configs[adapter_name]
        return {
            ADAPTERS: {"the adapters": _plain(sorted(configs))},
            "methods": {f"the method of {adapter_name!r}": _plain(config.peft_type)},
            "configurations": of_config(config, adapter_name),
        }

    what = f"tensor parallelism over {len(ranks)} ranks"
    return together("tensor parallelism", what, ranks, checks, note)
