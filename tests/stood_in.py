"""A program that calls ``peftkern.as_peft()`` and goes through other libraries' doors for adapters.

test_as_peft.py runs it in a process of its own, and reads what it found from the file that it is
given. ``--alone``: HF PEFT is not installed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

if "--alone" in sys.argv:
    _find = PathFinder.find_spec
    PathFinder.find_spec = classmethod(  # type: ignore[method-assign,assignment]
        lambda cls, name, *a, **k: None if name == "peft" else _find(name, *a, **k)
    )

import peftkern

if __name__ == "__main__":
    peftkern.as_peft()
    peftkern.as_peft()  # does nothing

import peft
import torch

from tests.models import build
from tests.trainers import ARGUMENTS, LORA, sentences, tokenizer

LIBRARIES = ("transformers", "trl", "accelerate", "sentence_transformers", "lm_eval", "diffusers")


def imported_from_peft() -> set[tuple[str, str]]:
    """(module, name) of each name of HF PEFT's in the sources of the libraries that are installed.

    Names are those of ``from peft.x import name`` and of ``peft.x.name`` after ``import peft``.
    """
    found: set[tuple[str, str]] = set()
    for library in LIBRARIES:
        spec = importlib.util.find_spec(library)
        for folder in (spec and spec.submodule_search_locations) or ():
            for file in Path(folder).rglob("*.py"):
                source = file.read_text(encoding="utf-8")
                if "peft" in source:
                    found |= names_in(ast.parse(source))
    return found


def names_in(tree: ast.AST) -> set[tuple[str, str]]:
    found = set()
    aliases = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            if (node.module or "").partition(".")[0] == "peft":
                found |= {(str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            aliases |= {a.asname or "peft" for a in node.names if a.name.split(".")[0] == "peft"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in aliases:
                found.add(("peft", node.attr))
    return found


def owners() -> dict[str, str | None]:
    """{"peft.x.name": the package that the object is of, or None where there is none}."""
    found: dict[str, str | None] = {}
    for module, name in sorted(imported_from_peft()):
        try:
            value = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            found[f"{module}.{name}"] = None
            continue
        origin = getattr(value, "__module__", None) or getattr(value, "__name__", "peftkern")
        found[f"{module}.{name}"] = origin.partition(".")[0]
    return found


def config(library: Any, task: str, **more: Any) -> Any:
    settings = {**LORA, "lora_dropout": 0.0, "init_lora_weights": "gaussian", **more}
    return library.LoraConfig(task_type=task, **settings)


def base(family: str, task: str | None) -> Any:
    torch.manual_seed(0)
    model = build(family, task).double()
    torch.manual_seed(1)
    return model


def fused(model: Any) -> tuple[int, int]:
    rows = peftkern.explain(model)
    return sum(row.fused for row in rows), len(rows)


def by_trl(out: str) -> tuple[Any, list[float]]:
    """(model, losses) of SFTTrainer, which makes the adapter itself."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=base("llama", "CAUSAL_LM"),
        args=SFTConfig(output_dir=out, max_steps=2, max_length=16, **ARGUMENTS),
        train_dataset=Dataset.from_dict({"text": sentences()}),
        processing_class=tokenizer(),
        peft_config=config(peft, "CAUSAL_LM"),
    )
    trainer.train()
    return trainer.model, losses(trainer)


def by_transformers(out: str) -> tuple[Any, list[float]]:
    """(model, losses) of ``add_adapter`` and Trainer."""
    import transformers

    model = base("llama", "CAUSAL_LM")
    model.add_adapter(config(peft, "CAUSAL_LM"), "mine")
    arguments = transformers.TrainingArguments(output_dir=out, max_steps=2, **ARGUMENTS)
    ids = tokenizer()(sentences())["input_ids"]
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    return model, losses(trainer)


def by_sentence_transformers(out: str) -> tuple[Any, list[float]]:
    """(model, some embeddings) of ``add_adapter`` and SentenceTransformerTrainer."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    base("bert", None).save_pretrained(f"{out}/bert")
    tokenizer().save_pretrained(f"{out}/bert")
    model = SentenceTransformer(f"{out}/bert", device="cpu", model_kwargs={"dtype": torch.float64})
    torch.manual_seed(1)
    model.add_adapter(config(peft, "FEATURE_EXTRACTION"))
    arguments = SentenceTransformerTrainingArguments(
        output_dir=out, max_steps=2, save_strategy="no", **ARGUMENTS
    )
    rows = {"a": sentences(), "b": sentences(seed=1), "score": [0.0, 1.0] * 4}
    data = Dataset.from_dict(rows)
    SentenceTransformerTrainer(model, arguments, data, loss=CosineSimilarityLoss(model)).train()
    return model, [float(x) for x in model.encode(sentences())[:, 0]]


def losses(trainer: Any) -> list[float]:
    return [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]


DOORS = {
    "trl": by_trl,
    "transformers": by_transformers,
    "sentence_transformers": by_sentence_transformers,
}


def other_methods(out: str) -> dict[str, Any]:
    """What comes of a method that peftkern has not."""
    loha = peft.LoHaConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(base("llama", "CAUSAL_LM"), loha)
    inside = base("llama", "CAUSAL_LM")
    inside.add_adapter(peft.LoHaConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(f"{out}/loha")
    ids = torch.arange(3, 9)[None]
    read = peft.PeftConfig.from_pretrained(f"{out}/loha")
    again = peft.PeftModel.from_pretrained(base("llama", "CAUSAL_LM"), f"{out}/loha")
    mixed = peft.get_peft_config({"peft_type": "IA3"})
    return {
        "made by": [type(x).__module__.split(".")[0] for x in (loha, model, read, again, mixed)],
        "pass for": [
            isinstance(loha, peft.PeftConfig),
            isinstance(model, peft.PeftModel),
            isinstance(again, peft.PeftModel),
            any(isinstance(m, peft.utils.ModulesToSaveWrapper) for m in model.modules()),
            sum(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in inside.modules())
            == 2,
        ],
        "passes for no LoRA": not isinstance(loha, peft.LoraConfig),
        "keys": len(peft.get_peft_model_state_dict(model)),
        "active": inside.active_adapters(),
        "same": torch.equal(model(ids).logits, again(ids).logits),
    }


def main(out: str) -> dict[str, Any]:
    found: dict[str, Any] = {"owners": owners()}
    if "--alone" in sys.argv:
        model = base("llama", "CAUSAL_LM")
        model.add_adapter(config(peft, "CAUSAL_LM"))
        made = peft.get_peft_model(base("llama", "CAUSAL_LM"), config(peft, "CAUSAL_LM"))
        from transformers.trainer_utils import unwrap_peft_model

        unwrapped = unwrap_peft_model(made) is made.get_base_model()
        return {**found, "fused": [fused(model), fused(made)], "unwrapped": unwrapped}
    for name, door in DOORS.items():
        model, numbers = door(out)
        found[name] = {
            "fused": fused(model),
            "numbers": numbers,
            "made by": sorted({type(m).__module__.split(".")[0] for m in adapters(model)}),
        }
    return {**found, "others": other_methods(out)}


def adapters(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "lora_A")]


if __name__ == "__main__":
    torch.save(main(sys.argv[1]), f"{sys.argv[1]}/found.pt")
