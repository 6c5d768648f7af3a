"""Layers of bitsandbytes in 4 bit: read in their format, equal to HF PEFT's, never called."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern.ops.bases import bnb4 as bnb4_file
from peftkern.ops.bases import bnb4_cpu, bnb4_kernel
from peftkern.ops.bases.formats import as_weight, read
from peftkern.utils.private import bnb4_gemv
from tests.closeness import assert_as_good_as_torch
from tests.quantised_models import adapted, assert_steps_are_equal, bnb4, llama

bitsandbytes: Any = pytest.importorskip("bitsandbytes")
functional: Any = pytest.importorskip("bitsandbytes.functional")


def owners(layer: Any) -> Tensor:
    """The weight as bitsandbytes dequantises it, float32, without compiling."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as compute

    weight, state = layer.weight.data, layer.weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    bits = weight.view(torch.uint8).reshape(-1)
    formula = compute.__wrapped__
    made: Tensor = formula(bits, absmax, state.code, state.blocksize, state.shape, torch.float32)
    return made


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("N", "K", "blocksize"),
    [(48, 64, None), (256, 128, 64), (40, 72, 128), (48, 128, 2048), (9, 37, 64), (32, 64, 32)],
)
def test_a_weight_is_read_as_its_owner_reads_it(
    kind: str, nested: bool, N: int, K: int, blocksize: int | None
) -> None:
    how = dict(quant_type=kind, compress_statistics=nested)
    layer = bnb4(nn.Linear(K, N), blocksize, **how)
    found = read(layer)
    assert not isinstance(found, str) and found.bias is layer.bias
    owner = owners(layer)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(found.packed.dense(dtype), owner.to(dtype))
    assert torch.equal(found.packed.dense(torch.float64), owner.double())
    x = torch.randn(5, K)
    w = as_weight(found.packed, x)
    assert w.shape == (N, K) and w.t().shape == (K, N)
    assert torch.equal(w.t().product(x), x @ owner.t())
    assert torch.equal(w.product(x @ owner.t()), x @ owner.t() @ owner)
    assert torch.equal(x @ w.t(), x @ owner.t())  # an operation that knows nothing of it
    with pytest.raises(TypeError, match="frozen NF4|frozen FP4"):
        w.zero_()


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16, torch.float32, None])
def test_storage_and_compute_dtypes(storage: torch.dtype, compute: torch.dtype | None) -> None:
    linear = nn.Linear(64, 48)
    layer = bnb4(linear, quant_type="nf4", quant_storage=storage, compute_dtype=compute)
    assert layer.weight.dtype == storage
    x = torch.randn(3, 5, 64)
    given: Any = {"r": 2, "target_modules": ["0"], "init_lora_weights": True}
    model = peftkern.get_peft_model(nn.Sequential(layer), peftkern.LoraConfig(**given))
    assert all(row.fused for row in peftkern.explain(model))
    ours = model(x)  # B is zero, so that this is the layer's own output
    weight = owners(layer).double()
    exact = x.double() @ weight.t() + layer.bias.double()
    theirs = layer.train()(x.requires_grad_())  # casts its bias for good
    assert ours.dtype == theirs.dtype == torch.float32
    if compute in (torch.float32, None):
        assert_as_good_as_torch(ours, theirs, exact)
    else:
        narrow = (x.to(compute) @ weight.to(compute).t()).float() + linear.bias.float()
        assert_as_good_as_torch(ours, [theirs, narrow], exact)


def test_a_bias_of_another_dtype_is_not_changed() -> None:
    layer = bnb4(nn.Linear(64, 48), quant_type="nf4", compute_dtype=torch.bfloat16)
    layer.bias = nn.Parameter(layer.bias.bfloat16(), requires_grad=False)
    model = peftkern.get_peft_model(
        nn.Sequential(layer), peftkern.LoraConfig(r=2, target_modules=["0"])
    )
    x = torch.randn(5, 64)
    for mode in (True, False):
        y = model.train(mode)(x)
        exact = x.double() @ owners(layer).double().t() + layer.bias.double()
        narrow = (x.bfloat16() @ owners(layer).bfloat16().t()).float() + layer.bias
        assert_as_good_as_torch(y, narrow, exact)
    assert layer.bias.dtype == torch.bfloat16


def test_statistics_are_found_in_the_layer_after_fsdp_took_the_weights_class() -> None:
    layer = bnb4(nn.Linear(64, 48), quant_type="nf4")
    before = read(layer)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    found = read(layer)
    assert not isinstance(found, str) and not isinstance(before, str)
    assert torch.equal(found.packed.dense(torch.float32), before.packed.dense(torch.float32))
    gathered = layer.weight.data
    del layer._parameters["weight"]
    layer.__dict__["weight"] = gathered
    found = read(layer)
    assert not isinstance(found, str)
    assert torch.equal(found.packed.dense(torch.float32), before.packed.dense(torch.float32))


def test_a_weight_that_was_quantised_from_its_transpose() -> None:
    linear = nn.Linear(64, 48)
    other = bnb4(nn.Linear(48, 64), quant_type="nf4")  # its packed weight is [64, 48] = [K, N]
    layer = bnb4(linear, quant_type="nf4")
    layer.weight, layer.quant_state = other.weight, other.weight.quant_state
    found = read(layer)
    assert not isinstance(found, str) and found.packed.shape == (48, 64)
    x = torch.randn(5, 64)
    with pytest.warns(DeprecationWarning, match=r"quantized from a \[K, N\] tensor"):
        theirs = layer.train()(x)
    y = as_weight(found.packed, x).t().product(x) + layer.bias
    assert_as_good_as_torch(y, theirs, x.double() @ owners(other).double() + layer.bias.double())


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}, {"use_dora": True}], ids=str)
def test_logits_and_gradients_equal_hf_pefts(settings: dict[str, Any]) -> None:
    models = adapted(llama(quant_type="nf4"), **settings)
    rows = peftkern.explain(models[0])
    assert all(row.fused for row in rows), rows
    assert_steps_are_equal(*models, settings)


def conversion(layer: Any) -> Any:
    """The layer as an eval forward of its owner leaves it on CPUs with AVX512-BF16."""
    layer = copy.deepcopy(layer)
    weight, state = layer.weight, layer.weight.quant_state
    data, layer.weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, state)
    weight.data = data
    layer.quant_state = state
    return layer


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_repacked_weight_is_read(nested: bool, storage: torch.dtype) -> None:
    layer = bnb4(
        nn.Linear(128, 96), quant_type="nf4", compress_statistics=nested, quant_storage=storage
    )
    usual = read(layer)
    assert not isinstance(usual, str)
    theirs = conversion(layer)
    bits = bnb4_cpu.repack(layer.weight.data, 96, 128)
    assert torch.equal(bits, theirs.weight.data)
    assert torch.equal(
        bnb4_cpu.repacked_bits(bits).view(-1), layer.weight.data.view(torch.uint8).view(-1)
    )
    found = read(theirs)
    assert not isinstance(found, str) and "repacked" in found.packed.format
    # the same numbers but for scales in bfloat16
    scales = usual.packed.absmax()  # type: ignore[attr-defined]
    units = owners(layer) / scales.repeat_interleave(64).view(96, 128)
    exact = units * scales.bfloat16().float().repeat_interleave(64).view(96, 128)
    torch.testing.assert_close(found.packed.dense(torch.float32), exact)
    model = peftkern.get_peft_model(
        nn.Sequential(theirs), peftkern.LoraConfig(r=2, target_modules=["0"])
    )
    x = torch.randn(3, 128, requires_grad=True)
    model(x).sum().backward()  # HF PEFT gets no gradient for x here
    assert_as_good_as_torch(
        x.grad, torch.ones(3, 96) @ exact, torch.ones(3, 96).double() @ exact.double()
    )


@pytest.fixture
def never_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        raise AssertionError("bitsandbytes' own forward was called, which may repack the weight")

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", forward)


@pytest.mark.parametrize("nested", [False, True])
def test_no_call_repacks_a_weight(never_called: None, nested: bool) -> None:
    base = llama(quant_type="nf4", compress_statistics=nested)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    config = peftkern.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peftkern.get_peft_model(base, config).eval()
    x = torch.randint(3, 64, (2, 6))
    mask = torch.ones_like(x)
    logits = model(x).logits
    model.generate(input_ids=x, attention_mask=mask, max_new_tokens=3, do_sample=False)
    with model.disable_adapter(), torch.no_grad():
        assert not torch.equal(model(x).logits, logits)
    model.add_adapter("second", config)
    model(x, adapter_names=["default", "second"])
    model.base_model.set_adapter(["default", "second"])
    model(x)
    after = model.unload().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.fixture
def dense_kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The formula in place of the kernel for AVX512-BF16; the list counts its calls."""
    calls: list[int] = []

    def kernel(x: Tensor, bits: Tensor, scales: Tensor, state: Any) -> Tensor:
        calls.append(1)
        usual = bnb4_cpu.repacked_bits(bits)
        absmax = scales.t().float().reshape(-1)
        w = bnb4_file._by_formula(usual, absmax, state.code, state.blocksize, state.shape, x.dtype)
        return x @ w.t()

    monkeypatch.setattr(bnb4_kernel, "kernel", kernel)
    monkeypatch.setattr(bnb4_kernel, "_kernel_is_known", lambda kind: True)
    monkeypatch.setattr(bnb4_kernel, "_wanted", True)
    return calls


def decoded(layer: Any, x: Tensor) -> Tensor:
    found = read(layer)
    assert not isinstance(found, str)
    return found.packed.infer(x)


@pytest.mark.parametrize("nested", [False, True])
def test_the_second_packing_never_goes_stale(dense_kernel: list[int], nested: bool) -> None:
    made = [
        bnb4(nn.Linear(128, 64, bias=False), quant_type="nf4", compress_statistics=nested)
        for _ in range(2)
    ]
    layer, other = (m.eval() for m in made)
    layer.support_avx512bf16_for_cpu = other.support_avx512bf16_for_cpu = True
    x = torch.randn(2, 128)

    def agrees() -> None:
        fresh = copy.deepcopy(layer)
        assert torch.equal(decoded(layer, x), decoded(fresh, x))

    agrees()
    before = bnb4_kernel._copies[layer]
    agrees()
    assert bnb4_kernel._copies[layer] is before and len(dense_kernel) == 4
    assert "packed a second time for eval mode (4096 bytes)" in read(layer).packed.format  # type: ignore[union-attr]
    state, new = layer.weight.quant_state, other.weight.quant_state
    layer.weight.data.copy_(other.weight.data)  # moves no version number
    agrees()
    layer.weight.data[700] ^= 16  # one number of all
    agrees()
    state.absmax.data[3] = new.absmax[5] + 1
    agrees()
    if nested:
        state.offset.data.mul_(2)
        agrees()
        state.state2.absmax.data.mul_(2)
        agrees()
    layer.weight.data = other.weight.data.clone()
    agrees()
    layer.weight = other.weight
    agrees()
    assert bnb4_kernel._copies[layer] is not before
    y = decoded(layer.train(), x)  # in training nothing is kept, and all is float32
    assert layer not in bnb4_kernel._copies
    assert torch.equal(y, x @ owners(layer).t())


def test_one_row_compares_some_words_and_now_and_then_all(
    dense_kernel: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bnb4_kernel, "EVERY", 4)
    layer, other = (bnb4(nn.Linear(128, 64, bias=False), quant_type="nf4").eval() for _ in "ab")
    layer.support_avx512bf16_for_cpu = True
    x = torch.randn(1, 128)

    def is_right(x: Tensor = x) -> bool:
        return torch.equal(decoded(layer, x), decoded(copy.deepcopy(layer), x))

    assert is_right()
    layer.weight.data.copy_(other.weight.data)  # moves no version number
    assert is_right()
    with torch.no_grad():
        layer.weight[9] ^= 16  # moves it
    assert is_right()
    layer.weight.data[9] ^= 16  # words 0, 8, 16, ... are looked at, and this is in word 1
    assert [is_right() for _ in range(4)] == [False, False, False, True]
    layer.weight.data[9] ^= 16
    assert is_right(torch.randn(2, 128)) and is_right()
    layer.weight.quant_state.absmax.data[3] ^= 255
    assert [is_right() for _ in range(3)] == [False, False, True]


def test_a_second_packing_lives_no_longer_than_its_layer(dense_kernel: list[int]) -> None:
    layer = bnb4(nn.Linear(128, 64, bias=False), quant_type="nf4").eval()
    layer.support_avx512bf16_for_cpu = True
    decoded(layer, torch.randn(1, 128))
    assert layer in bnb4_kernel._copies and layer.weight.module is layer
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


class _Watching(TorchDispatchMode):
    """A mode that is told of every operator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not bnb4_gemv(), reason="bitsandbytes has no such function here")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_function_behind_the_operator_gives_its_numbers(kind: str, dtype: torch.dtype) -> None:
    layer = bnb4(nn.Linear(192, 96, bias=False), quant_type=kind).eval()
    operator = mock.Mock(wraps=bnb4_kernel._operator)
    for rows in (1, 3, 40):
        x = torch.randn(192, rows, dtype=dtype).t()  # not contiguous
        with mock.patch.object(bnb4_kernel, "_operator", operator):
            decoded(layer, x)  # asks once whether the numbers are the operator's
            operator.reset_mock()
            found = decoded(layer, x)
            assert not operator.called
            with _Watching():  # whoever looks on sees an operator
                assert torch.equal(decoded(layer, x), found)
            assert operator.call_count == 1
        assert found.dtype == dtype and found.shape == (rows, 96)


def test_what_the_kernel_is_not_asked_for(
    dense_kernel: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = bnb4(nn.Linear(128, 64, bias=False), quant_type="nf4").eval()
    layer.support_avx512bf16_for_cpu = True
    odd = bnb4(nn.Linear(96, 64, bias=False), quant_type="nf4").eval()
    odd.support_avx512bf16_for_cpu = True
    decoded(layer, torch.randn(1, 128, dtype=torch.float64))
    decoded(odd, torch.randn(1, 96))  # blocks go over the end of a row
    monkeypatch.setattr(bnb4_kernel, "_wanted", False)
    decoded(layer, torch.randn(1, 128))
    layer.support_avx512bf16_for_cpu = False
    decoded(conversion(layer), torch.randn(1, 128))
    assert not dense_kernel and layer not in bnb4_kernel._copies


def test_few_rows_in_eval_mode_are_as_good_as_hf_pefts() -> None:
    """On a CPU with AVX512-BF16 both run bitsandbytes' kernel for it."""
    ours, theirs, exact = adapted(llama(quant_type="nf4", compress_statistics=False))
    for rows in (1, 5, 20):
        x = torch.randint(0, 64, (1, rows))
        with torch.no_grad():
            a, b, c = (m.eval()(input_ids=x).logits for m in (ours, theirs, exact))
        assert_as_good_as_torch(a, b, c, average=True)
