"""The harness of ring 4 on a machine without a GPU, by dry runs of the real command.

Tested are its file, continuing after a cut, providers to blame, the tuning table and the report.
"""

import json
import subprocess
import sys
import time

import pytest

from benchmarks.gpu import cases as gpu_cases
from benchmarks.gpu import experts as gpu_experts
from benchmarks.gpu import extra as gpu_extra
from benchmarks.gpu import model as gpu_model
from benchmarks.gpu import prefix as gpu_prefix
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import store as gpu_store
from benchmarks.gpu.device import Dry
from benchmarks.gpu.store import Store
from tests import children

FIELDS = {"schema", "part", "sources", "kernels", "gpu", "versions", "ceilings", "started",
          "finished", "not_run", "notes", "banned", "rows", "dry", "budget_s",
          "current"}  # fmt: skip


def gpu(*args):
    return python("-m", "benchmarks.gpu", *args, without=("PEFTKERN", "TRITON"))


def python(*args, **env):
    done = children.python(*args, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_a_dry_run_continues_what_was_cut_off(tmp_path):
    # as an earlier run left it when its machine went away within a case
    cut = Store.create(
        tmp_path / "2026-01-01T000000Z-linear.json", "linear", gpu={"name": "dry run"}
    )
    cut.data |= {"dry": True, "versions": {}, "ceilings": {}, "budget_s": 1}
    cut.put({"key": "measured before", "part": "linear", "providers": {}})
    cut.begin("cut within", 10)

    only = "M=512 r=16 p=0 infer"
    dry = ("--part", "linear", "--dry-run", "--only", only, "--out", str(tmp_path))
    out = gpu(*dry)
    assert "A dry run: the clock is fake" in out and "== goals (docs/goals.md, On a GPU)" in out
    (path,) = tmp_path.glob("*-linear.json")
    assert path == cut.path
    data = json.loads(path.read_text())
    assert set(data) >= FIELDS and data["finished"] and data["schema"] == gpu_store.SCHEMA
    rows = {r["key"]: r for r in data["rows"]}
    row = rows.pop("q_proj 8B M=512 r=16 p=0 infer graph")
    assert set(rows) == {"measured before"}
    assert data["notes"] == ["continued after a cut within cut within"]
    measured = row["providers"]
    assert {"plain frozen", "PEFT bf16", "PEFT default (fp32)"} < set(measured)
    names = ("torch", "hybrid", "joined", "fused", "auto")
    for name in (f"peftkern {way}" for way in names):
        entry = measured[name]
        assert entry["ok"] and 0 < entry["errors"]["y"] < entry["limit"], (name, entry)
        assert entry["us"]["p20"] <= entry["us"]["p50"] <= entry["us"]["p80"]
    assert "unsloth" in row["missing"] or "unsloth" in measured


@pytest.mark.long
def test_a_dry_run_of_the_prefix_checks_all_ways_against_float64(tmp_path):
    out = gpu("--part", "prefix", "--dry-run", "--out", str(tmp_path))
    assert "prefix decode B=8 T=1 S=512 P=128 32/8x128" in out
    (path,) = tmp_path.glob("*-prefix.json")
    rows = {r["case"]["what"]: r["providers"] for r in json.loads(path.read_text())["rows"]}
    assert set(rows) == {"decode", "train", "prefill"}
    for what, providers in rows.items():
        names = {"plain frozen", "PEFT bf16", "peftkern prefix"}
        assert set(providers) == names | (
            {"prefix in a static cache"} if what == "decode" else set()
        )
        for name in set(providers) - {"plain frozen"}:
            entry = providers[name]
            assert entry["ok"] and entry["checked"] == "float64" and entry["us"]["p50"] > 0
            wanted = {"y", "dq", "dk", "dv", "dpk", "dpv"} if what == "train" else {"y"}
            assert set(entry["errors"]) == wanted and min(entry["errors"].values()) > 0


@pytest.mark.slow
def test_a_dry_run_of_experts_checks_all_ways_against_float64(tmp_path):
    out = gpu("--part", "experts", "--dry-run", "--budget", "900", "--out", str(tmp_path))
    assert "experts qwen3 T=8192 r=16 train" in out and "wrong, failed or hung" not in out
    (path,) = tmp_path.glob("*-experts.json")
    data = json.loads(path.read_text())
    assert data["finished"] and not data["not_run"]
    rows = {(r["case"]["layer"], r["case"]["what"]): r for r in data["rows"]}
    assert set(rows) == {(n, w) for n in ("qwen3", "gpt-oss") for w in ("train", "decode")}
    for (_, what), row in rows.items():
        assert row["floor"]["us"] > 0 and not row["missing"]
        ours = {"peftkern torch", "peftkern triton", "peftkern auto"}
        assert set(row["providers"]) == ours | {"plain frozen", "PEFT bf16", "PEFT default (fp32)"}
        for name, entry in row["providers"].items():
            kinds = {"y"} if what == "decode" else {"y", "dx", "dw", "da", "db"}
            kinds -= {"da", "db"} if name == "plain frozen" else set()
            assert set(entry["errors"]) == kinds
            assert entry["ok"] and 0 < max(entry["errors"].values()) < entry["limit"], (name, entry)
            assert entry["us"]["p20"] <= entry["us"]["p50"] <= entry["us"]["p80"]


def test_a_wrong_mixture_is_seen():
    """An error in any result of any token or expert that is looked at is past the limit."""
    case = gpu_experts.ExpertsCase("gpt-oss", 8192).tiny()
    device = Dry()
    frozen = gpu_experts.base(case, device)
    provider = gpu_experts.makers(case, frozen)["peftkern torch"]()
    (on,) = gpu_experts.routings(case, device, 1)
    exact = gpu_experts.Exact(
        provider.model.experts, provider.adapters, case.of, on.x, on.index, on.weights
    )
    with provider.mode():
        found = provider.step(on)
    right = exact.errors(*found, dout=on.dout)
    assert set(right) == {"y", "dx", "dw", "da", "db"}
    assert max(right.values()) < gpu_experts.LIMIT
    for i, name in enumerate(("y", "dx", "dw", "da", "db", "da", "db")):
        wrong = [t * 1.05 if i == j else t for j, t in enumerate(found)]
        errors = exact.errors(*wrong, dout=on.dout)
        assert errors[name] > gpu_experts.LIMIT, name
        assert all(errors[n] == right[n] for n in right if n != name)


def test_the_prefix_goal_is_judged_on_its_card():
    row = {
        "key": "prefix decode B=8 T=1 S=512 P=128 32/8x128",
        "providers": {"peftkern prefix": {"us": {"p50": 6.5}}},
    }
    text = "prefix decode, B=8, P=128, T=512, a layer, in a graph"
    assert f"met           {text}: 6.5 us, <= 7" in gpu_report.goals([row], "NVIDIA H100")
    row["providers"]["peftkern prefix"]["us"]["p50"] = 7.5
    assert f"NOT met       {text}: 7.5 us, <= 7" in gpu_report.goals([row], "NVIDIA H100")
    assert not any(text in line for line in gpu_report.goals([row], "NVIDIA A100"))


def test_without_a_device_it_says_so():
    import torch

    from benchmarks.gpu import parts as gpu_parts

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="no CUDA device; --dry-run goes through everything"):
        gpu_parts.device_of(dry=False)


def test_a_culprit_is_left_out_and_without_one_the_case_is_closed(tmp_path):
    store = Store.create(tmp_path / "1-linear.json", "linear", gpu={"name": "g"}, dry=True)
    store.begin("case", 10)
    store.watch("case").at("peftkern fused")
    assert store.blame("hung") == "peftkern fused in case"
    again = Store.open(store.path)
    assert again.watch("case").banned == {"peftkern fused": "hung"} and not again.done()
    again.begin("case", 10)
    assert again.blame("ended with status -11") == "case"
    assert again.rows[0]["error"] == "ended with status -11" and again.blame("nothing runs") is None


def test_only_results_of_the_same_code_and_card_are_continued(tmp_path):
    for name, changes in (("1", {}), ("2", {"sources": "other"}), ("3", {"gpu": {"name": "h"}})):
        store = Store.create(tmp_path / f"{name}-race.json", "race", gpu={"name": "g"})
        store.data |= changes
        store.write()
    (tmp_path / "4-race.json").write_text("{")
    found = gpu_store.earlier("race", "g", [tmp_path, tmp_path])
    assert [s.path.name for s in found] == ["1-race.json"]


def test_a_hang_is_ended(tmp_path):
    from benchmarks.gpu import harness as harness

    store = Store.create(tmp_path / "1-linear.json", "linear")
    store.begin("case", 0.5)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    status, why = harness._watch(sleeper, store.path, time.time() + 30)
    assert status is None and why.startswith("hung") and sleeper.poll() is not None
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert harness._watch(sleeper, store.path, time.time()) == (None, "budget")


def test_cases_come_in_order_without_repeats():
    for make in gpu_cases.CASES.values():
        keys = [c.key for c in make()]
        assert len(keys) == len(set(keys))
    first = gpu_cases.linear_cases()[:2]
    assert [c.key for c in first] == [f"q_proj 8B M=8192 r=16 p={p} train" for p in ("0.1", "0")]
    wanted = {(c.M, c.r, c.p) for c in gpu_cases.linear_cases()}
    assert {m for m, _, _ in wanted} == {1, 16, 128, 512, 2048, 4095, 8192}
    assert {r for _, r, _ in wanted} == {8, 16, 64, 128} and {p for *_, p in wanted} == {0.0, 0.1}


def test_the_floor_is_the_roofline():
    case = gpu_cases.Case("linear", "linear", "8B", 8192, 16, 0.0, "infer")
    flops = 2 * 8192 * (4096 * 4096 + 16 * 8192)
    slow_memory = gpu_cases.floor(case, {"copy_tb_s": 1e-3, "bf16_tflop_s": 1e9})
    assert slow_memory["bytes"] == 2 * (2 * 8192 * 4096 + 4096 * 4096 + 16 * 8192)
    assert slow_memory["us"] == pytest.approx(slow_memory["bytes"] / 1e9 * 1e6)
    slow_units = gpu_cases.floor(case, {"copy_tb_s": 1e9, "bf16_tflop_s": 1.0})
    assert slow_units["us"] == pytest.approx(flops / 1e12 * 1e6)


def row(key, times, **more):
    timed = {n: {"ok": True, "us": {"p20": t, "p50": t, "p80": t}} for n, t in times.items()}
    return {"key": key, "part": "linear", "providers": timed, "floor": {"us": 1.0}, **more}


def test_goals_and_losses_are_said_plainly():
    key = "q_proj 8B M=8192 r=16 p=0.1 train"
    slow = row(
        key, {"plain frozen": 700, "PEFT bf16": 900, "peftkern torch": 1000, "peftkern hybrid": 950}
    )
    slow["providers"]["peftkern fused"] = {"ok": False, "errors": {"y": 0.5}}
    linear = "linear fwd+bwd, M=8192, 4096^2, p=0.1, over the plain linear"
    lines = gpu_report.goals([slow], "NVIDIA H200")
    assert f"NOT met       {linear}: 1.36 x, <= 1.15" in lines
    assert "not measured  decode M=1, over the bare product: <= 1.15 x" in lines
    assert gpu_report.losses([slow]) == [f"{key}: PEFT bf16 900.0 us, peftkern hybrid 950.0 us"]
    assert gpu_report.wrong([slow]) == [f"{key}, peftkern fused: {{'y': 0.5}}"]
    fast = row(
        key, {"plain frozen": 700, "PEFT bf16": 900, "peftkern torch": 890, "peftkern hybrid": 820}
    )
    assert gpu_report.losses([fast]) == [] and gpu_report.wrong([fast]) == []
    assert f"NOT met       {linear}: 1.17 x, <= 1.15" in gpu_report.goals([fast], "NVIDIA H200")
    for gpu in ("NVIDIA H100", "NVIDIA L4"):
        assert f"met           {linear}: 1.17 x, <= 1.2" in gpu_report.goals([fast], gpu)
    hopper = {"Llama-8B layer, 7 adapters, fwd+bwd, p=0.1", "prefix decode, B=8, P=128, T=512"}
    for text in hopper:  # times of an H100 say nothing of an L4
        assert any(text in line for line in gpu_report.goals([fast], "NVIDIA H100"))
        assert not any(text in line for line in gpu_report.goals([fast], "NVIDIA L4"))


def test_every_goal_is_judged_by_a_row_that_the_harness_measures():
    measured = {case.key for part in gpu_cases.CASES.values() for case in part()}
    measured |= {case.key for cases in (gpu_extra.cases, gpu_prefix.cases) for case in cases()}
    models = [case.key for case in gpu_model.cases()]
    for goal in gpu_report.GOALS:
        if goal.row.startswith("e2e "):
            assert any(key.startswith(goal.row) for key in models), goal
        else:
            assert goal.row in measured, goal


def test_end_to_end_goals_are_judged_for_every_row_of_a_model():
    keys = [case.key for case in gpu_model.cases() if case.key.startswith("e2e 4x2048 r=16 p=0.1")]
    times = {"PEFT bf16": 200, "PEFT default (fp32)": 170, "peftkern torch": 100}
    lines = gpu_report.goals([row(key, times) for key in keys], "NVIDIA L4")
    for key in keys:
        assert f"met           end to end, tokens/s over PEFT bf16, {key}: 2 x, >= 1.29" in lines
        assert (
            f"NOT met       end to end, tokens/s over PEFT default (fp32), {key}: 1.7 x, >= 1.76"
            in lines
        )


TABLE = """
import json, sys
from pathlib import Path
from benchmarks.gpu import race as gpu_race, table as gpu_table
from benchmarks.gpu.store import Store
from peftkern.ops import tuned
from peftkern.kernels import tuning
from peftkern.kernels.gemm import GemmConfig
from peftkern.kernels.shrink import ShrinkConfig
folder = Path(sys.argv[1])
us = lambda t: {"p20": t, "p50": t, "p80": t, "rounds": 9}
case = dict(op="gemm", m=4095, n=64, k=64, r=16, mask=False, dtype="bfloat16",
            adapter_dtype="float32", group=1)
config = dict(block_m=64, block_n=64, block_k=32, tma=True)
row = dict(key="a", part="race", case=case, entrants={
    "default": dict(config=None, ok=True, us=us(30.0)),
    "c": dict(config=config, ok=True, us=us(20.0)), "bad": dict(config=config, ok=False)})
way = dict(key="b", part="race", case=case | dict(op="forward", ns=[64]), entrants={
    "torch": dict(config=None, ok=True, us=us(10.0)),
    "hybrid": dict(config=None, ok=True, us=us(5.0)),
    "fused": dict(config=None, ok=False, why="OutOfResources: x")})
close = dict(key="c", part="race", case=case | dict(op="infer", ns=[64], graph=True, m=1),
    entrants={"torch": dict(config=None, ok=True, us=us(10.0)),
              "decode": dict(config=None, ok=True, us=us(9.9))})
passes = dict(key="d", part="race", case=case | dict(op="grad_sb", k=0), entrants={
    "default": dict(config=None, ok=True, us=us(30.0)),
    "two_pass": dict(config=None, ok=True, us=us(20.0))})
card = {"name": "NVIDIA H200", "capability": [9, 0], "sms": 132, "memory_bytes": 1}
store = Store.create(folder / "1-race.json", "race", versions={"torch": "x"}, gpu=card)
for one in (row, way, close, passes):
    store.put(one)
path = gpu_table.write([store.path], folder)
assert path.name == "device_name=NVIDIA_H200.json", path
table = tuning.load(path)
key = tuning.Key("gemm", "bfloat16", "float32", tuning.bucket(4095), 64, 64, 16)
entry = table.find(key)
assert key.m == 4096 and entry.us["p50"] == 20 and entry.default_us == 30 and entry.candidates == 2
assert entry.make(GemmConfig) == GemmConfig(64, 64, 32, tma=True)
choice = table.find(tuning.Key("forward", "bfloat16", "float32", 4096, 64, 64, 16))
assert choice.choice == "hybrid" and choice.times == {"torch": 10, "hybrid": 5}
assert choice.left_out == {"fused": "OutOfResources: x"} and choice.default_us == 10
key1 = tuning.Key("infer", "bfloat16", "float32", 1, 64, 64, 16, graph=True)
assert table.find(key1).choice == "torch"  # 1% is noise
key2 = tuning.Key("grad_sb", "bfloat16", "float32", 4096, 64, 0, 16)
assert table.find(key2).choice == "two_pass"
assert table.sources == tuned.sources() != store.data["sources"]
near = tuning.Key("gemm", "bfloat16", "float32", 512, 64, 64, 16)
assert table.find(near) is None and table.find_near(near) is entry
for change in (dict(schema=2), dict(entries=[dict(table.as_json()["entries"][0], op="dance")])):
    try:
        tuning.from_json(table.as_json() | change, "T")
    except ValueError as e:
        print(e)
try:
    entry.make(ShrinkConfig)
except ValueError as e:
    print(e)
assert gpu_table.main([str(path), "--show"]) == 0
"""


@pytest.mark.long
def test_a_race_becomes_a_tuning_table(tmp_path):
    out = python("-c", TABLE, str(tmp_path))
    assert "T has schema 2; allowed: 1" in out
    assert "T: op is 'dance'; allowed: shrink," in out
    assert "config of gemm has block_n, tma; allowed for ShrinkConfig" in out
    assert "1.50x default" in out and "hybrid" in out


COUNTERS = """
import json, sys
from benchmarks.gpu import counters as g
(line,) = [s for s in sys.argv[1].splitlines() if s.startswith(g.REPORT)]
reports = json.loads(line.removeprefix(g.REPORT))
names = {r["name"] for r in reports}
assert names > {"bits", "shrink", "grad_a", "grad_xa", "gemm", "sum"}, names
wrong = next(i for i, r in enumerate(reports) if r["name"] == "grad_xa")
rows = ['"ID","Kernel Name","%s","%s"' % g.METRICS, '"","","byte","sector"']
for i, r in enumerate(reports):
    read = f"{r['read'] * (2 if i == wrong else 1):,}"
    rows.append(f'"{i}","_{r["name"]}_kernel","{read}","{r["written"] // g.SECTOR}"')
table = "==PROF== Connected\\n" + "\\n".join(rows)
found = g.compare(reports, g.read_csv(table))
assert [i for i, r in enumerate(found) if r["outcome"] == "failed"] == [wrong], found
assert found[wrong]["ratios"]["read"] == 2 and found[0]["ratios"]["read"] is None
cut = table.rpartition("\\n")[0]
for bad, said in ((table.replace('"ID"', "ID"), "no table"), (cut, "counted")):
    try:
        g.compare(reports, g.read_csv(bad))
    except ValueError as e:
        assert said in str(e), e
    else:
        raise AssertionError(said)
"""


@pytest.mark.long
def test_reported_traffic_is_compared_with_what_ncu_counts():
    python("-c", COUNTERS, python("-m", "benchmarks.gpu.counters", TRITON_INTERPRET="1"))


@pytest.mark.long
def test_without_ncu_that_is_said(tmp_path):
    gpu("--part", "counters", "--dry-run", "--out", str(tmp_path))
    (path,) = tmp_path.glob("*-counters.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["outcome"] == "absent" and "ncu" in row["why"]


SANITIZER = """
import sys, time
from pathlib import Path
from benchmarks.gpu import checks
from benchmarks.gpu.store import Store
for i, (status, outcome) in enumerate(((0, "passed"), (1, "failed"), (None, "time limit"))):
    limits = []
    def one(command, env, until):
        limits.append(until)
        return {"status": status, "seconds": 1.0, "tail": ""}
    checks._one = one
    store = Store.create(Path(sys.argv[1]) / f"{i}-sanitizer.json", "sanitizer")
    until = time.time() + 100
    checks.sanitizer(store, until, dry=True, env={})
    assert store.rows[0]["outcome"] == outcome, store.rows[0]
    assert limits == [until], limits  # no tool runs dry: all of the time is the script's
"""


def test_a_sanitizer_script_that_ran_out_of_time_has_not_failed(tmp_path):
    python("-c", SANITIZER, str(tmp_path))
