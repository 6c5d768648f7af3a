"""Changes to a layer after calls: it may not remember anything from an earlier call.

Each change of changes.py is made to a peftkern and to an HF PEFT model after both have run; their
results, with and without gradients, must stay equal.
"""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn

import peftkern
from tests import changes
from tests.changes import CHANGES, KINDS, K, N, R, layer_of
from tests.closeness import assert_as_good_as_torch, assert_same_number, differ

ONE = torch.ones(1, K, dtype=torch.float64)


def layer_pair(*args, dtype=torch.float64, **settings):
    return changes.layer_pair(*args, dtype=dtype, **settings)


def results(model, x, seed=0):
    """Y and the gradients of X and of all trained parameters; then Y again without a graph."""
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    y = model(x)
    out = {"y": y.detach()}
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    out["x"] = x.grad
    out.update((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    with torch.no_grad():
        torch.manual_seed(seed)
        out["again"] = model(x)
    return out


def assert_agree(ours, theirs, rows=5):
    x = torch.randn(2, rows, K, generator=torch.Generator().manual_seed(1)).to(
        layer_of(theirs).weight.dtype
    )
    for train in (True, False):
        mine, other = (results(m.train(train), x) for m in (ours, theirs))
        assert_same_number(mine, other)
    return mine


def what_is_said(change):
    """Deleting the active adapter is said."""
    if change != "deleted":
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match="Adapter default was active which is now deleted")


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_remembered(change):
    ours, theirs = layer_pair(
        dropout=0.3 if change in ("nothing", "dropout_hook", "dropout_patched") else 0.0,
        dtype=torch.float32 if change == "double" else torch.float64,
    )
    if change == "double":
        before = results(ours, torch.ones(2, 5, K))
    else:
        before = assert_agree(ours, theirs)
    for model in (ours, theirs):
        with what_is_said(change):
            CHANGES[change](layer_of(model))
    after = assert_agree(ours, theirs)
    if change not in (
        "nothing",
        "trained_base",
        "frozen_a",
        "frozen",
        "double",
        "offloaded",
        "fsdp1",
        "dropout_eval",
        "dropout_p",
        "dropout_all",
        "dropout_hook",
        "swap_dropouts",
    ):
        assert differ(after["again"], before["again"]) or change == "base_backward_hook", (
            "the change changed nothing, so it proves nothing"
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 40])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layouts_and_row_counts(kind, rows, dropout):
    ours, theirs = layer_pair(kind, dropout)
    assert_agree(ours, theirs, rows)
    one = torch.randn(K, dtype=torch.float64)
    assert_same_number(ours.eval()(one), theirs.eval()(one))
    assert ours(one).shape == (N,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_other_dtypes_are_as_good_as_pefts(kind, dropout, dtype):
    ours, theirs = layer_pair(kind, dropout, dtype=dtype)
    exact = copy.deepcopy(theirs).double()
    assert peftkern.explain(ours)[0].fused
    x = torch.randn(4, 64, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = [results(m, x.to(layer_of(m).weight.dtype)) for m in (ours, theirs, exact)]
    assert {k: v.dtype for k, v in found[0].items()} == {k: v.dtype for k, v in found[1].items()}
    for key in found[2]:
        assert_as_good_as_torch(*({key: f[key]} for f in found))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, K), (2, 5, K), (K,)], ids=str)
def test_the_output_may_be_changed_in_place(kind, shape):
    """As `hidden += residual` and inplace activations do; x is not the output's storage."""
    ours, theirs = layer_pair(kind, dropout=0.3)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    grads = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        y = model(x)
        y += x[..., :N]
        y.relu_()
        grads.append(
            torch.autograd.grad(y.square().sum(), [x, layer_of(model).lora_A["default"].weight])
        )
    assert_same_number(*grads)


def test_a_global_hook_sees_the_inner_modules():
    ours, _ = layer_pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *rest: seen.append(type(module))
    )
    try:
        ours(ONE)
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 3
    handle = nn.modules.module.register_module_full_backward_hook(
        lambda module, *rest: seen.append(type(module))
    )
    seen.clear()
    try:
        ours(ONE.clone().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 3
    seen.clear()
    ours(ONE).sum().backward()
    assert not seen


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_copies_are_independent(kind):
    """deepcopy and pickle give a model that computes with its own weights."""
    ours, theirs = layer_pair(kind)
    assert_agree(ours, theirs)
    x = torch.randn(3, K, dtype=torch.float64)
    expected = ours.eval()(x)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin.eval()(x), expected)
        with torch.no_grad():
            layer_of(twin).lora_B["default"].weight.zero_()
            layer_of(twin).scaling["default"] = 100.0
        assert differ(twin(x), expected)
        assert torch.equal(ours(x), expected)
    with torch.no_grad():  # and the original with its own
        layer_of(ours).lora_B["default"].weight.zero_()
    twin = copy.deepcopy(ours)
    layer_of(ours).base_layer.weight.data.zero_()
    assert differ(twin(x), ours(x))


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("kind", KINDS)
def test_backward_keeps_no_dropped_x_and_no_mask(kind, p):
    """Through the module: what autograd holds beyond x and the weights is S and the bits."""
    ours, theirs = layer_pair(kind, p, dtype=torch.float32)
    x = torch.randn(64, K).requires_grad_()

    def held(model):
        own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
        kept = {}

        def keep(t):
            if t.untyped_storage().data_ptr() not in own:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model.train()(x)
        return sum(kept.values())

    assert held(ours) == 64 * R * 4 + (64 * 4 if p else 0)
    if p:
        assert held(theirs) > 64 * K * 4


def test_dropout_alone_in_training_mode():
    """Monte Carlo dropout: the model is in evaluation mode but for its dropout modules."""
    ours, theirs = layer_pair(dropout=0.5)
    x, out = torch.randn(5, K, dtype=torch.float64), []
    for model in (ours.eval(), theirs.eval()):
        model(x)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        torch.manual_seed(2)
        with torch.no_grad():
            out.append(model(x))
    assert_same_number(*out)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_compiles_to_one_graph(kind):
    """torch.compile(fullgraph=True), in training mode with dropout, gives the same gradients."""
    ours, _ = layer_pair(kind, dropout=0.3)
    x = torch.randn(5, K, dtype=torch.float64)
    expected = results(ours.train(), x)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    got = {k.removeprefix("_orig_mod."): v for k, v in results(compiled, x).items()}
    assert_same_number(got, expected)


def test_mixed_batch_checks_its_names():
    ours, _ = layer_pair()
    x = torch.randn(3, K, dtype=torch.float64)
    ours.eval()
    with pytest.raises(ValueError, match="2 and 3"):
        ours(x, adapter_names=["default", "other"])
    with pytest.raises(ValueError, match="nobody"):
        ours(x, adapter_names=["default", "other", "nobody"])
    ours.train()
    with pytest.raises(ValueError, match="training mode"):
        ours(x, adapter_names=["default"] * 3)


def test_sharded_by_fsdp2(tmp_path):
    """Real fully_shard on one process: the group of a block, and each adapter matrix by itself."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for alone in (False, True):
            ours, theirs = layer_pair(dropout=0.2)
            x = torch.randn(4, K, dtype=torch.float64)
            expected = results(theirs, x)
            if alone:
                for part in (layer_of(ours).lora_A["default"], layer_of(ours).lora_B["default"]):
                    fully_shard(part, mesh=mesh)
            fully_shard(layer_of(ours), mesh=mesh)
            got = results(ours, x)
            whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in got.items()}
            assert_same_number(whole, expected)
            if alone:  # otherwise the block's hooks bring plain weights before this layer runs
                assert "lora_A is a FSDPLinear" in peftkern.explain(ours)[0].reason
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("grad", [True, False])
def test_a_model_without_data_goes_through_and_a_mixed_device_is_named(grad):
    """On meta, which knows no autocast: shapes come out; a lone meta input is torch's own error."""
    model, _ = layer_pair()
    x = torch.ones(2, 5, K, device="meta")
    with torch.set_grad_enabled(grad):
        with pytest.raises(RuntimeError, match="meta"):
            model(x)
        model.to("meta")
        assert model(x).shape == (2, 5, N)


def test_a_reason_that_comes_back_is_noted_again(caplog):
    from types import SimpleNamespace

    from peftkern.ops.notes import note_new

    layer = SimpleNamespace()
    with caplog.at_level("INFO", logger="peftkern"):
        for reason in ("merged", "merged", None, "merged"):
            note_new(layer, "_noted", reason, "a %s layer is not fused: %s")
    assert len(caplog.records) == 2
