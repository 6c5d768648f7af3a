"""Quantised bases on the Triton kernels: every format's numbers, and models, in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.kernels.dequantise import dequantise
from peftkern.ops import mlp_kernels, quantised_triton, triton_backend
from peftkern.ops.bases.awq import Awq
from peftkern.ops.bases.compressed_numbers import PackedFloat4, PackedInt
from peftkern.ops.bases.formats import read
from peftkern.ops.bases.fp8 import Fp8
from peftkern.ops.bases.gptq import Gptq
from peftkern.ops.bases.int8 import Int8
from peftkern.ops.bases.mx import Mx4
from peftkern.ops.bases.weight import BaseWeight, Packed
from peftkern.ops.lora_mixed import Factors, SampleIndex, lora_mixed
from peftkern.ops.projection import Plain, Projection, ProjectionGrad
from tests.closeness import assert_as_good_as_torch
from tests.kernels.oracle import DTYPES, matrix
from tests.kernels.quantised_cases import bytes_of, e4m3_of, scales_of, words_of
from tests.quantised_models import bnb4, dense, llama

HALF, BF16 = torch.float16, torch.bfloat16
N, K = 24, 128


def nf4(**how: Any) -> Packed:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    found = read(bnb4(nn.Linear(K, N), quant_type="nf4", **how))
    assert not isinstance(found, str)
    return found.packed


def gptq(group: int, first: bool = True) -> Packed:
    order = torch.arange(K) // 32
    if not group:
        order = order[torch.randperm(K, generator=torch.Generator().manual_seed(0))]
    held = words_of(K // 8, N), words_of(4, N // 8, seed=1), scales_of(4, N, dtype=HALF)
    return Gptq((*held, order.int()), 4, K, N, first, group)


def awq(fixed: bool = False) -> Packed:
    held = words_of(K, N // 8), words_of(4, N // 8, seed=1), scales_of(4, N, dtype=HALF)
    return Awq(held, 4, fixed)


def packed_int(zero: bool) -> Packed:
    z = bytes_of(N, 4, seed=1).view(torch.int8) % 8 if zero else None
    scale = scales_of(N, 4, dtype=BF16)
    return PackedInt(words_of(N, K // 8), 4, (N, K), scale, z, (1, 32), "int4")


def e4m3(block: tuple[int, int] | None, *shape: int, **how: Any) -> Packed:
    scale = scales_of(*shape, dtype=how.pop("scales", torch.float32))
    return Fp8(e4m3_of(N, K), scale, block, "fp8", **how)


FORMATS: dict[str, Any] = {
    "nf4": lambda: nf4(),
    "nf4, nested": lambda: nf4(compress_statistics=True),
    "nf4, stored in bf16": lambda: nf4(quant_storage=BF16),
    "int8": lambda: Int8(bytes_of(N, K).view(torch.int8), scales_of(N), "ours"),
    "int8, one scale": lambda: Int8(bytes_of(N, K).view(torch.int8), scales_of(1), "ours"),
    "fp8, one scale": lambda: e4m3(None, 1),
    "fp8, a scale a row": lambda: e4m3(None, N, 1),
    "fp8, blocks": lambda: e4m3((16, 32), 2, 4),
    "fp8, blocks, as transformers": lambda: e4m3((16, 32), 2, 4, rounds_scale=True),
    "fp8, kept in bf16": lambda: e4m3((1, 32), N, 4, scales=BF16, kept=BF16),
    "gptq": lambda: gptq(32),
    "gptq, version 2": lambda: gptq(32, False),
    "gptq, act-order": lambda: gptq(0),
    "awq": awq,
    "int4": lambda: packed_int(False),
    "int4, zeros": lambda: packed_int(True),
    "int8, kept in bf16": lambda: PackedInt(
        bytes_of(N, K).view(torch.int8), None, (N, K), scales_of(N, 1, dtype=BF16), None, None, ""
    ),
    "nvfp4": lambda: PackedFloat4(
        bytes_of(N, K // 2), e4m3_of(N, K // 16, low=1.0), torch.tensor([3.7]), 16, ""
    ),
    "mxfp4 of compressed-tensors": lambda: PackedFloat4(
        bytes_of(N, K // 2), bytes_of(N, K // 32) // 8 + 100, None, 32, ""
    ),
    "mxfp4": lambda: Mx4(bytes_of(N, K // 2), bytes_of(N, K // 32) // 8 + 100),
}


@pytest.mark.parametrize("name", FORMATS)
def test_kernels_read_what_owners_dequantise(name: str) -> None:
    packed = FORMATS[name]()
    for dtype in DTYPES:
        found = quantised_triton.readable(packed, dtype)
        assert not isinstance(found, str), found
        assert torch.equal(dequantise(found, dtype), packed.dense(dtype))


def test_what_kernels_do_not_read_says_why() -> None:
    def why(packed: Packed, dtype: torch.dtype = torch.float32) -> Any:
        return quantised_triton.readable(packed, dtype)

    class Own(Packed):
        format, shape, device, tensors = "own", (3, 4), torch.device("cpu"), ()

        def dense(self, dtype: torch.dtype) -> Tensor:
            return torch.ones(3, 4, dtype=dtype)

    assert why(Own()) == "no kernel reads its format"
    assert why(Own(), torch.float64) == "products are in torch.float64"
    q = torch.ones(8, 16).to(torch.float8_e5m2)
    assert why(Fp8(q, torch.ones(1), None, "")) == "its weight is torch.float8_e5m2"
    x = torch.ones(2, 4)
    member = Projection(BaseWeight(Own(), x.dtype), None, x[:1], x[:, :1], 1.0, 0.0, False)
    assert quantised_triton.few_rows(x, [member]) == "no kernel reads its format"
    assert quantised_triton.few_rows(torch.ones(65, 4), [member]) == "more than 64 rows"
    fixed = Projection(BaseWeight(awq(True), x.dtype), None, x[:1], x[:, :1], 1.0, 0.0, False)
    said = quantised_triton.few_rows(torch.ones(2, K), [fixed])
    assert said == "its owner multiplies in torch.float16"
    assert quantised_triton.infer(x, [member]) is None
    y = quantised_triton.base_product(x, BaseWeight(Own(), x.dtype).t())
    assert torch.equal(y, torch.full((2, 3), 4.0))


@pytest.mark.parametrize("name", ["nf4, nested", "fp8, blocks", "int4, zeros", "gptq"])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_the_operations_on_kernels_alone(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = FORMATS[name]()
    numbers = packed.dense(torch.float32)

    def owners(self: Any, dtype: torch.dtype) -> Tensor:
        raise AssertionError("its owner dequantises it")

    monkeypatch.setattr(type(packed), "dense", owners)
    x, w = matrix(rows, K, torch.float32, seed=0), BaseWeight(packed, torch.float32)
    a, b = matrix(3, K, torch.float32, seed=1), matrix(N, 3, torch.float32, seed=2)
    bias = matrix(1, N, torch.float32, seed=3)[0].contiguous()
    ran: list[int] = []
    real = quantised_triton.decode_quantised
    monkeypatch.setattr(
        quantised_triton, "decode_quantised", lambda *args: ran.append(1) or real(*args)
    )
    members = [Projection(t, bias, a, b, 0.5, 0.0, False) for t in (w, numbers, numbers.double())]
    found = []
    for member in members:
        dtype = member.weight.dtype
        given = Projection(*[t.to(dtype) if type(t) is Tensor else t for t in member])
        given = given._replace(weight=member.weight)
        (y,) = triton_backend.infer_group(x.to(dtype), [given])
        ((y2, s, _),) = triton_backend.forward(x.to(dtype), [given])
        grad = ProjectionGrad(y2, given.w, given.A, given.B, s, None, 0.5, 0.0, True, True)
        dx, ((da, db),) = triton_backend.backward(x.to(dtype), [grad], True)
        assert dx is not None and da is not None and db is not None
        found.append({"y": y, "y2": y2, "dx": dx, "da": da, "db": db})
    assert_as_good_as_torch(*found)
    assert len(ran) == (rows <= 64)


@pytest.mark.parametrize("way", ["mlp", "mlp, plain down", "mixed, triton", "mixed, auto"])
def test_other_operations_on_kernels_alone(
    way: str, monkeypatch: pytest.MonkeyPatch, clock: Any
) -> None:
    packed = FORMATS["fp8, blocks"]()
    numbers = packed.dense(torch.float32)
    x = matrix(6, K, torch.float32, seed=0)
    a, b = matrix(3, K, torch.float32, seed=1), matrix(N, 3, torch.float32, seed=2)

    def run(w: Tensor) -> Tensor:
        t = x.to(w.dtype)
        A, B = a.to(t.dtype), b.to(t.dtype)
        if way.startswith("mixed"):
            factors = Factors([A], [B], [0.5], (0,))
            return lora_mixed(t.view(3, 2, K), w, None, factors, SampleIndex([0, -1, 0], 1), False)
        down = Plain(w, None, False)
        if way == "mlp":
            down = Projection(w, None, A, B, 0.5, 0.0, False)
        y, _, _ = mlp_kernels.forward(t, None, "silu", down)
        return y

    exact, torchs = run(numbers.double()), run(numbers)

    def owners(self: Any, dtype: torch.dtype) -> Tensor:
        raise AssertionError("its owner dequantises it")

    monkeypatch.setattr(type(packed), "dense", owners)
    backend = "auto" if way == "mixed, auto" else "triton"
    with torch.no_grad(), peftkern.use_backend(backend):
        assert_as_good_as_torch(run(BaseWeight(packed, torch.float32)), torchs, exact)


@pytest.mark.long
def test_a_model_of_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")
    base = llama(quant_type="nf4", compress_statistics=True)
    ids = torch.randint(0, 64, (2, 5))
    found: list[dict[str, Any]] = []
    drawn: dict[str, Tensor] = {}
    for choice, model in (("triton", base), ("torch", base), ("torch", dense(base))):
        settings: Any = dict(r=4, target_modules="all-linear", init_lora_weights=False)
        adapted = peftkern.get_peft_model(model, peftkern.LoraConfig(**settings))
        drawn = drawn or {k: v.clone() for k, v in adapted.state_dict().items() if "lora_" in k}
        adapted.load_state_dict(drawn, strict=False)
        with peftkern.use_backend(choice):
            said = str(peftkern.explain(adapted))
            assert ("M<=64 decode_quantised, else dequantised by a kernel" in said) == (
                choice == "triton"
            )
            out = adapted(input_ids=ids, labels=ids)
            out.loss.backward()
            with torch.no_grad():
                one = adapted.eval()(ids[:1, :1]).logits
        grads = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
        found.append({"logits": out.logits.detach(), "one": one, **grads})
        adapted.unload()
    assert_as_good_as_torch(*found)
