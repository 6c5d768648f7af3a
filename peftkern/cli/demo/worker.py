"""One library's part of the demo, in a process of its own: ``python -m peftkern.cli.demo.worker``.

It reads one JSON object per line from stdin and answers each with one on stdout, so that the
coordinator (``run.py``) can let two workers take turns. All other output goes to stderr. The code
is the same for both libraries; only the name in ``import_module`` differs.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any

import torch

from ...utils.undo import in_mode
from ..encode import collator
from ..memory import PeakMeter


class Worker:
    """Holds the model, the optimizer and the batches of one library."""

    def load(self, job: dict[str, Any]) -> dict[str, Any]:
        """Read base model and data, and attach a new adapter (which is saved) or the saved one."""
        from ..modelio import hush_transformers

        hush_transformers()
        self.job = job
        self.provider: Any = importlib.import_module(job["provider"])
        torch.set_num_threads(job["threads"])
        with open(job["data"], encoding="utf-8") as f:
            data = json.load(f)
        collate = collator(data["pad"])
        size = job["batch_size"]
        self.batches = [
            {k: v.to(job["device"]) for k, v in collate(data["training"][i : i + size]).items()}
            for i in range(0, len(data["training"]), size)
        ]
        self.held = [
            collate(data["held_out"][i : i + size]) for i in range(0, len(data["held_out"]), size)
        ]
        torch.manual_seed(job["seed"])
        base = self._base()
        if job["create"]:
            config = self.provider.LoraConfig(**job["lora"])
            self.model = self.provider.get_peft_model(base, config)
            self.model.peft_config["default"].base_model_name_or_path = job["base_name"]
            self.save({"folder": job["initial"]})
        else:
            self.model = self._attach(base, job["initial"], trainable=True)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=job["lr"], weight_decay=0.0)
        self.step = 0
        self.memory = PeakMeter(job["device"])
        return {
            "version": self.provider.__version__,
            "trainable": sum(p.numel() for p in self.trained),
            "tensors": len(self.trained),
        }

    def held_out(self, job: dict[str, Any]) -> dict[str, float]:
        """Loss (and accuracy) on the held-out examples."""
        from ..engine import held_out

        return held_out(self.model, self.held, self.job["task"])

    def steps(self, job: dict[str, Any]) -> dict[str, Any]:
        """Train on the next ``count`` batches; returns loss, seconds and padded tokens of each."""
        if self.step == 0:
            self.model.train()
            self.memory.start()
        losses, seconds, tokens = [], [], []
        for _ in range(job["count"]):
            batch = self.batches[self.step]
            # so the base model's own dropout draws the same numbers in both libraries
            torch.manual_seed(self.job["seed"] + self.step)
            self._synchronize()
            start = time.perf_counter()
            loss = self.model(**batch).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            self._synchronize()
            seconds.append(time.perf_counter() - start)
            tokens.append(batch["input_ids"].numel())
            self.step += 1
        return {
            "losses": losses,
            "seconds": seconds,
            "tokens": tokens,
            "peak_mib": self.memory.peak_mib(),
            "memory_how": self.memory.how,
        }

    def generate(self, job: dict[str, Any]) -> dict[str, Any]:
        """Greedy continuations of lists of token ids, as lists of the new ids."""
        texts = []
        with in_mode(self.model, training=False):
            for ids in job["prompts"]:
                prompt = torch.tensor([ids], device=self.job["device"])
                out = self.model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=job["new_tokens"],
                    do_sample=False,
                    pad_token_id=job["pad"],
                )
                texts.append(out[0, prompt.shape[1] :].tolist())
        return {"ids": texts}

    def classify(self, job: dict[str, Any]) -> dict[str, Any]:
        """The label ids given to the first ``count`` held-out examples (of the first batch)."""
        return {"ids": self._held_logits()[: job["count"]].argmax(-1).tolist()}

    def save(self, job: dict[str, Any]) -> dict[str, Any]:
        """Save the adapter alone; without the embedding, the network is not asked about it."""
        self.model.save_pretrained(job["folder"], save_embedding_layers=False)
        return {}

    def logits(self, job: dict[str, Any]) -> dict[str, Any]:
        """Write the logits of the first held-out batch to ``file``.

        With ``reload`` the adapter is read from disk first.
        """
        from safetensors.torch import save_file

        if job.get("reload"):
            del self.optimizer, self.trained, self.model  # frees memory for the new base model
            self.model = self._attach(self._base(), job["reload"], trainable=False)
        logits = self._held_logits()
        save_file({"logits": logits}, job["file"])
        return {"shape": list(logits.shape)}

    @torch.no_grad()
    def _held_logits(self) -> torch.Tensor:
        batch = {k: v.to(self.job["device"]) for k, v in self.held[0].items() if k != "labels"}
        with in_mode(self.model, training=False):
            logits: torch.Tensor = self.model(**batch).logits.float().cpu().contiguous()
        return logits

    def _base(self) -> Any:
        from ..modelio import load_model

        names = self.job["label_names"]
        model = load_model(self.job["base"], self.job["task"], None, names)
        return model.to(self.job["device"])

    def _attach(self, base: Any, folder: str, trainable: bool) -> Any:
        model = self.provider.PeftModel.from_pretrained(base, folder, is_trainable=trainable)
        return model.to(self.job["device"])

    def _synchronize(self) -> None:
        if self.job["device"].startswith("cuda"):
            torch.cuda.synchronize()


def main() -> None:
    """Answer jobs until stdin ends; an error is sent as an answer and ends the process."""
    reply_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = getattr(worker, job.pop("do"))(job)
        except BaseException as error:
            reply_to.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
            reply_to.flush()
            raise
        reply_to.write(json.dumps(answer) + "\n")
        reply_to.flush()


if __name__ == "__main__":
    main()
