"""Plans: calls like an earlier one start their compiled kernels at once.

A public function of a kernel file checks its arguments, makes a config, works out grids, strides
and constants, and hands all to Triton, which looks at every argument again to find the compiled
kernel. For arguments of the same kind (shapes, strides, dtypes, device, alignment, what is None,
config) all of it ends the same. :func:`planned` keeps that end as a plan: what to allocate, which
compiled kernels to start, and from which tensor or number each of their arguments comes. A later
call of the same kind does just that (:mod:`.plans`).

A plan holds no tensor and no address, so nothing in it can be out of date. It is made by
:mod:`.recording` at the second call of a kind, as a kind that is never seen again (a batch of
another length) is not worth one. What cannot be planned runs as written, and so does everything in
Triton's interpreter and on AMD's GPUs, where Triton's choice also depends on the size of a storage.

Within a CUDA graph's capture nothing is recorded. A plan can be used there, as its kernels have
been loaded by the call before it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from .kinds import Call, Unplanned, kind_of, read
from .recording import own, record
from .switches import settings

log = logging.getLogger("peftkern")

# Names of Triton that it does not promise to keep, and why they are used; 3.6 and 3.9 have them.
# Without one of them every launch goes through Triton's own dispatch.
NAMES = (
    ("compiler.CompiledKernel.run", "starts a compiled kernel, without looking at its arguments"),
    ("compiler.CompiledKernel.launch_metadata", "what hooks on launches are told"),
    ("runtime.driver.active", "the current device and stream, as Triton's dispatch asks for them"),
    ("knobs.runtime.launch_enter_hook", "profilers hook into launches here"),
    ("knobs.runtime.launch_exit_hook", "profilers hook into launches here"),
    ("knobs.runtime.debug", "compiles another kernel"),
    ("knobs.runtime.add_stages_inspection_hook", "compiles another kernel"),
    ("knobs.compilation.instrumentation_mode", "compiles another kernel"),
)
MOST = 512  # kinds of calls of one function; when there are more, all are forgotten

F = TypeVar("F", bound=Callable[..., Any])


def missing() -> str | None:
    """The first of NAMES that the installed Triton lacks; None when it has all."""
    for name, _ in NAMES:
        at: Any = triton
        *path, last = name.split(".")
        for part in path:
            at = getattr(at, part, None)
        # asking the driver for its active one would start CUDA
        if not hasattr(type(at) if last == "active" else at, last):
            return name
    return None


def _why_not() -> str | None:
    """The reason that no call is planned in this process; None when calls are planned."""
    if triton.knobs.runtime.interpret:
        return "Triton's interpreter"
    if torch.version.hip is not None:
        return "AMD's GPUs"
    name = missing()
    return None if name is None else f"triton {triton.__version__} has no {name}"


why_not = _why_not()  # not None: every call runs as written
if why_not is not None:
    log.info("launches go through Triton's own dispatch: %s", why_not)
_runtime = triton.knobs.runtime
_compilation = triton.knobs.compilation

# what a cache holds for a kind without a plan
_SEEN = "one call has run"
_NEVER = "it cannot be planned"
_ASKS = "its plans are under longer keys, with torch's settings for products"
_caches: list[dict[Any, Any]] = []


def forget() -> None:
    """Forget all plans; the next calls check and decide again."""
    for cache in _caches:
        cache.clear()


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Within the block every call of this process runs its function, and each :class:`Launch`."""
    global why_not
    before, why_not = why_not, "asked for"
    try:
        yield
    finally:
        why_not = before


def planned(*scales: str, seeds: Sequence[str] = ()) -> Callable[[F], F]:
    """A decorator that keeps plans for a public function of a kernel file.

    Args:
        scales: the arguments whose floats decide nothing, and are told to the kernel as they are.
        seeds: those whose ints are told to the kernel as halves (:func:`.kinds.halves`) and decide
            nothing either. A plan serves all values of both. Any other value decides.

    The function may allocate tensors and make views. A call that copies a tensor (one that is not
    contiguous) or writes to one by an operation of torch is not planned.
    """

    def decorate(function: F) -> F:
        changing: dict[str, type | None] = dict.fromkeys(inspect.signature(function).parameters)
        if unknown := {*scales, *seeds} - set(changing):
            raise ValueError(f"{function.__name__} has no argument {', '.join(sorted(unknown))}")
        changing.update(dict.fromkeys(scales, float) | dict.fromkeys(seeds, int))
        classes = tuple(changing.values())
        plans: dict[Any, Any] = {}
        _caches.append(plans)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if why_not is not None or own.recorder is not None:
                return function(*args, **kwargs)
            try:
                active = driver.active
                device = active.get_current_device()
                parts: list[Any] = [
                    device, _runtime.debug, _runtime.add_stages_inspection_hook,
                    _compilation.instrumentation_mode,
                ]  # fmt: skip
                tensors: list[Tensor] = []
                pointers: list[int] = []
                numbers: list[float] = []
                read(args, classes, parts, tensors, pointers, numbers)
                if kwargs:
                    parts += kwargs
                    of = map(changing.get, kwargs)
                    read(kwargs.values(), of, parts, tensors, pointers, numbers)
                key: Any = kind_of(parts, pointers)
                plan = plans.get(key)
            except (Unplanned, RuntimeError, TypeError) as e:
                # a tensor without memory, an unhashable value: the function judges it
                log.debug("%s is not planned: %s", function.__name__, e)
                return function(*args, **kwargs)
            asking = plan is _ASKS
            if asking:
                key = (key, settings())
                plan = plans.get(key)
            if plan is None:
                result = function(*args, **kwargs)
                if len(plans) >= MOST:
                    plans.clear()
                plans[key] = _SEEN
                return result
            if type(plan) is not str:
                stream = active.get_current_stream(device)
                return plan(stream, tensors, pointers, numbers)
            if plan is not _SEEN or _capturing():
                return function(*args, **kwargs)
            seen = Call(parts, tensors, pointers, numbers)
            done = _record(function, changing, args, kwargs, seen)
            if done.plan is None:
                plans[key] = _NEVER
            elif done.asks and not asking:
                plans[key] = _ASKS
                plans[key, settings()] = done.plan
            else:
                plans[key] = done.plan
            return done.result

        return call  # type: ignore[return-value]

    return decorate


_said: set[tuple[str, str]] = set()


def _record(function: Callable[..., Any], *call: Any) -> Any:
    done = record(function, *call)
    told = function.__name__, done.why
    if done.plan is None and told not in _said:
        _said.add(told)
        log.info("calls of %s run without a plan: %s", *told)
    return done


def _capturing() -> bool:
    """True while a CUDA graph is captured, when nothing may be loaded."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
