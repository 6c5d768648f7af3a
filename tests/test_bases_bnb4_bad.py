"""4-bit weights of bitsandbytes that cannot be read: an error says why, in every call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import peftkern
from peftkern.ops.bases.formats import read
from tests.quantised_models import bnb4

bitsandbytes: Any = pytest.importorskip("bitsandbytes")


def spoilt(how: str) -> Any:
    nested = "nested" in how
    layer = bnb4(nn.Linear(64, 48), quant_type="nf4", compress_statistics=nested)
    state = layer.weight.quant_state
    if how == "no nested statistics":
        state.state2 = None
    elif how == "no nested offset":
        state.offset = None
    elif how == "meta nested statistics":
        state.state2.absmax = state.state2.absmax.to("meta")
    elif how == "too few nested statistics":  # which bitsandbytes would read past
        state.state2.absmax = state.state2.absmax[:0]
    elif how == "no scales":
        state.absmax = None
    elif how == "no statistics":
        return bitsandbytes.nn.Linear4bit(64, 48)
    if how == "on meta":
        packed = layer.weight.data.to("meta")
        layer.weight = bitsandbytes.nn.Params4bit(packed, quant_state=state, bnb_quantized=True)
    elif how == "meta statistics":
        state.absmax = state.absmax.to("meta")
    elif how == "another blocksize":
        state.blocksize = 128
    elif how == "another shape":
        state.shape = torch.Size((48, 32))
    elif how == "a part":
        layer.weight.data = layer.weight.data[:100]
    return layer


@pytest.mark.parametrize(
    ("how", "said"),
    {
        "no statistics": "no statistics: it is quantised when",
        "on meta": "on the meta device",
        "meta statistics": "statistics of its 4-bit weight are on the meta device",
        "another blocksize": "48 scales; for blocks of 128 it needs 24: it was packed for another",
        "another shape": r"of shape \(48, 32\), and the layer of \(48, 64\)",
        "a part": "is 100 bytes; 1536 belong to it",
        "no scales": "has no scales",
        "no nested statistics": "nested statistics, of which a part is missing",
        "no nested offset": "nested statistics, of which a part is missing",
        "meta nested statistics": "on cpu, and its nested statistics are on meta, cpu, cpu",
        "too few nested statistics": "has 48 nested scales, for which 0 scales in blocks of 256",
    }.items(),
)
def test_bad_weights_are_an_error_that_says_why(how: str, said: str) -> None:
    config = peftkern.LoraConfig(r=2, target_modules=["0"])
    model = peftkern.get_peft_model(nn.Sequential(spoilt(how)), config)
    [row] = peftkern.explain(model)
    assert not row.fused
    for mode in (True, False):
        with pytest.raises(ValueError, match=f"a Linear4bit cannot be called: .*{said}"):
            model.train(mode)(torch.randn(2, 64))
    # what cannot be read cannot be made dense, so that the error does not offer it
    with pytest.raises(ValueError, match=f"Cannot merge .*{said}") as error:
        model.merge_adapter()
    assert "dequantize" not in str(error.value)


def test_an_unknown_format_is_left_to_its_owner() -> None:
    layer = bnb4(nn.Linear(64, 48), quant_type="nf4")
    layer.weight.quant_state.quant_type = "nf5"
    assert read(layer) == "its 4-bit format is 'nf5'; known: nf4, fp4"
