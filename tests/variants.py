"""One adapter of every variant of LoRA on a tiny Llama, in both libraries.

test_variant_contract.py tests everything that is the same for all variants.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftkern
from tests.tiny import make

# aLoRA's invocation: in the middle of the first row, twice in the second, cut off in the last
IDS = torch.tensor([[3, 4, 7, 9, 5, 6, 8], [7, 9, 3, 7, 9, 4, 5], [3, 4, 5, 6, 8, 9, 7]])
BATCH = {"input_ids": IDS, "labels": IDS}


@dataclass(frozen=True)
class Case:
    """A variant: what asks for it, and in what it differs from the others."""

    name: str  # as `explain` says it
    settings: dict[str, Any]
    options: str = ""  # the class that the setting holds
    targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj")
    stored: str = ""  # what an adapter has beside A and B, in a file
    fused: tuple[bool, bool] = (True, True)  # one operation in training, and outside it
    merges: bool = True
    mixes: bool = True  # rows of a batch may name it
    converts: bool = True  # into plain LoRA
    stacks: bool = True  # the difference of two is an adapter of twice the rank
    alone: bool = False  # it goes with no adapter of another kind
    low_in_peft: bool = True  # HF PEFT's `low_cpu_mem_usage` loads all of it

    @property
    def setting(self) -> str:
        return next(iter(self.settings))

    def config(self, library: Any, **settings: Any) -> Any:
        """The configuration of one of the libraries."""
        own = (
            {k: getattr(library, self.options)(**v) for k, v in self.settings.items()}
            if (self.options)
            else self.settings
        )
        found = {"r": 4, "lora_alpha": 12, "target_modules": list(self.targets), **own, **settings}
        return library.LoraConfig(task_type="CAUSAL_LM", **found)


_BLOCKS = {
    "target_modules_bd_a": ["o_proj", "down_proj"],
    "target_modules_bd_b": ["q_proj"],
    "nblocks": 2,
    "match_strict": False,
}
_VELORA = {"num_groups": 5, "scale": 0.7}  # which do not divide 16 inputs
_SAMPLES = {"num_samples": 3, "sample_scaler": 0.1, "use_entropy": True, "buffer_size": 2}
_BLOCKED = ("q_proj", "v_proj", "o_proj", "down_proj")

CASES = {
    "dora": Case(
        "DoRA",
        {"use_dora": True},
        targets=("embed_tokens", "q_proj", "v_proj", "down_proj"),
        stored="lora_magnitude_vector",
        converts=False,  # an embedding's
        stacks=False,
        mixes=False,
    ),
    "kasa": Case(
        "KaSA",
        {"kasa_config": {"beta": 0.5}},
        "KasaConfig",
        stored="lora_diag",
        converts=False,
        stacks=False,
        alone=True,
    ),
    "bdlora": Case(
        "BD-LoRA",
        {"use_bdlora": _BLOCKS},
        "BdLoraConfig",
        _BLOCKED,
        fused=(False,) * 2,
        stacks=False,
    ),
    "alora": Case(
        "aLoRA",
        {"alora_invocation_tokens": [7, 9]},
        fused=(False, False),
        merges=False,
        converts=False,
        stacks=False,
    ),
    **{
        f"velora_{kind}": Case(
            "VeLoRA",
            {"velora_config": {**_VELORA, "init_type": kind}},
            "VeloraConfig",
            stored="lora_velora_embed",
            fused=(False, True),
        )
        for kind in ("batch_average", "batch_average_once", "random")
    },
    "monteclora": Case(
        "MonteCLoRA",
        {"monteclora_config": _SAMPLES},
        "MontecloraConfig",
        stored="lora_monteclora_sampler",
        fused=(False, True),
        low_in_peft=False,
    ),
}


def models(case: Case, dtype: torch.dtype = torch.float64, **settings: Any) -> list[Any]:
    """[ours, theirs], each made from the same model and the same state of the random generator."""
    base, found = make("llama", dtype=dtype), []
    for library in (peftkern, peft):
        torch.manual_seed(0)
        config = case.config(library, **settings)
        found.append(library.get_peft_model(copy.deepcopy(base), config))
    return found


def two_layers(
    config_of: Callable[[Any], Any], dtype: torch.dtype | None = None, conv1d: bool = False
) -> list[Any]:
    """[ours, theirs] of two linear layers, the first with 16 inputs."""
    torch.manual_seed(0)
    first = Conv1D(12, 16) if conv1d else nn.Linear(16, 12)
    base, found = nn.Sequential(first, nn.Tanh(), nn.Linear(12, 8)).to(dtype), []
    for library in (peftkern, peft):
        torch.manual_seed(1)
        found.append(library.get_peft_model(copy.deepcopy(base), config_of(library)))
    return found
