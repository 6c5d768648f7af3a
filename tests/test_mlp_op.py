"""lora_mlp against its formula in float64: values, gradients, kept tensors, errors."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from peftkern.ops import lora_mlp as module
from peftkern.ops import mlp_torch
from peftkern.ops.bits import pack_bits
from peftkern.ops.lora_mlp import lora_mlp
from peftkern.ops.mlp_parts import Member, Shrink, ShrinkGrad
from peftkern.ops.projection import Plain, Projection
from tests.closeness import assert_as_good_as_torch, assert_same_number

K, WIDTH, N, R = 6, 40, 5, 3
ACTS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def leaf(*shape: int, g: torch.Generator, dtype: torch.dtype, trains: bool = True) -> Tensor:
    drawn = torch.randn(*shape, generator=g, dtype=torch.float64) / shape[-1] ** 0.5
    return drawn.to(dtype).requires_grad_(trains)


def parts(
    kind: str = "gated",
    adapted: tuple[bool, bool, bool] = (True, True, True),
    p: float = 0.0,
    bias: bool = False,
    transposed: bool = False,
    dtype: torch.dtype = torch.float64,
    low: torch.dtype | None = None,
) -> tuple[list[Projection | Plain], bool]:
    """([gate, up, down] with what ``kind`` has of them, packed)."""
    g = torch.Generator().manual_seed(7)
    shapes = {"gated": [(WIDTH, K), (WIDTH, K), (N, WIDTH)], "packed": [(2 * WIDTH, K), (N, WIDTH)]}
    shapes["plain"] = [(WIDTH, K), (N, WIDTH)]
    which = adapted if kind == "gated" else (adapted[0], adapted[2])
    found: list[Projection | Plain] = []
    for i, ((n, k), has) in enumerate(zip(shapes[kind], which, strict=True)):
        w = leaf(*((k, n) if transposed else (n, k)), g=g, dtype=dtype, trains=False)
        b = leaf(n, g=g, dtype=dtype) if bias else None
        if has:
            A, B = (leaf(*s, g=g, dtype=low or dtype) for s in ((R + i, k), (n, R + i)))
            found.append(Projection(w, b, A, B, 0.5 + i, p, transposed))
        else:
            found.append(Plain(w, b, transposed))
    return found, kind == "packed"


def call(x: Tensor, found: list[Projection | Plain], act: str, packed: bool) -> Tensor:
    up = found[1] if len(found) == 3 else None
    return lora_mlp(x, found[0], up, found[-1], act, packed)


def formula(x: Tensor, found: list[Projection | Plain], act: str, packed: bool) -> Tensor:
    """The definition with torch's own operations and dropout, in the order gate, up, down."""

    def apply(x: Tensor, part: Projection | Plain) -> Tensor:
        y = F.linear(x, part.w.t(), part.bias)
        if isinstance(part, Plain):
            return y
        dropped = F.dropout(x.to(part.A.dtype), part.p)
        return (y + F.linear(F.linear(dropped, part.A), part.B) * part.scale).to(x.dtype)

    *inner, down = found
    outputs = [apply(x, part) for part in inner]
    if packed:
        outputs = list(outputs[0].chunk(2, -1))
    h = ACTS[act](outputs[0])
    return apply(h * outputs[1] if len(outputs) > 1 else h, down)


def numbers(run, x: Tensor, found, act: str, packed: bool) -> dict[str, Tensor]:
    leaves = [x] if x.requires_grad else []
    leaves += [t for part in found for t in part.tensors if t is not None and t.requires_grad]
    torch.manual_seed(3)
    y = run(x, found, act, packed)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).cos().to(y.dtype)
    grads = torch.autograd.grad(y, leaves, weights.view_as(y))
    return {"y": y.detach(), **{str(i): grad for i, grad in enumerate(grads)}}


SUBSETS = [s for s in itertools.product((True, False), repeat=3) if any(s)]


@pytest.mark.parametrize("adapted", SUBSETS, ids=str)
@pytest.mark.parametrize("kind", ["gated", "packed", "plain"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_any_subset_follows_the_formula(adapted, kind, p):
    for bias, transposed, act in [(False, False, "silu"), (True, True, "gelu_tanh")]:
        found, packed = parts(kind, adapted, p, bias, transposed)
        x = leaf(2, 7, K, g=torch.Generator().manual_seed(1), dtype=torch.float64)
        assert_same_number(
            numbers(call, x, found, act, packed), numbers(formula, x, found, act, packed)
        )


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_every_activation(act, kind):
    found, packed = parts(kind)
    x = leaf(9, K, g=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_same_number(
        numbers(call, x, found, act, packed), numbers(formula, x, found, act, packed)
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("dtype", "low"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_errors_are_not_above_torchs(dtype, low, act, p):
    found, packed = parts(p=p, bias=True, dtype=dtype, low=low)
    x = leaf(64, K, g=torch.Generator().manual_seed(1), dtype=dtype)
    exact, _ = parts(p=p, bias=True, dtype=torch.float64)
    for part, other in zip(exact, found, strict=True):
        for t, u in zip(part.tensors, other.tensors, strict=True):
            t.data.copy_(u)
    wide = x.detach().double().requires_grad_()
    assert_as_good_as_torch(
        numbers(call, x, found, act, packed),
        numbers(formula, x, found, act, packed),
        numbers(formula, wide, exact, act, packed),
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["gated", "packed", "plain"])
def test_second_derivatives(kind, p):
    found, packed = parts(kind, (True, False, True), p, bias=True)
    x = leaf(3, K, g=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [x, *(t for m in found for t in m.tensors if t is not None and t.requires_grad)]

    def run(*_: Tensor) -> Tensor:
        torch.manual_seed(1)
        return call(x, found, "gelu", packed)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", ["gated", "packed", "plain"])
def test_gradients_of_a_batch_of_outputs(act, kind):
    found, packed = parts(kind, (True, True, True), 0.0, bias=True)
    x = leaf(3, K, g=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [x, *(t for m in found for t in m.tensors if t is not None and t.requires_grad)]
    y = call(x, found, act, packed)
    dys = torch.eye(y.numel(), dtype=y.dtype).view(y.numel(), *y.shape)
    at_once = torch.autograd.grad(y, leaves, dys, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
    for i, grads in enumerate(zip(*each, strict=True)):
        assert_same_number(at_once[i], torch.stack(grads))


@pytest.mark.parametrize("kept", ["mm", "addmm", "silu", "mul"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_selective_checkpoints_may_keep_any_output(kept, p):
    found, packed = parts("gated", (True, True, True), p, bias=kept == "addmm")
    x = leaf(40, K, g=torch.Generator().manual_seed(1), dtype=torch.float64)
    aten = torch.ops.aten
    ops = [{"mul": aten.mul.Tensor}.get(kept) or getattr(aten, kept).default]

    def kept_by_a_checkpoint(*given):
        contexts = partial(create_selective_checkpoint_contexts, ops)
        return checkpoint(call, *given, use_reentrant=False, context_fn=contexts)

    want = numbers(call, x, found, "silu", packed)
    assert_same_number(numbers(kept_by_a_checkpoint, x, found, "silu", packed), want)


@pytest.mark.parametrize("kind", ["gated", "packed"])
def test_only_wanted_gradients_are_computed(kind, monkeypatch):
    asked = []
    middle, backend = module._backend.middle(), module._backend.active
    inner, outer = middle.backward, backend.backward

    def middle_backward(gate, up, act, down, members, copied=False):
        asked.append((down.needs_a, down.needs_b, *(m.s is not None for m in members)))
        made, db = inner(gate, up, act, down, members, copied)
        assert (made.da is not None, db is not None) == asked[-1][:2]
        assert tuple(t is not None for t in made.dbs) == asked[-1][2:]
        return made, db

    def backward(x, members, needs_x, given=None):
        asked.append((needs_x, *(m.needs_a for m in members)))
        return outer(x, members, needs_x, given)

    monkeypatch.setattr(middle, "backward", middle_backward)
    monkeypatch.setattr(backend, "backward", backward)
    leaves = 2 * (3 if kind == "gated" else 2)
    for trained in (*range(leaves), None):
        found, packed = parts(kind, p=0.3)
        adapters = [t for m in found for t in (m.A, m.B)]
        for i, t in enumerate(adapters):
            t.requires_grad_(i == trained)
        x = leaf(4, K, g=torch.Generator().manual_seed(1), dtype=torch.float64)
        asked.clear()
        ours = numbers(call, x, found, "silu", packed)
        assert_same_number(ours, numbers(formula, x, found, "silu", packed))
        flags = [i == trained for i in range(leaves)]
        down = tuple(flags[-2:])
        if kind == "gated":
            assert asked == [(*down, flags[1], flags[3]), (True, flags[0], flags[2])]
        else:
            assert asked == [(*down, flags[1], flags[1]), (True, flags[0])]
        # nothing before the MLP needs a gradient
        x.requires_grad_(False)
        if trained is not None:
            asked.clear()
            ours = numbers(call, x, found, "silu", packed)
            assert_same_number(ours, numbers(formula, x, found, "silu", packed))
            if trained >= leaves - 2:  # down alone trains: what is before it keeps nothing
                assert not asked or asked == [(False, trained == leaves - 2)]


def kept(run, own: list[Tensor]) -> dict[int, int]:
    """{address: bytes} of the storages kept for a backward, those of ``own`` excluded."""
    known = {t.untyped_storage().data_ptr() for t in own}
    found = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    sizes = {at: storage.nbytes() for at, storage in found.items()}
    del y
    return sizes


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["gated", "packed", "plain"])
def test_keeps_the_outputs_of_gate_and_up_s_and_bits(kind, p):
    M = 64
    found, packed = parts(kind, p=p, dtype=torch.float32)
    weights = [t for m in found for t in m.tensors if t is not None]
    x = leaf(M, K, g=torch.Generator().manual_seed(1), dtype=torch.float32)
    ours = kept(lambda: call(x, found, "silu", packed), [*weights, x])
    outputs = (
        [M * WIDTH]
        if kind == "plain"
        else [M * WIDTH, M * WIDTH]
        if kind == "gated"
        else [2 * M * WIDTH]
    )
    sizes = [4 * n for n in outputs] + [4 * M * m.A.shape[0] for m in found]
    if p:  # one bit an element of the inputs, in words of 32
        sizes += [4 * M * -(-m.A.shape[1] // 32) for m in found]
    assert sorted(ours.values()) == sorted(sizes)
    theirs = kept(lambda: formula(x, found, "silu", packed), [*weights, x])
    assert sum(theirs.values()) > 1.5 * sum(ours.values())


def test_inputs_are_never_written_to():
    for kind in ("gated", "packed"):
        found, packed = parts(kind, p=0.3)
        x = leaf(4, K, g=torch.Generator().manual_seed(1), dtype=torch.float64)
        tensors = [x, *(t for m in found for t in m.tensors if t is not None)]
        before = [t.detach().clone() for t in tensors]
        y = call(x, found, "silu", packed)
        dy = torch.ones_like(y)
        grads = torch.autograd.grad(y, x, dy, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        assert torch.equal(dy, torch.ones_like(y))
        assert torch.equal(torch.autograd.grad(y, x, dy)[0], grads[0])  # a second backward


def test_without_gradients():
    for kind, p in itertools.product(("gated", "packed", "plain"), (0.0, 0.3)):
        found, packed = parts(kind, p=p)
        x = torch.randn(2, 3, K, dtype=torch.float64)
        with torch.no_grad():
            results = []
            for run in (call, formula):
                torch.manual_seed(3)
                results.append(run(x, found, "silu", packed))
        assert_same_number(*results)


@pytest.mark.parametrize("given", [torch.float32, torch.float64], ids=str)
def test_autocast(given):
    found, packed = parts(p=0.3, dtype=torch.float32)
    x = leaf(5, K, g=torch.Generator().manual_seed(1), dtype=given)
    if given == torch.float64:
        found, packed = parts(p=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        ours = numbers(call, x, found, "silu", packed)
    if given == torch.float64:  # float64 stays, as in torch's own products
        assert_same_number(ours, numbers(formula, x, found, "silu", packed))
        return
    narrow = [
        m._replace(**{n: getattr(m, n).bfloat16() for n in ("weight", "A", "B")}) for m in found
    ]
    torch.manual_seed(3)
    assert ours["y"].dtype == torch.bfloat16
    assert torch.equal(ours["y"], call(x.bfloat16(), narrow, "silu", packed))
    assert all(grad.dtype == torch.float32 for name, grad in ours.items() if name != "y")


def test_the_middle_alone():
    """The two functions that kernels compute too, against autograd of the formula."""
    g = torch.Generator().manual_seed(2)
    gate, up, A, Bg, Bu = (
        leaf(*s, g=g, dtype=torch.float64)
        for s in ((8, WIDTH), (8, WIDTH), (R, WIDTH), (WIDTH, R), (WIDTH, R + 1))
    )
    keep = torch.rand(8, WIDTH, generator=g) < 0.7
    for act, gated, masked in itertools.product(ACTS, (True, False), (True, False)):
        mask = keep.double() if masked else torch.ones(8, WIDTH, dtype=torch.float64)
        bits = pack_bits(keep) if masked else None
        second = up if gated else None
        h = ACTS[act](gate) * (up if gated else 1.0)
        s = (h * mask) @ A.t() * 1.5
        with torch.no_grad():
            found = mlp_torch.activate(gate, second, act, Shrink(A, 1.5, bits))
        assert_same_number(found, (h, s))
        ds = torch.randn(8, R, generator=g, dtype=torch.float64)
        dh = torch.randn(8, WIDTH, generator=g, dtype=torch.float64)
        wanted = [gate, up] if gated else [gate]
        inner = torch.autograd.grad(h, wanted, dh, retain_graph=True)
        members = (
            Member(Bg, torch.randn(8, R, generator=g, dtype=torch.float64), 0.7),
            Member(Bu, None, 1.1) if gated else None,
        )
        before = dh.clone()
        with torch.no_grad():
            made = mlp_torch.activate_grad(
                dh, gate, second, act, ShrinkGrad(ds, bits, torch.float64), members
            )
        assert torch.equal(dh, before)
        assert_same_number([made.dgate, made.da], [inner[0], ds.t() @ (h * mask)])
        assert_same_number(made.ds[0], inner[0] @ Bg * 0.7)
        assert_same_number(made.dbs[0], inner[0].t() @ members[0].s)
        if gated:
            assert_same_number([made.dup, made.ds[1]], [inner[1], inner[1] @ Bu * 1.1])
        else:
            assert made.dup is None and made.ds[1] is None
        assert made.dbs[1] is None


def test_bad_arguments_are_refused():
    found, _ = parts()
    x = torch.randn(3, K, dtype=torch.float64)
    with pytest.raises(
        ValueError, match="act is 'tanh'; allowed: silu, gelu, gelu_tanh, relu, relu2"
    ):
        lora_mlp(x, *found, "tanh")
    with pytest.raises(ValueError, match="up must be None"):
        lora_mlp(x, *found, "silu", packed=True)
    weight = found[0].weight.clone().requires_grad_()
    with pytest.raises(ValueError, match="a weight requires a gradient; allowed: frozen weights"):
        lora_mlp(x, found[0]._replace(weight=weight), *found[1:], "silu")
