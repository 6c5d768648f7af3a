"""The model and data of the trainer tests: a tiny Llama and a few lines of words, without files."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import peftkern
from tests.models import VOCAB
from tests.tiny import fill, make

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
ARGUMENTS = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_steps": 2,
    "use_cpu": True,
    "report_to": [],
    "seed": 3,
    "disable_tqdm": True,
    "bf16": False,  # TRL's default is True
}
# what TrainingArguments calls it: "gradient" in older versions of transformers
_NEW = "activation_checkpointing" in transformers.TrainingArguments.__dataclass_fields__
CHECKPOINTING = "activation_checkpointing" if _NEW else "gradient_checkpointing"


def tokenizer() -> Any:
    """One token a word: "w3" is token 3, and so on."""
    words = {f"w{i}": i for i in range(3, VOCAB)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def sentences(count: int = 8, length: int = 6, seed: int = 0) -> list[str]:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, VOCAB, (count, length), generator=g)
    return [" ".join(f"w{int(i)}" for i in row) for row in rows]


def theirs(dtype: torch.dtype = torch.float64, **lora: Any) -> Any:
    """HF PEFT's model, with random numbers in A and B."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{**LORA, **lora})
    model = peft.get_peft_model(make("llama", dtype=dtype), config)
    fill(model)
    return model


def ours(dtype: torch.dtype = torch.float64, **lora: Any) -> Any:
    """The same of peftkern."""
    config = peftkern.LoraConfig(task_type="CAUSAL_LM", **{**LORA, **lora})
    model = peftkern.get_peft_model(make("llama", dtype=dtype), config)
    fill(model)
    return model


def losses(trainer: Any, resume: Any = None) -> list[float]:
    """Train, and return the loss of each step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return logged(trainer, "loss")


def logged(trainer: Any, key: str) -> list[float]:
    return [float(row[key]) for row in trainer.state.log_history if key in row]


def adapter(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the adapter's weights."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """The same tensors, bit for bit."""
    assert found.keys() == wanted.keys() and found
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
