"""Two processes that train a small model with adapters under DeepSpeed's ZeRO.

``python -m tests.zero FOLDER PART`` forks two processes, which run the cases and save what they
found: :data:`CASES` (``table``), or what is saved, loaded and refused (``files``).
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.integrations import HfDeepSpeedConfig

import peftkern
from peftkern.tuners.lora import linear, mlp, plan
from peftkern.utils import zero3
from tests import models, ranks, sharded
from tests.sharded import FP32, FP64, RANKS, STEPS

RATE = sharded.RATE


class Case(NamedTuple):
    """A method of :data:`.sharded.METHODS` and a way."""

    method: str
    way: str

    @property
    def stage(self) -> int:
        return int(self.way[len("zero")])

    @property
    def narrow(self) -> bool:
        return "bf16" in self.way or "born" in self.way


_FEW = ("lora", "dora", "prefix", "prompt", "p-tuning")
WAYS = {
    "zero2": (*sharded.METHODS,),
    "zero3": (*sharded.METHODS,),
    # small weights are kept whole
    "zero3, persistent": ("lora", "dora", "prefix"),
    # divided while the model is built, as Trainer does it
    "zero3, born": (*_FEW, "experts", "tokens", "modules_to_save"),
    "zero2, checkpoints": _FEW,
    "zero3, checkpoints": _FEW,
    "zero3, reentrant": _FEW,
    "zero2, bf16": _FEW,
    "zero3, bf16": _FEW,
    "zero3, offload": ("lora", "prefix"),
}
CASES = [Case(method, way) for way, methods in WAYS.items() for method in methods]


def settings_of(case: Case) -> dict[str, Any]:
    """A configuration of DeepSpeed."""
    zero: dict[str, Any] = {"stage": case.stage}
    if case.stage == 3 and "persistent" not in case.way:
        # the model is so small that DeepSpeed would keep all of it whole until the backward
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
        zero["stage3_prefetch_bucket_size"] = 0
    if "offload" in case.way:
        zero["offload_param"] = {"device": "cpu"}
    found = {
        "train_micro_batch_size_per_gpu": RANKS,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    return {**found, "bf16": {"enabled": True}} if "bf16" in case.way else found


def divided_base(kind: str, settings: dict[str, Any], folder: Path) -> Any:
    """A base model of this family that DeepSpeed divides as it is loaded, as Trainer has it."""
    base = models.build(kind).float()
    if dist.get_rank() == 0:
        base.save_pretrained(folder / kind)
    dist.barrier()
    kept = HfDeepSpeedConfig(settings)  # transformers looks for it while it is held
    base = type(base).from_pretrained(folder / kind, dtype=FP32)
    assert not kept.is_offload() and all(p.ds_numel > p.numel() for p in base.parameters())
    return base


def born(case: Case, folder: Path) -> Any:
    """The model of :func:`.sharded.adapted`, whose base was divided before it was adapted."""
    whole = sharded.adapted(case.method, dtype=FP32)
    kind = "qwen3_moe" if case.method == "experts" else "llama"
    base = divided_base(kind, settings_of(case), folder)
    model = peftkern.get_peft_model(base, whole.peft_config["default"]).train()
    of_whole = dict(whole.named_parameters())
    for name, p in names_of(model).items():
        p.data = of_whole[name].data
    return model


def checkpointed(model: Any, case: Case) -> Any:
    """The model, with the checkpoints of the case's way."""
    if "checkpoints" in case.way or "reentrant" in case.way:
        how = {"use_reentrant": "reentrant" in case.way}
        base = model.get_base_model()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        if "reentrant" in case.way:
            base.enable_input_require_grads()
    return model


def engine_of(model: Any, case: Case) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=RATE)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings_of(case))[0]


def names_of(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def numbers(model: Any, case: Case, rank: int) -> dict[str, Any]:
    """The losses, gradients and trained weights of each step, by name."""
    engine = engine_of(model, case)
    ids = torch.randint(64, (2 * RANKS, 9), generator=torch.Generator().manual_seed(1))
    ids = ids.chunk(RANKS)[rank]
    found: dict[str, Any] = {}
    for step in range(STEPS):
        with watched() as read:
            loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        found["read"], found["held"] = len(read), sum(not of.expired() for of in read)
        engine.backward(loss)
        loss = loss.detach().double()
        dist.all_reduce(loss)
        found[f"loss {step}"] = (loss / RANKS).reshape(1)
        for name, p in names_of(model).items():
            found[f"{name}.grad {step}"] = deepspeed.utils.safe_get_full_grad(p).clone()
        engine.step()
        for name, p in names_of(model).items():
            found[f"{name} {step}"] = deepspeed.utils.safe_get_full_fp32_param(p).clone()
    found["explained"] = [(row.fused, row.reason) for row in peftkern.explain(model)]
    engine.eval()
    found["eval"] = engine(input_ids=ids, use_cache=False).logits.detach().double()
    engine.destroy()
    return found


@contextlib.contextmanager
def watched() -> Any:
    """The frozen weights that operations have read whole, as weak references to their memory."""
    seen: list[StorageWeakRef] = []
    gather = zero3.gather_for

    def watch(module: Any, weights: Any) -> bool:
        held = [w for w in weights if w is not None]
        whole = gather(module, held)
        seen.extend(StorageWeakRef(w.untyped_storage()) for w in held if not w.requires_grad)
        return whole

    with contextlib.ExitStack() as stack:
        for user in (plan, mlp, linear):
            stack.enter_context(mock.patch.object(user, "gather_for", watch))
        yield seen


def found_by(case: Case, rank: int, folder: Path) -> dict[str, Any]:
    """{"peftkern": numbers, "explained": rows}, and HF PEFT's numbers where fp64 is not tested.

    "held" is the number of the frozen weights which an operation has read that are still in memory
    after a forward, of those that it has read ("read").
    """
    dtype = FP32 if case.narrow else FP64
    born_so = "born" in case.way
    model = born(case, folder) if born_so else sharded.adapted(case.method, dtype=dtype)
    found = numbers(checkpointed(model, case), case, rank)
    of_ours = {key: found.pop(key) for key in ("explained", "read", "held")}
    found = {"peftkern": found, **of_ours}
    if case.narrow:
        # its DoRA cannot be had on a base that is divided already
        theirs = checkpointed(sharded.adapted(case.method, "peft", dtype), case)
        own = numbers(theirs, case, rank)
        found["peft"] = {key: value for key, value in own.items() if key not in of_ours}
    return found


# ------------------------------------------------------------------------------ parts


def table(rank: int, folder: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for case in CASES:
        try:
            found[tuple(case)] = found_by(case, rank, folder)
        except Exception:
            found[tuple(case)] = traceback.format_exc()  # on both, or the other's time is up
    return found


# adapters whose first values are made of the base's weights, and what has them in one process
STARTS: dict[str, Any] = {
    "dora": lambda: _lora(use_dora=True),
    "pissa": lambda: _lora(init_lora_weights="pissa"),
    "olora": lambda: _lora(init_lora_weights="olora"),
    "kasa": lambda: _lora(kasa_config=peftkern.KasaConfig()),
    "tokens": lambda: _lora(trainable_token_indices=[3, 4]),
    "modules_to_save": lambda: _lora(modules_to_save=["lm_head"]),
    "prompt": lambda: peftkern.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB"
    ),
}


def _lora(**more: Any) -> Any:
    return peftkern.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **more)


def started(base: Any, start: str) -> dict[str, Tensor]:
    """All weights by name once an adapter was put on a base."""
    torch.manual_seed(5)
    model = peftkern.get_peft_model(base, STARTS[start]())
    own = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters([p for p in own.values() if hasattr(p, "ds_id")]):
        return {name: p.detach().clone() for name, p in own.items()}


def saved(method: str, stage: int, rank: int, folder: Path) -> str:
    """Save a model in the ways that there are, below ``folder``; returns what is not a way."""
    case = Case(method, f"zero{stage}")
    model = sharded.adapted(method)
    engine = engine_of(model, case)
    at = str(folder / f"{method} {stage}")
    if stage == 2:
        if rank == 0:
            model.save_pretrained(f"{at} gathered")
        return ""
    try:
        model.save_pretrained(f"{at} never")
        said = "nothing"
    except ValueError as error:
        said = str(error)
    with deepspeed.zero.GatheredParameters([*names_of(model).values()]):
        if rank == 0:
            model.save_pretrained(f"{at} gathered")
    given = engine._zero3_consolidated_16bit_state_dict()  # accelerator.get_state_dict's
    if rank == 0:
        model.save_pretrained(f"{at} given", state_dict=given)
    return said


def unlike(rank: int) -> str:
    """The error of a first forward where the ranks have adapters of unlike scales."""
    model = sharded.adapted("lora", dtype=FP32)
    model.peft_config["default"].lora_alpha += rank
    engine = engine_of(model, Case("lora", "zero3"))
    try:
        engine(input_ids=torch.arange(4).view(1, 4))
        return "nothing"
    except ValueError as error:
        return str(error)


def files(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for start in STARTS:
        settings = settings_of(Case("", "zero3"))
        found[start] = started(divided_base("llama", settings, folder), start)
    found["unlike"] = unlike(rank)
    for method in SAVED:
        for stage in (2, 3):
            found[f"{method} {stage}"] = saved(method, stage, rank, folder)
    return found


SAVED = ("lora", "dora", "prefix", "prefix network", "p-tuning")
PARTS = {"table": table, "files": files}


def main(folder: Path, part: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> Any:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        return PARTS[part](rank, folder)

    ranks.fork(folder, RANKS, run)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
