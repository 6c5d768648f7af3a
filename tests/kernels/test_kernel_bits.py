"""Packed dropout masks: layout, statistics, and the kernel against torch's Philox word by word."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import bits
from tests.kernels.oracle import few, keep_mask


@pytest.mark.parametrize("K", [1, 31, 32, 33, 64, 341, 4231])
def test_packing_is_inverted_by_unpacking(K):
    keep = keep_mask(5, K, seed=K)
    words = bits.pack_bits(keep)
    assert words.dtype == torch.int32 and words.shape == (5, -(-K // 32))
    assert torch.equal(bits.unpack_bits(words, K), keep)


def test_bit_j_of_word_w_is_column_32w_plus_j():
    keep = torch.zeros(1, 70, dtype=torch.bool)
    keep[0, [0, 31, 33, 69]] = True
    words = bits.pack_bits(keep)[0].to(torch.int64) & 0xFFFFFFFF
    assert words.tolist() == [1 | 1 << 31, 1 << 1, 1 << 5]


def test_packing_an_empty_or_strided_mask():
    assert bits.pack_bits(torch.zeros(0, 40, dtype=torch.bool)).shape == (0, 2)
    wide = keep_mask(6, 90, seed=1)
    assert torch.equal(bits.pack_bits(wide[::2, 3:80]), bits.pack_bits(wide[::2, 3:80].clone()))


@few
@given(
    M=st.integers(1, 40),
    K=st.integers(1, 200),
    p=st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.5, 0.9, 1e-5]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_kernel_equals_the_torch_philox(M, K, p, seed):
    words = bits.dropout_bits(M, K, p, seed, device="cpu")
    assert torch.equal(words, bits.reference_bits(M, K, p, seed))


def test_mask_does_not_depend_on_the_launch_shape():
    small = bits.dropout_bits(7, 333, 0.1, 11, device="cpu", config=bits.BitsConfig(block=32))
    assert torch.equal(small, bits.dropout_bits(7, 333, 0.1, 11, device="cpu"))


def test_groups_are_independent_and_a_device_seed_is_the_same_seed():
    words = bits.dropout_bits(9, 341, 0.1, torch.tensor([5]), groups=3, device="cpu")
    assert words.shape == (3, 9, 11)
    for i in range(3):
        assert torch.equal(words[i], bits.reference_bits(9, 341, 0.1, 5, group=i))
    assert not torch.equal(words[0], words[1])


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_dropped_share_is_p_and_rows_columns_and_seeds_differ(p):
    keep = bits.unpack_bits(bits.reference_bits(512, 2048, p, 3), 2048).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(1 - keep.mean().item() - p) < 5 * sigma / keep.numel() ** 0.5
    assert (1 - keep.mean(0) - p).abs().max() < 6 * sigma / 512**0.5
    assert (1 - keep.mean(1) - p).abs().max() < 6 * sigma / 2048**0.5
    other = bits.unpack_bits(bits.reference_bits(512, 2048, p, 4), 2048).double()
    correlation = ((keep - keep.mean()) * (other - other.mean())).mean() / sigma**2
    assert abs(correlation) < 5 / keep.numel() ** 0.5


def test_the_probability_kept_is_p_to_one_part_in_ten_thousand():
    for p in (1e-3, 0.05, 0.1, 1 / 3, 0.5, 0.999):
        threshold, digits, fraction = bits.digits_of(p)
        assert abs((threshold + fraction / 2**31) / 2**digits - (1 - p)) <= 2.0**-35


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_p_outside_0_1_is_refused(p):
    with pytest.raises(ValueError, match=rf"p is {p}; allowed"):
        bits.dropout_bits(2, 2, p, 0, device="cpu")


def test_bad_seed_and_sizes_are_refused():
    with pytest.raises(TypeError, match="seed is float"):
        bits.dropout_bits(2, 2, 0.1, 1.5, device="cpu")
    with pytest.raises(TypeError, match="seed is torch.int32"):
        bits.dropout_bits(2, 2, 0.1, torch.zeros(1, dtype=torch.int32), device="cpu")
    with pytest.raises(ValueError, match="M, K are -1, 2"):
        bits.dropout_bits(-1, 2, 0.1, 0, device="cpu")
    with pytest.raises(TypeError, match="allowed: torch.bool"):
        bits.pack_bits(torch.zeros(2, 2))
    with pytest.raises(TypeError, match=r"allowed: torch.int32 \[M, 2\]"):
        bits.unpack_bits(torch.zeros(2, 3, dtype=torch.int32), 40)
    assert bits.dropout_bits(0, 64, 0.1, 0, device="cpu").shape == (0, 2)


def test_the_zero_for_seeds_that_are_numbers_is_written_before_other_streams_read_it(monkeypatch):
    done, zero = [], torch.zeros(1, dtype=torch.int64)
    monkeypatch.setattr(bits, "_zeros", {})
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: done.append("zero") or zero)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    stream = SimpleNamespace(synchronize=lambda: done.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    device = torch.device("cuda", 0)
    assert bits._no_seed(device) is bits._no_seed(device)
    assert done == ["zero", "waited"]  # once, as the second call finds it
