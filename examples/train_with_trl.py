"""Train LoRA with TRL's SFTTrainer (pip install trl).

    python examples/train_with_trl.py [--model PATH] [--out DIR]

Without --model a tiny random model is trained, in seconds on a CPU and without a network. TRL tells
the hub that it is used, unless HF_HUB_DISABLE_TELEMETRY=1 is set.
"""

import argparse
import statistics

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, LlamaConfig
from trl import SFTConfig, SFTTrainer

from peftkern import LoraConfig, explain, get_peft_model

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="folder of a causal language model and its tokenizer")
parser.add_argument("--out", default="runs/trl", help="folder for checkpoints and the adapter")
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

config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", lora_dropout=0.1)
model = get_peft_model(model, config)
model.print_trainable_parameters()
print(str(explain(model)).splitlines()[-1])  # print(explain(model)): a line for each layer

cuda = torch.cuda.is_available()
trainer = SFTTrainer(
    model=model,  # with peft_config= TRL would build HF PEFT's own model: see fuse_hf_peft.py
    args=SFTConfig(
        output_dir=args.out,
        learning_rate=1e-3,
        max_length=64,
        max_steps=20,
        logging_steps=5,
        bf16=cuda,
        use_cpu=not cuda,
    ),
    train_dataset=Dataset.from_dict({"text": texts[:-8]}),
    eval_dataset=Dataset.from_dict({"text": texts[-8:]}),
    processing_class=tokenizer,
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"loss on held-out text: {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f}")
trainer.save_model(args.out)  # the adapter alone
