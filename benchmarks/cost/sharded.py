"""Bytes that FSDP2 gathers for a layer, by count: weights and adapters of a Llama-70B layer.

    python -m benchmarks.cost --fsdp [--gpu H100] [--M 8192] [--r 16] [--json]

A peftkern layer is made without data, and its parameters are counted. Each of n ranks holds 1/n of
every parameter; a unit gathers its parameters before the forward and again before the backward
((n - 1)/n of their bytes come from other ranks), and reduces and scatters the gradients of those
that train. A unit's gather can run while the unit before it computes. Times are rooflines, of the
frozen products at the matrix rate and of the links at their data sheet's; nothing was measured.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch

from .gpus import GPUS

RANKS = 8
LINKS = {"NVLink 4": 450e9, "InfiniBand NDR": 50e9}  # bytes/s into one GPU
LIMIT = 0.01  # what adapters may add to what is gathered
FORMS = ("adapters in the layer's unit", "each adapter a unit", "adapters not divided")


class Layer(NamedTuple):
    """A decoder layer's parameters.

    ``frozen`` and ``trained`` are bytes of bf16 weights and of float32 adapters, ``modules`` the
    number of A and B, ``weights`` the elements that are multiplied.
    """

    frozen: int
    trained: int
    modules: int
    weights: int


def llama_70b(r: int, adapters: bool = True) -> Layer:
    """A layer of Llama-70B with an adapter of rank ``r`` on each of its seven linears."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import peftkern

    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    config = LlamaConfig(num_hidden_layers=1, num_key_value_heads=8, vocab_size=8, **sizes)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    if adapters:
        lora = peftkern.LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peftkern.get_peft_model(model, lora, low_cpu_mem_usage=True)
    named = [(n, p) for n, p in model.named_parameters() if ".layers.0." in n]
    trained = [p for n, p in named if "lora_" in n]
    frozen = [p for n, p in named if "lora_" not in n]
    return Layer(
        sum(p.numel() * 2 for p in frozen),
        sum(p.numel() * 4 for p in trained),
        len(trained),
        sum(p.numel() for p in frozen if p.dim() == 2),
    )


def table(r: int, M: int, gpu: str) -> list[dict[str, Any]]:
    """A row for each form: bytes into each rank and collectives of a layer's step, and times."""
    layer = llama_70b(r)
    others = (RANKS - 1) / RANKS
    frozen = 2 * layer.frozen * others  # forward and backward
    rows = []
    for form in FORMS:
        divided = form != FORMS[2]
        adapters = 2 * layer.trained * others if divided else 0.0
        # gradients: a share arrives from each other rank; not divided, DDP's ring carries two
        gradients = layer.trained * others * (1 if divided else 2)
        alone = layer.modules if form == FORMS[1] else 0
        compute = 2 * layer.weights * M / (GPUS[gpu].matrix * 1e12)
        rows.append(
            {
                "form": form,
                "gathered": frozen + adapters,
                "adapters_share": adapters / frozen,
                "gradients": gradients,
                "collectives": 2 * (1 + alone) + (1 + alone if divided else 1),
                "forward_us": compute * 1e6,
                "gather_us": {
                    name: (frozen + adapters) / 2 / rate * 1e6 for name, rate in LINKS.items()
                },
            }
        )
    return rows


def lines(rows: list[dict[str, Any]], r: int, M: int, gpu: str) -> list[str]:
    """The table as text."""
    out = [
        f"A Llama-70B layer in bf16 on {RANKS} ranks, r={r} in float32, M={M} tokens a rank. "
        "Counted, not measured.",
    ]
    for row in rows:
        times = ", ".join(
            f"{name} {us:,.0f} us ({'hidden behind' if us <= row['forward_us'] else 'longer than'}"
            " the products)"
            for name, us in row["gather_us"].items()
        )
        out.append(
            f"{row['form']}: {row['gathered'] / 1e6:,.1f} MB gathered a step, adapters add "
            f"{row['adapters_share']:.2%} (limit {LIMIT:.0%}: "
            f"{'met' if row['adapters_share'] <= LIMIT else 'NOT met'}); gradients "
            f"{row['gradients'] / 1e6:,.2f} MB; {row['collectives']} collectives"
        )
        out.append(f"    forward's gather: {times}; products on {gpu} {row['forward_us']:,.0f} us")
    return out
