"""Bytes that one attention layer moves because of a prefix, forward: HF PEFT, the floor, peftkern.

    python -m benchmarks.cost --case prefix [--json]

HF PEFT's own code runs on tensors without data. Its prompt encoder looks the prefix up for every
row of the batch, and transformers' cache concatenates it with the layer's keys and values. As there
is then a mask, both are also repeated over the heads of a group. ``handling`` is the bytes of those
operations, ``attention`` the bytes of keys and values that the attention itself reads. peftkern's
bytes come from its launch. No speed was measured.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from peftkern.kernels import prefix_attention, prefix_tile
from peftkern.kernels.common import Arch

from ..kernels.table import traffic
from ..kernels.traffic import Traffic, nbytes
from .count import Counter, as_cuda

GOAL_MB = 40.0
BF16 = torch.bfloat16


class PrefixShape(NamedTuple):
    """B rows of T tokens after a prefix of P tokens; H query and H_kv key/value heads of size D."""

    B: int = 8
    T: int = 1024
    P: int = 128
    H: int = 32
    H_kv: int = 8
    D: int = 128


class Moved(NamedTuple):
    """Bytes that one layer moves to handle its prefix, and bytes of keys and values it reads."""

    provider: str
    handling: int
    attention: int
    launches: list[Traffic]  # those of the handling; for peftkern its one launch, the attention

    @property
    def both(self) -> int:
        return self.handling + self.attention


def _own(s: PrefixShape) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, heads, T, D] with transformers' strides: [B, T, heads, D] in memory."""

    def some(heads: int) -> Tensor:
        return torch.empty(s.B, s.T, heads, s.D, dtype=BF16, device="meta").transpose(1, 2)

    return some(s.H), some(s.H_kv), some(s.H_kv)


def floor(s: PrefixShape) -> Moved:
    """The least: the layer's own keys and values and one prefix, each read once."""
    return Moved("floor", 0, 2 * 2 * s.H_kv * s.D * (s.B * s.T + s.P), [])


def peft(s: PrefixShape) -> Moved:
    """HF PEFT's PrefixTuningConfig on a Llama of one layer, up to and with its attention."""
    from peft import PrefixTuningConfig, TaskType, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    config = LlamaConfig(
        hidden_size=s.H * s.D, intermediate_size=64, num_hidden_layers=1, vocab_size=64,
        num_attention_heads=s.H, num_key_value_heads=s.H_kv, head_dim=s.D, dtype=BF16,
    )  # fmt: skip
    prefix_config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=s.P)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = get_peft_model(LlamaForCausalLM(config).to(BF16), prefix_config)
    layer = model.base_model.model.layers[0].self_attn
    q, k, v = _own(s)
    mask = torch.ones(s.B, 1, s.T, s.P + s.T, dtype=torch.bool, device="meta")
    read = []

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        read.append(nbytes(key) + nbytes(value))
        return torch.empty_like(query)

    with (
        as_cuda(),
        torch.no_grad(),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
        Counter() as counter,
    ):
        cache = model.get_prompt(batch_size=s.B)
        keys, values = cache.update(k, v, 0)
        count = len(counter.launches)  # later ones are handling only if they repeat keys or values
        sdpa_attention_forward(layer, q, keys, values, mask, scaling=s.D**-0.5)
    handling = [t for i, t in enumerate(counter.launches) if i < count or t.written == read[0] // 2]
    return Moved("HF PEFT", sum(t.bytes for t in handling), read[0], handling)


def ours(s: PrefixShape, arch: Arch) -> Moved:
    """peftkern's forward kernel, which reads own and prefix keys and values in place."""
    prefix = [torch.empty(s.H_kv, s.P, s.D, dtype=BF16, device="meta") for _ in range(2)]
    problem = prefix_tile.check(*_own(s), *prefix)
    lse = torch.empty(s.B, s.H, s.T, device="meta")
    config = prefix_attention.default_config(s.D, arch)
    (launch,) = prefix_attention.plan_attend(problem, problem.rows_like_q(), lse, config)
    found = traffic(launch)
    return Moved("peftkern", 0, found.read - nbytes(problem.q), [found])


def table(s: PrefixShape, arch: Arch) -> list[Moved]:
    return [peft(s), floor(s), ours(s, arch)]


def as_json(rows: list[Moved], s: PrefixShape) -> dict[str, Any]:
    return {
        "shape": s._asdict(),
        "goal_mb": GOAL_MB,
        "rows": [
            {
                "provider": r.provider, "handling": r.handling, "attention": r.attention,
                "launches": [t._asdict() for t in r.launches],
            }
            for r in rows
        ],
        "met": rows[-1].both <= GOAL_MB * 1e6,
    }  # fmt: skip


def lines(rows: list[Moved], s: PrefixShape) -> list[str]:
    """The table as lines of text."""
    out = [
        f"Prefix, one layer, forward: B={s.B} T={s.T} P={s.P}, {s.H}/{s.H_kv} heads of {s.D}, bf16."
        " MB of keys and values. Counted, not measured.",
        f"{'':10} {'handling':>9} {'attention':>10} {'both':>7}",
    ]
    for r in rows:
        cells = f"{r.handling / 1e6:9.1f} {r.attention / 1e6:10.1f} {r.both / 1e6:7.1f}"
        out.append(f"{r.provider:10} {cells}")
    verdict = "met" if rows[-1].both <= GOAL_MB * 1e6 else "NOT met"
    return [*out, f"peftkern at most {GOAL_MB:g} MB: {verdict}"]
