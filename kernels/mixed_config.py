"""The tiles and splits of a mixed batch's launches, and which are taken without a tuning table.

The default is what moves the fewest counted bytes among the tiles that fill the device: a tile of Y
reads its rows of X and of W, so wide tiles read X seldom, and splitting K gives the device enough
programs of them, at the price of fp32 parts. Nobody has measured it yet.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from . import checks
from .common import Arch, cdiv, next_pow2

LOW_BYTES = 131_072  # what a program reads for S, at most, where K can be split further


@dataclass(frozen=True)
class MixedConfig:
    """The tiles of :mod:`.mixed`.

    The product has output tiles [block_m, block_n], steps block_k and split_k parts of K; S has
    tiles of block_s rows and block_r ranks, steps low_k and low_split parts. Parts of the product
    are added in tiles of finish_n columns; block_l lanes of S Bᵀ are added at once. ``group_m``:
    rows of whole tiles that are walked together (for L2).
    """

    block_m: int = 16
    block_n: int = 64
    block_k: int = 128
    split_k: int = 1
    block_s: int = 16
    block_r: int = 16
    low_k: int = 128
    low_split: int = 1
    finish_n: int = 64
    block_l: int = 16
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        checks.blocks(
            self, block_m=self.block_m, block_n=self.block_n, block_k=self.block_k,
            block_s=self.block_s, block_r=self.block_r, low_k=self.low_k, finish_n=self.finish_n,
            block_l=self.block_l,
        )  # fmt: skip
        checks.one_or_more(
            self, split_k=self.split_k, low_split=self.low_split, group_m=self.group_m
        )

    def shared_bytes(self, itemsize: int, adapter_itemsize: int) -> int:
        """Bytes for the pipeline of the larger of the two products, and for the cast tile of A.

        The compiler may need one buffer less.
        """
        whole = self.num_stages * self.block_k * (self.block_m + self.block_n) * itemsize
        rows = self.num_stages * (self.block_s * itemsize + self.block_r * adapter_itemsize)
        return max(whole, self.low_k * (rows + self.block_r * itemsize))


def most_tiles(M: int, adapters: int, samples: int, block_s: int) -> int:
    """The largest number of tiles that all segments together can have, for any index.

    Each segment may have an incomplete tile, so there are more than M rows would need.
    """
    segments = min(adapters, samples)
    return segments + (M - segments) // block_s if segments else 0


def lanes_of(ranks: Sequence[int], rows: int, T: int) -> int:
    """The largest number of lanes that a tile of ``rows`` rows can need, for any index.

    With T rows for each sample it has rows of few samples.
    """
    return sum(sorted(ranks)[-cdiv(rows - 1, T) - 1 :])


def default_config(
    M: int,
    N: int,
    K: int,
    T: int,
    ranks: Sequence[int],
    arch: Arch,
    *,
    itemsize: int = 2,
    adapter_itemsize: int = 4,
    aligned: bool = True,
) -> MixedConfig:
    """A config for M rows, T of each sample, and adapters of these ranks.

    Registers limit tiles, more so for rows that are not ``aligned`` on 16 bytes.
    """
    return _default(M, N, K, T, tuple(ranks), arch, itemsize, adapter_itemsize, aligned)


@functools.lru_cache(maxsize=4096)
def _default(
    M: int, N: int, K: int, T: int, ranks: tuple[int, ...], arch: Arch,
    itemsize: int, adapter_itemsize: int, aligned: bool,
) -> MixedConfig:  # fmt: skip
    exact = itemsize == 4  # exact fp32 products do not use the matrix unit
    tallest = 64 if exact else 128
    block_m = min(tallest, max(16, next_pow2(M)))
    block_n, split = _tile(M, N, K, block_m, arch, itemsize, exact, aligned)

    rank = max(ranks, default=1)
    block_s = min(32 if exact else 64, max(16, next_pow2(M)))
    block_r = min(32 if exact else 64, max(16, next_pow2(rank)))
    row_bytes = rank * adapter_itemsize + block_s * itemsize  # read for each column of X
    tiles = max(1, most_tiles(M, len(ranks), M // T, block_s)) * cdiv(rank, block_r)
    low_split = min(cdiv(row_bytes * K, LOW_BYTES), K // 512, 2 * arch.sms // tiles)
    lanes = max(16, next_pow2(lanes_of(ranks, min(M, block_m), T)))
    most = 16 if exact else 32 if block_m == 128 else 64 if block_m == 64 else 128
    if block_m == 128 and any(r * adapter_itemsize % 16 for r in ranks):
        most = 16  # rows of B read one element at a time spill on sm_90 (Triton 3.9)
    if block_m == 128 and split == 1 and not arch.warpgroups:  # operands are in registers, too
        most = 16
    block_l = min(lanes, most)
    warps = 8 if block_m * block_n > 16 * 256 else 4
    block_k = 32 if exact else 128 if block_m * block_n <= 16 * 128 else 64
    low_k = 32 if exact else 128 if block_s + block_r <= 64 else 64
    stages = 2 if exact else 4
    # two programs on a multiprocessor, so that those for S do not wait for a place
    budget = arch.shared // 2 if split > 1 else arch.shared
    # only products of a warp group read the oldest tile from shared memory while one is loaded
    spare = 0 if arch.warpgroups and block_m >= 64 else 1
    while True:
        config = MixedConfig(
            block_m, block_n, block_k, split, block_s, block_r, low_k, max(1, low_split),
            finish_n=64 if aligned else 32, block_l=block_l, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        whole = config.shared_bytes(itemsize, adapter_itemsize)
        if whole * (stages - spare) // stages <= budget and whole <= arch.shared:
            return config
        if stages > 3 or (stages > 2 and block_k == low_k == 32):
            stages -= 1
        elif block_k > 32 or low_k > 32:
            block_k, low_k = max(32, block_k // 2), max(32, low_k // 2)
        else:
            budget = arch.shared


def _tile(
    M: int, N: int, K: int, block_m: int, arch: Arch, itemsize: int, exact: bool, aligned: bool
) -> tuple[int, int]:
    """(block_n, split_k) that read the fewest bytes, of those with enough programs."""
    widest = 128 if block_m > 16 else 256
    if exact or not aligned:
        widest = 64
    tiles_m = cdiv(M, block_m)
    best: tuple[tuple[int, int], int, int] | None = None
    block_n = widest
    while block_n >= 16:
        tiles = tiles_m * cdiv(N, block_n)
        split = 1 if 4 * tiles >= 3 * arch.sms else max(1, min(arch.sms // tiles, K // 256))
        read = cdiv(N, block_n) * M * K * itemsize + tiles_m * N * K * itemsize
        read += 4 * split * M * N if split > 1 else 0
        missing = max(0, 3 * arch.sms // 4 - tiles * split)  # programs
        if best is None or (missing, read) < best[0]:
            best = ((missing, read), block_n, split)
        block_n //= 2
    assert best is not None
    return best[1], best[2]
