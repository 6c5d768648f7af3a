"""The bytes that a mixed batch's kernels load: counted as they run, and by the rule of traffic.

They are counted in Triton's interpreter with the configs of an H200 (132 multiprocessors): every
load of every program, masked lanes left out and repeats included, which is what the L2 cache is
asked for. No GPU's counters have been read.
"""

from pathlib import Path

import pytest
import torch

from benchmarks.kernels.table import traffic
from peftkern.kernels import common, mixed
from peftkern.kernels.mixed_config import default_config
from tests.kernels.counting import loads

H200 = common.Arch(132, 90, 232448)
BF16, FP32 = torch.bfloat16, torch.float32


def planned(M, N, K, ranks, index, low=BF16, device="cpu"):
    """(operands, launches)."""
    kept = {"dtype": BF16, "device": device}
    tensors = {"x": torch.zeros(M, K, **kept), "w": torch.zeros(N, K, **kept)}
    kept["dtype"] = low
    tensors |= {f"A{i}": torch.zeros(r, K, **kept) for i, r in enumerate(ranks)}
    tensors |= {f"B{i}": torch.zeros(N, r, **kept) for i, r in enumerate(ranks)}
    tensors["index"] = torch.tensor(index, dtype=torch.int32, device=device)
    As, Bs = ([tensors[f"{n}{i}"] for i in range(len(ranks))] for n in "AB")
    config = default_config(
        M, N, K, M // len(index), ranks, H200, adapter_itemsize=low.itemsize, part_itemsize=2
    )
    y = torch.empty(M, N, dtype=BF16, device=device)
    launches = mixed.plan_mixed(
        y,
        tensors["x"],
        tensors["w"],
        As,
        Bs,
        [1.0] * len(ranks),
        tensors["index"],
        None,
        config,
        H200,
    )
    return tensors, launches


def counted(M, N, K, ranks, index, low=BF16):
    """(bytes of each operand, bytes loaded of each and of scratch memory, bytes by the rule)."""
    tensors, launches = planned(M, N, K, ranks, index, low)
    with loads(tensors) as found:
        for launch in launches:
            launch.run()
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    return sizes, found, sum(traffic(launch).requested for launch in launches)


def once(sizes, found, names):
    """The bytes of tensors, which must be those that were loaded of them."""
    assert {name: found[name] for name in names} == {name: sizes[name] for name in names}


@pytest.mark.long
def test_16_rows_and_8_adapters_load_at_most_a_fifth_beside_w():
    """docs/goals.md's shape, 4096 x 4096, r = 16 in fp32 on bf16, two rows of each adapter."""
    sizes, found, ruled = counted(16, 4096, 4096, (16,) * 8, [i % 8 for i in range(16)], FP32)
    once(sizes, found, [name for name in sizes if name[0] in "wAB"])
    assert sum(found.values()) == ruled
    assert ruled <= 1.2 * sizes["w"]


@pytest.mark.slow
@pytest.mark.parametrize(("r", "low"), [(16, BF16), (64, BF16), (64, FP32)], ids=str)
def test_larger_adapters_load_little_more_than_each_operand_once(r, low):
    """A and B alone are up to 0.5 of W here, so that these are part of the measure."""
    sizes, found, ruled = counted(16, 4096, 4096, (r,) * 8, [i % 8 for i in range(16)], low)
    once(sizes, found, [name for name in sizes if name[0] in "wAB"])
    assert sum(found.values()) == ruled
    assert ruled <= 1.08 * sum(sizes.values())


def test_the_table_of_the_docs_is_the_rule():
    """Which the two tests above hold against what programs load."""
    text = (Path(__file__).parents[2] / "docs/kernels.md").read_text()
    for name, low in (("float32", FP32), ("bf16", BF16)):
        shares, once_each = [], []
        for r in (8, 16, 32, 64):
            tensors, launches = planned(16, 4096, 4096, (r,) * 8, range(16), low, "meta")
            w = tensors["w"].nbytes
            shares.append(sum(traffic(launch).requested for launch in launches) / w)
            once_each.append(sum(t.nbytes for t in tensors.values()) / w)
        row = " | ".join(f"{share:.3f}" for share in shares + once_each)
        assert f"| {name} | {row} |" in text


def test_each_a_is_read_once_for_64_rows_and_not_at_all_without_rows():
    ranks = (8, 20, 70, 5)
    sizes, found, ruled = counted(64, 96, 256, ranks, [0] * 40 + [2, -1] * 12)
    assert found["A1"] == found["B1"] == found["A3"] == found["B3"] == 0
    once(sizes, found, ["w", "A0", "A2", "B0", "B2"])
    assert sum(found.values()) <= ruled
    sizes, found, _ = counted(128, 96, 256, ranks, [0] * 128)
    assert found["A0"] == 2 * sizes["A0"]


def test_the_rows_of_a_rank_are_read_as_far_as_it_goes():
    """A rank of 256 beside small ones: A, B and S of the small ones are not read up to 256."""
    sizes, found, ruled = counted(16, 64, 128, (256, 3, 3), [1, 2] * 8)
    once(sizes, found, ["w", "A1", "A2", "B1", "B2"])
    assert found["A0"] == found["B0"] == 0
    sizes, found, ruled = counted(16, 64, 128, (256, 3, 3), [0, 1, 2, 1] * 4)
    once(sizes, found, ["w", "A0", "A1", "A2", "B0", "B1", "B2"])
    assert sum(found.values()) <= ruled
