"""Putting adapters into a model of 32 layers x 7 linears, and loading them from a file."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .llama import DEEP, LIBRARIES, LINEARS, adapt, build, equalise, lora_config, share, tokens
from .measure import BARE, OURS, PEFT, Work, check_equal

COUNT = DEEP.layers * len(LINEARS)
# HF PEFT warns about models with two adapters, which does not matter here
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base() -> Any:
    return build(DEEP)


@pytest.fixture(scope="module")
def saved(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """A checkpoint written by HF PEFT, and the logits of the model that wrote it."""
    models = {n: adapt(lib, base, lora_config(lib, LINEARS)) for n, lib in LIBRARIES.items()}
    equalise(models[PEFT], models[OURS])
    path = tmp_path_factory.mktemp("adapter")
    models[PEFT].save_pretrained(path)
    with torch.no_grad():
        yield path, models[PEFT].eval()(tokens(DEEP, 1, 8)).logits


@pytest.mark.parametrize("targets", [LINEARS, "all-linear"], ids=["names", "all-linear"])
def test_injection(compare: Callable[..., Any], base: Any, targets: Any) -> None:
    ids = tokens(DEEP, 1, 8)
    with torch.no_grad():
        # B starts at zero, so that a new adapter does not change the output
        expected = base(ids).logits
        for library in LIBRARIES.values():
            model = adapt(library, base, lora_config(library, targets)).eval()
            assert sum("lora_A" in name for name, _ in model.named_parameters()) == COUNT
            check_equal("logits", model(ids).logits, expected)

    def prepare(library: Any) -> tuple[Any, Any]:
        return share(base), lora_config(library, targets)

    compare(
        f"inject {COUNT} adapters, {'7 names' if targets == LINEARS else targets}",
        {name: Work(lib.get_peft_model, partial(prepare, lib)) for name, lib in LIBRARIES.items()},
        target=1 / 3,
        note="get_peft_model on a Llama of 32 layers, hidden 256, r=8",
    )


def test_from_pretrained(compare: Callable[..., Any], base: Any, saved: tuple[Path, Any]) -> None:
    path, expected = saved
    works = {BARE: Work(partial(load_file, path / "adapter_model.safetensors"))}
    for name, library in LIBRARIES.items():

        def run(model: Any, load: Any = library.PeftModel.from_pretrained) -> Any:
            return load(model, path)

        works[name] = Work(run, lambda: (share(base),))
        with torch.no_grad():
            logits = run(share(base)).eval()(tokens(DEEP, 1, 8)).logits
        check_equal("logits", logits, expected)
    compare(
        f"from_pretrained, {COUNT} adapters",
        works,
        note="bare: safetensors reads the file; r=8, hidden 256",
    )


def test_load_adapter(compare: Callable[..., Any], base: Any, saved: tuple[Path, Any]) -> None:
    path, expected = saved
    works = {BARE: Work(partial(load_file, path / "adapter_model.safetensors"))}
    for name, library in LIBRARIES.items():
        model = adapt(library, base, lora_config(library, LINEARS)).eval()

        def forget(_: Any, model: Any = model) -> None:
            model.set_adapter("default")
            model.delete_adapter("other")

        works[name] = Work(partial(model.load_adapter, path, "other"), cleanup=forget)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.load_adapter(path, "other")
            model.set_adapter("other")
            check_equal("logits", model(tokens(DEEP, 1, 8)).logits, expected)
        forget(None)
    compare(
        f"load_adapter beside another, {COUNT} adapters",
        works,
        note="bare: safetensors reads the file; r=8, hidden 256",
    )
