"""The fp8 copies that passes over X and dY write: torch's bits, beside the results of the pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peftkern.kernels import fp8_rows, grad_sb, mlp, mlp_grad, reference, shrink
from peftkern.kernels.bits import Draw, dropout_bits, pack_bits
from peftkern.kernels.common import Arch
from peftkern.kernels.expand import expand, low_rank_grad_input
from peftkern.kernels.fp8_rows import Fp8Rows
from peftkern.kernels.mlp_arguments import MlpMember
from peftkern.ops.bases import fp8_products
from tests.kernels.oracle import DTYPES, assert_as_good_as_torch, keep_mask, matrix

FP32, BF16 = torch.float32, torch.bfloat16


def hard(M: int, K: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    """Rows of very different sizes: ties, e4m3's small numbers, zeros, the least and the largest
    numbers of the dtype, infinities and NaN, each in a block of its own."""
    x = matrix(M, K, dtype, seed=seed, offset=3)
    info, block = torch.finfo(dtype), slice(0, 128)
    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = torch.cat([(e4m3[:-1] + e4m3[1:]) / 2, e4m3[-1:], torch.zeros(1)])
    x[0, block] = ties.to(dtype)
    x[1, block] = -torch.cat([e4m3, torch.zeros(1)]).to(dtype)
    x[2, block] = 0.0
    if dtype != BF16:  # whose denormals the interpreter loads as other numbers
        x[3, block] *= info.tiny
    x[3, 128:256] = torch.linspace(-4, 4, 128).to(dtype) * info.smallest_normal * 300
    x[4, block] = torch.linspace(-1, 1, 128).to(dtype) * info.max
    x[5, 7], x[5, 200] = float("inf"), float("nan")
    x[6, 7], x[6, 8] = -float("inf"), float("nan")
    x[7, 1::2] = -0.0
    return x


def assert_torchs(copy: Fp8Rows, x: Tensor) -> None:
    q, scales = fp8_products.quantised_blocks(x)
    lost = q.float().isnan()  # e4m3 has a NaN of each sign
    assert torch.equal(copy.q.float().isnan(), lost)
    same = copy.q.contiguous().view(torch.uint8) == q.view(torch.uint8)
    assert bool((same | lost).all())
    assert torch.equal(copy.scales.nan_to_num(nan=-1.0), scales.nan_to_num(nan=-1.0))
    assert copy.scales.stride(0) == 1 or len(x) == 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the products overflow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_copy_has_torchs_bits(dtype: torch.dtype) -> None:
    x = hard(9, 384, dtype)
    copy = fp8_rows.empty(9, 384, x.device)
    shrink.shrink(x, [matrix(3, 384, FP32, seed=1)], copy=copy)
    assert_torchs(copy, x)
    dy = hard(9, 256, dtype, seed=3)
    copy = fp8_rows.empty(9, 256, x.device)
    b, s = matrix(256, 3, FP32, seed=1), matrix(9, 3, dtype, seed=2)
    grad_sb.grad_sb(dy, b, s, copy=copy)
    assert_torchs(copy, dy)


@pytest.mark.parametrize(
    "M, K, ranks, split",
    [(70, 256, (5, 16, 3), 1), (3, 640, (8,), 3), (1, 128, (1,), 1), (20, 256, (130, 4), 1)],
)
def test_the_copy_is_undropped_and_s_is_as_without_it(
    M: int, K: int, ranks: tuple[int, ...], split: int
) -> None:
    x, As = matrix(M, K, BF16, seed=0), [matrix(r, K, FP32, seed=r) for r in ranks]
    words = [pack_bits(keep_mask(M, K, i)) for i in range(len(ranks))]
    config = shrink.ShrinkConfig(block_m=32, block_k=128, split_k=split)
    plain = shrink.shrink(x, As, 2.0, words, config=config)
    copy = fp8_rows.empty(M, K, x.device)
    assert torch.equal(shrink.shrink(x, As, 2.0, words, copy=copy, config=config), plain)
    assert_torchs(copy, x)


def test_a_shrink_that_draws_writes_the_copy_too() -> None:
    x, a = matrix(40, 256, BF16, seed=0), matrix(8, 256, FP32, seed=1)
    words, copy = [torch.empty(40, 8, dtype=torch.int32)], fp8_rows.empty(40, 256, x.device)
    s = shrink.shrink(x, [a], 2.0, words, draw=Draw(0.3, 7), copy=copy)
    assert torch.equal(words[0], dropout_bits(40, 256, 0.3, 7, device=x.device))
    config = shrink.default_config(40, 256, [8], Arch(4, 90, 232448), 2, True, True)
    assert torch.equal(s, shrink.shrink(x, [a], 2.0, words, config=config))
    assert_torchs(copy, x)


@pytest.mark.parametrize("r", [3, 100, 200])
def test_a_group_of_gradients_goes_side_by_side_into_one_copy(r: int) -> None:
    """As the product with all their weights at once reads them."""
    parts, widths = [], (256, 128)
    for i, n in enumerate(widths):
        dy = matrix(33, n, BF16, seed=i, offset=1)
        parts.append((dy, matrix(n, r, FP32, seed=5), matrix(33, r, BF16, seed=6), 1.5))
    whole = fp8_rows.empty(33, sum(widths), parts[0][0].device)
    copies = [whole.columns(0, 256), whole.columns(256, 384)]
    found = grad_sb.grad_sb_group(parts, [FP32, FP32], copies=copies)
    assert_torchs(whole, torch.cat([p[0] for p in parts], 1))
    for (ds, db), (dy, b, s, scale) in zip(found, parts, strict=True):
        dy64 = dy.double()
        assert_as_good_as_torch(ds, scale * (dy @ b.to(BF16)), scale * (dy64 @ b.double()))
        assert_as_good_as_torch(db, dy.T @ s, dy64.T @ s.double())


def test_the_low_rank_part_is_added_to_a_product() -> None:
    ds, a = matrix(9, 5, BF16, seed=0), matrix(5, 70, FP32, seed=1)
    add, keep = matrix(9, 70, FP32, seed=2, offset=1), keep_mask(9, 70, 0)
    found = low_rank_grad_input([ds], [a], pack_bits(keep), add=add)
    low = (ds @ a.to(BF16)) * keep
    exact = add.double() + (ds.double() @ a.double()) * keep
    assert_as_good_as_torch(found, (add + low).to(BF16), exact)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(copy=fp8_rows.empty(4, 256, torch.device("cpu"))), ValueError, r"copy.q has shape"),
        (dict(x=torch.ones(4, 96), As=[torch.ones(2, 96)]), ValueError, "for 96 columns; allowed"),
        (dict(config=shrink.ShrinkConfig(block_k=64)), ValueError, "config.block_k is 64; allowed"),
        (
            dict(copy=Fp8Rows(torch.ones(4, 128), torch.ones(4, 1))),
            TypeError,
            "copy.q has dtype torch.float32",
        ),
        (
            dict(copy=Fp8Rows(torch.ones(128, 4).to(torch.float8_e4m3fn).t(), torch.ones(4, 1))),
            ValueError,
            r"copy.q has strides \(1, 4\)",
        ),
        (
            dict(
                x=torch.ones(4, 256),
                As=[torch.ones(2, 256)],
                copy=Fp8Rows(torch.ones(4, 256).to(torch.float8_e4m3fn), torch.ones(4, 2)),
            ),
            ValueError,
            r"copy.scales has strides \(2, 1\)",
        ),
    ],
)
def test_wrong_room_for_a_copy_is_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    good = dict(x=torch.ones(4, 128), As=[torch.ones(2, 128)])
    good["copy"] = fp8_rows.empty(4, 128, torch.device("cpu"))  # type: ignore[assignment]
    with pytest.raises(error, match=message):
        shrink.shrink(**{**good, **change})


def test_older_gpus_cannot_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrink, "arch_of", lambda device: Arch(4, 86, 101376))
    with pytest.raises(ValueError, match="compute capability 8.6; allowed: 8.9 or more"):
        shrink.shrink(
            torch.ones(4, 128), [torch.ones(2, 128)],
            copy=fp8_rows.empty(4, 128, torch.device("cpu")),
        )  # fmt: skip


@pytest.mark.parametrize("r", [0, 5, 150])
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_an_mlps_hidden_is_written_in_fp8_alone(act: str, r: int) -> None:
    gate, up = matrix(21, 256, BF16, seed=0, offset=1), matrix(21, 256, BF16, seed=1)
    a = matrix(r, 256, FP32, seed=2) if r else None
    keep = keep_mask(21, 256, 0)
    words = pack_bits(keep) if r else None
    config = mlp.MlpConfig(32, 128, 2)
    h, _ = mlp.mlp(gate, up, act, a, 2.0, words, config=config)
    copy = fp8_rows.empty(21, 256, gate.device)
    gone, s = mlp.mlp(gate, up, act, a, 2.0, words, copy=copy, config=config)
    assert h is not None and gone is None
    assert_torchs(copy, h)
    if a is not None:
        exact = reference.shrink(h, a, 2.0, keep)
        assert_as_good_as_torch(s, 2.0 * ((h * keep) @ a.to(BF16).T), exact)


@pytest.mark.parametrize("r", [0, 5, 40, 150])
def test_an_mlps_gradients_are_written_in_fp8_side_by_side(r: int) -> None:
    dh, gate, up = (matrix(40, 256, BF16, seed=i, offset=1) for i in range(3))
    members: list[Any] = [None, None]
    if r:
        pairs = [(matrix(256, r, FP32, seed=4 + i), matrix(40, r, BF16, seed=6)) for i in range(2)]
        members = [MlpMember(b, s, 1.5) for b, s in pairs]
    config = mlp_grad.MlpGradConfig(32, 128)
    plain = mlp_grad.mlp_grad(dh, gate, up, "silu", members, config=config)
    whole = fp8_rows.empty(40, 512, dh.device)
    copies = whole.columns(0, 256), whole.columns(256, 512)
    found = mlp_grad.mlp_grad(dh, gate, up, "silu", members, copies=copies, config=config)
    assert plain.dgate is not None and plain.dup is not None
    assert_torchs(whole, torch.cat([plain.dgate, plain.dup], 1))
    assert (found.dgate is None) == (r <= mlp_grad.PART_RANK)  # else dS is made of it
    for one, other in zip((*found.ds, *found.db), (*plain.ds, *plain.db), strict=True):
        assert one is other is None or torch.equal(one, other)  # type: ignore[arg-type]
    alone = fp8_rows.empty(40, 256, dh.device)
    plain = mlp_grad.mlp_grad(dh, gate, None, "gelu", members[:1] + [None])
    mlp_grad.mlp_grad(dh, gate, None, "gelu", members[:1] + [None], copies=(alone, None))
    assert plain.dgate is not None
    assert_torchs(alone, plain.dgate)


@pytest.mark.parametrize("both", [True, False])
def test_an_mlps_pass_adds_the_low_rank_parts_of_what_it_reads(both: bool) -> None:
    """The bits of a pass over the sums G + S Bᵀ and U + S Bᵀ, rounded as ``expand`` rounds them."""
    bases = [matrix(21, 256, BF16, seed=i, offset=1) for i in range(2)]
    pairs: list[Any] = [
        (matrix(21, r, BF16, seed=2 + r), matrix(256, r, FP32, seed=3 + r)) for r in (5, 16)
    ]
    if not both:
        pairs[1] = None
    a, words = matrix(7, 256, FP32, seed=2), pack_bits(keep_mask(21, 256, 0))
    sums = [
        base if pair is None else expand(*pair, add=base)
        for base, pair in zip(bases, pairs, strict=True)
    ]
    config = mlp.MlpConfig(32, 128, 2)
    found = []
    for (gate, up), inner in ((bases, pairs), (sums, (None, None))):
        copy = fp8_rows.empty(21, 256, gate.device)
        _, s = mlp.mlp(gate, up, "silu", a, 2.0, words, copy=copy, inner=inner, config=config)
        found += [copy.q.float(), copy.scales, s]
    for one, other in zip(found[:3], found[3:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("masked", [True, False])
def test_an_mlps_gradients_are_of_sums_with_low_rank_parts(masked: bool) -> None:
    bases = [matrix(40, 256, BF16, seed=i, offset=1) for i in range(3)]
    ranks = (5, 16)
    members: list[Any] = [
        MlpMember(matrix(256, r, FP32, seed=4 + r), matrix(40, r, BF16, seed=6 + r), 1.5)
        for r in ranks
    ]
    ds, a = matrix(40, 7, BF16, seed=1), matrix(7, 256, FP32, seed=2)
    words = pack_bits(keep_mask(40, 256, 0)) if masked else None
    config = mlp_grad.MlpGradConfig(32, 128, 2)
    sums = [low_rank_grad_input([ds], [a], words, add=bases[0])]
    sums += [expand(m.s, m.b, add=base) for m, base in zip(members, bases[1:], strict=True)]
    found = []
    for (dh, gate, up), more in ((bases, {"a": a, "add": True}), (sums, {})):
        whole = fp8_rows.empty(40, 512, dh.device)
        copies = whole.columns(0, 256), whole.columns(256, 512)
        out = mlp_grad.mlp_grad(
            dh, gate, up, "silu", members, ds, words, copies=copies, config=config, **more
        )
        found.append([whole.q.float(), whole.scales, *out.ds, *out.db, out.da])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_bad_low_rank_parts() -> None:
    gate, a = torch.zeros(4, 128), torch.zeros(3, 128)
    pair = (torch.zeros(4, 3), torch.zeros(128, 3))
    low, high = torch.zeros(4, 3), torch.zeros(4, 65)
    member = MlpMember(torch.zeros(128, 3), None, 1.0)
    for call, match in (
        (lambda: mlp.mlp(gate, gate, inner=[pair]), "inner has 1 entries"),  # type: ignore[list-item]
        (lambda: mlp.mlp(gate, None, inner=[pair, pair]), r"inner\[1\] is given without up"),
        (
            lambda: mlp.mlp(gate, None, inner=[(high, torch.zeros(128, 65)), None]),
            "rank 65; allowed",
        ),
        (
            lambda: mlp.mlp(gate, None, inner=[(low[:2], pair[1]), None]),
            r"inner\[0\]\[0\] has shape",
        ),
        (lambda: mlp_grad.mlp_grad(gate, gate, gate, ds=low, a=a), "allowed: up to 16 in two"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    gate, a, low = gate.to(BF16), a.to(BF16), low.to(BF16)
    for more, match in (
        ({"a": a}, "a is given without ds"),
        ({"a": a[:2], "ds": low}, r"a\[0\] has shape"),
        ({"add": True, "members": (member, None)}, "a member has no s"),
    ):
        with pytest.raises(ValueError, match=match):
            mlp_grad.mlp_grad(gate, gate, gate, **more)  # type: ignore[arg-type]


def test_an_mlps_pass_draws_the_mask_of_what_it_makes() -> None:
    gate, up = matrix(21, 256, BF16, seed=0), matrix(21, 256, BF16, seed=1)
    a, config = matrix(7, 256, FP32, seed=2), mlp.MlpConfig(32, 128, 2)
    words = dropout_bits(21, 256, 0.3, 7, device=gate.device)
    plain = mlp.mlp(gate, up, "silu", a, 2.0, words, config=config)
    drawn = torch.full_like(words, -1)
    found = mlp.mlp(gate, up, "silu", a, 2.0, drawn, draw=Draw(0.3, 7), config=config)
    assert torch.equal(drawn, words)
    for one, other in zip(found, plain, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)
    with pytest.raises(ValueError, match="draw is given, and As have ranks"):
        mlp.mlp(gate, up, "silu", matrix(150, 256, FP32, seed=3), 2.0, drawn, draw=Draw(0.3, 7))
