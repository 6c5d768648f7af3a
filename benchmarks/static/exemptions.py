"""The launches that break a rule of :mod:`.judging` and may, each with its reason.

An exemption that no launch needs any more fails a test (``tests/kernels/test_static_results.py``):
take it out, so that the rule holds again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple


class Exemption(NamedTuple):
    """Launches of ``kernel`` whose "ARCH CASE" has ``cases`` (a regular expression) in it."""

    name: str
    rule: str  # pipeline, products, width or waves
    kernel: str
    cases: str
    why: str


_ONE_PLACE = (
    "with two stages cp.async has one place for a tile, and the next copy waits for the products; "
)

_TWO_LAYOUTS = "two products read a masked tile in two layouts, and Triton has no buffer for it; "
_ONE_BY_ONE = (
    "ptxas of Triton 3.6 (C7515) finds an accumulator that starts anew between products in flight; "
)
_MIXED = ("mixed._parts_kernel", "mixed._product_kernel", "mixed_segments._segment_kernel")

EXEMPTIONS: tuple[Exemption, ...] = (
    Exemption(
        "decode reads S as its product does", "width", "decode_tile._rows_kernel", "",
        "S of 16 rows is a few KB that are read once, in the layout of the product's operand",
    ),
    Exemption(
        "S of few rows is small", "width", "decode_shrink._decode_shrink_kernel", "M16|M64",
        "a program stores one tile of 16 ranks, in the layout of the product that made it",
    ),
    Exemption(
        "tables and scales of a quantised weight", "width", "dequantise._dequantise_kernel",
        r"nested|nvfp4|act-order",
        "a table of 256 numbers and the scales of a tile are a KB or less, from L2 for all but the "
        "first programs; in act-order each column has zeros of its own, which is a gather",
    ),
    Exemption(
        "tables and S beside a quantised W", "width",
        "decode_quantised._decode_quantised_kernel", r"nested|act-order|M16|M64",
        "a table of 256 numbers is a KB; S of few rows is a few KB that are read once, in the "
        "layout of the product's operand; in act-order each column has zeros of its own",
    ),
    Exemption(
        "act-order is a gather", "pipeline", "decode_quantised._decode_quantised_kernel",
        "act-order",
        "the scale and the zero of a column lie where its group says, which is loaded first; tiles "
        "are small, and many programs on a multiprocessor wait in turn",
    ),
    Exemption(
        "a quantised W from registers", "products", "decode_quantised._decode_quantised_kernel",
        r"sm_90 decode_quantised M16 .*gate,up",
        "the numbers of a tile are made in registers, of which an asynchronous product would keep "
        "those of the step before; bound by memory, its products are thin",
    ),
    Exemption(
        "waves of a quantised W", "waves", "decode_quantised._decode_quantised_kernel",
        r"sm_100 decode_quantised M1 .*(gate,up|nested)|sm_90 decode_quantised M(1|16) .*gate,up",
        "registers hold two or three programs at a time; a tile of another height would read X "
        "more often, or fill fewer multiprocessors",
    ),
    Exemption(
        "short programs that dequantise", "waves", "dequantise._dequantise_kernel", "",
        "a program writes 8 KB and ends, so that others take its place one by one; wider layers "
        "have more waves",
    ),
    Exemption(
        "expand has no loop", "pipeline", "expand._expand_kernel", "",
        "a program makes one tile from one chunk of ranks; the loop over chunks says num_stages=1, "
        "as unrolled products would take tensor memory each",
    ),
    Exemption(
        "grad_a of wide ranks", "pipeline", "grad_a._grad_a_kernel",
        r"r128|r64",
        _ONE_PLACE + "its config keeps to two where accumulators are wide (spills on sm_90)",
    ),
    Exemption(
        "grad_sb reads dY in two layouts", "pipeline", "grad_sb._grad_sb_kernel",
        r"sm_(80|86|89|120)",
        _TWO_LAYOUTS + "dY goes through registers",
    ),
    Exemption(
        "grad_xa of wide ranks", "pipeline", "grad_xa._grad_xa_kernel", r"r128|r64",
        _ONE_PLACE + "its config keeps to two where accumulators are wide",
    ),
    Exemption(
        "grad_xa adds to a product", "pipeline", "grad_xa._grad_xa_kernel", "added",
        "what D is added to goes to registers, asked for before the step's products, which copies "
        "of X and dS are ahead of; Triton copies ahead what products read alone",
    ),
    Exemption(
        "grad_xa in 100 KB", "pipeline", "grad_xa._grad_xa_kernel", r"sm_(86|89|120)",
        _ONE_PLACE + "its config keeps to two with 100 KB of shared memory",
    ),
    Exemption(
        "shrink of wide ranks in 100 KB", "pipeline", "shrink._shrink_kernel",
        r"sm_(86|89|120) (shrink|grad_sb|mlp_grad) M8192 .*r(128|64)",
        _ONE_PLACE + "a third stage of A takes the shared memory of another program",
    ),
    Exemption(
        "shrink_expand of wide ranks in 100 KB", "pipeline", "shrink_expand._shrink_expand_kernel",
        r"sm_(86|89|120) .* r(128|64)",
        _ONE_PLACE + "a third stage of A takes the shared memory of another program",
    ),
    *(
        Exemption(
            f"{kernel} in exact fp32", "pipeline", kernel, "fp32/fp32",
            _ONE_PLACE + "its config keeps to two for exact products, which hold operands in "
            "registers",
        )
        for kernel in _MIXED
    ),
    *(
        Exemption(
            f"{kernel} on slices, {rule}", rule, kernel, "mixed .* slices",
            "rows of X and W that start anywhere allow the 2 bytes of one element, fewer than "
            "cp.async takes",
        )
        for kernel in _MIXED
        for rule in ("pipeline", "width")
    ),
    *(
        Exemption(
            f"{kernel} gathers lanes", "width", kernel, "mixed .* r(5|5x12|3x5x20x33) ",
            "rows of B that are no multiple of 16 bytes are read one element at a time, each lane "
            "from an address of its own",
        )
        for kernel in ("mixed._finish_kernel", "mixed._product_kernel")
    ),
    Exemption(
        "mixed, X in 8 bytes", "width", "mixed._parts_kernel", r"mixed M(1|16) ",
        "a step has 32 or 64 columns of 16 rows of X, fewer than 16 bytes for a thread, beside "
        "32 times as much of W; a program for S has wider ones",
    ),
    Exemption(
        "segments in the worst case", "waves", "mixed_segments._segment_kernel", "L8 r128",
        "the grid has a tile more for each adapter than full tiles need; those without rows leave "
        "at once",
    ),
    Exemption(
        "shrink_expand, products one by one", "products", "shrink_expand._shrink_expand_kernel",
        "sm_90 .* r64x2",
        _ONE_BY_ONE + "bound by memory, its products are thin",
    ),
    Exemption(
        "shrink, products one by one", "products", "shrink._shrink_kernel",
        "sm_90 shrink M8192 r64x2 .* drawn",
        _ONE_BY_ONE + "bound by memory, its products are thin",
    ),
    Exemption(
        "grad_a, products one by one", "products", "grad_a._grad_a_kernel",
        r"sm_90 grad_a K\d+ r(64|128)",
        _ONE_BY_ONE + "bound by memory, its products are thin",
    ),
    Exemption(
        "grad_xa, products one by one", "products", "grad_xa._grad_xa_kernel",
        "sm_90 grad_xa K14336",
        _ONE_BY_ONE + "bound by memory, its products are thin",
    ),
    Exemption(
        "prefix backward, rows, products one by one", "products", "prefix_grad._grad_rows_kernel",
        "sm_90 prefix bwd rows .* causal",
        _ONE_BY_ONE + "scores of a block start at zero, and two loops share the sum",
    ),
    Exemption(
        "experts, B as PEFT keeps it", "width", "experts_gemm._experts_gemm_kernel", "PEFT's B",
        "columns of lora_B [N, r E] are E apart for one expert, so each lane reads one element; "
        "who has many tokens makes a copy [E, N, r] first",
    ),
    Exemption(
        "experts product in the worst case", "waves", "experts_gemm._experts_gemm_kernel",
        "sm_100 .* M16 ",
        "the grid has a tile more for each expert than full tiles need; those without rows leave "
        "at once",
    ),
    Exemption(
        "experts_gate_grad reads PEFT's B", "width",
        "experts_gate_grad_tile._experts_gate_grad_kernel",
        "experts_gate_grad .* r(16|32|64|256) ",
        "of PEFT's lora_B an expert's numbers are E columns apart; a program reads its own once",
    ),
    Exemption(
        "experts_gate_grad's dS of PEFT's B", "width", "experts_shrink._experts_shrink_kernel",
        "experts_gate_grad .* r(64|256) ",
        "of PEFT's lora_B an expert's numbers are E columns apart",
    ),
    Exemption(
        "experts_gate_grad's dS in 100 KB", "pipeline", "experts_shrink._experts_shrink_kernel",
        "sm_(86|89|120) experts_gate_grad .* r256 ",
        _ONE_PLACE + "its config keeps to two where 128 ranks are held in 100 KB",
    ),
    Exemption(
        "dw goes to its pair", "width", "experts_gate_grad_tile._experts_gate_sum_kernel", "",
        "rows of dw are written where their pairs are, one number each",
    ),
    Exemption(
        "experts_gate in the worst case", "waves", "experts_gate._experts_gate_kernel", "sm_90",
        "the grid has the tiles of the worst routing; those past the last leave at once",
    ),
    Exemption(
        "sums of dw and dS", "waves", "experts_gate_grad_tile._experts_gate_sum_kernel", "sm_100",
        "a program adds the parts of 1024 numbers and ends",
    ),
    *(
        Exemption(
            f"{kernel} reads PEFT's B", "width", f"experts_decode_tile.{kernel}", "",
            "of PEFT's lora_B an expert's numbers are E columns apart",
        )
        for kernel in ("_experts_few_up_kernel", "_experts_few_down_kernel")
    ),
    Exemption(
        "H of few pairs", "waves", "experts_decode_tile._experts_few_up_kernel",
        "sm_100 .* alone T1 ",
        "696 programs for 592 places; with blocks of another size there are fewer than places",
    ),
    Exemption(
        "S of few pairs", "waves", "experts_decode_tile._experts_few_shrink_kernel", "T16",
        "its programs are short, and from sm_90 on those of the next launch run beside the last",
    ),
    Exemption(
        "gemm on unaligned rows", "pipeline", "gemm._gemm_kernel", "gemm Y pointers",
        "rows of X that start anywhere are copied in 2 bytes, fewer than cp.async takes",
    ),
    Exemption(
        "gemm on unaligned rows is narrow", "width", "gemm._gemm_kernel", "gemm Y pointers",
        "rows of X that start anywhere allow the 2 bytes of one element",
    ),
    Exemption(
        "prefix backward, keys of D=256", "pipeline", "prefix_grad._grad_keys_kernel", "keys D256",
        _ONE_PLACE + "a third of Q and dO spills registers on sm_90",
    ),
    Exemption(
        "prefix backward, masked rows of Q", "pipeline", "prefix_grad._grad_keys_kernel",
        r"sm_(80|86|89|120) prefix bwd keys D(96|128) .*(padded|all)",
        _TWO_LAYOUTS + "Q and dO go through registers, unless no row is masked",
    ),
    Exemption(
        "prefix backward, masked keys", "pipeline", "prefix_grad._grad_rows_kernel",
        r"sm_(80|86|89|120) prefix bwd rows D(96|128) .*(padded|all)",
        _TWO_LAYOUTS + "K goes through registers, unless no key is masked",
    ),
    Exemption(
        "prefix backward, rows of D=64", "pipeline", "prefix_grad._grad_rows_kernel",
        r"sm_(80|86|89|120) prefix bwd rows D64",
        _ONE_PLACE + "a third of K and V spills registers on sm_120",
    ),
    Exemption(
        "sums of parts", "waves", "reduce._sum_kernel", "mlp_grad",
        "a program adds the parts of 1024 numbers and ends; the launch that leaves them sets how "
        "many there are",
    ),
    Exemption(
        "offsets of experts", "width", "experts_route._route_place_kernel", r"qwen3 L4|512",
        "a number for each expert and one more, stored once",
    ),
    *(
        Exemption(
            f"{kernel} of PEFT's B", "width", kernel, cases,
            "in lora_B the experts are the innermost dimension, so what is next to a number in "
            "memory is of another expert, and another program's",
        )
        for kernel, cases in (
            ("experts_shrink._experts_shrink_kernel", "of B|grad_sb"),
            ("experts_grad._experts_grad_sb_kernel", ""),
            ("experts_grad._experts_grad_a_kernel", "grad_sb"),
        )
    ),
    Exemption(
        "experts_grad_sb reads dY in two layouts", "pipeline",
        "experts_grad._experts_grad_sb_kernel", r"sm_(80|86|89|120)",
        _TWO_LAYOUTS + "dY goes through registers, and three programs and more on a "
        "multiprocessor have as many tiles on the way",
    ),
    Exemption(
        "experts_grad_a, products one by one", "products", "experts_grad._experts_grad_a_kernel",
        "sm_90 experts_grad_a .* r16",
        _ONE_BY_ONE + "bound by memory, its products are thin",
    ),
    Exemption(
        "experts_shrink of wide ranks in 100 KB", "pipeline",
        "experts_shrink._experts_shrink_kernel", r"sm_(86|89|120) .* r128",
        _ONE_PLACE + "a third stage of A takes the shared memory of another program",
    ),
    Exemption(
        "experts in the worst case", "waves", "experts_shrink._experts_shrink_kernel", "",
        "the grid has a tile more for each expert than full tiles need; those without rows leave "
        "at once",
    ),
    Exemption(
        "grad_xa of many columns on sm_100", "waves", "grad_xa._grad_xa_kernel",
        r"sm_100 grad_xa K14336 r64x2",
        "448 programs for 148 places: the registers of two ranks of 64 allow one program at a time",
    ),
)  # fmt: skip


def find(rule: str, row: dict[str, Any]) -> Exemption | None:
    """The exemption from ``rule`` of a row, if it has one."""
    where = f"{row['arch']} {row['case']}"
    for each in EXEMPTIONS:
        if (each.rule, each.kernel) == (rule, row["kernel"]) and re.search(each.cases, where):
            return each
    return None


def unused(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Names of the exemptions that none of the rows needed."""
    needed = {name for row in rows for name in row.get("exempt", ())}
    return [each.name for each in EXEMPTIONS if each.name not in needed]
