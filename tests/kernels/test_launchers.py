"""Ring 3 builds what stands between a compiled kernel and a device, for every case that ships."""

from __future__ import annotations

import json

import pytest

from tests.kernels.compiler import python

ALL = """
import json
from pathlib import Path
from benchmarks.static.launching import launcher_problem
from benchmarks.static.run import TARGETS, all_cases

found = {
    f"{name} {case.name}": launcher_problem(case.launch, name, c="gemm" in case.name)
    for name in TARGETS
    for case in all_cases(name, Path("kernels/tuning"))
}
print(json.dumps(found))
"""

TOY = """
import sys
import torch, triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from benchmarks.static.launching import launcher_problem
from peftkern.kernels.common import Launch

@triton.jit
def inside(out, tiles):
    out.store([0, 0], tiles[0].load([0, 0]))

@triton.jit
def alone(out, tile):
    out.store([0, 0], tile.load([0, 0]))

def described():
    t = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    return TensorDescriptor(t, [64, 64], [64, 1], [64, 64])

print(launcher_problem(Launch(inside, (1,), (described(), (described(),)), {}), "sm_90"))
print(launcher_problem(Launch(alone, (1,), (described(), described()), {}), "sm_90"))
"""


@pytest.mark.long
def test_every_case_has_a_launcher() -> None:
    done = python("-c", ALL, cache=None)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > 1000
    assert {name: problem for name, problem in found.items() if problem} == {}


def test_a_descriptor_inside_a_tuple_is_seen_where_launchers_refuse_it(tmp_path) -> None:
    path = tmp_path / "toy.py"  # Triton reads a kernel's source from its file
    path.write_text(TOY)
    code = "import runpy, sys; runpy.run_path(sys.argv[1])"
    done = python("-c", code, str(path), cache=None)
    assert done.returncode == 0, done.stderr
    inside, alone = done.stdout.splitlines()[-2:]
    assert alone == "None"
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):  # 3.6; newer ones expand tuples
        assert inside.startswith("no launcher: AssertionError")
    else:
        assert inside == "None"
