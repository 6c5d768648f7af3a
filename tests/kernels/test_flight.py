"""The default configs have enough bytes on the way, and programs enough, for the memory's speed.

Counted from configs and launches; no GPU has run them.
"""

import pytest
import torch

from benchmarks.cost.gpus import GPUS
from benchmarks.kernels.entry import BF16, FP32, Adapters, meta
from peftkern.kernels import flight, grad_a, grad_sb, grad_xa, mixed_config, shrink, shrink_expand
from peftkern.kernels.common import Arch, cdiv

SHARE = 0.8  # of the bandwidth, which needs this share of bandwidth times latency on the way
GROUPS = [Adapters(16, 1, True), Adapters(16, 3, True), Adapters(64, 1, True), Adapters(128)]
GROUPS += [g._replace(adapter=BF16) for g in GROUPS]
GPU_NAMES = ["H100", "H200", "B200", "A100", "RTX4090", "L40S"]


def resident(arch, launch):
    """Programs that are on the device at once, if each takes all the registers that it may."""
    programs = 1
    for n in launch.grid:
        programs *= n
    a_sm = 65536 // (255 * 32 * launch.meta["num_warps"])
    return min(programs, a_sm * arch.sms)


def assert_enough(name, launch, tile, late=0):
    """``late``: stages that hold tiles which have arrived, as benchmarks.static counts them."""
    gpu = GPUS[name]
    arch = Arch(*gpu.arch)
    on_the_way = resident(arch, launch) * (launch.meta["num_stages"] - 1 - late) * tile
    wanted = SHARE * gpu.bandwidth * 1e12 * flight.LATENCY
    assert on_the_way >= wanted, (launch.kernel.__name__, launch.grid, launch.meta)
    # one wave of nearly as many programs as multiprocessors, or more programs
    assert resident(arch, launch) >= 0.7 * arch.sms, (launch.grid, arch)


def shrinks(M, K, g, arch):
    x, s = meta(M, K, dtype=g.dtype), meta(M, g.r * g.group, dtype=g.dtype)
    config = shrink.default_config(M, K, [g.r] * g.group, arch, g.dtype.itemsize, g.masked)
    scales = [1.0] * g.group
    launches = shrink.plan_shrink(x, g.low(g.r, K), g.words(M, K), scales, s, config)
    return launches[0], config.block_m * config.block_k * g.dtype.itemsize


def updates(M, K, g, arch):
    x, s = meta(M, K, dtype=g.dtype), meta(M, g.r * g.group, dtype=g.dtype)
    config = shrink_expand.default_config(M, [g.r] * g.group, arch, g.dtype.itemsize, g.masked)
    ys, none = [meta(M, 4096, dtype=g.dtype)] * g.group, [None] * g.group
    (launch,) = shrink_expand.plan_shrink_expand(
        x, g.low(g.r, K), g.low(4096, g.r), g.words(M, K), none, [1.0] * g.group, s, ys, config
    )
    return launch, config.block_m * config.block_k * g.dtype.itemsize


def pairs(M, K, g, arch):
    x = meta(M, K, dtype=g.dtype)
    ds = [meta(M, g.r, dtype=g.dtype)] * g.group
    config = grad_xa.default_config(M, K, [g.r] * g.group, arch, g.dtype.itemsize)
    launches = grad_xa.plan_grad_xa(
        x, ds, g.low(g.r, K), g.words(M, K), meta(M, K), g.grads(g.r, K), config
    )
    return launches[0], config.block_m * config.block_k * g.dtype.itemsize


def grads_of_a(M, K, g, arch):
    x, ds = meta(M, K, dtype=g.dtype), [meta(M, g.r, dtype=g.dtype)] * g.group
    config = grad_a.default_config(M, K, arch, [g.r] * g.group, g.dtype.itemsize)
    launches = grad_a.plan_grad_a(x, ds, g.words(M, K), g.grads(g.r, K), config)
    return launches[0], config.block_m * config.block_k * g.dtype.itemsize


def grads_of_b(M, N, g, arch):
    dy, b, s = meta(M, N, dtype=g.dtype), g.low(N, g.r)[0], meta(M, g.r, dtype=g.dtype)
    config = grad_sb.default_config(M, N, g.r, arch, g.dtype.itemsize)
    if config is None:
        pytest.skip("two passes, of shrink and grad_a")
    launches = grad_sb.plan_grad_sb(dy, b, s, 1.0, s, meta(N, g.r, dtype=FP32), config)
    return launches[0], config.block_m * config.block_n * g.dtype.itemsize


@pytest.mark.parametrize("name", GPU_NAMES)
@pytest.mark.parametrize("g", GROUPS, ids=lambda g: g.tag)
@pytest.mark.parametrize("M, K", [(8192, 4096), (8192, 14336), (4096, 4096), (2048, 4096)])
@pytest.mark.parametrize("plan", [shrinks, updates, pairs, grads_of_a, grads_of_b])
def test_bytes_on_the_way_and_programs_at_the_shapes_of_the_goals(plan, M, K, g, name):
    arch = Arch(*GPUS[name].arch)
    if plan is updates and not shrink_expand.fits(M, [g.r] * g.group, arch):
        pytest.skip("shrink and expand run")
    if g.r == 128 and name not in ("H100", "H200"):
        pytest.skip("adapters of this rank fill registers and shared memory")
    # a masked X passes through registers before its product
    assert_enough(name, *plan(M, K, g, arch), late=int(g.masked and plan in (shrinks, updates)))


@pytest.mark.parametrize("name", GPU_NAMES)
def test_few_rows_of_a_mixed_batch_need_no_more_programs(name):
    """W alone is enough for the memory's whole speed; these are fewer than multiprocessors."""
    arch = Arch(*GPUS[name].arch)
    c = mixed_config.default_config(16, 4096, 4096, 1, (16,) * 8, arch, part_itemsize=2)
    programs = cdiv(4096, c.block_n) * c.split_k
    assert 0.4 * arch.sms <= programs < arch.sms
    on_the_way = programs * (c.num_stages - 1) * c.block_n * c.block_k * 2
    assert on_the_way >= flight.needed(arch)


def test_fp32_has_half_the_elements_on_the_way():
    arch, g = Arch(*GPUS["H200"].arch), Adapters(16, 1, True, torch.float32)
    for plan in (shrinks, updates, pairs, grads_of_a):
        assert_enough("H200", *plan(8192, 4096, g, arch))


def test_stages_cover_the_latency_within_shared_memory():
    h200, l40s = Arch(*GPUS["H200"].arch), Arch(*GPUS["L40S"].arch)
    tile = 8192
    for programs in (64, 128, 132, 1000):
        found = flight.stages(h200, programs, tile)
        share = flight.needed(h200) / min(programs, h200.sms)
        assert found == min(6, max(3, 1 + cdiv(int(share), tile)))
    assert flight.stages(h200, 132, tile, beside=80_000) == 2  # no third fits
    assert flight.stages(h200, 132, tile, beside=300_000) == 2  # the caller's tile is too large
    # two programs a multiprocessor share its memory and the bytes
    assert flight.stages(h200, 264, tile, resident=2) == 3 < flight.stages(h200, 132, tile)
    assert flight.stages(l40s, 142, tile) == 3
    # a capability without a figure has that of the one before it
    assert flight.needed(Arch(132, 103, 1)) == flight.needed(Arch(132, 100, 1))
    assert flight.needed(Arch(80, 75, 1)) == flight.needed(Arch(80, 80, 1))
