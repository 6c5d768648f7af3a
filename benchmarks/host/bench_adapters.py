"""Adding, switching, disabling and deleting adapters in a model of 32 layers.

In each layer 1 or 7 linears are adapted. Injecting and loading is in ``bench_setup.py``; targets
come from docs/goals.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from .llama import DEEP, LIBRARIES, LINEARS, adapt, build, lora_config
from .measure import OURS, PEFT, Work

# HF PEFT warns about deleted adapters, which does not matter here
pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = [["q_proj"], LINEARS]


@pytest.fixture(scope="module")
def base() -> Any:
    return build(DEEP)


def holders(base: Any, names: list[str], adapters: int = 2) -> dict[str, Any]:
    """Both libraries' models with adapters "default", "b", … of the same layers."""
    models = {}
    for library_name, library in LIBRARIES.items():
        model = adapt(library, base, lora_config(library, names))
        for name in "bcd"[: adapters - 1]:
            model.add_adapter(name, lora_config(library, names))
        models[library_name] = model
    return models


def trainable(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def count(names: list[str]) -> str:
    return f"{DEEP.layers * len(names)} adapters"


@pytest.mark.parametrize("names", NAMES, ids=len)
def test_add_adapter(compare: Callable[..., Any], base: Any, names: list[str]) -> None:
    works = {}
    for name, model in holders(base, names, adapters=1).items():
        config = partial(lora_config, LIBRARIES[name], names)
        works[name] = Work(
            lambda config, model=model: model.add_adapter("b", config),
            lambda config=config: (config(),),
            cleanup=lambda _, model=model: model.delete_adapter("b"),
        )
    compare(f"add_adapter, {count(names)}", works, target=1 / 3, note="r=8, hidden 256")


@pytest.mark.parametrize("names", NAMES, ids=len)
def test_set_adapter(compare: Callable[..., Any], base: Any, names: list[str]) -> None:
    models = holders(base, names)
    for turn in ("b", "default"):
        for model in models.values():
            model.set_adapter(turn)
        assert trainable(models[OURS]) == trainable(models[PEFT]) != set()

    def there_and_back(model: Any) -> None:
        model.set_adapter("b")
        model.set_adapter("default")

    works = {name: Work(partial(there_and_back, model)) for name, model in models.items()}
    compare(f"set_adapter twice, {count(names)}", works, target=1 / 3, note="of two adapters")


@pytest.mark.parametrize("names", NAMES, ids=len)
def test_disable_adapter(compare: Callable[..., Any], base: Any, names: list[str]) -> None:
    def within(model: Any) -> None:
        with model.disable_adapter():
            pass

    works = {name: Work(partial(within, model)) for name, model in holders(base, names).items()}
    compare(f"disable_adapter, {count(names)}", works, target=1 / 3, note="and enabled again")
