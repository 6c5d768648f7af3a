"""Modelled times and counted bytes of prefix decode and backward, and where a merge waits."""

from __future__ import annotations

import json

import pytest

from benchmarks.kernels import prefix, prefix_backward, prefix_decode
from benchmarks.kernels.table import traffic
from peftkern.kernels import prefix_reference
from peftkern.kernels.common import Arch
from peftkern.kernels.prefix_backward import default_config
from tests.kernels.compiler import python

HOPPER, BLACKWELL, AMPERE = Arch(132, 90, 232448), Arch(148, 100, 232448), Arch(108, 80, 166912)
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


def test_counted_bytes_of_decode() -> None:
    """B=8, one token, P=128, S=512: keys and values once, and the parts of five stretches."""
    B, H, H_kv, S, P, D = 8, 32, 8, 512, 128, 128
    first, merge = (
        traffic(launch) for launch in prefix_decode.launches(prefix.problem(1, S, D), HOPPER)
    )
    rows, sources = 2 * B * H * D, 2 * 2 * H_kv * D * (B * S + P)
    parts = 5 * B * H * 4 * (D + 1)
    assert first.read == rows + sources and first.requested == 5 * rows + sources
    assert first.written == parts == merge.read
    assert merge.written == rows + 4 * B * H
    moved = first.read + first.written + merge.read + merge.written
    assert moved <= 1.09 * (2 * rows + sources)  # of the floor: Q, keys, values and O once


BACKWARD = """
import json
from benchmarks.cost.gpus import GPUS
from benchmarks.cost.model import in_a_graph, time_of
from benchmarks.kernels.prefix import problem
from benchmarks.kernels.prefix_backward import launches
from peftkern.kernels.common import Arch
found = {}
for gpu in ("H200", "B200"):
    plan = launches(problem(1024, 1024, 128), Arch(*GPUS[gpu].arch))
    found[gpu] = in_a_graph([time_of(launch, gpu) for launch in plan])
print(json.dumps(found))
"""


@pytest.mark.long
def test_the_modelled_time_of_the_backward() -> None:
    """B=8, T=S=1024, P=128, 32/8 heads of 128: about 1.14 and 1.29 times its products alone."""
    done = python("-c", BACKWARD, cache=None)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["H200"] <= 440 and found["B200"] <= 220  # modelled us, not measured


def test_wide_tiles_of_rows_where_they_fill_the_device() -> None:
    def tiles(B: int, T: int, D: int, arch: Arch, itemsize: int = 2) -> tuple[int, int]:
        config = default_config((B, 32, 8, T, T, 128, D), True, arch, itemsize)
        return config.block_m, config.num_warps

    assert tiles(8, 1024, 128, HOPPER) == tiles(8, 1024, 128, BLACKWELL) == (128, 8)
    assert tiles(8, 1024, 64, HOPPER) == tiles(8, 1024, 256, HOPPER) == (128, 8)
    assert tiles(8, 1024, 256, BLACKWELL) == (64, 8)  # 128 rows of 256 spill there
    assert tiles(8, 1024, 64, BLACKWELL) == (64, 4)  # bytes in flight bind: no gain
    assert tiles(1, 512, 128, HOPPER) == (64, 4)  # 4 x 32 programs for 132 multiprocessors
    assert tiles(8, 1024, 128, AMPERE) == (64, 4)
    assert tiles(8, 1024, 64, HOPPER, 4) == (32, 8)


@pytest.mark.parametrize(
    "options",
    [{}, dict(causal=False), dict(window=100), dict(window=300, q_offset=40), dict(q_offset=9)],
)
def test_the_rows_that_keys_load(options: dict[str, object]) -> None:
    """Those of the blocks with a row that sees a key of the tile, by the reference's mask."""
    T, S, P = 224, 300, 128
    x = prefix.problem(T, S, 64, P=P, **options)  # type: ignore[arg-type]
    launch = prefix_backward.launches(x, HOPPER)[1]
    facts = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.meta
    see = prefix_reference.visible(T, S, P, **options)[0, 0]  # [T, P + S]
    block, keys, rows = facts["BLOCK_M"], facts["BLOCK_N"], 0
    for first, count in ((0, P), (P, S)):
        for n0 in range(0, count, keys):
            some = see[:, first + n0 : first + min(n0 + keys, count)].any(1).nonzero().flatten()
            if len(some):
                low = int(some[0]) // block * block if options.get("causal", True) else 0
                rows += int(some[-1]) + 1 - low
    assert prefix_backward._rows_of_keys(facts) == rows
    q, sources = launch.args[0], traffic(launch).read
    each = 8 * 32 * (2 * 2 * 64 + 2 * 4)  # of Q, dO, LSE and delta, for one row of every head
    assert q.shape == (8, 32, T, 64)
    assert traffic(launch).requested == each * rows + sources - 2 * each * T
