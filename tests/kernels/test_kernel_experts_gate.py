"""A mixture's gate: H with the S of down, and all gradients through H, for rows sorted by expert.

Repeated runs give the same bits.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.kernels.experts_gate import QWEN3
from benchmarks.kernels.experts_gate_grad import launches
from peftkern.kernels import experts_gate_reference as exact
from peftkern.kernels.bits import pack_bits
from peftkern.kernels.common import Arch, arch_of
from peftkern.kernels.experts_gate import ExpertsGateConfig, gate
from peftkern.kernels.experts_gate_grad import ExpertsGateGradConfig, fits, gate_grad
from peftkern.kernels.experts_gates import LAYOUTS, Clamp
from peftkern.kernels.experts_route import route as make_route
from peftkern.kernels.mlp_arguments import ACTIVATIONS
from tests.kernels.oracle import (
    DTYPES,
    assert_as_good_as_torch,
    blas,
    far_rows,
    few,
    keep_mask,
    matrix,
)

pytestmark = pytest.mark.numeric  # of `make test-versions`

GPT_OSS, DEEPSEEK = Clamp(1.702, 1.5, 1.0), Clamp(1.0, 1.0, 0.0)  # limits that values reach


def routed(T, k, experts, block_m=16, seed=0, only=None, beyond=False, adapters=1):
    """A route whose tokens have k different experts; ``only``: one of them has all tokens.

    ``beyond``: some pairs belong to an expert that is not here.
    """
    g = torch.Generator().manual_seed(seed)
    there = experts + 2 if beyond else experts
    index = torch.rand(T, there, generator=g).argsort(1)[:, :k]
    if only is not None:
        index = torch.full((T, k), only)
    choice = torch.randint(0, adapters, (T,), generator=g) if adapters > 1 else None
    return make_route(index.clamp(max=experts), experts, block_m, choice, adapters)


def cube(E, rows, columns, dtype, seed, peft=False):
    """[E, rows, columns]; ``peft``: a view in the strides of PEFT's lora_B."""
    t = matrix(rows, columns * E, dtype, seed=seed)
    if peft:
        return t.view(rows, columns, E).permute(2, 0, 1)
    return t.reshape(rows, E, columns).permute(1, 0, 2)


def known(route, *rows):
    """The rows that a group has."""
    last = int(route.offsets[-1])
    return [t[:last] for t in rows]


class Step(NamedTuple):
    """Operands of both directions; r is 0 without adapters."""

    dh: torch.Tensor
    gu: torch.Tensor
    route: object
    name: str
    layout: str
    weights: torch.Tensor
    a: torch.Tensor | None
    b: torch.Tensor | None
    s: torch.Tensor | None
    keep: torch.Tensor | None
    clamp: Clamp | None
    ds_down: torch.Tensor | None

    @classmethod
    def draw(cls, route, width, r, name="silu", layout="halves", dtype=torch.float32,
             adapter=torch.float32, mask=False, clamp=None, sums=True, down=None):  # fmt: skip
        """``down``: the rank of dS', None for r."""
        P, E, down = route.P, route.experts, r if down is None else down
        N = width if layout == "alone" else 2 * width
        return cls(
            matrix(P, width, dtype, seed=0, offset=2),
            matrix(P, N, dtype, seed=1, offset=1, scale=2.0),
            route, name, layout,
            matrix(P // route.k, route.k, torch.float32, seed=2),
            cube(E, r, width, adapter, 3) if r else None,
            cube(E, N, r, adapter, 4, peft=True) if r else None,
            matrix(P, r, dtype, seed=5, offset=1) if r and sums else None,
            keep_mask(P, width, 6) if mask and (r or down) else None,
            clamp,
            matrix(P, down, dtype, seed=7, offset=1) if down else None,
        )  # fmt: skip

    def check_forward(self, config=None):
        a = None if self.a is None else [self.a]
        keep = self.keep if a is not None else None
        words = None if keep is None else pack_bits(keep)
        gate_of = self.gu, self.route, self.name, self.layout

        def run():
            return gate(*gate_of, a, 1.5, words, clamp=self.clamp, config=config)

        h, s = run()
        torchs = exact.hidden(*gate_of[:1], *gate_of[2:], self.clamp)
        exact_h, exact_s = exact.gate(*gate_of, a, [1.5], self.keep, self.clamp)
        assert h.dtype == self.gu.dtype
        assert_as_good_as_torch(*known(self.route, h, torchs, exact_h))
        again = run()
        assert torch.equal(*known(self.route, h, again[0])), "two runs differ"
        assert (s is None) == (a is None)
        if a is not None:
            kept = torchs if self.keep is None else torchs * self.keep
            low = by_group(kept, self.route, self.a.transpose(1, 2), 1.5)
            assert s.dtype == h.dtype
            ours, wanted = known(self.route, s, exact_s)
            assert_as_good_as_torch(ours, [known(self.route, t)[0] for t in low], wanted)
            assert torch.equal(*known(self.route, s, again[1])), "two runs differ"

    def check_backward(self, config=None):
        gate_of = self.dh, self.gu, self.route, self.name, self.layout, self.weights
        adapter = self.b, self.s, 2.0
        down, keep = self.ds_down, self.keep if self.ds_down is not None else None
        words = None if keep is None else pack_bits(keep)

        def run():
            return gate_grad(
                *gate_of, *adapter, ds_down=down, bits=words, clamp=self.clamp, config=config
            )

        ours, again = run(), run()
        wanted = exact.gate_grad(*gate_of, *adapter, self.clamp, down, keep)
        torchs = self.by_torch()
        assert [t is None for t in ours] == [t is None for t in wanted]
        names = ("dgu", "dw", "ds", "db", "da")
        for name, o, t, e, o2 in zip(names, ours, torchs, wanted, again, strict=True):
            if o is None:
                continue
            assert o.dtype == (torch.float32 if name in ("dw", "db", "da") else self.gu.dtype)
            if name == "dgu":
                o, e, o2, t = known(self.route, o, e, o2, t)
            if name == "ds":
                o, e, o2, *t = known(self.route, o, e, o2, *t)
            assert torch.equal(o, o2), f"two runs differ in {name}"
            # in a sum of so few numbers the order alone can double the largest error
            assert_as_good_as_torch(o, t, e, average=name != "dgu")

    def by_torch(self):
        """The separate operations of torch in the operands' dtype, sums in two orders."""
        leaf = self.gu.clone().requires_grad_()
        h = exact.hidden(leaf, self.name, self.layout, self.clamp)
        w = self.weights.reshape(-1)[self.route.pairs.long()]
        dh = self.dh * w[:, None].to(self.dh.dtype)
        [dgu] = torch.autograd.grad(h, leaf, dh)
        h, last = h.detach(), int(self.route.offsets[-1])
        dw = torch.zeros(self.route.P)
        dw[self.route.pairs.long()[:last]] = (self.dh * h)[:last].sum(1).float()
        dgu = torch.cat([dgu[:last], torch.zeros_like(dgu[last:])])
        ds = None if self.b is None else by_group(dgu, self.route, self.b, 2.0)
        db = None if self.s is None else torch.zeros(self.b.shape)
        da = None
        if self.ds_down is not None:
            da = torch.zeros(self.route.experts, self.ds_down.shape[1], h.shape[1])
            down = (self.ds_down * w[:, None]).to(h.dtype)
            kept = h if self.keep is None else h * self.keep
        for e, rows in enumerate(segments(self.route)):
            if db is not None:
                db[e] = (dgu[rows].T @ self.s[rows]).float()
            if da is not None:
                da[e] = (down[rows].T @ kept[rows]).float()
        return dgu, dw, ds, db, da


def segments(route):
    return [slice(*pair) for pair in itertools.pairwise(route.offsets.tolist())]


def by_group(x, route, rights, scale):
    """scale * x[rows] @ rights[e] in two orders of sums, torch's and that of tiles."""
    found = [x.new_zeros((x.shape[0], rights.shape[2])) for _ in range(2)]
    for e, rows in enumerate(segments(route)):
        right = rights[e].to(x.dtype)
        found[0][rows] = scale * (x[rows] @ right)
        steps = [blas(x[rows, k : k + 32], right[k : k + 32]) for k in range(0, x.shape[1], 32)]
        found[1][rows] = (scale * sum(steps)).to(x.dtype)
    return found


@pytest.mark.parametrize(
    "layout, dtype",
    [*(("halves", d) for d in DTYPES), ("interleaved", torch.bfloat16), ("alone", torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_gate_both_ways(name, layout, dtype):
    step = Step.draw(routed(9, 3, 5), 75, 5, name, layout, dtype, mask=True)
    step.check_forward()
    step.check_backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "clamp, layout", [(GPT_OSS, "interleaved"), (DEEPSEEK, "halves")], ids=["gpt-oss", "deepseek"]
)
def test_clamped_gates(clamp, layout, dtype):
    step = Step.draw(routed(9, 3, 5), 75, 5, "silu", layout, dtype, mask=True, clamp=clamp)
    step.check_forward()
    step.check_backward()


def test_the_clamped_gate_is_that_of_gpt_oss():
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    experts = object.__new__(modeling.GptOssExperts)
    torch.nn.Module.__init__(experts)
    experts.alpha, experts.limit = 1.702, 7.0
    gu = matrix(9, 80, torch.float64, seed=0, scale=6.0)
    assert torch.equal(
        experts._apply_gate(gu), exact.hidden(gu, "silu", "interleaved", (1.702, 7.0, 1.0))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [1, 16, 17, 64, 129, 256])
def test_ranks(r, dtype):
    step = Step.draw(routed(10, 2, 3), 70, r, dtype=dtype, adapter=torch.float32, mask=True)
    step.check_forward()
    step.check_backward()


@pytest.mark.parametrize(
    "r, sums, down, inside, layout, mask",
    [
        (5, True, 33, True, "halves", True), (5, True, 65, False, "interleaved", True),
        (70, True, 3, True, "alone", False), (70, True, 100, True, "interleaved", True),
        (0, False, 17, True, "interleaved", True), (0, False, 256, False, "halves", False),
        (20, False, 40, True, "alone", True), (70, False, 70, False, "halves", True),
    ],
)  # fmt: skip
def test_the_ranks_of_both_linears(r, sums, down, inside, layout, mask):
    """``inside``: dA' takes no more blocks of ranks than dB and dS do; else H is written."""
    assert fits(r, sums, down, arch_of(torch.device("cpu"))) == inside
    step = Step.draw(
        routed(10, 2, 3), 70, r, "silu", layout, torch.float16, mask=mask, sums=sums, down=down
    )
    step.check_backward()


@pytest.mark.parametrize("down", [16, 17, 64, 128, 129, 256])
@pytest.mark.parametrize("r", [0, 16, 64, 256])
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_nobody_writes_h_where_it_fits(r, down, capability):
    arch = Arch(132, capability, 101376)
    for dtype in (torch.float32, torch.bfloat16):
        first, *rest = launches(QWEN3, r, "silu", arch, down=down, dtype=dtype)
        given = dict(zip(first.kernel.arg_names, first.args, strict=False))
        inside = fits(r, r > 0, down, arch, dtype.itemsize)
        assert (given["h"] is None) == (given["da"] is not None) == inside
        assert [each.kernel.__name__ for each in rest][-1:] == (
            ["_experts_grad_a_kernel"] if not inside
            else ["_experts_shrink_kernel"] if r > 32 else ["_experts_gate_sum_kernel"]
        )  # fmt: skip
        # another block of ranks would be another pass over dH and GU
        alone, *_ = launches(QWEN3, r, "silu", arch, down=0, dtype=dtype)
        assert first.grid[2] == alone.grid[2]


@pytest.mark.parametrize(
    "route",
    [
        routed(0, 2, 4), routed(1, 1, 1), routed(40, 2, 4, only=2),
        routed(12, 3, 6, beyond=True), routed(6, 2, 3, block_m=64), routed(1, 1, 3, only=3),
    ],
    ids=["no token", "one pair", "one expert", "beyond", "tall", "none"],
)  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS)
def test_routes(route, layout):
    step = Step.draw(route, 40, 4, layout=layout, mask=True)
    step.check_forward()
    step.check_backward()


def test_many_experts():
    step = Step.draw(routed(5, 8, 512), 20, 4, mask=True)
    step.check_forward()
    step.check_backward()


@pytest.mark.parametrize("down", [4, 70])
def test_experts_without_a_token_get_zeros(down):
    route = routed(30, 2, 6, only=4)
    step = Step.draw(route, 40, 4, down=down)
    found = gate_grad(*step[:6], step.b, step.s, ds_down=step.ds_down)
    for gradient in (found.db, found.da):
        assert gradient[4].any()
        gradient[4] = 0.0
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_what_no_group_has_gets_no_gradient():
    route = routed(12, 3, 6, beyond=True)
    last = int(route.offsets[-1])
    assert 0 < last < route.P
    step = Step.draw(route, 40, 4)
    found = gate_grad(*step[:6], step.b, step.s)
    assert not found.dw[route.pairs[last:].long()].any()
    assert found.dw.any() and found.ds[:last].any()


@pytest.mark.parametrize("r, sums", [(0, False), (4, False), (40, False)])
def test_what_is_not_wanted(r, sums):
    step = Step.draw(routed(10, 2, 3), 70, r, dtype=torch.float16, sums=sums, down=0)
    step.check_forward()
    step.check_backward()


@few
@given(
    T=st.integers(1, 20),
    k=st.integers(1, 8),
    experts=st.integers(8, 12),
    width=st.integers(1, 80),
    r=st.integers(0, 40),
    name=st.sampled_from(ACTIVATIONS),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    same=st.booleans(),
    mask=st.booleans(),
    split=st.integers(1, 3),
    down=st.integers(0, 40),
)
def test_any_shape(T, k, experts, width, r, name, layout, dtype, same, mask, split, down):
    adapter = dtype if same else torch.float32
    step = Step.draw(routed(T, k, experts), width, r, name, layout, dtype, adapter, mask, down=down)
    step.check_forward(ExpertsGateConfig(block_m=16, block_k=32, split_k=split))
    step.check_backward(ExpertsGateGradConfig(block_m=16, block_k=32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_of_several_adapters(dtype):
    """Each of its own rank and scale; one of them has no weights."""
    route = routed(30, 2, 3, adapters=4)
    gu = matrix(60, 160, dtype, seed=0)
    As = [
        cube(3, 5, 80, torch.float32, 1), None, cube(3, 17, 80, torch.float32, 2),
        cube(3, 80, 9, torch.float32, 3).transpose(1, 2),
    ]  # fmt: skip
    scales = [1.0, 9.0, 2.0, 0.5]
    h, s = gate(gu, route, "silu", "halves", As, scales)
    _, wanted = exact.gate(gu, route, "silu", "halves", As, scales)
    torchs, tiles = torch.zeros(60, 17, dtype=dtype), torch.zeros(60, 17, dtype=dtype)
    for group, rows in enumerate(segments(route)):
        expert, i = divmod(group, 4)
        if As[i] is None:
            assert not s[rows].any()
            continue
        a, r = As[i][expert].to(dtype), As[i].shape[1]
        assert not s[rows, r:].any()
        torchs[rows, :r] = scales[i] * (h[rows] @ a.T)
        steps = [blas(h[rows, k : k + 32], a[:, k : k + 32].T) for k in range(0, 80, 32)]
        tiles[rows, :r] = (scales[i] * sum(steps)).to(dtype)
    assert s.shape == (60, 17)
    assert_as_good_as_torch(s, [torchs, tiles], wanted)


def test_offsets_past_int32():
    step = Step.draw(routed(3, 1, 2), 40, 4)
    far = step._replace(dh=far_rows(3, 40, seed=0), gu=far_rows(3, 80, seed=1),
                        s=far_rows(3, 4, seed=2), ds_down=far_rows(3, 4, seed=3))  # fmt: skip
    far.check_forward()
    far.check_backward()


def test_where_exponentials_overflow():
    """Large numbers and NaN give what torch makes of them, in both directions."""
    values = [0.0, -0.0, 1.0, -1.0, 20.0, -20.0, 90.0, -90.0, 1e4, -1e4, float("nan")]
    gu = torch.tensor([list(pair) for pair in itertools.product(values, values)]).repeat(1, 2)
    route = routed(len(gu), 1, 1)
    order = route.pairs.long()
    for layout, clamp in itertools.product(("halves", "interleaved"), (None, GPT_OSS, DEEPSEEK)):
        leaf = gu[order].requires_grad_()
        wanted = exact.hidden(leaf, "silu", layout, clamp)
        ones = torch.ones_like(wanted)
        [dgu] = torch.autograd.grad(wanted, leaf, ones)
        h, _ = gate(gu[order], route, "silu", layout, clamp=clamp)
        torch.testing.assert_close(h, wanted.detach(), equal_nan=True)
        weights = torch.ones(len(gu), 1)
        found = gate_grad(ones, gu[order], route, "silu", layout, weights, clamp=clamp)
        finite = ~gu[order].isnan().any(1)
        torch.testing.assert_close(found.dgu[finite], dgu[finite])


def test_bad_arguments_are_named():
    route = routed(3, 2, 4)
    gu, dh, w = torch.ones(6, 8), torch.ones(6, 4), torch.ones(3, 2)
    a, b, s = torch.ones(4, 3, 4), torch.ones(4, 8, 3), torch.ones(6, 3)
    with pytest.raises(ValueError, match="name is 'swish'; allowed: silu, gelu"):
        gate(gu, route, "swish")
    with pytest.raises(ValueError, match="layout is 'both'; allowed: halves, interleaved, alone"):
        gate(gu, route, "silu", "both")
    with pytest.raises(ValueError, match="gu has 7 columns; allowed: an even number"):
        gate(gu[:, :7], route)
    with pytest.raises(ValueError, match="gu has 5 rows; allowed: 6"):
        gate(gu[:5], route)
    with pytest.raises(TypeError, match="gu has dtype torch.int64"):
        gate(gu.long(), route)
    with pytest.raises(ValueError, match="a has 2 entries; allowed: 1, one for each adapter"):
        gate(gu, route, a=[a, a])
    with pytest.raises(ValueError, match="a has no tensor"):
        gate(gu, route, a=[None])
    with pytest.raises(ValueError, match=r"a\[0\] has shape \(3, 4\); allowed: \[E, r, K\]"):
        gate(gu, route, a=[a[0]])
    with pytest.raises(ValueError, match=r"a\[0\] has shape \(4, 3, 3\); allowed: \(4, 3, 4\)"):
        gate(gu, route, a=[a[:, :, :3]])
    with pytest.raises(ValueError, match="bits is given without a"):
        gate(gu, route, bits=torch.zeros(6, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="clamp is given with 'gelu'"):
        gate(gu, route, "gelu", clamp=GPT_OSS)
    with pytest.raises(ValueError, match=r"clamp is \(0, 1, 2\)"):
        gate(gu, route, clamp=(0, 1, 2))
    of = route, "silu", "halves"
    with pytest.raises(ValueError, match=r"dh0 has shape \(6, 8\); allowed: \(6, 4\)"):
        gate_grad(gu, gu, *of, w)
    with pytest.raises(ValueError, match=r"weights has shape \(6, 4\); allowed: \(3, 2\) or"):
        gate_grad(dh, gu, *of, dh)
    with pytest.raises(ValueError, match=r"b\[0\] has shape \(4, 3, 4\); allowed: \(4, 8, 4\)"):
        gate_grad(dh, gu, *of, w, a)
    with pytest.raises(ValueError, match="s is given without b"):
        gate_grad(dh, gu, *of, w, None, s)
    with pytest.raises(ValueError, match=r"s has shape \(6, 2\); allowed: \(6, 3\)"):
        gate_grad(dh, gu, *of, w, b, s[:, :2])
    with pytest.raises(ValueError, match="route has 2 adapters; allowed: 1"):
        gate_grad(dh, gu, routed(3, 2, 4, adapters=2), *of[1:], w)
    with pytest.raises(ValueError, match="ExpertsGateConfig.block_k is 16"):
        ExpertsGateConfig(block_k=16)
    with pytest.raises(ValueError, match=r"ds_down has shape \(5, 3\); allowed: \(6, 3\)"):
        gate_grad(dh, gu, *of, w, ds_down=s[:5])
    with pytest.raises(ValueError, match="ds_down has rank 257"):
        gate_grad(dh, gu, *of, w, ds_down=torch.ones(6, 257))
    with pytest.raises(TypeError, match="ds_down has dtype torch.float16"):
        gate_grad(dh, gu, *of, w, ds_down=s.half())
    with pytest.raises(ValueError, match="bits is given without ds_down"):
        gate_grad(dh, gu, *of, w, bits=torch.zeros(6, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"bits has shape \(6, 2\)"):
        gate_grad(dh, gu, *of, w, ds_down=s, bits=torch.zeros(6, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="ExpertsGateGradConfig.block_r is 8"):
        ExpertsGateGradConfig(block_r=8)
    with pytest.raises(ValueError, match="ExpertsGateGradConfig.block_k is 16"):
        ExpertsGateGradConfig(block_k=16)
    with pytest.raises(ValueError, match="ExpertsGateGradConfig.block_a is 8"):
        ExpertsGateGradConfig(block_a=8)
