"""The pictures of docs/kernels.md: which launches a pass has, and what each reads and writes.

    python docs/draw_passes.py            writes docs/images/pass-*.svg
    python docs/draw_passes.py --check    exit status 1 where they are not what this file says

tests/test_passes.py holds the launches against those that the code plans.
"""

from __future__ import annotations

import argparse
import os
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

IMAGES = Path(__file__).parent / "images"
VENDOR = "addmm_ (vendor)"


class Launch(NamedTuple):
    """A kernel, its formula line by line, and the tensors, "NAME [SHAPE]", read and written."""

    kernel: str
    formula: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


GRAD_SB = (
    Launch("grad_sb", ("s · dY B, in parts over N", "dYᵀ S, in parts over M"),
           ("dY [M, N]", "B [N, r]", "S [M, r]"), ("parts fp32",)),
    Launch("sum", ("dS, dB = the parts, added", "in a fixed order"),
           ("parts fp32",), ("dS [M, r]", "dB [N, r]")),
)  # fmt: skip

PASSES: dict[str, tuple[Launch, ...]] = {
    "forward-joined": (
        Launch("shrink_expand", ("S = s · (mask ∘ X) Aᵀ", "Y = S Bᵀ + bias",
                                 "mask (with dropout) from seed"),
               ("X [M, K]", "A [r, K]", "B [N, r]", "seed [1]"),
               ("S [M, r]", "Y [M, N]", "mask [M, K/32]")),
        Launch(VENDOR, ("Y += X Wᵀ",), ("X [M, K]", "W [N, K]", "Y [M, N]"), ("Y [M, N]",)),
    ),
    "forward-fused": (
        Launch("shrink", ("S = s · (mask ∘ X) Aᵀ", "mask (with dropout) from seed"),
               ("X [M, K]", "A [r, K]", "seed [1]"), ("S [M, r]", "mask [M, K/32]")),
        Launch("gemm", ("Y = X Wᵀ + S Bᵀ + bias", "in one accumulator"),
               ("X [M, K]", "W [N, K]", "S [M, r]", "B [N, r]"), ("Y [M, N]",)),
    ),
    "grad-b": GRAD_SB,
    "grad-xa": (
        Launch("grad_xa", ("dA = dSᵀ (mask ∘ X)", "dX = mask ∘ (dS A)"),
               ("X [M, K]", "mask [M, K/32]", "dS [M, r]", "A [r, K]"), ("dA [r, K]", "dX [M, K]")),
        Launch(VENDOR, ("dX += dY W",), ("dY [M, N]", "W [N, K]", "dX [M, K]"), ("dX [M, K]",)),
    ),
    "decode": (
        Launch("decode_shrink", ("S = s · X Aᵀ, in parts over K", "the next starts meanwhile"),
               ("X [M, K], M ≤ 16", "A [r, K]"), ("S parts fp32",)),
        Launch("decode", ("X Wᵀ + bias, then wait for S", "Y = that + (the parts' sum) Bᵀ"),
               ("X [M, K], M ≤ 16", "W [N, K]", "B [N, r]", "S parts fp32"), ("Y [M, N]",)),
    ),
    "mixed": (
        Launch("parts", ("Sₘ = sᵢ · X[m] Aᵢᵀ, i = index of m's sample", "rows sorted by adapter",
                         "X Wᵀ in parts over K"),
               ("X [M, K]", "W [N, K]", "index [samples]", "A₁ … [rᵢ, K]"),
               ("S parts fp32", "parts fp32", "table of B₁ …")),
        Launch("finish", ("Y[m] = the parts, added, + bias", "+ Sₘ Bᵢᵀ, adapter by adapter"),
               ("parts fp32", "S parts fp32", "table of B₁ …", "index [samples]", "B₁ … [N, rᵢ]"),
               ("Y [M, N]",)),
    ),
    "dora-forward": (
        Launch("norm", ("‖wₙ + s · bₙ A‖², in parts over K",),
               ("W [N, K]", "A [r, K]", "B [N, r]"), ("parts fp32",)),
        Launch("root", ("norms = √ of the parts' sum", "gain = m / norms (torch)"),
               ("parts fp32",), ("norms [N]",)),
        Launch("shrink", ("S = s · X Aᵀ",), ("X [M, K]", "A [r, K]"), ("S [M, r]",)),
        Launch("gemm", ("V = X Wᵀ + S Bᵀ + bias", "Y = gain ∘ (V - bias) + bias"),
               ("X [M, K]", "W [N, K]", "S [M, r]", "B [N, r]", "gain [N]"),
               ("Y [M, N]", "V [M, N], if m trains")),
    ),
    "dora-backward": (
        Launch("scale_grad", ("dZ = gain ∘ dY", "Σ dY ∘ (V - bias), in parts over M"),
               ("dY [M, N]", "V [M, N]", "gain [N]"), ("dZ [M, N]", "parts fp32")),
        Launch("sum", ("dm = sums / norms (torch)",), ("parts fp32",), ("sums [N]",)),
    ),
    "mlp-forward": (
        Launch("mlp", ("H = act(G) ∘ U, rounded", "s · (mask ∘ H) A₃ᵀ, in parts over K"),
               ("G, U [M, K]", "mask [M, K/32]", "A₃ [r, K]"), ("H [M, K]", "parts fp32")),
        Launch("sum", ("S₃ = the parts, added",), ("parts fp32",), ("S₃ [M, r]",)),
    ),
    "mlp-backward": (
        Launch("mlp_grad", ("dG = dH ∘ U ∘ act'(G)", "dU = dH ∘ act(G), H made again",
                            "s · dG B₁,  s · dU B₂, in parts over K",
                            "dGᵀ S₁,  dUᵀ S₂,  dS₃ᵀ (mask ∘ H)"),
               ("dH, G, U [M, K]", "mask [M, K/32]", "S₁, S₂, dS₃ [M, r]", "B₁, B₂ [K, r]"),
               ("dG, dU [M, K]", "parts fp32")),
        Launch("sum", ("the parts, added", "in a fixed order"),
               ("parts fp32",), ("dS₁, dS₂ [M, r]", "dB₁, dB₂ [K, r]", "dA₃ [r, K]")),
    ),
    "prefix-forward": (
        Launch("attend", ("O = softmax(s · Q [Kₚ; K]ᵀ) [Vₚ; V]", "one online softmax, two sources"),
               ("Q [B, H, T, D]", "Kₚ, Vₚ [Hₖᵥ, P, D]", "K, V [B, Hₖᵥ, S, D]"),
               ("O [B, H, T, D]", "LSE [B, H, T]")),
    ),
    "prefix-backward": (
        Launch("grad_rows", ("delta = Σ dO ∘ O", "dS = P ∘ (dO Vᵀ - delta)", "dQ = s · dS K"),
               ("Q, O, dO [B, H, T, D]", "LSE [B, H, T]", "Kₚ, Vₚ [Hₖᵥ, P, D]",
                "K, V [B, Hₖᵥ, S, D]"),
               ("dQ [B, H, T, D]", "delta [B, H, T]")),
        Launch("grad_keys", ("dK = s · dSᵀ Q,  dV = Pᵀ dO", "of own keys and of the prefix,",
                             "whose sums are over the batch too"),
               ("Q, dO [B, H, T, D] twice", "LSE, delta [B, H, T] twice", "Kₚ, Vₚ [Hₖᵥ, P, D]",
                "K, V [B, Hₖᵥ, S, D]"),
               ("dK, dV [B, Hₖᵥ, S, D]", "parts fp32")),
        Launch("sum", ("dKₚ, dVₚ = the parts, added",), ("parts fp32",), ("dKₚ, dVₚ [Hₖᵥ, P, D]",)),
    ),
    "prefix-decode": (
        Launch("prefix_decode", ("softmax over one stretch of keys", "of one source a program",
                                 "the next is started meanwhile"),
               ("Q [B, H, T, D], T small", "Kₚ, Vₚ [Hₖᵥ, P, D]", "K, V [B, Hₖᵥ, S, D]"),
               ("O parts fp32", "LSE parts fp32")),
        Launch("merge", ("wait for the parts", "O = Σ exp(LSEᵢ - LSE) Oᵢ", "in a fixed order"),
               ("O parts fp32", "LSE parts fp32"), ("O [B, H, T, D]", "LSE [B, H, T]")),
    ),
}  # fmt: skip

LEFT, BOX, RIGHT, END = 16, 262, 562, 788  # x of the reads, the kernel, the writes, the edge
CHIP, WIDE, STEP, PAD = 22, 186, 27, 12
LARGE, SMALL, OURS, THEIRS, MADE = "#c5cae9", "#eef0fa", "#3f51b5", "#607d8b", "#e65100"


def _is_large(tensor: str) -> bool:
    """A matrix of activations or the weight, and what has a row of D for each token."""
    four = tensor.partition("[")[2].count(",") == 3
    return four or tensor.startswith((*"XWYVGUH", "dX", "dY", "dZ", "dG", "dU", "dH"))


def _text(x: float, y: float, text: str, extra: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{extra}>{escape(text)}</text>'


def _chip(x: int, y: float, tensor: str, made: bool) -> str:
    fill = LARGE if _is_large(tensor) else SMALL
    line = f' stroke="{MADE}" stroke-dasharray="4 2"' if made else ' stroke="#9fa8da"'
    box = f'<rect x="{x}" y="{y:g}" width="{WIDE}" height="{CHIP}" rx="3" fill="{fill}"{line}/>'
    return box + _text(x + 8, y + 15, tensor)


def _arrow(x0: int, x1: int, y: float) -> str:
    line = f'<line x1="{x0}" y1="{y:g}" x2="{x1 - 6}" y2="{y:g}" stroke="#757575"/>'
    return (
        line
        + f'<path d="M{x1 - 7} {y - 3.5:g} L{x1} {y:g} L{x1 - 7} {y + 3.5:g} z" fill="#757575"/>'
    )


def _launch(y: int, number: int, launch: Launch, made: set[str]) -> tuple[list[str], int]:
    """(shapes of one launch, its height)."""
    rows = max(len(launch.reads), len(launch.writes), len(launch.formula) + 1)
    height = rows * STEP + PAD
    color = THEIRS if launch.kernel == VENDOR else OURS
    out = []
    for tensors, x in ((launch.reads, LEFT), (launch.writes, RIGHT + 24)):
        top = y + (height - len(tensors) * STEP) / 2 + (STEP - CHIP) / 2
        for i, tensor in enumerate(tensors):
            middle = top + i * STEP + CHIP / 2
            made_here = tensor in made or x != LEFT
            out.append(_chip(x, top + i * STEP, tensor, made_here))
            out.append(_arrow(LEFT + WIDE, BOX, middle) if x == LEFT else _arrow(RIGHT, x, middle))
    out.append(
        f'<rect x="{BOX}" y="{y}" width="{RIGHT - BOX}" height="{height}" rx="8" fill="#ffffff"'
        f' stroke="{color}" stroke-width="1.5"/>'
    )
    top = y + (height - (len(launch.formula) + 1) * 19) / 2 + 14
    bold = f' font-weight="bold" fill="{color}"'
    out.append(_text(BOX + 14, top, f"{number}  {launch.kernel}", bold))
    out += [_text(BOX + 14, top + 19 * (i + 1), line) for i, line in enumerate(launch.formula)]
    return out, height


def picture(name: str) -> str:
    """The SVG of one of :data:`PASSES`."""
    shapes = [_text(LEFT, 20, "read", ' fill="#616161"'),
              _text(BOX, 20, "launches, in their order", ' fill="#616161"'),
              _text(RIGHT + 24, 20, "written", ' fill="#616161"')]  # fmt: skip
    y, made = 30, set[str]()
    for number, launch in enumerate(PASSES[name], 1):
        found, height = _launch(y, number, launch, made)
        shapes += found
        made |= set(launch.writes)
        y += height + 14
    legend = "dashed: made in this pass; darker: large; blue: a kernel of ours; grey: the vendor's"
    shapes.append(_text(LEFT, y + 6, legend, ' fill="#616161" font-size="11"'))
    size = f'width="{END}" height="{y + 16}" viewBox="0 0 {END} {y + 16}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif"'
    background = f'<rect width="{END}" height="{y + 16}" fill="#ffffff"/>'
    lines = [f'{head} font-size="13">', f"<title>{escape(name)}</title>", background, *shapes]
    return "\n".join([*lines, "</svg>", ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where stale")
    options = parser.parse_args(argv)
    wanted = {IMAGES / f"pass-{name}.svg": picture(name) for name in PASSES}
    old = [p for p, text in wanted.items() if not p.is_file() or p.read_text("utf-8") != text]
    extra = sorted(set(IMAGES.glob("pass-*.svg")) - set(wanted))
    if options.check:
        for path in [*old, *extra]:
            print(f"{path.name} is not what {Path(__file__).name} draws", file=sys.stderr)
        return bool(old or extra)
    IMAGES.mkdir(exist_ok=True)
    for path in old:
        scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        scratch.write_text(wanted[path], encoding="utf-8")
        scratch.replace(path)
    for path in extra:
        path.unlink()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
