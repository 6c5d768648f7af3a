"""Prefix tuning on a CPU: one layer's attention over a prefix, and whole models.

Attention runs in HF PEFT's way and without concatenation. Models are trained, trained with
checkpointing, and used for decoding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peftkern.ops.prefix_attention import prefix_attention

from .llama import LIBRARIES, MEDIUM, adapt, tokens
from .measure import BARE, OURS, PEFT, Work, allocated, check_equal, kept_bytes

HEADS, D = 8, 64
SCALE = D**-0.5
VIRTUAL, PROMPT, NEW = 64, 16, 64  # tokens in the prefix, in a prompt, generated
MOST_ADDED = 2e6  # bytes that a prefix may add to those that the model without it keeps


def tensors(B: int, T: int, S: int, H_kv: int, P: int) -> list[Tensor]:
    """query, key and value [B, heads, rows, D], and the prefix's Kp and Vp [H_kv, P, D].

    In memory the first three are [B, rows, heads, D].
    """
    g = torch.Generator().manual_seed(0)
    shapes = [(B, T, HEADS, D), (B, S, H_kv, D), (B, S, H_kv, D)]
    own = [torch.randn(s, generator=g).transpose(1, 2) for s in shapes]
    prefix = [torch.randn(H_kv, P, D, generator=g) for _ in range(2)]
    return [x.requires_grad_() for x in (*own, *prefix)]


def peft(
    layer: Any, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *prefix: Tensor
) -> Tensor:
    """PEFT's way: a cache gets the prefix, repeated over the batch, and concatenates."""
    cache = DynamicCache()
    if prefix:
        kp, vp = (x.unsqueeze(0).repeat(q.shape[0], 1, 1, 1) for x in prefix)
        cache.update(kp, vp, 0)
    k, v = cache.update(k, v, 0)
    return sdpa_attention_forward(layer, q, k, v, mask, scaling=SCALE)[0].transpose(1, 2)


def ours(*args: Tensor) -> Tensor:
    return prefix_attention(*args, scale=SCALE, causal=True)


def of_kv_heads(H_kv: int) -> Any:
    """A stand-in for a layer, with the attributes that transformers' attention reads."""
    return SimpleNamespace(num_key_value_groups=HEADS // H_kv, is_causal=True)


@pytest.mark.parametrize("H_kv", [8, 2], ids="kv{}".format)
def test_training(compare: Callable[..., Any], count: Callable[..., Any], H_kv: int) -> None:
    B, T, P = 16, 256, 64
    args = tensors(B, T, T, H_kv, P)
    layer = of_kv_heads(H_kv)
    # the mask that transformers gives its attention for P cached and T new tokens without padding;
    # it is made once for all layers, and so not timed
    mask = torch.ones(T, P + T, dtype=torch.bool).tril(P).expand(B, 1, T, P + T)
    calls = {
        BARE: (partial(peft, layer, None), args[:3]),
        PEFT: (partial(peft, layer, mask), args),
        OURS: (ours, args),
    }
    do = torch.randn(B, HEADS, T, D)
    found = {}
    for name in (PEFT, OURS):
        out = calls[name][0](*calls[name][1])
        found[name] = (out, *torch.autograd.grad(out, args, do))
    names = ("output", "dQ", "dK", "dV", "dKp", "dVp")
    for what, a, b in zip(names, found[OURS], found[PEFT], strict=True):
        check_equal(what, a, b)

    kept = {n: float(kept_bytes(partial(call, *given), [])) for n, (call, given) in calls.items()}
    count(f"bytes kept, attention {B}x{T}, P={P}, {H_kv} kv heads", kept, note="inputs included")

    def step(name: str) -> tuple[Tensor, ...]:
        call, given = calls[name]
        return torch.autograd.grad(call(*given), given, do)

    compare(
        f"attention forward+backward {B}x{T}, P={P}, {H_kv} kv heads",
        {name: Work(partial(step, name)) for name in calls},
        target=1.0,
        note="8 heads of 64; bare: without a prefix",
    )


@pytest.mark.parametrize("H_kv", [8, 2], ids="kv{}".format)
def test_decode(compare: Callable[..., Any], H_kv: int) -> None:
    B, S, P = 8, 80, 64
    q, k, v, kp, vp = (x.detach() for x in tensors(B, 1, S, H_kv, P))
    layer = of_kv_heads(H_kv)
    keys, values = (
        torch.cat([p.expand(B, -1, -1, -1), x], 2) for p, x in ((kp, k), (vp, v))
    )  # PEFT's cache holds both
    k, v = k.contiguous(), v.contiguous()
    works = {
        BARE: Work(partial(sdpa_attention_forward, layer, q, k, v, None, scaling=SCALE)),
        PEFT: Work(partial(sdpa_attention_forward, layer, q, keys, values, None, scaling=SCALE)),
        OURS: Work(partial(ours, q, k, v, kp, vp)),
    }
    with torch.no_grad():
        check_equal("output", works[OURS].run(), works[PEFT].run()[0].transpose(1, 2))
        compare(
            f"attention of one token {B}x{S}, P={P}, {H_kv} kv heads",
            works,
            calls=50,
            rounds=21,
            note="8 heads of 64, no gradients; bare: without a prefix",
        )


# ---- whole models -------------------------------------------------------------------------------


@cache
def models(H_kv: int) -> dict[str, Any]:
    """{provider: a Llama}, bare or with a prefix of a library; all share weights and prefix."""
    config = MEDIUM.config()
    config.num_key_value_heads = H_kv
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).eval().requires_grad_(False)
    found: dict[str, Any] = {BARE: base}
    for name, library in LIBRARIES.items():
        setting = {"task_type": "CAUSAL_LM", "num_virtual_tokens": VIRTUAL}
        found[name] = adapt(library, base, library.PrefixTuningConfig(**setting))
    with torch.no_grad():
        prefix_of(found[OURS]).copy_(prefix_of(found[PEFT]))
    return found


def prefix_of(model: Any) -> Tensor:
    return model.prompt_encoder["default"].embedding.weight


def batch_for(name: str, embedded: Tensor, ids: Tensor) -> dict[str, Any]:
    """The arguments of a step; the bare model, which has nothing to train, gets embeddings."""
    given = {"inputs_embeds": embedded} if name == BARE else {"input_ids": ids}
    return {**given, "labels": ids, "use_cache": False}


@pytest.mark.timeout(1800)  # minutes, on a machine that has nothing else to do
@pytest.mark.parametrize("H_kv", [8, 2], ids="kv{}".format)
def test_model_step(compare: Callable[..., Any], count: Callable[..., Any], H_kv: int) -> None:
    here = {name: model.train() for name, model in models(H_kv).items()}
    ids = tokens(MEDIUM, 16, 256)
    embedded = here[BARE].get_input_embeddings()(ids).requires_grad_()

    def forward(name: str) -> Tensor:
        return here[name](**batch_for(name, embedded, ids)).loss

    def forget(name: str) -> tuple[()]:
        embedded.grad = None
        here[name].zero_grad()
        return ()

    def step(name: str) -> Tensor:
        loss = forward(name)
        loss.backward()
        return loss.detach()

    losses = {name: step(name) for name in (PEFT, OURS)}
    check_equal("loss", losses[OURS], losses[PEFT])
    ours, theirs = prefix_of(here[OURS]).grad, prefix_of(here[PEFT]).grad
    assert ours is not None and theirs is not None and theirs.abs().max() > 0
    check_equal("prefix", ours / theirs.abs().max(), theirs / theirs.abs().max(), 1e-4)

    shape = f"{MEDIUM} 16x256, P={VIRTUAL}, {H_kv} kv heads"
    held, peak = {}, {}
    for name in here:
        forget(name)
        held[name] = float(allocated(partial(forward, name))[0])
        forget(name)
        peak[name] = float(allocated(partial(step, name))[1])
    added = held[PEFT] - held[BARE]
    count(
        f"bytes held after forward, {shape}",
        held,
        kind="added",
        target=MOST_ADDED / added,
        note=f"beyond the model without a prefix: PEFT {added / 1e6:.1f} MB, peftkern "
        f"{(held[OURS] - held[BARE]) / 1e6:.1f} MB (at most {MOST_ADDED / 1e6:.0f})",
    )
    count(f"peak of a step, {shape}", peak, note="beyond what was allocated before the step")

    saved = {PEFT: peak[PEFT]}
    for name in (BARE, OURS):
        here[name].gradient_checkpointing_enable({"use_reentrant": False})
        forget(name)
        saved[name] = float(allocated(partial(step, name))[1])
        if name == OURS:
            check_equal("prefix", prefix_of(here[OURS]).grad / theirs.abs().max(),
                        theirs / theirs.abs().max(), 1e-4)  # fmt: skip
        here[name].gradient_checkpointing_disable()
    count(
        f"peak with gradient checkpointing, {shape}",
        {name: saved[name] for name in (BARE, PEFT, OURS)},
        target=0.35,
        note="PEFT without it: it refuses gradient checkpointing with a prefix",
    )
    compare(
        f"training step with a prefix, {shape}",
        {name: Work(partial(step, name), partial(forget, name)) for name in here},
        target=1.0,
        rounds=7,
        warmup=1,
        note="bare: the gradient of the embeddings, without a prefix",
    )


@pytest.mark.timeout(1800)  # minutes, on a machine that has nothing else to do
@pytest.mark.parametrize("H_kv", [8, 2], ids="kv{}".format)
def test_model_decode(compare: Callable[..., Any], H_kv: int) -> None:
    here = {name: model.eval() for name, model in models(H_kv).items()}
    ids = tokens(MEDIUM, 8, PROMPT)
    greedy = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    works = {name: Work(partial(m.generate, input_ids=ids, **greedy)) for name, m in here.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = works[OURS].run()
        assert written.shape == (8, PROMPT + NEW)
        assert torch.equal(written, works[PEFT].run()), "the two generate different tokens"
    compare(
        f"decode {NEW} tokens with a prefix, {MEDIUM} batch 8, P={VIRTUAL}, {H_kv} kv heads",
        works,
        target=0.8,
        rounds=9,
        warmup=1,
        note=f"prompt of {PROMPT}, KV cache, greedy; bare: the same model without a prefix",
    )
