"""The host's time of a launch and of a training linear on the kernels, without a GPU.

    python -m benchmarks.host.launches [--rounds 21]

Kernels start on a device that does nothing (:mod:`.standin`), and torch's product with W is not
computed, so what is left is Python and torch's allocations. Three ways: ``bare`` allocates the
results and calls the compiled kernels with arguments that are ready; ``planned`` is the call as a
user makes it; ``written`` is the same call without plans (kernels/launching.py), through all checks
and Triton's own dispatch. Times are medians of CPU time on this machine, of small tensors.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from . import standin
from .measure import Work, interleave

LAUNCH_LIMIT, LINEAR_LIMIT = 10e-6, 60e-6  # seconds beyond the bare call
M, K, N, R = 128, 64, 64, 16
BF16, FP32 = torch.bfloat16, torch.float32
CALLS = 200


class Row(NamedTuple):
    """Seconds of CPU time a call, and how many launches it has."""

    name: str
    launches: int
    bare: float
    planned: float
    written: float
    limit: float | None

    @property
    def beyond(self) -> float:
        """What Python adds to the bare call."""
        return self.planned - self.bare


def _drawn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def _results(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value or () for t in _results(v)] if not isinstance(value, str) else []


def measured(name: str, call: Callable[[], Any], limit: float | None, rounds: int) -> Row:
    """The row of a call."""
    from peftkern.kernels import launching

    for _ in range(3):
        result = call()
    with standin.listening() as heard:
        result = call()
    makes = [(tuple(t.shape), t.dtype) for t in _results(result)]
    started = [
        (s.kernel.run, (*s.grid, s.stream, s.function, s.metadata, None, None, None, *s.args))
        for s in heard
    ]

    def bare() -> None:
        for shape, dtype in makes:
            torch.empty(shape, dtype=dtype)
        for run, args in started:
            run(*args)

    def written() -> Any:
        with launching.as_written():
            for _ in range(10):
                call()

    ways = {"bare": bare, "planned": call}
    samples = interleave({n: Work(f) for n, f in ways.items()}, rounds, calls=CALLS)
    slow = interleave({"written": Work(written)}, max(3, rounds // 3), calls=CALLS // 50)
    found = {n: statistics.median(s.cpu) for n, s in samples.items()}
    whole = statistics.median(slow["written"].cpu) / 10
    return Row(name, len(heard), found["bare"], found["planned"], whole, limit)


def rows(rounds: int = 21) -> Iterator[Row]:
    """The rows of single launches, then those of a training linear."""
    import peftkern
    from peftkern.kernels.bits import dropout_bits
    from peftkern.kernels.decode import decode
    from peftkern.kernels.expand import expand
    from peftkern.kernels.gemm import fused_linear
    from peftkern.kernels.grad_xa import grad_xa
    from peftkern.kernels.shrink_expand import shrink_expand
    from peftkern.ops.backend import use_backend

    torch.manual_seed(0)
    with standin.device(), use_backend("triton"):
        x, w, s, few = _drawn(M, K), _drawn(N, K), _drawn(M, R), _drawn(1, K)
        a, b = _drawn(R, K, dtype=FP32), _drawn(N, R, dtype=FP32)
        many_a, many_b = ([t.clone() for _ in range(3)] for t in (a, b))
        single: dict[str, Callable[[], Any]] = {
            "dropout mask": lambda: dropout_bits(M, K, 0.1, 12345678901234, device="cpu"),
            "expand": lambda: expand(s, b),
            "decode, one row": lambda: decode(few, w, a, b, 2.0),
            "shrink_expand": lambda: shrink_expand(x, [a], [b], [2.0]),
            "shrink_expand of q, k, v": lambda: shrink_expand(x, many_a, many_b, [2.0] * 3),
            "grad_xa": lambda: grad_xa(x, [s], [a]),
            "gemm with descriptors": lambda: fused_linear(x, w, s, b),
        }
        for name, call in single.items():
            yield measured(name, call, LAUNCH_LIMIT, rounds)
        weights = [torch.nn.Parameter(t.clone()) for t in (a, b)]
        trained = x.clone().requires_grad_()
        # the CPU's product would take most of the time, and the processor's caches with it
        with mock.patch.object(Tensor, "addmm_", lambda y, *_: y):
            for p in (0.0, 0.1):

                def forward(p: float = p) -> Tensor:
                    return peftkern.lora_linear(trained, w, None, *weights, 2.0, p)

                name = f"training linear forward, dropout {p}"
                yield measured(name, forward, LINEAR_LIMIT, rounds)
                y, dy = forward(), torch.ones(M, N, dtype=BF16)

                def backward(y: Tensor = y, dy: Tensor = dy) -> Any:
                    return torch.autograd.grad(y, [trained, *weights], dy, retain_graph=True)

                yield measured(f"its backward, dropout {p}", backward, None, rounds)


def table(found: list[Row]) -> list[str]:
    """The rows as text, in microseconds."""
    head = f"{'CPU time in us, host only':38} launches   bare planned  beyond   limit written"
    lines = [head]
    for r in found:
        bare, planned, beyond, written = (
            f"{1e6 * t:7.1f}" for t in (r.bare, r.planned, r.beyond, r.written)
        )
        limit = f"{1e6 * r.limit:7.0f}" if r.limit is not None else " " * 7
        met = "" if r.limit is None or r.beyond <= r.limit else "  NOT met"
        lines.append(f"{r.name:38} {r.launches:8d}{bare} {planned} {beyond} {limit} {written}{met}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    if rounds < 2:
        parser.error(f"--rounds: {rounds} was given, at least 2 is allowed")
    torch.set_num_threads(1)
    print("\n".join(table(list(rows(rounds)))))


if __name__ == "__main__":
    main()
