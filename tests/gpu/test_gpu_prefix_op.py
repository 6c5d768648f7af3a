"""Prefix attention as models call it, on the kernels and by ``auto``, compared with torch."""

import pytest
import torch

from tests.gpu.ground import DEVICE, ON_CPU, as_good_as_torch, backend, prefix_reference, some

from peftkern.ops.prefix_attention import prefix_attention  # isort: skip

BF16 = torch.bfloat16
OPTIONS = {
    "causal": {},
    "padded": {"keep": True},
    "window": {"window": 40},
    "softcap and sinks": {"softcap": 20.0, "sinks": True},
}


def drawn(B, H, H_kv, T, P, D):
    """q, k, v, the prefix's keys and values, and dO."""
    if ON_CPU:
        B, H, H_kv, T, P, D = 1, 2, 1, 20, 7, 16
    own = ((T, H), (T, H_kv), (T, H_kv), (T, H))
    q, k, v, do = (some(B, n, h, D, seed=i).transpose(1, 2) for i, (n, h) in enumerate(own))
    return [q, k, v, *(some(H_kv, P, D, seed=7 + i) for i in range(2))], do


def step(tensors, do, options, choice):
    leaves = [t.detach().requires_grad_() for t in tensors]
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = options["sinks"].detach().requires_grad_()
        leaves.append(options["sinks"])
    with backend.use_backend(choice):
        o = prefix_attention(*leaves[:5], scale=0.1, causal=True, **options)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]


@pytest.mark.parametrize("choice", ["triton", "auto"])
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("D", [64, 128])
def test_output_and_gradients(D, case, choice):
    tensors, do = drawn(4, 16, 4, 200, 50, D)
    options = dict(OPTIONS[case])
    if "keep" in options:
        options["keep"] = torch.ones(tensors[1].shape[0], tensors[1].shape[2], device=DEVICE) > 0
        options["keep"][0, :9] = False
    if "sinks" in options:
        options["sinks"] = some(tensors[0].shape[1], seed=20)
    found = step(tensors, do, options, choice)
    rough = step(tensors, do, options, "torch")
    wide = [t.double().requires_grad_() for t in tensors]
    more = dict(options)
    if "sinks" in options:
        more["sinks"] = options["sinks"].double().requires_grad_()
        wide.append(more["sinks"])
    o, _ = prefix_reference.attend(*wide[:5], scale=0.1, **more)
    exact = [o.detach(), *torch.autograd.grad(o, wide, do.double())]
    for got, theirs, want in zip(found, rough, exact, strict=True):
        as_good_as_torch(got, theirs, want)


@pytest.mark.skipif(ON_CPU, reason="auto has nothing to choose from on a CPU")
def test_auto_says_what_won():
    from peftkern.ops.prefix_report import describe

    tensors, do = drawn(8, 32, 8, 512, 128, 128)
    step(tensors, do, {}, "auto")
    with backend.use_backend("auto"):
        fused, _, why = describe(tensors[0], 128)
    assert fused and "raced in this process" in why
