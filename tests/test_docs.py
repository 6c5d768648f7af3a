"""The pages: links and anchors resolve, and no paper that is not in the repository is cited.

The figures in docs/goals.md are those of the results and of the code that judges them.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.gpu import report as gpu_report
from benchmarks.plots import newest

from .pages import ROOT, anchors, links, prose, read, slug, tables, tracked

PAGES = [name for name in tracked() if name.endswith(".md")]
TEXTS = [n for n in tracked() if not n.startswith("benchmarks/results/")]
# What only its authors could look up: a paper of theirs, a part of one, a number in some tracker.
# (HF PEFT's and others' are cited by address.) Spelt so that this file is not found by itself.
ELSEWHERE = re.compile(
    r"\bDESIG[N]\b|\b[Tt]he desig[n]\b|\bHOUS[E]\b|\b(?:GPU|PREFIX|STYLE|ECOSYSTEM)[.]md\b"
    r"|\b[Ii]ssue #?\d|\N{SECTION SIGN}"
)


@pytest.mark.parametrize(
    "text, found",
    [
        ("see DESIG_N 6", True),
        ("DESIG_N.md", True),
        ("at the desig_n's shape", True),
        ("the targets are issu_e 5's", True),
        ("HOUS_E.md", True),
        ("PREFI_X.md", True),
        ("part \N{SECTION SIGN}6 of it", True),
        ("designed to be", False),
        ("https://github.com/huggingface/peft/issues/2777", False),
        ("docs/gpu.md", False),
    ],
)
def test_a_reference_to_a_paper_elsewhere_is_seen(text: str, found: bool) -> None:
    assert bool(ELSEWHERE.search(text.replace("_", ""))) == found


def test_no_paper_is_cited_that_is_not_in_the_repository() -> None:
    found = []
    for name in TEXTS:
        try:
            text = read(name)
        except UnicodeDecodeError:
            continue  # no text
        for number, line in enumerate(text.splitlines(), 1):
            if ELSEWHERE.search(line):
                found.append(f"{name}:{number}: {line.strip()}")
    assert not found, "\n".join(found)
    assert len(TEXTS) > 300


def broken_links(name: str) -> list[str]:
    found = []
    for target in links(name):
        path, _, anchor = target.partition("#")
        where = (ROOT / name).parent / path if path else ROOT / name
        if not where.exists():
            found.append(f"{name}: {target}: no such file")
        elif anchor and anchor not in anchors(str(where.resolve().relative_to(ROOT))):
            found.append(f"{name}: {target}: no such heading")
    return found


@pytest.mark.parametrize("name", PAGES)
def test_every_link_and_anchor_resolves(name: str) -> None:
    assert not broken_links(name)


def test_links_are_found_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.pages.ROOT", tmp_path)
    monkeypatch.setattr("tests.test_docs.ROOT", tmp_path)
    (tmp_path / "b.md").write_text("# A `b` of c's\n\n## Twice\n\n## Twice\n")
    (tmp_path / "a.md").write_text(
        "[one](b.md#a-b-of-cs), [two](b.md#twice-1) ![three](b.md) [far](https://example.org/x#y)\n"
        "[gone](c.md), [no heading](b.md#twice-2), [own](#nothing) `[code](d.md)`\n"
        "```\n[code](e.md)\n```\n[ref]: f.md\n"
    )
    assert [line.split(": ")[1] for line in broken_links("a.md")] == [
        "c.md", "b.md#twice-2", "#nothing", "f.md"
    ]  # fmt: skip


def test_slugs_are_githubs() -> None:
    assert (
        slug("3. The hybrid order: write S\u00b7B\u1d40 first")
        == "3-the-hybrid-order-write-sb\u1d40-first"
    )
    assert slug("[Unreleased]") == "unreleased"


def test_the_goals_page_has_the_limits_that_make_gpu_judges_by() -> None:
    rows = {row[0]: row[1] for row in tables("docs/goals.md")["On a GPU"]}
    assert set(rows) == {goal.text for goal in gpu_report.GOALS}
    for goal in gpu_report.GOALS:
        sign = ">=" if goal.least else "<="
        want = f"{sign} {goal.limit:g} {goal.unit}"
        if goal.h200 is not None:
            want = f"{want} (H100), {sign} {goal.h200:g} {goal.unit} (H200)"
        assert rows[goal.text] == want


PREFIX = "medium 512x8 16x256, P=64, {} kv heads"
QUANTISED = {
    "NF4": "NF4 (bitsandbytes)",
    "torchao's int8": "int8 (torchao)",
    "torchao's fp8": "fp8 (torchao)",
}
# the rows of results that each line of the table quotes, in its order
QUOTED = {
    "training step, 256 x 4": ["training step small 256x4, dropout 0.0",
                               "training step small 256x4, dropout 0.1"],
    "training step, 512 x 8": ["training step medium 512x8, dropout 0.0",
                               "training step medium 512x8, dropout 0.1"],
    "decoding, all linears": ["decode 24 tokens small 256x4, all-linear",
                              "decode 24 tokens medium 512x8, all-linear"],
    "decoding, q and v alone": ["decode 24 tokens small 256x4, q,v (default)",
                                "decode 24 tokens medium 512x8, q,v (default)"],
    "host time": ["linear 64x64 [1, 64], no grad: added",
                  "linear 64x64 [1, 64] bias, no grad: added"],
    "adding / switching": ["add_adapter, 224 adapters", "set_adapter twice, 224 adapters",
                           "disable_adapter, 224 adapters"],
    "putting 224 adapters": ["inject 224 adapters, 7 names", "inject 224 adapters, all-linear"],
    "HF PEFT's model after": ["training step fused HF PEFT small 256x4, dropout 0.1",
                              "decode 24 tokens fused HF PEFT small 256x4, all-linear"],
    "a prefix, 512 x 8: bytes": [f"bytes held after forward, {PREFIX}".format(n) for n in (8, 2)],
    "the same: peak": [f"peak with gradient checkpointing, {PREFIX}".format(n) for n in (8, 2)],
    "the same: training": [f"training step with a prefix, {PREFIX}".format(n) for n in (8, 2)],
    "the same: decoding": [
        f"decode 64 tokens with a prefix, medium 512x8 batch 8, P=64, {n} kv heads" for n in (8, 2)
    ],
    "a mixture, 64 experts": ["training step, mixture of 64 experts, 512 tokens"],
    "the same, 32 experts": ["training step, mixture of 32 experts, 256 tokens"],
    "the same, 4 experts": ["training step, mixture of 4 experts, 256 tokens"],
    "one token of a mixture of 64": ["one token, no grad, mixture of 64 experts"],
    "one token of a mixture of 32": ["one token, no grad, mixture of 32 experts"],
    "kept of a mixture of 64": ["bytes kept, mixture of 64 experts, 512 tokens"],
    "kept of a mixture of 32": ["bytes kept, mixture of 32 experts, 256 tokens"],
    "peak of a step of a mixture": ["peak of a step, mixture of 64 experts, 512 tokens",
                                    "peak of a step, mixture of 32 experts, 256 tokens"],
    **{
        f"on {kind}: training": [f"training step {name}, medium 512x8, dropout {p}"
                                 for p in (0.0, 0.1)]
        for kind, name in QUANTISED.items()
    },
    **{
        f"on {kind}: kept": [f"bytes kept, {name}, medium 512x8, dropout {p}" for p in (0.0, 0.1)]
        for kind, name in QUANTISED.items()
    },
    **{
        f"on {kind}: decoding": [f"decode 12 tokens {name}, medium 512x8"]
        for kind, name in QUANTISED.items()
    },
}  # fmt: skip


def test_the_goals_page_quotes_the_results() -> None:
    held = {row["row"]: row for row in newest(ROOT / "benchmarks/results/cpu")}
    lines = tables("docs/goals.md")["On a CPU"]
    assert len(lines) == len(QUOTED)
    for (aim, limit, measured, floor), (start, names) in zip(lines, QUOTED.items(), strict=True):
        assert aim.startswith(start)
        rows, (values, verdict) = [held[n] for n in names], measured.split(": ")
        places = 0 if limit == "2 MB" else 2
        assert values == " / ".join(f"{abs(r['ratio']):.{places}f}" for r in rows)
        assert floor == (" / ".join(f"{r['floor']:.2f}" for r in rows) if floor else "")
        # the target of a row of bytes is what 2 MB are of HF PEFT's
        sought = 1 / 3 if limit == "1/3" else 0.0 if limit == "2 MB" else float(limit)
        met = [r["ratio"] <= (sought or r["target"]) for r in rows]
        if verdict == "met":
            assert all(met)
        elif verdict.startswith("the floor is above"):
            assert not any(met) and min(r["floor"] for r in rows) > sought
        elif verdict.startswith("unclear"):
            assert "unclear" in {r["verdict"] for r in rows}
            cpu = " / ".join(f"{r['cpu_ratio']:.2f}" for r in rows)
            assert verdict == f"unclear (CPU time {cpu})"
        else:
            missed = {
                (False,): "missed",
                (False, True): "the first is missed",
                (True, False): "the second is missed",
                (False, False): "both are missed",
            }
            assert verdict == missed[tuple(met)]


def test_the_goals_page_says_whether_a_gpu_was_measured() -> None:
    folders = {p.name for p in (ROOT / "benchmarks/results").iterdir() if p.is_dir()}
    measured = bool(folders - {"cpu", "static"})
    assert ("**Not measured yet, any of it**" in prose("docs/goals.md")) != measured
