"""Changes that users' code makes to layers, applied to a peftkern and to an HF PEFT layer."""

from __future__ import annotations

import copy

import peft
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import peftkern

K, N, R = 24, 16, 3
KINDS = {
    "linear": lambda: nn.Linear(K, N),
    "no_bias": lambda: nn.Linear(K, N, bias=False),
    "conv1d": lambda: Conv1D(N, K),
}


def layer_pair(
    kind="linear", dropout=0.0, names=("default", "other"), dtype=torch.float32, **config
):
    """(ours, theirs): one adapted layer, equal numbers, adapters ``names``, the first active."""
    torch.manual_seed(0)
    base = nn.Sequential(KINDS[kind]()).to(dtype)
    nn.init.normal_(base[0].weight)
    settings = {
        "r": R,
        "lora_alpha": 6,
        "lora_dropout": dropout,
        "target_modules": ["0"],
        "init_lora_weights": False,
    }
    settings.update(config, fan_in_fan_out=kind == "conv1d")
    models = []
    for library in (peftkern, peft):
        model = library.get_peft_model(
            copy.deepcopy(base), library.LoraConfig(**settings), names[0]
        )
        for name in names[1:]:
            model.add_adapter(name, library.LoraConfig(**settings))
        models.append(model)
    models[0].load_state_dict(models[1].state_dict())
    return models[0], models[1]


def layer_of(model):
    return model.base_model.model[0]


def _noise(layer, *shape):
    """The same numbers in the dtype of the layer."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    return noise.to(next(layer.parameters()).dtype)


class Twice(nn.Linear):
    """A linear layer with another forward."""

    def forward(self, x):
        return 2 * super().forward(x)


class Wrapped(nn.Module):
    """FSDP1's wrapper of ``lora_A.default``: the weight is a shard except within its forward."""

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


def _a(layer):
    a = nn.Linear(K, R, bias=False)
    a.weight.data = _noise(layer, R, K)
    return a


def _swap_base(layer):
    weight, bias = _noise(layer, N, K), _noise(layer, N)
    layer.base_layer = nn.Linear(K, N)
    layer.base_layer.weight.data, layer.base_layer.bias.data = weight, bias


def _other_rank(layer):
    layer.lora_A["default"].weight = nn.Parameter(_noise(layer, R + 2, K))
    layer.lora_B["default"].weight = nn.Parameter(_noise(layer, N, R + 2))


def _parametrise(layer):
    torch.nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", Doubled())


def _freeze_a(layer):
    layer.lora_A["default"].weight.requires_grad_(False)


CHANGES = {
    "nothing": lambda m: None,
    "base_data": lambda m: setattr(m.base_layer.weight, "data", _noise(m, N, K)),
    "a_data": lambda m: setattr(m.lora_A["default"].weight, "data", _noise(m, R, K)),
    "b_data": lambda m: setattr(m.lora_B["default"].weight, "data", _noise(m, N, R)),
    "bias_data": lambda m: setattr(m.base_layer.bias, "data", _noise(m, N)),
    "in_place": lambda m: m.lora_A["default"].weight.data.mul_(3),
    "new_parameter": lambda m: setattr(
        m.lora_B["default"], "weight", nn.Parameter(_noise(m, N, R))
    ),
    "new_base_parameter": lambda m: setattr(m.base_layer, "weight", nn.Parameter(_noise(m, N, K))),
    "no_more_bias": lambda m: setattr(m.base_layer, "bias", None),
    "other_rank": _other_rank,
    "swap_a": lambda m: m.lora_A.update({"default": _a(m)}),
    "swap_base": _swap_base,
    "scaling": lambda m: m.scaling.update(default=7.5),
    "new_scaling": lambda m: setattr(m, "scaling", {**m.scaling, "default": 7.5}),
    "b_bias": lambda m: setattr(m.lora_B["default"], "bias", nn.Parameter(_noise(m, N))),
    "swap_a_dict": lambda m: setattr(
        m, "lora_A", nn.ModuleDict({**copy.deepcopy(m.lora_A), "default": _a(m)})
    ),
    "swap_dropouts": lambda m: setattr(
        m, "lora_dropout", nn.ModuleDict({"default": nn.Dropout(0.7)})
    ),
    "a_subclass": lambda m: setattr(m.lora_A["default"], "__class__", Twice),
    "trained_base": lambda m: m.base_layer.requires_grad_(True),
    "frozen_a": _freeze_a,
    "frozen": lambda m: m.requires_grad_(False),
    "double": lambda m: m.double(),
    "dropout_p": lambda m: m.lora_dropout.update({"default": nn.Dropout(0.7)}),
    "dropout_eval": lambda m: (
        m.lora_dropout.update({"default": nn.Dropout(0.7)}),
        m.lora_dropout.eval(),
    ),
    "dropout_all": lambda m: m.lora_dropout.update({"default": nn.Dropout(1.0)}),
    "dropout_other": lambda m: m.lora_dropout.update({"default": Doubled()}),
    "dropout_patched": lambda m: setattr(m.lora_dropout["default"], "forward", lambda x: 3 * x),
    "dropout_hook": lambda m: m.lora_dropout["default"].register_forward_hook(lambda *a: 2 * a[-1]),
    "base_hook": lambda m: m.base_layer.register_forward_hook(lambda *a: a[-1] + 1),
    "base_pre_hook": lambda m: m.base_layer.register_forward_pre_hook(lambda _, a: (2 * a[0],)),
    "base_backward_hook": lambda m: m.base_layer.register_full_backward_hook(
        lambda _, gi, go: (2 * gi[0],)
    ),
    "a_hook": lambda m: m.lora_A["default"].register_forward_hook(lambda *a: 2 * a[-1]),
    "b_pre_hook": lambda m: m.lora_B["default"].register_forward_pre_hook(lambda _, a: (a[0] + 1,)),
    "patched_forward": lambda m: setattr(m.base_layer, "forward", lambda x: x[..., :N] * 3),
    "patched_a": lambda m: setattr(m.lora_A["default"], "forward", lambda x: x[..., :R] * 3),
    "subclass": _subclass,
    "parametrised": _parametrise,
    "offloaded": _base_on_meta,
    "fsdp1": lambda m: m.lora_A.update({"default": Wrapped(m.lora_A["default"])}),
    "weight_is_buffer": lambda m: (
        delattr(m.base_layer, "weight"),
        m.base_layer.register_buffer("weight", _noise(m, N, K)),
    ),
    "disabled": lambda m: m.enable_adapters(False),
    "other_active": lambda m: m.set_adapter("other"),
    "both_active": lambda m: m.set_adapter(["default", "other"]),
    "none_active": lambda m: m.set_adapter([]),
    "deleted": lambda m: m.delete_adapter("default"),
    "own_hook": lambda m: m.register_forward_hook(lambda *a: a[-1] * 2),
}

# the changes after which a call is not fused, and a part of what explain() says
REASONS = {
    "b_bias": "lora_bias",
    "a_subclass": "lora_A",
    "dropout_patched": "lora_dropout",
    "dropout_other": "dropout is a Doubled",
    "dropout_hook": "lora_dropout has hooks",
    "base_hook": "base layer has hooks",
    "base_pre_hook": "base layer has hooks",
    "base_backward_hook": "base layer has hooks",
    "a_hook": "lora_A has hooks",
    "b_pre_hook": "lora_B has hooks",
    "patched_forward": "overridden forward",
    "patched_a": "overridden forward",
    "subclass": "Twice",
    "parametrised": "not a plain Parameter",
    "offloaded": "base layer has",
    "fsdp1": "lora_A",
    "weight_is_buffer": "not a plain Parameter",
    "disabled": "disabled",
    "both_active": "several adapters are active: default, other",
    "none_active": "no active adapter",
}
