"""Prefix attention's kept and allocated memory, refusals and messages; calls on joined keys."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern.ops import notes, prefix_blocked, prefix_merge
from peftkern.ops.prefix_attention import prefix_attention
from peftkern.ops.prefix_rule import Rule
from tests.closeness import assert_same_number
from tests.needs import merging_on_a_cpu
from tests.prefix_cases import SCALE, force, gradients, inputs, seen, truth

IMPLEMENTATIONS = ("blocked", "merge")


@pytest.fixture
def as_cuda(monkeypatch):
    """Meta tensors answer as CUDA tensors do."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.is_meta))


class Recorder(TorchDispatchMode):
    """Operators that run, and the largest tensor that one of them allocates."""

    def __init__(self, known):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.name().removeprefix("aten::"))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.itemsize)
        return out


def kept(call):
    """Storages that autograd keeps for the backward of ``call``, by address."""
    found = {}

    def pack(x):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call()
    return out, found


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keeps_the_inputs_the_output_and_one_number_a_row(monkeypatch, implementation, heads):
    force(monkeypatch, implementation)
    B, T, P, D = 4, 70, 30, 16
    tensors = inputs(B, *heads, T, T, P, D, dtype=torch.float32)
    keep = torch.ones(B, T, dtype=torch.bool)
    out, found = kept(lambda: prefix_attention(*tensors, scale=SCALE, causal=True, keep=keep))
    known = {x.untyped_storage().data_ptr() for x in (*tensors, out, keep)}
    beyond = {p: s.nbytes() for p, s in found.items() if p not in known}
    assert list(beyond.values()) == [B * heads[0] * T * 4]
    # the same attention without a prefix keeps as much, but for the prefix itself
    _, plain = kept(
        lambda: F.scaled_dot_product_attention(*tensors[:3], is_causal=True, enable_gqa=True)
    )
    more = sum(s.nbytes() for s in found.values()) - sum(s.nbytes() for s in plain.values())
    assert more == 2 * heads[1] * P * D * 4 + keep.numel()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_shared_prefix_is_not_copied_over_the_batch(monkeypatch, implementation, heads):
    """Neither forward nor backward allocates B times the size of a prefix far longer than the row.

    Nothing is concatenated or repeated either.
    """
    force(monkeypatch, implementation)
    B, T, P, D = 16, 8, 600, 16
    tensors = inputs(B, *heads, T, T, P, D, dtype=torch.float32)
    with Recorder(tensors) as seen_:
        out = prefix_attention(*tensors, scale=SCALE, causal=True)
        gradients(out, tensors)
    assert seen_.largest < B * heads[1] * P * D / 3
    copies = ("cat", "repeat", "repeat_interleave", "stack")
    assert not [n for n in seen_.names if n.split(".")[0] in copies]
    # the check sees a concatenation where there is one
    with Recorder(tensors) as theirs:
        prefix_attention(*tensors, scale=SCALE, causal=True, softcap=3.0)
    assert theirs.largest >= B * heads[1] * P * D and "cat" in theirs.names


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_mask_of_all_rows_and_keys(monkeypatch, implementation):
    """Neither causality nor padding builds one [T, S]."""
    force(monkeypatch, implementation)
    B, T, S = 2, 300, 500
    keep = torch.ones(B, S, dtype=torch.bool)
    keep[0, :7] = False
    for options in ({}, {"keep": keep}, {"keep": keep, "no_prefix": torch.tensor([True, False])}):
        tensors = inputs(B, 1, 1, T, S, 3, 1, dtype=torch.float32)
        with Recorder([*tensors, keep]) as seen_:
            out = prefix_attention(*tensors, scale=SCALE, causal=True, **options)
            gradients(out, tensors)
        assert seen_.largest < T * S


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=str)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("B", [1, 80])
def test_decoding_takes_few_calls(heads, keep, B):
    """Decoding makes two calls of the vendor's attention and at most 4 others that compute.

    With padding there are at most 7 others. With few keys, which are copied, there is one call of
    the vendor's attention and at most 2 others, or 6 with padding.
    """
    merging_on_a_cpu()
    S, most = 40, 1 if B == 1 else 2
    tensors = inputs(B, *heads, 1, S, 20, 16, dtype=torch.float32)
    mask = torch.ones(B, S, dtype=torch.bool) if keep else None
    views = {
        "view", "expand", "unsqueeze", "squeeze", "transpose.int", "slice.Tensor", "detach",
        "permute", "_unsafe_view", "alias",
    }  # fmt: skip
    with torch.no_grad(), Recorder(tensors) as seen_:
        prefix_attention(*tensors, scale=SCALE, causal=True, keep=mask)
    work = [n for n in seen_.names if n not in views]
    attention = [n for n in work if "attention" in n]
    assert len(attention) == most
    beside = [2, 6] if B == 1 else [4, 7]
    assert len(work) - most <= beside[keep], work


# ---- on concatenated keys: a bias, softcap, sinks, dropout, weights ------------------------------


def eager(tensors, mask, softcap=None, sinks=None):
    """The formula in float64: output and weights."""
    query, key, value, kp, vp = tensors
    B, G = query.shape[0], query.shape[1] // key.shape[1]
    keys = torch.cat([kp.expand(B, -1, -1, -1), key], 2).repeat_interleave(G, 1)
    values = torch.cat([vp.expand(B, -1, -1, -1), value], 2).repeat_interleave(G, 1)
    scores = query @ keys.mT * SCALE
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores + mask if mask.dtype != torch.bool else scores.masked_fill(~mask, -torch.inf)
    exp = scores.exp()
    total = exp.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[:, None, None]
    return exp / total @ values, exp / total


@pytest.mark.parametrize(
    "options", [{"softcap": 2.0}, {"sinks": True}, {"softcap": 2.0, "sinks": 1}]
)
def test_softcap_sinks_and_weights(options):
    tensors = inputs(3, 4, 2, 9, 9, 5, 8)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if "sinks" in options else None
    softcap = options.get("softcap")
    keep = torch.ones(3, 9, dtype=torch.bool)
    keep[0, :3] = False
    common = {"keep": keep, "window": 6}
    expected, weights = eager(tensors, seen(3, 9, 9, 5, common), softcap, sinks)
    out, found = prefix_attention(
        *tensors,
        scale=SCALE,
        causal=True,
        softcap=softcap,
        sinks=sinks,
        return_weights=True,
        **common,
    )
    assert found.shape == (3, 4, 9, 14)
    visible = keep.clone()[:, None, :, None]  # rows of padding may see nothing: 0 here, nan there
    assert_same_number(found * visible, torch.where(visible, weights, 0.0))
    assert_same_number(out * visible, torch.where(visible, expected, 0.0))
    leaves = tensors if sinks is None else [*tensors, sinks]
    assert_same_number(gradients(out[1:], leaves), gradients(expected[1:], leaves))


@pytest.mark.parametrize(
    "shape", [(3, 4, 9, 14), (1, 4, 9, 14), (3, 1, 1, 14), (9, 14), (14,)], ids=str
)
def test_bias(shape):
    g = torch.Generator().manual_seed(1)
    tensors = inputs(3, 4, 2, 9, 9, 5, 8)
    bias = torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
    expected, _ = eager(tensors, bias)
    out = prefix_attention(*tensors, scale=SCALE, causal=False, bias=bias)
    leaves = [*tensors, bias]
    assert_same_number(gradients(out, leaves), gradients(expected, leaves))
    ok = torch.rand(shape, generator=g) > 0.3
    ok[..., 0] = True
    expected, _ = eager(tensors, ok)
    for extra in ({}, {"softcap": 1e9}):
        out = prefix_attention(*tensors, scale=SCALE, causal=False, bias=ok, **extra)
        assert_same_number(out, expected)


@pytest.mark.parametrize("kind", [None, torch.bool, torch.float64])
def test_bias_with_rows_without_a_prefix(kind):
    tensors = inputs(2, 4, 2, 9, 9, 5, 8)
    bare = torch.tensor([True, False])
    mask = seen(2, 9, 9, 5, {"causal": True})
    bias = None
    if kind is not None:
        bias = (
            mask
            if kind == torch.bool
            else torch.zeros(2, 1, 9, 14).double().masked_fill(~mask, -1e30)
        )
    expected = truth(tensors, {"no_prefix": bare})
    out, weights = prefix_attention(
        *tensors, scale=SCALE, causal=bias is None, bias=bias, no_prefix=bare, return_weights=True
    )
    assert_same_number(out, expected)
    assert not weights[0, ..., :5].any() and weights[1, ..., :5].any()


def test_rows_that_see_nothing_are_0_with_weights_too():
    tensors = inputs(2, 4, 2, 5, 5, 3, 8)
    keep, bare = torch.tensor([[False] * 5, [True] * 5]), torch.tensor([True, False])
    out, weights = prefix_attention(
        *tensors, scale=SCALE, causal=True, keep=keep, no_prefix=bare, return_weights=True
    )
    assert not out[0].any() and not weights[0].any() and out[1].any()
    assert not any(g[0].any() for g in gradients(out, tensors)[:4])


@pytest.mark.parametrize("weights", [False, True])
def test_dropout_draws_as_torch_does(weights):
    """The same seed drops what torch's own attention (or eager formula) drops."""
    tensors = inputs(2, 4, 2, 9, 9, 5, 8)
    query, key, value, kp, vp = tensors
    keys = torch.cat([kp.expand(2, -1, -1, -1), key], 2).repeat_interleave(2, 1)
    values = torch.cat([vp.expand(2, -1, -1, -1), value], 2).repeat_interleave(2, 1)
    torch.manual_seed(3)
    mask = seen(2, 9, 9, 5, {})
    expected = F.scaled_dot_product_attention(query, keys, values, mask, 0.4, scale=SCALE)
    torch.manual_seed(3)
    out = prefix_attention(*tensors, scale=SCALE, causal=True, dropout=0.4, return_weights=weights)
    out = out[0] if weights else out
    assert_same_number(gradients(out, tensors), gradients(expected, tensors))


def test_a_reason_is_logged_once(caplog, monkeypatch):
    merging_on_a_cpu()  # or there is another reason before
    notes._said.clear()
    tensors = inputs(1, 2, 2, 4, 4, 3, 8)
    with caplog.at_level(logging.INFO, "peftkern"):
        prefix_attention(*tensors, scale=SCALE, causal=True)
        assert not caplog.messages
        for _ in range(2):
            prefix_attention(*tensors, scale=SCALE, causal=True, dropout=0.1)
            prefix_attention(*tensors, scale=SCALE, causal=True, softcap=2.0)
    assert len(caplog.messages) == 2
    assert "dropout" in caplog.messages[0] and "softcap 2.0" in caplog.messages[1]


# ---- bad input -----------------------------------------------------------------------------------

BAD = {
    "query of 3 dimensions": ({"query": torch.zeros(4, 9, 8)}, ValueError, "query has shape"),
    "integer query": ({"query": torch.zeros(2, 4, 9, 8).int()}, TypeError, "query has dtype"),
    "heads": ({"query": torch.zeros(2, 5, 9, 8)}, ValueError, "query has 5 heads"),
    "key of another batch": ({"key": torch.zeros(3, 2, 9, 8)}, ValueError, "key has shape"),
    "key of another head_dim": ({"key": torch.zeros(2, 2, 9, 6)}, ValueError, "key has shape"),
    "key of another dtype": ({"key": torch.zeros(2, 2, 9, 8).double()}, TypeError, "key has dtype"),
    "value": ({"value": torch.zeros(2, 2, 8, 8)}, ValueError, "value has shape"),
    "prefix of another model": (
        {"prefix_key": torch.zeros(4, 5, 8)}, ValueError, r"prefix_key has shape .* \[2, P, 8\]",
    ),
    "prefix of another batch": ({"prefix_key": torch.zeros(3, 2, 5, 8)}, ValueError, "prefix_key"),
    "empty prefix": ({"prefix_key": torch.zeros(2, 0, 8)}, ValueError, "P >= 1"),
    "integer prefix": ({"prefix_key": torch.zeros(2, 5, 8).int()}, TypeError, "prefix_key has"),
    "prefix elsewhere": (
        {"prefix_key": torch.zeros(2, 5, 8, device="meta")}, ValueError, "prefix_key is on meta",
    ),
    "prefix_value": ({"prefix_value": torch.zeros(2, 6, 8)}, ValueError, "prefix_value has shape"),
    "offset": ({"q_offset": -1}, ValueError, "q_offset is -1"),
    "offset dtype": ({"q_offset": torch.tensor(1.0)}, TypeError, "q_offset has dtype"),
    "offset shape": ({"q_offset": torch.tensor([1, 2, 3])}, ValueError, "q_offset has shape"),
    "fewer keys": ({"query": torch.zeros(2, 4, 10, 8)}, ValueError, "key has 9 rows for 10"),
    "keep dtype": ({"keep": torch.ones(2, 9)}, TypeError, "keep has dtype"),
    "keep of P + S": ({"keep": torch.ones(2, 14).bool()}, ValueError, "keep has shape"),
    "no_prefix": ({"no_prefix": torch.ones(3).bool()}, ValueError, "no_prefix has shape"),
    "bias beside causal": ({"bias": torch.zeros(9, 14)}, ValueError, "bias is given with causal"),
    "bias shape": (
        {"bias": torch.zeros(9, 9), "causal": False}, ValueError, r"broadcasts to \[2, 4, 9, 14\]",
    ),
    "bias dtype": (
        {"bias": torch.zeros(9, 14).int(), "causal": False}, TypeError, "bias has dtype",
    ),
    "window": ({"window": 0}, ValueError, "window is 0"),
    "window of both sides": ({"window": 4, "causal": False}, ValueError, "causal=False"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
    "sinks": ({"sinks": torch.zeros(2)}, ValueError, "sinks has shape"),
    "dropout": ({"dropout": 1.0}, ValueError, "dropout is 1.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    arguments = {
        "query": torch.zeros(2, 4, 9, 8),
        "key": torch.zeros(2, 2, 9, 8),
        "value": torch.zeros(2, 2, 9, 8),
        "prefix_key": torch.zeros(2, 5, 8),
        "prefix_value": torch.zeros(2, 5, 8),
        "causal": True,
    }
    prefix_attention(**arguments, scale=1.0)
    with pytest.raises(error, match=message):
        prefix_attention(**{**arguments, **change}, scale=1.0)


# ---- compiled; and on a device that is not there -------------------------------------------------


@pytest.mark.long
def test_compiles_to_one_graph():
    """Training, and decoding with the offset in a tensor; nothing recompiles for new values."""
    compiled = torch.compile(prefix_attention, backend="aot_eager", fullgraph=True)
    window = {"window": 50}  # on concatenated keys, whose reason would be logged
    for T, options in ((200, {}), (100, window), (1, {"q_offset": torch.tensor(30)})):
        tensors = inputs(2, 4, 2, T, 200, 5, 8)
        expected = gradients(truth(tensors, options), tensors)
        found = gradients(compiled(*tensors, scale=SCALE, causal=True, **options), tensors)
        assert_same_number(found, expected)
    with torch.no_grad():
        for at in (7, 0, 199):
            stance = "default" if at == 7 else "fail_on_recompile"
            with torch.compiler.set_stance(stance):
                out = compiled(*tensors, scale=SCALE, causal=True, q_offset=torch.tensor(at))
            expected = truth(tensors, {"q_offset": torch.tensor(at)})
            assert_same_number(out, expected)


@pytest.mark.parametrize("T", [1, 16])
def test_cuda_calls_follow_the_schema(as_cuda, T):
    """No device has run this: meta tensors show that the calls exist and their shapes fit."""
    tensors = [
        torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for shape in ((2, 4, T, 64), (2, 2, 16, 64), (2, 2, 16, 64), (2, 5, 64), (2, 5, 64))
    ]
    with Recorder(tensors) as calls:
        out = prefix_attention(*tensors, scale=SCALE, causal=True)
        found = torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert out.shape == tensors[0].shape
    for g, x in zip(found, tensors, strict=True):
        assert g.shape == x.shape and g.dtype == x.dtype
    flash = [n for n in calls.names if "flash" in n]
    assert flash == 2 * ["_scaled_dot_product_flash_attention"] + 2 * [
        "_scaled_dot_product_flash_attention_backward"
    ]
    with torch.no_grad(), Recorder(tensors) as calls:
        assert prefix_attention(*tensors, scale=SCALE, causal=True).shape == out.shape
    assert len([n for n in calls.names if "flash" in n]) == 2


def test_reasons(as_cuda):
    merging_on_a_cpu()
    cpu, rule = torch.zeros(1, 1, 200, 8), Rule(1.0, True, 0)
    assert prefix_merge.why_not(cpu, rule) is None
    assert "window" in prefix_merge.why_not(cpu, rule._replace(window=3))
    x = torch.empty(1, 1, 200, 64, device="meta")
    assert "float32" in prefix_merge.why_not(x, rule)
    assert prefix_merge.why_not(x.half(), rule) is None
    padded = rule._replace(keep=torch.ones(1, 200).bool())
    assert "mask" in prefix_merge.why_not(x.half(), padded)
    assert "head_dim 60" in prefix_merge.why_not(x.half()[..., :60], rule)
    assert "tensors on" in prefix_blocked.why_not(x, rule)
    assert "device" in prefix_blocked.why_not(cpu, rule._replace(offset=torch.tensor(0)))
    assert "rows" in prefix_blocked.why_not(cpu[:, :, :10], rule)


def test_a_device_without_a_known_attention():
    x = torch.empty(1, 1, 200, 64, device="meta")
    assert "on meta" in prefix_merge.why_not(x, Rule(1.0, True, 0))
