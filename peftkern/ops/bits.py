"""Dropout masks as bits: one int32 word holds 32 columns of a row.

Layout, shared with the Triton kernels: ``words[m, w]`` bit ``j`` is the mask of column ``32 w + j``
(little endian). A mask of M x K costs M · ceil(K / 32) · 4 bytes instead of M · K as bool.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Multiplies eight bytes of 0 or 1, read as one little-endian int64, to gather their bits in the top
# byte: byte i contributes bit 8 i + (56 - 7 i) = 56 + i, and no other terms meet there.
_GATHER = 0x0102040810204080
_TABLES: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def words_per_row(columns: int) -> int:
    """The number of int32 words that ``columns`` bits take."""
    return (columns + 31) // 32


def pack_bits(keep: Tensor) -> Tensor:
    """Pack a bool mask [M, K] into int32 [M, ceil(K / 32)]; the bits past K are 0."""
    rows, columns = keep.shape
    padded = words_per_row(columns) * 32
    if padded != columns:
        keep = torch.nn.functional.pad(keep, (0, padded - columns))
    lanes = keep.contiguous().view(torch.int64)  # [M, padded / 8]
    # not in place: a selective checkpoint may keep the product, and refuses one that was changed
    return (lanes * _GATHER >> 56).to(torch.uint8).view(torch.int32).view(rows, padded // 32)


def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table [256, 8] of the eight bits of every byte, as numbers of ``dtype``."""
    key = (dtype, device)
    if key not in _TABLES:
        byte = torch.arange(256, device=device).unsqueeze(1)
        _TABLES[key] = (byte >> torch.arange(8, device=device) & 1).to(dtype)
    return _TABLES[key]


def unpack_bits(words: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The mask [M, columns] as 0 and 1 of ``dtype``, from int32 words [M, ceil(columns / 32)]."""
    index = words.view(torch.uint8).to(torch.int32)  # [M, 4 · words]
    # embedding copies whole rows of eight, several times faster than advanced indexing on a CPU
    mask = torch.embedding(_table(dtype, words.device), index)  # [M, 4 · words, 8]
    mask = mask.view(words.shape[0], 32 * words.shape[1])
    return mask if mask.shape[1] == columns else mask[:, :columns]
