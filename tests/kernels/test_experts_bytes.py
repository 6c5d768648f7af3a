"""The bytes that a mixture's low-rank passes load: counted as they run, and by the rule of traffic.

They are counted in Triton's interpreter: every load of every program, masked lanes left out and
repeats included. Which rows are in which group is data, so the rule says what the worst routing
needs; here every expert has a row more than whole blocks, which is that one.
"""

import pytest
import torch

from benchmarks.kernels.table import traffic
from peftkern.kernels import experts_gate_grad, experts_grad, experts_route, experts_shrink
from peftkern.kernels.common import Arch
from peftkern.kernels.experts_gate_grad import ExpertsGateGradConfig
from peftkern.kernels.experts_grad import ExpertsGradConfig
from peftkern.kernels.experts_shrink import ExpertsShrinkConfig
from tests.kernels.counting import loads

pytestmark = pytest.mark.numeric  # of `make test-versions`

BF16, FP32, INT32 = torch.bfloat16, torch.float32, torch.int32
E, T, K, R = 4, 34, 96, 5  # 17 rows of each expert
ARCH = Arch(132, 90, 232448)


def routed():
    return experts_route.route(torch.arange(2 * T).view(T, 2) % E, E, 16)


def tensors(gather, wide):
    """(the operand of tokens or of sorted rows, S or dS, the masks, the weights)."""
    rows = T if gather else 2 * T
    return (
        torch.zeros(rows, wide, dtype=BF16),
        torch.zeros(2 * T, R, dtype=BF16),
        torch.zeros(2 * T, -(-wide // 32), dtype=INT32),
        torch.zeros(2 * T, dtype=FP32),
    )


def compare(launches, named):
    """The sizes of operands, how often each is loaded, after the whole is held against the rule."""
    first = launches[0]
    with loads(named) as found:
        first.run()
    assert sum(found.values()) == traffic(first).requested
    return found


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("split", [1, 3])
def test_shrink(gather, split):
    route, (x, _, words, _) = routed(), tensors(gather, K)
    a = torch.zeros(E, R, K)
    out, config = torch.empty(2 * T, R, dtype=BF16), ExpertsShrinkConfig(16, 32, split, 4, 2)
    launches = experts_shrink.plan_shrink(x, route, [a], [1.0], gather, words, out, config)
    found = compare(launches, {"x": x, "a": a, "words": words, "pairs": route.pairs})
    assert found["x"] == 2 * T * K * 2 and found["words"] == words.numel() * 4
    assert found["a"] == 2 * a.numel() * 4  # two blocks of each expert
    assert bool(found["pairs"]) == gather


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_gradients(gather, weighted):
    route, (x, s, words, weights) = routed(), tensors(gather, K)
    rows = E * 32  # with each expert's last row repeated
    b, given = torch.zeros(E, K, R), weights if weighted else None
    config = ExpertsGradConfig(16, 32, 4, 2)
    ds, db = torch.empty(2 * T, R, dtype=BF16), torch.empty(E, K, R)
    launches = experts_grad.plan_grad_sb(
        x, route, b, s, 1.0, gather, given, ds, db, config
    )  # fmt: skip
    found = compare(launches, {"dy": x, "b": b, "s": s})
    assert found["dy"] == rows * K * 2 and found["b"] == b.numel() * 4
    assert found["s"] == 3 * s.numel() * 2  # each block of columns
    da = torch.empty(E, R, K)
    launches = experts_grad.plan_grad_a(s, x, route, gather, given, words, da, config)
    found = compare(launches, {"x": x, "ds": s, "words": words})
    assert found["x"] == rows * K * 2 and found["words"] == words.numel() * 4
    assert found["ds"] == 3 * s.numel() * 2


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("r, down", [(R, R), (R, 20), (2 * R, 7)])
def test_gradients_through_the_gate(layout, r, down):
    """With blocks of 16 ranks; H is written for 20, where two of them would be needed."""
    route, (dh, _, words, weights) = routed(), tensors(False, K)
    gu, b = torch.zeros(2 * T, 2 * K, dtype=BF16), torch.zeros(E, 2 * K, r)
    s, ds, ds_down = (torch.zeros(2 * T, n, dtype=BF16) for n in (r, r, down))
    out = experts_gate_grad.ExpertsGateGrads(
        torch.empty_like(gu), weights.new_empty(2 * T), ds, torch.empty(b.shape),
        torch.empty(E, down, K),
    )  # fmt: skip
    launches = experts_gate_grad.plan_gate_grad(
        dh, gu, route, "silu", layout, weights, b, s, 1.0, None, ds_down, words, out,
        ExpertsGateGradConfig(16, 32, num_stages=2), ARCH,
    )  # fmt: skip
    named = {"dh": dh, "gu": gu, "ds_down": ds_down, "words": words, "s": s, "b": b}
    found = compare(launches, named)
    inside = down <= 16
    assert found["dh"] == dh.numel() * 2 and found["gu"] == gu.numel() * 2
    assert found["ds_down"] == 3 * ds_down.numel() * 2 * inside  # each strip
    assert found["words"] == words.numel() * 4 * inside
    assert found["s"] == 3 * s.numel() * 2 and found["b"] == b.numel() * 4


def test_route():
    index = torch.arange(2 * T).view(T, 2) % E
    launches = experts_route.plan_route(index, None, routed())
    for launch in launches:
        with loads({"index": index}) as found:
            launch.run()
        assert found["index"] == 2 * T * 8
        assert sum(found.values()) == traffic(launch).requested
