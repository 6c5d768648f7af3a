"""The counter of launches: graphs counted by hand, HF PEFT's, peftkern's against docs/goals.md."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.cost import run as cost
from benchmarks.cost.cases import PROVIDERS, Shape, measure
from benchmarks.cost.count import Counter, as_cuda, count, record
from benchmarks.cost.gpus import GPUS, microseconds
from benchmarks.kernels.table import rules, traffic
from benchmarks.kernels.traffic import Traffic
from benchmarks.static.cases import cases as shipped
from peftkern.kernels import bits as kernel_bits
from peftkern.kernels import (
    decode,
    expand,
    gemm,
    grad_a,
    grad_sb,
    grad_xa,
    mixed,
    reduce,
    shrink,
    shrink_expand,
)
from peftkern.kernels.common import Arch, Launch

from .pages import tables

BF16, FP32, INT32 = torch.bfloat16, torch.float32, torch.int32
H100 = GPUS["H100"]
ARCH = Arch(*H100.arch)
BY_NAME = {w.name: w for w in PROVIDERS}
SHAPE = Shape(8192, 4096, 4096, 16)


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def counted(call: Any) -> list[tuple[int, int, int]]:
    """(launches, read, written) of what ``call`` runs."""
    with Counter() as counter:
        call()
    return [(t.launches, t.read, t.written) for t in counter.launches]


X, Y, BIAS = meta(8, 4), meta(8, 4), meta(4)  # 64, 64 and 8 bytes
ONE = meta(8, 1).expand(8, 4)  # 16 bytes behind 32 elements


@pytest.mark.parametrize(
    "call, want",
    [
        (lambda: X @ meta(4, 2), [(1, 64 + 16, 32)]),
        (lambda: X.t().reshape(2, 16).view(32), [(1, 64, 64)]),  # the transpose is copied
        (lambda: X[:4].t().unsqueeze(0).detach(), []),
        (lambda: torch.empty_like(X), []),
        (lambda: X + Y, [(1, 128, 64)]),
        (lambda: X * X, [(1, 64, 64)]),  # read once
        (lambda: X + ONE, [(1, 64 + 16, 64)]),
        (lambda: X.clone().add_(Y), [(1, 64, 64), (1, 128, 64)]),
        (lambda: torch.empty_like(X).copy_(Y), [(1, 64, 64)]),
        (lambda: torch.empty_like(X).bernoulli_(0.5), [(1, 0, 64)]),
        (lambda: torch.zeros_like(X), [(1, 0, 64)]),
        (lambda: X.float(), [(1, 64, 128)]),
        (lambda: torch.cat([X, Y]), [(1, 128, 128)]),
        (lambda: X.sum(0), [(1, 64, 8)]),
        (lambda: torch.addmm(BIAS, X, meta(4, 4)), [(1, 64 + 32 + 8, 64)]),
        # onto a full matrix: torch copies it to the result, then accumulates there
        (lambda: torch.addmm(Y, X, meta(4, 4)), [(1, 64, 64), (1, 64 + 32 + 64, 64)]),
        (lambda: torch.addmm(Y, X, meta(4, 4), beta=0), [(1, 64 + 32, 64)]),
        (lambda: torch.empty_like(Y).addmm_(X, meta(4, 4)), [(1, 64 + 32 + 64, 64)]),
        (lambda: torch.native_dropout(X, 0.5, True), [(1, 64, 64 + 32)]),
        (lambda: torch.embedding(meta(100, 4), meta(3, dtype=torch.int64)), [(1, 24 + 24, 24)]),
        (lambda: torch.ones(3) + 1, []),  # on the host
    ],
)
def test_operations_counted_by_hand(call: Any, want: list[tuple[int, int, int]]) -> None:
    assert counted(call) == want


def test_products_know_their_flops_and_unit() -> None:
    with Counter() as counter:
        X @ meta(4, 2)
        meta(8, 4, dtype=FP32) @ meta(4, 2, dtype=FP32)
    assert [(t.flops, t.unit) for t in counter.launches] == [(128, "matrix"), (128, "fp32")]


def test_an_operation_without_a_rule_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="aten.cummax.*no launch rule"), Counter():
        X.cummax(0)


def test_a_backward_and_what_it_keeps_by_hand() -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(meta(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            h = x @ self.w  # keeps x and w, which are known
            return h * h.exp()  # keeps h and exp(h)

    found = count(Squared(), meta(8, 4).requires_grad_())
    assert [t.name for t in found.forward] == ["mm", "exp", "mul"]
    assert [t.name for t in found.backward] == ["mul", "mul", "mul", "add", "mm", "mm"]
    assert found.kept == 2 * 64


def test_meta_tensors_answer_as_cuda_only_inside() -> None:
    x = meta(2, 2)
    with as_cuda():
        assert x.is_cuda and not x.is_meta and not torch.ones(1).is_cuda
        assert counted(lambda: nn.functional.dropout(x, 0.5))[0][0] == 1
    assert x.is_meta and not x.is_cuda
    with Counter() as counter:
        nn.functional.dropout(x, 0.5)
    assert "native_dropout" not in [t.name for t in counter.launches]


def counts(name: str, p: float) -> tuple[int, float, int, float, float]:
    """(launches, MB) forward and backward, and both times in us, at SHAPE."""
    found = measure(BY_NAME[name], "linear", SHAPE, p, ARCH)
    fw, bw = found.forward, found.backward
    us = microseconds(fw, H100) + microseconds(bw, H100)
    return cost.launches(fw), cost.moved(fw) / 1e6, cost.launches(bw), cost.moved(bw) / 1e6, us


@pytest.mark.parametrize(
    "name, p, want",
    [
        # of HF PEFT 0.21.2; docs/goals.md quotes them
        ("HF PEFT bf16", 0.0, (5, 638, 7, 773, 1049)),
        ("HF PEFT bf16", 0.1, (6, 806, 8, 941, 1159)),
        ("HF PEFT default", 0.0, (7, 1444, 10, 1782, 1644)),
        ("HF PEFT default", 0.1, (8, 1746, 11, 2084, 1842)),
        ("plain frozen", 0.0, (1, 168, 1, 168, 696)),
        ("floor", 0.1, (1, 168, 1, 236, 704)),
    ],
)
def test_the_numbers_of_hf_peft_come_out(name: str, p: float, want: tuple[int, ...]) -> None:
    found = counts(name, p)
    assert found[0] == want[0] and found[2] == want[2]
    assert found == pytest.approx(want, abs=1)


def test_a_group_adds_up_and_a_layer_counts_seven_adapters() -> None:
    one, three = (
        measure(BY_NAME["HF PEFT bf16"], c, SHAPE, 0.1, ARCH) for c in ("linear", "group")
    )
    assert cost.moved(three.forward) == 3 * cost.moved(one.forward)
    # dX of k and v are added to q's by autograd
    assert cost.launches(three.backward) == 3 * cost.launches(one.backward) + 2
    small_shape = Shape(M=256, r=8)
    for p, more in ((0.0, 4), (0.1, 5)):
        plain, peft = (
            measure(BY_NAME[n], "layer", small_shape, p, ARCH)
            for n in ("plain frozen", "HF PEFT bf16")
        )
        assert cost.launches(peft.forward) == cost.launches(plain.forward) + 7 * more
        assert cost.moved(peft.backward) > cost.moved(plain.backward)
    products = [t for t in plain.forward if t.name == "mm"]
    assert len(products) == 7 and "_scaled_dot_product_flash_attention" in {
        t.name for t in plain.forward
    }


def test_flops_do_not_depend_on_who_computes() -> None:
    shape = Shape(M=256, K=512, N=384, r=16)
    for which in ("forward", "backward"):
        flops = {
            name: sum(
                t.flops for t in getattr(measure(BY_NAME[name], "group", shape, 0.1, ARCH), which)
            )
            for name in ("floor", "HF PEFT bf16", "torch backend", "triton joined", "triton fused")
        }
        assert len(set(flops.values())) == 1, (which, flops)


def byte_counts(launch: Launch) -> tuple[int, int, int]:
    t = traffic(launch)
    return t.read, t.written, t.requested


def test_kernel_traffic_by_hand() -> None:
    """M=256, K=128, N=64, r=16.

    Bytes: X 65536, W 16384, Y 32768, A 4096, B 2048, S 8192, bits 4096.
    """
    x, w, y, s = meta(256, 128), meta(64, 128), meta(256, 64), meta(256, 16)
    a, b, words = meta(16, 128), meta(64, 16), meta(256, 4, dtype=INT32)
    (launch,) = kernel_bits.plan_bits(words[None], 128, 0.1, 7, kernel_bits.BitsConfig())
    assert byte_counts(launch) == (8, 4096, 8)  # the seed, which each program reads
    config = kernel_bits.BitsConfig(block=256)
    (launch,) = kernel_bits.plan_bits(words[None], 128, 0.1, 7, config)
    assert byte_counts(launch) == (8, 4096, 4 * 8)

    config = shrink.ShrinkConfig(block_m=64, block_k=64)
    (launch,) = shrink.plan_shrink(x, [a], [words], [1.0], s, config)
    assert byte_counts(launch) == (65536 + 4096 + 4096, 8192, 65536 + 4 * 4096 + 4096)
    # a mask that is drawn is written, and each program reads the seed
    (launch,) = shrink.plan_shrink(x, [a], [words], [1.0], s, config, kernel_bits.Draw(0.1, 7))
    wanted = (65536 + 4096 + 8, 8192 + 4096, 65536 + 4 * (4096 + 8))
    assert byte_counts(launch) == wanted
    # two adapters with one mask: X and the mask move once; K in two parts: fp32 partials, a sum
    config, two = shrink.ShrinkConfig(block_m=64, block_k=64, split_k=2), meta(256, 32)
    first, second = shrink.plan_shrink(x, [a, meta(16, 128)], [words] * 2, [1.0] * 2, two, config)
    assert byte_counts(first)[:2] == (65536 + 2 * 4096 + 4096, 2 * 256 * 32 * 4)
    assert byte_counts(second) == (2 * 256 * 32 * 4, 256 * 32 * 2, 2 * 256 * 32 * 4)

    config_w = expand.ExpandConfig(block_m=64, block_n=32, block_r=16)
    (launch,) = expand.plan_expand(y, [s], [b.T], [None], meta(64), None, config_w)
    wanted = (8192 + 2048 + 128, 32768, 2 * 8192 + 4 * 2048 + 4 * 128)
    assert byte_counts(launch) == wanted

    for tma in (False, True):
        tile = gemm.GemmConfig(128, 32, 64, tma=tma)
        (launch,) = gemm.plan_gemm(y, [x], [w], [s], [b.T], [None], None, ARCH, tile)
        once = 65536 + 16384 + 8192 + 2048
        assert byte_counts(launch) == (once, 32768, 2 * (65536 + 16384 + 8192 + 2048))
    assert traffic(launch).flops == 2 * 256 * 64 * (128 + 16)

    ds, db, da = meta(256, 16), meta(64, 16, dtype=FP32), meta(16, 128, dtype=FP32)
    config_o = grad_sb.GradSBConfig(block_m=128, block_n=32, split_n=1)
    first, second = grad_sb.plan_grad_sb(y, b, s, 1.0, ds, db, config_o)
    wanted = (32768 + 2048 + 8192, 8192 + 2 * 4096, 32768 + 2 * 2048 + 8192)
    assert byte_counts(first) == wanted
    assert byte_counts(second)[:2] == (2 * 4096, 4096)
    (launch,) = grad_a.plan_grad_a(x, [ds], [words], [da], grad_a.GradAConfig(block_k=32))
    assert byte_counts(launch) == (65536 + 8192 + 4096, 8192, 65536 + 4 * 8192 + 4096)

    # two projections with one mask: X and the mask once, both Y and S written
    tall = shrink_expand.ShrinkExpandConfig(block_m=64, block_k=64)
    (launch,) = shrink_expand.plan_shrink_expand(
        x, [a] * 2, [b] * 2, [words] * 2, [None, meta(64)], [1.0] * 2, meta(256, 32), [y, y], tall
    )
    once = 2 * 4096 + 2 * 2048 + 128
    wanted = (65536 + 4096 + once, 2 * 32768 + 2 * 8192, 65536 + 4 * once + 2 * 4096)
    assert byte_counts(launch) == wanted
    assert traffic(launch).flops == 2 * 2 * 256 * 16 * (128 + 64)
    each, draw = [words, meta(256, 4, dtype=INT32)], kernel_bits.Draw(0.1, 7)
    (launch,) = shrink_expand.plan_shrink_expand(
        x, [a] * 2, [b] * 2, each, [None, meta(64)], [1.0] * 2, meta(256, 32), [y, y], tall, draw
    )
    read, written = 65536 + once + 8, 2 * 32768 + 2 * 8192 + 2 * 4096
    assert byte_counts(launch) == (read, written, 65536 + 4 * (once + 8))
    strip = grad_xa.GradXAConfig(block_m=64, block_k=32)
    (launch,) = grad_xa.plan_grad_xa(x, [ds], [a], [words], meta(256, 128), [da], strip)
    wanted = (65536 + 8192 + 4096 + 4096, 65536 + 8192, 65536 + 4 * 8192 + 4 * 4096 + 4096)
    assert byte_counts(launch) == wanted
    assert traffic(launch).flops == 2 * 2 * 256 * 128 * 16


def test_decode_traffic_by_hand() -> None:
    """Four programs: in one launch each reads all of A, in two the first reads it once."""
    x, w, y = meta(1, 128), meta(64, 128), meta(1, 64)
    a, b = meta(16, 128), meta(64, 16)
    operands = [y], x, [w], [a], [b], None, [None], [1.0]
    config, arch = decode.DecodeConfig(block_n=16, split_k=0), Arch(132, 90, 232448)
    (launch,) = decode.plan_decode(*operands, config, arch)
    assert byte_counts(launch) == (
        256 + 16384 + 4096 + 2048, 128, 16384 + 2048 + 4 * (256 + 4096)
    )  # fmt: skip
    first, second = decode.plan_decode(*operands, replace(config, split_k=2), arch)
    part = 16 * 4  # S in float32; K is too short for a second part
    assert first.grid == (4, 1)  # programs of four ranks each, all of which read X
    assert byte_counts(first) == (256 + 4096, part, 4 * 256 + 4096)
    assert byte_counts(second) == (
        256 + 16384 + 2048 + part, 128, 16384 + 2048 + 4 * (256 + part)
    )  # fmt: skip


def test_mixed_traffic_by_hand() -> None:
    """Four samples of 8 rows in two tiles of 16.

    Both together meet three adapters, of rank 4, 8 and 16, and a tile meets three at most (off a
    sample's start). A lane has 256 bytes of A and 128 of B; the table has 24 bytes an adapter.
    """
    x, w, y, index = meta(32, 128), meta(64, 128), meta(32, 64), meta(4, dtype=torch.int32)
    As, Bs = [meta(r, 128) for r in (4, 16, 8)], [meta(64, r) for r in (4, 16, 8)]
    config = mixed.MixedConfig(block_m=16, block_n=32, low_k=64, low_split=2)
    segments, product = mixed.plan_mixed(y, x, w, As, Bs, [1.0] * 3, index, None, config, ARCH)
    s = 2 * 4 * 32 * 16  # two parts over K, fp32, as wide as the largest rank
    # three segments with 32 rows have four tiles at most, so that one A may be read again
    assert segments.grid == (2 * 4,)
    assert byte_counts(segments) == (
        8192 + 16 + 28 * 256, s + 3 * 24, 8192 + (28 + 16) * 256 + 8 * 2 * 16
    )  # fmt: skip
    assert product.grid == (4,)
    assert byte_counts(product) == (
        8192 + 16384 + s + 3 * 16 * 128 + 16 + 3 * 24,
        4096,
        2 * (8192 + s + 2 * 3 * 24 + 4 * 32) + 2 * (16384 + 3 * 16 * 128),
    )
    split = dataclasses.replace(config, split_k=2, block_k=64, finish_n=32)
    parts, finish = mixed.plan_mixed(y, x, w, As, Bs, [1.0] * 3, index, None, split, ARCH)
    p, factors = 2 * 2 * 32 * 64, 2 * 2 * 4 * 32  # fp16, and an fp32 factor for a tile's row
    assert parts.grid == (8 + 2 * 4,)
    assert byte_counts(parts) == (
        8192 + 16384 + 16 + 28 * 256,
        p + factors + s + 3 * 24,
        2 * 8192 + 2 * 16384 + 8192 + (28 + 16) * 256 + 8 * 2 * 16,
    )
    assert byte_counts(finish) == (
        p + factors + s + 3 * 16 * 128 + 16 + 3 * 24,
        4096,
        p + factors + 2 * (s + 2 * 3 * 24 + 4 * 32) + 2 * 3 * 16 * 128,
    )


def test_a_rank_chunk_reads_dy_again() -> None:
    y, b, s = meta(256, 64), meta(64, 256), meta(256, 256)
    ds, db = meta(256, 256), meta(64, 256, dtype=FP32)
    config = grad_sb.GradSBConfig(block_m=256, block_n=32)
    (launch,) = grad_sb.plan_grad_sb(y, b, s, 1.0, ds, db, config)
    assert launch.grid[2] == 2
    assert traffic(launch).read == 2 * 32768 + 64 * 256 * 2 + 256 * 256 * 2


@pytest.mark.parametrize("gpu", ["H100", "A100", "L40S"])
def test_every_shipped_launch_has_a_rule(gpu: str) -> None:
    seen = set()
    for case in shipped(Arch(*GPUS[gpu].arch)):
        found = traffic(case.launch)
        seen.add(case.launch.kernel.__name__)
        assert found.written > 0 and found.requested >= found.read >= 0, case.name
    assert seen == set(rules())


def test_a_kernel_without_a_rule_is_an_error() -> None:
    launch = reduce.plan_sum([(meta(2, 4, dtype=FP32), meta(4))])

    def unknown_kernel() -> None: ...

    with pytest.raises(KeyError, match="unknown_kernel has no traffic rule"):
        traffic(launch._replace(kernel=unknown_kernel))


def test_roofline_takes_the_longer_of_memory_and_arithmetic() -> None:
    product = Traffic("mm", 1, 100_000_000, 67_000_000, 2 * 8192 * 4096**2, "matrix")
    copy = Traffic("copy", 1, 3_000_000, 3_000_000)
    assert microseconds([copy], H100) == pytest.approx(6 / 3.05)
    both = 6 / 3.05 + 2 * 8192 * 4096**2 / 790e6
    assert microseconds([product, copy], H100) == pytest.approx(both)


@pytest.fixture(scope="module")
def rows() -> list[cost.Row]:
    return cost.table(SHAPE, H100, ("linear", "group"))


def test_targets_that_are_met(rows: list[cost.Row]) -> None:
    """Pinned where they hold; `python -m benchmarks.cost` prints those that do not."""
    found = {(v.case, v.provider, v.target): v for v in cost.verdicts(rows, SHAPE)}
    targets = list(dict.fromkeys(target for *_, target in found))
    assert len(targets) == 6
    for name in ("triton fused", "triton fused fp32", "triton joined", "triton joined fp32"):
        for target in targets:
            one, three = found["linear", name, target], found["group", name, target]
            assert three.met and three.value <= one.value + 1e-9, three
            if "joined" in name and target == "fwd bytes / PEFT":
                # X twice, W once, Y three times is 0.458 of PEFT's already: whoever lets the
                # vendor's product come last cannot meet 0.45 for a single projection
                assert 0.458 < one.value < 0.472, one
            else:
                assert one.met, one
    kept = {r.who.name: r.count.kept for r in rows if (r.case, r.p) == ("linear", 0.1)}
    assert kept["HF PEFT bf16"] == pytest.approx(101e6, rel=1e-2)
    assert kept["triton hybrid"] == 8192 * 4096 // 8 + 8192 * 16 * 2  # bits and S, nothing else


def test_the_goals_page_says_what_is_counted(rows: list[cost.Row]) -> None:
    found = {(v.case, v.provider, v.target): v for v in cost.verdicts(rows, SHAPE)}
    table = {row[0]: row[1:] for row in tables("docs/goals.md")["Counted"]}
    names = ("triton joined", "triton fused")
    for target in {target for *_, target in found}:
        verdicts = [found[case, name, target] for case in ("linear", "group") for name in names]
        values = [f"{v.value:.3g}" for v in verdicts]
        assert table[target] == [f"{verdicts[0].limit:g}", *values], target


def test_every_target_is_judged_by_its_value(rows: list[cost.Row]) -> None:
    found = cost.verdicts(rows, SHAPE)
    assert len({(v.case, v.provider) for v in found}) == 16
    assert all(v.met == (v.value <= v.limit) for v in found)
    hybrid = {v.target: v for v in found if (v.case, v.provider) == ("linear", "triton hybrid")}
    assert not hybrid["launches fwd"].met and hybrid["launches fwd"].value == 3
    small_shape = SHAPE._replace(M=512)  # the limit on kept bytes is for one shape
    assert "kept beyond X, MB" not in {v.target for v in cost.verdicts(rows, small_shape)}


def test_nothing_beats_the_floor(rows: list[cost.Row]) -> None:
    floors = {(r.case, r.p): r.count for r in rows if r.who.name == "floor"}
    for r in rows:
        if r.who.name not in ("floor", "plain frozen"):
            floor = floors[r.case, r.p]
            assert cost.moved(r.count.forward) > cost.moved(floor.forward), r.who
            assert cost.moved(r.count.backward) > cost.moved(floor.backward), r.who


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--M", "256", "--K", "512", "--N", "384", "--r", "8", "--case", "linear"]
    assert cost.main(["--json", "--launches", "--gpu", "A100", *size]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counted"] == "not measured"
    assert len(found["rows"]) == 2 * len(PROVIDERS)
    peft = next(r for r in found["rows"] if r["provider"] == "HF PEFT bf16")
    assert peft["forward"]["launches"] == sum(t["launches"] for t in peft["forward"]["list"]) == 5
    assert peft["forward"]["bytes_to_peft"] == 1.0
    assert cost.main(size) == 0
    out = capsys.readouterr().out
    assert "Counted, not measured" in out and "NOT met" in out and "triton fused" in out


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--M", "0"], "--M: '0'; allowed: an integer, 1 or more"),
        (["--r", "512"], "--r: 512; allowed: 1 to 256"),
        (["--gpu", "H1000"], "invalid choice: 'H1000'"),
    ],
)
def test_bad_arguments(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cost.main(argv)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_record_needs_a_count_under_way() -> None:
    record([Traffic("x", 1, 1, 1)])  # no count: nothing to add to, and no error
    with Counter() as counter:
        record([Traffic("x", 1, 2, 3)])
    assert [t.bytes for t in counter.launches] == [5]
