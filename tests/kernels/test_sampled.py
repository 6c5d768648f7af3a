"""The numbers by which races judge: some of an output, with the same in float64 by formulas."""

import pytest
import torch

from peftkern.kernels import prefix_reference, reference
from peftkern.ops import prefix_sampled, race, sampled
from peftkern.ops.lora_mixed import Adapter, SampleIndex
from peftkern.ops.prefix_rule import Rule
from peftkern.ops.projection import Projection, ProjectionGrad
from tests.closeness import assert_same_number
from tests.prefix_cases import inputs as prefix_tensors
from tests.prefix_cases import keep_of

SHAPES = [(1, 5, 3, (2,)), (12, 40, 24, (4,)), (70, 150, 130, (5, 3)), (33, 64, 65, (1,))]


@pytest.fixture(autouse=True)
def in_small_blocks(monkeypatch):
    """Every loop over blocks runs more than once."""
    monkeypatch.setattr(sampled, "BLOCK", 100)
    monkeypatch.setattr(sampled, "_ROWS_AT_ONCE", 7)
    monkeypatch.setattr(prefix_sampled, "BLOCK", 30)
    monkeypatch.setattr(prefix_sampled, "SCORES", 40)


def some(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def same(samples):
    for name, got, exact, _ in samples:
        assert got.numel()
        assert_same_number(exact, got, name)
    return [s.name for s in samples]


def differing(exact, outputs, samples, result):
    """The places of each output (flat) whose numbers are looked at, found by changing them."""
    seen = []
    for output in outputs:
        flat, found = output.view(-1), set()
        for i in {0, output.numel() - 1}:
            before = flat[i].item()
            flat[i] += 1.0
            changed = exact(result)
            found |= {i for a, b in zip(samples, changed, strict=True) if (a.got != b.got).any()}
            flat[i] = before
        seen.append(found)
    return seen


def projections(K, N, ranks, p=0.0, bias=True):
    return [
        Projection(
            some(N + i, K) if i % 2 == 0 else some(K, N + i), some(N + i) if bias else None,
            some(r, K), some(N + i, r), 0.5 + i, p, i % 2 == 1,
        )
        for i, r in enumerate(ranks)
    ]  # fmt: skip


def masks(M, K, p, count):
    return [torch.rand(M, K) >= p if p else None for _ in range(count)]


def packed(keep):
    return None if keep is None else reference.pack_bits(keep)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(("M", "K", "N", "ranks"), SHAPES)
def test_a_forward(M, K, N, ranks, p):
    x, members, keeps = some(M, K), projections(K, N, ranks, p), masks(M, K, p, len(ranks))
    exact = sampled.forward(x, members, [packed(k) for k in keeps])
    result = []
    for m, keep in zip(members, keeps, strict=True):
        s = reference.shrink(x, m.A, m.scale / (1 - p), keep)
        result.append((reference.linear(x, m.w.t(), s, m.B, m.bias), s, packed(keep)))
    samples = exact(result)
    assert same(samples) == ["Y", "S"] * len(ranks)
    outputs = [t for y, s, _ in result for t in (y, s)]
    assert all(differing(exact, outputs, samples, result))  # corners
    shapes = [(min(M, 8), min(n, 64)) for m in members for n in (len(m.B), 10**9)]
    for sample, (rows, columns) in zip(samples[::2], shapes[::2], strict=True):
        assert sample.got.shape == (rows, columns)


@pytest.mark.parametrize("transposed", [False, True])
def test_an_inference(transposed):
    (m,) = projections(40, 70, (4,))
    for shape in ((3, 5, 40), (1, 40), (40,)):
        x = some(*shape)
        w = m.weight.t() if transposed else m.weight
        exact = sampled.infer(x, w, m.bias, m.A, m.B, m.scale, transposed)
        x2 = x.reshape(-1, 40)
        y = reference.linear(x2, m.weight, reference.shrink(x2, m.A, m.scale), m.B, m.bias)
        y = y.view(*shape[:-1], 70)
        samples = exact(y)
        assert same(samples) == ["Y"]
        assert all(differing(exact, [y], samples, y))


@pytest.mark.parametrize("T", [1, 2, 5])
def test_a_mixed_batch(T):
    K, N = 40, 70
    adapters = [Adapter(some(r, K), some(N, r), 0.5 * r) for r in (2, 3, 1)] + [None]
    choice = [1, -1, 1, 0, 3, 2, 1]
    x, w, bias = some(len(choice) * T, K), some(N, K), some(N)
    exact = sampled.mixed(x, w, bias, adapters, SampleIndex(choice, len(adapters)))
    As, Bs, scales = zip(*((a.A, a.B, a.scale) if a else (None, None, 0.0) for a in adapters))  # noqa: B905
    y = reference.mixed(x, w, As, Bs, scales, choice, bias)
    samples = exact(y)
    assert same(samples) == ["Y"]
    assert all(differing(exact, [y], samples, y))
    for i in range(3):  # an adapter of its own for each
        others = list(scales)
        others[i] += 1.0
        (sample,) = exact(reference.mixed(x, w, As, Bs, others, choice, bias))
        assert race._error([sample])[0] > 0.01


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(("M", "K", "N", "ranks"), SHAPES)
def test_a_backward(M, K, N, ranks, p):
    x, members, keeps = some(M, K), projections(K, N, ranks, p), masks(M, K, p, len(ranks))
    parts = [
        ProjectionGrad(
            some(M, len(m.B)), m.w, m.A, m.B, some(M, len(m.A)), packed(k), m.scale, p, True, True
        )
        for m, k in zip(members, keeps, strict=True)
    ]
    ds = [reference.grad_s(m.dy, m.B, m.scale / (1 - p)) for m in parts]
    dys, ws, As = ([getattr(m, name) for m in parts] for name in ("dy", "w", "A"))
    dx = reference.grad_input(dys, [w.t() for w in ws], ds, As, keeps)
    pairs = [
        (reference.grad_a(x, d, k), reference.grad_b(m.dy, m.s))
        for m, d, k in zip(parts, ds, keeps, strict=True)
    ]
    exact = sampled.backward(x, parts, True)
    samples = exact((dx, pairs))
    assert same(samples) == ["dX", *["dA", "dB"] * len(ranks)]
    outputs = [dx, *(t for pair in pairs for t in pair)]
    assert all(differing(exact, outputs, samples, (dx, pairs)))

    parts[0] = parts[0]._replace(needs_a=False, s=None)  # no dA, and no S for a dB
    some_alone = [(None, None), *pairs[1:]]
    found = sampled.backward(x, parts, False)((None, some_alone))
    assert same(found) == ["dA", "dB"] * (len(ranks) - 1)


def test_outputs_of_other_shapes_are_as_far_off_as_can_be():
    (m,) = projections(40, 24, (4,))
    x = some(12, 40)
    s = reference.shrink(x, m.A, m.scale)
    y = reference.linear(x, m.weight, s, m.B, m.bias)
    exact = sampled.forward(x, [m], [None])
    assert race._error(exact([(y, s, None)]))[0] < 1e-12
    for wrong in ((y[:-1], s), (y, s[:, :-1]), (y.t(), s)):
        off, where = race._error(exact([(*wrong, None)]))
        assert off == float("inf") and where == "shape"
    part = ProjectionGrad(y, m.w, m.A, m.B, s, None, m.scale, 0.0, True, True)
    off, _ = race._error(sampled.backward(x, [part], True)((None, [(m.A, m.B)])))
    assert off == float("inf")


def test_places_are_spread_and_the_same_each_time():
    for n in (1, 7, 8, 9, 100, 4096, 10**6 + 3):
        found = sampled.places(n, 8, torch.device("cpu"))
        assert len(found) == min(n, 8) and found[0] == 0 and found[-1] == n - 1
        assert (found.diff() > 0).all()
        assert n == 1 or found.diff().max() <= n // 7 + 1
    assert not len(sampled.places(0, 8, torch.device("cpu")))


def test_nothing_is_computed_before_a_way_has_run_and_the_truth_once(monkeypatch):
    def refuse(*a):
        raise AssertionError("computed too early")

    x, members = some(12, 40), projections(40, 24, (4,))
    real = sampled.product
    monkeypatch.setattr(sampled, "product", refuse)
    exact = sampled.forward(x, members, [None])
    (m,) = members
    part = ProjectionGrad(some(12, 24), m.w, m.A, m.B, some(12, 4), None, 1.0, 0.0, True, True)
    sampled.backward(x, [part], True)
    sampled.infer(x, m.weight, None, m.A, m.B, 1.0, False)
    sampled.mixed(x, m.weight, None, [Adapter(m.A, m.B, 1.0)], SampleIndex([0] * 12, 1))
    calls = []
    monkeypatch.setattr(sampled, "product", lambda *a: calls.append(1) or real(*a))
    y, s = some(12, 24), some(12, 4)
    exact([(y, s, None)])
    count = len(calls)
    exact([(y, s, None)])
    assert count and len(calls) == count


def test_autocast_narrows_nothing():
    x, (m,) = some(12, 40), projections(40, 24, (4,))
    s = reference.shrink(x, m.A, m.scale)
    result = [(reference.linear(x, m.weight, s, m.B, m.bias), s, None)]
    with torch.autocast("cpu", torch.bfloat16):
        same(sampled.forward(x, [m], [None])(result))
        same(sampled.forward(x.float().double(), [m], [None])(result)[1:])


# ----------------------------------------------------------------------- prefix attention


def attended(five, rule, needs):
    """[O, *gradients for a gradient of O that is O itself], from the reference and autograd."""
    leaves = [t.detach().requires_grad_() for t in five]
    o, _ = prefix_reference.attend(
        *leaves, scale=rule.scale, softcap=rule.softcap, sinks=rule.sinks, causal=rule.causal,
        q_offset=rule.offset, window=rule.window, keep=rule.keep, no_prefix=rule.no_prefix,
    )  # fmt: skip
    wanted = [t for t, need in zip(leaves, needs or (), strict=False) if need]
    grads = torch.autograd.grad(o, wanted, o.detach()) if wanted else ()
    return [o.detach(), *grads]


def sinks_of(H):
    return torch.linspace(-1.0, 2.0, H, dtype=torch.float64)


RULES = {
    "causal": {},
    "both ways": {"causal": False},
    "later queries": {"offset": 3},
    "an offset on the device": {"offset": torch.tensor(2)},
    "an offset for each row": {"offset": torch.tensor([0, 3, 1])},
    "a window": {"window": 4},
    "a window that hides the prefix": {"window": 2, "offset": 4},
    "padding on the left": {"keep": "left"},
    "padding on the right": {"keep": "right", "causal": False},
    "holes": {"keep": "holes"},
    "rows without a prefix": {"no_prefix": True},
    "rows that see nothing": {"no_prefix": True, "keep": "left"},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "all": {"window": 5, "keep": "holes", "no_prefix": True, "softcap": 1.5, "sinks": True},
}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", RULES)
def test_prefix_attention(kind, shared):
    B, H, H_kv, T, S, P, D = 3, 6, 3, 11, 14, 9, 4
    told = {"causal": True, "offset": 0, **RULES[kind]}
    told["keep"] = keep_of(told.get("keep"), B, S)
    if told.get("no_prefix"):
        told["no_prefix"] = torch.tensor([True, False, True])
    if told.get("sinks"):
        told["sinks"] = sinks_of(H)
    rule = Rule(0.7, **told)
    five = tuple(
        t.detach() for t in prefix_tensors(B, H, H_kv, T, S, P, D, shared=shared, sharp=2.0)
    )
    before = [t.clone() for t in five]
    needs = (True,) * 5
    result = attended(five, rule, needs)
    exact = prefix_sampled.attention(five, rule, needs)
    samples = exact(result)
    assert same(samples) == ["O", *prefix_sampled.NAMES]
    assert all(map(torch.equal, five, before))
    kept = [t.contiguous() for t in result]  # corners: the last of each, whatever is shared
    for i, output in enumerate(kept):
        output.view(-1)[-1] += 1.0
        changed = prefix_sampled.attention(five, rule, needs)(kept)
        assert (changed[i].got != samples[i].got).any(), samples[i].name
        output.view(-1)[-1] -= 1.0
    assert same(prefix_sampled.attention(five, rule, None)(result[0])) == ["O"]


@pytest.mark.parametrize("needs", ["q", "p", "kv", "w", "v p"])
def test_the_gradients_that_are_asked_for(needs):
    five = tuple(t.detach() for t in prefix_tensors(2, 4, 2, 9, 9, 5, 4))
    needs = tuple(
        any(letter in needs for letter in letters) for letters in ("q", "k", "v", "p", "pw")
    )
    result = attended(five, Rule(0.7, True, 0), needs)
    names = [n for n, need in zip(prefix_sampled.NAMES, needs, strict=True) if need]
    exact = prefix_sampled.attention(five, Rule(0.7, True, 0), needs)
    assert same(exact(result)) == ["O", *names]
    off, where = race._error(exact(result[:-1]))
    assert off == float("inf") and where == "shape"


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_what_no_query_sees_may_be_anything(softcap):
    B, H, T, P, D = 2, 2, 6, 3, 4
    five = [t.detach() for t in prefix_tensors(B, H, H, T, T, P, D)]
    keep = keep_of("left", B, T)
    for t in five[1:3]:
        t[~keep[:, None].expand(B, H, T)] = float("nan")
    rule, needs = Rule(0.7, True, 0, keep, softcap=softcap), (True,) * 5
    for name, _, exact, size in prefix_sampled.attention(tuple(five), rule, needs)(
        [torch.ones_like(t) for t in (five[0], *five)]
    ):
        assert exact.isfinite().all() and size < float("inf"), name


def test_gradients_of_many_scores_are_left_to_the_comparison_with_another_way(monkeypatch):
    monkeypatch.setattr(prefix_sampled, "MOST_SCORES", 2 * 2 * 9 * 14)
    for T, names in ((9, prefix_sampled.NAMES), (10, ("dQ",))):
        five = tuple(t.detach() for t in prefix_tensors(2, 4, 2, T, 9, 5, 4))
        rule, needs = Rule(0.7, False, 0), (True,) * 5
        found = same(prefix_sampled.attention(five, rule, needs)(attended(five, rule, needs)))
        assert found == ["O", *names]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_saturated_head_is_not_wrong(dtype):
    """All weight on one key: score gradients are differences of nearly equal numbers, and exact
    arithmetic on rounded outputs is far from the truth, in units of that."""
    five = [t.detach() for t in prefix_tensors(2, 2, 2, 12, 12, 4, 16, sharp=12.0)]
    five = tuple(t.to(dtype).double() for t in five)
    rule, needs = Rule(1.0, True, 0), (True,) * 5
    o, *_ = attended(five, rule, needs)
    rounded = o.to(dtype).double()
    leaves = [t.requires_grad_() for t in five]
    out, lse = prefix_reference.attend(*leaves, scale=1.0, q_offset=0)
    # as kernels do: δ of the rounded output
    delta = (rounded * rounded).sum(-1) - (rounded * out.detach()).sum(-1)
    grads = torch.autograd.grad([out, lse], leaves, [rounded, -delta])
    result = [t.to(dtype) for t in (rounded, *grads)]
    five = tuple(t.detach() for t in five)
    samples = prefix_sampled.attention(five, rule, needs)(result)
    by_norm = max(race._error([s._replace(size=0.0)])[0] for s in samples)
    limit = race.LIMITS[dtype]
    assert race._error(samples)[0] < limit
    assert by_norm > limit  # what it would be otherwise
    spoilt = [result[0], *(1.5 * t for t in result[1:])]
    assert race._error(prefix_sampled.attention(five, rule, needs)(spoilt))[0] > limit


def test_numbers_below_the_dtypes_smallest_are_not_wrong():
    exact = some(8, 64) * 1e-6
    sample = sampled.Sample("dX", exact.half(), exact)
    relative = ((sample.got.double() - exact).norm() / exact.norm()).item()
    assert relative > race.LIMITS[torch.float16] > race._error([sample])[0]
    assert race._error([sample._replace(got=torch.zeros(8, 64))])[0] > race.LIMITS[torch.float16]
