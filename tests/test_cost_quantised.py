"""Bytes of a layer's linears on quantised bases: by hand, against the packed weights, and told."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks.cost import quantised as counts
from benchmarks.cost import quantised_tables, timed
from benchmarks.cost import run as cost
from benchmarks.cost.gpus import GPUS
from benchmarks.cost.quantised import ADAPTED, OURS, PEFT, PLAIN, moved, step_bytes
from benchmarks.gpu.packed import BASES, without_data
from peftkern.kernels.common import Arch

from .pages import tables

ARCH = Arch(*GPUS["H200"].arch)
WEIGHTS = 4096 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336) + 14336 * 4096
OUTS = 4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096
INS = 4096 * 3 + 14336  # of the four groups
FACTORS = 4 * 16 * (OUTS + 4096 * 6 + 14336)


@pytest.fixture(scope="module")
def bases() -> dict[str, counts.Base]:
    return {name: counts.measure(name, ARCH) for name in BASES}


def test_the_packed_bytes_by_hand() -> None:
    found = {name: counts.weight_bytes(name) for name in BASES}
    tables_of = 7 * 4 * (16 + 256 + 1)  # codes, and the offset of nested statistics
    inner = sum(-(-n * k // 64 // 256) for k, ns in counts.groups() for n in ns)
    assert found == {
        "nf4": WEIGHTS // 2 + WEIGHTS // 64 + 4 * inner + tables_of,
        "fp8": WEIGHTS + WEIGHTS // 128**2 * 4,
        "int8": WEIGHTS + 2 * OUTS,
        "int4": WEIGHTS // 2 + WEIGHTS // 128 * 2,
        "mxfp4": WEIGHTS // 2 + WEIGHTS // 32,
    }


def test_one_row_reads_packed_weights_and_factors_once(bases: dict[str, counts.Base]) -> None:
    for name, b in bases.items():
        ours = b.decoding[1][OURS]
        assert [t.name for t in ours] == ["decode_shrink", "decode_quantised"] * 4
        parts = sum(t.written for t in ours[::2])  # of S, which the second launch reads
        least = b.packed + FACTORS + 2 * (INS + OUTS)
        # both launches read X
        assert moved(ours) == least + 2 * parts + 2 * INS, name
        packed = sum(t.read for t in ours[1::2])
        assert packed == b.packed + FACTORS - 4 * 16 * (4096 * 6 + 14336) + parts + 2 * INS


def test_training_dequantises_each_weight_twice(bases: dict[str, counts.Base]) -> None:
    """Beside the launches on bf16: a pass that reads the packed weights and writes 2 bytes each."""
    for name, b in bases.items():
        ours, on_bf16 = b.training[OURS], b.training[ADAPTED]
        for phase in ("forward", "backward"):
            own = [t for t in getattr(ours, phase) if t.name == "dequantise"]
            assert sum(t.read for t in own) == b.packed, name
            assert sum(t.written for t in own) == 2 * WEIGHTS, name
            rest = moved(getattr(ours, phase)) - moved(own)
            assert rest == moved(getattr(on_bf16, phase)), (name, phase)
        assert ours.kept == on_bf16.kept < b.training[PEFT].kept / 100


def test_hf_peft_dequantises_at_best_in_one_launch(bases: dict[str, counts.Base]) -> None:
    for name, b in bases.items():
        for rows, by_name in b.decoding.items():
            made = [t for t in by_name[PEFT] if t.name == "dequantise (owner)"]
            fused = [t for t in by_name[PEFT] if t.name == "gemv_4bit"]
            assert (len(made), len(fused)) == ((0, 7) if (name, rows) == ("nf4", 1) else (7, 0))
            assert sum(t.read for t in made or fused) >= b.packed
        step = b.training[PEFT]
        assert sum(t.name == "dequantise (owner)" for t in step.forward + step.backward) == 14
        assert moved(b.decoding[1][PLAIN]) > 2 * WEIGHTS


def test_the_goal_of_decoding_is_met_on_every_base(bases: dict[str, counts.Base]) -> None:
    judged = [v for b in bases.values() for v in counts.verdicts(b) if v.limit is not None]
    assert len(judged) == 2 * len(BASES) and all(v.limit == 1.1 and v.met for v in judged)
    wide = bases["nf4"]._replace(packed=bases["nf4"].packed * 9 // 10)
    assert not any(v.met for v in counts.verdicts(wide) if v.limit is not None)


def test_the_goals_page_says_what_is_counted(bases: dict[str, counts.Base]) -> None:
    table = {row[0]: row[1:] for row in tables("docs/goals.md")["Quantised bases"]}
    found = {name: counts.verdicts(b) for name, b in bases.items()}
    for i, v in enumerate(found["nf4"]):
        values = [f"{of[i].value:.3g}" for of in found.values()]
        assert table[v.target] == ["" if v.limit is None else f"{v.limit:g}", *values], v.target
    step = table["training, M=8192: GB"]
    assert step[1:] == [f"{step_bytes(b.training[OURS]) / 1e9:.3g}" for b in bases.values()]


def test_a_way_that_is_not_taken_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    who = counts.PROVIDERS[-1]
    assert who.name == OURS
    counts._decoded.cache_clear(), counts._trained.cache_clear()
    own = counts.backend
    monkeypatch.setattr(counts, "backend", lambda kind, arch: own("torch", arch))
    dense = torch.empty((4, 4), device="meta")
    monkeypatch.setattr(
        "peftkern.ops.bases.mx.Mx4.dense", lambda self, dtype: dense.new_empty(self.shape).to(dtype)
    )
    with pytest.raises(RuntimeError, match="mxfp4: 1 rows did not take the kernel"):
        counts.decoded(who, "mxfp4", 1, ARCH)
    with pytest.raises(RuntimeError, match="mxfp4: 0 dequantisations in peftkern's kernel"):
        counts.trained(who, "mxfp4", ARCH)
    counts._decoded.cache_clear(), counts._trained.cache_clear()


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost.main(["--base", "nf4", "mxfp4"]) == 0
    out = capsys.readouterr().out
    assert "nf4: 112.5 MB of packed weights" in out and "us H100" in out and "us H200" in out
    assert out.count("at most 1.1: met") == 4 and "not measured" in out
    assert cost.main(["--base", "int4", "--gpu", "H200", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [b["base"] for b in data["bases"]] == ["int4"] and len(data["targets"]) == 6
    assert set(data["bases"][0]["phases"]["one row"]) == {PLAIN, ADAPTED, PEFT, OURS}
    assert set(data["bases"][0]["phases"]["one row"][OURS]["us"]) == {"H200"}
    for wrong, said in (
        (["--M", "3"], "its shapes are fixed"),
        (["--case", "linear"], "it has cases of its own"),
    ):
        with pytest.raises(SystemExit):
            cost.main(["--base", "nf4", *wrong])
        assert f"argument --base: {said}" in capsys.readouterr().err


def test_modelled_times_are_of_the_same_launches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def modelled(t: Any, gpu: Any) -> Any:
        seen.append(t)
        return timed.vendor(t, gpu)  # nothing is compiled

    monkeypatch.setattr(timed, "modelled", modelled)
    assert cost.main(["--base", "fp8", "--time", "--gpu", "H200", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [c["case"] for c in data["cases"]] == ["fp8 M=1", "fp8 M=16", "fp8 training"]
    assert {"decode_quantised", "dequantise", "dequantise (owner)"} <= {t.name for t in seen}
    by_name = {p["provider"]: p["modelled_us"] for p in data["cases"][0]["providers"]}
    assert by_name[OURS] < by_name[PLAIN]
    found = quantised_tables.modelled(["fp8"], ["H200"])
    assert {line.provider for line in found[0].lines} == {w.name for w in counts.PROVIDERS}


def test_every_base_is_read_by_the_kernels() -> None:
    for name in BASES:
        packed = without_data(name, 256, 512)
        assert not isinstance(packed.for_kernels(torch.bfloat16), str)
        assert packed.shape == (256, 512)
