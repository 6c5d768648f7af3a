"""Ring 3 itself: it compiles without a GPU, caches results, and reports problems."""

import ast
import json
import shutil
import sys

import pytest
import triton

from benchmarks.static.judging import TARGETS, occupancy
from tests.kernels.compiler import RESULTS, ROOT, python


@pytest.mark.long
def test_a_case_compiles_for_sm_90_with_wgmma_and_the_repeat_is_cached(tmp_path):
    command = ["-m", "benchmarks.static", "--json", "--jobs", "1", "--arch", "sm_90"]
    command += ["--only", "gemm dX r16 mask fp16"]
    first = python(*command, "--no-cache", cache=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    (row,) = json.loads(first.stdout)["rows"]
    assert row["spilled"] == 0 and 0 < row["shared"] <= row["limit"]
    assert row["instructions"]["wgmma"] and row["instructions"]["cp.async.bulk.tensor"]
    assert 16 < row["registers"] <= 255
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    kept[row["key"]]["registers"] = 7  # shows that the repeat reads the cache
    file.write_text(json.dumps(kept))
    second = json.loads(python(*command, cache=tmp_path).stdout)
    assert second["compiled"] == 0 and second["rows"][0]["registers"] == 7


COMMITTED = """
import contextlib, io, json, multiprocessing, os, sys
from pathlib import Path
import benchmarks.static.run as static
from benchmarks.static import store
folder = Path(sys.argv[1])
store.ROOT = folder
store.FOLDER = folder / "results"
static.TARGETS = {"sm_80": static.TARGETS["sm_80"]}
static.get_context = lambda how: multiprocessing.get_context("fork")  # a second less each time
all_cases = static.all_cases
static.all_cases = lambda name, tables: [c for c in all_cases(name, tables) if "bits" in c.name]
file = store.committed_file()

def run(*options, cache):
    os.environ["PEFTKERN_CACHE"] = str(folder / cache)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = static.main(["--jobs", "1", "--json", *options])
    rows = json.loads(out.getvalue())["rows"] if out.getvalue() else None
    return code, rows and rows[0]["registers"], err.getvalue()

seen = {"stale": run("--most", "0", cache="a"), "refreshed": run("--refresh", cache="a")}
seen["lines"] = file.read_text().splitlines()
made = json.loads(file.read_text())
made["rows"].append(made["rows"][0] | {"key": "0123456789abcdef"})
made["rows"][0]["registers"] = 7
file.write_text(json.dumps(made))
seen["read"] = run("--most", "0", cache="b")
seen["no cache"] = run("--no-cache", cache="c")
run("--refresh", cache="b")
seen["keys"] = [r["key"] for r in json.loads(file.read_text())["rows"]]
file.write_text("<<<<<<< ours" + file.read_text())
seen["broken"] = run("--most", "0", cache="b")
run("--refresh", cache="c")
seen["mended"] = run("--most", "0", cache="b")
seen["left"] = sorted(p.name for p in store.FOLDER.iterdir())
print(json.dumps(seen))
"""


@pytest.mark.long
def test_the_committed_file_is_read_refreshed_and_never_trusted_when_broken(tmp_path):
    done = python("-c", COMMITTED, str(tmp_path), cache=tmp_path)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    code, registers, told = seen["stale"]
    assert code == 3 and registers is None and "--refresh" in told and "results" in told
    assert seen["refreshed"][:2] == [0, seen["no cache"][1]] and seen["refreshed"][1] > 8
    assert len(seen["lines"]) == 3 and '"case": "bits p=0.1"' in seen["lines"][1]
    assert seen["read"] == [0, 7, ""]
    assert len(seen["keys"]) == 1 and "0123456789abcdef" not in seen["keys"]
    assert seen["broken"][0] == 3 and "no file of results" in seen["broken"][2]
    assert seen["mended"] == [0, seen["no cache"][1], ""]
    assert len(seen["left"]) == 1


KEYS = """
import json
from pathlib import Path
from benchmarks.static.run import TARGETS, all_cases, specify
rows = [specify(c, name) for name in TARGETS for c in all_cases(name, Path("kernels/tuning"))]
print(json.dumps({r["arch"] + " " + r["case"]: [r["kernel"], r["key"]] for r in rows}))
"""


def keys(root, cache):
    done = python("-c", KEYS, cache=cache, root=root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    return keys(ROOT, tmp_path_factory.mktemp("cache"))


@pytest.mark.long
def test_the_committed_file_holds_no_row_that_nothing_asks_for(before):
    path = RESULTS / f"triton-{triton.__version__}.json"
    if not path.exists():
        pytest.skip(f"no results are committed for Triton {triton.__version__}")
    stale = [
        f"{row['arch']} {row['case']}"
        for row in json.loads(path.read_text())["rows"]
        if row["key"] not in {key for _, key in before.values()}
    ]
    assert not stale, "run `python -m benchmarks.static --refresh`"


def edited(tmp_path, *edits):
    """Keys of a copy of the checkout in which each (file, old, new) was replaced once."""
    root = tmp_path / "copy"
    for name in ("peftkern", "kernels", "benchmarks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", root)
    for name, old, new in edits:
        text = (root / name).read_text()
        assert text.count(old) >= 1, f"{name} has no {old!r}"
        (root / name).write_text(text.replace(old, new, 1))
    return keys(root, tmp_path)


@pytest.mark.long
def test_keys_change_with_what_the_compiler_sees_and_with_nothing_else(before, tmp_path):
    after = edited(
        tmp_path,
        ("kernels/common.py", "from __future__", "# All lines move.\n\nfrom __future__"),
        ("kernels/gemm.py", "        band = tile", "        # Why.\n        band = (tile)"),
        ("kernels/decode_tile.py", '"""No tensor', '"""Words. No tensor'),
        ("kernels/decode_tile.py", "low = given_s(s + rank, part_stride, PARTS, rank_ok)",
         "low = given_s(s + rank, part_stride, PARTS, n_ok)"),  # in _gemv_kernel
        ("kernels/expand.py", "block_r=min(64,", "block_r=min(32,"),  # matters where r > 32
    )  # fmt: skip
    assert before.keys() == after.keys()
    changed = {case for case, (_, key) in before.items() if after[case][1] != key}
    wide = ("r64", "r128")
    assert changed == {
        case
        for case, (kernel, _) in before.items()
        if kernel == "decode_tile._gemv_kernel"
        or (kernel == "expand._expand_kernel" and any(r in case for r in wide))
    }


@pytest.mark.long
def test_keys_follow_helpers(before, tmp_path):
    helper = ("kernels/common.py", "keep_tile(words_ptr", "keep_tile(words_at")
    after = edited(
        tmp_path, helper, ("kernels/common.py", "        words_ptr + row", "        words_at + row")
    )
    changed = {before[case][0] for case in before if after[case] != before[case]}
    callers = {"shrink._shrink_kernel", "grad_a._grad_a_kernel", "expand._expand_kernel"}
    assert callers | {"gemm._gemm_kernel"} <= changed
    assert not changed & {
        "bits._bits_kernel",
        "decode_tile._gemv_kernel",
        "grad_sb._grad_sb_kernel",
    }


TOY = """
import importlib.util, json, sys
from pathlib import Path
from benchmarks.static import accesses, compiling, key as static_key

folder, edits = Path(sys.argv[1]), json.loads(sys.argv[2])
toy = (folder / "toy.py").read_text()

def text(source, n):
    path = folder / f"toy{n}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return static_key.source_text(module.kernel)

before = text(toy, "")
print(json.dumps([text(toy.replace(*e), n) != before for n, e in enumerate(edits)]))

read = []
for module, word, other in ((compiling, "mma_async", "mma"), (accesses, "scf.while", "scf.if")):
    reader = Path(module.__file__).read_text()
    module.__file__ = str(folder / "reader.py")
    for old, new in (("", ""), ("\\nclass ", "\\n# Why.\\nclass "), (word, other)):
        (folder / "reader.py").write_text(reader.replace(old, new, 1))
        static_key._reader_hash.cache_clear()
        read.append(static_key._reader_hash())
    (folder / "reader.py").write_text(reader)
    module.__file__ = str((folder / "reader.py").rename(folder / (module.__name__ + ".py")))
print(json.dumps([r != read[0] for r in read]))
"""
TOY_KERNEL = """
import triton
import triton.language as tl

WIDTH, OTHER = tl.constexpr(8), tl.constexpr(1)

@triton.jit
def inner(x):
    return x + 1

@triton.jit
def helper(x):
    return inner(x) * WIDTH

def make(factor):
    SCALE = tl.constexpr(factor)

    @triton.jit
    def kernel(out, N, BLOCK: tl.constexpr):
        tl.store(out, helper(N) * SCALE)

    return kernel

kernel = make(2)
"""


def test_a_key_covers_helpers_of_helpers_constants_closures_and_the_reader(tmp_path):
    matters = [
        ["x + 1", "x + 2"],  # two calls away
        ["tl.constexpr(8)", "tl.constexpr(16)"],
        ["make(2)", "make(3)"],
        ["@triton.jit\ndef inner", "@triton.jit(noinline=True)\ndef inner"],
        ["BLOCK", "BLOCK_M"],
    ]
    does_not = [
        ["tl.constexpr(1)", "tl.constexpr(2)"],  # nobody reads OTHER
        ["def helper(x):", "def helper(x):\n    'Words.'  # and more"],
        ["x + 1", "(x + 1)"],
    ]
    # OTHER and WIDTH stand in one statement, which is not part of the kernel.
    (tmp_path / "toy.py").write_text(TOY_KERNEL)
    done = python("-c", TOY, str(tmp_path), json.dumps(matters + does_not), cache=tmp_path)
    assert done.returncode == 0, done.stderr
    source, reader = map(json.loads, done.stdout.splitlines()[-2:])
    assert source == [True] * len(matters) + [False] * len(does_not)
    assert reader == [False, False, True] * 2


BAD = """
import torch
from benchmarks.static.run import TARGETS, measure
from benchmarks.kernels.entry import Case, meta
from peftkern.kernels import gemm
x, w, y = meta(256, 512), meta(512, 512), meta(256, 512)
for name, tile in (("sm_90", (128, 256, 64, 4)), ("sm_80", (256, 256, 32, 2))):
    m, n, k, stages = tile
    config = gemm.GemmConfig(m, n, k, tma=name == "sm_90", num_warps=8, num_stages=stages)
    arch = TARGETS[name].arch
    launch = gemm.plan_gemm(y, [x], [w], [], [], [], None, arch, config)[0]
    row = measure(Case("bad", launch, True), name)
    print(row.get("problem", row.get("error")))
exact = meta(256, 512, dtype=torch.float32), meta(512, 512, dtype=torch.float32)
launch = gemm.plan_gemm(exact[0], [exact[0]], [exact[1]], [], [], [], None,
                        TARGETS["sm_90"].arch, gemm.GemmConfig(64, 64, 32, num_warps=4))[0]
print(measure(Case("fp32", launch, True), "sm_90").get("problem"))
"""


@pytest.mark.long
def test_too_much_shared_memory_spills_and_a_missing_instruction_are_problems(tmp_path):
    done = python("-c", BAD, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    shared, spills, instruction = done.stdout.strip().splitlines()[-3:]
    assert "over 232448" in shared
    assert spills.startswith("spills ")
    assert instruction == "no wgmma"


TUNED = """
import json, sys
from pathlib import Path
from benchmarks.static.run import TARGETS, specify
from benchmarks.static.cases import tuned_cases
from peftkern.kernels import registry, tuning
folder = Path(sys.argv[1])
chosen = {"grad_sb": "one_pass"}
us = {"p20": 1.0, "p50": 1.0, "p80": 1.0}
table = tuning.Table({"name": "Test", "capability": [9, 0]}, {}, "", "")
for op in tuning.KERNELS:
    config = vars(registry.config_class(op)())
    group = 1 if op in ("expand", "grad_sb", "gemm", "decode") else 2
    key = tuning.Key(op, "bfloat16", "float32", 16, 512, 512, 16, group, group > 1)
    if op.startswith("experts"):
        key = key._replace(experts=8, top=2, grads="16 halves")
        key = key._replace(group=1, mask=False) if "grad" in op else key
    table.add([tuning.Entry(key, chosen.get(op), config, us)])
odd = {"block_m": 64, "block_n": 64, "block_k": 128, "tma": True, "num_warps": 4}
key = tuning.Key("gemm", "bfloat16", "float32", 2048, 512, 512, 16)
table.add([tuning.Entry(key, None, odd, us)])
table.add([tuning.Entry(tuning.Key("shrink", "bfloat16", "float32", 1, 0, 64, 8), None, None, us)])
whole = tuning.Key("forward", "bfloat16", "float32", 2048, 512, 512, 16)
table.add([tuning.Entry(whole, "fused", None, us)])  # nothing of its own to compile
table.save(tuning.path_for("Test", folder))
print(json.dumps({
    name: [specify(c, name) for c in tuned_cases(TARGETS[name].arch, folder)]
    for name in ("sm_80", "sm_90")
} | {"ops": tuning.KERNELS}))
"""


@pytest.mark.slow
def test_configs_of_tuning_tables_are_compiled_for_their_architecture(tmp_path):
    done = python("-c", TUNED, str(tmp_path), cache=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert rows["sm_80"] == []
    assert all("key" in row for row in rows["sm_90"])
    assert {row["case"].split()[1] for row in rows["sm_90"]} == set(rows["ops"])
    assert not [r for r in rows["sm_90"] if " K64 " in r["case"]]  # keeps its default

    command = ["-m", "benchmarks.static", "--json", "--jobs", "1", "--tables", str(tmp_path)]
    done = python(*command, "--only", "sm_90 Test gemm M2048", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["matrix_bound"] and row["instructions"]["wgmma"] and row["warps"] == 4
    assert [row["config"][k] for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K")] == [64, 64, 128]

    (table,) = tmp_path.glob("device*.json")
    table.write_text(table.read_text().replace('"block_k": 128', '"block_q": 128'))
    done = python(*command, "--most", "0", cache=tmp_path)
    assert done.returncode == 2 and "block_q" in done.stderr and table.name in done.stderr


@pytest.mark.parametrize(
    "arch, warps, registers, shared, resident",
    [
        ("sm_90", 8, 128, 1000, 2),  # 65,536 registers
        ("sm_90", 4, 32, 100_000, 2),  # 228 KB of shared memory, 1 KB of it taken by each program
        ("sm_90", 8, 32, 0, 8),  # 2,048 threads
        ("sm_86", 1, 16, 0, 16),  # 16 programs
    ],
)
def test_occupancy_is_bounded_by_what_runs_out_first(arch, warps, registers, shared, resident):
    target = TARGETS[arch]
    row = {"warps": warps, "registers": registers, "shared": shared}
    assert occupancy(target, row) == resident * 32 * warps / target.threads


def test_interpreting_is_refused(tmp_path):
    code = "import os; os.environ['TRITON_INTERPRET'] = '1'; "
    code += "from benchmarks.static.run import main; main([])"
    done = python("-c", code, cache=tmp_path)
    assert done.returncode == 2 and "unset it" in done.stderr


def test_a_text_that_no_row_has_is_refused(tmp_path):
    done = python("-m", "benchmarks.static", "--only", "gemm dZ", cache=tmp_path)
    assert done.returncode == 2 and "--only gemm dZ: no row" in done.stderr


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/*.py")), ids=lambda p: p.name)
def test_kernels_are_a_leaf(path):
    """torch, Triton, the standard library and each other: nothing else, and never a package."""
    assert path.name != "__init__.py"
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2, f"{path.name} imports from outside kernels/"
            names = [node.module or ""] if node.level == 0 else []
        for name in names:
            top = name.split(".")[0]
            assert top in {"torch", "triton"} or top in sys.stdlib_module_names, name
