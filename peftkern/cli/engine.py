"""``AdapterTrainer``: transformers' Trainer that saves and loads adapters alone.

Trainer itself does this only for instances of ``peft.PeftModel``, that is when HF PEFT is
installed; without it, Trainer writes and reads the whole model. This subclass always saves adapters
alone.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback

from ..files.atomic import write_atomically
from ..files.base_names import written_to_be_moved
from ..utils.private import leave_out_of_ddp
from ..utils.undo import in_mode
from . import resume, shards
from .encode import target_count, token_count
from .errors import RunError, UserError
from .pace import Pace
from .ranks import ALONE, Ranks
from .shares import IDLE, Examples, Shares, marking

# in a checkpoint, all that is trained where the adapter's file holds what a network computes of it
NETWORK = "trained.safetensors"


class AdapterFiles(Trainer):  # type: ignore[misc]  # transformers is not read
    """What a Trainer (transformers' or TRL's) of a ``PeftModel`` does otherwise here.

    Its checkpoints hold no base weights, and its examples are those of :class:`.Shares`.
    ``identity`` and ``notes`` (JSON values) go into the manifest of each checkpoint. The newest
    ``keep`` complete checkpoints stay on disk. Of several processes (``ranks``) the first one
    writes. A model whose parameters :func:`.shards.shard` has divided is ``sharded``; the adapter
    of the checkpoint that it goes on from is in it already.
    """

    rows_per_example = 1  # of a batch
    counts_targets = False  # True: the loss is scaled by their number; else Trainer does it

    def __init__(
        self,
        *args: Any,
        identity: dict[str, Any],
        notes: dict[str, Any],
        keep: int,
        ranks: Ranks,
        sharded: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._sharded = sharded
        if sharded:
            # without DistributedDataParallel: the model has FSDP's hooks
            alone = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
            self.accelerator.prepare_model = alone
        self.remove_callback(PrinterCallback)
        self.pace = Pace(self.args.device.type == "cuda")
        self.add_callback(self.pace)
        self._identity, self._notes, self._keep = identity, notes, keep
        self._ranks = ranks
        self._run_dir: str | None = None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This process's share of the examples, in an order that seed and epoch determine."""
        examples, ranks = self.train_dataset, self._ranks
        size, seed = self.args.per_device_train_batch_size, self.args.seed
        shares = Shares(len(examples), size, ranks.index, ranks.count, seed)
        updates = -(-len(shares) // self.args.gradient_accumulation_steps)
        self.add_callback(_NextEpoch(shares, updates))
        return DataLoader(
            Examples(examples),
            batch_sampler=shares,
            collate_fn=marking(self.data_collator),
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: Any
    ) -> tuple[list[dict[str, torch.Tensor]], Any]:
        """As Trainer's; counts what the optimizer step is of."""
        self.pace.begins()
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self.count(batches, items)

    def count(self, batches: list[dict[str, Any]], items: Any) -> Any:
        """Count the tokens and examples of this step; return the number of its targets."""
        counted = [batch for batch in batches if IDLE not in batch]
        tokens = sum(map(token_count, counted))
        examples = sum(len(batch["input_ids"]) for batch in counted) // self.rows_per_example
        own = sum(self._targets(batch) for batch in batches)
        targets, *held = self._ranks.sum(own, tokens, examples)
        self.pace.holds(*map(int, held))
        return int(targets) if self.counts_targets else items

    def _targets(self, batch: dict[str, Any]) -> int:
        return 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer does, with the step's tokens (without padding) and examples a second."""
        if "loss" in logs:
            logs |= self.pace.of_last_step()
        super().log(logs, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return self._run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        out = Path(self.args.output_dir)
        partial = out / resume.PARTIAL
        if self._ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        if self.is_deepspeed_enabled:
            self._ranks.meet()  # every process writes its part of the optimizer
        self._run_dir = str(partial)
        try:
            with written_to_be_moved(partial, out):
                super()._save_checkpoint(model, trial)
        finally:
            self._run_dir = None
        if not self._ranks.first:
            return
        written = partial / f"checkpoint-{self.state.global_step}"
        states = resume.DEEPSPEED_FILES if self.is_deepspeed_enabled else resume.STATE_FILES
        wanted = [*states, *resume.rng_files(self._ranks.count)]
        resume.seal(written, self._identity, self._notes, wanted)
        resume.publish(written, out)
        partial.rmdir()
        resume.rotate(out, self._keep)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        sharded = self._sharded or self.is_deepspeed_enabled
        networks = _has_network(self.model)
        trained = shards.trained(self.model) if sharded or networks else None
        if self._ranks.first:
            folder = output_dir or self.args.output_dir
            save_adapter(self.model, folder, trained if sharded else None)
            if networks and trained is not None:
                tensors = {n: t.contiguous() for n, t in trained.items()}
                write_atomically(Path(folder, NETWORK), lambda tmp: save_file(tensors, tmp))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = shards.whole_in(self.optimizer.state_dict())
        if self._ranks.first:
            torch.save(state, Path(output_dir, "optimizer.pt"))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, "scheduler.pt"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and not self.is_deepspeed_enabled:
            _follow(self.lr_scheduler, self.optimizer)
        if self._sharded and checkpoint is not None:
            shards.share_out(self.optimizer)

    def _save_rng_state(self, output_dir: str) -> None:
        if self._ranks.count == 1:
            super()._save_rng_state(output_dir)
            return
        with tempfile.TemporaryDirectory() as folder:
            super()._save_rng_state(folder)
            own = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
        for files in self._ranks.gather(own):
            if self._ranks.first:
                for name, content in files.items():
                    Path(output_dir, name).write_bytes(content)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._sharded:
            load_adapter(self.model if model is None else model, resume_from_checkpoint)

    def restore(self, checkpoint: str) -> None:
        """Load the adapter and the log of a checkpoint after which no step is left."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))


class AdapterTrainer(AdapterFiles):
    """Trains the adapters of a peftkern ``PeftModel`` for a ``task`` of the command."""

    counts_targets = True

    def __init__(self, *args: Any, task: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._task = task
        self.model_accepts_loss_kwargs = True  # read by older versions of Trainer, see compute_loss
        self.loss_is_scaled_for_ga = True  # read by newer versions

    def get_ready_for_ddp(self) -> None:
        """Tell DistributedDataParallel what is trained, and whether some of it gets no gradient.

        It waits for all gradients else, and where a model has linear layers that no text reaches
        (a vision tower's), in vain. One example shows it. Draws random numbers.
        """
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        leave_out_of_ddp(self.model, [name for name, t in tensors if not t.requires_grad])
        batch = self.data_collator([self.train_dataset[0]])
        batch = {name: value.to(self.args.device) for name, value in batch.items()}
        with self.accelerator.autocast():
            self.model.train()(**batch).loss.backward()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        unused = any(p.grad is None for p in trained)
        for p in trained:
            p.grad = None
        handler: Any = self.accelerator.ddp_handler
        handler.find_unused_parameters = unused

    def _targets(self, batch: dict[str, Any]) -> int:
        return 0 if IDLE in batch else target_count(batch["labels"], self._task)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The micro-batch's part of the mean loss over all targets of the optimizer step.

        Trainer leaves the scaling to models whose forward takes keywords. Several of them (BERT's
        classifiers, T5) take the number and ignore it. That would multiply loss and gradients by
        the number of micro-batches. Of several processes, losses and gradients are averaged, so
        each part is multiplied by their number.
        """
        targets = self._targets(inputs)
        outputs = model(**{name: value for name, value in inputs.items() if name != IDLE})
        loss = outputs.loss
        if num_items_in_batch is not None:
            loss = loss * (targets * self._ranks.count / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def _follow(scheduler: Any, optimizer: Any) -> None:
    """Set the learning rate to that of the schedule, which is another one in a longer run."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's holds torch's
    shares = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    rates = [base * share(scheduler.last_epoch) for base, share in shares]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler.load_state_dict({**scheduler.state_dict(), "_last_lr": rates})  # what is logged


def _has_network(model: Any) -> bool:
    """True when a network computes the prompt; the adapter's file has what it computed alone."""
    config: Any = model.active_peft_config
    return bool(getattr(config, "trains_network", False))


def load_adapter(model: Any, checkpoint: str) -> None:
    """Copy the adapter of a checkpoint into the model, whose parameters are whole."""
    if _has_network(model):
        own = {n: p for n, p in model.named_parameters() if p.requires_grad}
        kept = load_file(Path(checkpoint, NETWORK))
        if kept.keys() != own.keys():
            raise UserError(f"{Path(checkpoint, NETWORK)} is of another adapter than this one")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(kept[name])
        return
    from ..checkpoint.loading import set_peft_model_state_dict
    from ..checkpoint.state_dicts import load_peft_weights

    state = load_peft_weights(checkpoint, device="cpu")
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    if len(state) != len(wanted):
        raise UserError(f"{checkpoint} holds {len(state)} tensors, this adapter has {len(wanted)}")
    set_peft_model_state_dict(model, state)


def save_adapter(
    model: Any, folder: str | Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the adapter (weights, configuration, card), but no base weights, into ``folder``.

    ``state`` holds its whole tensors if the model's are not whole. The embedding is left out too:
    the command never resizes it, and a check whether it was resized would use the network.
    """
    model.save_pretrained(
        str(folder),
        save_embedding_layers=False,
        state_dict=state,
        selected_adapters=["default"],  # not DPO's reference
    )


class _NextEpoch(TrainerCallback):  # type: ignore[misc]  # transformers is not read
    """A callback that gives each epoch its order of the examples."""

    def __init__(self, shares: Shares, updates: int) -> None:
        self.shares, self.updates = shares, updates

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.shares.epoch = state.global_step // self.updates


class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is not read
    """A callback that moves the progress bar and stops a run whose loss is not a number.

    ``begins`` is called before the first step, when the model is as it is trained.
    """

    def __init__(self, progress: Any, task_id: Any, begins: Callable[[], None]) -> None:
        self.progress, self.task_id, self.begins = progress, task_id, begins

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begins()
        self.progress.update(self.task_id, total=state.max_steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        # Trainer saves after it logs, so no checkpoint with such weights is written
        if not torch.isfinite(torch.tensor(loss)):
            raise RunError(
                f"the loss became {loss} at step {state.global_step}: try a smaller --lr. "
                "Nothing was saved since the last checkpoint",
                everywhere=True,  # it is the mean of all processes
            )
        self.progress.update(self.task_id, completed=state.global_step, loss=f"loss {loss:.4f}")


@torch.no_grad()
def held_out(
    model: Any, batches: Sequence[dict[str, Any]], task: str, ranks: Ranks = ALONE
) -> dict[str, float]:
    """The mean loss over all targets of ``batches``; for classification also the accuracy.

    Each process computes its share of the batches, and all get the result. The model's mode (train
    or eval) is the same afterwards; no random numbers are drawn.
    """
    loss_sum = right = targets = 0.0
    with in_mode(model, training=False):
        # all processes do the same number of passes
        for start in range(0, len(batches), ranks.count):
            idle = start + ranks.index >= len(batches)
            batch = batches[start if idle else start + ranks.index]
            batch = {name: value.to(model.device) for name, value in batch.items()}
            output = model(**batch)
            if idle:
                continue
            count = target_count(batch["labels"], task)
            loss_sum += float(output.loss) * count
            targets += count
            if task in ("seq_cls", "token_cls"):
                # a padded place has the label -100, which no prediction equals
                labels, logits = batch["labels"], output.logits
                if task == "token_cls":  # virtual tokens stand before the others
                    logits = logits[:, -labels.shape[1] :]
                right += float((logits.argmax(-1) == labels).sum())
    loss_sum, right, targets = ranks.sum(loss_sum, right, targets)
    result = {"loss": loss_sum / targets}
    if task in ("seq_cls", "token_cls"):
        result["accuracy"] = right / targets
    return result
