"""The models of a benchmark run: the frozen one, and one of each library with equal adapters."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, first_line
from .measure import BARE, OURS, PEFT, Work
from .settings import BenchSettings

LIGER = "PEFT and Liger"
TASK = "CAUSAL_LM"


class Contest:
    """The base model, and models of each library on its weights.

    Attributes:
        missing: {a peer: the reason that it is not measured}.
    """

    def __init__(self, base: Any, settings: BenchSettings, device: torch.device) -> None:
        self.base: Any = base.eval().requires_grad_(False)
        self.settings, self.device = settings, device
        self.missing = missing_peers(device)
        self._made: dict[float, dict[str, Any]] = {}
        self.vocabulary = self.base.get_input_embeddings().num_embeddings

    def tokens(self, batch: int, length: int) -> Tensor:
        """Drawn token ids [batch, length], int64, the same at every call."""
        generator = torch.Generator().manual_seed(2)
        drawn = torch.randint(3, self.vocabulary, (batch, length), generator=generator)
        return drawn.to(self.device)

    def models(self, dropout: float = 0.0) -> dict[str, Any]:
        """{provider: model}, in training mode, with equal adapters whose B is not zero."""
        if dropout not in self._made:
            self._made.clear()
            self._made[dropout] = self._make(dropout)
        return self._made[dropout]

    def _make(self, dropout: float) -> dict[str, Any]:
        found = {BARE: self.base, PEFT: self._adapted("peft", dropout)}
        weights = draw(found[PEFT])
        found[OURS] = self._adapted("peftkern", dropout)
        load(found[OURS], weights)
        if LIGER not in self.missing:
            found[LIGER] = self._adapted("peft", dropout)
            load(found[LIGER], weights)
            _apply_liger(found[LIGER].get_base_model())
        return found

    def _adapted(self, library: str, dropout: float) -> Any:
        lib = importlib.import_module(library)
        settings = self.settings
        targets: Any = settings.target_modules
        config = lib.LoraConfig(
            r=settings.lora_r,
            lora_alpha=2 * settings.lora_r,
            lora_dropout=dropout,
            target_modules=targets if targets == "all-linear" else targets.split(","),
            task_type=TASK,
        )
        shared = copy.deepcopy(self.base, {id(p): p for p in self.base.parameters()})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return lib.get_peft_model(shared, config)
            except (ValueError, NotImplementedError) as error:
                raise UserError(f"--target-modules {targets}: {first_line(error)}") from error

    def with_adapters(self, count: int) -> dict[str, Any]:
        """HF PEFT's and peftkern's model with adapters default, a1, a2, …, in evaluation mode."""
        models = {name: m for name, m in self.models().items() if name in (PEFT, OURS)}
        for name, model in models.items():
            lib = importlib.import_module("peft" if name == PEFT else "peftkern")
            have = len(model.peft_config)
            for i in range(have, count):
                config = model.peft_config["default"]
                model.add_adapter(f"a{i}", lib.LoraConfig(**_plain(config)))
        load(models[OURS], draw(models[PEFT]))
        return {name: model.eval() for name, model in models.items()}

    def work(self, run: Callable[..., Any], prepare: Any = None) -> Work:
        """The work of ``run``, which is over when the device has done it."""
        if self.device.type != "cuda":
            return Work(run, prepare)

        def waits(*args: Any) -> Any:
            out = run(*args)
            torch.cuda.synchronize(self.device)
            return out

        return Work(waits, prepare)


class Step:
    """A training step, forward and backward, on the models of a contest."""

    def __init__(self, contest: Contest, dropout: float) -> None:
        settings = contest.settings
        self.models = contest.models(dropout)
        self.ids = contest.tokens(settings.batch_size, settings.length)
        # the frozen model has nothing to train: its floor is the gradient of its embeddings
        embedded = contest.base.get_input_embeddings()(self.ids).detach()
        self.embedded = embedded.requires_grad_()
        self.works = {
            n: contest.work(partial(self.run, n), partial(self.forget, n)) for n in self.models
        }

    def loss(self, name: str) -> Tensor:
        """The loss of one provider's model."""
        given = {"inputs_embeds": self.embedded} if name == BARE else {"input_ids": self.ids}
        loss: Tensor = self.models[name](**given, labels=self.ids, use_cache=False).loss
        return loss

    def run(self, name: str) -> Tensor:
        """Forward and backward of one provider's model."""
        loss = self.loss(name)
        loss.backward()
        return loss.detach()

    def forget(self, name: str) -> tuple[()]:
        """Make ready for a step: no gradients, and the same dropout for all."""
        self.embedded.grad = None
        self.models[name].train().zero_grad()
        torch.manual_seed(3)
        return ()


def _plain(config: Any) -> dict[str, Any]:
    names = ("r", "lora_alpha", "lora_dropout", "task_type")
    return {n: getattr(config, n) for n in names} | {"target_modules": list(config.target_modules)}


def draw(model: nn.Module) -> dict[str, Tensor]:
    """Draw the B of all adapters, which start at zero; returns {name: tensor} of A and B."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                drawn = torch.empty(parameter.shape).normal_(std=0.02, generator=generator)
                parameter.copy_(drawn)
    return {n: p for n, p in model.named_parameters() if "lora_" in n}


def load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy another library's A and B, which have the same names in both."""
    own = {n: p for n, p in model.named_parameters() if "lora_" in n}
    if own.keys() != weights.keys():
        raise UserError("the libraries adapt different layers of this model; name --target-modules")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def missing_peers(device: torch.device) -> dict[str, str]:
    """{peer: the reason that it is not measured here}."""
    found = {}
    if find_spec("liger_kernel") is None:
        found[LIGER] = "liger-kernel is not installed"
    elif device.type != "cuda":
        found[LIGER] = "its kernels need a GPU"
    for name, package in (("Unsloth", "unsloth"), ("LoRAFusion", "lorafusion")):
        if find_spec(package) is None:
            found[name] = f"{package} is not installed"
        elif device.type != "cuda":
            found[name] = "its kernels need a GPU"
        else:
            found[name] = "it takes the place of parts of transformers for the whole process"
    return found


def _apply_liger(model: Any) -> None:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if apply is None:
        raise UserError(f"liger-kernel has nothing for {model.config.model_type}")
    apply(model=model)
