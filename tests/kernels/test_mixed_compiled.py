"""The compiled launches of a mixed batch: what they wait for, and how wide their loads are."""

import json

import pytest

from tests.kernels.compiler import python

CODE = """
import json, re
from pathlib import Path
from benchmarks.static.compiling import NoDevice, gpu_target
from benchmarks.static.run import all_cases
from triton.runtime import driver

WANTED = ("mixed M16 T1 L8 r16 bf16/bf16", "mixed M8192 T1024 L8 r16 fp16/fp16")
FOUND = r"griddepcontrol\\.\\w+|ld\\.global[.\\w]*|cp\\.async\\.c[ag]|st\\.global|mma[._]\\w+"
made = {}
for name in ("sm_90", "sm_80"):
    driver.set_active(NoDevice(gpu_target(name)))
    for case in all_cases(name, Path("kernels/tuning")):
        if case.name.removesuffix(" +1") in WANTED:
            launch = case.launch
            done = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta)
            made[f"{name} {launch.kernel.__name__}"] = {
                "pdl": bool(done.metadata.launch_pdl), "steps": re.findall(FOUND, done.asm["ptx"])
            }
print(json.dumps(made))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    done = python("-c", CODE, cache=tmp_path_factory.mktemp("cache"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_the_second_launch_waits_for_the_first_when_it_has_streamed_w(made):
    """It is a dependent launch; the first is not, as the work before it may have written W."""
    for first in ("_parts_kernel", "_segment_kernel"):
        kernel = made[f"sm_90 {first}"]
        assert not kernel["pdl"]
        assert kernel["steps"][0] == "griddepcontrol.launch_dependents"
        assert "griddepcontrol.wait" not in kernel["steps"]
    for second in ("_finish_kernel", "_product_kernel"):
        kernel = made[f"sm_90 {second}"]
        assert kernel["pdl"] and kernel["steps"].count("griddepcontrol.wait") == 1
    steps = made["sm_90 _product_kernel"]["steps"]
    waits = steps.index("griddepcontrol.wait")
    assert steps[:waits].count("cp.async.cg") > 8 and "st.global" not in steps[:waits]
    after = steps[waits + 1 :]
    assert "cp.async.cg" not in after, "the tiles of X and W are loaded after the wait"
    assert "ld.global.b64" in after, "the table is read after the wait"
    assert "ld.global.b64" not in steps[:waits]
    before = made["sm_90 _finish_kernel"]["steps"]
    before = before[: before.index("griddepcontrol.wait")]
    assert set(before) == {"ld.global.b32"}, "only the index may be read before the wait"


@pytest.mark.long
def test_no_instruction_for_dependent_launches_below_sm_90(made):
    names = [name for name in made if name.startswith("sm_80")]
    assert len(names) == 4
    for name in names:
        assert not made[name]["pdl"]
        assert not any(step.startswith("griddepcontrol") for step in made[name]["steps"])


@pytest.mark.long
def test_loads_are_16_bytes_wide(made):
    """A and W by asynchronous copies of 16 bytes (.ca copies less), B into registers."""
    for name in ("_segment_kernel", "_product_kernel"):
        steps = made[f"sm_90 {name}"]["steps"]
        assert "cp.async.cg" in steps and "cp.async.ca" not in steps
    steps = made["sm_90 _parts_kernel"]["steps"]  # 2 KB of X for 256 threads, beside 64 KB of W
    assert 0 < 16 * steps.count("cp.async.ca") <= steps.count("cp.async.cg")
    for name in ("_finish_kernel", "_product_kernel"):
        steps = made[f"sm_90 {name}"]["steps"]
        assert any(s.startswith(("ld.global.v4", "ld.global.v2")) for s in steps), steps
