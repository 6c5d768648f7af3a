"""Prefix tuning: train, save, load, generate.

    python examples/prefix_tuning.py [--model PATH] [--out DIR]

Without --model a tiny random model is trained, in seconds on a CPU and without a network.
"""

import argparse
import statistics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, LlamaConfig

from peftkern import PeftModel, PrefixTuningConfig, explain, get_peft_model

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="folder of a causal language model and its tokenizer")
parser.add_argument("--out", default="runs/prefix", help="folder for the prefix")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
texts = statistics.__doc__.split("\n\n")  # real text that every Python has
if args.model:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
else:
    tokenizer = GPT2Tokenizer().train_new_from_iterator(texts, vocab_size=300, show_progress=False)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def load_base():
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model).to(device)
    torch.manual_seed(0)  # the same random weights each time
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, intermediate_size=128, initializer_range=0.1, **sizes)
    return AutoModelForCausalLM.from_config(config).to(device)


batch = tokenizer(texts[:8], padding=True, truncation=True, max_length=64, return_tensors="pt")
batch = batch.to(device)
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)  # -100: no loss

model = get_peft_model(load_base(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8))
model.print_trainable_parameters()
print(explain(model))  # how the attention of each layer gets its prefix

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
for step in range(20):
    loss = model(**batch, labels=labels).loss  # the mask is that of your tokens alone
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step:2}: loss {loss.item():.3f}")

model.eval().save_pretrained(args.out)  # as HF PEFT writes it
loaded = PeftModel.from_pretrained(load_base(), args.out).eval()
prompt = tokenizer("Basic", return_tensors="pt").to(device)
ours, again = (m.generate(**prompt, max_new_tokens=16, do_sample=False) for m in (model, loaded))
print(f"generated: {tokenizer.decode(ours[0], skip_special_tokens=True)!r}")
print(f"{args.out}, loaded again: generates the same: {torch.equal(ours, again)}")
