"""The dispatcher in Triton's interpreter, with real races on a clock with a given winner."""

import threading
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.kernels.common import Launch, precision
from peftkern.ops import (
    auto_backend,
    backend,
    choices,
    device,
    torch_backend,
    triton_backend,
    tuned,
)
from peftkern.ops.lora_group import lora_group
from peftkern.ops.lora_mixed import SampleIndex, lora_mixed
from peftkern.ops.projection import Projection
from peftkern.utils.private import without_dispatch_modes
from tests.closeness import assert_as_good_as_torch
from tests.kernels.racing import FakeClock, decided, dispatcher, drawn, entry, ship, step

WAYS = ("torch", *triton_backend.PRODUCTS)
LOAD = tuned.load


@pytest.mark.parametrize("fastest", WAYS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_fastest_way_is_taken_and_nobody_is_raced_twice(clock, ran, fastest, p):
    clock.fastest = fastest
    tensors = drawn()
    torch.manual_seed(1)
    first = step(*tensors, p)
    assert clock.races == 2
    assert {how for _, how in ran} == set(WAYS)  # everybody ran
    assert ran[len(WAYS)] == ("forward", fastest) and ran[-1] == ("backward", fastest)
    ran.clear()
    torch.manual_seed(1)
    again = step(*tensors, p)
    assert ran == [("forward", fastest), ("backward", fastest)] and clock.races == 2
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    with peftkern.use_backend("torch" if p == 0.0 else "triton"):  # torch would draw another mask
        torch.manual_seed(1)
        want = step(*tensors, p)
    assert all(map(torch.equal, first, want))


def test_each_bucket_of_rows_and_each_shape_is_its_own_race(clock):
    for M, races in ((12, 2), (16, 2), (9, 2), (17, 4), (5, 6), (8, 6)):
        step(*drawn(M=M))
        assert clock.races == races, M
    step(*drawn(), p=0.1)  # a mask
    step(*drawn(r=5))
    assert clock.races == 10
    x, w, A, B = drawn()
    y = peftkern.lora_linear(x.detach(), w, None, A, B, 2.0)
    torch.autograd.grad(y.sum(), (A, B))  # no dX: its backward is another one
    assert clock.races == 11
    with torch.no_grad():
        peftkern.lora_linear(x, w, None, A, B, 2.0)
    assert clock.races == 12


def by_precision():
    torch.set_float32_matmul_precision("high")


def by_backend():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def by_all_backends():  # as TrainingArguments(tf32=True)
    torch.backends.fp32_precision = "tf32"


@pytest.fixture
def switches_put_back():
    """By the setters that both take back: after the others the old switch cannot be asked."""
    matmul = torch.backends.cuda.matmul
    before = torch.backends.fp32_precision, matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision, matmul.fp32_precision = before


@pytest.mark.parametrize("switch", [by_precision, by_backend, by_all_backends])
def test_where_float32_products_are_rounded_is_another_race(clock, switches_put_back, switch):
    assert precision(torch.float32) == "ieee"
    step(*drawn())
    switch()
    assert precision(torch.float32) == "tf32" and precision(torch.bfloat16) == "ieee"
    step(*drawn())
    assert clock.races == 4
    assert {k.dtype for k in tuned.book(-1).cached.entries} == {"float32", "tf32"}


def test_groups_are_raced_as_groups(clock, ran):
    x, w, A, B = drawn()
    members = [
        Projection(w[:n], None, A[:r], B[:n, :r], 2.0, p, False)
        for n, r, p in ((24, 4, 0.0), (10, 2, 0.2))
    ]
    for _ in range(2):
        ys = lora_group(x, members)
        sum(y.sum() for y in ys).backward()
    assert clock.races == 2
    keys = {k.op: k for k in tuned.book(-1).cached.entries}
    assert (keys["forward"].n, keys["forward"].r, keys["forward"].group) == (34, 4, 2)
    assert keys["forward"].mask and keys["backward"].mask and keys["backward"].grads == "xab"
    assert ran[-1] == ("backward", "fused")


@pytest.mark.parametrize("fastest", ["torch", "mixed"])
def test_a_batch_of_several_adapters_is_raced_by_how_many_they_are(clock, ran, fastest):
    clock.fastest = fastest
    x, w, A, B = drawn(M=6, grad=False)
    adapters = [(A, B, 0.5), (A[:2], B[:, :2], 2.0), (A, B, 1.0)]
    want = None
    for count, races in ((3, 1), (3, 1), (2, 2)):
        index = SampleIndex([0, -1, count - 1], count)
        ran.clear()
        y = lora_mixed(x.view(3, 2, -1), w, None, adapters[:count], index)
        assert clock.races == races and ran[-1] == ("mixed", fastest)
        assert len(ran) == (1 if want is not None and count == 3 else 3)
        with peftkern.use_backend("torch"):
            want = lora_mixed(x.view(3, 2, -1), w, None, adapters[:count], index)
        assert torch.equal(y, want)
        peftkern.ops.backend.select()
    keys = [k for k in tuned.book(-1).cached.entries if k.op == "mixed"]
    assert {(k.m, k.n, k.k, k.r, k.group) for k in keys} == {(8, 24, 40, 4, 4), (8, 24, 40, 4, 2)}


def test_the_disk_comes_before_the_shipped_table_and_that_before_a_race(clock, tmp_path, ran):
    ship(tmp_path, [entry("forward", "hybrid"), entry("backward", "hybrid", grads="xab")])
    tuned.forget()
    tuned.book(-1).keep([entry("forward", "fused")])
    tuned.forget()  # as another process: only files are left
    x, w, A, B = drawn()
    y = peftkern.lora_linear(x, w, None, A, B, 2.0)
    y.sum().backward()
    assert clock.races == 0 and ran == [("forward", "fused"), ("backward", "hybrid")]
    assert decided("forward").why == "raced here on 2020-01-02"
    assert decided("backward").why == "shipped table of CPU"
    step(*drawn(M=40))
    assert clock.races == 2  # what neither knows


def test_a_shipped_table_of_other_kernels_does_not_count(clock, tmp_path):
    ship(tmp_path, [entry("forward", "hybrid")], sources="other")
    tuned.forget()
    step(*drawn())
    assert clock.races == 2 and decided("forward").how == "fused"
    assert "is of other kernels" in tuned.book(-1).shipped_note


def test_a_choice_that_this_code_does_not_know_is_raced_again(clock):
    tuned.book(-1).keep([entry("forward", "slide rule")])
    step(*drawn())
    assert clock.races == 2 and decided("forward").how == "fused"


def test_within_a_capture_nothing_is_raced_or_read_and_later_it_is(clock, ran, monkeypatch):
    capturing = [True]
    monkeypatch.setattr(device, "capturing", lambda x: capturing[0])
    tuned.forget()
    monkeypatch.setattr(tuned, "load", lambda path: pytest.fail("a file is read"))
    step(*drawn())
    assert clock.races == 0 and ran == [("forward", "torch"), ("backward", "torch")]
    assert not tuned.open_books
    monkeypatch.setattr(tuned, "load", LOAD)
    tuned.book(-1).keep([entry("forward", "hybrid")])  # which would have to be loaded
    ran.clear()
    step(*drawn())
    assert clock.races == 0 and ran == [("forward", "torch"), ("backward", "torch")]
    capturing[0] = False
    step(*drawn())
    assert clock.races == 1 and decided("forward").how == "hybrid"
    assert decided("backward").how == "fused"


def test_in_a_graph_another_way_may_be_faster(monkeypatch, tmp_path, ran):
    monkeypatch.setattr(device, "capturing", lambda x: capturing)
    capturing = False
    x, w, A, B = drawn(grad=False)
    with dispatcher(monkeypatch, tmp_path, FakeClock("torch", in_graph="decode")) as clock:
        for capturing in (False, True):
            ran.clear()
            peftkern.lora_linear(x, w, None, A, B, 2.0)
            assert ran[-1] == ("infer", "decode" if capturing else "torch")
        assert len(ran) == 1 and clock.races == 1
        tuned.forget()
        capturing = False
        peftkern.lora_linear(x, w, None, A, B, 2.0)  # from the file
        assert clock.races == 1 and decided("infer").in_graph == "decode"
        x, w, A, B = drawn(M=20, grad=False)  # with many rows the host's time is hidden
        peftkern.lora_linear(x, w, None, A, B, 2.0)
        assert [k.graph for k in tuned.book(-1).cached.entries if k.m == 32] == [False]


def test_races_can_be_switched_off(clock, ran, monkeypatch):
    monkeypatch.setenv("PEFTKERN_RACE", "0")
    tuned.book(-1).keep([entry("backward", "hybrid", M=100, grads="xab")])
    step(*drawn())
    assert clock.races == 0 and ran == [("forward", "torch"), ("backward", "hybrid")]
    assert decided("forward").why == "PEFTKERN_RACE=0: torch"
    assert "nearest bucket, raced here on 2020-01-02" in decided("backward").why


def test_a_switch_that_is_neither_on_nor_off_is_refused(clock, monkeypatch):
    monkeypatch.setenv("PEFTKERN_RACE", "off")
    with pytest.raises(ValueError, match="PEFTKERN_RACE='off' is not known; allowed: 0, 1"):
        step(*drawn())


def test_a_race_moves_no_generator(clock):
    states = []
    for _ in range(2):  # with a race, and without
        torch.manual_seed(3)
        found = step(*drawn(), p=0.2)
        states.append((torch.get_rng_state(), *found))
    assert clock.races == 2
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_call_drops_the_same_elements_whatever_is_decided_between(
    clock, ran, monkeypatch, reentrant
):
    """Forward without a race (torch), its recomputation raced (fused)."""
    capturing = [True]
    monkeypatch.setattr(device, "capturing", lambda x: capturing[0])
    tuned.book(-1)
    x, w, A, B = drawn()
    found = []
    for checkpointed in (True, False):
        torch.manual_seed(5)
        capturing[0] = checkpointed

        def call(x):
            return peftkern.lora_linear(x, w, None, A, B, 2.0, 0.5)

        y = checkpoint(call, x, use_reentrant=reentrant) if checkpointed else call(x)
        capturing[0] = False
        found.append((y, *torch.autograd.grad(y.sum(), (x, A, B))) if not reentrant else None)
        if reentrant:
            for t in (x, A, B):
                t.grad = None
            y.sum().backward()
            found[-1] = (y, x.grad, A.grad, B.grad)
    assert ran[0] == ("forward", "torch") and decided("forward").how == "fused"
    assert all(map(torch.equal, *found))
    assert (found[0][1] != found[0][1][0]).any()  # rows differ: there was a mask


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_do_not_see_a_race(clock, monkeypatch):
    """Selective checkpointing counts operations: a race within it would shift them.

    Nor do they see whether a launch of its own or the shrink draws the mask.
    """
    counts, run = [], Launch.run

    def launch(this):
        with without_dispatch_modes():  # on a GPU it is no operation of torch
            run(this)

    monkeypatch.setattr(Launch, "run", launch)
    for _ in range(2):
        with Counter() as counter, torch.no_grad():
            x, w, A, B = drawn(grad=False)
            before = len(counter.seen)
            peftkern.lora_linear(x, w, None, A, B, 2.0, 0.3)
        counts.append(counter.seen[before:])
    assert clock.races == 1 and counts[0] == counts[1] and counts[0]


@pytest.mark.filterwarnings("ignore:There is a performance drop because")  # torch.vmap's
def test_tensors_that_are_not_plain_go_to_torch(clock):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y = peftkern.lora_linear(*[t.detach() for t in drawn()[:2]], None, *drawn()[2:], 2.0, 0.1)
    assert y.shape == (12, 24) and clock.races == 0 and not tuned.books()
    x, w, A, B = drawn(grad=False)
    got = torch.vmap(lambda row: peftkern.lora_linear(row, w, None, A, B, 2.0))(x)
    assert torch.equal(got, torch_backend.infer(x, w, None, A, B, 2.0, False))
    assert clock.races == 0


def test_while_one_thread_races_the_others_go_on(clock, monkeypatch, ran):
    racing, go_on = threading.Event(), threading.Event()
    real = clock.seconds

    def slow(*args):
        racing.set()
        assert go_on.wait(30)
        return real(*args)

    clock.seconds = slow
    x, w, A, B = drawn(grad=False)
    first = threading.Thread(target=lambda: peftkern.lora_linear(x, w, None, A, B, 2.0))
    first.start()
    assert racing.wait(30)
    ran.clear()
    peftkern.lora_linear(x, w, None, A, B, 2.0)
    assert ran == [("infer", "torch")]
    (waiting,) = tuned.book(-1).provisional.values()
    assert waiting.why == "another thread is racing: torch"
    go_on.set()
    first.join()
    peftkern.lora_linear(x, w, None, A, B, 2.0)
    assert ran[-1] == ("infer", "fused") and not tuned.book(-1).provisional


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_the_kernels_do_not_take_is_torchs_masks_included(clock, dtype):
    x, w, A, B = drawn(dtype=dtype, adapter=dtype)
    torch.manual_seed(2)
    got = step(x, w, A, B, 0.2)
    if dtype == torch.bfloat16:
        assert clock.races == 2
        return
    assert clock.races == 0 and decided("forward").declined
    assert "float64" in decided("forward").why
    with peftkern.use_backend("torch"):
        torch.manual_seed(2)
        for a, b in zip(got, step(x, w, A, B, 0.2), strict=True):
            assert torch.equal(a, b)


def test_float32_adapters_below_bf16_can_change_their_way_between_forward_and_backward(clock):
    x, w, A, B = drawn(dtype=torch.bfloat16)
    for f, b in (("torch", "fused"), ("fused", "torch")):
        tuned.forget()
        for op, way, grads in (("forward", f, ""), ("backward", b, "xab")):
            key = tuned.key_of(op, x.dtype, A.dtype, 12, 24, 40, 4, grads=grads)
            tuned.book(-1).keep([replace(entry(op, way), key=key)])
        got = step(x, w, A, B)
        assert clock.races == 0
        with peftkern.use_backend("torch"):
            plain, exact = (
                step(*[t.detach().to(d).requires_grad_(t.requires_grad) for t, d in pairs])
                for pairs in (
                    [(t, torch.bfloat16) for t in (x, w, A, B)],
                    [(t, torch.float64) for t in (x, w, A, B)],
                )
            )
        peftkern.ops.backend.select()
        assert_as_good_as_torch(*(dict(enumerate(f)) for f in (got, plain, exact)))


def test_nothing_is_asked_of_an_empty_batch(clock):
    x, w, A, B = drawn()
    y, dx, da, db = step(x.detach()[:0].requires_grad_(), w, A, B)
    assert y.shape == (0, 24) and dx.shape == (0, 40) and not da.any() and not db.any()
    assert clock.races == 0


def test_only_clearly_faster_leaves_torch():
    assert choices.winner({"torch": 100.0, "fused": 99.0}) == "torch"
    assert choices.winner({"torch": 100.0, "fused": 97.0, "hybrid": 97.5}) == "fused"
    assert choices.names("infer", 17) == choices.names("forward", 1) == WAYS
    assert choices.names("infer", 16) == ("torch", *triton_backend.INFER)


def test_auto_is_torch_itself_without_a_gpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with peftkern.use_backend("auto"):
        assert backend.active is torch_backend
    assert backend.describe() == ("torch", "auto: no CUDA device")
    monkeypatch.setattr(backend, "_no_choice", lambda: None)
    with peftkern.use_backend("auto"):
        assert backend.active is auto_backend and backend.describe()[0] == "auto"


def test_a_call_runs_with_its_own_device_current(clock, monkeypatch):
    """Triton launches on the current device, whatever device the tensors are on."""
    current = []

    class Device:
        def __init__(self, where):
            self.where = where

        def __enter__(self):
            current.append(self.where)

        def __exit__(self, *error):
            current.pop()

    seen = []
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(device, "elsewhere", lambda x: not current)
    for name in ("shrink", "grad_a", "decode_group"):
        real = getattr(triton_backend, name)
        monkeypatch.setattr(
            triton_backend,
            name,
            lambda *a, real=real, **k: seen.append(current[:]) or real(*a, **k),
        )
    timed = clock.seconds
    clock.seconds = lambda *args: seen.append(current[:]) or timed(*args)
    for choice in ("auto", "triton"):
        with peftkern.use_backend(choice):
            step(*drawn())
            peftkern.lora_linear(*drawn(grad=False)[:2], None, *drawn(grad=False)[2:], 2.0)
    assert len(seen) >= 6 and all(where == [torch.device("cpu")] for where in seen)
