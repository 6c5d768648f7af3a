"""Fuse a model that HF PEFT made: peftkern computes, and all else stays HF PEFT's.

    python examples/fuse_hf_peft.py [--model PATH]

Without --model a tiny random model is trained, in seconds on a CPU and without a network.
"""

import argparse
import statistics

import peft  # HF PEFT itself
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, LlamaConfig

import peftkern

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="folder of a causal language model and its tokenizer")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

texts = statistics.__doc__.split("\n\n")  # real text that every Python has
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
else:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, intermediate_size=128, initializer_range=0.1, **sizes)
    model = AutoModelForCausalLM.from_config(config).to(device)
    tokenizer = GPT2Tokenizer().train_new_from_iterator(texts, vocab_size=300, show_progress=False)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
batch = tokenizer(texts[:8], padding=True, truncation=True, max_length=64, return_tensors="pt")
batch = batch.to(device)
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)  # -100: no loss

config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=0.1)
model = peft.get_peft_model(model, config)  # your code, as it is
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def loss_and_backward():
    optimizer.zero_grad()
    torch.manual_seed(1)  # the same dropout each time
    loss = model(**batch, labels=labels).loss
    loss.backward()
    return loss.item()


theirs = loss_and_backward()
peftkern.fuse(model)  # in place; with Trainer or TRL: callbacks=[peftkern.FuseCallback()]
print(peftkern.explain(model))  # each layer, what runs it, and why
print(f"before training: HF PEFT {theirs:.6f}, fused {loss_and_backward():.6f}")
for _ in range(20):
    optimizer.step()
    trained = loss_and_backward()
peftkern.unfuse(model)  # HF PEFT's own layers again
print(f"after 20 steps: fused {trained:.6f}, unfused {loss_and_backward():.6f}")
