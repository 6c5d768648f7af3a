"""Prefix attention against float64: outputs and all gradients, in every implementation."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from peftkern.ops import prefix_attention as operation
from peftkern.ops import prefix_blocked, prefix_concat, prefix_merge
from peftkern.ops.prefix_attention import prefix_attention
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.needs import merging_on_a_cpu
from tests.prefix_cases import NAMES, SCALE, force, gradients, inputs, keep_of, seen, truth

relaxed = settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
IMPLEMENTATIONS = ("blocked", "merge")
FEW = (0, 2**30)  # one row is joined to the prefix at any size, or never


def compare(tensors, options):
    """Output and gradients against the definition; and the call without gradients."""
    expected = gradients(truth(tensors, options), tensors)
    options = {"causal": True, **options}
    found = gradients(prefix_attention(*tensors, scale=SCALE, **options), tensors)
    named = (dict(zip(NAMES, values, strict=True)) for values in (found, expected))
    assert_same_number(*named, name=str(options))
    for few in FEW:
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(prefix_merge, "_FEW", few)
            again = prefix_attention(*tensors, scale=SCALE, **options)
        assert_same_number(again, expected[0], "without gradients")


def ran(monkeypatch):
    """A list that fills with the implementations that run."""
    calls = []
    for module in (prefix_blocked, prefix_merge):
        monkeypatch.setattr(
            module, "forward", lambda *a, m=module, f=module.forward: calls.append(m) or f(*a)
        )
    attend = prefix_concat.attend
    monkeypatch.setattr(
        prefix_concat, "attend", lambda *a, **k: calls.append(prefix_concat) or attend(*a, **k)
    )
    return calls


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per row"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_combination(monkeypatch, implementation, heads, shared):
    force(monkeypatch, implementation)
    B, P, D = 3, 6, 8
    sizes = [(5, 5, None), (70, 70, 0), (1, 40, 39), (1, 40, 10), (70, 100, 30), (66, 100, 10)]
    bare = torch.tensor([True, False, False])
    for (T, S, offset), causal, kind, no_prefix in product(
        sizes, (True, False), (None, "left", "right", "holes", "nothing"), (None, bare)
    ):
        tensors = inputs(B, *heads, T, S, P, D, shared=shared)
        options = {"causal": causal, "keep": keep_of(kind, B, S), "no_prefix": no_prefix}
        if causal:
            options["q_offset"] = offset
        compare(tensors, options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [1, 3, 7, 64, 75, 76, 106, 107, 500])
def test_window_slides_over_the_prefix(monkeypatch, window, implementation):
    force(monkeypatch, implementation)
    for T, S, kind, no_prefix in product(
        (100, 70, 1), (100,), (None, "left", "holes"), (None, torch.tensor([True, False]))
    ):
        tensors = inputs(2, 4, 2, T, S, 7, 8)
        compare(tensors, {"window": window, "keep": keep_of(kind, 2, S), "no_prefix": no_prefix})


def test_window_that_hides_nothing_takes_no_mask(monkeypatch):
    force(monkeypatch, "merge")
    calls = ran(monkeypatch)
    tensors = inputs(2, 4, 4, 20, 20, 6, 8)
    prefix_attention(*tensors, scale=SCALE, causal=True, window=26)
    prefix_attention(*tensors, scale=SCALE, causal=True, window=25)
    assert calls == [prefix_merge, prefix_blocked]


@pytest.mark.parametrize("offsets", ["one", "scalar", "rows"])
def test_offset_that_the_device_knows(offsets):
    for T, kind, no_prefix in product(
        (1, 9), (None, "left", "nothing"), (None, torch.tensor([True, False, True]))
    ):
        at = {
            "one": torch.tensor([20]),
            "scalar": torch.tensor(20),
            "rows": torch.tensor([3, 0, 20]),
        }
        options = {"q_offset": at[offsets], "keep": keep_of(kind, 3, 40), "no_prefix": no_prefix}
        compare(inputs(3, 4, 2, T, 40, 5, 8), options)
        compare(inputs(3, 4, 2, T, 40, 5, 8), {**options, "window": 12})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@relaxed
@given(
    B=st.integers(1, 4),
    H_kv=st.integers(1, 3),
    G=st.integers(1, 4),
    T=st.sampled_from([1, 2, 3, 17, 63, 64, 65, 130]),
    past=st.sampled_from([0, 0, 1, 5, 67]),
    P=st.sampled_from([1, 2, 7, 31, 64, 129]),
    D=st.sampled_from([1, 2, 7, 16, 33]),
    shared=st.booleans(),
    causal=st.booleans(),
    kind=st.sampled_from([None, "left", "right", "holes", "nothing"]),
    seed=st.integers(0, 99),
)
def test_odd_shapes(
    monkeypatch, implementation, B, H_kv, G, T, past, P, D, shared, causal, kind, seed
):
    force(monkeypatch, implementation)
    tensors = inputs(B, H_kv * G, H_kv, T, T + past, P, D, shared=shared, seed=seed)
    compare(tensors, {"causal": causal, "keep": keep_of(kind, B, T + past)})


@pytest.mark.parametrize("size", [(0, 4, 4, 3, 3), (2, 4, 4, 0, 3), (2, 4, 4, 0, 0)], ids=str)
def test_empty(size):
    tensors = inputs(*size, 5, 8)
    out = prefix_attention(*tensors, scale=SCALE, causal=True)
    assert out.shape == tensors[0].shape
    assert all(g.abs().sum() == 0 for g in gradients(out, tensors))


def repeated(query, key, value, prefix_key, prefix_value):
    """The result with concatenated keys and values, with each row of the query four times.

    For very few rows the vendor's kernel computes exp more exactly than for many.
    """
    B, H, T, _ = query.shape
    ok = seen(B, T, T, prefix_key.shape[-2], {}).repeat(1, 1, 4, 1)
    keys, values = (
        torch.cat([p.expand(B, -1, -1, -1), x], 2).repeat_interleave(H // x.shape[1], 1)
        for p, x in ((prefix_key, key), (prefix_value, value))
    )
    rows = torch.cat([query] * 4, dim=2)
    return F.scaled_dot_product_attention(rows, keys, values, ok, scale=SCALE)[:, :, :T]


@pytest.mark.parametrize("sharp", [1.0, 6.0])
@pytest.mark.parametrize("T", [3, 40, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_that_of_concatenation(dtype, T, sharp):
    """Of output and gradients, each beside that of PEFT's formula."""
    tensors = inputs(3, 4, 2, T, T, 20, 64, dtype=dtype, sharp=sharp)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    exact = gradients(truth(wide, {}), wide)
    ours = gradients(prefix_attention(*tensors, scale=SCALE, causal=True), tensors)
    theirs, _ = prefix_concat.attend(*tensors, scale=SCALE, causal=True, offset=0)
    theirs = [gradients(theirs, tensors), gradients(repeated(*tensors), tensors)]
    for a, e, *b in zip(ours, exact, *theirs, strict=True):
        assert a.dtype == dtype
        assert_as_good_as_torch(a, b, e, average=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [None, "left", "nothing"])
@pytest.mark.parametrize("few", FEW)
def test_decoding_in_half_precision(dtype, kind, few, monkeypatch):
    monkeypatch.setattr(prefix_merge, "_FEW", few)
    tensors = inputs(3, 4, 2, 1, 50, 20, 64, dtype=dtype)
    keep = keep_of(kind, 3, 50)
    with torch.no_grad():
        exact = truth(tensors, {"keep": keep})
        ours = prefix_attention(*tensors, scale=SCALE, causal=True, keep=keep)
        theirs, _ = prefix_concat.attend(*tensors, scale=SCALE, causal=True, offset=49, keep=keep)
    assert_as_good_as_torch(ours, theirs, exact, average=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_see_nothing(monkeypatch, implementation):
    """Output and gradients are 0 there, and finite everywhere."""
    force(monkeypatch, implementation)
    for dtype in (torch.float64, torch.float32, torch.float16):
        tensors = inputs(2, 4, 2, 9, 9, 5, 16, dtype=dtype)
        keep = torch.ones(2, 9, dtype=torch.bool)
        keep[0, :4] = False
        options = {"keep": keep, "no_prefix": torch.tensor([True, False])}
        out = prefix_attention(*tensors, scale=SCALE, causal=True, **options)
        found = gradients(out, tensors)
        assert all(x.isfinite().all() for x in found)
        assert not found[0][0, :, :4].any() and not found[1][0, :, :4].any()
        assert not found[2][0, :, :4].any() and found[0][0, :, 4:].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_without_a_prefix_are_plain_attention(monkeypatch, implementation):
    force(monkeypatch, implementation)
    tensors = inputs(2, 4, 4, 12, 12, 5, 8)
    out = prefix_attention(*tensors, scale=SCALE, causal=True, no_prefix=torch.tensor([True, True]))
    plain = F.scaled_dot_product_attention(*tensors[:3], is_causal=True, scale=SCALE)
    assert_same_number(out, plain)
    assert not any(g.any() for g in gradients(out, tensors)[4:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_with_another_default_device(monkeypatch, implementation):
    force(monkeypatch, implementation)
    tensors = inputs(2, 4, 2, 9, 9, 5, 8)
    keep = torch.tensor([[True] * 9, [True, False] * 4 + [True]])
    options = {"keep": keep, "window": 6}
    want = truth(tensors, options)
    expected = [want, *torch.autograd.grad(want, tensors, want)]
    with torch.device("meta"):
        out = prefix_attention(*tensors, scale=SCALE, causal=True, **options)
        found = [out, *torch.autograd.grad(out, tensors, out)]
    assert_same_number(found, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_any_layout(monkeypatch, implementation):
    """Contiguous queries, sliced rows, a stride along D, a gradient that is an expanded scalar."""
    force(monkeypatch, implementation)
    tensors = inputs(3, 4, 2, 10, 10, 5, 8)
    expected = gradients(truth(tensors, {}), tensors)
    layouts = [
        lambda x: x.contiguous(),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: torch.cat([x, x], -1)[..., :8],
        lambda x: torch.cat([x, x], -2)[..., : x.shape[-2], :],
    ]
    for layout in layouts:
        found = gradients(
            prefix_attention(*[layout(x) for x in tensors], scale=SCALE, causal=True), tensors
        )
        assert_same_number(found, expected)
    summed = prefix_attention(*tensors, scale=SCALE, causal=True).sum()
    expected = torch.autograd.grad(truth(tensors, {}).sum(), tensors)
    assert_same_number(torch.autograd.grad(summed, tensors), expected)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per row"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
def test_a_backward_that_reads_the_lse_as_dense(monkeypatch, causal, shared):
    """As FlashAttention 2 does on CUDA: it takes the address and knows no strides of it. A CPU's
    backward, which knows them, stands in."""
    force(monkeypatch, "merge")
    real = prefix_merge.cpu_flash_backward

    def reads_dense(do, q, k, v, o, lse, *args, **options):
        strides = torch.empty(lse.shape, device="meta").stride()
        return real(do, q, k, v, o, lse.as_strided(lse.shape, strides), *args, **options)

    monkeypatch.setattr(prefix_merge, "cpu_flash_backward", reads_dense)
    compare(inputs(3, 4, 2, 10, 13, 5, 8, shared=shared), {"causal": causal})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_of_some_inputs(monkeypatch, implementation):
    force(monkeypatch, implementation)
    for wanted in ([3, 4], [4], [0], [1], [2], [0, 1, 2], [0, 3]):
        tensors = inputs(2, 4, 2, 9, 9, 5, 8)
        expected = torch.autograd.grad(truth(tensors, {}).sum(), tensors)
        for i, x in enumerate(tensors):
            x.requires_grad_(i in wanted)
        prefix_attention(*tensors, scale=SCALE, causal=True).sum().backward()
        for i, x in enumerate(tensors):
            assert (x.grad is not None) == (i in wanted)
            if x.grad is not None:
                assert_same_number(x.grad, expected[i])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_first_and_second_derivatives(monkeypatch, implementation):
    force(monkeypatch, implementation)
    tensors = inputs(2, 4, 2, 5, 5, 3, 2)
    keep = keep_of("left", 2, 5)

    def call(*args):
        return prefix_attention(*args, scale=SCALE, causal=True, keep=keep)

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_same_bits_every_time(monkeypatch, implementation):
    force(monkeypatch, implementation)
    tensors = inputs(4, 4, 2, 70, 70, 20, 16, dtype=torch.float32)
    first, second = (
        gradients(prefix_attention(*tensors, scale=SCALE, causal=True), tensors) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_prefix_of_another_dtype_and_autocast():
    """The adapters' float32 under a bf16 model; and bf16 by autocast, where RoPE leaves float32."""
    tensors = inputs(2, 4, 2, 30, 30, 5, 16, dtype=torch.float32)
    half = [x.detach().bfloat16().requires_grad_() for x in tensors]
    expected = prefix_attention(*half, scale=SCALE, causal=True)
    mixed = [*half[:3], *tensors[3:]]
    out = prefix_attention(*mixed, scale=SCALE, causal=True)
    assert torch.equal(out, expected)
    assert [g.dtype for g in gradients(out, mixed)[4:]] == [torch.float32] * 2
    with torch.autocast("cpu", torch.bfloat16):
        out = prefix_attention(*tensors[:2], half[2], *tensors[3:], scale=SCALE, causal=True)
        scored = prefix_attention(*tensors, scale=SCALE, causal=True, softcap=5.0)
    assert torch.equal(out, expected)
    assert scored.dtype == torch.bfloat16


def test_the_choice_follows_the_size(monkeypatch):
    merging_on_a_cpu()
    calls = ran(monkeypatch)
    monkeypatch.setattr(prefix_blocked, "THREADS", torch.get_num_threads())
    for T, dtype in ((200, torch.float32), (20, torch.float32), (20, torch.bfloat16)):
        tensors = inputs(1, 2, 2, T, T, 5, 8, dtype=dtype)
        prefix_attention(*tensors, scale=SCALE, causal=True)
    monkeypatch.setattr(prefix_blocked, "THREADS", 0)
    tensors = inputs(1, 2, 2, 200, 200, 5, 8, dtype=torch.float32)
    prefix_attention(*tensors, scale=SCALE, causal=True)
    assert calls == [prefix_blocked, prefix_merge, prefix_blocked, prefix_merge]
    rule = operation.Rule(SCALE, True, 0)
    assert operation.why_not_kernel(*tensors, rule, True) == "the torch backend"


def test_seen_is_what_it_says():
    """The tests' own mask, on a case small enough to be read."""
    ok = seen(1, 3, 4, 2, {"window": 3, "keep": torch.tensor([[True, False, True, True]])})
    rows = ["".join("x" if x else "." for x in row) for row in ok[0, 0].tolist()]
    assert rows == [".xx...", "..x.x.", "....xx"]


def test_symbolic_sizes_are_traced() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    q, k, kp = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 4, 8)

    def call(q: torch.Tensor, k: torch.Tensor, kp: torch.Tensor) -> torch.Tensor:
        return operation.prefix_attention(q, k, k, kp, kp, scale=0.3, causal=True)

    traced = make_fx(call, tracing_mode="symbolic")(q, k, kp)
    assert_same_number(traced(q, k, kp).double(), call(q, k, kp).double())
