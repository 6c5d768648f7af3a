"""Train LoRA in a loop of your own, save it, load it again, and merge it.

    python examples/train_loop.py [--model PATH] [--out DIR]

Without --model a tiny random model is trained, in seconds on a CPU and without a network.
"""

import argparse
import statistics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, LlamaConfig

from peftkern import LoraConfig, PeftModel, explain, get_peft_model

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="folder of a causal language model and its tokenizer")
parser.add_argument("--out", default="runs/loop", help="folder for the adapter")
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

config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", lora_dropout=0.1)
model = get_peft_model(model, config)
model.print_trainable_parameters()
print(explain(model))  # each adapted layer, what runs it, and why

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for step in range(20):
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step:2}: loss {loss.item():.3f}")

model.eval()
model.save_pretrained(args.out)  # as HF PEFT writes it
with torch.no_grad():
    wanted = model(**batch).logits
    loaded = PeftModel.from_pretrained(model.unload(), args.out)  # onto the bare base model
    again = loaded(**batch).logits
    merged = loaded.merge_and_unload()  # the base model, the adapter in its weights
    apart = (merged(**batch).logits - wanted).abs().max()
print(f"{args.out}, loaded again: the same outputs: {torch.equal(wanted, again)}")
print(f"merged into the weights: outputs within {apart:.1e}")
