"""A clock that makes a chosen way win, and layers on the dispatcher in Triton's interpreter."""

from __future__ import annotations

import contextlib

import torch

import peftkern
from peftkern.kernels import tuning
from peftkern.ops import auto_backend, backend, tuned


class FakeClock:
    """Whoever is ``fastest`` takes 0.1 s, others twice that; nothing is run for it."""

    def __init__(self, fastest="fused", in_graph=None):
        self.fastest, self.in_graph = fastest, in_graph
        self.races = 0  # how often torch, which is in every race, was timed first
        self.captured = []
        self.times = {}

    def seconds(self, name, run, repeats):
        if any(run is replay for replay in self.captured):
            return 0.1 if name == self.in_graph else 0.2
        self.races += name == "torch" and repeats == 2
        return self.times.get(name, 0.1 if name == self.fastest else 0.2)

    def synchronize(self):
        pass

    def graph(self, run):
        if self.in_graph is None:
            raise RuntimeError("no graphs here")

        def replay():
            return run()

        self.captured.append(replay)
        return replay


@contextlib.contextmanager
def dispatcher(monkeypatch, folder, clock):
    """``auto`` decides, as on a CUDA machine; its file is in ``folder``."""
    monkeypatch.setenv("PEFTKERN_CACHE", str(folder))
    monkeypatch.delenv("PEFTKERN_RACE", raising=False)
    monkeypatch.setattr(backend, "_no_choice", lambda: None)
    monkeypatch.setattr(auto_backend, "clock", clock)
    # a table that ships for this machine's name must not decide what tests see
    monkeypatch.setattr(tuned, "path_for", lambda name: folder / "shipped" / f"{name}.json")
    tuned.forget()
    try:
        with peftkern.use_backend("auto"):
            yield clock
    finally:
        tuned.forget()


def drawn(M=12, K=40, N=24, r=4, dtype=torch.float32, adapter=torch.float32, grad=True):
    """Small whole numbers: in float32 every way gives the same bits, as all sums are exact."""
    g = torch.Generator().manual_seed(0)

    def some(*shape, dtype):
        return torch.randint(-2, 3, shape, generator=g).to(dtype)

    x, w = some(M, K, dtype=dtype), some(N, K, dtype=dtype)
    A, B = some(r, K, dtype=adapter), some(N, r, dtype=adapter)
    for t in (x, A, B):
        t.requires_grad_(grad)
    return x, w, A, B


def step(x, w, A, B, p=0.0):
    """Y and the gradients of x, A and B of one call."""
    y = peftkern.lora_linear(x, w, None, A, B, 2.0, p)
    dy = (torch.arange(y.numel()) % 5 - 2).view(y.shape).to(y.dtype)
    return (y, *torch.autograd.grad(y, (x, A, B), dy))


def decided(op, M=12, K=40, N=24, r=4, group=1):
    """The decision for a shape, None when there is none for good."""
    book = tuned.book(-1)
    wanted = (op, tuning.bucket(M), N, K, r, group)
    for key, decision in book.decisions.items():
        if (key.op, key.m, key.n, key.k, key.r, key.group) == wanted:
            return decision
    return None


def entry(op, choice, M=12, K=40, N=24, r=4, times=None, config=None, **more):
    key = tuning.Key(op, "float32", "float32", tuning.bucket(M), N, K, r, **more)
    return tuning.Entry(key, choice, config, dict.fromkeys(("p20", "p50", "p80"), 1.0),
                        times=times or {}, date="2020-01-02T00:00:00+00:00")  # fmt: skip


def ship(folder, entries, sources=None):
    """A table in the place of the shipped one of this machine."""
    name = tuned.machine(-1).gpu
    table = tuning.Table({"name": name}, {}, sources or tuned.sources(), "2020-01-01")
    table.add(entries)
    table.save(folder / "shipped" / f"{name}.json")
