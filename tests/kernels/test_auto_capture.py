"""The dispatcher while a CUDA graph is captured: nothing that a capture forbids, in the interpreter
with a driver that forbids it."""

import pytest
import torch

import peftkern
from peftkern.kernels.common import Launch
from peftkern.ops import auto_backend, choices, device, masks, torch_backend, triton_backend, tuned
from peftkern.ops.projection import Projection
from tests.kernels.racing import FakeClock, dispatcher, drawn, entry, step


class Driver:
    """Loads a kernel when it is launched first, as CUDA's does, and refuses to in a capture."""

    def __init__(self, monkeypatch):
        self.loaded, self.capturing = set(), False
        run = Launch.run

        def launch(this):
            form = this.kernel.__name__, repr(sorted(this.meta.items()))
            if self.capturing and form not in self.loaded:
                raise RuntimeError(f"{form[0]} is loaded in a capture")
            self.loaded.add(form)
            run(this)

        monkeypatch.setattr(masks, "_drew", set())  # by kernels that this one has loaded
        monkeypatch.setattr(Launch, "run", launch)
        for module in (device, masks):  # the latter has the name from the former
            monkeypatch.setattr(module, "capturing", lambda x: self.capturing)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("known", [False, True], ids=["new", "in the file"])
def test_nothing_is_loaded_in_a_capture(monkeypatch, tmp_path, known, p):
    driver = Driver(monkeypatch)
    monkeypatch.setattr(masks, "_drawn", set())
    few = drawn(grad=False)
    with dispatcher(monkeypatch, tmp_path, FakeClock()) as clock:
        if known:  # what another process has measured
            tuned.book(-1).keep(
                [entry("infer", "hybrid"), entry("infer", "decode", graph=True)]
                + [entry("forward", "fused", mask=p > 0.0), entry("backward", "joined", grads="xab",
                   mask=p > 0.0)]
            )  # fmt: skip
        for driver.capturing in (True, False, True):  # before any call, a call, and after it
            torch.manual_seed(1)
            y = peftkern.lora_linear(*few[:2], None, *few[2:], 2.0)
            found = step(*drawn(), p=p)
            assert y.isfinite().all() and all(t.isfinite().all() for t in found)
        assert clock.races == (0 if known else 3)


def test_masks_in_a_capture_have_the_words_of_the_kernel(monkeypatch):
    driver = Driver(monkeypatch)
    x = torch.randn(7, 70)
    for ps in ([0.3], [0.3, 0.3], [0.3, 0.0, 0.5]):
        words = []
        for driver.capturing in (True, False):
            monkeypatch.setattr(masks, "_drawn", set())
            monkeypatch.setattr(masks, "_seed", lambda x: torch.tensor([11]))
            words.append(masks.words_of(x, ps))
        for ours, theirs in zip(*words, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)


def test_a_mask_without_rows_loads_nothing(monkeypatch):
    driver = Driver(monkeypatch)
    monkeypatch.setattr(masks, "_drawn", set())
    for rows, driver.capturing in ((0, False), (7, True)):
        (words,) = masks.words_of(torch.randn(rows, 70), [0.3])
        assert words is not None and words.shape == (rows, 3)


@pytest.mark.parametrize("rows, capturing", [(7, True), (0, True), (0, False)])
def test_torch_alone_computes_a_declined_call_that_cannot_be_decided(
    monkeypatch, tmp_path, rows, capturing
):
    driver = Driver(monkeypatch)
    too_many = triton_backend.MAX_RANK + 1
    member = Projection(
        torch.randn(4, 8), None, torch.randn(too_many, 8), torch.randn(4, too_many), 1.0, 0.0, False
    )
    x = torch.randn(rows, 8)
    with dispatcher(monkeypatch, tmp_path, FakeClock()):
        driver.capturing = capturing
        [(y, s, words)] = auto_backend.forward(x, [member])
    [(wanted, wanted_s, _)] = torch_backend.forward(x, [member])
    assert torch.equal(y, wanted) and torch.equal(s, wanted_s) and words is None


def test_a_way_for_graphs_that_fails_is_not_taken(monkeypatch, tmp_path, caplog):
    driver, ran, infer = Driver(monkeypatch), [], choices.infer
    monkeypatch.setattr(choices, "infer", lambda how, *a: ran.append(how) or infer(how, *a))
    monkeypatch.setattr(triton_backend, "decode_group", lambda *a, **k: 1 / 0)
    x, w, A, B = drawn(grad=False)
    with dispatcher(monkeypatch, tmp_path, FakeClock()):
        tuned.book(-1).keep([entry("infer", "hybrid"), entry("infer", "decode", graph=True)])
        for driver.capturing in (False, True):
            peftkern.lora_linear(x, w, None, A, B, 2.0)
    assert ran == ["decode", "hybrid", "torch"]
    assert "decode is not taken in CUDA graphs: ZeroDivisionError" in caplog.text


def test_a_way_for_graphs_is_not_run_for_a_decision_that_does_not_last(monkeypatch, tmp_path):
    """It would be run beside every call until another thread has raced."""
    ran, infer = [], choices.infer
    monkeypatch.setattr(choices, "infer", lambda how, *a: ran.append(how) or infer(how, *a))
    x, w, A, B = drawn(M=3, grad=False)
    with dispatcher(monkeypatch, tmp_path, FakeClock()):
        book = tuned.book(-1)
        near = {"M": 8, "graph": True}
        book.keep([entry("infer", "hybrid", M=8), entry("infer", "decode", **near)])
        with book.racing:
            peftkern.lora_linear(x, w, None, A, B, 2.0)
    assert ran == ["hybrid"]


def launched(monkeypatch):
    names, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda this: names.append(this.kernel.__name__) or run(this))
    return names


@pytest.mark.parametrize("how", triton_backend.PRODUCTS)
@pytest.mark.parametrize("ps", [[0.3], [0.3, 0.3], [0.3, 0.0, 0.5], [0.0]], ids=str)
def test_a_shrink_draws_the_masks_that_a_launch_of_their_own_would(monkeypatch, ps, how):
    x, names = torch.randn(33, 70), launched(monkeypatch)
    members = [
        Projection(torch.randn(20, 70), None, torch.randn(4, 70), torch.randn(20, 4), 2.0, p, False)
        for p in ps
    ]
    torch.manual_seed(3)
    drawn = triton_backend.forward(x, members, how=how)
    alone = "_bits_kernel" in names
    assert alone == (len(set(ps)) > 1)  # one probability for all, or launches of their own
    torch.manual_seed(3)
    words = masks.words_of(x, ps)
    wanted = triton_backend.forward(x, members, words, how=how)
    for (y, s, w), (y2, s2, w2), given in zip(drawn, wanted, words, strict=True):
        assert torch.equal(y, y2) and torch.equal(s, s2)
        assert w2 is given and (w is None if given is None else torch.equal(w, given))


def test_a_capture_draws_in_the_shrink_once_an_eager_call_has(monkeypatch):
    driver, names = Driver(monkeypatch), launched(monkeypatch)
    monkeypatch.setattr(masks, "_drawn", set())
    monkeypatch.setattr(masks, "_seed", lambda x: torch.tensor([11]))
    _, w, A, B = drawn(K=70, grad=False)
    x, member, found = torch.randn(33, 70), Projection(w, None, A, B, 2.0, 0.3, False), []
    words = masks.words_of(x, [0.3])
    triton_backend.forward(x, [member], words)  # the kernel that reads a mask is loaded
    for driver.capturing in (True, False, True):
        names.clear()
        found += triton_backend.forward(x, [member])
        kernels = {"_bits_kernel", "_shrink_kernel", "_shrink_expand_kernel"} & set(names)
        assert len(kernels) == (2 if len(found) == 1 else 1), names
        assert torch.equal(found[-1][2], words[0]) and torch.equal(found[-1][0], found[0][0])


def test_a_way_that_auto_has_chosen_draws_its_masks_itself(monkeypatch, tmp_path):
    names = launched(monkeypatch)
    with dispatcher(monkeypatch, tmp_path, FakeClock()):
        tuned.book(-1).keep([entry("forward", "fused", mask=True),
                             entry("backward", "joined", grads="xab", mask=True)])  # fmt: skip
        rows = []
        for _ in range(2):
            torch.manual_seed(1)
            names.clear()
            rows.append((step(*drawn(), p=0.3), names.count("_bits_kernel")))
    assert [count for _, count in rows] == [1, 0]  # the call that decides gives all ways one mask
    assert all(torch.equal(a, b) for a, b in zip(rows[0][0], rows[1][0], strict=True))
