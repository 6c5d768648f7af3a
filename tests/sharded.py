"""Two processes that train a small model with adapters, sharded in each way that people use.

``python -m tests.sharded FOLDER [PART]`` forks two processes, which run the cases and save what
they found: those of :data:`HEADLINE`, or with ``PART`` the whole table (``all``).
"""

from __future__ import annotations

import contextlib
import functools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import torch.distributed as dist
from peft.utils.other import fsdp_auto_wrap_policy as their_policy
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

import peftkern
from peftkern.checkpoint.slots import clean
from peftkern.fsdp import fsdp_auto_wrap_policy as our_policy
from tests import models, ranks
from tests.ranks import whole

RANKS, STEPS, RATE = 2, 2, 0.5
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
LIBRARIES: dict[str, Any] = {"peftkern": peftkern, "peft": peft}

_LORA: dict[str, Any] = {"r": 4, "init_lora_weights": False}
_ALL: dict[str, Any] = {**_LORA, "target_modules": "all-linear"}
_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# {method: (the configuration's class, its settings)}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", _ALL),
    "lora_bias": ("LoraConfig", {**_ALL, "lora_bias": True}),
    "embedding": ("LoraConfig", {**_LORA, "target_modules": ["q_proj", "embed_tokens"]}),
    "modules_to_save": (
        "LoraConfig",
        {**_LORA, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "tokens": (
        "LoraConfig",
        {**_LORA, "target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    ),
    "dora": ("LoraConfig", {**_ALL, "use_dora": True}),
    "experts": (
        "LoraConfig",
        {**_LORA, "r": 2, "target_modules": ["q_proj"], "target_parameters": _EXPERTS},
    ),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix network": (
        "PrefixTuningConfig",
        {"prefix_projection": True, "encoder_hidden_size": 8},
    ),
    "prompt": ("PromptTuningConfig", {}),
    "p-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 8}),
}


# with fewer rows than ranks: FSDP2 leaves a rank without any
UNEVEN: dict[str, tuple[str, dict[str, Any]]] = {
    "lora of rank 1": ("LoraConfig", {**_ALL, "r": 1}),
    "dora of rank 1": ("LoraConfig", {**_ALL, "r": 1, "use_dora": True}),
    "one token": ("PromptTuningConfig", {"num_virtual_tokens": 1}),
}


class Case(NamedTuple):
    """A method and a way of sharding."""

    method: str
    way: str

    @property
    def narrow(self) -> bool:
        """True when it computes in bf16."""
        return "bf16" in self.way


# ------------------------------------------------------------------------------ ways of sharding


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, whatever is around them."""
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    return list(next(m for m in lists if m and "DecoderLayer" in type(m[0]).__name__))


def leaves_of(model: nn.Module) -> list[nn.Module]:
    """The modules with trained weights that a call reaches."""
    return [
        m
        for m in model.modules()
        if any(p.requires_grad for p in m._parameters.values() if p is not None)
        and not isinstance(m, nn.ParameterDict)
    ]


def _checkpoints(model: Any, reentrant: bool) -> None:
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        base.enable_input_require_grads()


def _fsdp2(model: Any, *parts: str, **settings: Any) -> Any:
    """Sharded by ``fully_shard``: of ``parts``, "leaves", "base", "layers" and "root"."""
    if "leaves" in parts:
        for leaf in leaves_of(model):
            fully_shard(leaf, **settings)
    if "base" in parts:
        for linear in [m for m in model.modules() if type(m) is nn.Linear]:
            if not linear.weight.requires_grad:
                fully_shard(linear, **settings)
    if "layers" in parts:
        for layer in layers_of(model):
            fully_shard(layer, **settings)
    return fully_shard(model, **settings) if "root" in parts else model


def _fsdp1(model: Any, policy: Callable[..., Any], **settings: Any) -> Any:
    # of one process's layers none may be on another device; FSDP1 would look for a GPU
    own = {"use_orig_params": True, "device_id": torch.device("cpu"), **settings}
    return FullyShardedDataParallel(model, auto_wrap_policy=policy(model), **own)


def _by_layer(model: nn.Module) -> Any:
    kinds = {type(layers_of(model)[0])}
    return functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=kinds)


def _wrapped_in_checkpoints(model: Any) -> Any:
    """As accelerate does it: torch's wrapper around each layer, and that is sharded."""
    layers = {id(layer) for layer in layers_of(model)}
    wrap = functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    apply_activation_checkpointing(model, wrap, check_fn=lambda m: id(m) in layers)
    for module in [m for m in model.modules() if isinstance(m, CheckpointWrapper)]:
        fully_shard(module)
    return fully_shard(model)


def _compiled(model: Any) -> Any:
    _fsdp2(model, "layers", "root")
    for layer in layers_of(model):
        layer.compile(backend="aot_eager")
    return model


def _with_checkpoints(reentrant: bool, shard: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def both(model: Any) -> Any:
        _checkpoints(model, reentrant)
        return shard(model)

    return both


_NARROW2 = {"mp_policy": MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32)}
_NARROW1 = {"mixed_precision": MixedPrecision(param_dtype=BF16, reduce_dtype=FP32)}
WAYS: dict[str, Callable[[Any], Any]] = {
    "ddp": DistributedDataParallel,
    "ddp, checkpoints": _with_checkpoints(False, DistributedDataParallel),
    "fsdp2, root": lambda m: _fsdp2(m, "root"),
    "fsdp2, layers": lambda m: _fsdp2(m, "layers", "root"),
    "fsdp2, kept gathered": lambda m: _fsdp2(m, "layers", "root", reshard_after_forward=False),
    "fsdp2, leaves": lambda m: _fsdp2(m, "leaves", "layers", "root"),
    "fsdp2, leaves alone": lambda m: _fsdp2(m, "leaves"),
    "fsdp2, base layers": lambda m: _fsdp2(m, "base", "layers", "root"),
    "fsdp2, bf16": lambda m: _fsdp2(m, "layers", "root", **_NARROW2),
    "fsdp2, checkpoints": _with_checkpoints(False, lambda m: _fsdp2(m, "layers", "root")),
    "fsdp2, reentrant": _with_checkpoints(True, lambda m: _fsdp2(m, "layers", "root")),
    "fsdp2, wrapped": _wrapped_in_checkpoints,
    "fsdp2, bf16, checkpoints": _with_checkpoints(
        False, lambda m: _fsdp2(m, "layers", "root", **_NARROW2)
    ),
    "fsdp2, bf16, reentrant": _with_checkpoints(
        True, lambda m: _fsdp2(m, "layers", "root", **_NARROW2)
    ),
    "fsdp2, offload": lambda m: _fsdp2(
        m, "layers", "root", offload_policy=CPUOffloadPolicy(pin_memory=False)
    ),
    "fsdp2, compiled": _compiled,
    "fsdp1, peft's policy": lambda m: _fsdp1(m, their_policy),
    "fsdp1, our policy": lambda m: _fsdp1(m, our_policy),
    "fsdp1, our policy, flat": lambda m: _fsdp1(m, our_policy, use_orig_params=False),
    "fsdp1, our policy, checkpoints": _with_checkpoints(False, lambda m: _fsdp1(m, our_policy)),
    "fsdp1, layers": lambda m: _fsdp1(m, _by_layer),
    "fsdp1, layers, checkpoints": _with_checkpoints(False, lambda m: _fsdp1(m, _by_layer)),
    "fsdp1, layers, bf16": lambda m: _fsdp1(m, _by_layer, **_NARROW1),
}
# a flat parameter holds trained or frozen weights, and these methods put both into one module
_MIXED = {"embedding", "modules_to_save", "tokens"}
# these have weights in a ParameterDict, of which nobody sums the gradients without a module around
_LOOSE = {"embedding", "tokens"}
# adapters of parameters need W and their factors together, and may not write to FSDP1's views
REFUSED = [
    Case("experts", way) for way in WAYS if way.startswith("fsdp1") or way.startswith("fsdp2, leav")
]
ALL = [
    Case(method, way)
    for method in METHODS
    for way in WAYS
    if not (way.endswith("flat") and method in _MIXED)
    and not (way.endswith("alone") and method in _LOOSE)
    and Case(method, way) not in REFUSED
]
HEADLINE = [
    Case("lora", "fsdp2, layers"),
    Case("lora", "fsdp2, leaves"),
    Case("lora", "fsdp2, wrapped"),
    Case("lora", "fsdp1, layers"),
    Case("lora", "fsdp1, our policy"),
    Case("dora", "fsdp2, layers"),
    Case("dora", "fsdp2, leaves"),
    Case("dora", "fsdp2, base layers"),
    Case("dora", "fsdp1, our policy"),
    Case("experts", "fsdp2, layers"),
    Case("prefix", "fsdp2, leaves"),
    Case("prefix", "fsdp2, reentrant"),
    Case("prefix", "fsdp2, bf16"),
    Case("prefix", "fsdp1, layers"),
    Case("prefix", "fsdp1, our policy"),
    Case("prompt", "fsdp2, leaves"),
    Case("prompt", "fsdp1, our policy, flat"),
    Case("p-tuning", "fsdp2, layers"),
    Case("lora of rank 1", "fsdp2, layers"),
    Case("dora of rank 1", "fsdp2, leaves"),
    Case("one token", "fsdp2, leaves"),
]
# saved without a state dict: FSDP2's shards are gathered
SAVED = [
    Case("lora", "fsdp2, wrapped"),
    Case("dora", "fsdp2, leaves"),
    Case("prefix", "fsdp2, layers"),
    Case("prefix network", "fsdp2, layers"),
    Case("p-tuning", "fsdp2, leaves"),
    Case("dora of rank 1", "fsdp2, layers"),
]
HEADLINE_REFUSED = [Case("experts", "fsdp2, leaves"), Case("experts", "fsdp1, layers")]


# ------------------------------------------------------------------------------ a case


def adapted(method: str, library: str = "peftkern", dtype: torch.dtype = FP64) -> Any:
    """The model with an adapter of this method, whose weights are drawn, in training mode."""
    of = LIBRARIES[library]
    name, settings = {**METHODS, **UNEVEN}[method]
    tokens = {} if name == "LoraConfig" else {"num_virtual_tokens": 3}
    config = getattr(of, name)(task_type="CAUSAL_LM", **{**tokens, **settings})
    base = models.build("qwen3_moe" if method == "experts" else "llama")
    model = of.get_peft_model(base, config).train()
    drawn = torch.Generator().manual_seed(3)
    for name, p in sorted(model.named_parameters()):
        p.data = p.data.to(dtype)
        if p.requires_grad:
            values = torch.randn(p.shape, generator=drawn).mul_(0.1)
            p.data = (values.abs() + 0.5 if "magnitude" in name else values).to(dtype)
    return model


def numbers(model: Any, rank: int | None = None) -> dict[str, Tensor]:
    """The losses, and the gradients and trained weights of each step, by name.

    ``rank`` is the process's; None for all tokens in this process. FSDP1 gives no gradients.
    """
    ids = torch.randint(64, (2 * RANKS, 9), generator=torch.Generator().manual_seed(1))
    if rank is not None:
        ids = ids.chunk(RANKS)[rank]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        loss = loss.detach().double()  # transformers computes it in float32
        if rank is not None:
            dist.all_reduce(loss)
            loss /= RANKS
        found[f"loss {step}"] = loss.reshape(1)
        if not isinstance(model, FullyShardedDataParallel):
            found |= {f"{n}.grad {step}": whole(p.grad) for n, p in trained(model)}
        optimizer.step()
        whole_here = FullyShardedDataParallel.summon_full_params(model)
        flat = isinstance(model, FullyShardedDataParallel)
        with whole_here if flat else contextlib.nullcontext():
            found |= {f"{n} {step}": whole(p) for n, p in trained(model)}
    return found


def trained(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, parameter) of all that train, without the names of what has wrapped the model."""
    return [
        (clean(name).removeprefix("module."), p)
        for name, p in model.named_parameters()
        if p.requires_grad
    ]


def alone(method: str) -> dict[str, Tensor]:
    """What one process gets, in float64."""
    return numbers(adapted(method))


def found_by(case: Case, rank: int) -> dict[str, Any]:
    """{"peftkern": numbers, "explained": rows}, and HF PEFT's numbers where bf16 is tested."""
    dtype = FP32 if case.narrow else FP64
    model = WAYS[case.way](inner := adapted(case.method, dtype=dtype))
    before = [row.fused for row in peftkern.explain(inner)]
    found: dict[str, Any] = {"peftkern": numbers(model, rank), "before": before}
    found["explained"] = [(row.fused, row.reason) for row in peftkern.explain(inner)]
    if case.narrow:
        way = case.way
        if case.method.startswith("prefix"):  # HF PEFT has none under checkpoints
            way = way.removesuffix(", checkpoints").removesuffix(", reentrant")
        found["peft"] = numbers(WAYS[way](adapted(case.method, "peft", FP32)), rank)
    return found


def save(case: Case, rank: int, folder: Path) -> str:
    """Save a sharded model in two ways, below ``folder``; returns the error of a third, FSDP1's."""
    model = WAYS[case.way](adapted(case.method))
    model.save_pretrained(folder / f"{case} gathered", is_main_process=rank == 1)
    options = StateDictOptions(full_state_dict=True)
    given = get_model_state_dict(model, options=options)
    if rank == 0:
        model.save_pretrained(folder / f"{case} given", state_dict=given)
    if case.method != "prefix":
        return ""
    WAYS["fsdp1, layers"](model := adapted(case.method))
    try:
        model.save_pretrained(folder / "never")
    except ValueError as error:
        return str(error)
    return "none"


def train(rank: int, cases: list[Case]) -> dict[tuple[str, str], Any]:
    """What each case found, or its error in words."""
    found: dict[tuple[str, str], Any] = {}
    for case in cases:
        try:
            found[tuple(case)] = found_by(case, rank)
        except Exception:
            found[tuple(case)] = traceback.format_exc()  # on both, or the other's time is up
    return found


if __name__ == "__main__":
    asked = ALL + REFUSED if sys.argv[2:] == ["all"] else HEADLINE + HEADLINE_REFUSED
    folder = Path(sys.argv[1])

    def run(rank: int) -> Any:
        said = [] if sys.argv[2:] else [save(case, rank, folder) for case in SAVED]
        return {**train(rank, asked), "said": said}

    ranks.fork(folder, RANKS, run)
