"""Checks of plans (kernels/launching.py) on a device that does nothing, for a process that does not
interpret kernels: ``run(names)`` prints a JSON object with the traceback of each check that failed,
or None.
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
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from benchmarks.host import standin
from peftkern.kernels import kinds, launching, recording
from peftkern.kernels.bits import dropout_bits
from peftkern.kernels.common import Launch
from peftkern.kernels.dora_norm import row_norms
from peftkern.kernels.expand import expand
from peftkern.kernels.gemm import GemmConfig, fused_linear
from tests.kernels import on_cases
from tests.kernels.planning import (
    CALLS,
    K,
    M,
    N,
    R,
    as_written,
    drawn,
    low,
    not_run,
    now,
    outcome,
    planned_kinds,
    settle,
    tensors_in,
    unaligned,
)


def check_a_plan_starts_what_triton_would() -> None:
    for name, (function, make) in CALLS.items():
        launching.forget()
        for call in range(5):
            args = make()
            wanted = as_written(function, args)
            found = now(function, args)
            assert found == wanted, f"{name}, call {call}: {found}, expected {wanted}"
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
    call = kinds.Call([], [], [], [])
    kinds.read([torch.empty(2, 2, device="meta")], [None], *call)
    assert torch.device("meta") in call.key


def check_one_tensor_for_two_and_two_tensors() -> None:
    """They are two kinds: a function may refuse, or a kernel write twice to, the former."""
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
        for count in range(4):
            args = then()
            assert now(function, args) == as_written(function, args), count
        assert planned_kinds() == 2

    @launching.planned()
    def fill(words: list[Tensor]) -> Tensor:
        if len({w.data_ptr() for w in words}) < len(words):
            raise ValueError("words[1] is words[0]; allowed: a tensor each")
        return words[0].new_empty(3)

    class Two(NamedTuple):
        first: Tensor
        second: Tensor

    try:
        for group in (list, tuple, lambda ts: Two(*ts)):
            settle(fill, lambda group=group: (group([drawn(4), drawn(4)]),), calls=4)
            one = drawn(4)
            error, _ = outcome(fill, (group([one, one]),))
            assert error == "ValueError: words[1] is words[0]; allowed: a tensor each"
    finally:
        launching._caches.pop()


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


def check_a_seed_in_a_named_tuple() -> None:
    class Draw(NamedTuple):
        p: float
        seed: int

    @launching.planned(seeds=["draw"])
    def drawn_by(draw: Draw) -> Tensor:
        return dropout_bits.__wrapped__(5, 70, draw.p, draw.seed, device="cpu")  # type: ignore[attr-defined]

    try:
        settle(drawn_by, lambda: (Draw(0.3, 7),))
        for seed in (1, 2**40, -3):
            args = (Draw(0.3, seed),)
            with mock.patch.object(Launch, "run", not_run):
                found = now(drawn_by, args)
            assert found == as_written(drawn_by, args)
        args = (Draw(0.5, 7),)
        for _ in range(3):
            assert now(drawn_by, args) == as_written(drawn_by, args)
    finally:
        launching._caches.pop()


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


def check_the_switch_for_short_sums_is_read() -> None:
    matmul, (function, make) = torch.backends.cuda.matmul, CALLS["mixed in parts"]
    try:
        for _ in range(2):
            for setting, dtype in ((True, "*fp16"), (False, "*fp32")):
                matmul.allow_bf16_reduced_precision_reduction = setting
                for _ in range(3):
                    args = make()
                    assert now(function, args) == as_written(function, args)
                with mock.patch.object(Launch, "run", not_run):
                    _, heard = outcome(function, args)
                assert heard[0].kernel.src.signature["parts"] == dtype
    finally:
        matmul.allow_bf16_reduced_precision_reduction = True


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


CHECKS = {
    name: f
    for name, f in sorted({**globals(), **vars(on_cases)}.items())
    if name.startswith("check_")
}


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
