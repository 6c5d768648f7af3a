"""Two processes that have different adapters, in each way that people share a model out.

``python -m tests.agreement FOLDER`` forks two processes, which run all cases in one group and save
the errors that they got.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn

import peftkern
from peftkern.model import wrapping
from tests import dying, models, ranks, tp
from tests.sharded import FP64, WAYS

RANKS = 2
# transformers shards weights as DTensors since 5.17; no older one than this was tried
TRIED = Version(transformers.__version__) >= Version("5.23")
SHOWN = (
    "check_ranks",
    "ddp",
    "fsdp2, layers",
    "fsdp2, root",
    "fsdp1, layers",
    "fsdp1, our policy, flat",
)
_LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
# {what differs: (the first rank's settings, the second's, what the error says)}
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "rank": ({"r": 4}, {"r": 8}, "`r` of 'default': 4 on rank 0, 8 on rank 1"),
    "scale": ({}, {"lora_alpha": 16}, "`lora_alpha` of 'default': 8 on rank 0, 16 on rank 1"),
    "targets": (
        {},
        {"target_modules": ["o_proj"]},
        "`target_modules` of 'default': ['q_proj'] on rank 0, ['o_proj'] on rank 1",
    ),
    "one has another": (
        {},
        {"names": ["other"]},
        "the adapters: ['default'] on rank 0, ['default', 'other'] on rank 1",
    ),
    "active": (
        {"names": ["other"]},
        {"names": ["other"], "active": "other"},
        "the active adapters: ['default'] on rank 0, ['other'] on rank 1",
    ),
    "what trains": (
        {},
        {"frozen": "layers.1."},
        "what trains of `base_model.model.model.layers.1.self_attn.q_proj.lora_A.default",
    ),
    "method": (
        {},
        {"prompt": True},
        "the method of 'default': 'LORA' on rank 0, 'PROMPT_TUNING' on rank 1",
    ),
    # FSDP2 tells nobody of a model without adapters
    "one has none": ({}, {"none": True}, "the adapters: ['default'] on rank 0, [] on rank 1"),
}
CASES = [
    (way, what)
    for way in SHOWN
    for what in DIFFERENT
    if not (way.startswith("fsdp2") and what == "one has none")
    # a flat parameter is trained in full
    and not (way.endswith("flat") and what == "what trains")
]


_OWN = ("names", "active", "frozen", "folder")


def model_of(settings: dict[str, Any]) -> Any:
    base = models.build("llama").to(FP64)
    if settings.get("none"):
        return base
    if settings.get("prompt"):
        prompt: Any = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
        return peftkern.get_peft_model(base, peftkern.PromptTuningConfig(**prompt)).to(FP64)
    own = {k: v for k, v in settings.items() if k not in _OWN}
    config = peftkern.LoraConfig(**{**_LORA, **own})
    model = peftkern.get_peft_model(base, config)
    for name in settings.get("names", ()):
        model.add_adapter(name, peftkern.LoraConfig(**{**_LORA, **own}))
    model.set_adapter(settings.get("active", "default"))
    for name, p in model.named_parameters():
        if settings.get("frozen", "-") in name:
            p.requires_grad_(False)
    # each machine may have the base model elsewhere
    model.peft_config["default"].base_model_name_or_path = settings.get("folder")
    return model.to(FP64)


def step(model: Any) -> None:
    ids = torch.arange(18).view(2, 9)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def error_of(way: str, settings: dict[str, Any]) -> str:
    """The error of a first step, or "": then the next ones are done as well."""
    try:
        model = model_of(settings).train()
        if way == "check_ranks":
            peftkern.check_ranks(model)
        else:
            model = WAYS[way](model)
        step(model)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    step(model)
    assert not hooks(model)
    return ""


def hooks(model: nn.Module) -> list[Any]:
    """What is left of the comparison in a model that has been called."""
    return [
        hook
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if getattr(hook, "__module__", "") == wrapping.__name__
    ]


def alone(rank: int) -> None:
    """What one rank may do by itself without waiting for the others, and without an error."""
    if rank == 0:
        model = model_of({"r": 2})
        model.add_adapter("evaluated", peftkern.LoraConfig(**_LORA))
        step(model)
        with torch.no_grad():
            model.eval()(input_ids=torch.arange(4).view(1, 4))


def parallel(rank: int, folder: Path) -> dict[Any, str]:
    """The errors of adapters that differ under tensor parallelism, and of saves that do.

    Each is raised before anything is changed, sent or written.
    """
    found: dict[Any, str] = {}
    base = tp.llama(folder / "llama", True)
    before = {n: id(m) for n, m in base.named_modules()}

    def tried(what: str, act: Callable[[], Any]) -> None:
        try:
            act()
            found["parallel", what] = ""
        except (ValueError, RuntimeError) as error:
            found["parallel", what] = f"{type(error).__name__}: {error}"

    def add(name: str = "default", **settings: Any) -> None:
        peftkern.get_peft_model(base, peftkern.LoraConfig(**{**_LORA, **settings}), name)

    prompt: Any = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2 + rank}
    tried("scale", lambda: add(lora_alpha=8 * (rank + 1)))
    tried("name", lambda: add(f"of {rank}"))
    # the second rank asks for what cannot be had
    tried("refused", lambda: add(target_modules=["q_proj"] if rank == 0 else ["nothing"]))
    tried("prompt", lambda: peftkern.get_peft_model(base, peftkern.PrefixTuningConfig(**prompt)))
    assert {n: id(m) for n, m in base.named_modules()} == before
    model = peftkern.get_peft_model(base, peftkern.LoraConfig(**_LORA))
    other = {"lora_alpha": 8 * (rank + 1)}
    tried("added", lambda: model.add_adapter("other", peftkern.LoraConfig(**{**_LORA, **other})))
    assert list(model.peft_config) == ["default"]

    def save(**how: Any) -> None:
        model.save_pretrained(folder / "saved", **how)

    tried("saved", save)
    written = sorted(path.name for path in (folder / "saved").iterdir())
    tried("unknown", lambda: save(selected_adapters=None if rank == 0 else ["nobody"]))
    model.peft_config["default"].lora_alpha += rank  # a user may edit it
    tried("edited", save)
    assert sorted(path.name for path in (folder / "saved").iterdir()) == written
    return found


def run(rank: int, folder: Path) -> dict[Any, Any]:
    logging.disable(logging.WARNING)  # of FSDP1 on a CPU
    found: dict[Any, Any] = {}
    for way, what in CASES:
        found[way, what] = error_of(way, DIFFERENT[what][rank])
    alone(rank)
    for way in SHOWN:  # the group is as good as before
        found[way, "same"] = error_of(way, {"folder": f"on rank {rank}"})
    return found | (parallel(rank, folder) if TRIED else {})


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    tp.save_llama(folder / "llama")
    together = os.fork()
    if together == 0:
        ranks.fork(folder, RANKS, lambda rank: run(rank, folder))
    dying.run(folder)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(together, 0)[1]))
