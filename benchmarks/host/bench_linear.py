"""One LoRA linear: the host's time of a call, and the bytes that a training step keeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .llama import LIBRARIES, equalise, share
from .measure import BARE, OURS, PEFT, Work, check_equal, kept_bytes

RANK = 8


def linears(k: int, n: int, bias: bool, p: float = 0.0) -> dict[str, nn.Module]:
    """{provider: layer} around one frozen weight [n, k], with equal adapters."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(k, n, bias=bias)).requires_grad_(False)
    models = {BARE: base}
    for name, library in LIBRARIES.items():
        config = library.LoraConfig(r=RANK, target_modules=["0"], lora_dropout=p)
        models[name] = library.get_peft_model(share(base), config)
    equalise(models[PEFT], models[OURS])
    return {name: m[0] if name == BARE else m.base_model.model[0] for name, m in models.items()}


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("shape", [(1, 64), (1, 1, 64)], ids=str)
def test_host_cost(compare: Callable[..., Any], shape: tuple[int, ...], bias: bool) -> None:
    layers = {name: layer.eval() for name, layer in linears(64, 64, bias).items()}
    x = torch.randn(shape)
    with torch.no_grad():
        check_equal("output", layers[OURS](x), layers[PEFT](x))
        compare(
            f"linear 64x64 {list(shape)}{' bias' if bias else ''}, no grad: added",
            {name: Work(partial(layer, x)) for name, layer in layers.items()},
            rounds=41,
            calls=500,
            warmup=4,
            kind="added",
            target=0.25,
            note="nn.Linear's __call__ under torch.no_grad, evaluation mode",
        )


def keeps(provider: str, m: int, k: int, p: float) -> int:
    """Bytes that a float32 layer of rank ``RANK`` keeps on a CPU for an input [m, k].

    Both libraries keep S [m, r], and without dropout X. With dropout PEFT keeps the dropped X and
    the factors of X, both in float32; peftkern keeps X and one bit an element, in words of 32.
    """
    s = 4 * m * RANK
    if p == 0.0:
        return 4 * m * k + s
    return (8 * m * k if provider == PEFT else 4 * m * k + 4 * m * -(-k // 32)) + s


@pytest.mark.parametrize("p", [0.0, 0.1], ids="p{}".format)
def test_training_linear(compare: Callable[..., Any], count: Callable[..., Any], p: float) -> None:
    M, K = 1024, 576
    layers = {name: layer.train() for name, layer in linears(K, K, False, p).items()}
    x = torch.randn(M, K, requires_grad=True)
    dy = torch.randn(M, K)
    found: dict[str, tuple[Tensor, ...]] = {}
    for name in (PEFT, OURS):
        torch.manual_seed(3)
        y = layers[name](x)
        weights = [w for w in layers[name].parameters() if w.requires_grad]
        found[name] = (y, *torch.autograd.grad(y, [x, *weights], dy))
    for what, ours, theirs in zip(
        ("output", "dX", "dA", "dB"), found[OURS], found[PEFT], strict=True
    ):
        check_equal(what, ours, theirs)

    kept = {}
    for name, layer in layers.items():
        kept[name] = kept_bytes(partial(layer, x), list(layer.parameters()))
        if name != BARE:
            assert kept[name] == keeps(name, M, K, p), f"{name} keeps {kept[name]} bytes"
    count(f"bytes kept, linear M={M} K=N={K} dropout {p}", kept, note="fp32, measured")
    M2, K2 = 8192, 4096
    count(
        f"bytes kept, linear M={M2} K=N={K2} dropout {p} *",
        {BARE: 0, **{name: keeps(name, M2, K2, p) for name in (PEFT, OURS)}},
        note="fp32, by the formula that the measured row was checked against",
    )

    def step(layer: nn.Module) -> None:
        layer(x).backward(dy)

    def forget() -> tuple[()]:
        x.grad = None
        for layer in layers.values():
            layer.zero_grad()
        return ()

    compare(
        f"linear {M}x{K}x{K} forward+backward, dropout {p}",
        {name: Work(partial(step, layer), forget) for name, layer in layers.items()},
        rounds=31,
        note="bare: dX alone, through the frozen weight",
    )
