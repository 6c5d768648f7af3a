"""Products in fp8 on the Triton backend: the passes that read X and dY quantise them, once each.

torch's product with block scales needs a GPU, so its definition stands in for it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.ops import (
    auto_backend,
    choices,
    fp8_copies,
    fp8_triton,
    lora_mlp,
    mlp_apart,
    mlp_kernels,
    mlp_torch,
    mlp_triton,
    torch_backend,
    triton_backend,
    tuned,
)
from peftkern.ops import backend as ops_backend
from peftkern.ops.bases import fp8_numbers, fp8_products
from peftkern.ops.bases.formats import as_weight, read
from peftkern.ops.bases.fp8_linear import Fp8Linear
from peftkern.ops.bits import unpack_bits
from peftkern.ops.mlp_parts import Member
from peftkern.ops.projection import Plain, Projection, ProjectionGrad
from tests.closeness import assert_as_good_as_torch
from tests.kernels.oracle import matrix

BF16, FP32 = torch.bfloat16, torch.float32
M, K = 19, 256


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes (M, K, N) of the products in fp8 that run."""
    seen: list[tuple[int, ...]] = []

    def multiplied(q: Tensor, w: Tensor, a: Tensor, ka: Any, s: Tensor, ks: Any, **out: Any) -> Any:
        (m, k), n = q.shape, w.shape[1]
        assert q.is_contiguous() and w.stride() == (1, k)
        assert a.shape == (m, k // 128) and (a.stride() == (1, m) or k == 128)
        assert s.stride(0) == 1 and s.shape[0] % 4 == 0
        seen.append((m, k, n))
        right = s[: k // 128].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
        return (wide(q, a) @ (w.double() * right)).to(out["output_dtype"])

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", multiplied)
    monkeypatch.setattr(fp8_products, "_device_why_not", lambda device, blocks: None)
    monkeypatch.setattr(
        triton_backend, "_TO_TORCH", "unexpected: %s"
    )  # a note of it would say that kernels did not run
    return seen


@pytest.fixture
def no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's quantisation, a pass of its own, does not run."""

    def refuse(x: Tensor) -> Any:
        raise AssertionError("X or dY was quantised in a pass of its own")

    monkeypatch.setattr(fp8_products, "quantised_blocks", refuse)


def wide(q: Tensor, a: Tensor) -> Tensor:
    return (q.double().unflatten(1, (-1, 128)) * a.double()[:, :, None]).flatten(1)


def fp8(n: int, k: int = K, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    layer = Fp8Linear(nn.Linear(k, n, bias=False))
    peftkern.set_base_compute(layer, "fp8")
    found: Any = read(layer)
    return found.packed


def member(x: Tensor, n: int, r: int, p: float, bias: bool) -> Projection:
    return Projection(
        as_weight(fp8(n, x.shape[1], seed=n), x),
        matrix(1, n, x.dtype, seed=9)[0] if bias else None,
        matrix(r, x.shape[1], FP32, seed=r), matrix(n, r, FP32, seed=n), 1.5, p, False,
    )  # fmt: skip


def quantised(x: Tensor) -> Tensor:
    """The numbers in float64 that products in fp8 are of."""
    return wide(*fp8_numbers.quantised(x, (1, 128)))


@pytest.mark.parametrize("dtype, how", [(BF16, None), (BF16, "fused"), (FP32, "joined")])
def test_a_group_of_fp8_layers(
    dtype: torch.dtype, how: str | None, products: Any, no_pass: None
) -> None:
    """The numbers, and how often what is quantised and multiplied, whatever the order asked for."""
    x = matrix(M, K, dtype, seed=0, offset=1)
    members = [member(x, 128, 5, 0.3, True), member(x, 384, 16, 0.3, False)]
    done = triton_backend.forward(x, members, None, how)
    assert products == [(M, K, 128), (M, K, 384)]
    behind, exact_dx = [], torch.zeros(M, K, dtype=torch.float64)
    for i, (m, (y, s, bits)) in enumerate(zip(members, done, strict=True)):
        assert bits is not None and y.dtype == dtype
        mask = unpack_bits(bits, K, torch.float64)
        c, A, B = m.scale / (1 - m.p), m.A.double(), m.B.double()
        W = fp8_copies.weight(m.weight).dense(torch.float64)
        bias = 0 if m.bias is None else m.bias.double()
        exact = quantised(x) @ W.t() + c * (x.double() * mask) @ A.t() @ B.t() + bias
        narrow = in_x_dtype(m, dtype)
        [(theirs, _, _)] = with_torch(lambda: torch_backend.forward(x, [narrow], [bits]))  # noqa: B023
        assert_as_good_as_torch(y, theirs, exact)
        dy = matrix(M, y.shape[1], dtype, seed=20 + i, offset=1)
        behind.append(ProjectionGrad(dy, m.w, m.A, m.B, s, bits, m.scale, m.p, True, i == 0))
        ds = c * dy.double() @ B
        exact_dx += quantised(dy) @ W + mask * (ds @ A)
    products.clear()
    dx, pairs = triton_backend.backward(x, behind, True, None, how)
    assert dx is not None and products == [(M, 512, K)]  # all of the group in one
    narrow = [in_x_dtype(m, dtype) for m in behind]
    theirs_dx, theirs = with_torch(lambda: torch_backend.backward(x, narrow, True))
    assert_as_good_as_torch(dx, theirs_dx, exact_dx)
    for i, (m, (da, db)) in enumerate(zip(behind, pairs, strict=True)):
        mask = unpack_bits(m.bits, K, torch.float64)
        ds = m.scale / (1 - m.p) * m.dy.double() @ m.B.double()
        assert_as_good_as_torch(da, theirs[i][0], ds.t() @ (x.double() * mask))
        assert (db is None) == (i > 0)
        if db is not None:
            assert_as_good_as_torch(db, theirs[i][1], m.dy.double().t() @ m.s.double())


def in_x_dtype(m: Any, dtype: torch.dtype) -> Any:
    """With adapters in the activations' dtype, in which the kernels multiply."""
    return m._replace(A=m.A.to(dtype), B=m.B.to(dtype))


def with_torch(call: Any) -> Any:
    """The call with torch's own quantisation, as where no kernel runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fp8_products, "quantised_blocks", lambda x: fp8_numbers.quantised(x, (1, 128))
        )
        return call()


def test_without_a_gradient_of_x_nothing_is_quantised(products: Any, no_pass: None) -> None:
    x = matrix(M, K, BF16, seed=0)
    m = member(x, 128, 5, 0.0, False)
    [(y, s, _)] = triton_backend.forward(x, [m])
    products.clear()
    grad = ProjectionGrad(y, m.w, m.A, m.B, s, None, m.scale, 0.0, True, True)
    dx, [(da, db)] = triton_backend.backward(x, [grad], False)
    assert dx is None and da is not None and db is not None and not products


def test_few_rows_multiply_in_fp8_as_well(products: Any, no_pass: None) -> None:
    x = matrix(2, K, BF16, seed=0)
    m = member(x, 128, 5, 0.3, True)
    [y] = triton_backend.infer_group(x.view(2, 1, K), [m])
    assert y.shape == (2, 1, 128) and products == [(2, K, 128)]
    [(again, _, _)] = triton_backend.forward(x, [m._replace(p=0.0)])
    assert torch.equal(y.view(2, 128), again)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("r", [4, 24])
def test_an_mlp_keeps_h_and_its_gradients_in_fp8(
    r: int, p: float, products: Any, no_pass: None
) -> None:
    x = matrix(M, 128, BF16, seed=0).requires_grad_()
    wide_x = matrix(M, 256, BF16, seed=1)
    gate, up = (member(x.detach(), 256, r, p, False) for _ in range(2))
    down = member(wide_x, 128, r, p, False)
    parts = [m._replace(A=m.A.requires_grad_(), B=m.B.requires_grad_()) for m in (gate, up, down)]
    leaves = [x, *(t for m in parts for t in (m.A, m.B))]
    dy = matrix(M, 128, BF16, seed=5)

    def step() -> list[Tensor]:
        torch.manual_seed(3)
        y = lora_mlp.lora_mlp(x, *parts, "silu")
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    with ops_backend.use_backend("triton"):
        ours = step()
    # G, U and Y; dH and dX, with gate's and up's gradients side by side
    assert products == [(M, 128, 256)] * 2 + [(M, 256, 128), (M, 128, 256), (M, 512, 128)]
    with pytest.MonkeyPatch.context() as patch:
        # the same masks, by the same kernels, and torch's quantisation behind H, dG and dU
        patch.setattr(fp8_copies, "order", lambda ws, how=None: how)
        theirs = with_torch(lambda: _on_triton(step))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert float(error) < 2**-5  # one more or less of e4m3's roundings after those of bf16


def _on_triton(step: Any) -> Any:
    with ops_backend.use_backend("triton"):
        return step()


def test_auto_takes_the_kernels_without_a_race(
    clock: Any, products: Any, no_pass: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = matrix(M, K, BF16, seed=0)
    m = member(x, 128, 5, 0.3, True)
    monkeypatch.setattr(choices, "forward", None)  # no way is chosen
    monkeypatch.setattr(choices, "backward", None)
    monkeypatch.setattr(choices, "infer", None)
    [(y, s, bits)] = auto_backend.forward(x, [m])
    grad = ProjectionGrad(y, m.w, m.A, m.B, s, bits, m.scale, m.p, True, True)
    dx, _ = auto_backend.backward(x, [grad], True)
    again = auto_backend.infer(x, m.weight, m.bias, m.A, m.B, m.scale, False)
    assert dx is not None and again.shape == y.shape and len(products) == 3
    assert not tuned.book(-1).decisions


def test_scales_of_rows_stay_with_torch_and_explain_says_why(products: Any) -> None:
    layer = fp8(128)
    assert fp8_copies.describe(layer) == "X and dY quantised in the passes that make S and dS"
    layer.block, layer.scale = None, layer.scale[:1, :1]
    said = fp8_copies.describe(layer)
    assert said is not None and "by torch" in said and "only after the whole row" in said
    x = matrix(M, K, BF16, seed=0)
    w = as_weight(layer, x)
    assert fp8_copies.order([w]) == fp8_copies.order([w, as_weight(fp8(128), x)]) == "joined"
    assert fp8_copies.order([torch.ones(2, 2)], "fused") == "fused"
    layer.compute = "dequantise"
    assert fp8_copies.order([w], "fused") == "fused" and fp8_copies.describe(layer) is None


@pytest.mark.parametrize("backend, r, words", [
    ("triton", 4, "X and dY quantised in the passes that make S and dS"),
    ("triton", 300, "X and dY quantised by torch (rank 300 is above 256)"),
    ("torch", 4, "computes in fp8, X and dY quantised by torch"),
])  # fmt: skip
def test_explain_says_who_quantises(backend: str, r: int, words: str, products: Any) -> None:
    model = nn.ModuleDict({"q": nn.Linear(128, 128)})
    adapted = peftkern.get_peft_model(model, peftkern.LoraConfig(r=r, target_modules=["q"]))
    peftkern.quantize_base(adapted, compute="fp8")
    with ops_backend.use_backend(backend):
        [row] = peftkern.explain(adapted)
    assert row.reason.endswith(words)


@pytest.mark.parametrize("behind", ["kernels", "no dX"])
def test_gate_and_up_get_their_low_rank_parts_where_they_are_read(
    behind: str, products: Any, no_pass: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what passes over G, U and dH alone give, whoever computes the backward."""
    x = matrix(M, 128, BF16, seed=0)
    gate, up = (member(x, 256, r, 0.3, False) for r in (4, 16))
    down = member(matrix(M, 256, BF16, seed=1), 128, 5, 0.3, False)
    parts = [m._replace(A=m.A.requires_grad_(), B=m.B.requires_grad_()) for m in (gate, up, down)]
    leaves = [t for m in parts for t in (m.A, m.B)]
    if behind != "no dX":
        leaves.append(x.requires_grad_())
    dy = matrix(M, 128, BF16, seed=5)
    passes: list[str] = []
    for name in ("expand", "low_rank_grad_input"):
        own = getattr(fp8_triton, name)

        def counted(*args: Any, own: Any = own, name: str = name, **more: Any) -> Any:
            passes.append(name)
            return own(*args, **more)

        monkeypatch.setattr(fp8_triton, name, counted)

    def step() -> list[Tensor]:
        passes.clear()
        torch.manual_seed(3)
        y = lora_mlp.lora_mlp(x, *parts, "silu")
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    with ops_backend.use_backend("triton"):
        ours = step()
        # Y's: nothing is added behind that product, and without dX the gradients are not in fp8
        assert passes == ["expand", *(["low_rank_grad_input"] if behind == "no dX" else [])]
        monkeypatch.setattr(mlp_apart, "outputs", lambda *_: None)
        monkeypatch.setattr(mlp_triton, "adds", lambda *_: False)
        apart = step()
    assert passes[:3] == ["expand"] * 3
    for a, b in zip(ours, apart, strict=True):
        assert torch.equal(a, b)


def test_torchs_operations_add_the_low_rank_parts_that_were_left() -> None:
    gate, up, dy = (matrix(9, 40, FP32, seed=i) for i in range(3))
    down = Projection(
        torch.randn(6, 40), None, torch.randn(3, 40), torch.randn(6, 3), 1.0, 0.0, False
    )
    s, B = matrix(9, 4, FP32, seed=4), matrix(40, 4, FP32, seed=5)
    whole = gate + s @ B.T
    found = mlp_torch.forward(gate, up, "silu", down, inner=((s, B), None))
    for a, b in zip(found[:2], mlp_torch.forward(whole, up, "silu", down)[:2], strict=True):
        torch.testing.assert_close(a, b)
    behind = ProjectionGrad(dy[:, :6], down.w, down.A, down.B, found[1], None, 1.0, 0.0, True, True)
    results = [
        mlp_torch.backward(g, up, "silu", behind, (Member(B, s, 1.0, apart), None))[0]
        for g, apart in ((gate, True), (whole, False))
    ]
    for a, b in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("with_bias", [False, True])
def test_h_is_in_fp8_alone_where_down_has_no_adapter(
    with_bias: bool, products: Any, no_pass: None
) -> None:
    gate, up = (matrix(M, 256, BF16, seed=i) for i in range(2))
    down = member(gate, 128, 5, 0.0, with_bias)
    plain = Plain(down.weight, down.bias, False)
    y, s, bits = mlp_kernels.forward(gate, up, "silu", plain)
    assert s is None and bits is None and products == [(M, 256, 128)]
    silent = down._replace(B=torch.zeros_like(down.B))
    assert torch.equal(y, mlp_kernels.forward(gate, up, "silu", silent)[0])


def test_a_linear_with_a_bias_or_a_large_rank_has_its_own_pass(
    products: Any, no_pass: None
) -> None:
    x = matrix(M, 128, BF16, seed=0)
    down = member(matrix(M, 256, BF16, seed=1), 128, 5, 0.0, False)
    plain, bias, large = (
        member(x, 256, r, 0.0, with_bias) for r, with_bias in ((4, False), (4, True), (24, False))
    )
    with ops_backend.use_backend("triton"):
        assert mlp_apart.outputs(x, [plain, plain], "silu", down) is not None
        for inner in ([plain, bias], [large, plain], [plain, Plain(plain.weight, None, False)]):
            assert mlp_apart.outputs(x, inner, "silu", down) is None  # type: ignore[arg-type]
        assert mlp_apart.outputs(x, [plain], "silu", Plain(down.weight, None, False)) is None
    with ops_backend.use_backend("torch"):
        assert mlp_apart.outputs(x, [plain, plain], "silu", down) is None
