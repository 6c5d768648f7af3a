"""The tiles and splits of a mixed batch's launches, and which are taken without a tuning table.

The default is what moves the fewest counted bytes among the tiles with enough programs: a tile of Y
reads its rows of X and of W, so wide tiles read X seldom, and splitting K gives the device enough
programs of them, at the price of parts. Nobody has measured it yet.

Rows enough for products to matter need most of the multiprocessors. For 16 rows or fewer a program
only waits for W, and fewer programs with more of it on its way read X and parts less often: 64
programs with two tiles of 64 KB each have 8 MB on its way, where an H200 at 4.3 TB/s needs 3.2 for
a latency of 0.75 us (rates of benchmarks.cost, none measured here).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from . import checks
from .common import Arch, cdiv, next_pow2

LOW_BYTES = 131_072  # what a program reads for S, at most, where K can be split further
FEW_PROGRAMS = 64  # enough for few rows, where the device has more than twice as many places
FINISH_N = 64  # columns of Y of a program that adds parts


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
    part_itemsize: int = 4,
    aligned: bool = True,
) -> MixedConfig:
    """A config for M rows, T of each sample, and adapters of these ranks.

    ``part_itemsize``: bytes of a number in a part of the product, by ``common.parts_dtype``.
    Registers limit tiles, more so for rows that are not ``aligned`` on 16 bytes.
    """
    sizes = itemsize, adapter_itemsize, part_itemsize
    return _default(M, N, K, T, tuple(ranks), arch, sizes, aligned)


@functools.lru_cache(maxsize=4096)
def _default(
    M: int, N: int, K: int, T: int, ranks: tuple[int, ...], arch: Arch,
    sizes: tuple[int, int, int], aligned: bool,
) -> MixedConfig:  # fmt: skip
    itemsize, adapter_itemsize, part_itemsize = sizes
    exact = itemsize == 4  # exact fp32 products do not use the matrix unit
    few = M <= 16 and aligned and not exact  # then nothing but W takes time
    tallest = 64 if exact else 128
    block_m = min(tallest, max(16, next_pow2(M)))
    block_n, split = _tile(M, N, K, block_m, arch, itemsize, part_itemsize, exact, aligned, few)

    rank = max(ranks, default=1)
    block_s = min(32 if exact else 64, max(16, next_pow2(M)))
    block_r = min(32 if exact else 64, max(16, next_pow2(rank)))
    segments = max(1, most_tiles(M, len(ranks), M // T, block_s))
    product = cdiv(M, block_m) * cdiv(N, block_n) * split  # its programs
    # those for S have multiprocessors of their own where the product's leave enough
    room = arch.sms - product if split > 1 and product + segments <= arch.sms else 2 * arch.sms

    def parts(block_r: int, ranks: int) -> int:
        row_bytes = ranks * adapter_itemsize + block_s * itemsize  # read for each column of X
        most = 2 * LOW_BYTES if few else LOW_BYTES  # with steps twice as wide
        tiles = segments * cdiv(rank, block_r)
        return max(1, min(cdiv(row_bytes * K, most), K // 512, room // tiles))

    low_split = parts(block_r, rank)
    if few:  # chunks of ranks read X again, and each tile of Y reads all parts of S
        readers = cdiv(N, FINISH_N if split > 1 else block_n)
        width = cdiv(rank, 16) * 16

        def read(block_r: int) -> int:
            again = parts(block_r, block_r) * readers * width * 4
            return cdiv(rank, block_r) * K * itemsize + again

        block_r = min((r for r in (64, 32, 16) if r <= block_r), key=read)
        low_split = parts(block_r, block_r)
    programs = product + segments * cdiv(rank, block_r) * low_split
    least = 32 if few else 16  # for 16, ptxas spills 8 bytes on sm_89 (Triton 3.6)
    lanes = max(least, next_pow2(lanes_of(ranks, min(M, block_m), T)))
    most = 16 if exact else 32 if block_m == 128 else 64 if block_m == 64 else 128
    finish_n = FINISH_N if aligned else 32
    if block_m == 128 and any(r * adapter_itemsize % 16 for r in ranks):
        # rows of B read one element at a time spill on sm_89, sm_90 (Triton 3.9) and sm_120 (3.6)
        most, finish_n = 16, 16 if arch.capability == 89 else 32
    if block_m == 128 and split == 1 and not arch.warpgroups:  # operands are in registers, too
        most = 16
    block_l = min(lanes, most)
    warps = 8 if block_m * block_n > 16 * 256 else 4
    block_k = 32 if exact else 128 if block_m * block_n <= 16 * 128 else 64
    low_k = 32 if exact else 128 if block_s + block_r <= 64 else 64
    if few and block_r == 16:
        low_k = 256  # as much of A on its way as a program can have
    stages = 2 if exact else 4
    # two programs on a multiprocessor, so that those for S do not wait for a place
    budget = arch.shared // 2 if split > 1 and programs > arch.sms else arch.shared
    # only products of a warp group read the oldest tile from shared memory while one is loaded
    spare = 0 if arch.warpgroups and block_m >= 64 else 1
    while True:
        config = MixedConfig(
            block_m, block_n, block_k, split, block_s, block_r, low_k, low_split,
            finish_n=finish_n, block_l=block_l, num_warps=warps, num_stages=stages,
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
    M: int, N: int, K: int, block_m: int, arch: Arch, itemsize: int, part_itemsize: int,
    exact: bool, aligned: bool, few: bool,
) -> tuple[int, int]:  # fmt: skip
    """(block_n, split_k) that read the fewest bytes, of those with enough programs."""
    enough = min(FEW_PROGRAMS, 7 * arch.sms // 16) if few else cdiv(3 * arch.sms, 4)  # programs
    widest = 64 if exact or not aligned else 512 if few else 256 if block_m == 16 else 128
    if arch.capability == 120:
        widest = min(widest, 256)  # 512 spill there (Triton 3.9)
    while 2 * 32 * (block_m + widest) * itemsize > arch.shared:  # two stages of the smallest step
        widest //= 2
    tiles_m = cdiv(M, block_m)
    best: tuple[tuple[int, int], int, int] | None = None
    block_n = widest
    while block_n >= 16:
        tiles = tiles_m * cdiv(N, block_n)
        split = 1
        if tiles < enough and few:
            split = _fewest_parts(K, tiles, enough)
        elif tiles < enough:
            split = max(1, min(arch.sms // tiles, K // 256))
        read = cdiv(N, block_n) * M * K * itemsize + tiles_m * N * K * itemsize
        read += part_itemsize * split * M * N if split > 1 else 0
        missing = max(0, enough - tiles * split)
        if best is None or (missing, read) < best[0]:
            best = ((missing, read), block_n, split)
        block_n //= 2
    assert best is not None
    return best[1], best[2]


def _fewest_parts(K: int, tiles: int, programs: int) -> int:
    """The fewest parts of K with which ``tiles`` tiles have so many programs, or the most parts.

    Parts are of whole steps, and of 256 columns at least.
    """
    for split in range(cdiv(programs, tiles), K // 256):
        parts = cdiv(K, 128 * cdiv(K, 128 * split))
        if tiles * parts >= programs:
            return parts
    return max(1, K // 256)
