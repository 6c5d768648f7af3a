"""Ring 3's own proof: it compiles without a GPU, caches, and fails on what it should fail on."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, cache: Path) -> subprocess.CompletedProcess:
    """A process of its own: this one interprets kernels, that one compiles them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "PEFTKERN_CACHE": str(cache)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_a_case_compiles_for_sm_90_with_wgmma_and_the_repeat_is_cached(tmp_path):
    command = ["-m", "benchmarks.static", "--json", "--jobs", "1", "--arch", "sm_90"]
    command += ["--only", "gemm dX r16 mask fp16"]
    first = python(*command, cache=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    (row,) = json.loads(first.stdout)["rows"]
    assert row["spilled"] == 0 and 0 < row["shared"] <= row["limit"]
    assert row["instructions"]["wgmma"] and row["instructions"]["cp.async.bulk.tensor"]
    assert 16 < row["registers"] <= 255
    kept = json.loads((tmp_path / "static.json").read_text())
    (key,) = kept["rows"]
    kept["rows"][key]["registers"] = 7  # shows that the repeat reads the cache
    (tmp_path / "static.json").write_text(json.dumps(kept))
    second = python(*command, cache=tmp_path)
    assert json.loads(second.stdout)["rows"][0]["registers"] == 7


BAD = """
import torch
from benchmarks.static import TARGETS, measure
from benchmarks.static_cases import Case, meta
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


def test_too_much_shared_memory_spills_and_a_missing_instruction_are_problems(tmp_path):
    done = python("-c", BAD, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    shared, spills, instruction = done.stdout.strip().splitlines()[-3:]
    assert "over 232448" in shared
    assert spills.startswith("spills ")
    assert instruction == "no wgmma"


def test_interpreting_is_refused(tmp_path):
    code = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'; import benchmarks.static as s; s.main([])"
    )
    done = python("-c", code, cache=tmp_path)
    assert done.returncode == 2 and "unset it" in done.stderr


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
