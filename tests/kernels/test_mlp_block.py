"""lora_mlp on the Triton backend and on the dispatcher, in Triton's interpreter."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.ops import mlp_kernels, mlp_torch, tuned
from peftkern.ops.lora import lora_linear
from peftkern.ops.lora_group import lora_group
from peftkern.ops.lora_mlp import lora_mlp
from peftkern.ops.projection import Plain, Projection
from tests.closeness import assert_as_good_as_torch

M, K, WIDTH, N, R = 12, 24, 40, 16, 4
WAYS = ("torch", "kernels")


def drawn(kind="gated", adapted=(True, True, True), p=0.0, dtype=torch.float32, low=None):
    """([gate, up, down] with what ``kind`` has of them, packed)."""
    g = torch.Generator().manual_seed(0)

    def some(*shape, dtype, trains=True):
        t = torch.randn(*shape, generator=g) / shape[-1] ** 0.5
        return t.to(dtype).requires_grad_(trains)

    shapes = {"gated": [(WIDTH, K), (WIDTH, K), (N, WIDTH)], "packed": [(2 * WIDTH, K), (N, WIDTH)]}
    shapes["plain"] = [(WIDTH, K), (N, WIDTH)]
    which = adapted if kind == "gated" else (adapted[0], adapted[2])
    found = []
    for (n, k), has in zip(shapes[kind], which, strict=True):
        w, b = some(n, k, dtype=dtype, trains=False), some(n, dtype=dtype)
        if has:
            A, B = some(R, k, dtype=low or dtype), some(n, R, dtype=low or dtype)
            found.append(Projection(w, b, A, B, 2.0, p, False))
        else:
            found.append(Plain(w, b, False))
    return found, kind == "packed"


def step(x, found, packed=False, act="silu", seed=1):
    torch.manual_seed(seed)
    up = found[1] if len(found) == 3 else None
    y = lora_mlp(x, found[0], up, found[-1], act, packed)
    leaves = [x, *(t for m in found for t in m.tensors if t is not None and t.requires_grad)]
    dy = torch.linspace(-1, 1, y.numel()).cos().view(y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, leaves, dy)
    return {"y": y.detach(), **{str(i): t for i, t in enumerate(grads)}}


def rows(dtype=torch.float32):
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(5)).to(dtype)
    return x.requires_grad_()


def wide(found):
    def one(t):
        return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

    return [m._replace(**{n: one(getattr(m, n)) for n in m._fields[:4] if n in (
        "weight", "bias", "A", "B")}) for m in found]  # fmt: skip


@pytest.mark.parametrize("kind", ["gated", "packed", "plain"])
@pytest.mark.parametrize(
    ("dtype", "low"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_the_kernels_are_as_good_as_torch(kind, dtype, low):
    subsets = [(True, True, True), (True, False, True), (False, False, True), (True, False, False)]
    for adapted, act in itertools.product(subsets, ("silu", "gelu_tanh")):
        found, packed = drawn(kind, adapted, dtype=dtype, low=low)
        x = rows(dtype)
        with peftkern.use_backend("triton"):
            ours = step(x, found, packed, act)
        with peftkern.use_backend("torch"):
            theirs = step(x, found, packed, act)
            exact = step(x.detach().double().requires_grad_(), wide(found), packed, act)
        assert_as_good_as_torch(ours, theirs, exact)


def test_float64_goes_to_torch():
    found, packed = drawn(dtype=torch.float64)
    with peftkern.use_backend("triton"):
        ours = step(rows(torch.float64), found, packed)
    with peftkern.use_backend("torch"):
        theirs = step(rows(torch.float64), found, packed)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("chosen", ["triton", "auto"])
def test_masks_are_those_of_separate_operations(clock, chosen, reentrant):
    """Also in the first pass of a reentrant checkpoint, which has no gradients.

    All numbers are small and whole, so that every order of sums gives the same bits.
    """
    clock.fastest = "kernels"
    g = torch.Generator().manual_seed(0)

    def some(*shape, trains=True):
        return torch.randint(-1, 2, shape, generator=g).float().requires_grad_(trains)

    x, shapes = some(M, K), [(WIDTH, K), (WIDTH, K), (N, WIDTH)]
    parts = [
        Projection(some(n, k, trains=False), None, some(R, k), some(n, R), 2.0, 0.5, False)
        for n, k in shapes
    ]
    leaves = [x, *(t for m in parts for t in (m.A, m.B))]

    def separate(x):
        gate, up = lora_group(x, parts[:2])
        return lora_linear(F.relu(gate) * up, *parts[2])

    def block(x):
        return lora_mlp(x, *parts, "relu")

    def numbers(run):
        torch.manual_seed(3)
        y = run(x)
        dy = (torch.arange(y.numel()) % 3 - 1.0).view(y.shape)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    with peftkern.use_backend(chosen):
        want = numbers(separate)
        assert all(torch.equal(*pair) for pair in zip(numbers(block), want, strict=True))
        torch.manual_seed(3)
        y = checkpoint(block, x, use_reentrant=reentrant)
        y.backward((torch.arange(y.numel()) % 3 - 1.0).view(y.shape))
    assert torch.equal(y, want[0])
    assert all(torch.equal(t.grad, w) for t, w in zip(leaves, want[1:], strict=True))


@pytest.fixture
def middles(monkeypatch):
    """(operation, way) of the middles that the dispatcher ran."""
    seen = []
    for name, way in (("torch", mlp_torch), ("kernels", mlp_kernels)):
        for op in ("forward", "backward"):
            real = getattr(way, op)

            def spy(*args, real=real, op=op, name=name):
                seen.append((op, name))
                return real(*args)

            monkeypatch.setattr(way, op, spy)
    return seen


@pytest.mark.parametrize("fastest", WAYS)
@pytest.mark.parametrize("kind", ["gated", "packed", "plain"])
def test_the_fastest_middle_is_taken_and_raced_once(clock, middles, fastest, kind):
    clock.fastest = fastest
    for adapted, p in (((True, True, True), 0.3), ((True, False, False), 0.0)):
        found, packed = drawn(kind, adapted, p)
        middles.clear()
        first = step(rows(), found, packed)
        assert set(middles) == set(itertools.product(("forward", "backward"), WAYS))
        races = clock.races
        middles.clear()
        again = step(rows(), found, packed)
        assert middles == [("forward", fastest), ("backward", fastest)] and clock.races == races
        assert all(torch.equal(first[k], again[k]) for k in first)
        if p == 0.0:
            with peftkern.use_backend("torch"):
                theirs = step(rows(), found, packed)
                exact = step(rows().detach().double().requires_grad_(), wide(found), packed)
            assert_as_good_as_torch(first, theirs, exact)
    keys = [k for k in tuned.book(-1).cached.entries if k.op.startswith("mlp")]
    assert {(k.op, k.n, k.k, k.r) for k in keys} >= {
        ("mlp_forward", N, WIDTH, R),
        ("mlp_backward", N, WIDTH, R),
        ("mlp_forward", N, WIDTH, 0),
    }


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_wrong_middle_is_left_out(clock, monkeypatch, op, wrong):
    """Of the first output, or of one that only an adapter's gradient shows."""
    clock.fastest = "kernels"
    real = getattr(mlp_kernels, op)

    def broken(*args):
        result = real(*args)
        if op == "forward":
            result[wrong].mul_(1.1)
        else:
            (result[0].dgate if wrong == 0 else result[0].dbs[1]).mul_(1.1)
        return result

    monkeypatch.setattr(mlp_kernels, op, broken)
    found, packed = drawn(p=0.3)
    step(rows(), found, packed)
    [decision] = [d for k, d in tuned.book(-1).decisions.items() if k.op == f"mlp_{op}"]
    assert decision.how == "torch" and "without kernels" in decision.why


def test_what_the_kernels_do_not_take_draws_torchs_masks(clock):
    found, packed = drawn(p=0.4, dtype=torch.float64)
    ours = step(rows(torch.float64), found, packed)
    with peftkern.use_backend("torch"):
        theirs = step(rows(torch.float64), found, packed)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert clock.races == 0
