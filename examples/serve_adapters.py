"""Serve several adapters from one model: mixed batches, switching, and a hot swap.

    python examples/serve_adapters.py [--model PATH] [--adapters DIR DIR DIR]

Without --model a tiny random model answers; without --adapters three random ones are made for it.
"""

import argparse
import statistics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, LlamaConfig

from peftkern import LoraConfig, PeftModel, get_peft_model
from peftkern.utils.hotswap import hotswap_adapter

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="folder of a causal language model and its tokenizer")
parser.add_argument("--adapters", nargs=3, metavar="DIR", help="folders of LoRA adapters for it")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

texts = statistics.__doc__.split("\n\n")  # real text that every Python has
if args.model:
    base = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
else:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, intermediate_size=128, initializer_range=0.1, **sizes)
    base = AutoModelForCausalLM.from_config(config).to(device)
    tokenizer = GPT2Tokenizer().train_new_from_iterator(texts, vocab_size=300, show_progress=False)
if not args.adapters:  # random ones stand in for yours
    args.adapters = ["runs/serve/a", "runs/serve/b", "runs/serve/c"]
    for folder in args.adapters:
        made = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
        made.save_pretrained(folder)
        base = made.unload()

model = PeftModel.from_pretrained(base, args.adapters[0], adapter_name="a").eval()
model.load_adapter(args.adapters[1], adapter_name="b")
batch = tokenizer(["The mean is", "The mean is", "The mean is"], return_tensors="pt").to(device)
new = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}

names = ["a", "b", "__base__"]  # each row its own adapter; "__base__" is none
mixed = model.generate(**batch, adapter_names=names, **new)
for row, name in enumerate(names[:2]):
    model.set_adapter(name)  # one for all rows
    alone = model.generate(**batch, **new)
    text = tokenizer.decode(mixed[row], skip_special_tokens=True)
    print(f"{name}: {text!r}, the same alone: {mixed[row].equal(alone[row])}")

hotswap_adapter(model, args.adapters[2], adapter_name="a")  # c's weights in a's place
model.set_adapter("a")
swapped = model.generate(**batch, **new)
model.load_adapter(args.adapters[2], adapter_name="c")
loaded = model.generate(**batch, adapter_names=["c"] * 3, **new)
text = tokenizer.decode(loaded[0], skip_special_tokens=True)
print(f"c: {text!r}, the same swapped in for a: {swapped.equal(loaded)}")
