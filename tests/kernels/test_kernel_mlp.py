"""An MLP's elementwise step: H with the S of down, and all gradients through H.

Repeated runs give the same bits.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import mlp_grad as grad_file
from peftkern.kernels import mlp_reference
from peftkern.kernels.bits import pack_bits
from peftkern.kernels.common import Arch
from peftkern.kernels.mlp import MlpConfig, mlp
from peftkern.kernels.mlp import default_config as forward_config
from peftkern.kernels.mlp_arguments import ACTIVATIONS, MlpMember
from peftkern.kernels.mlp_grad import MlpGradConfig, default_config, mlp_grad, ways
from peftkern.kernels.shrink import ShrinkConfig, shrink
from peftkern.ops.mlp_parts import Member, Shrink, ShrinkGrad
from peftkern.ops.mlp_triton import activate, activate_grad, why_not
from tests.kernels.compiler import python
from tests.kernels.oracle import (
    DTYPES,
    assert_as_good_as_torch,
    blas,
    far_rows,
    few,
    keep_mask,
    masked,
    matrix,
)

H200 = Arch(132, 90, 232448)
RTX = Arch(128, 89, 101376)


def hidden(gate, up, act):
    """H by torch's separate operations."""
    h = mlp_reference.apply(gate, act)
    return h if up is None else h * up


def orders(x, y, factor=1.0):
    """factor * x @ y in two orders of sums, torch's and that of the interpreter's tiles."""
    steps = [blas(x[:, k : k + 32], y[k : k + 32]) for k in range(0, x.shape[1], 32)]
    return [factor * (x @ y), (factor * sum(steps)).to(x.dtype)]


def check_forward(M, K, r, act, dtype, adapter, mask, gated, config=None):
    gate = matrix(M, K, dtype, seed=0, offset=1, scale=2.0)
    up = matrix(M, K, dtype, seed=1, offset=2) if gated else None
    a = matrix(r, K, adapter, seed=2) if r else None
    keep = keep_mask(M, K, 3) if mask and r else None
    words = None if keep is None else pack_bits(keep)
    h, s = mlp(gate, up, act, a, 1.5, words, config=config)
    exact_h, exact_s = mlp_reference.mlp(gate, up, act, a, 1.5, keep)
    torch_h = hidden(gate, up, act)
    assert h.dtype == dtype
    assert_as_good_as_torch(h, torch_h, exact_h)
    assert (s is None) == (r == 0)
    if s is not None:
        assert s.dtype == dtype
        assert_as_good_as_torch(s, orders(masked(torch_h, keep), a.to(dtype).T, 1.5), exact_s)
    again = mlp(gate, up, act, a, 1.5, words, config=config)
    assert torch.equal(h, again[0]) and (s is None or torch.equal(s, again[1])), "two runs differ"


class Step(NamedTuple):
    """Operands of the backward; ranks are 0 where an adapter is not there."""

    dh: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor | None
    act: str
    members: list
    ds: torch.Tensor | None
    keep: torch.Tensor | None

    @classmethod
    def draw(cls, M, K, ranks, act, dtype, adapter, mask, gated=True, wants=(True, True)):
        members = [
            MlpMember(
                matrix(K, r, adapter, seed=10 + i),
                matrix(M, r, dtype, seed=20 + i, offset=1) if wants[i] else None,
                1.5 + i,
            )
            if r
            else None
            for i, r in enumerate(ranks[:2])
        ]
        return cls(
            matrix(M, K, dtype, seed=0, offset=2),
            matrix(M, K, dtype, seed=1, offset=1, scale=2.0),
            matrix(M, K, dtype, seed=2, offset=1) if gated else None,
            act,
            members if gated else [members[0], None],
            matrix(M, ranks[2], dtype, seed=3, offset=1) if ranks[2] else None,
            keep_mask(M, K, 4) if mask and ranks[2] else None,
        )

    def run(self, **kwargs):
        words = None if self.keep is None else pack_bits(self.keep)
        return flat(mlp_grad(*self[:6], words, **kwargs))

    def exact(self):
        outs, *rest = mlp_reference.mlp_grad(*self)
        return flat((outs[0], outs[1] if self.up is not None else None, *rest))

    def by_torch(self):
        """The separate operations of torch in the operands' dtype."""
        leaves = [t.clone().requires_grad_() for t in (self.gate, self.up) if t is not None]
        h = hidden(leaves[0], leaves[1] if self.up is not None else None, self.act)
        outs = list(torch.autograd.grad(h, leaves, self.dh))
        pairs = [(d, m) for d, m in itertools.zip_longest(outs, self.members)]
        low = [None if m is None else orders(d, m.b.to(d.dtype), m.scale) for d, m in pairs]
        dbs = [None if m is None or m.s is None else orders(d.T, m.s) for d, m in pairs]
        da = None if self.ds is None else orders(self.ds.T, masked(h.detach(), self.keep))
        return flat((outs[0], outs[1] if self.up is not None else None, low, dbs, da))


def flat(found):
    dgate, dup, ds, db, da = found
    return [t for t in (dgate, dup, *ds, *db, da) if t is not None]


def check_backward(step, config=None):
    ours, torchs, exact = step.run(config=config), step.by_torch(), step.exact()
    assert len(ours) == len(torchs) == len(exact)
    for o, t, e in zip(ours, torchs, exact, strict=True):
        # in a sum of so few numbers the order alone can double the largest error
        assert_as_good_as_torch(o, t, e, average=not isinstance(t, torch.Tensor))
    again = step.run(config=config)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)), "two runs differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_both_ways(act, dtype):
    check_forward(19, 75, 5, act, dtype, torch.float32, mask=True, gated=True)
    check_forward(19, 75, 5, act, dtype, torch.float32, mask=False, gated=False)
    check_backward(Step.draw(19, 75, (5, 3, 7), act, dtype, torch.float32, mask=True))
    check_backward(Step.draw(19, 75, (5, 0, 7), act, dtype, dtype, mask=False, gated=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [1, 16, 17, 64, 129, 256])
def test_ranks(r, dtype):
    check_forward(21, 100, r, "silu", dtype, torch.float32, mask=True, gated=True)
    check_backward(Step.draw(21, 100, (r, r, r), "silu", dtype, torch.float32, mask=True))


@pytest.mark.long
@pytest.mark.parametrize("arch", [H200, RTX], ids=["wgmma", "mma"])
@pytest.mark.parametrize("r", [8, 24, 100])
def test_what_other_devices_make_in_one_pass(r, arch, monkeypatch):
    """The small device of the interpreter would hide ways and configs that others take."""
    monkeypatch.setattr(grad_file, "arch_of", lambda _: arch)
    check_backward(Step.draw(40, 140, (r, 3, r), "silu", torch.bfloat16, torch.float32, mask=True))


@pytest.mark.parametrize(
    "ranks, wants",
    [
        ((0, 0, 0), (True, True)), ((4, 0, 0), (True, True)), ((0, 4, 0), (False, True)),
        ((0, 0, 4), (True, True)), ((4, 3, 0), (False, False)), ((4, 30, 2), (True, False)),
        ((0, 40, 0), (True, False)), ((0, 150, 9), (True, True)),
    ],
)  # fmt: skip
def test_adapters_that_are_not_there(ranks, wants):
    check_backward(
        Step.draw(20, 70, ranks, "silu", torch.float16, torch.float32, mask=True, wants=wants)
    )


@few
@given(
    M=st.integers(1, 70),
    K=st.integers(1, 140),
    ranks=st.lists(st.integers(0, 40), min_size=3, max_size=3),
    act=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from(DTYPES),
    same=st.booleans(),
    mask=st.booleans(),
    gated=st.booleans(),
    split=st.integers(1, 3),
)
def test_any_shape(M, K, ranks, act, dtype, same, mask, gated, split):
    adapter = dtype if same else torch.float32
    config = MlpConfig(block_m=16, block_k=32, split_k=split)
    check_forward(M, K, ranks[2], act, dtype, adapter, mask, gated, config)
    step = Step.draw(M, K, ranks, act, dtype, adapter, mask, gated)
    check_backward(step, MlpGradConfig(block_m=16, block_k=32, split_m=split))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_s_is_that_of_a_shrink_over_the_h_that_was_written(dtype):
    gate, up = matrix(37, 150, dtype, seed=0), matrix(37, 150, dtype, seed=1)
    a, words = matrix(9, 150, torch.float32, seed=2), pack_bits(keep_mask(37, 150, 3))
    for split in (1, 2):
        h, s = mlp(gate, up, "silu", a, 2.0, words, config=MlpConfig(32, 64, split))
        other = shrink(h, [a], 2.0, words, config=ShrinkConfig(32, 64, split))
        assert torch.equal(s, other)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_where_exponentials_overflow(act):
    """Large numbers and NaN give what torch makes of them, in both directions."""
    values = [0.0, -0.0, 1.0, -1.0, 20.0, -20.0, 90.0, -90.0, 1e4, -1e4, float("nan")]
    gate = torch.tensor(values).repeat(4, 3)
    leaf = gate.clone().requires_grad_()
    expected = mlp_reference.apply(leaf, act)
    (dgate,) = torch.autograd.grad(expected, leaf, torch.ones_like(gate))
    h, _ = mlp(gate, None, act)
    torch.testing.assert_close(h, expected.detach(), equal_nan=True)
    ours = mlp_grad(torch.ones_like(gate), gate, None, act).dgate
    torch.testing.assert_close(ours, dgate, equal_nan=True)


def test_offsets_past_int32():
    gate, up = far_rows(3, 40, seed=0), far_rows(3, 40, seed=1)
    a = matrix(5, 40, torch.float32, seed=2)
    h, s = mlp(gate, up, "silu", a)
    exact_h, exact_s = mlp_reference.mlp(gate, up, "silu", a)
    assert_as_good_as_torch(h, hidden(gate, up, "silu"), exact_h)
    assert_as_good_as_torch(s, hidden(gate, up, "silu") @ a.half().T, exact_s)
    members = [MlpMember(matrix(40, 4, torch.float32, seed=3), far_rows(3, 4, seed=4), 1.0), None]
    dh, ds = far_rows(3, 40, seed=5), far_rows(3, 6, seed=6)
    check_backward(Step(dh, gate, up, "silu", members, ds, None))


def test_empty():
    none, b = torch.ones(0, 6), torch.ones(6, 4)
    h, s = mlp(none, none, "silu", torch.ones(3, 6))
    assert h.shape == (0, 6) and s.shape == (0, 3)
    members = [MlpMember(b, torch.ones(0, 4), 1.0), None]
    out = mlp_grad(none, none, none, "silu", members, torch.ones(0, 3))
    assert out.dgate.shape == (0, 6) and out.ds[0].shape == (0, 4)
    assert out.db[0].shape == (6, 4) and not out.db[0].any() and not out.da.any()
    h, s = mlp(torch.ones(5, 0), None, "gelu", torch.ones(3, 0))
    assert h.shape == (5, 0) and not s.any()


def test_halves_of_one_matrix_have_halves_of_one_as_gradients():
    """Gate and up of Phi-3 are one linear."""
    both = matrix(9, 80, torch.float32, seed=0)
    b = matrix(40, 3, torch.float32, seed=1)
    s = matrix(9, 3, torch.float32, seed=2)
    dh, ds = matrix(9, 40, torch.float32, seed=3), matrix(9, 5, torch.float32, seed=4)
    a = matrix(5, 40, torch.float32, seed=5)
    down = ShrinkGrad(ds, None, torch.float32)
    for gate, up in (both.chunk(2, 1), both.chunk(2, 1)[::-1]):
        members = (Member(b, s, 2.0), Member(b, None, 1.0))
        found = activate_grad(dh, gate, up, "silu", down, members)
        whole = found.dgate._base
        assert whole is not None and whole is found.dup._base and whole.shape == (9, 80)
        assert (found.dgate.storage_offset() == 0) == (gate.storage_offset() == 0)
        apart = activate_grad(dh, gate.clone(), up.clone(), "silu", down, members)
        assert apart.dgate.is_contiguous() and apart.dup.is_contiguous()
        assert torch.equal(found.dgate, apart.dgate) and torch.equal(found.dup, apart.dup)
        assert torch.equal(found.da, apart.da) and torch.equal(found.dbs[0], apart.dbs[0])
        assert torch.equal(found.ds[1], apart.ds[1]) and found.dbs[1] is None
        h, made = activate(gate, up, "silu", Shrink(a, 2.0, None))
        h2, made2 = activate(gate.clone(), up.clone(), "silu", Shrink(a, 2.0, None))
        assert torch.equal(h, h2) and torch.equal(made, made2)


def test_the_op_says_what_the_kernels_do_not_take():
    x, a = torch.ones(3, 8), torch.ones(2, 8)
    assert why_not(x, "silu", [a]) is None and why_not(x, "relu", []) is None
    assert "tanhshrink" in why_not(x, "tanhshrink", [a])
    assert "float64" in why_not(x.double(), "silu", [])
    assert "rank 300" in why_not(x, "silu", [a, torch.ones(300, 8)])


def test_ways_and_configs_of_devices():
    assert ways(16, 2, H200) == (True, True) and ways(16, 2, RTX) == (True, True)
    assert ways(64, 2, H200) == (False, True) and ways(64, 2, RTX) == (False, False)
    assert ways(256, 2, H200) == ways(16, 4, H200) == (False, False)
    for M, r in itertools.product((1, 100, 8192), (0, 16, 64, 128)):
        for arch in (H200, RTX):
            forward, backward = forward_config(M, 14336, r, arch), default_config(M, 14336, r, arch)
            assert forward.num_stages >= 2 and backward.num_stages >= 2
    # enough programs to fill the device, and the last wave of the backward nearly full
    assert 8192 // 64 * forward_config(8192, 14336, 16, H200).split_k >= 3 * H200.sms
    programs = 14336 // 128 * default_config(8192, 14336, 16, H200).split_m
    assert programs / (-(-programs // H200.sms) * H200.sms) > 0.95


def test_bad_arguments_are_named():
    g, b, s = torch.ones(5, 6), torch.ones(6, 4), torch.ones(5, 4)
    with pytest.raises(ValueError, match="act is 'swish'; allowed: silu, gelu"):
        mlp(g, g, "swish")
    with pytest.raises(TypeError, match="gate has dtype torch.int64"):
        mlp(g.long(), None)
    with pytest.raises(TypeError, match="up has dtype torch.float16; allowed: float32"):
        mlp(g, g.half())
    with pytest.raises(ValueError, match=r"up has shape \(5, 4\); allowed: \(5, 6\)"):
        mlp(g, s)
    with pytest.raises(ValueError, match=r"a\[0\] has shape \(2, 5\); allowed: \(2, 6\)"):
        mlp(g, g, "silu", torch.ones(2, 5))
    with pytest.raises(ValueError, match="bits is given without a"):
        mlp(g, g, "silu", bits=torch.zeros(5, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"dh has shape \(5, 4\)"):
        mlp_grad(s, g, g)
    with pytest.raises(ValueError, match="members has 1 entries; allowed: 2"):
        mlp_grad(g, g, g, "silu", [None])
    with pytest.raises(ValueError, match=r"members\[1\] is given without up"):
        mlp_grad(g, g, None, "silu", [None, MlpMember(b, s, 1.0)])
    with pytest.raises(ValueError, match=r"members\[0\].b has shape \(5, 4\); allowed: \(6, 4\)"):
        mlp_grad(g, g, g, "silu", [MlpMember(s, s, 1.0), None])
    with pytest.raises(ValueError, match=r"members\[0\].s has shape \(6, 4\); allowed: \(5, 4\)"):
        mlp_grad(g, g, g, "silu", [MlpMember(b, b, 1.0), None])
    with pytest.raises(ValueError, match=r"ds\[0\] has rank 0"):
        mlp_grad(g, g, g, ds=torch.ones(5, 0))
    with pytest.raises(ValueError, match="bits is given without ds"):
        mlp_grad(g, g, g, bits=torch.zeros(5, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"outs\[0\] has strides"):
        mlp_grad(g, g, g, outs=(torch.ones(6, 5).T, g))
    with pytest.raises(ValueError, match=r"outs\[1\] and up"):
        mlp_grad(g, g, g, outs=(g, None))
    with pytest.raises(ValueError, match="MlpConfig.block_k is 16"):
        MlpConfig(block_k=16)
    with pytest.raises(ValueError, match="MlpGradConfig.split_m is 0"):
        MlpGradConfig(split_m=0)


COMPILED = """
import re
from benchmarks.kernels import mlp, mlp_grad
from benchmarks.static.compiling import NoDevice, gpu_target
from benchmarks.static.run import TARGETS
from peftkern.kernels.mlp import default_config as forward
from peftkern.kernels.mlp_grad import default_config as backward
from triton.runtime import driver

for name in ("sm_80", "sm_90"):
    arch = TARGETS[name].arch
    driver.set_active(NoDevice(gpu_target(name)))
    for launch in (
        mlp.launches(8192, 14336, 16, "silu", True, forward(8192, 14336, 16, arch))[0],
        mlp_grad.launches(8192, 14336, 16, "silu", True, backward(8192, 14336, 16, arch), arch)[0],
    ):
        compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta)
        text = compiled.asm["ttgir"]
        loop = text[text.index("scf.for"):text.index("scf.yield")]
        rows = launch.meta["BLOCK_M"]
        columns = launch.meta["BLOCK_K"]
        tiles = re.findall(f"async_copy_global_to_local[^\\\\n]*<{rows}x{columns}xbf16", loop)
        buffers = re.findall(f"memdesc<(\\\\d)x{rows}x{columns}xbf16", text)
        print("FOUND", loop.count("math.exp"), len(tiles), min(buffers), "tt.load" in loop)
"""


@pytest.mark.long
def test_a_step_computes_once_and_has_copies_in_flight():
    """One exponential for each element, and the next tiles of G, U and dH on their way meanwhile.

    Without :func:`_once` the compiler computes act(G) again for each product that reads it.
    """
    done = python("-c", COMPILED, cache=None)
    assert done.returncode == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert found == ["FOUND 1 2 2 False", "FOUND 1 3 2 False"] * 2
