"""The second launch of decoding starts early and waits before it reads S, where GPUs can do it."""

from __future__ import annotations

import json

import pytest

from tests.kernels.compiler import python

CODE = """
import json, re, sys
from benchmarks.kernels.decode import launches
from benchmarks.static.compiling import NoDevice, gpu_target
from benchmarks.static.launching import launcher_problem
from benchmarks.static.run import TARGETS
from triton.runtime import driver

EVENTS = {
    "start": r"griddepcontrol\\.launch_dependents", "wait": r"griddepcontrol\\.wait",
    "load": r"ld\\.global", "copy": r"cp\\.async\\.c[ag]", "sum": r"fma\\.rn|mma\\.sync|mma_async",
    "store": r"st\\.global",
}
found = {}
for name in sys.argv[1:]:
    for m, ns in ((1, [4096]), (16, [4096]), (1, [4096, 1024])):
        for i, launch in enumerate(launches(m, ns, 4096, [16] * len(ns), TARGETS[name].arch)):
            driver.set_active(NoDevice(gpu_target(name)))
            compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta)
            text = compiled.asm["ptx"]
            events = [k for line in text.splitlines() for k, p in EVENTS.items()
                      if re.search(p, line)]
            found[f"{name} M{m} x{len(ns)} {i}"] = [
                events, bool(compiled.metadata.launch_pdl), launcher_problem(launch, name),
            ]
print(json.dumps(found))
"""


def compiled(*names):
    done = python("-c", CODE, *names, cache=None)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_w_streams_before_the_wait_and_s_is_read_after_it() -> None:
    found = compiled("sm_90")
    assert len(found) == 6
    for name, (events, early, problem) in found.items():
        assert problem is None, name
        count = 2 if "x2" in name else 1  # a group's members are branches
        if name.endswith(" 0"):
            # an ordinary launch: all that came before it has ended when W is read
            assert not early and events[0] == "start" and "wait" not in events, name
            assert events.count("start") == 1, name
            continue
        assert early and events.count("wait") == count and "start" not in events, name
        rest = events
        for _ in range(count):
            before, after = rest[: rest.index("wait")], rest[rest.index("wait") + 1 :]
            assert "store" not in before, name
            assert before.count("copy") > 4 and before.count("sum") > 4, name  # all of W's loop
            # S: two parts with one row, four with several
            until = after[: after.index("store")]
            assert "copy" not in until and "load" in until, name
            if "M1 x1" in name:  # X too is copied ahead: no load in the loop waits for memory
                assert "load" not in before[before.index("copy") :], name
            rest = after[after.index("store") + 1 :]
        assert set(rest) <= {"store"}, name


@pytest.mark.long
def test_older_gpus_start_it_as_usual() -> None:
    for name, (events, early, problem) in compiled("sm_80", "sm_86", "sm_89").items():
        assert not early and problem is None and not {"start", "wait"} & set(events), name
        assert "copy" in events or name.endswith(" 0"), name
