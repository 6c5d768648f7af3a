"""Checks of plans (kernels/launching.py) on a device that does nothing, for a process that does not
interpret kernels: ``python -c "from tests.kernels.on_standin import run; run()"`` prints a JSON
object with the traceback of each check that failed, or None.
"""

from __future__ import annotations

import gc
import json
import logging
import threading
import traceback
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.host import standin
from benchmarks.host.standin import Started
from peftkern.kernels import (
    kinds,
    launching,
    plans,
    prefix_attention,
    prefix_backward,
    prefix_decode,
    recording,
)
from peftkern.kernels.bits import dropout_bits
from peftkern.kernels.common import Launch
from peftkern.kernels.decode import decode
from peftkern.kernels.dora_grad import scale_grad
from peftkern.kernels.dora_norm import row_norms
from peftkern.kernels.expand import expand, low_rank_grad_input
from peftkern.kernels.gemm import GemmConfig, fused_grad_input, fused_linear
from peftkern.kernels.grad_a import grad_a
from peftkern.kernels.grad_sb import grad_sb, grad_sb_group
from peftkern.kernels.grad_xa import grad_xa
from peftkern.kernels.mixed import mixed
from peftkern.kernels.shrink import shrink
from peftkern.kernels.shrink_expand import shrink_expand

BF16, FP32 = torch.bfloat16, torch.float32
M, K, N, R = 40, 64, 96, 16


def drawn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def low(*shape: int) -> Tensor:
    return drawn(*shape, dtype=FP32)


def unaligned(*shape: int) -> Tensor:
    """A tensor whose first element is not on 16 bytes."""
    return drawn(*shape[:-1], shape[-1] + 8)[..., 1 : shape[-1] + 1]


def prefix_problem(T: int) -> tuple[Tensor, ...]:
    return (drawn(2, 4, T, 32), *(drawn(2, 2, 20, 32) for _ in range(2)),
            *(drawn(2, 8, 32) for _ in range(2)))  # fmt: skip


# {name: function that makes new arguments, and the function that is called with them}
CALLS: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
    "linear": (fused_linear, lambda: (drawn(M, K), drawn(N, K), drawn(M, R), low(N, R))),
    "linear bias": (
        fused_linear, lambda: (drawn(M, K), drawn(K, N).t(), drawn(M, R), low(N, R), drawn(N)),
    ),
    "linear gain": (
        lambda *a, gain, v: fused_linear(*a, gain=gain, v=v),
        lambda: ((drawn(M, K), drawn(N, K), drawn(M, R), low(N, R), drawn(N)),
                 dict(gain=low(N), v=drawn(M, N))),
    ),
    "linear unaligned": (
        fused_linear, lambda: (unaligned(M, K), drawn(N, K), drawn(M, R), low(N, R)),
    ),
    "grad input": (
        fused_grad_input,
        lambda: ([drawn(M, N), drawn(M, N)], [drawn(N, K), drawn(N, K)],
                 list(drawn(M, 2 * R).split(R, 1)), [low(R, K), low(R, K)],
                 list(torch.ones(2, M, K // 32, dtype=torch.int32))),
    ),
    "expand": (expand, lambda: (drawn(M, 2 * R)[:, R:], low(N, R), drawn(N))),
    "low rank": (
        low_rank_grad_input,
        lambda: ([drawn(M, R)], [low(R, K)], torch.ones(M, K // 32, dtype=torch.int32)),
    ),
    "norms": (row_norms, lambda: (drawn(N, K), low(R, K), low(N, R), 1.5)),
    "norms split": (row_norms, lambda: (drawn(8, 4096), low(R, 4096), low(8, R), 1.5)),
    "shrink": (
        shrink, lambda: (drawn(M, K), [low(R, K), low(8, K)], [0.5, 2.0],
                         list(torch.ones(2, M, K // 32, dtype=torch.int32))),
    ),
    "shrink, large ranks": (shrink, lambda: (drawn(M, K), [low(200, K), low(40, K)], 0.5)),
    "shrink expand": (
        shrink_expand, lambda: (drawn(M, K), [low(R, K), low(8, K)], [low(N, R), low(32, 8)],
                                [0.5, 2.0], None, [drawn(N), None]),
    ),
    "grad a": (grad_a, lambda: (drawn(4096, K), list(drawn(4096, 24).split([16, 8], 1)),
                                torch.ones(4096, K // 32, dtype=torch.int32))),
    "grad a, large rank": (
        grad_a, lambda: (drawn(M, K), [drawn(M, 200)], None, dict(out_dtypes=[BF16])),
    ),
    "grad sb": (grad_sb, lambda: (drawn(M, N), low(N, R), drawn(M, R), 0.5)),
    "grad sb, two passes": (
        grad_sb, lambda: (drawn(M, N), low(N, R), drawn(M, R), 0.5, dict(config="two_pass")),
    ),
    "grad sb group": (
        grad_sb_group, lambda: ([(drawn(M, N), low(N, R), drawn(M, R), 0.5),
                                 (drawn(M, 32), low(32, 8), drawn(M, 8), 2.0)], [FP32, BF16]),
    ),
    "grad xa": (grad_xa, lambda: (drawn(M, K), list(drawn(M, 24).split([16, 8], 1)),
                                  [low(R, K), low(8, K)])),
    "decode": (decode, lambda: (drawn(1, K), drawn(N, K), low(R, K), low(N, R), 0.5, drawn(N))),
    "decode rows": (decode, lambda: (drawn(5, K), drawn(N, K), low(R, K), low(N, R), 0.5)),
    "mixed": (mixed, lambda: (drawn(6, K), drawn(N, K), [low(R, K), None, low(8, K)],
                              [low(N, R), None, low(N, 8)], [0.5, 0.0, 2.0],
                              torch.tensor([0, 2, -1], dtype=torch.int32))),
    "attend": (prefix_attention.attend, lambda: prefix_problem(20)),
    "attend backward": (prefix_backward.attend_backward, lambda: (
        drawn(2, 4, 20, 32), *prefix_problem(20), drawn(2, 4, 20, 32), low(2, 4, 20))),
    "decode a prefix": (prefix_decode.decode, lambda: prefix_problem(1)),
    "scale grad": (scale_grad, lambda: (drawn(4096, N), low(N), drawn(4096, N), drawn(N))),
}  # fmt: skip


def split(args: Any) -> tuple[Any, dict[str, Any]]:
    """(positional, named) arguments; the latter are the last one if that is a dict."""
    if type(args[-1]) is not dict:
        return args, {}
    given = args[:-1]
    return (given[0] if len(given) == 1 and type(given[0]) is tuple else given), args[-1]


def outcome(function: Callable[..., Any], args: Any) -> tuple[Any, list[Started]]:
    """(the result, or the error, and the launches of a call)."""
    args, kwargs = split(args)
    with standin.listening() as heard:
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
    return result, heard


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return tensors_in(list(value.values()))
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (list, tuple)) else []


def told(args: Any, result: Any, heard: list[Started]) -> list[Any]:
    """What launches are told and a call gives, comparable between calls on the same tensors.

    An address that is not one of the call's tensors is of a new tensor: these are numbered as they
    appear. Triton's dispatch passes tensors where a plan passes addresses.
    """
    inputs = [(t.data_ptr(), t.data_ptr() + t.untyped_storage().nbytes()) for t in tensors_in(args)]
    new: list[int] = []

    def address(at: int) -> Any:
        if any(first <= at < end for first, end in inputs):
            return "input", at
        if at not in new:
            new.append(at)
        return "new", new.index(at)

    def plain(value: Any, kind: Any) -> Any:
        if isinstance(value, Tensor):
            return address(value.data_ptr())
        if isinstance(value, TensorDescriptor):
            fields = {k: v for k, v in vars(value).items() if k != "base"}
            return "described", address(value.base.data_ptr()), fields
        if isinstance(value, tuple):
            return [plain(v, k) for v, k in zip(value, kind, strict=True)]
        if isinstance(kind, str) and kind.startswith("*") and value is not None:
            return address(value)
        return type(value).__name__, getattr(value, "value", value)

    def shape(value: Any) -> Any:
        if isinstance(value, Tensor):
            return address(value.data_ptr()), tuple(value.shape), value.stride(), value.dtype
        if isinstance(value, (list, tuple)):
            return type(value).__name__, [shape(v) for v in value]
        return value

    lines: list[Any] = []
    for s in heard:
        # the kernel's own objects: the same compiled form is started
        kinds = tuple(s.kernel.src.signature.values())
        assert len(kinds) == len(s.args)
        values = [plain(v, k) for v, k in zip(s.args, kinds, strict=True)]
        lines.append([s.kernel.name, s.grid, s.stream, id(s.function), s.metadata, values])
    return [*lines, shape(result)]


def as_written(function: Callable[..., Any], args: Any) -> list[Any]:
    with launching.as_written():
        result, heard = outcome(function, args)
    return told(args, result, heard)


def now(function: Callable[..., Any], args: Any) -> list[Any]:
    result, heard = outcome(function, args)
    return told(args, result, heard)


def planned_kinds() -> int:
    """How many kinds of calls have a plan."""
    return sum(type(v) is not str for cache in launching._caches for v in cache.values())


def settle(function: Callable[..., Any], make: Callable[[], Any], calls: int = 3) -> None:
    for _ in range(calls):
        outcome(function, make())


def not_run(*_: Any, **__: Any) -> Any:
    raise AssertionError("the function ran")


# ---------------------------------------------------------------------------------------- checks


def check_a_plan_starts_what_triton_would() -> None:
    for name, (function, make) in CALLS.items():
        launching.forget()
        for call in range(5):
            args = make()
            wanted = as_written(function, args)
            assert now(function, args) == wanted, f"{name}, call {call}"
            assert len(wanted) > 1
        assert planned_kinds() == 1, (name, launching._said)


def check_a_call_with_a_plan_runs_nothing_else() -> None:
    for name, (function, make) in CALLS.items():
        launching.forget()
        settle(function, make)
        with (
            mock.patch.object(triton.JITFunction, "run", not_run),
            mock.patch.object(Launch, "run", not_run),
        ):
            result, heard = outcome(function, make())
        assert heard and not isinstance(result, str), (name, result)


VARIANTS: dict[str, Callable[[], Any]] = {
    "base": CALLS["linear"][1],
    "rows": lambda: (drawn(M + 1, K), drawn(N, K), drawn(M + 1, R), low(N, R)),
    "dtype": lambda: (
        drawn(M, K, dtype=torch.float16), drawn(N, K, dtype=torch.float16),
        drawn(M, R, dtype=torch.float16), low(N, R),
    ),
    "adapter dtype": lambda: (drawn(M, K), drawn(N, K), drawn(M, R), drawn(N, R)),
    "fp32": lambda: (low(M, K), low(N, K), low(M, R), low(N, R)),
    "stride": lambda: (drawn(M, 2 * K)[:, :K], drawn(N, K), drawn(M, R), low(N, R)),
    "transposed": lambda: (drawn(M, K), drawn(K, N).t(), drawn(M, R), low(N, R)),
    "alignment": lambda: (unaligned(M, K)[:], drawn(N, K), drawn(M, R), low(N, R)),
    "alignment of s": lambda: (drawn(M, K), drawn(N, K), drawn(M, 2 * R)[:, 1 : R + 1], low(N, R)),
    "rank": lambda: (drawn(M, K), drawn(N, K), drawn(M, 64), low(N, 64)),
    "bias": lambda: (drawn(M, K), drawn(N, K), drawn(M, R), low(N, R), drawn(N)),
    "no update": lambda: (drawn(M, K), drawn(N, K)),
    "no update, bias": lambda: (drawn(M, K), drawn(N, K), None, None, drawn(N)),
    "config": lambda: ((drawn(M, K), drawn(N, K), drawn(M, R), low(N, R)),
                       dict(config=GemmConfig(64, 32, 32, num_warps=4))),
    "other config": lambda: ((drawn(M, K), drawn(N, K), drawn(M, R), low(N, R)),
                             dict(config=GemmConfig(64, 32, 32, num_warps=8))),
    "parameters": lambda: (
        drawn(M, K), torch.nn.Parameter(drawn(N, K)), drawn(M, R), torch.nn.Parameter(low(N, R)),
    ),
    "copied": lambda: (drawn(M, 2 * K)[:, ::2], drawn(N, K), drawn(M, R), low(N, R)),
}  # fmt: skip


def check_no_other_call_gets_a_plan_that_is_not_its_own() -> None:
    launching.forget()
    for round_ in range(4):
        for name, make in VARIANTS.items():
            args = make()
            assert now(fused_linear, args) == as_written(fused_linear, args), (name, round_)
    # parameters are the base's kind, and what is copied has no plan
    assert planned_kinds() == len(VARIANTS) - 2


def check_other_devices_have_other_plans() -> None:
    function, make = CALLS["linear"]
    settle(function, make)
    one = triton.runtime.driver.active
    with mock.patch.object(one, "device", one.device + 1000):
        before = planned_kinds()
        settle(function, make)
        assert planned_kinds() == before + 1
    call = kinds.Call([])
    call.read([torch.empty(2, 2, device="meta")], [None])
    assert torch.device("meta") in call.key


def check_one_tensor_for_two_and_two_tensors() -> None:
    """What the plan is made from, one tensor in several places, holds for several tensors."""
    function, make = CALLS["grad input"]

    def tied() -> Any:
        (dy, _), (w, _), (s, _), (a, _), (bits, _) = make()
        s = s.contiguous()
        return [dy, dy], [w, w], [s, s], [a, a], [bits, bits]

    def apart() -> Any:
        dys, ws, ss, As, bits = tied()
        return [[t.clone() for t in ts] for ts in (dys, ws, ss, As, bits)]

    for first, then in ((tied, apart), (apart, tied)):
        launching.forget()
        settle(function, first)
        args = then()
        with mock.patch.object(Launch, "run", not_run):
            found = now(function, args)
        assert found == as_written(function, args)


def check_numbers_are_told_and_decide_nothing() -> None:
    settle(row_norms, CALLS["norms"][1])
    w, a, b, _ = CALLS["norms"][1]()
    for scale in (0.25, -3.0, 0.0):
        with mock.patch.object(Launch, "run", not_run):
            _, (started,) = outcome(row_norms, (w, a, b, scale))
        assert started.args[4] == scale
    whole = (w, a, b, 2)  # an int, which is another kind
    for _ in range(4):
        assert now(row_norms, whole) == as_written(row_norms, whole)


def check_a_plan_serves_all_seeds() -> None:
    for groups in (None, 3):

        def drawn_by(seed: Any, groups: Any = groups) -> Any:
            return (5, 70, 0.3, seed), dict(groups=groups, device=torch.device("cpu"))

        launching.forget()
        settle(dropout_bits, lambda: drawn_by(7))
        settle(dropout_bits, lambda: drawn_by(torch.tensor([7])))
        assert planned_kinds() == 2
        for seed in (0, 1, 2**62, 2**31, 2**32 + 5, 2**63 - 1, -3, torch.tensor([11])):
            with mock.patch.object(Launch, "run", not_run):
                found = now(dropout_bits, drawn_by(seed))
            assert found == as_written(dropout_bits, drawn_by(seed)), seed
        for p in (0.5, 0.0):  # decides the number of digits
            args = (5, 70, p, 3), dict(groups=groups, device=torch.device("cpu"))
            for _ in range(3):
                assert now(dropout_bits, args) == as_written(dropout_bits, args)


def check_bad_input_gives_its_error_before_any_launch() -> None:
    s, b = drawn(M, R), low(N, R)
    bad = [
        ((drawn(M, K), drawn(N, K + 1), s, b), "ValueError: w has shape"),
        ((drawn(M, K), low(N, K), s, b), "TypeError: w has dtype"),
        ((drawn(M, K), drawn(N, K), s, None), "ValueError: s and b: allowed"),
        ((drawn(M, K), drawn(N, K), drawn(M, 300), low(N, 300)), "ValueError: s has rank 300"),
        ((drawn(M, K)[0], drawn(N, K), s, b), "ValueError: x has shape (64,)"),
        ((drawn(M, K), drawn(N, K), s, b, drawn(N + 1)), "ValueError: bias has shape"),
        (("x", drawn(N, K), s, b), "ValueError: x has type str"),
        ((drawn(M, K), drawn(N, K).to("meta"), s, b), "ValueError: w is on meta"),
    ]
    settle(*CALLS["linear"])
    for _ in range(4):
        for args, error in bad:
            result, heard = outcome(fused_linear, args)
            assert isinstance(result, str) and result.startswith(error), result
            assert heard == []
    settle(*CALLS["linear"])


def check_the_tf32_switch_is_read() -> None:
    make = VARIANTS["fp32"]
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for round_ in range(3):
            for setting in ("ieee", "tf32"):
                torch.backends.cuda.matmul.fp32_precision = setting
                for _ in range(3):
                    args = make()
                    found = now(fused_linear, args)
                    assert found == as_written(fused_linear, args)
                    assert ("str", setting) in found[0][-1], round_
        with mock.patch.object(Launch, "run", not_run):
            now(fused_linear, make())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def check_settings_of_triton_decide_too() -> None:
    function, make = CALLS["expand"]
    settle(function, make)
    kinds = planned_kinds()
    with mock.patch.object(triton.knobs.runtime, "debug", True):
        settle(function, make)
        _, (started,) = outcome(function, make())
        assert started.kernel.options["debug"] is True
    assert planned_kinds() == kinds + 1
    _, (started,) = outcome(function, make())
    assert not started.kernel.options["debug"]


def check_the_cache_is_bounded() -> None:
    for rows in range(1, launching.MOST + 50):
        outcome(expand, (drawn(rows, R), low(32, R)))
    assert all(len(cache) <= launching.MOST for cache in launching._caches)
    function, make = CALLS["expand"]
    for _ in range(4):
        args = make()
        assert now(function, args) == as_written(function, args)


def check_no_tensor_and_no_address_is_kept() -> None:
    for name, (function, make) in CALLS.items():
        args = make()
        for _ in range(3):
            result, heard = outcome(function, args)
        gone = [weakref.ref(t) for t in tensors_in((args, result))]
        addresses = {t.data_ptr() for t in tensors_in((args, result))}
        del args, result, heard
        gc.collect()
        assert [ref() for ref in gone if ref() is not None] == [], name
        kept: list[Any] = [
            (key, plan if type(plan) is str else (plan.__globals__, plan.__code__.co_consts))
            for cache in launching._caches for key, plan in cache.items()
        ]  # fmt: skip
        numbers = whole_numbers(kept)
        assert numbers and not numbers & addresses


def whole_numbers(value: Any) -> set[int]:
    """All ints in what a plan keeps, which must have no tensor in it."""
    assert not isinstance(value, Tensor)
    if type(value) is int:
        return {value}
    if isinstance(value, dict):
        value = [v for k, v in value.items() if k != "__builtins__"]
    inner = value if isinstance(value, (list, tuple, frozenset)) else ()
    return set().union(*map(whole_numbers, inner))


def check_hooks_on_launches_are_called() -> None:
    function, make = CALLS["expand"]
    settle(function, make)
    _, (silent,) = outcome(function, make())
    assert silent.hooks == (None, None, None)
    runtime, heard = triton.knobs.runtime, []
    runtime.launch_enter_hook.add(heard.append)
    try:
        with mock.patch.object(Launch, "run", not_run):
            _, (started,) = outcome(function, make())
    finally:
        runtime.launch_enter_hook.remove(heard.append)
    assert started.hooks[0]["name"] == "_expand_kernel"
    assert started.hooks[1] is runtime.launch_enter_hook


def check_nothing_is_recorded_in_a_capture() -> None:
    launching.forget()
    function, make = CALLS["linear"]
    with mock.patch.object(launching, "_capturing", lambda: True):
        settle(function, make, calls=5)
        assert planned_kinds() == 0
    settle(function, make, calls=1)
    assert planned_kinds() == 1
    with mock.patch.object(launching, "_capturing", lambda: True), mock.patch.object(
        triton.JITFunction, "run", not_run
    ):  # fmt: skip
        result, heard = outcome(function, make())
    assert len(heard) == 1 and isinstance(result, Tensor)


def check_what_copies_or_writes_is_not_planned() -> None:
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("peftkern"), Listener()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    @launching.planned()
    def copies(x: Tensor) -> Tensor:
        return x[:, :R].contiguous().new_empty(3)

    @launching.planned()
    def zeroes(x: Tensor) -> Tensor:
        return x.new_empty(3).zero_()

    @launching.planned()
    def reads(x: Tensor) -> Tensor:
        return x.new_empty(int(x[0, 0]) % 2 + 1)

    @launching.planned()
    def views(x: Tensor) -> Tensor:
        return x[:2]

    reasons = {
        copies: "contiguous makes a tensor with values", zeroes: "zero_ writes to a tensor",
        reads: "reads a tensor's values", views: "a result is a view of an argument",
    }  # fmt: skip
    try:
        for function, reason in reasons.items():
            x = drawn(32, 2 * R)
            before = planned_kinds()
            for _ in range(6):
                assert function(x).shape == function.__wrapped__(x).shape
            assert planned_kinds() == before, reason
            found = [s for s in said if function.__name__ in s]
            assert len(found) == 1 and reason in found[0], found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        for _ in reasons:
            launching._caches.pop()


def check_launches_of_other_threads_are_not_recorded() -> None:
    launching.forget()
    function, make = CALLS["linear"]
    settle(function, make, calls=1)
    other = make()
    seen: list[Any] = []
    real = recording._Recorder.run

    def run(self: Any, *args: Any) -> Any:
        rows = other[2][: 5 + len(seen)]  # another kind each time, or this would record too
        thread = threading.Thread(target=lambda: seen.append(expand(rows, other[3])))
        thread.start()
        thread.join()
        return real(self, *args)

    with mock.patch.object(recording._Recorder, "run", run):
        result, heard = outcome(function, make())
    assert [s.kernel.name for s in heard].count("_gemm_kernel") == 1 and len(seen) == 2
    args = make()
    assert now(function, args) == as_written(function, args)


def check_the_names_of_triton_are_there() -> None:
    assert launching.missing() is None and launching._why_not() is None
    for name, why in launching.NAMES:
        assert why
        assert name == "runtime.driver.active" or _without(name) == name
    empty = types.SimpleNamespace(driver=object())
    with mock.patch.object(triton, "runtime", empty):
        assert launching.missing() == "runtime.driver.active"


def _without(name: str) -> str | None:
    """What :func:`launching.missing` says when Triton has no ``name``."""
    at: Any = triton
    *path, last = name.split(".")
    for part in path[:-1]:
        at = getattr(at, part)
    real = getattr(at, path[-1])
    others = {n: getattr(real, n, None) for n in dir(real) if n != last and n[0] != "_"}
    with mock.patch.object(at, path[-1], types.SimpleNamespace(**others)):
        return launching.missing()


def on_the_cpu(launch: Launch) -> Launch:
    """The launch with its meta tensors on the CPU, in memory that nobody touches."""
    made: dict[int, Tensor] = {}

    def real(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in made:
                made[id(value)] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype
                )
            return made[id(value)]
        if isinstance(value, TensorDescriptor):
            return TensorDescriptor(real(value.base), value.shape, value.strides, value.block_shape)
        return tuple(map(real, value)) if type(value) is tuple else value

    return launch._replace(args=real(launch.args))


def direct(
    launch: Launch, prepare: Callable[[Any], None] | None = None
) -> tuple[list[Tensor], Callable[[], Any]]:
    """(the launch's tensors, the code that a plan has for it); ``prepare`` gets its kernel."""
    bases = tuple(v.base if isinstance(v, TensorDescriptor) else v for v in launch.args)
    tensors = list({id(t): t for t in tensors_in(bases)}.values())
    number = {id(t): i for i, t in enumerate(tensors)}
    numbers = sorted({v for v in flat(launch.args) if type(v) is float})
    origins = recording.Origins(
        lambda t: (number[id(t)], 0), {(float, v): i for i, v in enumerate(numbers)}
    )
    compiled = launch.kernel[launch.grid](*launch.args, **launch.meta)
    if prepare is not None:
        prepare(compiled)
    filled = origins.filled(recording.arguments(launch))
    run = plans.write(len(tensors), [], [plans.Start(compiled, launch.grid, filled)], None)
    return tensors, lambda: run(0, tensors, [t.data_ptr() for t in tensors], numbers)


def check_every_case_that_ships() -> None:
    """The code that a plan has for a launch tells a kernel what Triton tells it."""
    from benchmarks.static.run import TARGETS, all_cases

    count = 0
    for name in TARGETS:
        if not name.startswith("sm_"):
            continue
        for case in all_cases(name, Path("kernels/tuning")):
            launch = on_the_cpu(case.launch)
            tensors, run = direct(launch)
            with standin.listening() as heard:
                launch.run()
            with standin.listening() as ours:
                run()
            assert len(ours) == len(heard) == 1
            wanted = told(tensors, None, heard)
            assert told(tensors, None, ours) == wanted, (name, case.name)
            count += 1
    assert count > 500


def check_what_tritons_launcher_makes_of_it() -> None:
    """Beneath its Python, where descriptors are made, Triton's launcher gets the same again."""
    from triton.backends.nvidia import driver as cuda

    from benchmarks.static.run import all_cases

    got: list[Any] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.data_ptr()
        if type(value).__name__ == "HookChain" or (isinstance(value, dict) and "stream" in value):
            return None  # an empty chain of hooks, and what they would be told
        return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value

    def record(*args: Any) -> None:
        got.append(plain(args))

    def described(*args: Any) -> Any:
        return "map", plain(args)

    utils = types.SimpleNamespace(
        launch=record, build_signature_metadata=list,
        fill_tma_descriptor=described, fill_tma_descriptor_tiled=described,
    )  # fmt: skip
    kinds = dict(PyKernelArg=dict, ARG_CONSTEXPR=0, ARG_KERNEL=1, ARG_TUPLE=2)
    tile = dict(swizzle=3, elem_size=2, elem_type=9, block_size=[64, 64], fp4_padded=False)
    count = 0
    with (
        mock.patch.object(triton.runtime.driver.active, "utils", utils, create=True),
        mock.patch.multiple(
            cuda, create=True, library_dirs=lambda: [],
            compile_module_from_src=lambda **_: types.SimpleNamespace(launch=record), **kinds,
        ),
    ):  # fmt: skip
        for case in all_cases("sm_90", Path("kernels/tuning")):
            launch = on_the_cpu(case.launch)
            many = 0

            def real(compiled: Any) -> None:
                nonlocal many
                many = sum("tensordesc" in str(k) for k in compiled.src.signature.values())
                metadata = types.SimpleNamespace(
                    tensordesc_meta=[tile] * many or None, num_ctas=1, launch_pdl=False,
                    launch_cooperative_grid=False, global_scratch_size=0, global_scratch_align=1,
                    profile_scratch_size=0, profile_scratch_align=1, instrumentation_mode="",
                )  # fmt: skip
                compiled.run = cuda.CudaLauncher(compiled.src, metadata)

            _, run = direct(launch, real)
            got.clear()
            launch.run()
            run()
            through_triton, ours = got
            assert ours == through_triton, case.name
            count += many > 0
    assert count > 5


def flat(values: Any) -> list[Any]:
    return [u for v in values for u in (flat(v) if type(v) is tuple else [v])]


CHECKS = {name: f for name, f in sorted(globals().items()) if name.startswith("check_")}


def run(names: list[str]) -> None:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            with standin.device():
                torch.manual_seed(0)
                CHECKS[name]()
            found[name] = None
        except BaseException:
            found[name] = traceback.format_exc()
    print(json.dumps(found))
