"""The part e2e: tokens a second in optimizer steps of a Llama with drawn weights.

The model has Llama-8B's shapes with as many layers as fit, and LoRA on all linears, with and
without gradient checkpointing. The models of all providers share the frozen weights. There is no
float64 reference of this size: the first losses must agree, and other parts have checked the
linears and the layer.
"""

from __future__ import annotations

import gc
import importlib
import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from . import blocks as gpu_blocks
from . import providers as gpu_providers
from .cases import LLAMA_8B, TINY, Llama
from .device import Device
from .store import Broken, Watch
from .timing import Timed, interleave

LOSS_AGREES = 2e-2  # relative; the losses of equal bf16 models differ by a tenth of it


@dataclass(frozen=True)
class ModelCase:
    """Training steps on ``batch`` sequences of ``length`` tokens."""

    batch: int
    length: int
    r: int
    p: float
    checkpointing: bool

    @property
    def key(self) -> str:
        tail = "checkpointing" if self.checkpointing else "no checkpointing"
        return f"e2e {self.batch}x{self.length} r={self.r} p={self.p:g} {tail}"


def cases() -> list[ModelCase]:
    return [
        ModelCase(4, 2048, 16, 0.1, True),
        ModelCase(4, 2048, 16, 0.1, False),
        ModelCase(4, 2048, 16, 0.0, True),
        ModelCase(4, 2048, 64, 0.1, True),
        ModelCase(1, 2048, 16, 0.1, False),
    ]


def layers_that_fit(shape: Llama, free: int) -> int:
    """The number of layers that fit into 60% of ``free`` bytes.

    Their weights and a checkpointed step of 8192 tokens count.
    """
    linears = sum(K * N for K, N in shape.linears().values())
    ends = 2 * shape.vocab * shape.hidden
    step = 8192 * (10 * shape.vocab + 40 * shape.hidden + 12 * shape.wide)
    room = int(0.6 * free) - 2 * ends - step
    each = 2 * linears + 8192 * 2 * shape.hidden
    return max(1, min(shape.layers, room // each))


_BASE: dict[str, tuple[nn.Module, int]] = {}


def base_model(device: Device) -> tuple[nn.Module, Llama, int]:
    """(frozen model, its shapes, its number of layers); the model is kept for the next case."""
    shape = TINY if device.dry else LLAMA_8B
    if shape.name not in _BASE:
        from transformers.models.llama import modeling_llama

        layers = layers_that_fit(shape, device.free()) if not device.dry else shape.layers
        config = gpu_blocks.llama_config(shape, layers)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):  # as its initialisation would take longer than the steps
                model = modeling_llama.LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        model.to_empty(device=device.torch)
        model.model.rotary_emb = modeling_llama.LlamaRotaryEmbedding(config).to(device.torch)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.fill_(1.0)
                else:
                    std = 0.02 if "embed" in name else parameter.shape[1] ** -0.5 / 2
                    parameter.normal_(std=std)
        _BASE[shape.name] = model.requires_grad_(False), layers
    model, layers = _BASE[shape.name]
    return model, shape, layers


def adapt(library: str, base: nn.Module, case: ModelCase, fp32: bool) -> Any:
    """A model of ``library`` that shares the base's weights, in training mode.

    A and B are drawn the same way for every library.
    """
    lib = importlib.import_module(library)
    config = lib.LoraConfig(
        task_type="CAUSAL_LM",
        r=case.r,
        lora_alpha=case.r,
        lora_dropout=case.p,
        target_modules=list(LLAMA_8B.linears()),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lib.get_peft_model(gpu_blocks.share(base), config, autocast_adapter_dtype=fp32)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                drawn = torch.randn(parameter.shape, device=parameter.device) * 0.01
                parameter.copy_(drawn.bfloat16())
    return prepared(model, case)


def prepared(model: Any, case: ModelCase) -> Any:
    model.train()
    model.enable_input_require_grads()  # checkpointing needs an input that requires gradients
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    return model


@dataclass
class _Run:
    """A model with its optimizer; ``step`` takes one step and returns the loss as a tensor."""

    model: Any
    mode: Callable[[], AbstractContextManager[Any]]
    optimizer: Any
    ids: torch.Tensor

    def step(self) -> torch.Tensor:
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _makers(base: nn.Module, case: ModelCase) -> dict[str, tuple[Any, Any]]:
    """{provider: (maker of its model, its mode)}; peftkern's modes share one model."""
    shared: list[Any] = []

    def ours() -> Any:
        if not shared:
            shared.append(adapt("peftkern", base, case, True))
        return shared[0]

    made: dict[str, tuple[Any, Any]] = {
        gpu_providers.PLAIN: (lambda: prepared(gpu_blocks.share(base), case), nullcontext),
        gpu_providers.PEFT_BF16: (lambda: adapt("peft", base, case, False), nullcontext),
        gpu_providers.PEFT_FP32: (lambda: adapt("peft", base, case, True), nullcontext),
    }
    for name, mode in gpu_providers.MODES.items():
        if name != gpu_providers.AUTO or gpu_providers.auto_is_its_own():
            made[name] = (ours, mode)
    return made


def floor_us(case: ModelCase, shape: Llama, layers: int, tokens: int, rate: float) -> float:
    """Microseconds of a step's products at ``rate`` FLOP/s: forward and dX.

    With checkpointing the forward counts twice. Attention, norms and the optimizer are left out.
    """
    passes = 3 if case.checkpointing else 2
    each = sum(K * N + 2 * case.r * (K + N) for K, N in shape.linears().values())
    head = 2 * shape.vocab * shape.hidden
    return 2e6 * tokens * (passes * layers * each + head) / rate


def measure(
    case: ModelCase,
    device: Device,
    rate: float = 1e12,
    *,
    seconds: float,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """The row of a case, which has an error in the entry of a provider that ran out of memory.

    ``rate`` is the measured bf16 rate in FLOP/s.

    Raises:
        Broken: the device is unusable after a provider ran.
    """
    began = time.monotonic()
    watch = watch or Watch()
    base, shape, layers = base_model(device)
    batch, length = (2, 8) if device.dry else (case.batch, case.length)
    torch.manual_seed(5)
    ids = torch.randint(2, shape.vocab, (batch, length), device=device.torch)
    row: dict[str, Any] = {
        "key": case.key,
        "part": "e2e",
        "case": {**asdict(case), "model": shape.name, "layers": layers, "tokens": batch * length},
        "floor": {"us": floor_us(case, shape, layers, batch * length, rate)},
        "providers": {},
        "missing": {},
    }
    works: dict[str, Timed] = {}
    losses: dict[str, float] = {}
    for name, (make, mode) in _makers(base, case).items():
        entry = row["providers"][name] = {}
        if name in watch.banned:
            entry["error"] = f"left out after: {watch.banned[name]}"
            continue
        watch.at(name)
        run = model = None
        try:
            model = make()
            trained = [p for p in model.parameters() if p.requires_grad]
            adam = torch.optim.AdamW(trained, lr=0.0, fused=not device.dry) if trained else None
            run = _Run(model, mode, adam, ids)
            with mode():
                losses[name] = float(run.step())  # compiles; with lr 0 all models stay equal
                device.synchronize()
                before = device.allocated()
                device.watch_peak()
                torch.manual_seed(6)
                run.step()
                device.synchronize()
                entry["peak_bytes"] = device.peak() - before
            works[name] = Timed(run.step, 1, mode)
            # alone and few, but there when the budget or the machine ends before the last provider
            alone = interleave({name: works[name]}, device, 0.0, most=3, least=3)[name]
            entry["us"], entry["alone"] = alone, True
        except torch.cuda.OutOfMemoryError:
            entry["error"] = "out of memory"
        except Exception as e:
            if device.is_broken():
                raise Broken(name, e) from e
            entry["error"] = f"{type(e).__name__}: {str(e)[:300]}"
        del run, model
        gc.collect()
        device.empty()
        _judge(row, losses)
        watch.keep(row)
    watch.at(None)
    works = {n: w for n, w in works.items() if row["providers"][n].get("ok")}
    if works:
        for name, q in interleave(works, device, seconds, most=12, least=4).items():
            row["providers"][name]["us"] = q
            del row["providers"][name]["alone"]
            row["providers"][name]["tokens_s"] = batch * length / (q["p50"] / 1e6)
    row["seconds"] = round(time.monotonic() - began, 2)
    works.clear()
    gc.collect()
    device.empty()
    return row


def _judge(row: dict[str, Any], losses: dict[str, float]) -> None:
    """Set ``ok`` in each entry: True when the first loss agrees with HF PEFT's.

    Where HF PEFT has none (it ran out of memory, say), the loss of peftkern's torch backend stands
    in. The plain model computes another function, so any finite loss is ok there.
    """
    yardsticks = (gpu_providers.PEFT_FP32, gpu_providers.PEFT_BF16, gpu_providers.OURS["torch"])
    judge = next((n for n in yardsticks if losses.get(n, math.nan) == losses.get(n)), None)
    for name, loss in losses.items():
        entry = row["providers"][name]
        entry["loss"] = loss if loss == loss else None
        fine = "error" not in entry and loss == loss
        if name == gpu_providers.PLAIN:
            entry["ok"], entry["checked"] = fine, "loss finite"
            continue
        if judge is None:
            entry["ok"], entry["checked"] = False, "no loss to compare with"
            continue
        want = losses[judge]
        entry["ok"] = fine and abs(loss - want) <= LOSS_AGREES * abs(want)
        entry["checked"] = f"first loss against that of {judge}"
