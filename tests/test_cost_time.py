"""The model of time: its formulas by hand, the term that binds, the tables, measured rows."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from benchmarks.cost import measured, model, timed, timed_cases
from benchmarks.cost import run as cost
from benchmarks.cost.compiled import resident
from benchmarks.cost.count import Counter, Launched
from benchmarks.cost.gpus import GPUS
from benchmarks.cost.model import GAP, Modelled, Programs, formula, in_a_graph, time_of, vendor
from benchmarks.gpu.store import Store
from benchmarks.kernels.table import rules, timings
from benchmarks.kernels.traffic import Traffic
from benchmarks.static.cases import cases as shipped
from peftkern.kernels import bits, decode, gemm, reduce, shrink
from peftkern.kernels.common import Arch, Launch

from .pages import tables

BF16, FP32 = torch.bfloat16, torch.float32
GPU = GPUS["H200"]._replace(  # round figures: 4 TB/s, 5 TB/s, 800 TFLOP/s, 100 multiprocessors
    bandwidth=4.0, l2=5.0, matrix=800.0, fp32=50.0, integer=10.0, latency=0.8, mma=0.5,
    arch=(100, 90, 232448),
)  # fmt: skip
LAUNCH = GAP + 0.8
# what a compilation says: 128 threads of 64 registers, so 8 programs a multiprocessor
FACTS: dict[str, Any] = {
    "warps": 4, "registers": 64, "spilled": 0, "stack": 0, "shared": 8192, "tensor_memory": 0,
    "instructions": {"wgmma": 1, "cp.async": 1}, "loads": {},
}  # fmt: skip


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compiled_as(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setattr(model, "facts_of", lambda launch, name: FACTS | changes)


def test_the_terms_by_hand() -> None:
    """40 MB read, 20 MB written, 100 MB requested, 8 GFLOP; 400 programs, 200 at a time."""
    t = Traffic("k", 1, 40_000_000, 20_000_000, 8_000_000_000, "matrix", 100_000_000)
    found = formula(t, 10.0, GPU, Programs(400, 200, 50_000.0))
    chain = 100e6 / 400 / 50e3 * 0.8  # 5 steps of a program, one after another
    assert found.terms == {
        "memory": 15.0, "L2": 20.0, "math": 10.0, "in flight": pytest.approx(2 * chain),
        "waves": pytest.approx(0.0), "launch": pytest.approx(LAUNCH),
    }  # fmt: skip
    assert found.us == pytest.approx(20.0 + LAUNCH) and found.binds == "L2"
    assert found.body == pytest.approx(20.0)
    # the same in a last wave that holds one program of 401: it takes a step's latency five times
    found = formula(t, 10.0, GPU, Programs(401, 200, 50_000.0))
    chain *= 400 / 401
    assert found.us == pytest.approx(20.0 * 400 / 401 + chain + LAUNCH)


def test_a_single_wave_writes_after_its_last_load() -> None:
    t = Traffic("k", 1, 40_000_000, 20_000_000, requested=40_000_000)
    chain = 40e6 / 100 / 16e3 * 0.8
    assert chain == pytest.approx(20.0)
    found = formula(t, 0.0, GPU, Programs(100, 400, 16_000.0))
    assert found.us == pytest.approx(chain + 5.0 + LAUNCH) and found.binds == "in flight"
    streams = formula(t, 0.0, GPU, Programs(100, 400, 16_000.0, streams=True))
    assert streams.us == pytest.approx(chain + LAUNCH)
    several = formula(t, 0.0, GPU, Programs(100, 50, 16_000.0))
    assert several.terms["in flight"] == pytest.approx(2 * chain)


def test_few_programs_use_few_multiprocessors() -> None:
    """Of 100 multiprocessors 150 programs load half with two: a quarter of the rate is lost."""
    t = Traffic("k", 1, 1000, 0, 8_000_000_000, "matrix", 1000)
    full = formula(t, 10.0, GPU, Programs(200, 800, 1000.0))
    assert full.body == pytest.approx(10.0) and full.terms["waves"] == 0.0
    found = formula(t, 10.0, GPU, Programs(150, 800, 1000.0))
    assert found.body == pytest.approx(10.0 * 2 / 1.5)
    assert formula(t, 10.0, GPU, Programs(25, 800, 1000.0)).body == pytest.approx(40.0)


@pytest.mark.parametrize(
    "want, change, programs",
    [
        ("memory", dict(read=400_000_000), Programs(400, 400, 1e6)),
        ("L2", dict(requested=1_000_000_000), Programs(400, 400, 1e7)),
        ("math", dict(flops=200_000_000_000), Programs(400, 400, 1e6)),
        ("in flight", dict(read=100_000_000, requested=100_000_000), Programs(400, 400, 2e3)),
        ("waves", dict(flops=200_000_000_000), Programs(101, 100, 1e6)),
        ("launch", dict(), Programs(400, 400, 1e6)),
    ],
)
def test_a_launch_made_for_a_term_is_bound_by_it(
    want: str, change: dict[str, int], programs: Programs
) -> None:
    t = Traffic("k", 1, 1_000_000, 1_000, 1_000_000, "matrix", 1_000_000)._replace(**change)
    # of 101 programs one runs alone, as long as the 100 before it together
    found = formula(t, t.flops / 800e6, GPU, programs)
    assert found.binds == want, found
    assert found.us >= found.body >= max(found.terms[n] for n in timed.TERMS[:4])


def test_a_shrink_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """M=8192, K=4096, r=16 in tiles of 64 x 64, two steps of X and A in flight."""
    loads = {"x": [64 * 64 * 2, 2, 16], "As": [64 * 16 * 4, 2, 16]}
    compiled_as(monkeypatch, shared=24_576, loads=loads)
    x, a, s = meta(8192, 4096), meta(16, 4096, dtype=FP32), meta(8192, 16)
    config = shrink.ShrinkConfig(block_m=64, block_k=64, num_stages=3)
    (launch,) = shrink.plan_shrink(x, [a], [None], [1.0], s, config)
    found = time_of(launch, GPU)
    step = 64 * (64 * 2 + 16 * 4)
    requested = 8192 * 4096 * 2 + 128 * 16 * 4096 * 4
    read, written = 8192 * 4096 * 2 + 16 * 4096 * 4, 8192 * 16 * 2
    assert (found.programs, found.slots, found.in_flight) == (128, 800, 2 * step)
    assert found.terms["memory"] == pytest.approx((read + written) / 4e6)
    assert found.terms["L2"] == pytest.approx(requested / 5e6)
    assert found.terms["math"] == pytest.approx(2 * 8192 * 4096 * 16 / 800e6)
    assert found.terms["in flight"] == pytest.approx(64 / 2 * 0.8 + written / 4e6)
    # mma.sync reaches half of the rate of wgmma, here
    compiled_as(monkeypatch, instructions={"mma": 1, "cp.async": 1}, loads=loads)
    assert time_of(launch, GPU).terms["math"] == pytest.approx(2 * found.terms["math"])


@pytest.mark.parametrize(
    "change, programs",
    [
        ({}, 8),  # registers: 64 x 128 threads
        (dict(registers=65), 7),  # rounded up to 72 a thread
        (dict(shared=50_000), 4),  # with 1 KB that the system takes of each
        (dict(registers=16), 16),  # threads: 2048 of 128
        (dict(tensor_memory=256), 2),
        (dict(registers=255, warps=16, shared=0), 1),
    ],
)
def test_resident_programs_by_hand(change: dict[str, int], programs: int) -> None:
    assert resident(FACTS | change, "sm_90") == programs


def test_pieces_of_a_persistent_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GEMM of 1024 tiles on 100 programs: ten whole waves, and one of 24."""
    loads = {"x0": [16384, 3, 0], "w0": [32768, 3, 0], "Ls": [4096, None, 16]}
    compiled_as(monkeypatch, shared=200_000, loads=loads)
    arch = Arch(*GPU.arch)
    config = gemm.GemmConfig(128, 256, 64, tma=True, num_stages=4)
    y, x, w = meta(8192, 4096), meta(8192, 4096), meta(4096, 4096)
    s, b = meta(8192, 16), meta(4096, 16)
    (launch,) = gemm.plan_gemm(y, [x], [w], [s], [b.T], [None], None, arch, config)
    found = time_of(launch, GPU)
    assert launch.grid == (100,) and (found.programs, found.slots) == (1024, 100)
    assert found.in_flight == 3 * (16384 + 32768)
    alone = max(found.terms["math"] * 100 / 1024, found.terms["in flight"] * 100 / 1024)
    body = 1000 / 1024 * max(found.terms[n] for n in ("memory", "L2", "math"))
    assert found.body >= body + alone - 1e-6


def test_tiles_in_flight_are_those_of_the_compiled_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    x, a, s = meta(8192, 4096), meta(16, 4096), meta(8192, 16)
    config = shrink.ShrinkConfig(block_m=64, block_k=64, num_stages=3)
    (launch,) = shrink.plan_shrink(x, [a], [None], [1.0], s, config)
    for loads, want in (
        ({"x": [8192, 3, 16], "As": [2048, 0, 16]}, 3 * 8192 + 2048),  # A waits for its own loads
        ({"x": [8192, 2, 16], "scales": [4, None, 4]}, 2 * 8192),  # one outside of the loop
        ({"x": [8192, 4, 16]}, 30_000),  # no more than shared memory holds
        ({"x": [8192, None, 16]}, (8192 * 4096 * 2 + 128 * 16 * 4096 * 2) / 128),
    ):
        compiled_as(monkeypatch, shared=30_000, loads=loads)
        assert time_of(launch, GPU).in_flight == pytest.approx(want)
    compiled_as(monkeypatch, shared=30_000, loads={"x": [8192, 2, 16], "As": [2048, 1, 16]})
    three = shrink.plan_shrink(x, [a] * 3, [None] * 3, [1.0] * 3, meta(8192, 48), config)
    assert time_of(three[0], GPU).in_flight == 2 * 8192 + 3 * 2048  # one X, three A


def test_words_of_a_mask_take_integer_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_as(monkeypatch)
    out = meta(1, 8192, 128, dtype=torch.int32)
    (launch,) = bits.plan_bits(out, 4096, 0.1, 7, bits.BitsConfig(rounds=7))
    operations = 8192 * 128 * (launch.meta["DIGITS"] * (8 * 7 // 4 + 1) + 9)
    found = time_of(launch, GPU)
    assert found.terms["math"] == pytest.approx(operations / 10e6) and found.binds == "math"


def test_what_was_just_written_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_as(monkeypatch, loads={"partials": [4 * reduce.BLOCK, 0, 16]})
    launch = reduce.plan_sum([(meta(64, 4096, dtype=FP32), meta(4096, dtype=FP32))])
    found = time_of(launch, GPU)
    assert found.terms["launch"] == pytest.approx(GAP + GPU.near)
    assert found.terms["in flight"] == pytest.approx(64 * GPU.near + 4096 * 4 / 4e6)


def test_a_vendors_kernel_has_memory_math_and_launches() -> None:
    copies = Traffic("cast", 3, 8_000_000, 4_000_000)
    assert vendor(copies, GPU).us == pytest.approx(3.0 + 3 * LAUNCH)
    assert vendor(copies, GPU).binds == "launch"
    product = Traffic("mm", 1, 8_000_000, 4_000_000, 80_000_000_000, "matrix")
    assert vendor(product, GPU).us == pytest.approx(100.0 + LAUNCH)
    assert vendor(product._replace(unit="fp32"), GPU).us == pytest.approx(1600.0 + LAUNCH)


def test_a_launch_that_starts_early_runs_beside_the_one_before() -> None:
    first = formula(Traffic("a", 1, 8_000_000, 0), 0.0, GPU, Programs(100, 100, 1e6))
    first = first._replace(allows=True)
    second = Traffic("b", 1, 40_000_000, 0)
    late = formula(second, 0.0, GPU, Programs(100, 100, 1e6))
    early = formula(second, 0.0, GPU, Programs(100, 100, 1e6), early=True)
    assert in_a_graph([first, late]) == pytest.approx(2.0 + 10.0 + 2 * LAUNCH)
    assert in_a_graph([first, early]) == pytest.approx(12.0 + LAUNCH)  # both wait for memory
    slow = formula(Traffic("a", 1, 0, 0), 9.0, GPU, Programs(100, 100, 1e6))
    assert in_a_graph([slow._replace(allows=True), early]) == pytest.approx(10.0 + LAUNCH)
    assert early.terms["launch"] == 0.0
    # without its signal, or with nothing in front, it starts as any other
    assert in_a_graph([first._replace(allows=False), early]) == in_a_graph([first, late])
    assert in_a_graph([early]) == pytest.approx(late.us)


def test_an_early_launch_that_only_follows_overlaps_nothing() -> None:
    first = formula(Traffic("a", 1, 8_000_000, 0), 0.0, GPU, Programs(100, 100, 1e6))
    first = first._replace(allows=True)
    second = Traffic("b", 1, 40_000_000, 0, requested=40_000_000)
    merge = formula(second, 0.0, GPU, Programs(100, 100, 1e5), early=True, follows=True)
    # the wait's latency, then four loads one after another, shorter than what memory takes
    assert merge.terms["in flight"] == pytest.approx((1 + 4) * GPU.latency)
    assert merge.follows and merge.terms["launch"] == 0.0
    assert in_a_graph([first, merge]) == pytest.approx(2.0 + LAUNCH + merge.body)
    late = in_a_graph([first._replace(allows=False), merge])
    assert late == pytest.approx(2.0 + 2 * LAUNCH + merge.body)


def test_pdl_is_read_from_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_as(monkeypatch)
    y, x, w, a, b = meta(1, 64), meta(1, 128), meta(64, 128), meta(16, 128), meta(64, 16)
    config = decode.DecodeConfig(block_n=16)
    arch = Arch(*GPU.arch)
    first, launch = decode.plan_decode([y], x, [w], [a], [b], None, [None], [1.0], config, arch)
    assert time_of(first, GPU).allows
    late = launch._replace(meta={k: v for k, v in launch.meta.items() if k != "launch_pdl"})
    found = time_of(late, GPU)
    assert not found.waits and found.terms["launch"] == pytest.approx(LAUNCH)
    early = time_of(launch, GPU)
    assert early.waits == pytest.approx(LAUNCH) and early.terms["launch"] == 0.0


def test_the_signal_is_read_from_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_as(monkeypatch)
    launch = reduce.plan_sum([(meta(2, 4, dtype=FP32), meta(4))])
    assert not time_of(launch, GPU).allows
    monkeypatch.setattr(model, "_allowing", {})
    monkeypatch.setattr(model, "source_text", lambda kernel: "tl.extra.gdc_launch_dependents()")
    assert time_of(launch, GPU).allows


def test_eager_calls_wait_for_the_host() -> None:
    small = vendor(Traffic("copy", 1, 1000, 1000), GPU)
    assert model.eager([small] * 4) == pytest.approx(4 * model.HOST["torch"])
    ours = small._replace(programs=1)
    assert model.eager([ours]) == pytest.approx(model.HOST["triton"])
    large = vendor(Traffic("copy", 1, 400_000_000, 0), GPU)
    assert model.eager([small, large]) == pytest.approx(small.us + large.us)


@pytest.mark.parametrize("gpu", ["H200", "B200", "RTX4090", "A100"])
def test_every_shipped_launch_has_a_time(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_as(monkeypatch)
    for case in shipped(Arch(*GPUS[gpu].arch)):
        found = time_of(case.launch, gpu)
        assert math.isfinite(found.us) and found.us > 0, case.name
        assert found.binds in timed.TERMS and found.programs and found.slots, case.name
        early = bool(case.launch.meta.get("launch_pdl"))  # then its launch is what it may save
        assert (found.terms["launch"] > 0) != early == bool(found.waits), case.name
        longest = max(found.terms.values())
        assert found.us >= longest or math.isclose(found.us, longest), case.name
    assert set(timings()) <= set(rules())


def test_an_unknown_gpu_is_an_error() -> None:
    launch = reduce.plan_sum([(meta(2, 4, dtype=FP32), meta(4))])
    with pytest.raises(KeyError, match="H1000"):
        time_of(launch, "H1000")


def test_facts_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch without a kept result is compiled and kept; an error says which kernel."""
    from benchmarks.cost import compiled

    monkeypatch.setattr(compiled.triton.knobs.runtime, "interpret", False)
    kept: dict[str, Any] = {}
    results = [FACTS, {"error": "CompilationError: no"}]
    monkeypatch.setattr(compiled, "_kept", lambda: kept)
    monkeypatch.setattr(compiled, "key_of", lambda launch, name: f"{launch.grid} {name}")
    monkeypatch.setattr(compiled, "compile_launch", lambda launch, name: results.pop(0))
    added: dict[str, Any] = {}
    monkeypatch.setattr(compiled.store, "add_to_user", added.update)
    launch: Launch = reduce.plan_sum([(meta(2, 4, dtype=FP32), meta(4))])
    for _ in range(2):
        assert compiled.facts_of(launch, "sm_90") == FACTS
    assert len(results) == 1 and list(added.values()) == [FACTS]
    with pytest.raises(RuntimeError, match="_sum_kernel for sm_89: CompilationError: no"):
        compiled.facts_of(launch, "sm_89")


def test_interpreted_kernels_have_no_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(SystemExit) as stop:
        cost.main(["--time", "--gpu", "H200", "--case", "prefix-decode"])
    assert stop.value.code == 2
    assert "TRITON_INTERPRET is set: kernels are not compiled; unset it" in capsys.readouterr().err


# ------------------------------------------------------------------------------- cases and tables


def test_the_loop_over_adapters_is_counted() -> None:
    """16 rows, 8 adapters: each takes 2 rows, two products, a factor, and adds to Y."""
    with Counter() as counter:
        timed_cases._loop(meta(16, 64), meta(32, 64), 8, 4)
    names = [t.name for t in counter.launches]
    assert names == ["mm", *["index", "index", "mm", "mm", "mul", "add_", "index_put_"] * 8]
    put = next(t for t in counter.launches if t.name == "index_put_")
    assert put.written == 2 * 32 * 2


def made(gpu: str = "H200", **us: float) -> timed.Timed:
    """A case with these modelled times."""
    lines = [
        timed.Line(name.replace("_", " "), {"fwd": [modelled(t)]}, None) for name, t in us.items()
    ]
    case = timed_cases.Case("a case", {}, "plain frozen", "row", graph=True)
    return timed.Timed("linear", case, gpu, lines)


def modelled(us: float) -> Modelled:
    return Modelled(us, dict.fromkeys(timed.TERMS, 0.0), "memory", "k")


@pytest.mark.parametrize("us, said", [(114.0, "met  "), (114.2, "NOT met")])
def test_figures_are_judged_on_the_judged_gpu(
    us: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = made(plain_frozen=100.0, triton_joined_fp32=us)
    found = timed.verdicts([one, made("H100", plain_frozen=1.0, triton_joined_fp32=9.0)])
    assert found[0].line.startswith(said) and f"modelled {us / 100:.3g} x" in found[0].line
    assert found[0].met == (said != "NOT met")
    assert len(found) == 1  # of the other limits nobody asked for the cases
    monkeypatch.delitem(timed.CASES, "mlp")
    (_, mlp) = timed.verdicts([one])
    assert mlp.line.startswith("not modelled  MLP block")


def test_an_absolute_limit_is_judged_in_microseconds() -> None:
    one = made(plain_frozen=5.0, peftkern=6.0)._replace(name="prefix decode")
    (found,) = (v for v in timed.verdicts([one]) if v.value is not None)
    assert found.met and "modelled 6 us, at most 7 us" in found.line


def test_limits_name_cases_and_providers_that_are_there() -> None:
    for limit in timed.LIMITS:
        if limit.case in ("decode", "prefix decode", "mixed"):
            case = timed_cases.CASES[limit.case](GPUS["H200"])
            assert {limit.provider, case.base} <= set(case.providers), limit
            assert set(case.measured) & set(case.providers)
    assert {"linear", "linear p=0.1"} <= {limit.case for limit in timed.LIMITS}


def test_the_goals_page_has_the_limits() -> None:
    rows = {row[0]: row[1] for row in tables("docs/goals.md")["Modelled"]}
    assert rows == {limit.text: f"{limit.limit:g} {limit.unit}" for limit in timed.LIMITS}


def test_cases_hold_the_launches_of_every_way() -> None:
    case = timed_cases.CASES["linear p=0.1"](GPUS["H200"])
    assert list(case.providers)[0] == "floor" and case.base in case.providers
    for name, phases in case.providers.items():
        ours = any(isinstance(t, Launched) for some in phases.values() for t in some)
        assert ours == name.startswith("triton"), name
        assert phases["fwd"] and phases["bwd"], name
    one = timed_cases.CASES["decode"](GPUS["H200"])
    assert [t.name for t in one.providers["HF PEFT bf16"]["fwd"]].count("mm") == 3


def test_rows_name_rows_of_the_harness() -> None:
    """Measured rows are found under the very keys that ``benchmarks.gpu`` writes."""
    from benchmarks.gpu import cases as gpu_cases
    from benchmarks.gpu import experts, extra, prefix

    keys = {c.key for make in gpu_cases.CASES.values() for c in make()}
    keys |= {c.key for c in (*extra.cases(), *prefix.cases(), *experts.cases())}
    for name in ("experts qwen3", "experts gpt-oss", "experts decode"):
        assert timed_cases.CASES[name](GPUS["H200"]).row in keys, name
    for name in ("linear p=0.1", "group p=0.1", "mlp p=0.1", "decode", "mixed", "prefix decode"):
        assert timed_cases.CASES[name](GPUS["H200"]).row in keys, name


def results(folder: Any, name: str, us: dict[str, float], **header: Any) -> None:
    """A results file as a part of ``benchmarks.gpu`` writes it."""
    gpu = {"name": "NVIDIA H200", "sms": 132}
    store = Store.create(folder / "h200" / f"{name}-decode.json", "decode", **{"gpu": gpu} | header)
    row = "q_proj 8B M=1 r=16 p=0 infer graph"
    store.put({
        "key": row, "part": "decode",
        "providers": {n: {"ok": True, "us": {"p50": t}} for n, t in us.items()},
    })  # fmt: skip
    store.finish([])


def test_the_table_shows_model_and_measurement(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled_as(monkeypatch)
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    argv = ["--time", "--gpu", "H200", "--case", "decode"]
    assert cost.main([*argv, "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    (case,) = before["cases"]
    assert {p["measured_us"] for p in case["providers"]} == {None}
    results(tmp_path, "1", {"plain frozen": 11.0, "peftkern joined": 30.0, "PEFT bf16": 25.0})
    results(tmp_path, "2", {"plain frozen": 1.0}, dry=True)
    results(tmp_path, "3", {"plain frozen": 2.0}, gpu={"name": "NVIDIA H200", "sms": 114})
    results(tmp_path, "4", {"plain frozen": 3.0}, gpu={"name": "NVIDIA H100", "sms": 132})
    (tmp_path / "h200" / "5-decode.json").write_text("{")
    assert cost.main([*argv, "--json"]) == 0
    after = json.loads(capsys.readouterr().out)["cases"][0]
    found = {p["provider"]: p for p in after["providers"]}
    want = {"plain frozen": 11.0, "HF PEFT bf16": 25.0, "peftkern fp32": 30.0}
    assert {n: p["measured_us"] for n, p in found.items() if p["measured_us"]} == want
    assert cost.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("measured us" in line for line in lines)
    ratio = 11.0 / found["plain frozen"]["modelled_us"]
    (plain,) = (line.split() for line in lines if line.strip().startswith("plain frozen"))
    assert plain[-2:] == ["11.0", f"{ratio:.2f}"]
    (floor,) = (line.split() for line in lines if line.strip().startswith("floor"))
    assert floor[-2:] == ["-", "-"]


def test_other_code_does_not_stand_beside_the_model(tmp_path: Any) -> None:
    results(tmp_path, "1", {"plain frozen": 11.0, "peftkern joined": 30.0}, sources="other")
    rows = measured.rows_of("H200", tmp_path)
    (key,) = rows
    assert measured.microseconds(rows, key, "plain frozen") == 11.0
    assert measured.microseconds(rows, key, "peftkern joined") is None
    assert measured.microseconds(rows, "another row", "plain frozen") is None
    results(tmp_path, "2", {"plain frozen": 12.0, "peftkern joined": 31.0})
    rows = measured.rows_of("H200", tmp_path)
    assert measured.microseconds(rows, key, "peftkern joined") == 31.0


@pytest.mark.parametrize(
    "name, gpu, same",
    [
        ("NVIDIA H200", "H200", True),
        ("NVIDIA GH200 480GB", "H200", False),
        ("NVIDIA H100 80GB HBM3", "H100", True),
        ("NVIDIA GeForce RTX 4090", "RTX4090", True),
        ("NVIDIA GeForce RTX 4090 D", "H100", False),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, gpu: str, same: bool) -> None:
    assert measured.is_of({"name": name, "sms": GPUS[gpu].arch[0]}, gpu) == same


def test_the_command_prints_rates_tables_and_verdicts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_as(monkeypatch)
    assert cost.main(["--time", "--gpu", "H200", "RTX4090", "--case", "prefix-decode"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Modelled, not measured.")
    for said in ("memory 4.3 TB/s, L2 5.5 TB/s, 790 TFLOP/s", "RTX4090: memory 0.907 TB/s"):
        assert said in out
    assert "Modelled us, base: plain frozen" in out and "in flight" in out and "binds" in out
    assert "prefix decode B=8 P=128 S=512: modelled" in out
    assert "joined over plain" not in out and "MLP block" not in out  # were not asked for
    assert cost.main(["--time", "--gpu", "RTX4090", "--case", "prefix-decode"]) == 0
    assert "against their limits" not in capsys.readouterr().out  # those are of an H200


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--time", "--M", "16"], "--time: its shapes are fixed"),
        (["--time", "--case", "prefix"], "--case: prefix; allowed with --time: linear, "),
        (["--case", "mixed"], "--case: mixed; allowed without --time: linear, "),
        (["--gpu", "H100", "H200"], "--gpu: H100 H200; allowed without --time: one"),
        (["--time", "--gpu", "T4"], "invalid choice: 'T4'"),
    ],
)
def test_bad_arguments(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cost.main(argv)
    assert stop.value.code == 2 and said in capsys.readouterr().err
