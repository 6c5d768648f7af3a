"""README.md: its example runs, and its figures come from the newest results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import peftkern

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
MILLI, MEBI = 1e3, 1 / 2**20

# the start of a row of "Measured" -> the rows of results that it quotes, in its order
TRAIN = "training step {}, dropout {}"
LINEAR = "{} forward+backward, dropout {}"
DECODE = "decode 24 tokens {}"
PREFIX = "medium 512x8 16x256, P=64, {} kv heads"
QUOTED = {
    "training step, 256 x 4": [TRAIN.format("small 256x4", p) for p in (0.0, 0.1)],
    "training step, 512 x 8": [TRAIN.format("medium 512x8", p) for p in (0.0, 0.1)],
    "one linear,": [LINEAR.format("linear 1024x576x576", p) for p in (0.0, 0.1)],
    "greedy decoding": [DECODE.format("small 256x4, all-linear")],
    "the same, 512 x 8": [DECODE.format("medium 512x8, all-linear")],
    "the same, only q and v": [DECODE.format(f"{m}, q,v (default)")
                               for m in ("small 256x4", "medium 512x8")],
    "putting 224": ["inject 224 adapters, 7 names", "inject 224 adapters, all-linear"],
    "`add_adapter`": ["add_adapter, 224 adapters", "set_adapter twice, 224 adapters",
                      "disable_adapter, 224 adapters"],
    "loading an adapter": ["from_pretrained, 224 adapters",
                           "load_adapter beside another, 224 adapters"],
    "one DoRA linear": [LINEAR.format("DoRA linear 512x1024x1024", p) for p in (0.0, 0.1)],
    "an HF PEFT model before": ["training step fused HF PEFT small 256x4, dropout 0.1",
                                "decode 24 tokens fused HF PEFT small 256x4, all-linear"],
    "a mixture of 64": ["training step, mixture of 64 experts, 512 tokens"],
    "the same: kept for backward / peak": ["bytes kept, mixture of 64 experts, 512 tokens",
                                           "peak of a step, mixture of 64 experts, 512 tokens"],
    "the same: one token": ["one token, no grad, mixture of 64 experts"],
    "prefix, 512 x 8": [f"training step with a prefix, {PREFIX}".format(n) for n in (8, 2)],
    "the same: peak": [f"peak with gradient checkpointing, {PREFIX}".format(8)],
    "prefix: decoding": [f"decode 64 tokens with a prefix, medium 512x8 batch 8, P=64, {n} kv heads"
                         for n in (8, 2)],
}  # fmt: skip
# ... and what each is of two or more rows together
OTHERS = ["kept for backward", "host time", "the same: held"]


def results() -> dict[str, Any]:
    """The newest measurement of each row."""
    files = sorted((ROOT / "benchmarks" / "results" / "cpu").glob("*.json"))
    return {row["row"]: row for file in files for row in json.loads(file.read_text())["rows"]}


def table(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    text = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def row(start: str) -> list[str]:
    (found,) = (cells for cells in table("Measured") if cells[0].startswith(start))
    return found


def assert_quotes(cell: str, values: list[float], scale: float = 1.0) -> None:
    """The cell's numbers are these, rounded to as many places as it has."""
    numbers = re.findall(r"\d+(?:\.(\d+))?", cell)
    written = [f"{value * scale:.{len(places)}f}" for value, places in
               zip(values, numbers, strict=True)]  # fmt: skip
    assert written == [m[0] for m in re.finditer(r"\d+(?:\.\d+)?", cell)], cell


def test_every_row_is_checked() -> None:
    starts = [*QUOTED, *OTHERS]
    assert len(table("Measured")) == len(starts)
    assert all(row(start) for start in starts)


@pytest.mark.parametrize("start", QUOTED)
def test_rows_are_the_results(start: str) -> None:
    held = results()
    found = [held[name] for name in QUOTED[start]]
    _, theirs, ours, ratio, floor = row(start)
    scale = 1.0 if " s" in theirs else MILLI if " ms" in theirs else MEBI
    if theirs:
        assert_quotes(theirs, [r["values"]["PEFT"] for r in found], scale)
        assert_quotes(ours, [r["values"]["peftkern"] for r in found], scale)
    kind = "cpu_ratio" if "CPU time" in row(start)[0] else "ratio"
    assert_quotes(ratio, [r[kind] for r in found])
    if floor:
        assert_quotes(floor, [r["floor"] for r in found])


def test_rows_that_are_made_of_several() -> None:
    held = results()
    kept = held["bytes kept, linear M=8192 K=N=4096 dropout 0.1 *"]["values"]
    _, theirs, ours, ratio, _ = row("kept for backward")
    beyond = {name: value - 4 * 8192 * 4096 for name, value in kept.items()}
    assert_quotes(theirs, [beyond["PEFT"]], MEBI)
    assert_quotes(ours, [beyond["peftkern"]], MEBI)
    assert_quotes(ratio, [beyond["peftkern"] / beyond["PEFT"]])

    added = [r for name, r in held.items() if name.startswith("linear 64x64")]
    assert len(added) == 4
    _, theirs, ours, ratio, _ = row("host time")
    for cell, name in ((theirs, "PEFT"), (ours, "peftkern")):
        times = [r["values"][name] - r["values"]["bare"] for r in added]
        assert_quotes(cell, [min(times), max(times)], 1e6)
    assert_quotes(ratio, [min(r["ratio"] for r in added), max(r["ratio"] for r in added)])

    found = [held[f"bytes held after forward, {PREFIX}".format(n)]["values"] for n in (8, 2)]
    _, theirs, ours, _, _ = row("the same: held")
    assert_quotes(theirs, [v["PEFT"] - v["bare"] for v in found], MEBI)
    assert_quotes(ours, [max(v["peftkern"] - v["bare"], 0.0) for v in found], MEBI)


def test_the_short_table_is_the_long_ones() -> None:
    long = {start: row(start)[3:] for start in [*QUOTED, *OTHERS]}
    both = [" / ".join(cells) for cells in
            zip(long["greedy decoding"], long["the same, 512 x 8"], strict=True)]  # fmt: skip
    assert [cells[1:] for cells in table("What is faster, and by how much")] == [
        long["training step, 256 x 4"],
        long["training step, 512 x 8"],
        both,
        [long["`add_adapter`"][0].replace(" /", ","), ""],
        long["kept for backward"],
        long["the same: peak"],
        [long["a mixture of 64"][i] + " / " + long["the same: one token"][i] for i in (0, 1)],
    ]


def test_what_merging_takes_is_the_results() -> None:
    (said,) = re.findall(r"^Merging gives back.*?\(\[", README, re.MULTILINE | re.DOTALL)
    names = [f"{what}, 2048x2048, {dtype}" for what in ("merge", "merge and unmerge")
             for dtype in ("bfloat16", "float32")]  # fmt: skip
    numbers = re.sub(r"\b(bf16|float32|2048 x 2048)\b", "", said)
    assert_quotes(numbers, [results()[name]["ratio"] for name in names])


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 10
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=257, intermediate_size=48, **sizes)
    monkeypatch.chdir(tmp_path)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("path/to/model")
    bytes_only = transformers.GPT2Tokenizer().train_new_from_iterator([""], 257)
    bytes_only.save_pretrained("path/to/model")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    loaded = peftkern.get_peft_model_state_dict(names["model"])
    assert len(loaded) == 28 and all(torch.isfinite(value).all() for value in loaded.values())
