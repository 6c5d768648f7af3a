"""The worked example of docs/extending.md, in a copy of the checkout.

It adds three files, and then everything that reads the table of kernels has the new kernel.
"""

import json
import re
import shutil

import pytest

from tests import children
from tests.children import ROOT

LINE = "kernels/registry.py"
GUIDE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def pieces():
    """{file: the block of code that the guide gives for it}."""
    found = re.findall(r"`([\w/]+\.py)`:\n\n```python\n(.*?)```\n", GUIDE, re.DOTALL)
    return dict(found)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A checkout with the example's kernel in it."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("peftkern", "kernels", "benchmarks", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    added = pieces()
    assert len(added) == 3 and LINE in added
    for name, text in added.items():
        if name == LINE:
            registry = (root / name).read_text()
            assert registry.count('    "bits": {},\n') == 1
            text = registry.replace('    "bits": {},\n', '    "bits": {},\n' + text)
        else:
            assert not (root / name).exists()
        (root / name).write_text(text)
    return root


def run(copy, *arguments, interpret=False):
    own = {
        "PEFTKERN_CACHE": str(copy / "cache"),
        **({"TRITON_INTERPRET": "1"} if interpret else {}),
    }
    done = children.python(*arguments, root=copy, without=("TRITON", "PEFTKERN"), **own)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_it_is_compiled_for_every_architecture(copy):
    out = run(copy, "-m", "benchmarks.static", "--json", "--jobs", "1", "--only", "scale_rows")
    rows = json.loads(out)["rows"]
    assert {row["case"] for row in rows} == {"scale_rows bf16"} and len(rows) == 6
    assert {row["kernel"] for row in rows} == {"scale_rows._scale_rows_kernel"}


@pytest.mark.long
def test_it_is_among_the_cases_of_the_race(copy):
    listed = run(copy, "-m", "benchmarks.gpu", "--part", "race", "--list")
    assert "scale_rows m=8192 n=0 k=4096 r=0" in listed


COUNT = """
import json
from pathlib import Path
from benchmarks.gpu import counters
from benchmarks.kernels.table import traffic
from benchmarks.static.cases import cases, tuned_cases
from peftkern.kernels import registry, tuning
from peftkern.kernels.common import Arch
arch = Arch(132, 90, 232448)
(case,) = [c for c in cases(arch) if c.name.startswith("scale_rows")]
key = tuning.Key("scale_rows", "bfloat16", "float32", 2048, 0, 512, 0)
config = {"block_m": 32, "block_k": 64}
us = dict.fromkeys(("p20", "p50", "p80"), 1.0)
table = tuning.Table({"name": "Test", "capability": [9, 0]}, {}, "", "")
table.add([tuning.Entry(key, None, config, us)])
table.save(tuning.path_for("Test", Path("tables")))
(tuned,) = tuned_cases(arch, Path("tables"))
counted = [t.name for t in counters.launch_all("cpu", 40, 64)]
print(json.dumps([traffic(case.launch), tuned.launch.meta["BLOCK_K"], counted]))
"""


@pytest.mark.long
def test_it_is_counted_and_its_configs_stand_in_tables(copy):
    traffic, block_k, counted = json.loads(run(copy, "-c", COUNT, interpret=True))
    M, K = 8192, 4096
    name, launches, read, written, flops, unit, requested = traffic
    assert (name, launches, unit) == ("scale_rows", 1, "fp32")
    assert (read, written, flops) == (2 * M * K + 4 * M, 2 * M * K, M * K)
    assert requested == 2 * M * K + 4 * M * K // 128
    assert block_k == 64 and "scale_rows" in counted


@pytest.mark.long
def test_its_results_are_tested_by_the_tests_of_the_table(copy):
    wanted = ["scale_rows", "test_every_kernel_stands_in_the_table"]
    out = run(
        copy, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider",
        "tests/kernels/test_kernel_table.py", "-k", " or ".join(wanted), interpret=True,
    )  # fmt: skip
    assert "4 passed" in out, out


@pytest.mark.long
def test_what_it_computes_wrongly_is_seen(copy, tmp_path):
    """The same with a kernel that forgets its numbers."""
    root = tmp_path / "wrong"
    shutil.copytree(copy, root)
    kernel = root / "kernels" / "scale_rows.py"
    text = kernel.read_text()
    assert text.count("xs.to(tl.float32) * factor[:, None]") == 1
    kernel.write_text(text.replace("xs.to(tl.float32) * factor[:, None]", "xs.to(tl.float32)"))
    with pytest.raises(AssertionError, match="1 failed"):
        run(
            root, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider",
            "tests/kernels/test_kernel_table.py", "-k", "float64 and scale_rows", interpret=True,
        )  # fmt: skip
