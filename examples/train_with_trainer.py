"""Train LoRA with transformers' Trainer.

    python examples/train_with_trainer.py [--model PATH] [--out DIR]

Without --model a tiny random model is trained, in seconds on a CPU and without a network.
"""

import argparse
import statistics

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GPT2Tokenizer,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

from peftkern import LoraConfig, explain, get_peft_model

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="folder of a causal language model and its tokenizer")
parser.add_argument("--out", default="runs/trainer", help="folder for checkpoints and the adapter")
args = parser.parse_args()

texts = statistics.__doc__.split("\n\n")  # real text that every Python has
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
else:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, intermediate_size=128, initializer_range=0.1, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    tokenizer = GPT2Tokenizer().train_new_from_iterator(texts, vocab_size=300, show_progress=False)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
rows = [tokenizer(text, truncation=True, max_length=64) for text in texts]

config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", lora_dropout=0.1)
model = get_peft_model(model, config)
print(str(explain(model)).splitlines()[-1])  # print(explain(model)): a line for each layer

cpu = not torch.cuda.is_available()
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        args.out, learning_rate=1e-3, max_steps=20, logging_steps=5, use_cpu=cpu
    ),
    train_dataset=rows[:-8],
    eval_dataset=rows[-8:],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
before = trainer.evaluate()["eval_loss"]
trainer.train()  # after a kill: trainer.train(resume_from_checkpoint=True)
print(f"loss on held-out text: {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f}")
trainer.save_model(args.out)  # the adapter alone
