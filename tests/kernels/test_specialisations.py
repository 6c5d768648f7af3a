"""A kernel is compiled once for a model, not anew when the number of rows or keys changes.

Triton compiles another form of a kernel for arguments that are 1 or divisible by 16, unless it is
told not to look. Where a size changes from call to call (tokens of a batch, keys of a cache) that
is seconds of waiting in the middle of a generation, and nothing is gained: no address depends on
the size alone.
"""

from __future__ import annotations

import json

import pytest

from tests.kernels.compiler import python

CODE = """
import collections, json
import torch
from benchmarks.kernels import (
    experts_gemm, experts_grad, experts_route, experts_shrink,
    prefix, prefix_attention, prefix_backward, prefix_decode,
)
from benchmarks.kernels.entry import TableTensors
from benchmarks.kernels.experts import LAYERS
from benchmarks.kernels.table import ops
from benchmarks.static.key import specialization
from benchmarks.static.run import TARGETS
from peftkern.kernels import registry, tuning
from peftkern.kernels import experts_combine
from peftkern.kernels.bits import BitsConfig, Draw, plan_bits
from peftkern.kernels.shrink import ShrinkConfig, plan_shrink
from peftkern.kernels.shrink_expand import ShrinkExpandConfig, plan_shrink_expand
from benchmarks.kernels.entry import INT32, meta

arch = TARGETS["sm_90"].arch
forms = collections.defaultdict(lambda: collections.defaultdict(set))

def note(launch, case=""):
    constants = json.dumps([launch.meta, case], default=str)
    forms[launch.kernel.__name__][constants].add(specialization(launch, "sm_90"))

for op, raced in ops().items():
    for m in (1, 2, 5, 16, 33, 100, 4096):
        key = tuning.Key(op, "bfloat16", "bfloat16", m, 256, 512, 16)
        if op.startswith("experts"):
            key = key._replace(experts=8, top=2, grads="64 halves")
        for launch in raced.plan(TableTensors(key), registry.config_class(op)(), arch):
            note(launch, op)
for m in (1, 2, 5, 16, 33, 100, 4096):
    for seed in (7, meta(1, dtype=torch.int64)):  # a seed on the device is no other form either
        for launch in plan_bits(meta(1, m, 16, dtype=INT32), 512, 0.1, seed, BitsConfig()):
            note(launch)
        x, a, b, s, y = meta(m, 512), meta(16, 512), meta(256, 16), meta(m, 16), meta(m, 256)
        words, draw = [meta(m, 16, dtype=INT32)], Draw(0.1, seed)
        for launch in plan_shrink(x, [a], words, [1.0], s, ShrinkConfig(), draw):
            note(launch)
        for launch in plan_shrink_expand(
            x, [a], [b], words, [None], [1.0], s, [y], ShrinkExpandConfig(), draw
        ):
            note(launch)
for T in (1, 2, 5, 16, 33, 100, 4096):
    layer = LAYERS["qwen3"]._replace(T=T)
    for part in ("up", "down", "dH", "dX"):
        for adapters in (1, 3):
            more = dict(masked=part in ("dH", "dX"), adapters=adapters)
            for launch in experts_gemm.launches(layer, part, arch, **more):
                note(launch, part)
            for launch in experts_route.launches(layer, adapters):
                note(launch)
            for launch in experts_shrink.launches(layer, 2048, 16, arch, adapters=adapters):
                note(launch, launch.grid[1] > 1)  # parts of K are fp32
    for launch in experts_grad.grad_sb_launches(layer, 2048, 16, arch):
        note(launch)
    for launch in experts_grad.grad_a_launches(layer, 2048, 16, arch, masked=True):
        note(launch)
    for launch in experts_combine.plan_combine(meta(T, 256), meta(8 * T, 256), meta(T, 8), 8):
        note(launch)
for S in (2, 3, 15, 16, 17, 31, 64, 100, 257, 512, 1100):
    for padded in (False, True):
        x = prefix.problem(1, S, 128, padded=padded)
        for launch in prefix_decode.launches(x, arch):
            note(launch, padded)
for T in (2, 7, 16, 100, 1024):
    x = prefix.problem(T, T, 128, padded=True)
    for launches in (prefix_attention.launches, prefix_backward.launches):
        for launch in launches(x, arch):
            note(launch)
print(json.dumps({k: max(map(len, by.values())) for k, by in forms.items()}))
"""


@pytest.mark.long
def test_rows_and_keys_make_no_other_form() -> None:
    done = python("-c", CODE, cache=None)
    assert done.returncode == 0, done.stderr
    forms = json.loads(done.stdout.splitlines()[-1])
    assert len(forms) > 10
    # The registers of these are full: a form that knows nothing of its sizes spills some. They run
    # over many rows, where a form more is a few seconds once in a training run.
    full = ("_shrink_expand_kernel", "_attend_kernel", "_grad_rows_kernel", "_grad_keys_kernel")
    # a small kernel, which reads parts in whole vectors: one form for 16 pairs and their multiples
    allowed = {**dict.fromkeys(full, 4), "_experts_gate_sum_kernel": 2}
    assert {kernel: n for kernel, n in forms.items() if n > allowed.get(kernel, 1)} == {}
