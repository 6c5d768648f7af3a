"""Siblings on one input decode as one operation, with the numbers of separate ones."""

import copy

import pytest
import torch

import peftkern
from peftkern.kernels.common import Launch
from peftkern.ops import choices, device, triton_backend, tuned
from peftkern.tuners.lora import group as module
from tests.closeness import assert_as_good_as_torch
from tests.kernels.racing import decided
from tests.test_group import Attention, K

N = 8 + 6 + 6  # outputs of q, k and v together


def adapted(cross=False, dropout=0.0, **settings):
    torch.manual_seed(0)
    config = peftkern.LoraConfig(
        r=3, target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=dropout,
        init_lora_weights=False, **settings,
    )  # fmt: skip
    return peftkern.get_peft_model(Attention(cross), config).eval()


def group_of(model):
    return model.base_model.model.q_proj._group


@pytest.fixture
def sizes(monkeypatch):
    """Sizes of the groups that are computed without gradients."""
    found, real = [], module.lora_group_infer
    monkeypatch.setattr(
        module,
        "lora_group_infer",
        lambda x, members: found.append(len(members)) or real(x, members),
    )
    return found


@pytest.fixture
def on_triton():
    with peftkern.use_backend("triton"):
        yield


def assert_right(model, x):
    """The model's output without gradients is as good as that of torch."""
    with torch.no_grad():
        y = model(x)
        with peftkern.use_backend("torch"):
            exact = copy.deepcopy(model).double()(x.double())
            plain = model(x)
    assert_as_good_as_torch(y, [plain, _by_parts(model, x)], exact)


def _by_parts(model, x):
    """The formula on padded rows, as tiles of a kernel sum it."""
    rows, inner = torch.nn.functional.pad(x.reshape(-1, K), (0, 0, 0, 16)), model.base_model.model
    other = rows * 1.5 if inner.cross else rows
    out = []
    for name in ("q_proj", "k_proj", "v_proj"):
        layer, z = getattr(inner, name), rows if name == "q_proj" else other
        low = z @ layer.lora_A["default"].weight.T * layer.scaling["default"]
        low = low @ layer.lora_B["default"].weight.T
        out.append(layer.base_layer(z) + low)
    return torch.cat(out, -1)[:-16].view(*x.shape[:-1], N)


def test_few_rows_are_one_operation_of_two_launches_at_most(on_triton, sizes, monkeypatch):
    launched, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: launched.append(self) or run(self))
    model = adapted(rank_pattern={"k_proj": 5})
    for shape in ((1, 1, K), (1, K), (3, 2, K), (16, K)):
        launched.clear()
        with torch.no_grad():
            model(torch.randn(shape))
        assert len(launched) <= 2
        assert_right(model, torch.randn(shape, generator=torch.manual_seed(1)))
    assert set(sizes) == {3} and len(sizes) == 8
    assert group_of(model)._local.__dict__["few"] is None  # nothing is kept
    reason = peftkern.explain(model)[0].reason
    assert (
        "trains as one operation with k_proj, v_proj, and decodes so with up to 16 rows" in reason
    )


def test_where_each_is_computed_alone(on_triton, sizes):
    model = adapted()
    with torch.no_grad():
        model(torch.randn(17, K))
    with torch.inference_mode():  # its tensors have no version
        model(torch.randn(1, K) * 1.0)
    model(torch.randn(1, K)).sum().backward()
    with torch.no_grad():
        model.train()(torch.randn(1, K))  # may be the first pass of a checkpoint
        with peftkern.use_backend("torch"):
            model.eval()(torch.randn(1, K))
            assert "decodes" not in peftkern.explain(model)[0].reason
    assert sizes == []
    with torch.no_grad():
        model(torch.randn(1, K))
    assert sizes == [3]


def test_inputs_that_differ_end_it_and_are_right_all_along(on_triton, sizes, caplog):
    caplog.set_level("INFO", logger="peftkern")
    model = adapted(cross=True)
    for seed in range(4):
        assert_right(model, torch.randn(2, K, generator=torch.manual_seed(seed)))
    group = group_of(model)
    assert group.apart and not group.off and len(sizes) <= 4
    assert caplog.text.count("q_proj, k_proj, v_proj do not decode as one operation") == 1
    assert group._local.__dict__["few"] is None
    assert "decodes" not in peftkern.explain(model)[0].reason


def test_an_exception_between_two_members_does_not_end_it(on_triton, sizes):
    model = adapted()
    inner, x = model.base_model.model, torch.randn(1, K)
    with torch.no_grad():
        for _ in range(3):
            inner.q_proj(x * 1.0)  # and then something raises
            model(x)
    assert not group_of(model).apart and len(sizes) == 6


@pytest.mark.parametrize("change", ["input", "weight", "scaling", "adapter"])
def test_a_change_between_two_members_is_seen(on_triton, change):
    model = adapted()
    model.add_adapter("b", peftkern.LoraConfig(
        r=3, target_modules=["q_proj", "k_proj"], init_lora_weights=False))  # fmt: skip
    inner, x = model.base_model.model, torch.randn(1, K)
    with torch.no_grad():
        q = inner.q_proj(x)
        before = inner.k_proj(x.clone())
        inner.q_proj(x)
        if change == "input":
            x.mul_(2)
        elif change == "weight":
            inner.k_proj.lora_B["default"].weight.mul_(3)
        elif change == "scaling":
            inner.k_proj.scaling["default"] = 7.0
        else:
            model.set_adapter("b")
        k = inner.k_proj(x)
        assert not torch.equal(k, before) and q.shape == (1, 8)
        group_of(model).off = True
        assert torch.equal(k, inner.k_proj(x))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_computes_as_before(on_triton, sizes, dropout):
    model, grads = adapted(dropout=dropout).train(), []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        z = torch.ones(4, K, requires_grad=True)
        inner = model.base_model.model
        y = (
            torch.utils.checkpoint.checkpoint(inner, z, use_reentrant=True)
            if checkpointed
            else inner(z)
        )
        y.sum().backward()  # its gradient is that of every Y: only the masks can make it differ
        grads.append(z.grad)
    assert torch.equal(*grads) and sizes == []


def test_autocast_reaches_the_group(on_triton, sizes):
    model, x = adapted(), torch.randn(2, K)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        group_of(model).off = True
        alone = model(x)
    assert sizes == [3] and y.dtype == torch.bfloat16
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
    assert_as_good_as_torch(y, [alone, _by_parts(model, x).bfloat16()], exact)


def test_what_the_kernels_do_not_take_runs_on_torch(on_triton, sizes):
    model, x = adapted().double(), torch.randn(1, K, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
        with peftkern.use_backend("torch"):
            assert torch.equal(y, model(x))
    assert sizes == [3]


# ------------------------------------------------------------------------------- the dispatcher


@pytest.fixture
def ways(monkeypatch):
    """(way, members) of every group that the dispatcher computes."""
    found, real = [], choices.infer_group
    monkeypatch.setattr(
        choices,
        "infer_group",
        lambda how, x, members: found.append((how, len(members))) or real(how, x, members),
    )
    return found


def test_a_group_is_raced_once_and_explained(clock, ways):
    clock.fastest, clock.in_graph = "hybrid", "decode"
    model = adapted()
    for _ in range(3):
        assert_right(model, torch.randn(1, K, generator=torch.manual_seed(0)))
    assert clock.races == 1
    assert {how for how, _ in ways} >= {"torch", *triton_backend.INFER}
    assert ways[-1] == ("hybrid", 3)
    decision = decided("infer", M=1, N=N, K=K, r=3, group=3)
    assert (decision.how, decision.in_graph) == ("hybrid", "decode")
    reason = peftkern.explain(model)[0].reason
    assert "infer of 3 M<=1 hybrid (in a graph decode) 2.00x torch" in reason


def test_a_capture_takes_the_way_for_graphs_or_torch(clock, ways, monkeypatch):
    clock.fastest, clock.in_graph = "hybrid", "decode"
    model, x, y = adapted(), torch.randn(1, K), torch.randn(5, K)
    with torch.no_grad():
        model(x)
        monkeypatch.setattr(device, "capturing", lambda x: True)
        model(x)
        assert ways[-1] == ("decode", 3)
        model(y)  # of such a shape nothing has run: a capture may load no kernel
        assert ways[-1] == ("torch", 3)
    assert clock.races == 1 and tuned.book(-1).provisional
