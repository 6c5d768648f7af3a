"""A mixture's launches and bytes: rules and the floor by hand, and peftkern's against the floor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from benchmarks.cost import experts, experts_floor
from benchmarks.cost import run as cost
from benchmarks.cost.count import Counter
from benchmarks.cost.experts_floor import Mixture
from benchmarks.cost.gpus import GPUS
from peftkern.kernels.common import Arch

from .pages import tables

BF16, FP32, INT32 = torch.bfloat16, torch.float32, torch.int32
H200 = GPUS["H200"]
CASES = tuple(experts.CASES)


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


X, ENDS = meta(8, 16), meta(2, dtype=INT32)  # 256 and 8 bytes
FEW = meta(1, 16)


@pytest.mark.parametrize(
    "call, want",
    [
        # two launches: addresses, then products of all rows
        (lambda: grouped_mm(X, meta(2, 16, 8), offs=ENDS), [(2, 256 + 512 + 8, 128)]),
        # one row has one expert
        (lambda: grouped_mm(FEW, meta(2, 16, 8), offs=ENDS), [(2, 32 + 256 + 8, 16)]),
        # an outer product for each expert
        (lambda: grouped_mm(X.t(), meta(8, 24), offs=ENDS), [(2, 256 + 384 + 8, 2 * 768)]),
        # keys, then their copy and indices
        (lambda: meta(8, dtype=torch.int64).sort(), [(3, 64 + 128, 256)]),
        # indices, counts, sums and eight passes over keys and indices
        (
            lambda: meta(8192, dtype=torch.int64).sort(),
            [(11, 8192 * (8 + 8 * 16), 8192 * (8 + 8 * 16))],
        ),
        # sorted by 13 bits of the index in two passes, then three rows of values onto three
        (
            lambda: torch.ops.aten.index_put(
                meta(8192, 4), [meta(3, dtype=torch.int64)], meta(3, 4), True
            ),
            [(5, 3 * (8 + 2 * 16), 3 * (8 + 2 * 16)), (1, 24 + 24 + 24 + 24, 24)],
        ),
        (lambda: X.masked_fill_(meta(8, 1, dtype=torch.bool), 0.0), [(1, 256 + 8, 256)]),
        (lambda: torch.histc(meta(8, dtype=INT32), 4, 0, 3), [(2, 32, 16)]),
    ],
)
def test_operations_counted_by_hand(call: Any, want: list[tuple[int, int, int]]) -> None:
    with Counter() as counter:
        call()
    assert [(t.launches, t.read, t.written) for t in counter.launches] == want


def test_products_of_groups_know_their_flops() -> None:
    with Counter() as counter:
        grouped_mm(X, meta(2, 16, 8), offs=ENDS)
        grouped_mm(X.t(), meta(8, 24), offs=ENDS)
    assert [(t.flops, t.unit) for t in counter.launches] == [
        (2 * 8 * 16 * 8, "matrix"), (2 * 8 * 16 * 24, "matrix")
    ]  # fmt: skip


def test_a_grouped_product_without_a_rule_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="no launch rule"), Counter():
        grouped_mm(meta(2, 8, 16), meta(16, 32), offs=ENDS)


def test_the_floor_by_hand() -> None:
    """T=16, k=2, E=4, D=8, I=6, r=1, bf16; 32 pairs.

    Bytes: X 256, W_u 768, W_d 384, A_u 64, B_u 96, A_d 48, B_d 64, GU 768, H 384, Y 512, S 64,
    order 128, routing 64.
    """
    m = Mixture(16, 2, 4, 8, 6, 1)
    assert [(t.read, t.written) for t in experts_floor.forward(m)] == [
        (256 + 128 + 768 + 64 + 96, 768 + 64),
        (768 + 48, 384 + 64),
        (384 + 64 + 128 + 384 + 64, 512),
        (512 + 64, 256),
    ]
    assert [(t.read, t.written) for t in experts_floor.backward(m)] == [
        (256 + 128 + 64 + 384 + 48 + 64 + 64, 384 + 64 + 64),
        (384 + 768 + 128 + 64 + 96 + 2 * 64, 768 + 64 + 96 + 48 + 64),
        (768 + 64 + 128 + 768 + 64 + 256, 512 + 64),
        (512, 256),
    ]
    assert experts_floor.kept(m) == 768 + 2 * 64 + 128
    wide = m._replace(adapter=FP32, bias=True)
    more = 2 * (12 + 8) * 4  # both biases
    factors = 64 + 96 + 48 + 64
    for part, times in ((experts_floor.forward, 1), (experts_floor.backward, 2)):
        bias = more if part is experts_floor.forward else 4 * 8 * 2
        grown = cost.moved(part(wide)) - cost.moved(part(m))
        assert grown == times * factors + bias
    one = m._replace(T=1)  # two experts of four
    assert cost.moved(experts_floor.forward(one)) < cost.moved(experts_floor.forward(m)) / 2


# of the index: fewer where transformers lets an index name an expert of another process
CHECKS = {"sub", "eq", "ge", "clamp", "all", "bitwise_and", "_assert_async"}


@pytest.fixture(scope="module")
def rows() -> list[cost.Row]:
    return cost.table(cost.Shape(), H200, ["experts"])


def test_every_way_does_the_floors_products(rows: list[cost.Row]) -> None:
    """The kernels' tiles of even routing are full; HF PEFT's W + B A takes other products."""
    for case in CASES:
        found = {r.who.name: r.count for r in rows if r.case == case}
        for phase in ("forward", "backward"):
            flops = {
                name: sum(t.flops for t in getattr(count, phase) if t.unit == "matrix")
                for name, count in found.items()
            }
            floor, plain = flops["floor"], flops["plain frozen"]
            for name in ("split form", "split form fp32", "torch grouped", "torch grouped fp32"):
                # the gradient of the routing weights goes through down's bias
                assert flops[name] == floor, (case, phase, name)
            for name in ("triton", "triton fp32"):
                assert floor <= flops[name] < 1.002 * floor, (case, phase, name)
            assert plain < floor < flops["HF PEFT bf16"], (case, phase)


def test_nobody_moves_less_than_the_floor(rows: list[cost.Row]) -> None:
    for case in CASES:
        found = {r.who.name: r.count for r in rows if r.case == case}
        for name, count in found.items():
            floor = found["floor"]
            assert cost.moved(count.forward) >= cost.moved(floor.forward), (case, name)
            assert cost.moved(count.backward) >= cost.moved(floor.backward), (case, name)


def test_the_kernels_launches_and_bytes(rows: list[cost.Row]) -> None:
    """At most 13 launches forward, and in either pass at most 1.15 of the floor's bytes."""
    forward = [
        "experts_route_count", "experts_route_place", "clone", "clone", "experts_shrink",
        "experts gemm", "experts_gate", "experts gemm", "experts combine",
    ]  # fmt: skip
    backward = [
        "experts_grad_sb", "sum", "experts gemm", "experts_gate_grad", "experts_gate_sum",
        "experts_grad_a", "experts gemm", "experts combine", "_to_copy", "clone",
    ]  # fmt: skip
    of_bias = ["mm", "_to_copy", "clamp", "gather", "ge", "masked_fill_", "add"]
    for case in CASES:
        found = {r.who.name: r.count for r in rows if r.case == case}
        ours = found["triton fp32"]
        assert [t.name for t in ours.forward if t.name not in CHECKS] == forward
        want = backward[:8] + (of_bias if case == "experts gpt-oss" else []) + backward[8:]
        assert [t.name for t in ours.backward] == want
        assert len(forward) + 2 <= cost.launches(ours.forward) <= 13
        floor = found["floor fp32"]
        # the bounds of the groups on top of what the floor keeps
        assert ours.kept == floor.kept + 4 * (experts.mixture(case, FP32).E + 1)
        peft, split = found["HF PEFT default"], found["split form fp32"]
        for phase in ("forward", "backward"):
            own = cost.moved(getattr(ours, phase))
            assert cost.moved(getattr(peft, phase)) > 3.5 * own
            assert cost.moved(getattr(split, phase)) > 2.5 * own
        assert peft.kept > 8 * ours.kept
        # dA of down is made where H is in registers, and nobody writes H
        [through] = [t for t in ours.backward if t.name == "experts_gate_grad"]
        [own] = [t for t in floor.backward if t.name == "floor, gate"]
        m = experts.mixture(case, FP32)
        assert own.written < through.written < own.written + m.P * m.I * 2
    for v in cost.expert_verdicts(rows):
        assert v.limit == 1.15 and v.met, v


def test_the_goals_page_says_what_is_counted_of_experts(rows: list[cost.Row]) -> None:
    found = {(v.case, v.provider, v.target): v for v in cost.expert_verdicts(rows)}
    table = {row[0]: row[1:] for row in tables("docs/goals.md")["Experts"]}
    for target in {target for *_, target in found}:
        values = [
            f"{found[case, name, target].value:.3g}"
            for case in CASES
            for name in ("triton", "triton fp32")
        ]
        assert table[target] == ["1.15", *values], target


def test_a_provider_that_takes_another_path_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    who, own = next(w for w in experts.PROVIDERS if w.name == "triton"), experts.as_a_gpu
    monkeypatch.setattr(experts, "as_a_gpu", lambda kind, arch: own("torch", arch))
    with pytest.raises(RuntimeError, match="triton: the experts did not take the joined path"):
        experts.measure(who, "experts qwen3", Arch(*H200.arch))


def test_one_token_reads_the_weights_of_its_experts_alone() -> None:
    """Three kernels, and at most four small launches that check the index."""
    arch, case = Arch(*H200.arch), "experts qwen3"
    by_name = {w.name: w for w in experts.PROVIDERS}
    ours = experts.inferred(by_name["triton fp32"], case, 1, arch)
    plain = experts.inferred(by_name["plain frozen"], case, 1, arch)
    peft = experts.inferred(by_name["HF PEFT default"], case, 1, arch)
    names = ["experts_few_shrink", "experts_few_up", "experts_few_down"]
    assert [t.name for t in ours if t.name not in CHECKS] == names and len(ours) <= 7
    floor = cost.moved(experts_floor.forward(experts.mixture(case, FP32, 1)))
    assert cost.moved(ours) == pytest.approx(floor, rel=0.05)  # GU is not written
    assert floor < 1.1 * cost.moved(plain) and cost.launches(plain) > 2 * len(ours)
    assert cost.moved(peft) > 80 * floor


def test_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    few = [w for w in experts.PROVIDERS if w.name in ("floor", "HF PEFT bf16", "triton")]
    monkeypatch.setattr(experts, "PROVIDERS", tuple(few))
    assert cost.main(["--case", "experts", "--gpu", "H200"]) == 0
    out = capsys.readouterr().out
    assert "Experts of a Qwen3-30B-A3B layer" in out and "Experts of a gpt-oss-20b layer" in out
    assert "Targets of a mixture" in out and "step bytes / floor" in out
