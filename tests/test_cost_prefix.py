"""The bytes of a prefix: HF PEFT's, also counted by hand, the floor's, and the goal."""

import json

from benchmarks.cost import prefix as cost_prefix
from benchmarks.cost import run as cost
from benchmarks.cost.gpus import GPUS
from benchmarks.kernels import prefix_attention, prefix_backward, prefix_decode
from benchmarks.kernels.prefix import problem
from benchmarks.kernels.table import traffic
from peftkern.kernels.common import Arch

ARCH = Arch(*GPUS["H100"].arch)
SHAPE = cost_prefix.PrefixShape()


def test_peft_moves_what_was_counted_by_hand_and_peftkern_the_floor():
    peft, floor, ours = cost_prefix.table(SHAPE, ARCH)
    B, T, P, H, H_kv, D = SHAPE
    joined = 2 * 2 * B * (P + T) * H_kv * D  # keys and values after the concatenation
    repeated = joined * H // H_kv
    names = [t.name for t in peft.launches]
    assert names == ["embedding", "_to_copy", "cat", "cat", "cat", "cat", "clone", "clone"]
    last = sum(t.bytes for t in peft.launches[4:])  # concatenation and repetition
    assert last == 2 * joined + joined + repeated
    assert round(last / 1e6) == 264 and peft.handling > last and peft.attention == repeated
    assert floor.both == 2 * 2 * H_kv * D * (B * T + P) and round(floor.both / 1e6) == 34
    assert ours.both - floor.both == 0
    assert ours.both <= cost_prefix.GOAL_MB * 1e6


def test_a_prefix_for_each_row_is_read_for_each_row():
    """The counter sees what a shared prefix saves."""

    def read(shared):
        x = problem(1, 512, 128, shared=shared)
        decode, merge = (traffic(launch) for launch in prefix_decode.launches(x, ARCH))
        assert merge.read == decode.written
        return decode.read

    prefix = 2 * 2 * 8 * 128 * 128
    assert read(False) - read(True) == 7 * prefix


def test_decoding_at_the_shape_of_the_goals():
    """B=8, P=128, T=512: own keys and values, one prefix, and less than a tenth on top."""
    x = problem(1, 512, 128)
    found = [traffic(launch) for launch in prefix_decode.launches(x, ARCH)]
    least = 2 * 2 * 8 * 128 * (8 * 512 + 128)
    assert least < sum(t.bytes for t in found) < 1.1 * least


def test_visible_pairs_are_counted():
    B, H, D = 8, 32, 64
    for options, pairs in (
        ({}, 1024 * 128 + 1024 * 1025 // 2),
        (dict(causal=False), 1024 * (128 + 1024)),
        (dict(window=1), 1024),
        (dict(window=256), sum(min(128 + t + 1, 256) for t in range(1024))),
    ):
        x = problem(1024, 1024, D, **options)
        forward, backward = prefix_attention.launches(x, ARCH), prefix_backward.launches(x, ARCH)
        assert traffic(forward[0]).flops == 4 * B * H * D * pairs
        assert sum(traffic(launch).flops for launch in backward) == 14 * B * H * D * pairs


def test_the_command_shows_it(capsys):
    assert cost.main(["--case", "prefix"]) == 0
    out = capsys.readouterr().out
    assert "peftkern at most 40 MB: met" in out and "LoRA linear" not in out
    assert cost.main(["--case", "prefix", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["prefix"]["met"] and not data["rows"]
    assert [r["provider"] for r in data["prefix"]["rows"]] == ["HF PEFT", "floor", "peftkern"]


def test_a_goal_that_is_missed_is_said():
    s = cost_prefix.PrefixShape(B=16)
    rows = cost_prefix.table(s, ARCH)
    assert rows[-1].both > cost_prefix.GOAL_MB * 1e6
    assert cost_prefix.lines(rows, s)[-1].endswith("NOT met")
