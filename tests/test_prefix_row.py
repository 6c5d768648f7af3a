"""Decoding that the vendor's attention does not support: with a window, softcap or sinks."""

from __future__ import annotations

import pytest
import torch

from peftkern.ops import prefix_row
from peftkern.ops.prefix_attention import prefix_attention
from peftkern.ops.prefix_rule import Rule
from tests.closeness import assert_same_number
from tests.prefix_cases import SCALE, inputs, keep_of, seen
from tests.test_prefix_attention_cost import Recorder, eager


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per row"])
@pytest.mark.parametrize("window", [None, 3, 12, 40])
@pytest.mark.parametrize("kind", [None, "left", "nothing"])
def test_decoding_under_softcap_sinks_and_a_window(monkeypatch, kind, window, shared):
    """One row a sequence is right, without copies of the prefix over the batch or concatenation.

    This also holds when the length of the sequence is only on the device.
    """
    calls, real = [], prefix_row.forward
    monkeypatch.setattr(prefix_row, "forward", lambda *a: calls.append(a) or real(*a))
    B, S, P = 3, 20, 30
    tensors = inputs(B, 4, 2, 1, S, P, 8, shared=shared)
    options = {"keep": keep_of(kind, B, S), "window": window}
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    runs = [({}, 19), ({"softcap": 2.0}, 19), ({"sinks": sinks}, 9)]
    if window is None:
        runs.append(({"sinks": sinks}, torch.tensor([3, 0, 19])))
    for more, offset in runs:
        if window is None and not more:
            continue  # nothing hidden, nothing capped: the vendor's
        options["q_offset"] = offset
        expected, _ = eager(tensors, seen(B, 1, S, P, options), **more)
        with torch.no_grad(), Recorder(tensors) as record:
            out = prefix_attention(*tensors, scale=SCALE, causal=True, **options, **more)
        blind = expected.isnan()  # nothing to see
        assert_same_number(out, expected.masked_fill(blind, 0))
        assert record.largest < B * 2 * P * 8
    hides = window is not None and window < S + P
    assert len(calls) == len(runs) - (window is None) - (not hides and window is not None)


def test_reasons():
    q, rule = torch.zeros(2, 4, 1, 8), Rule(1.0, True, 9, window=3)
    assert prefix_row.why_not(q, rule) is None
    for x, other, reason in (
        (q, rule._replace(window=None), "vendor"),
        (q.expand(2, 4, 2, 8), rule, "more than one row"),
        (q.half(), rule, "half"),
        (q, rule._replace(no_prefix=torch.ones(2) > 0), "no prefix"),
        (q, rule._replace(offset=torch.tensor(9)), "device alone"),
        (q.to("meta"), rule, "on meta"),
    ):
        assert reason in prefix_row.why_not(x, other)
