"""Ring 3 sees what makes a kernel slow: each rule on a kernel that breaks it and one that does not.

What ships is judged by the same rules in test_static_results.py.
"""

from __future__ import annotations

import json

import pytest
import triton

from benchmarks.static import exemptions, judging
from benchmarks.static.exemptions import Exemption
from tests.kernels.compiler import python

TOYS = """
import json
import torch, triton
import triton.language as tl
from benchmarks.kernels.entry import Case, meta
from benchmarks.static.run import measure
from peftkern.kernels.common import Launch

@triton.jit
def product(x, w, y, K):
    row, col, step = tl.arange(0, 64), tl.arange(0, 64), tl.arange(0, 64)
    acc = tl.zeros((64, 64), tl.float32)
    for k0 in range(0, K, 64):
        x_tile = tl.load(x + row[:, None] * K + (k0 + step)[None, :])
        w_tile = tl.load(w + (k0 + step)[:, None] * 64 + col[None, :])
        acc = tl.dot(x_tile, w_tile, acc)
    tl.store(y + row[:, None] * 64 + col[None, :], acc)

@triton.jit
def total(x, y, K):
    at = tl.arange(0, 4096)
    acc = tl.zeros((4096,), tl.float32)
    for k0 in range(0, K, 4096):
        acc += tl.load(x + k0 + at)
    tl.store(y + at, acc)

@triton.jit
def copy(x, y, stride):
    row, col = tl.arange(0, 64), tl.arange(0, 64)
    tile = tl.load(x + row[:, None] * stride + col[None, :])
    tl.store(y + row[:, None] * 64 + col[None, :], tile)

def told(kernel, *args, arch="sm_80", grid=1, **meta):
    row = measure(Case("toy", Launch(kernel, (grid,), args, {"num_warps": 4, **meta})), arch)
    return [row.get("problem", row.get("error")), row["ahead"], row["width"], row["waves"]]

x, w, y = meta(64, 1024), meta(1024, 64), meta(64, 64, dtype=torch.float32)
tile, odd = meta(64, 64), meta(64, 65)
print(json.dumps({
    "three": told(product, x, w, y, 1024, num_stages=3),
    "two": told(product, x, w, y, 1024, num_stages=2),
    "two on sm_90": told(product, x, w, y, 1024, num_stages=2, arch="sm_90"),
    "no product": told(total, x, y, 65536, num_stages=3),
    "one": told(total, x, y, 65536, num_stages=1),
    "no loop": told(copy, tile, tile, 64, num_stages=2),
    "odd rows": told(copy, odd, tile, 65, num_stages=1),
    "even rows": told(copy, tile, tile, 64, num_stages=1),
    "full": told(copy, tile, tile, 64, num_stages=1, arch="sm_90", grid=132 * 16),
    "one more": told(copy, tile, tile, 64, num_stages=1, arch="sm_90", grid=132 * 16 + 1),
    "one more on sm_80": told(copy, tile, tile, 64, num_stages=1, grid=108 * 16 + 1),
}))
"""


def run(tmp_path, text):
    path = tmp_path / "toy.py"  # Triton reads a kernel's source from its file
    path.write_text(text)
    code = "import runpy, sys; runpy.run_path(sys.argv[1])"
    done = python("-c", code, str(path), cache=tmp_path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_loops_widths_and_waves_of_small_kernels(tmp_path):
    seen = run(tmp_path, TOYS)
    # three stages: two tiles are asked for before the loop, and one of them is in flight
    assert seen["three"][:3] == [None, 1, 16]
    # two stages: the next tile is asked for after the products that the place is needed for
    assert seen["two"][:2] == ["num_stages=2, no copy of x, w in flight", 0]
    assert seen["two on sm_90"][:2] == [None, 1]  # a place more, for a product in flight
    assert seen["no product"][:2] == ["num_stages=3, no copy of x in flight", 0]
    assert seen["one"][:2] == [None, 0]
    assert seen["no loop"][0] == "num_stages=2 without a loop that loads"
    assert seen["odd rows"][0] == "load of x 2 bytes wide, 16 possible"
    assert seen["odd rows"][2] == 2
    assert seen["even rows"][:3] == [None, None, 16]
    assert seen["full"] == [None, None, 16, 1.0]
    assert seen["one more"][0] == "1.00 waves: the last is nearly empty" and seen["one more"][3] > 1
    assert seen["one more on sm_80"][0] is None  # judged where goals are


FLAT = """
import json
from benchmarks.kernels.entry import Case, meta
from benchmarks.static.run import TARGETS, measure
from peftkern.kernels import gemm

x, w, s, b, y = meta(256, 512), meta(512, 512), meta(256, 16), meta(512, 16), meta(256, 512)

def told(name, flatten):
    arch = TARGETS[name].arch
    config = gemm.GemmConfig(128, 128, 64, tma=True, flatten=flatten)
    launch = gemm.plan_gemm(y, [x], [w], [s], [b.T], [None], None, arch, config)[0]
    launch = launch._replace(meta=launch.meta | {"FLATTEN": flatten})  # refused on sm_100
    return measure(Case("gemm", launch, True), name).get("problem")

names = "sm_90", "sm_100"
print(json.dumps({f"{n} {f}": told(n, f) for n in names for f in (False, True)}))
"""


@pytest.mark.long
def test_a_flattened_gemm_is_seen_to_lose_its_pipeline(tmp_path):
    """In the IR alone where the low-rank part is first, and in the assembler's log on sm_90."""
    seen = run(tmp_path, FLAT)
    assert seen["sm_90 False"] is None and seen["sm_100 False"] is None
    assert "no copy of x0, w0 in flight" in seen["sm_100 True"]
    if triton.__version__.startswith("3.6."):
        assert seen["sm_90 True"] == "the assembler runs products one by one"


def row(**changes):
    """A row of ring 3 and its facts, none of which breaks a rule."""
    config = {"num_stages": 3, "TMA": True}
    made = {"arch": "sm_90", "case": "toy", "kernel": "toy.kernel", "config": config, "grid": [132]}
    facts = {
        "matrix_bound": True, "warps": 8, "registers": 200, "spilled": 0, "shared": 1000,
        "tensor_memory": 0, "instructions": {"wgmma": 4}, "serialized": False, "products": 1,
        "loads": {"x": [16384, 2, 0], "bias": [512, None, 2]}, "stores": {"y": [65536, 16]},
    }  # fmt: skip
    return {**made, **facts, **changes}


def judged(**changes):
    return judging.judge(row(**changes), {})


def test_a_row_that_breaks_no_rule_has_no_problem():
    assert "problem" not in judged() and judged()["exempt"] == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"products": 0}, "no product in flight"),
        ({"serialized": True}, "the assembler runs products one by one"),
        ({"loads": {"x": [16384, 0, 0]}}, "num_stages=3, no copy of x in flight"),
        ({"loads": {"x": [16384, None, 0]}}, "num_stages=3 without a loop that loads"),
        ({"stores": {"y": [65536, 8]}}, "store of y 8 bytes wide, 16 possible"),
        ({"stores": {"y": [65536, None]}}, "store of y of unknown width"),
        ({"grid": [133]}, "1.01 waves: the last is nearly empty"),
        ({"grid": [3, 140]}, "3.18 waves: the last is nearly empty"),
    ],
)
def test_each_rule_alone(changes, problem):
    assert judged(**changes)["problem"] == problem


@pytest.mark.parametrize(
    "changes",
    [
        # a load of little, next to much, does not hold a step up
        {"loads": {"x": [16384, 2, 0], "words": [512, 0, 4]}},
        {"stores": {"y": [1024, 4]}},  # all that there is for each of 256 threads
        {"grid": [132 * 4 + 1]},
        {"grid": [132 + 33]},
        {"grid": [100]},
    ],
)
def test_what_the_rules_let_pass(changes):
    assert "problem" not in judged(**changes)


def test_an_exemption_is_for_its_rule_kernel_and_cases_and_is_reported_when_unused(monkeypatch):
    excuse = Exemption("narrow y", "width", "toy.kernel", "sm_90 toy", "a test")
    monkeypatch.setattr(exemptions, "EXEMPTIONS", (excuse,))
    narrow = {"stores": {"y": [65536, 8]}}
    kept = judged(**narrow)
    assert kept["exempt"] == ["narrow y"] and "problem" not in kept
    assert exemptions.unused([kept]) == []
    assert exemptions.unused([judged()]) == ["narrow y"]
    for other in ({"arch": "sm_80"}, {"case": "other"}, {"kernel": "toy.other"}):
        assert "8 bytes wide" in judged(**narrow, **other)["problem"]
    assert judged(**narrow, grid=[133])["problem"].startswith("1.01 waves")


def test_exemptions_have_names_rules_and_reasons():
    names = [each.name for each in exemptions.EXEMPTIONS]
    assert len(set(names)) == len(names)
    for each in exemptions.EXEMPTIONS:
        assert each.rule in ("pipeline", "products", "width", "waves") and len(each.why) > 20, (
            each.name
        )
