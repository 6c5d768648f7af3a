"""The part prefix: one layer's attention with a prefix, in decoding, prefill and training.

It compares HF PEFT's way, torch's attention without a prefix, and the kernels of peftkern. Decoding
runs in a CUDA graph. All get the same q, the same own keys and values, and the same prefix.

HF PEFT's way is the result of its forward in transformers. The prefix is expanded over the batch
and concatenated with the own keys and values; as there is then a mask, both are repeated over the
heads of a group. In decoding, the cache, which holds the prefix, is concatenated with the token's
keys at every step. ``JOINED`` is that decoding without the concatenation, as in a static cache,
which HF PEFT does not support.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .device import Device, randn
from .numerics import LIMITS, relative
from .providers import PEFT_BF16, PLAIN
from .report import JOINED
from .report import PREFIX as OURS
from .store import Watch
from .timing import Timed, interleave

Run = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class PrefixCase:
    """B rows of T query tokens, S own keys and a prefix of P; H query, H_kv key/value heads of D.

    All tensors are bf16.
    """

    what: str  # decode, prefill or train
    B: int = 8
    T: int = 1024
    S: int = 1024
    P: int = 128
    H: int = 32
    H_kv: int = 8
    D: int = 128

    @property
    def key(self) -> str:
        shape = f"B={self.B} T={self.T} S={self.S} P={self.P}"
        return f"prefix {self.what} {shape} {self.H}/{self.H_kv}x{self.D}"

    def checked(self) -> PrefixCase:
        """The same case in at most two rows and two key/value heads, to fit into float64."""
        heads = min(2, self.H_kv)
        return replace(self, B=min(2, self.B), H=self.H // self.H_kv * heads, H_kv=heads)

    def tiny(self) -> PrefixCase:
        T = min(self.T, 20)
        return replace(
            self, B=2, T=T, S=T + 3 if self.what == "decode" else T, P=5, H=2, H_kv=1, D=16
        )

    def kv_bytes(self) -> int:
        """Bytes of own keys and values and of one prefix."""
        return 2 * 2 * self.H_kv * self.D * (self.B * self.S + self.P)


def cases() -> list[PrefixCase]:
    def decode(**shape: int) -> PrefixCase:
        return PrefixCase("decode", **{"T": 1, "S": 512, **shape})

    return [
        decode(),  # a goal of docs/goals.md
        PrefixCase("train"),
        PrefixCase("prefill"),
        decode(B=1),
        decode(B=32),
        decode(S=4096),
        PrefixCase("train", P=32),
        PrefixCase("train", B=4, T=2048, S=2048),
        PrefixCase("train", H=16, H_kv=16, D=64),
        PrefixCase("train", H=16, H_kv=8, D=256),
        decode(H=16, H_kv=8, D=256),
        decode(H=32, H_kv=32),
        PrefixCase("prefill", B=1, T=4096, S=4096),
    ]


def floor(case: PrefixCase, ceilings: dict[str, float]) -> dict[str, float]:
    """{"us", "bytes", "flops"} of the least: each tensor moved once in each direction.

    Only pairs of a query and a key that it sees count.
    """
    pairs = case.T * (case.P + case.S - case.T) + case.T * (case.T + 1) // 2
    row = 2 * case.B * case.H * case.T * case.D  # q, o, and their gradients
    seconds = moved = flops = 0.0
    for factor, rows in ((4, 2), (10, 4))[: 2 if case.what == "train" else 1]:
        products = float(factor * case.B * case.H * case.D * pairs)
        traffic = float(rows * row + case.kv_bytes() * (1 if factor == 4 else 2))
        times = (
            traffic / (ceilings["copy_tb_s"] * 1e12),
            products / (ceilings["bf16_tflop_s"] * 1e12),
        )
        seconds, moved, flops = seconds + max(times), moved + traffic, flops + products
    return {"us": seconds * 1e6, "bytes": moved, "flops": flops}


def draw(case: PrefixCase, device: Device) -> list[Tensor]:
    """q, k, v [B, heads, rows, D], the prefix's keys and values [H_kv, P, D], and dO like q.

    In memory all but the prefix are [B, rows, heads, D].
    """

    def some(*shape: int) -> Tensor:
        return randn(device, *shape, dtype=torch.bfloat16)

    q, k, v, grad = (
        some(case.B, n, heads, case.D).transpose(1, 2)
        for n, heads in (
            (case.T, case.H), (case.S, case.H_kv), (case.S, case.H_kv), (case.T, case.H)
        )
    )  # fmt: skip
    return [q, k, v, *(some(case.H_kv, case.P, case.D) for _ in range(2)), grad]


def _with_grads(case: PrefixCase, forward: Run) -> Run:
    """``forward`` with its gradients in a case of training, else ``forward`` alone.

    The results are O, and the gradients of q, k, v, and of the prefix if it is used.
    """

    def run(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, grad: Tensor) -> Any:
        leaves = [t.detach().requires_grad_() for t in (q, k, v, pk, pv)]
        o = forward(*leaves)[0]
        return o.detach(), *torch.autograd.grad(o, leaves, grad, allow_unused=True)

    return run if case.what == "train" else lambda *t: forward(*t[:5])


def _plain(case: PrefixCase) -> Run:
    def forward(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> tuple[Tensor, ...]:
        return (sdpa(q, k, v, is_causal=case.T > 1, enable_gqa=case.H != case.H_kv),)

    return _with_grads(case, forward)


def _repeat(t: Tensor, count: int) -> Tensor:
    B, heads, n, D = t.shape
    return t[:, :, None].expand(B, heads, count, n, D).reshape(B, heads * count, n, D)


def _concatenated(case: PrefixCase, device: Device) -> Run:
    """HF PEFT's way in prefill and training, where the prefix is concatenated."""
    own = torch.ones(case.T, case.S, dtype=torch.bool, device=device.torch).tril(case.S - case.T)
    mask = torch.cat([own.new_ones(case.T, case.P), own], 1)[None, None]

    def forward(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> tuple[Tensor, ...]:
        group = case.H // case.H_kv
        keys, values = (
            _repeat(torch.cat([p.expand(case.B, *p.shape), t], 2), group)
            for p, t in ((pk, k), (pv, v))
        )
        return (sdpa(q, keys, values, attn_mask=mask),)

    return _with_grads(case, forward)


def _cached(case: PrefixCase, tensors: list[Tensor], concatenate: bool) -> Run:
    """Decoding with these tensors' prefix and keys in a cache, which it may concatenate."""
    _, k, v, pk, pv, _ = tensors
    keys, values = (torch.cat([p.expand(case.B, *p.shape), t], 2) for p, t in ((pk, k), (pv, v)))

    def run(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        joined = [keys, values]
        if concatenate:
            joined = [
                torch.cat([c[:, :, :-1], t[:, :, -1:]], 2)
                for c, t in zip(joined, (k, v), strict=True)
            ]
        return (sdpa(q, *joined, enable_gqa=case.H != case.H_kv),)

    return run


def _kernel(case: PrefixCase) -> Run:
    from peftkern.kernels import prefix_attention, prefix_backward, prefix_decode

    def run(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, grad: Tensor) -> Any:
        if case.what == "decode":
            return prefix_decode.decode(q, k, v, pk, pv)[:1]
        o, lse = prefix_attention.attend(q, k, v, pk, pv)
        if case.what == "prefill":
            return (o,)
        return o, *prefix_backward.attend_backward(grad, q, k, v, pk, pv, o, lse)[:5]

    return run


def providers(case: PrefixCase, device: Device, tensors: list[Tensor]) -> dict[str, Run]:
    """{name: provider} for one set of tensors, which each also gets as its arguments."""
    found = {PLAIN: _plain(case), OURS: _kernel(case)}
    if case.what == "decode":
        found[PEFT_BF16] = _cached(case, tensors, True)
        found[JOINED] = _cached(case, tensors, False)
    else:
        found[PEFT_BF16] = _concatenated(case, device)
    return found


def exact(case: PrefixCase, tensors: list[Tensor]) -> list[Tensor]:
    from peftkern.kernels import prefix_reference

    return list(_with_grads(case, prefix_reference.attend)(*(t.double() for t in tensors)))


def _errors(got: tuple[Tensor, ...], want: list[Tensor]) -> dict[str, float]:
    names = ("y", "dq", "dk", "dv", "dpk", "dpv")
    return {n: relative(g, w) for n, g, w in zip(names, got, want, strict=False)}


def _attempt(
    case: PrefixCase, sample: list[Tensor], want: Any, runs: Any, sets: Any,
    works: dict[str, Timed], device: Device, name: str, check: Run, entry: dict[str, Any],
) -> None:  # fmt: skip
    entry["errors"] = {} if name == PLAIN else _errors(check(*sample), want)
    entry["checked"] = "by nothing: it has no prefix" if name == PLAIN else "float64"
    entry["ok"] = all(e <= LIMITS["bfloat16"] for e in entry["errors"].values())
    if entry["ok"]:
        works[name] = _timed([r[name] for r in runs], sets, case, device)


def measure(
    case: PrefixCase, device: Device, ceilings: dict[str, float], *, seconds: float, watch: Watch
) -> dict[str, Any]:
    """The row of a case; every provider but the one without a prefix is checked against float64.

    Raises:
        Broken: the device is unusable after a provider ran.
    """
    began = time.monotonic()
    key = case.key
    case = case.tiny() if device.dry else case
    row: dict[str, Any] = {
        "key": key, "part": "prefix", "case": asdict(case), "floor": floor(case, ceilings),
        "providers": {}, "missing": {},
    }  # fmt: skip
    torch.manual_seed(5)
    small = case.checked()
    sample = draw(small, device)
    want = exact(small, sample)
    checks = providers(small, device, sample)
    copies = 1 if device.dry else max(1, min(16, -(-3 * device.l2 // case.kv_bytes())))
    sets = [draw(case, device) for _ in range(copies)]
    runs = [providers(case, device, tensors) for tensors in sets]
    works: dict[str, Timed] = {}
    attempt = partial(_attempt, case, sample, want, runs, sets, works, device)
    watch.each(row, checks, device, attempt)
    if works:
        for name, q in interleave(works, device, seconds).items():
            row["providers"][name]["us"] = q
    row["copies"], row["seconds"] = copies, round(time.monotonic() - began, 2)
    del sets, runs, works, attempt
    device.empty()
    return row


def _timed(runs: list[Run], sets: list[list[Tensor]], case: PrefixCase, device: Device) -> Timed:
    def work() -> None:
        with torch.set_grad_enabled(case.what == "train"):
            for run, tensors in zip(runs, sets, strict=True):
                run(*tensors)

    work()
    return Timed(device.capture(work) if case.what == "decode" else work, len(sets))
