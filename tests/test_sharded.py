"""Two processes that share a model's weights train as one process does."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import sharded
from tests.children import python
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.sharded import Case

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
)

Found = list[dict[tuple[str, str], Any]]  # {case: what was found} of each process


def run(folder: Path, part: str) -> Found:
    done = python("-m", "tests.sharded", str(folder), part)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(sharded.RANKS)]


@pytest.fixture(scope="module")
def headline(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run(tmp_path_factory.mktemp("sharded"), "headline")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run(tmp_path_factory.mktemp("sharded"), "all")


alone = functools.cache(sharded.alone)


def check(case: Case, found: Found) -> None:
    exact = alone(case.method)
    for of_rank in found:
        here = of_rank[tuple(case)]
        assert isinstance(here, dict), here
        ours = here["peftkern"]
        want = {key: exact[key] for key in ours}
        assert len(want) >= len(exact) / 2
        if case.narrow:
            assert_as_good_as_torch(ours, {key: here["peft"][key] for key in ours}, want)
        else:
            assert_same_number(ours, want)
    first, second = (of_rank[tuple(case)]["peftkern"] for of_rank in found)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.long
@pytest.mark.parametrize("case", sharded.HEADLINE, ids=", ".join)
def test_two_processes_are_as_one(case: Case, headline: Found) -> None:
    check(case, headline)


@pytest.mark.slow
@pytest.mark.parametrize("case", sharded.ALL, ids=", ".join)
def test_the_table(case: Case, table: Found) -> None:
    check(case, table)
