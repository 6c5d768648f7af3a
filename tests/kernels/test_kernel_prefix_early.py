"""Prefix decode as GPUs run it: where its merge waits, its modelled time, its counted bytes."""

from __future__ import annotations

import json

import pytest

from benchmarks.kernels import prefix, prefix_decode
from benchmarks.kernels.table import traffic
from peftkern.kernels.common import Arch
from tests.kernels.compiler import python

CODE = """
import json, re, sys
from benchmarks.cost.timed import JUDGED, timed
from benchmarks.kernels.prefix import everything, problem
from benchmarks.kernels.prefix_decode import launches
from benchmarks.static.compiling import NoDevice, gpu_target
from benchmarks.static.launching import launcher_problem
from benchmarks.static.run import TARGETS
from triton.runtime import driver

EVENTS = {"start": r"griddepcontrol\\.launch_dependents", "wait": r"griddepcontrol\\.wait",
          "load": r"ld\\.global|cp\\.async\\.c[ag]", "store": r"st\\.global"}
found = {}
for name in sys.argv[1:]:
    for options in ({}, everything()):
        for launch in launches(problem(1, 512, 128, **options), TARGETS[name].arch):
            driver.set_active(NoDevice(gpu_target(name)))
            compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta)
            events = [k for line in compiled.asm["ptx"].splitlines() for k, p in EVENTS.items()
                      if re.search(p, line)]
            found[f"{name} {len(options)} {launch.kernel.__name__}"] = [
                events, bool(compiled.metadata.launch_pdl), launcher_problem(launch, name)]
case = timed("prefix decode", JUDGED)
print(json.dumps([found, case.us("peftkern")]))
"""


@pytest.mark.long
def test_the_merge_starts_early_and_reads_after_its_wait() -> None:
    done = python("-c", CODE, "sm_80", "sm_90", cache=None)
    assert done.returncode == 0, done.stderr
    found, modelled = json.loads(done.stdout.splitlines()[-1])
    assert modelled <= 7.0  # modelled us, on an H200; not measured
    assert len(found) == 8
    for name, (events, early, problem) in found.items():
        assert problem is None and "load" in events and "store" in events, name
        if name.startswith("sm_80"):
            assert not early and not {"start", "wait"} & set(events), name
        elif "_decode_kernel" in name:  # an ordinary launch: all work before it has ended
            assert not early and events[0] == "start" and events.count("start") == 1, name
            assert "wait" not in events, name
        else:
            assert early and events[0] == "wait" and events.count("wait") == 1, name
            assert "start" not in events, name


def test_its_counted_bytes() -> None:
    """B=8, one token, P=128, S=512: keys and values once, and the parts of five stretches."""
    B, H, H_kv, S, P, D = 8, 32, 8, 512, 128, 128
    first, merge = (
        traffic(launch)
        for launch in prefix_decode.launches(prefix.problem(1, S, D), Arch(132, 90, 232448))
    )
    rows, sources = 2 * B * H * D, 2 * 2 * H_kv * D * (B * S + P)
    parts = 5 * B * H * 4 * (D + 1)
    assert first.read == rows + sources and first.requested == 5 * rows + sources
    assert first.written == parts == merge.read
    assert merge.written == rows + 4 * B * H
    moved = first.read + first.written + merge.read + merge.written
    assert moved <= 1.09 * (2 * rows + sources)  # of the floor: Q, keys, values and O once
