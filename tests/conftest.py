"""Marks the numeric tests, selects those of `make quick`, and makes every test reproducible."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="of each parametrised test the first case alone, and none that is marked long",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        module = getattr(item, "module", None)
        names = vars(module).values() if module is not None else ()
        # a module that imports from closeness.py compares numbers
        if any(getattr(x, "__module__", "") == "tests.closeness" for x in names):
            item.add_marker(pytest.mark.numeric)
    if config.getoption("--quick"):
        _keep_the_first_of_each(config, items)


def _keep_the_first_of_each(config: pytest.Config, items: list[pytest.Item]) -> None:
    seen: set[str] = set()
    kept, rest = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        # a case that another marker leaves out does not count as the first
        out = any(item.get_closest_marker(name) for name in ("long", "slow", "gpu"))
        (rest if out or test in seen else kept).append(item)
        if not out:
            seen.add(test)
    items[:] = kept
    config.hook.pytest_deselected(items=rest)


def pytest_collection_finish() -> None:
    """Exclude all objects made by imports from garbage collection.

    Otherwise each collection visits millions of them again: 0.9 s in every run of transformers'
    Trainer, which collects at its end.
    """
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed torch before each test, so that its numbers do not depend on earlier tests."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    import torch.distributed as dist

    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both libraries compute in float64 everything that their code casts to fp32."""
    import io

    import torch

    from peftkern.tuners.lora import inits

    file = io.BytesIO()  # torch keeps tables of its dtypes once they are made, which must be whole
    torch.save(torch.zeros(1), file)
    torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    half_or_single = (torch.float64, torch.float16, torch.bfloat16)
    monkeypatch.setattr(inits, "HALF_OR_SINGLE", half_or_single)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture
def in_double(doubled: None) -> Iterator[None]:
    """Let numbers that are drawn in torch's default dtype, as MonteCLoRA's are, be float64 too."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The activations of the MLPs that were computed as one operation."""
    from peftkern.tuners.lora import mlp

    found: list[str] = []
    real = mlp.lora_mlp
    monkeypatch.setattr(mlp, "lora_mlp", lambda x, *a: found.append(a[3]) or real(x, *a))
    return found
