"""The dispatcher on the device: it races once, correctly, and never while a graph is captured."""

import pytest
import torch

import peftkern
from tests.gpu.ground import DEVICE, ON_CPU, backend, cut, reference, relative, some

from peftkern.ops import race, tuned  # isort: skip  (after the skip in ground)

BF16, FP32 = torch.bfloat16, torch.float32
LIMIT = 6e-3


@pytest.fixture(autouse=True)
def auto(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path))
    monkeypatch.delenv("PEFTKERN_RACE", raising=False)
    monkeypatch.setattr(backend, "_no_choice", lambda: None)
    monkeypatch.setattr(race, "BUDGET_S", 1e-9 if ON_CPU else race.BUDGET_S)
    monkeypatch.setattr(race, "MOST_REPEATS", 1 if ON_CPU else race.MOST_REPEATS)
    # what ships must not keep these tests from racing
    monkeypatch.setattr(tuned, "path_for", lambda name: tmp_path / "shipped" / f"{name}.json")
    tuned.forget()
    with backend.use_backend("auto"):
        yield
    tuned.forget()


@pytest.fixture
def races(monkeypatch):
    ran = []
    real = race.run
    monkeypatch.setattr(race, "run", lambda *a, **k: ran.append(1) or real(*a, **k))
    return ran


def tensors(M, K, N, r, grad=True):
    M, K, N, r = cut(M, K, N, r)
    x, w = some(M, K), some(N, K, seed=1, scale=K**-0.5)
    A = some(r, K, dtype=FP32, seed=2, scale=K**-0.5)
    B = some(N, r, dtype=FP32, seed=3, scale=r**-0.5)
    for t in (x, A, B):
        t.requires_grad_(grad)
    return x, w, A, B


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_race_is_run_once_and_its_numbers_are_right(races, p):
    x, w, A, B = tensors(2048, 4096, 4096, 16)
    for i in range(2):
        torch.manual_seed(0)
        y = peftkern.lora_linear(x, w, None, A, B, 2.0, p)
        saved = [t for t in y.grad_fn.saved_tensors if t is not None]
        words = next((t for t in saved if t.dtype == torch.int32), None)
        dy = some(*y.shape, seed=4)
        dx, da, db = torch.autograd.grad(y, (x, A, B), dy)
        assert len(races) == 2, i
    keep = None
    if words is not None:
        from peftkern.ops.bits import unpack_bits

        keep = unpack_bits(words, x.shape[1], torch.bool)
    c = 2.0 / (1 - p)
    s, ds = reference.shrink(x, A, c, keep), reference.grad_s(dy, B, c)
    for got, want in (
        (y, reference.linear(x, w, s, B)),
        (dx, reference.grad_input([dy], [w], [ds], [A], [keep])),
        (da, reference.grad_a(x, ds, keep)),
        (db, reference.grad_b(dy, s)),
    ):
        assert relative(got.detach(), want) < LIMIT
    index = -1 if ON_CPU else torch.cuda.current_device()
    book = tuned.book(index)
    assert len(book.decisions) == 2 and all(not e.left_out for e in book.cached.entries.values())
    tuned.forget()
    peftkern.lora_linear(x, w, None, A, B, 2.0, p)  # from the file
    assert len(races) == 2


def test_a_race_moves_no_generator(races):
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        x, w, A, B = tensors(300, 512, 512, 16)
        torch.autograd.grad(peftkern.lora_linear(x, w, None, A, B, 2.0, 0.2).sum(), (x, A, B))
        device = torch.get_rng_state() if ON_CPU else torch.cuda.get_rng_state()
        states.append((torch.get_rng_state(), device))
    assert len(races) == 2
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_a_race_holds_the_outputs_of_one_way_at_a_time():
    if ON_CPU:
        pytest.skip("counts the device's memory")
    M, K, N = 8192, 4096, 14336
    x, w, A, B = tensors(M, K, N, 16, grad=False)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    peftkern.lora_linear(x, w, None, A, B, 2.0)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 1.5 * M * N * 2, f"{peak} bytes for an output of {M * N * 2}"


@pytest.mark.skipif(ON_CPU, reason="CUDA graphs")
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("M", [1, 16])
def test_decode_in_a_graph_races_before_and_never_within(races, M, warm):
    x, w, A, B = tensors(M, 2048, 2048, 16, grad=False)
    with torch.no_grad():
        if warm:
            peftkern.lora_linear(x, w, None, A, B, 2.0)
        else:  # with its table read, but not raced: it is torch in the graph
            for choice in ("torch", "triton"):
                with backend.use_backend(choice):
                    peftkern.lora_linear(x, w, None, A, B, 2.0)
        ran = len(races)
        assert ran == int(warm)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = peftkern.lora_linear(x, w, None, A, B, 2.0)
        assert len(races) == ran
        x.copy_(some(M, 2048, seed=7))
        graph.replay()
        assert relative(y, reference.linear(x, w, reference.shrink(x, A, 2.0), B)) < LIMIT
        peftkern.lora_linear(x, w, None, A, B, 2.0)
        assert len(races) == 1
    book = tuned.book(torch.cuda.current_device())
    assert {k.graph for k in book.cached.entries} == {True, False}


def test_a_second_device_is_used_where_the_first_is_current():
    if ON_CPU or torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x, w, A, B = (t.detach().to("cuda:1") for t in tensors(64, 256, 256, 16, grad=False))
    y = peftkern.lora_linear(x, w, None, A, B, 2.0)
    assert y.device == x.device and DEVICE.type == "cuda"
    assert relative(y, reference.linear(x, w, reference.shrink(x, A, 2.0), B)) < LIMIT
