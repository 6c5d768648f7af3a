"""The dispatcher: runs every whole operation in the fastest way for its shape on this GPU.

Signatures are those of :mod:`.torch_backend`. For a call with the same numbers (operation, dtypes,
M-bucket, N, K, r, group, mask, gradients) as an earlier one, the decision is one lookup in a dict.
Otherwise the first of these decides:

1. a race that this machine ran earlier (the file on disk, see :mod:`.tuned`);
2. the table that ships for this GPU;
3. a race, now, on the tensors of the call (:mod:`.race`);
4. if no race may run (``PEFTKERN_RACE=0``, a trace, another thread is racing), the entry of the
   nearest M-bucket, else torch. While a CUDA graph is captured it is torch, as a capture forbids to
   load a kernel, and each that has not run yet in this process would be loaded.

A decision holds while the process lives, except for the fourth kind, which the next call that may
race replaces. Even then the same elements are dropped: masks are drawn here, by a seed from torch's
generator, and given to the way that computes. So a checkpointed block is recomputed with its mask.

Tensors that are not plain (FakeTensors, DTensors, inside a torch.func transform) go to torch, which
supports them.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.common import INTERPRET
from ..kernels.tuning import Entry, Key
from ..utils.private import transforms_active, without_dispatch_modes
from . import (
    choices,
    device,
    fp8_copies,
    quantised_triton,
    race,
    sampled,
    torch_backend,
    triton_backend,
    tuned,
)
from .bases.weight import BaseWeight
from .choices import TORCH
from .device import on_its_device
from .projection import Projection, ProjectionGrad
from .tuned import key_of

log = logging.getLogger("peftkern")

RACE_ENV = "PEFTKERN_RACE"
TRIES = 100  # the most races of one key that could not decide
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_anew = False  # set by `anew`
clock: Any = race.WallClock() if INTERPRET.value else race.CudaClock()

why_not = triton_backend.why_not
# in a call that the kernels take, every way gives S in x's dtype and gets a mask as argument
draw = triton_backend.draw
low_rank_dtype = triton_backend.low_rank_dtype
group_rows = triton_backend.group_rows


class Decision(NamedTuple):
    """The way that a call takes, and the reason."""

    how: str
    in_graph: str  # the same, while a CUDA graph is captured
    why: str
    gain: float | None = None  # torch's time over its own
    declined: bool = False  # True: the kernels do not take it, so torch also draws its masks


def races_off() -> str | None:
    """The reason that no race ever runs in this process; None when races may run.

    Raises:
        ValueError: the value of the variable is not 0 or 1.
    """
    given = os.environ.get(RACE_ENV) or "1"
    if given not in ("0", "1"):
        raise ValueError(f"{RACE_ENV}={given!r} is not known; allowed: 0, 1")
    return f"{RACE_ENV}=0" if given == "0" else None


def _foreign(x: Tensor) -> bool:
    kind: Any = type(x)
    return kind not in _PLAIN or transforms_active()


@contextlib.contextmanager
def anew() -> Iterator[None]:
    """Race the first call of every kind within the block, whatever is known (``peftkern tune``)."""
    global _anew
    for book in tuned.books():
        book.decisions.clear()
    _anew = True
    try:
        yield
    finally:
        _anew = False


def _known(key: Key, like: Tensor) -> Decision | None:
    """The earlier decision for calls with this key, or None; reads no file."""
    book = tuned.open_books.get(like.get_device())
    return book.decisions.get(key) if book is not None else None


def _decide(
    key: Key, like: Tensor, ways: Callable[[str], race.Run], exact: sampled.Exact
) -> Decision:
    """The decision for a key that has none yet.

    ``ways`` gives the function to run, by name, and ``exact`` some of the correct numbers.
    """
    index = like.get_device()
    if device.capturing(like):  # it forbids to load a kernel, as one that has not run yet would be
        decision = Decision(TORCH, TORCH, "inside a CUDA graph capture, and never called before")
        if index in tuned.open_books:  # opening a book would read files
            tuned.open_books[index].provisional[key] = decision
        return decision
    if not like.numel():
        return Decision(TORCH, TORCH, "there are no rows")
    book = tuned.book(index)
    decisions: dict[Key, Decision] = book.decisions
    reason = _declines(key, like)
    if reason is not None:
        return decisions.setdefault(key, Decision(TORCH, TORCH, reason, declined=True))
    if not _anew and (known := _from_tables(key, book)) is not None:
        return decisions.setdefault(key, _with_graph_way_loaded(known, ways))
    off = races_off()
    blocked = off or ("torch.compile is tracing" if torch.compiler.is_compiling() else None)
    if blocked is None and not book.racing.acquire(blocking=False):
        blocked = "another thread is racing"
    if blocked is None:
        try:
            if key in decisions:  # another thread has raced it in the meantime
                return decisions[key]
            decision, for_good = _race(key, like.dtype, ways, exact, book)
            book.tries[key] += 1
            for_good = for_good or book.tries[key] >= TRIES
        finally:
            book.racing.release()
    else:
        decision, for_good = _nearest(key, book, blocked), off is not None
        if for_good:  # a capture asks for no other, and the next call decides again
            decision = _with_graph_way_loaded(decision, ways)
    if for_good:
        book.provisional.pop(key, None)
        return decisions.setdefault(key, decision)
    book.provisional[key] = decision
    return decision


def _with_graph_way_loaded(decision: Decision, ways: Callable[[str], race.Run]) -> Decision:
    """The decision, after one run of its way in CUDA graphs, if that is another one.

    The run loads the kernels, which a capture forbids. If it fails, the way in graphs is torch.
    """
    if decision.in_graph in (decision.how, TORCH):  # the call itself runs it
        return decision
    try:
        with without_dispatch_modes(), torch.no_grad():
            ways(decision.in_graph)()
        return decision
    except Exception as e:  # optional, like a race
        log.warning(
            "%s is not taken in CUDA graphs: %s: %s", decision.in_graph, type(e).__name__, e
        )
        return decision._replace(in_graph=TORCH)


def _declines(key: Key, like: Tensor) -> str | None:
    """The reason that the kernels do not take such a call; None when they do."""
    reason = triton_backend.refusal(like, getattr(torch, key.adapter_dtype), key.r)
    if reason is not None and like.device.type == "cuda":
        log.info("auto hands a call to torch: %s", reason)
    return reason


def _from_tables(key: Key, book: tuned.Book) -> Decision | None:
    """The decision by the entries of exactly this key, on disk or shipped; None without one."""
    allowed = choices.names(key.op, key.m)
    found: list[tuple[Entry, str]] = []
    for graph, of in enumerate((key, choices.in_graph(key))):
        hit = book.find(of)
        if hit is None or hit[0].choice not in allowed:
            if graph and found:  # in its race it could not be captured
                found.append(found[0])
                continue
            return None
        found.append(hit)
    (plain, why), (graphed, _) = found
    return Decision(str(plain.choice), str(graphed.choice), why, _gain(plain))


def _gain(entry: Entry) -> float | None:
    times, choice = entry.times, str(entry.choice)
    return times[TORCH] / times[choice] if TORCH in times and choice in times else None


def _nearest(key: Key, book: tuned.Book, blocked: str) -> Decision:
    allowed = choices.names(key.op, key.m)
    ways, reasons = [], []
    for of in (key, choices.in_graph(key)):
        hit = book.find_near(of)
        if hit is not None and hit[0].choice in allowed:
            ways.append(str(hit[0].choice))
            reasons.append(f"nearest bucket, {hit[1]}")
        else:
            ways.append(TORCH)
            reasons.append("torch")
    return Decision(ways[0], ways[1], f"{blocked}: {reasons[0]}")


def _race(
    key: Key,
    dtype: torch.dtype,
    ways: Callable[[str], race.Run],
    exact: sampled.Exact,
    book: tuned.Book,
) -> tuple[Decision, bool]:
    """(decision, True when it is final)."""
    named = {name: ways(name) for name in choices.names(key.op, key.m)}
    graph_key = choices.in_graph(key)
    try:
        with without_dispatch_modes(), torch.no_grad():
            plain, graphed = race.run(
                named, dtype, clock, exact=exact, op=_told(key), graphs=graph_key != key
            )
    except race.Undecided as e:
        log.info("no race for %s: %s", key, e)
        if e.for_good:
            return Decision(TORCH, TORCH, f"{e}: torch"), True
        return _nearest(key, book, str(e)), False
    except Exception as e:  # a race is optional: whatever fails in it, the call goes on
        log.warning("a race failed, torch is taken for %s: %s", key, race.said(e))
        return Decision(TORCH, TORCH, f"race failed: {race.said(e)}"), True
    made = [_entry(key, plain)] + ([_entry(graph_key, graphed)] if graphed else [])
    book.keep(made)
    why = f"raced here on {made[0].date[:10]}"
    if plain.left_out:
        why += f" without {', '.join(plain.left_out)}"
    return Decision(plain.winner, (graphed or plain).winner, why, _gain(made[0])), True


def _told(key: Key) -> str:
    together = f" of {key.group}" if key.group > 1 else ""
    return f"{key.op}{together}, M<={key.m} N={key.n} K={key.k} r={key.r} in {key.dtype}"


def _entry(key: Key, outcome: race.Outcome) -> Entry:
    return Entry(
        key, outcome.winner, None, outcome.us[outcome.winner], outcome.times.get(TORCH),
        len(outcome.us), outcome.times, outcome.left_out, tuned.now(),
    )  # fmt: skip


# kinds of calls in fp8 that have run, so that their kernels are loaded
_loaded: set[Any] = set()


def in_fp8(op: str, like: Tensor, ws: list[Tensor], As: list[Tensor]) -> bool:
    """True for a call with base products in fp8 that goes to the kernels, without a race.

    The key of a race knows no format, and the kernels quantise in passes that they make anyway.
    While a CUDA graph is captured, a kind of call that has not run before goes the other way.
    """
    if fp8_copies.order(ws) is None or any(why_not(like, A) is not None for A in As):
        return False
    kind = (op, like.device, like.dtype, like.shape, *((A.dtype, A.shape) for A in As))
    kind += tuple(w.shape for w in ws)
    return device.is_loaded(kind, like, _loaded)


# ------------------------------------------------------------------------------ the operations


@on_its_device
def forward(
    x: Tensor, members: list[Projection], words: list[Tensor | None] | None = None
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """(Y_i, S_i, mask_i) of projections of one x [M, K]; the masks are ``words`` if given."""
    if _foreign(x):
        return torch_backend.forward(x, members, words)
    quantised = members[0].weight.__class__ is BaseWeight
    if quantised and in_fp8("forward", x, [m.weight for m in members], [m.A for m in members]):
        return triton_backend.forward(x, members, words)
    (M, K), first = x.shape, members[0]
    if len(members) == 1:
        (n, r), mask = first.B.shape, first.p > 0.0
    else:
        n, r = sum(m.B.shape[0] for m in members), max(m.A.shape[0] for m in members)
        mask = any(m.p > 0.0 for m in members)
    key = key_of("forward", x.dtype, first.A.dtype, M, n, K, r, len(members), mask)
    decision = _known(key, x)
    declined = why_not(x, first.A) is not None if decision is None else decision.declined
    # drawn before a race, the same for all ways; a kernel that is chosen already draws them itself
    itself = decision is not None and decision.how != TORCH
    if words is None and not (declined or itself):
        words = choices.words_for(x, members)
    if decision is None:
        given = words or []
        exact = sampled.forward(x, members, given)
        decision = _decide(
            key, x, lambda name: lambda: choices.forward(name, x, members, given), exact
        )
    if declined or decision.declined:  # the former also in a capture and without rows
        return torch_backend.forward(x, members, words)
    return choices.forward(decision.how, x, members, words)


@on_its_device
def backward(
    x: Tensor, members: list[ProjectionGrad], needs_x: bool, given: list[Tensor] | None = None
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """(dX [M, K], summed over all projections; (dA_i, dB_i) of each)."""
    if _foreign(x):
        return torch_backend.backward(x, members, needs_x, given)
    first = members[0]
    quantised = first.w.__class__ is BaseWeight
    if quantised and in_fp8("backward", first.dy, [m.w for m in members], [m.A for m in members]):
        return triton_backend.backward(x, members, needs_x, given)
    n, r = sum(m.B.shape[0] for m in members), max(m.A.shape[0] for m in members)
    mask = any(m.bits is not None for m in members)
    grads = triton_backend.grads_of(members, needs_x, given)
    dy, K = first.dy, x.shape[1]
    key = key_of(
        "backward", dy.dtype, first.A.dtype, dy.shape[0], n, K, r, len(members), mask, grads
    )
    decision = _known(key, dy) or _decide(
        key,
        dy,
        lambda name: lambda: choices.backward(name, x, members, needs_x, given),
        sampled.backward(x, members, needs_x, given),
    )
    return choices.backward(decision.how, x, members, needs_x, given)


@on_its_device
def infer(
    x: Tensor, w: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, transposed: bool
) -> Tensor:
    """Y for x [..., K] without gradients or dropout; ``w`` is [K, N] when ``transposed``."""
    if _foreign(x):
        return torch_backend.infer(x, w, bias, A, B, scale, transposed)
    if w.__class__ is BaseWeight and why_not(x, A) is None:  # no key knows its format
        given = [Projection(w, bias, A, B, scale, 0.0, transposed)]
        if (done := quantised_triton.infer(x, given)) is not None:
            return done[0]
        if in_fp8("infer", x, [w], [A]):
            return triton_backend.infer_group(x, given)[0]
    r, K = A.shape
    key = key_of("infer", x.dtype, A.dtype, x.numel() // max(K, 1), B.shape[0], K, r)
    decision = _known(key, x) or _decide(
        key,
        x,
        lambda name: lambda: choices.infer(name, x, w, bias, A, B, scale, transposed),
        sampled.infer(x, w, bias, A, B, scale, transposed),
    )
    return choices.infer(_now(decision, x), x, w, bias, A, B, scale, transposed)


@on_its_device
def infer_group(x: Tensor, members: list[Projection]) -> list[Tensor]:
    """Y_i [..., N_i] of projections of x [..., K], without gradients or dropout."""
    if _foreign(x):
        return torch_backend.infer_group(x, members)
    if members[0].weight.__class__ is BaseWeight and not any(why_not(x, m.A) for m in members):
        if (done := quantised_triton.infer(x, members)) is not None:
            return done
        if in_fp8("infer", x, [m.weight for m in members], [m.A for m in members]):
            return triton_backend.infer_group(x, members)
    A, K = members[0].A, x.shape[-1]
    n, r = sum(m.B.shape[0] for m in members), max(m.A.shape[0] for m in members)
    key = key_of("infer", x.dtype, A.dtype, x.numel() // max(K, 1), n, K, r, len(members))
    decision = _known(key, x) or _decide(
        key,
        x,
        lambda name: lambda: choices.infer_group(name, x, members),
        sampled.infer_group(x, members),
    )
    return choices.infer_group(_now(decision, x), x, members)


@on_its_device
def mixed(x: Tensor, w: Tensor, bias: Tensor | None, adapters: Any, samples: Any) -> Tensor:
    """Y [M, N] for x [M, K], w [N, K] and an adapter for each sample; see :mod:`.lora_mixed`."""
    weights = [a for a in adapters if a is not None]
    if _foreign(x) or not weights or triton_backend.why_not_mixed(x, adapters) is not None:
        return torch_backend.mixed(x, w, bias, adapters, samples)
    w = quantised_triton.dense(w)  # the key knows no format
    (M, K), r = x.shape, max(a.A.shape[0] for a in weights)
    count = 1 << (len(weights) - 1).bit_length()  # a power of two, as each count compiles a kernel
    key = key_of("mixed", x.dtype, weights[0].A.dtype, M, w.shape[0], K, r, count)
    decision = _known(key, x) or _decide(
        key,
        x,
        lambda name: lambda: choices.mixed(name, x, w, bias, adapters, samples),
        sampled.mixed(x, w, bias, adapters, samples),
    )
    return choices.mixed(_now(decision, x), x, w, bias, adapters, samples)


def _now(decision: Decision, x: Tensor) -> str:
    """The way of a call, which may be captured in a CUDA graph now."""
    if decision.in_graph != decision.how and device.capturing(x):
        return decision.in_graph
    return decision.how
