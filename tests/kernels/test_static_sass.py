"""The machine code of the fused GEMM: copies and products of later steps run during a step.

TTGIR says what Triton planned; the assembler may undo it, and only its output shows that.
"""

from __future__ import annotations

import json
import re

import pytest

from tests.kernels.compiler import python

SASS = """
import json, subprocess, sys, tempfile
from pathlib import Path
import triton
from benchmarks.static.compiling import NoDevice, gpu_target
from benchmarks.static.run import all_cases
from triton.runtime import driver

triton.knobs.compilation.always_compile = True
name, wanted = sys.argv[1:]
(case,) = [c for c in all_cases(name, Path("kernels/tuning")) if c.name == wanted]
driver.set_active(NoDevice(gpu_target(name)))
launch = case.launch
with tempfile.TemporaryDirectory() as folder:
    triton.knobs.cache.dir = folder
    compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta)
    path = Path(folder, "kernel.cubin")
    path.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
print(json.dumps({"sass": text, "grid": launch.grid, "config": launch.meta}))
"""
CASE = "gemm Y r16 bf16/fp32"


def instructions(sass: str) -> list[str]:
    """Labels and instructions without their addresses."""
    lines = (re.sub(r"/\*.*?\*/", "", line).strip() for line in sass.splitlines())
    return [line for line in lines if line and not line.startswith(("//", ".section", ".align"))]


def loops(lines: list[str]) -> list[tuple[int, int]]:
    """(first, last) of each stretch that ends with a branch back to its beginning."""
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.L\w+:", line)}
    found = []
    for i, line in enumerate(lines):
        target = re.search(r"\bBRA\S* .*?`\((\.L\w+)\)", line)
        if target and labels.get(target[1], i) < i:
            found.append((labels[target[1]], i))
    return found


def compiled(name, cache):
    done = python("-c", SASS, name, CASE, cache=cache)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return instructions(found["sass"]), found


def main_loop(lines, product):
    """The smallest loop with the matrix instruction and bulk copies, as (first, its lines)."""
    both = [
        (first, lines[first : last + 1])
        for first, last in loops(lines)
        if all(
            any(word in line for line in lines[first : last + 1]) for word in (product, "UTMALDG")
        )
    ]
    return min(both, key=lambda found: len(found[1]))


def positions(lines, word):
    return [i for i, line in enumerate(lines) if re.search(rf"\b{word}", line)]


@pytest.mark.long
def test_on_sm_90_a_step_leaves_its_products_in_flight(tmp_path):
    lines, launch = compiled("sm_90", tmp_path)
    first, loop = main_loop(lines, "HGMMA")
    steps = launch["config"]["BLOCK_K"] // 16
    products = [line for line in loop if "HGMMA" in line]
    assert len(products) == steps
    assert ["gsb0" in line for line in products] == [False] * (steps - 1) + [True]
    waits = [line for line in loop if "WARPGROUP.DEPBAR" in line]
    assert len(waits) == 1 and waits[0].endswith("gsb0, 0x1 ;")  # the step before, not this one
    assert len(positions(loop, "UTMALDG")) == 2  # X and W of a later step
    assert len(positions(lines, "UTMALDG")) == 2 * launch["config"]["num_stages"]
    # S and B are the last step, into the same registers
    last = positions(lines, "HGMMA")[-1]
    assert last > first + len(loop)
    assert (
        len({re.search(r"HGMMA\S* (R\d+),", lines[i])[1] for i in positions(lines, "HGMMA")}) == 1
    )
    assert_one_store_and_one_launch(lines, launch, 132)


@pytest.mark.long
def test_on_sm_100_a_step_leaves_its_products_in_flight(tmp_path):
    lines, launch = compiled("sm_100", tmp_path)
    first, loop = main_loop(lines, "UTCHMMA")
    assert len(positions(loop, "UTCHMMA")) == launch["config"]["BLOCK_K"] // 16
    assert len(positions(loop, "UTMALDG")) == 2
    # A step's products signal one barrier; the step waits for its copies and then, after its
    # products have begun, for those of the step before.
    begun, (signal,) = positions(loop, "UTCHMMA"), positions(loop, "UTCBAR")
    waits = positions(loop, "SYNCS.PHASECHK")
    assert waits[0] < begun[0] < begun[-1] < signal < waits[-1] < positions(loop, "UTMALDG")[0]
    own = re.search(r"UTCBAR \[(UR\d+)\]", loop[signal])[1]
    assert f"[{own}]" not in loop[waits[-1]]
    assert positions(lines, "UTCHMMA")[0] < first  # S and B are the first step
    assert_one_store_and_one_launch(lines, launch, 148)


def assert_one_store_and_one_launch(lines, launch, multiprocessors):
    """Y is written once, by a bulk copy, by as many programs as there are multiprocessors."""
    assert len(positions(lines, "UTMASTG")) == 1 and not positions(lines, "STG")
    assert launch["grid"] == [multiprocessors]
