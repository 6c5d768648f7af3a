"""Ring 3 over everything that ships, for six architectures.

That is every kernel, case and config of a shipped tuning table. Results are the committed ones, of
which a sample is compiled anew.
"""

import ast
import json

import pytest
import triton

from tests.kernels.compiler import RESULTS, ROOT, python

SHARED = {  # bytes a program may have
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
}
MATRIX = {"sm_90": "wgmma", "sm_100": "tcgen05"}
SAMPLE = [
    "sm_80 shrink M128 r16 mask bf16/fp32",
    "sm_86 grad_sb M128 r16 bf16/fp32",
    "sm_89 expand Y r16 bf16/fp32",
    "sm_90 gemm dX r64 mask bf16/fp32",
    "sm_90 gemm Y r16 fp16/fp32",
    "sm_100 gemm Y M64 r16 bf16/fp32",
    "sm_120 decode M16 r16 bf16/bf16",
]
FACTS = (
    "warps", "registers", "spilled", "stack", "shared", "tensor_memory", "instructions",
    "loads", "stores", "products", "serialized",
)  # fmt: skip
COMMITTED = RESULTS / f"triton-{triton.__version__}.json"

# Minutes only for a Triton without committed results, which compiles them all, once.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The output of `python -m benchmarks.static --json`.

    With committed results nothing is compiled: after a change to the kernels this fails within
    seconds and names the command that renews them.
    """
    if COMMITTED.exists():
        options, cache = ["--most", "0"], tmp_path_factory.mktemp("empty")
    else:
        options, cache = [], None
    done = python("-m", "benchmarks.static", "--json", *options, cache=cache)
    if not done.stdout:
        pytest.fail(done.stderr, pytrace=False)
    return json.loads(done.stdout)


def shipped_kernels():
    """module.function of everything under kernels/ that is decorated with triton.jit."""
    found = set()
    for path in ROOT.glob("kernels/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for mark in getattr(node, "decorator_list", []):
                name = ast.unparse(mark.func if isinstance(mark, ast.Call) else mark)
                if name in ("triton.jit", "jit"):
                    found.add(f"{path.stem}.{node.name}")
    return found


@pytest.mark.long
def test_every_kernel_is_compiled_for_every_architecture(sweep):
    kernels = shipped_kernels()
    assert {"gemm._gemm_kernel", "bits._bits_kernel", "reduce._sum_kernel"} <= kernels
    compiled = {(row["arch"], row["kernel"]) for row in sweep["rows"]}
    lacking = {(arch, kernel) for arch in SHARED for kernel in kernels} - compiled
    assert not lacking, "add a case to its file in benchmarks/kernels/"


def test_nothing_failed_spills_or_exceeds_its_limits(sweep):
    assert sweep["failed"] == 0 and sweep["triton"] == triton.__version__
    assert len({(row["arch"], row["case"]) for row in sweep["rows"]}) == len(sweep["rows"])
    for row in sweep["rows"]:
        assert "error" not in row and "problem" not in row, row
        assert row["spilled"] == 0, row
        assert 8 < row["registers"] <= 255, row
        assert row["limit"] == SHARED[row["arch"]], row
        assert 0 <= row["shared"] <= row["limit"], row
        assert 0 <= row["tensor_memory"] <= 512, row
        assert 0 < row["occupancy"] <= 1 and row["stack"] >= 0, row
        assert row["warps"] == row["config"]["num_warps"], row


def test_products_use_the_matrix_instruction_and_the_copies_of_their_architecture(sweep):
    products = [r for r in sweep["rows"] if r["kernel"] == "gemm._gemm_kernel"]
    products = [r for r in products if " fp32/" not in r["case"]]  # exact: off the matrix units
    assert {r["arch"] for r in products} == set(SHARED)
    for row in [*products, *(r for r in sweep["rows"] if r["matrix_bound"])]:
        wanted = MATRIX.get(row["arch"], "mma")
        used = {"wgmma", "tcgen05", "mma"} & set(row["instructions"])
        assert used == {wanted}, row
    for row in products:
        fallback = "pointers" in row["case"]
        if row["arch"] in ("sm_90", "sm_100", "sm_120"):
            assert row["config"]["TMA"] != fallback, row
    descriptors = [r for r in sweep["rows"] if r["config"].get("TMA")]
    assert {r["arch"] for r in descriptors} == {"sm_90", "sm_100", "sm_120"}
    for row in descriptors:
        assert row["instructions"].get("cp.async.bulk.tensor"), row


def test_every_exemption_is_needed(sweep):
    assert sweep["unused"] == [], "the rule holds without it: take it out of exemptions.py"


def test_the_fused_product_is_persistent_pipelined_and_one_launch(sweep):
    """Y is written once, in the launch that makes it, with S and B in the same accumulator.

    As the last step on sm_90 and as the first on sm_100, where a product into an accumulator that
    has one in flight does not compile; masked ones come first everywhere.
    """
    large = [r for r in sweep["rows"] if r["kernel"] == "gemm._gemm_kernel"]
    large = [r for r in large if r["config"]["TMA"] and r["arch"] in MATRIX]
    assert {r["arch"] for r in large} == set(MATRIX) and len(large) > 20
    for row in large:
        assert row["products"] == 1 and not row["serialized"], row
        assert row["ahead"] == 2 and not row["exempt"], row
        assert row["config"]["LOW_FIRST"] == (row["arch"] == "sm_100" or " mask " in row["case"])
        assert set(row["stores"]) == ({"y", "v"} if " V " in row["case"] else {"y"}), row
        if " M64 " not in row["case"]:
            assert row["grid"] == [{"sm_90": 132, "sm_100": 148}[row["arch"]]], row
        assert not [r for r in sweep["rows"] if r["case"] == f"{row['case']} +1"], row


@pytest.mark.long
def test_committed_results_are_what_the_compiler_says_now(sweep, tmp_path):
    command = ["-m", "benchmarks.static", "--json", "--no-cache", "--jobs", "1", "--only", *SAMPLE]
    done = python(*command, cache=tmp_path)
    assert done.stdout, done.stderr
    again = json.loads(done.stdout)
    kept = {(r["arch"], r["case"]): r for r in sweep["rows"]}
    assert {f"{r['arch']} {r['case']}" for r in again["rows"]} >= set(SAMPLE)
    assert again["compiled"] >= len(SAMPLE)
    for row in again["rows"]:
        old = kept[row["arch"], row["case"]]
        assert {f: row[f] for f in FACTS} == {f: old[f] for f in FACTS}, row["case"]
