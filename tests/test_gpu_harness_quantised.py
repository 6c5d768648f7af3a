"""The part quantised of ring 4 on a machine without a GPU: its dry run, its floor and its check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import quantised as gpu_quantised
from benchmarks.gpu.packed import BASES, base_linear, packed_bytes, without_data
from benchmarks.gpu.providers import PEFT_FP32, PLAIN
from benchmarks.gpu.quantised import ALONE, ON_BF16, Provider, QuantisedCase
from benchmarks.gpu.report import BNB, TRITON
from tests import children

pytest.importorskip("bitsandbytes")


def rows_of(folder: Path, *more: str) -> dict[str, Any]:
    command = ("-m", "benchmarks.gpu", "--part", "quantised", "--dry-run", "--budget", "900")
    done = children.python(*command, "--out", str(folder), *more, without=("PEFTKERN", "TRITON"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong, failed or hung" not in done.stdout
    (path,) = folder.glob("*-quantised.json")
    data = json.loads(path.read_text())
    assert data["finished"] and not data["not_run"]
    return {row["key"].removeprefix("quantised "): row for row in data["rows"]}


def check(row: dict[str, Any]) -> None:
    base, what = row["case"]["base"], row["case"]["what"]
    assert row["floor"]["us"] > 0 and not row["missing"]
    names = {PLAIN, PEFT_FP32, ON_BF16, TRITON} | ({ALONE} if base == "nf4" else set())
    names = {TRITON, BNB if base == "nf4" else "owner in torch"} if what == "dequantise" else names
    assert set(row["providers"]) == names
    for name, entry in row["providers"].items():
        assert entry["ok"] and entry["us"]["p50"] > 0, (name, entry)
        wanted = {"decode": {"y"}, "train": {"y", "dx", "da", "db"}, "dequantise": {"w"}}[what]
        bare = wanted - {"da", "db"} if name in (PLAIN, ALONE) else wanted
        assert set(entry["errors"]) == bare
        assert max(entry["errors"].values()) <= entry["limit"]


@pytest.mark.long
def test_a_dry_run_on_nf4(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "--only", "nf4")
    assert {row["case"]["what"] for row in rows.values()} == {"decode", "train", "dequantise"}
    for row in rows.values():
        check(row)


@pytest.mark.slow
def test_a_dry_run_on_every_base(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    assert {row["case"]["base"] for row in rows.values()} == set(BASES)
    for row in rows.values():
        check(row)


def test_the_cases_are_told_apart() -> None:
    found = gpu_quantised.cases()
    assert len({case.key for case in found}) == len(found)
    assert [case.base for case in found[: len(BASES)]] == list(BASES)
    assert {case.M for case in found if case.what == "decode"} == {1, 16, 64}


def test_the_floor_is_the_roofline() -> None:
    slow = {"copy_tb_s": 1e-3, "bf16_tflop_s": 1e9}
    size, rows, factors = 4096 * 4096 // 2, 2 * 16 * 8192, 4 * 16 * 8192
    decode = gpu_quantised.floor(QuantisedCase("int4", 16), size, slow)
    assert decode["bytes"] == size + rows + factors
    assert decode["us"] == pytest.approx(decode["bytes"] / 1e9 * 1e6)
    assert decode["flops"] == 2 * 16 * (4096 * 4096 + 16 * 8192)
    train = gpu_quantised.floor(QuantisedCase("int4", 16, "train"), size, slow)
    # the backward reads X again, and writes the gradients of A and B
    assert train["bytes"] == 2 * decode["bytes"] + 2 * 16 * 4096 + factors
    alone = gpu_quantised.floor(QuantisedCase("int4", 16, "dequantise"), size, slow)
    assert alone["bytes"] == size + 2 * 4096 * 4096 and alone["flops"] == 0


@pytest.mark.parametrize("what", ["decode", "train", "dequantise"])
def test_a_wrong_provider_is_seen(what: str) -> None:
    case = QuantisedCase("int4", 8192, what).tiny()
    (K, N) = case.of
    w = torch.randn(N, K).bfloat16()
    x, dy = torch.randn(case.M, K).bfloat16(), torch.randn(case.M, N).bfloat16()
    x.requires_grad_(what == "train")
    for factor, right in ((1.0, True), (1.05, False)):
        wrong = w * factor
        made: Any = lambda i, x, t=wrong: t if what == "dequantise" else x @ t.T  # noqa: E731
        entry = gpu_quantised._check(case, Provider(made), w, x, dy)
        assert entry["ok"] == right, entry


@pytest.mark.parametrize("base", [b for b in BASES if b != "mxfp4"])
def test_a_base_holds_the_numbers_that_it_was_made_of(base: str) -> None:
    dense = torch.randn(64, 256).mul_(0.1).bfloat16()
    with gpu_quantised.owned_is_read():
        held = gpu_quantised.packed_of(base_linear(base, dense))
    assert packed_bytes(held) == packed_bytes(without_data(base, 64, 256))
    error = (held.dense(torch.float32) - dense.float()).norm() / dense.float().norm()
    assert 0 < error < {"int8": 0.02, "fp8": 0.05}.get(base, 0.2)
