"""Quantised bases where none is fused: torch.compile, torch.func, forward-mode AD; bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import peftkern
from peftkern.ops.bases.fp8_linear import Fp8Linear
from tests.closeness import assert_as_good_as_torch
from tests.quantised_models import bnb4, bnb8, copied, dense
from tests.quantised_models import quanto as quanto_of

bitsandbytes = pytest.importorskip("bitsandbytes")


def torchao8(linear: nn.Linear) -> Any:
    torchao = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(linear)
    torchao.quantize_(holder, torchao.Int8WeightOnlyConfig())
    return holder[0]


def quanto(bits: str) -> Callable[[nn.Linear], Any]:
    def quantised(linear: nn.Linear) -> Any:
        owner = quanto_of()
        holder = nn.Sequential(linear)
        owner.quantize(holder, weights=getattr(owner, f"q{bits}"))
        owner.freeze(holder)
        return holder[0]

    return quantised


FORMATS: dict[str, Callable[[nn.Linear], Any]] = {
    "nf4": bnb4,
    "int8": bnb8,
    "fp8": Fp8Linear,
    "torchao": torchao8,
    "quanto8": quanto("int8"),
    "quanto4": quanto("int4"),
}


def models(make: Callable[[nn.Linear], Any], **settings: Any) -> tuple[Any, Any, Any]:
    """(ours on the format, on dense weights, and that in float64), with the same adapters."""
    base = nn.Sequential(make(nn.Linear(64, 48))).requires_grad_(False)
    more: Any = dict(r=4, target_modules=["0"], init_lora_weights=False, **settings)
    ours = peftkern.get_peft_model(copied(base), peftkern.LoraConfig(**more))
    exact = peft.get_peft_model(dense(base), peft.LoraConfig(**more)).double()
    held = {k: v for k, v in ours.state_dict().items() if "lora_" in k}
    assert not exact.load_state_dict(held, strict=False).unexpected_keys
    return ours, copy.deepcopy(exact).float(), exact


def grad_x(model: Any, x: Tensor) -> Tensor:
    found: Tensor = torch.func.grad(lambda given: model(given).pow(2).sum())(x)
    return found


def grads_of_samples(model: Any, x: Tensor) -> Tensor:
    name, value = next((n, p.detach()) for n, p in model.named_parameters() if "lora_A" in n)

    def loss(given: Tensor, sample: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, {name: given}, (sample[None],))
        return out.pow(2).sum()

    found: Tensor = torch.func.vmap(torch.func.grad(loss), (None, 0))(value, x)
    return found


def tangent(model: Any, x: Tensor) -> Tensor:
    found: Tensor = torch.func.jvp(model, (x,), (x.cos(),))[1]
    return found


def dual(model: Any, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos()))).tangent
        assert found is not None
        return found.clone()


def without_adapter(model: Any, x: Tensor) -> Tensor:
    with model.disable_adapter():
        return grad_x(model, x)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("transform", [grad_x, grads_of_samples, tangent, dual, without_adapter])
@pytest.mark.parametrize("name", FORMATS)
def test_transforms_see_the_weight_as_numbers(
    name: str, transform: Callable[[Any, Tensor], Tensor], use_dora: bool
) -> None:
    found = models(FORMATS[name], use_dora=use_dora)
    x = torch.randn(5, 64)
    given = (x, x, x.double())
    results = [transform(m.train(), g).detach() for m, g in zip(found, given, strict=True)]
    assert_as_good_as_torch(*results, average=True)


def test_an_unadapted_fp8_layer_takes_transforms() -> None:
    layer = Fp8Linear(nn.Linear(64, 48).requires_grad_(False))
    single = dense(nn.Sequential(layer))
    x = torch.randn(5, 64)
    for transform in (grad_x, tangent, dual):
        results = (
            transform(layer, x),
            transform(single.float(), x),
            transform(single.double(), x.double()),
        )
        assert_as_good_as_torch(*results, average=True)


@pytest.mark.parametrize("name", FORMATS)
def test_a_compiler_gets_one_graph(name: str) -> None:
    torch.compiler.reset()
    ours, single, exact = models(FORMATS[name])
    assert peftkern.explain(ours)[0].compiled == "plain formula (the base weight is quantised)"
    compiled = torch.compile(ours.train(), fullgraph=True, backend="aot_eager")
    results = []
    x = torch.randn(5, 64)
    for model, run, given in ((ours, compiled, x), (single, single, x), (exact, exact, x.double())):
        y = run(given)
        y.pow(2).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), **grads})
    assert len(results[0]) == 3
    assert_as_good_as_torch(*results, average=True)


# torch hides it, but for runs in which warnings are errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", ["nf4", "fp8"])
def test_dora_under_a_compiler_reads_the_weight_between_graphs(name: str) -> None:
    torch.compiler.reset()
    ours, single, exact = models(FORMATS[name], use_dora=True)
    assert "between graphs" in peftkern.explain(ours)[0].compiled
    compiled = torch.compile(ours.train(), backend="aot_eager")
    x = torch.randn(5, 64)
    y = compiled(x)
    assert_as_good_as_torch(
        y.detach(), single(x).detach(), exact(x.double()).detach(), average=True
    )


@pytest.mark.parametrize("name", FORMATS)
def test_an_x_of_integers_is_an_error_that_names_its_dtype(name: str) -> None:
    ours, _, _ = models(FORMATS[name])
    x = torch.arange(128).view(2, 64)
    with pytest.raises(ValueError, match="floating-point dtype, given torch.int64"):
        ours(x)
    with ours.disable_adapter(), pytest.raises(ValueError, match=r"given torch\.int64"):
        ours(x)


def test_an_fp8_layer_without_its_scales_says_so() -> None:
    ours, _, _ = models(Fp8Linear)
    ours.base_model.model[0].base_layer.weight_scale_inv = None
    assert "no scales" in peftkern.explain(ours)[0].reason
    with pytest.raises(RuntimeError, match="no scales"):
        ours(torch.randn(2, 64))
