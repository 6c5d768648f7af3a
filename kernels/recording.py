"""Makes the plan of a call (:mod:`.launching`) by watching the function run.

The function runs twice. The first run starts nothing: the tensors are other objects on the same
memory, and numbers that only the kernels are told have values of their own, so that each argument
of a launch tells where it comes from: it *is* a tensor of the call, a view of one, a new tensor, or
such a number. All else is a constant. The second run is the call itself, through Triton's dispatch,
which gives the compiled kernels. If its launches do not have the arguments that the plan would give
them, there is no plan.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from triton.tools.tensor_descriptor import TensorDescriptor

from . import switches
from .kinds import Call, Unplanned, halves
from .plans import Allocation, Filled, Named, Run, Start, View, write

_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_LOOKS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__"}
_WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ior__", "__iand__"}
# of the numbers in the first run; no kernel has a constant like these
_FIRST, _STEP = 0.7310585786300049, 0.1339745962155614
_SEED, _SEED_STEP = 0x2E6D93A15F0C7B48, 0x100000001


class _Own(threading.local):
    recorder: Any = None  # of the call that this thread records


own = _Own()


def start(launch: Any) -> None:
    """Start a :class:`.common.Launch`, or give it to the recorder of this thread."""
    if own.recorder is None:
        launch.kernel[launch.grid](*launch.args, **launch.meta)
    else:
        own.recorder.start(launch)


# tensors that a kernel file keeps for good, and what finds them, by id
_kept: dict[int, tuple[Tensor, Callable[[], Tensor]]] = {}


def keep(t: Tensor, find: Callable[[], Tensor]) -> None:
    """Let plans use a tensor that is neither of a call nor allocated in it; ``find()`` is it."""
    _kept[id(t)] = t, find


class Recorded(NamedTuple):
    result: Any  # of the call
    plan: Run | None
    why: str  # the reason that there is no plan
    asks: bool  # True: one of torch's settings for products was read


class _Watched(TorchFunctionMode):
    """Notes of every tensor that torch's operations make where it comes from."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.roots = list(inputs)  # tensors of the call, then those that it allocates
        self.allocations: list[Allocation] = []
        self.root_of = {id(t): i for i, t in enumerate(inputs)}
        self.alive: list[Any] = []  # so that no other tensor gets the id of one that is gone
        self.why: str | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if name in _LOOKS:
            self.why = self.why or f"{name} reads a tensor's values"
        elif (
            name in _WRITES
            or (name.endswith("_") and not name.endswith("__"))
            or "out" in (kwargs or {})
        ):
            self.why = self.why or f"{name} writes to a tensor"
        for made in _tensors((out,)):
            self._note(made, name, args)
        return out

    def _note(self, made: Tensor, name: str, args: Any) -> None:
        if id(made) in self.root_of:
            return
        self.alive.append(made)
        if name in _ALLOCATES:
            self.root_of[id(made)] = len(self.roots)
            self.roots.append(made)
            layout = tuple(made.shape), tuple(made.stride())
            self.allocations.append(Allocation(*layout, made.dtype, made.device))
            return
        memory = made.untyped_storage().data_ptr()
        for source in _tensors(args):
            root = self.root_of.get(id(source))
            if root is not None and source.untyped_storage().data_ptr() == memory:
                self.root_of[id(made)] = root
                return
        self.why = self.why or f"{name} makes a tensor with values"

    def origin(self, t: Tensor) -> tuple[int, int]:
        """(number of the tensor that ``t`` is a part of, bytes from its start)."""
        root = self.root_of.get(id(t))
        if root is None:
            raise Unplanned("a tensor is neither of the call nor allocated in it")
        return root, t.data_ptr() - self.roots[root].data_ptr()


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class _Recorder:
    """Takes the launches of one run of a function; ``starts`` them too, or only lists them."""

    def __init__(self, starts: bool) -> None:
        self.starts = starts
        self.launches: list[Any] = []
        self.compiled: list[Any] = []

    def start(self, launch: Any) -> None:
        self.launches.append(launch)
        if self.starts:
            self.compiled.append(launch.kernel[launch.grid](*launch.args, **launch.meta))

    def run(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        own.recorder = self
        try:
            return function(*args, **kwargs)
        finally:
            own.recorder = None


def arguments(launch: Any) -> list[Any]:
    """The arguments of a launch for all parameters of its kernel, in their order."""
    left = launch.kernel.arg_names[len(launch.args) :]
    return [*launch.args, *(launch.meta[name] for name in left)]


class Origins(NamedTuple):
    """Where the arguments of launches come from."""

    of: Callable[[Tensor], tuple[int, int]]
    numbers: dict[tuple[type, float], int]  # by class, as 1 equals 1.0

    def filled(self, values: Sequence[Any]) -> Filled:
        """The arguments as constants and origins.

        Raises:
            Unplanned: one of them has no known origin.
        """
        made = Filled([None] * len(values), [], [], [], [], [])
        for place, value in enumerate(values):
            if id(value) in _kept:
                made.kept.append((place, _kept[id(value)][1]))
            elif isinstance(value, Tensor):
                made.pointers.append((place, *self.of(value)))
            elif type(value) in (float, int) and (type(value), value) in self.numbers:
                made.numbers.append((place, self.numbers[type(value), value]))
            elif type(value) is tuple:
                inner = self.filled(value)
                if any(inner[1:]):
                    made.tuples.append((place, inner))
                else:
                    made.constants[place] = value
            elif isinstance(value, TensorDescriptor):
                root, offset = self.of(value.base)
                if offset:
                    raise Unplanned("a descriptor of a part of a tensor")
                others = {k: v for k, v in vars(value).items() if k != "base"}
                made.descriptors.append((place, root, type(value), others))
            else:
                made.constants[place] = value
        return made


def _agree(
    filled: Filled, values: Sequence[Any], inputs: list[Tensor], numbers: list[float]
) -> bool:
    """True when the plan gives a launch these very arguments."""

    def same(tensor: int, offset: int, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        return tensor >= len(inputs) or value.data_ptr() == inputs[tensor].data_ptr() + offset

    if len(values) != len(filled.constants):
        return False
    changing = {p[0] for part in filled[1:] for p in part}
    return (
        all(
            type(a) is type(b) and bool(a == b)
            for i, (a, b) in enumerate(zip(filled.constants, values, strict=True))
            if i not in changing
        )
        and all(same(tensor, offset, values[i]) for i, tensor, offset in filled.pointers)
        and all(numbers[n] == values[i] for i, n in filled.numbers)
        and all(find() is values[i] for i, find in filled.kept)
        and all(
            isinstance(values[i], tuple) and _agree(inner, values[i], inputs, numbers)
            for i, inner in filled.tuples
        )
        and all(
            type(values[i]) is kind
            and same(tensor, 0, values[i].base)
            and {k: v for k, v in vars(values[i]).items() if k != "base"} == others
            for i, tensor, kind, others in filled.descriptors
        )
    )


def _result(result: Any, watched: _Watched, inputs: int) -> Any:
    """The results as :func:`.plans.write` takes them."""
    if result is None:
        return None
    if isinstance(result, (list, tuple)):
        made = [_result(r, watched, inputs) for r in result]
        kind = type(result)
        return Named(kind, made) if hasattr(kind, "_fields") else kind(made)
    if not isinstance(result, Tensor):
        raise Unplanned(f"a result is a {type(result).__name__}")
    root, _ = watched.origin(result)
    if result is watched.roots[root]:
        return root
    if root < inputs:
        raise Unplanned("a result is a view of an argument")
    return View(root, tuple(result.shape), tuple(result.stride()), int(result.storage_offset()))


def _other(value: Any, changing: type | None, inputs: list[Tensor], numbers: list[float]) -> Any:
    """The argument for the first run; the tensors and numbers are listed as in a key."""
    kind = type(value)
    if kind is Tensor or kind is Parameter:
        inputs.append(value.detach())
        return inputs[-1]
    if kind is float and changing is float:
        numbers.append(_FIRST + _STEP * len(numbers))
        return numbers[-1]
    if kind is int and changing is int:
        seed = _SEED + _SEED_STEP * len(numbers)
        numbers += halves(seed)
        return seed
    if kind is list or kind is tuple:
        return kind([_other(v, changing, inputs, numbers) for v in value])
    if issubclass(kind, tuple):
        return kind(*[_other(v, changing, inputs, numbers) for v in value])
    return value


def record(
    function: Callable[..., Any],
    changing: dict[str, type | None],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    call: Call,
) -> Recorded:
    """Run ``function`` and make its plan.

    ``changing`` has, for each argument, the class of the numbers in it that only the kernels are
    told, or None. Raises what the function raises.
    """
    inputs: list[Tensor] = []
    marks: list[float] = []
    others = [
        _other(v, flag, inputs, marks) for v, flag in zip(args, changing.values(), strict=False)
    ]
    named = {k: _other(v, changing.get(k), inputs, marks) for k, v in kwargs.items()}
    first, why, asked = _Recorder(starts=False), "", switches.asked
    watched = _Watched(inputs)
    origins = Origins(watched.origin, {(type(v), v): i for i, v in enumerate(marks)})
    plans: list[Filled] = []
    result: Any = None
    try:
        with watched:
            given = first.run(function, others, named)
        plans = [origins.filled(arguments(launch)) for launch in first.launches]
        result = _result(given, watched, len(inputs))
        why = watched.why or ""
    except Exception as e:  # the call itself tells whether it is at fault
        why = f"{e}" if type(e) is Unplanned else f"{type(e).__name__}: {e}"
    allocations = watched.allocations
    asks = switches.asked != asked
    shapes = [(launch.kernel, launch.grid, launch.meta) for launch in first.launches]
    given = watched = origins = first = inputs = others = named = None  # type: ignore[assignment]

    second = _Recorder(starts=True)
    done = second.run(function, args, kwargs)
    if not why and shapes != [(n.kernel, n.grid, n.meta) for n in second.launches]:
        why = "two runs have other launches"
    if not why and not all(
        _agree(filled, arguments(launch), call.tensors, call.numbers)
        for filled, launch in zip(plans, second.launches, strict=True)
    ):
        why = "a launch has an argument of unknown origin"
    if not why and not all(hasattr(kernel, "packed_metadata") for kernel in second.compiled):
        why = "Triton gives no compiled kernel"
    if why:
        return Recorded(done, None, why, asks)
    starts = [
        Start(compiled, launch.grid, filled)
        for compiled, launch, filled in zip(second.compiled, second.launches, plans, strict=True)
    ]
    return Recorded(done, write(len(call.tensors), allocations, starts, result), "", asks)
