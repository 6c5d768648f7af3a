"""Train LoRA on all experts of a mixture, on the docstrings of this Python.

    python examples/mixture.py [--model PATH] [--steps N] [--out DIR]

Without --model a small Qwen3-MoE is made at random, and trained in seconds on a CPU core.
"""

import argparse
import ast
import pathlib

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, Qwen3MoeConfig

from peftkern import LoraConfig, explain, get_peft_model

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="folder of a mixture and its tokenizer")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", default="runs/mixture", help="folder for the adapter")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

texts, kinds = [], ast.Module | ast.ClassDef | ast.FunctionDef
for path in sorted(pathlib.Path(ast.__file__).parent.glob("[a-d]*.py")):
    nodes = ast.walk(ast.parse(path.read_bytes()))
    texts += filter(None, (ast.get_docstring(n) for n in nodes if isinstance(n, kinds)))
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
else:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_experts": 16, "num_experts_per_tok": 4, "initializer_range": 0.1}
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(vocab_size=512, **sizes, **experts))
    model = model.to(device)
    tokenizer = GPT2Tokenizer().train_new_from_iterator(texts, vocab_size=512, show_progress=False)
ids = tokenizer("\n\n".join(texts), return_tensors="pt")["input_ids"][0].to(device)
held_out, *batches = ids[: len(ids) // 512 * 512].view(-1, 4, 128)  # 4 rows of 128 tokens each

experts = {"target_parameters": "all-experts"}  # their names are looked up
config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **experts)
model = get_peft_model(model, config)
model.print_trainable_parameters()
print(explain(model))  # each adapted layer, what runs it, and why
with torch.no_grad():
    before = model(input_ids=held_out, labels=held_out).loss
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(args.steps):
    loss = model(input_ids=(batch := batches[step % len(batches)]), labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step:2}: loss {loss.item():.3f}")
with torch.no_grad():
    after = model(input_ids=held_out, labels=held_out).loss
print(f"loss on held-out text: {before:.3f} -> {after:.3f}")
model.save_pretrained(args.out)  # the experts by their parameters' names, as HF PEFT reads them
