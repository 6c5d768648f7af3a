"""Two processes that train a quantised Llama with LoRA under FSDP, and one that trains it alone.

``python -m tests.fsdp FOLDER`` forks two processes, which run every case and save their numbers.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes
import peft
import torch
import torch.distributed as dist
from peft.utils.other import fsdp_auto_wrap_policy as their_policy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import peftkern
from peftkern.ops.bases.bnb4 import Bnb4
from peftkern.ops.bases.formats import reader_of
from peftkern.ops.bases.fp8 import Fp8
from peftkern.ops.bases.weight import Packed
from peftkern.tuners.lora.linear import Linear
from peftkern.utils.other import fsdp_auto_wrap_policy as our_policy
from tests import quantised_models
from tests.ranks import fork, whole

RANKS, STEPS, RATE = 2, 2, 0.5
LIBRARIES: dict[str, Any] = {"peftkern": peftkern, "peft": peft}
POLICIES = {"peftkern": our_policy, "peft": their_policy}
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64

# {name: the dtype that packed bytes are stored in, and how the model is sharded}. FSDP shards no
# bytes: it makes each shard a parameter with a gradient, which torch.uint8 cannot have.
CASES: dict[str, dict[str, Any]] = {
    "stored in bf16": {"storage": BF16, "reshard": True},
    "stored in fp32": {"storage": FP32, "reshard": True},
    "statistics not nested": {"storage": BF16, "reshard": True, "nested": False},
    "gathered until the backward": {"storage": BF16, "reshard": False},
    "in one group": {"storage": BF16, "whole": True},
    "checkpoints": {"storage": BF16, "reshard": True, "checkpoints": True},
    "fp8": {"reshard": True},
}
# in float32, beside HF PEFT: bitsandbytes' own products leave float64 results unwritten on a CPU,
# and FSDP1 flattens parameters of one dtype only, the packed ones among them
BESIDE: dict[str, dict[str, Any]] = {
    "fsdp2": {"storage": FP32, "reshard": True},
    "fsdp1": {"storage": FP32, "flat": True},
}


def llama(case: dict[str, Any]) -> Any:
    """A Llama whose linear layers are NF4, or e4m3, but for the head."""
    if "storage" not in case:
        model = quantised_models.llama(lambda linear: linear)
        peftkern.quantize_base(model, "fp8")
        return model
    how = dict(quant_storage=case["storage"], compress_statistics=case.get("nested", True))
    return quantised_models.llama(quant_type="nf4", **how)


def adapted(library: str, base: Any, dtype: torch.dtype) -> Any:
    """The model with LoRA, in ``dtype`` but for the packed weights, in training mode."""
    of = LIBRARIES[library]
    settings: Any = dict(r=4, target_modules="all-linear", init_lora_weights=False)
    model = of.get_peft_model(base, of.LoraConfig(**settings)).train()
    drawn = torch.Generator().manual_seed(3)
    layers = [module for module in model.modules() if reader_of(module) is not None]
    packed = {id(p) for layer in layers for p in layer.parameters()}
    for name, p in model.named_parameters():
        if id(p) not in packed:
            p.data = p.data.to(dtype)
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=drawn).mul_(0.1).to(dtype)
    return model


def sharded(model: Any, library: str, case: dict[str, Any]) -> Any:
    """The model as two processes train it."""
    if case.get("flat"):
        # without a policy each parameter would be gathered, and freed, with all others
        policy, cpu = POLICIES[library](model), torch.device("cpu")
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu
        )
    mesh = init_device_mesh("cpu", (RANKS,))
    if not case.get("whole"):
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=case["reshard"])
    return fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def watched() -> Iterator[list[Tensor]]:
    """The packed bits that were multiplied with; no call is handed to a layer of bitsandbytes."""
    used: list[Tensor] = []

    def watch(kind: type[Packed]) -> Any:
        read = kind.dense

        def seen(packed: Packed, dtype: torch.dtype) -> Tensor:
            bits = packed.tensors[0]
            assert bits.untyped_storage().size(), "the bits have been freed"
            used.append(bits)
            return read(packed, dtype)

        return mock.patch.object(kind, "dense", seen)

    def general(*_: Any, **__: Any) -> Any:
        raise AssertionError("not one operation")

    with (
        watch(Bnb4),
        watch(Fp8),
        mock.patch.object(Linear, "_forward_general", general),
        mock.patch.object(bitsandbytes.nn.Linear4bit, "forward", general),
    ):
        yield used


def numbers(
    model: Any, case: dict[str, Any], rank: int | None = None, used: list[Tensor] | None = None
) -> dict[str, Tensor]:
    """The losses, gradients of the first step and trained weights, by name.

    ``rank`` is the process's; None for all tokens in this process.
    """
    ids = torch.randint(64, (2 * RANKS, 9), generator=torch.Generator().manual_seed(1))
    if rank is not None:
        ids = ids.chunk(RANKS)[rank]
    if case.get("checkpoints"):
        kwargs = {"use_reentrant": False}
        model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, found = torch.optim.SGD(trained, lr=RATE), {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        if used is not None:
            here, again = _check(used, case), len(used)
        loss.backward()
        if used is not None:
            # the first layer's q, k, v read a frozen embedding; with checkpoints its output gets a
            # gradient, and the forward runs again
            want = 2 * here if case.get("checkpoints") else here - 3
            assert len(used) - again == want, f"{len(used) - again} products, not {want}"
            used.clear()
        loss = loss.detach().double()  # transformers computes it in float32
        if rank is not None:
            dist.all_reduce(loss)
            loss /= RANKS
        found[f"loss {step}"] = loss.reshape(1)
        if step == 0:
            found |= {f"{n}.grad": t for n, t in _trained(model, case, "grad")}
        optimizer.step()
    return found | dict(_trained(model, case, "data"))


def _check(used: list[Tensor], case: dict[str, Any]) -> int:
    """The number of products of a forward; after it the bits that they read are gone, or are not.

    The backward gets them again: FSDP fills the storage that was freed.
    """
    freed = [t.untyped_storage().size() == 0 for t in used]
    assert len(freed) == 14 and set(freed) == {bool(case.get("reshard"))}, freed
    return len(freed)


def _trained(model: Any, case: dict[str, Any], what: str) -> list[tuple[str, Tensor]]:
    of_one = FullyShardedDataParallel.summon_full_params(model, with_grads=True)
    with of_one if isinstance(model, FullyShardedDataParallel) else contextlib.nullcontext():
        return [
            (n.replace("_fsdp_wrapped_module.", ""), whole(getattr(p, what)))
            for n, p in model.named_parameters()
            if p.requires_grad
        ]


def alone(case: dict[str, Any]) -> dict[str, Tensor]:
    """What HF PEFT gets in one process, in float64 on dense weights."""
    return numbers(adapted("peft", quantised_models.dense(llama(case)), FP64), {})


def _train(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        model = sharded(adapted("peftkern", llama(case), FP64), "peftkern", case)
        with watched() as used:
            found[name] = numbers(model, case, rank, used)
    for name, case in BESIDE.items():
        for library in LIBRARIES:
            model = sharded(adapted(library, llama(case), FP32), library, case)
            found[f"{name} {library}"] = numbers(model, case, rank)
    return found


if __name__ == "__main__":
    fork(Path(sys.argv[1]), RANKS, _train)
