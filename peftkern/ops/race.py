"""A race: throws out wrong ways to compute one result, and times the others in turns.

Every way runs on the tensors of the call itself. Operations change no argument, and nothing here
draws from torch's generators, so after a race they are in the same state as before. Besides the
inputs, the outputs of only one way at a time are in memory.

Every way, torch's own too, must pass two checks. At a few places its outputs must agree with the
formula in float64 (:mod:`.sampled` and :mod:`.prefix_sampled`, which tell the cost). Everywhere
they must agree with those of the first way that passes the former. Of that way's outputs a sketch
is kept: their products with a few columns of random signs, whose squared Frobenius norms are
unbiased estimates of the outputs'. A wrong element anywhere changes the sketch in its row.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .choices import TORCH, tensors, winner
from .sampled import Exact, Sample

log = logging.getLogger("peftkern")

# the largest ‖way - reference‖ / ‖reference‖ of each output that passes, against float64 and
# against another way: twice the limit against float64 in benchmarks.gpu, as two ways may differ
# by that much
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-3}
BUDGET_S = 0.3  # seconds for all timed rounds of a race
REGION_S = 1e-3  # seconds of one timing at least, so that the clock's own cost does not count
MOST_ROUNDS, MOST_REPEATS = 15, 50
_COLUMNS = 8
_BLOCK = 2**22  # elements that are converted to float32 at a time

Run = Callable[[], Any]


class Undecided(Exception):
    """No way can be preferred; with ``for_good`` another try would have the same end."""

    def __init__(self, reason: str, for_good: bool) -> None:
        super().__init__(reason)
        self.for_good = for_good


@dataclass
class Outcome:
    """The winner, microseconds of every way (p20, p50, p80), and {way left out: reason}."""

    winner: str
    us: dict[str, dict[str, float]]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def times(self) -> dict[str, float]:
        return {name: q["p50"] for name, q in self.us.items()}


class CudaClock:
    """A clock on the current stream, which tests replace by others."""

    def seconds(self, name: str, run: Run, repeats: int) -> float:
        """Seconds of one ``run`` with its host time, as the mean of ``repeats`` in a row."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats

    def synchronize(self) -> None:
        """Wait for the device, so that an error on it is raised now."""
        torch.cuda.synchronize()

    def graph(self, run: Run) -> Run:
        """A function that replays ``run`` as a CUDA graph; raises the error of its capture."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: calls in other threads do not break the capture
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            kept = run()

        def replay(kept: Any = kept) -> None:  # holds the outputs, whose memory is the graph's
            graph.replay()

        return replay


class WallClock(CudaClock):
    """A clock for the CPU, where Triton's interpreter runs; its times are not those of kernels."""

    def seconds(self, name: str, run: Run, repeats: int) -> float:
        import time

        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats

    def synchronize(self) -> None:
        pass

    def graph(self, run: Run) -> Run:
        raise RuntimeError("there are no CUDA graphs on the CPU")


def sketch(t: Tensor) -> Tensor:
    """The rows of ``t`` times 8 columns of random signs, over the root of 8: float32 [rows, 8]."""
    flat = t.reshape(-1, t.shape[-1]) if t.dim() > 1 else t.reshape(1, -1)
    # a separate generator, so that the state of torch's own stays
    own = torch.Generator().manual_seed(flat.shape[1])
    signs = torch.randint(0, 2, (flat.shape[1], _COLUMNS), generator=own) * 2.0 - 1.0
    signs = (signs / _COLUMNS**0.5).to(t.device)
    step = max(1, _BLOCK // max(1, flat.shape[1]))
    blocks = [flat[i : i + step].float() @ signs for i in range(0, flat.shape[0], step)]
    return torch.cat(blocks) if blocks else flat.new_zeros((0, _COLUMNS), dtype=torch.float32)


def _sketches(result: Any) -> list[Tensor]:
    """Sketches of all outputs, which are then overwritten with NaN.

    The next way may get their memory, and must not find correct numbers in it.
    """
    found = []
    for t in tensors(result):
        found.append(sketch(t))
        t.fill_(float("nan"))
    return found


def _difference(ours: list[Tensor], reference: list[Tensor]) -> float:
    """The largest relative difference of the outputs; infinite when one is not finite."""
    if [t.shape for t in ours] != [t.shape for t in reference]:
        return float("inf")
    worst = 0.0
    for t, ref in zip(ours, reference, strict=True):
        off, norm = (t - ref).norm().item(), ref.norm().item()
        if not off < float("inf"):  # NaN too
            return float("inf")
        worst = max(worst, off / norm if norm else (float("inf") if off else 0.0))
    return worst


def _error(samples: list[Sample]) -> tuple[float, str]:
    """(largest relative error of the samples, name of its output).

    The error is infinite when a number is not finite.
    """
    worst, where = 0.0, ""
    for name, got, exact, size in samples:
        # below its smallest normal number a dtype has no relative precision
        least = torch.finfo(got.dtype).smallest_normal * got.numel() ** 0.5
        norm = max(exact.norm().item(), size, least)
        error = (got.double() - exact).norm().item() / norm if got.numel() else 0.0
        if not error < float("inf"):  # NaN too
            return float("inf"), name
        if error > worst:
            worst, where = error, name
    return worst, where


def said(e: BaseException) -> str:
    """The type of an exception, and its message if it has one."""
    return f"{type(e).__name__}: {str(e).strip()[:200]}".removesuffix(": ")


def _checked(
    ways: dict[str, Run], exact: Exact, limit: float, clock: Any, op: str
) -> dict[str, str]:
    """{way that is left out: reason}: it failed or its result is wrong. All ways compile here.

    Raises:
        Undecided: no way is right, or none has a finite result.
        torch.OutOfMemoryError: a way ran out of memory.
    """
    out: dict[str, str] = {}
    reference: tuple[str, list[Tensor]] | None = None
    failed = finite = False
    for name, way in ways.items():
        try:
            result = way()
            clock.synchronize()
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # no resources, no compilation, ...: this way cannot run the call
            out[name] = said(e)
            failed = failed or name == TORCH
            continue
        off, where = _error(exact(result))
        sketches = _sketches(result)
        del result
        if not all(bool(t.isfinite().all()) for t in sketches):
            off = float("inf")
        finite = finite or off < float("inf")
        truth = f"float64 in {where}" if where else "float64"
        if off <= limit:
            if reference is None:
                reference = name, sketches
            off, truth = _difference(sketches, reference[1]), reference[0]
        if off > limit:
            out[name] = f"its result differs from {truth} by {off:.1e}, allowed {limit:.0e}"
    if reference is None:
        raise _nobody_is_right(out, failed, finite, op)
    for name, why in out.items():
        log.warning("%s is left out of a race of %s: %s", name, op, why)
    return out


def _nobody_is_right(out: dict[str, str], torch_failed: bool, finite: bool, op: str) -> Undecided:
    if torch_failed:  # the call itself will raise the same error
        return Undecided(f"torch's own way failed: {out[TORCH]}", for_good=False)
    if not finite:
        return Undecided("the numbers of this call are not finite", for_good=False)
    reasons = "; ".join(f"{name}: {why}" for name, why in out.items())
    log.warning("no way of %s is right, and torch is taken: %s", op, reasons)
    return Undecided(f"no way is right: {reasons}", for_good=True)


def run(
    ways: dict[str, Run],
    dtype: torch.dtype,
    clock: Any,
    *,
    exact: Exact,
    op: str,
    graphs: bool = False,
) -> tuple[Outcome, Outcome | None]:
    """Race ``ways``; the one named torch wins unless another one is clearly faster.

    Args:
        ways: by name; each gives fresh tensors, in any nesting.
        dtype: of the activations; the allowed difference depends on it.
        clock: a :class:`CudaClock`.
        exact: gives some numbers of a way's result with the same in float64.
        op: the name of the operation, for messages.
        graphs: also time them as CUDA graphs.

    Returns:
        The outcome of plain calls, and the one in CUDA graphs. The latter is None when it is not
        asked for, or when torch's own way is right and cannot be captured. Each way that is left
        out is logged as a warning.

    Raises:
        Undecided: out of memory, no way is right, or no result is finite.
    """
    try:
        out = _checked(ways, exact, LIMITS[dtype], clock, op)
        rest = {name: way for name, way in ways.items() if name not in out}
        plain = _outcome(rest, out, clock)
        captured = _graphs(rest, dict(out), clock) if graphs else None
    except torch.OutOfMemoryError as e:
        raise Undecided(f"out of memory in a race: {str(e)[:100]}", for_good=True) from None
    return plain, captured


def _graphs(ways: dict[str, Run], out: dict[str, str], clock: Any) -> Outcome | None:
    captured: dict[str, Run] = {}
    for name, way in ways.items():
        try:
            captured[name] = clock.graph(way)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:
            out[name] = f"cannot be captured: {said(e)}"
            log.info("%s is left out of a race in CUDA graphs: %s", name, out[name])
    enough = TORCH in captured or (TORCH not in ways and captured)
    return _outcome(captured, out, clock) if enough else None


def _outcome(ways: dict[str, Run], out: dict[str, str], clock: Any) -> Outcome:
    times = _timed(ways, clock)
    medians = {name: statistics.median(t) for name, t in times.items()}
    return Outcome(winner(medians), {name: _quantiles(t) for name, t in times.items()}, out)


def _quantiles(us: list[float]) -> dict[str, float]:
    ordered = sorted(us)
    last = len(ordered) - 1
    return {
        "p20": ordered[round(0.2 * last)],
        "p50": statistics.median(ordered),
        "p80": ordered[round(0.8 * last)],
    }


def _timed(ways: dict[str, Run], clock: Any) -> dict[str, list[float]]:
    """{way: microseconds in each round}.

    In a round every way runs once, each time with another first one, so that a clock that drifts
    affects all alike.
    """
    order = list(ways)
    for name in order:  # warm up caches again, as everything has compiled now
        clock.seconds(name, ways[name], 1)
    once = {name: max(clock.seconds(name, ways[name], 2), 1e-7) for name in order}
    repeats = {n: max(1, min(MOST_REPEATS, round(REGION_S / t + 0.5))) for n, t in once.items()}
    cost = sum(once[n] * repeats[n] for n in order)
    times: dict[str, list[float]] = {name: [] for name in order}
    for i in range(max(1, min(MOST_ROUNDS, int(BUDGET_S / cost)))):
        first = i % len(order)
        for name in order[first:] + order[:first]:
            times[name].append(clock.seconds(name, ways[name], repeats[name]) * 1e6)
    return times
