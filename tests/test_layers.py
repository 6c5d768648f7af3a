"""One layer under everything that is done to layers: nothing may be remembered from an earlier call.

Each change is made to a peftkern and to an HF PEFT model after both have run; what they compute, with
and without gradients, must stay equal. ``REASONS`` says which of them end the fused path, and why.
"""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import peftkern

K, N, R = 24, 16, 3
KINDS = {"linear": lambda: nn.Linear(K, N), "no_bias": lambda: nn.Linear(K, N, bias=False), "conv1d": lambda: Conv1D(N, K)}


def layer_pair(kind="linear", dropout=0.0, names=("default", "other"), dtype=torch.float32, **config):
    """Two models of one adapted layer, equal numbers in them; adapters ``names``, the first one active."""
    torch.manual_seed(0)
    base = nn.Sequential(KINDS[kind]()).to(dtype)
    nn.init.normal_(base[0].weight)
    settings = {"r": R, "lora_alpha": 6, "lora_dropout": dropout, "target_modules": ["0"], "init_lora_weights": False}
    settings.update(config, fan_in_fan_out=kind == "conv1d")
    models = []
    for library in (peftkern, peft):
        model = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(**settings), names[0])
        for name in names[1:]:
            model.add_adapter(name, library.LoraConfig(**settings))
        models.append(model)
    models[0].load_state_dict(models[1].state_dict())
    return models[0], models[1]


def layer_of(model):
    return model.base_model.model[0]


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


def assert_agree(ours, theirs, rows=5, strict=True):
    x = torch.randn(2, rows, K, generator=torch.Generator().manual_seed(1)).to(layer_of(theirs).weight.dtype)
    for train in (True, False):
        mine, other = (results(m.train(train), x) for m in (ours, theirs))
        if strict:
            assert mine.keys() == other.keys()
        for key, value in other.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    return mine


def _noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


class Twice(nn.Linear):
    """A linear layer with another forward."""

    def forward(self, x):
        return 2 * super().forward(x)


class Wrapped(nn.Module):
    """What FSDP1 puts around ``lora_A.default``: the weight is there only while this forward runs."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module
        self.whole = module.weight.detach().clone()

    @property
    def weight(self):
        return self.whole.flatten()[:4]

    def forward(self, x):
        return self._fsdp_wrapped_module(x)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def _base_on_meta(layer):
    """Offloading: the weight is elsewhere, and the patched forward brings it."""
    base = layer.base_layer
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    base.weight = nn.Parameter(base.weight.detach().to("meta"), requires_grad=False)
    base.forward = lambda x: F.linear(x, weight, bias)


def _subclass(layer):
    layer.base_layer.__class__ = Twice


def _a():
    a = nn.Linear(K, R, bias=False)
    a.weight.data = _noise(R, K)
    return a


def _swap_base(layer):
    layer.base_layer = nn.Linear(K, N)
    layer.base_layer.weight.data, layer.base_layer.bias.data = _noise(N, K), _noise(N)


def _other_rank(layer):
    layer.lora_A["default"].weight = nn.Parameter(_noise(R + 2, K))
    layer.lora_B["default"].weight = nn.Parameter(_noise(N, R + 2))


def _parametrise(layer):
    torch.nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", Doubled())


def _freeze_a(layer):
    layer.lora_A["default"].weight.requires_grad_(False)


CHANGES = {
    "nothing": lambda m: None,
    "base_data": lambda m: setattr(m.base_layer.weight, "data", _noise(N, K)),
    "a_data": lambda m: setattr(m.lora_A["default"].weight, "data", _noise(R, K)),
    "b_data": lambda m: setattr(m.lora_B["default"].weight, "data", _noise(N, R)),
    "bias_data": lambda m: setattr(m.base_layer.bias, "data", _noise(N)),
    "in_place": lambda m: m.lora_A["default"].weight.data.mul_(3),
    "new_parameter": lambda m: setattr(m.lora_B["default"], "weight", nn.Parameter(_noise(N, R))),
    "new_base_parameter": lambda m: setattr(m.base_layer, "weight", nn.Parameter(_noise(N, K))),
    "no_more_bias": lambda m: setattr(m.base_layer, "bias", None),
    "other_rank": _other_rank,
    "swap_a": lambda m: m.lora_A.update({"default": _a()}),
    "swap_base": _swap_base,
    "scaling": lambda m: m.scaling.update(default=7.5),
    "new_scaling": lambda m: setattr(m, "scaling", {**m.scaling, "default": 7.5}),
    "b_bias": lambda m: setattr(m.lora_B["default"], "bias", nn.Parameter(_noise(N))),
    "swap_a_dict": lambda m: setattr(m, "lora_A", nn.ModuleDict({**copy.deepcopy(m.lora_A), "default": _a()})),
    "swap_dropouts": lambda m: setattr(m, "lora_dropout", nn.ModuleDict({"default": nn.Dropout(0.7)})),
    "a_subclass": lambda m: setattr(m.lora_A["default"], "__class__", Twice),
    "trained_base": lambda m: m.base_layer.requires_grad_(True),
    "frozen_a": _freeze_a,
    "frozen": lambda m: m.requires_grad_(False),
    "double": lambda m: m.double(),
    "dropout_p": lambda m: m.lora_dropout.update({"default": nn.Dropout(0.7)}),
    "dropout_eval": lambda m: (m.lora_dropout.update({"default": nn.Dropout(0.7)}), m.lora_dropout.eval()),
    "dropout_all": lambda m: m.lora_dropout.update({"default": nn.Dropout(1.0)}),
    "dropout_other": lambda m: m.lora_dropout.update({"default": Doubled()}),
    "dropout_patched": lambda m: setattr(m.lora_dropout["default"], "forward", lambda x: 3 * x),
    "dropout_hook": lambda m: m.lora_dropout["default"].register_forward_hook(lambda *a: 2 * a[-1]),
    "base_hook": lambda m: m.base_layer.register_forward_hook(lambda *a: a[-1] + 1),
    "base_pre_hook": lambda m: m.base_layer.register_forward_pre_hook(lambda _, a: (2 * a[0],)),
    "base_backward_hook": lambda m: m.base_layer.register_full_backward_hook(lambda _, gi, go: (2 * gi[0],)),
    "a_hook": lambda m: m.lora_A["default"].register_forward_hook(lambda *a: 2 * a[-1]),
    "b_pre_hook": lambda m: m.lora_B["default"].register_forward_pre_hook(lambda _, a: (a[0] + 1,)),
    "patched_forward": lambda m: setattr(m.base_layer, "forward", lambda x: x[..., :N] * 3),
    "patched_a": lambda m: setattr(m.lora_A["default"], "forward", lambda x: x[..., :R] * 3),
    "subclass": _subclass,
    "parametrised": _parametrise,
    "offloaded": _base_on_meta,
    "fsdp1": lambda m: m.lora_A.update({"default": Wrapped(m.lora_A["default"])}),
    "weight_is_buffer": lambda m: (delattr(m.base_layer, "weight"), m.base_layer.register_buffer("weight", _noise(N, K))),
    "disabled": lambda m: m.enable_adapters(False),
    "other_active": lambda m: m.set_adapter("other"),
    "both_active": lambda m: m.set_adapter(["default", "other"]),
    "none_active": lambda m: m.set_adapter([]),
    "deleted": lambda m: m.delete_adapter("default"),
    "own_hook": lambda m: m.register_forward_hook(lambda *a: a[-1] * 2),
}

# the changes after which a call is not fused, and a part of what explain() says
REASONS = {
    "b_bias": "lora_bias", "a_subclass": "lora_A", "dropout_patched": "lora_dropout",
    "dropout_other": "dropout is a Doubled", "dropout_hook": "lora_dropout has hooks",
    "base_hook": "base layer has hooks", "base_pre_hook": "base layer has hooks",
    "base_backward_hook": "base layer has hooks", "a_hook": "lora_A has hooks", "b_pre_hook": "lora_B has hooks",
    "patched_forward": "overridden forward", "patched_a": "overridden forward",
    "subclass": "Twice", "parametrised": "not a plain Parameter", "offloaded": "base layer has", "fsdp1": "lora_A",
    "weight_is_buffer": "not a plain Parameter",
    "disabled": "disabled", "both_active": "several adapters are active: default, other",
    "none_active": "no active adapter",
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_remembered(change):
    ours, theirs = layer_pair(dropout=0.3 if change in ("nothing", "dropout_hook", "dropout_patched") else 0.0)
    before = assert_agree(ours, theirs)
    for model in (ours, theirs):
        CHANGES[change](layer_of(model))
    # a trained base weight gets its gradient from both; PEFT alone trains nothing when all is frozen
    after = assert_agree(ours, theirs)
    if change not in ("nothing", "trained_base", "frozen_a", "frozen", "double", "offloaded", "fsdp1", "dropout_eval",
                      "dropout_p", "dropout_all", "dropout_hook", "swap_dropouts"):  # fmt: skip
        same = after["again"].shape == before["again"].shape and torch.allclose(after["again"], before["again"])
        assert not same or change == "base_backward_hook", "the change changed nothing, so it proves nothing"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 40])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layouts_and_row_counts(kind, rows, dropout):
    ours, theirs = layer_pair(kind, dropout)
    assert_agree(ours, theirs, rows)
    one = torch.randn(K)
    torch.testing.assert_close(ours.eval()(one), theirs.eval()(one))
    assert ours(one).shape == (N,)


def test_a_global_hook_sees_the_inner_modules():
    ours, _ = layer_pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *rest: seen.append(type(module)))
    try:
        ours(torch.ones(1, K))
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 3
    handle = nn.modules.module.register_module_full_backward_hook(lambda module, *rest: seen.append(type(module)))
    seen.clear()
    try:
        ours(torch.ones(1, K)).sum().backward()
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 3
    seen.clear()
    ours(torch.ones(1, K)).sum().backward()
    assert not seen


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_copies_are_independent(kind):
    """deepcopy and pickle give a model that computes with its own weights."""
    ours, theirs = layer_pair(kind)
    assert_agree(ours, theirs)
    x = torch.randn(3, K)
    expected = ours.eval()(x)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(twin.eval()(x), expected)
        with torch.no_grad():
            layer_of(twin).lora_B["default"].weight.zero_()
            layer_of(twin).scaling["default"] = 100.0
        assert not torch.allclose(twin(x), expected)
        torch.testing.assert_close(ours(x), expected)
    with torch.no_grad():  # and the original with its own
        layer_of(ours).lora_B["default"].weight.zero_()
    twin = copy.deepcopy(ours)
    layer_of(ours).base_layer.weight.data.zero_()
    assert not torch.allclose(twin(x), ours(x))


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("kind", KINDS)
def test_backward_keeps_no_dropped_x_and_no_mask(kind, p):
    """Through the module: what autograd holds beyond x and the weights is S and the bits."""
    ours, theirs = layer_pair(kind, p)
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
    x, out = torch.randn(5, K), []
    for model in (ours.eval(), theirs.eval()):
        model(x)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        torch.manual_seed(2)
        with torch.no_grad():
            out.append(model(x))
    torch.testing.assert_close(*out)


def test_mixed_batch_checks_its_names():
    ours, _ = layer_pair()
    x = torch.randn(3, K)
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
            x = torch.randn(4, K)
            expected = results(theirs, x)
            if alone:
                for part in (layer_of(ours).lora_A["default"], layer_of(ours).lora_B["default"]):
                    fully_shard(part, mesh=mesh)
            fully_shard(layer_of(ours), mesh=mesh)
            got = results(ours, x)
            assert got.keys() == expected.keys()
            for key, value in expected.items():
                mine = got[key].full_tensor() if hasattr(got[key], "full_tensor") else got[key]
                torch.testing.assert_close(mine, value, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
            if alone:  # otherwise the block's hooks bring plain weights before this layer runs
                assert "DTensor" in peftkern.explain(ours)[0].reason
    finally:
        dist.destroy_process_group()
