"""The models of a benchmark run: the frozen one, and one of each library with equal adapters."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, first_line
from .measure import BARE, OURS, PEFT, Work, allocated, kept_bytes
from .peers import PEERS, missing_peers
from .remote import PeerGone, Remote
from .settings import BenchSettings

# how far apart the libraries' numbers may be, of the largest: rounding is in another order
APART = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
TASK = "CAUSAL_LM"


class Contest:
    """The base model, and models of each library on its weights.

    The other libraries (:mod:`.peers`) run in processes of their own, which end with the contest.

    Attributes:
        missing: {a peer: the reason that it is not measured}.
    """

    def __init__(self, base: Any, settings: BenchSettings, device: torch.device) -> None:
        self.base: Any = base.eval().requires_grad_(False)
        self.settings, self.device = settings, device
        self.missing = missing_peers(device)
        self._made: dict[float, dict[str, Any]] = {}
        self.vocabulary = self.base.get_input_embeddings().num_embeddings
        self._remotes: dict[str, Remote] = {}
        self._folder: TemporaryDirectory[str] | None = None

    def __enter__(self) -> Contest:
        return self

    def __exit__(self, *error: object) -> None:
        for remote in self._remotes.values():
            remote.close()
        self._remotes.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

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
        found = {BARE: self.base, PEFT: self.adapted("peft", dropout)}
        weights = draw(found[PEFT])
        found[OURS] = self.adapted("peftkern", dropout)
        load(found[OURS], weights)
        return found

    def adapted(self, library: str, dropout: float) -> Any:
        """A model of ``library`` ("peft" or "peftkern") on the base's weights, as it starts."""
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

    def loss(self, name: str) -> float:
        """The loss of one provider's model without dropout."""
        ids = self.tokens(self.settings.batch_size, self.settings.length)
        with torch.no_grad():
            out = self.models(*self._made)[name].eval()(input_ids=ids, labels=ids, use_cache=False)
        return float(out.loss)

    def others(self, what: str, **request: Any) -> dict[str, Work]:
        """The work of the libraries in processes of their own.

        One that fails, or computes another loss than HF PEFT, is ``missing`` from then on.
        """
        works = {}
        for name in [n for n in PEERS if n not in self.missing]:
            try:
                said = self._remote(name).ask(do=what, weights=self._weights(), **request)
                expected = self.loss(PEFT)
                apart = abs(said["loss"] - expected) / abs(expected)
                if not apart <= APART[self.settings.dtype]:
                    raise PeerGone(name, f"its loss differs from HF PEFT's by {apart:.1e}")
                works[name] = self._remote(name).work()
            except PeerGone as gone:
                self.drop(gone)
        return works

    def memory_of_others(self) -> dict[str, tuple[float, float]]:
        """{name: :meth:`Step.memory`} of those whose step was asked for last."""
        found = {}
        for name, remote in list(self._remotes.items()):
            try:
                said = remote.ask(do="memory")
                found[name] = said["kept"], said["peak"]
            except PeerGone as gone:
                self.drop(gone)
        return found

    def drop(self, gone: PeerGone) -> None:
        """Measure a library no more, and say why."""
        self.missing[gone.name] = gone.reason
        remote = self._remotes.pop(gone.name, None)
        if remote is not None:
            remote.close()

    def _remote(self, name: str) -> Remote:
        if name not in self._remotes:
            setup = {
                "settings": vars(self.settings),
                "device": str(self.device),
                "threads": torch.get_num_threads(),
            }
            self._remotes[name] = Remote(name, PEERS[name], setup, self._place())
        return self._remotes[name]

    def _place(self) -> Path:
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="peftkern-bench-")
        return Path(self._folder.name)

    def _weights(self) -> str:
        """A file with A and B of the models as they are now."""
        from safetensors.torch import save_file

        path = self._place() / "adapter.safetensors"
        model = self.models(*self._made)[PEFT]
        tensors = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
        save_file(tensors, path)
        return str(path)

    def work(self, run: Callable[..., Any], prepare: Any = None) -> Work:
        """The work of ``run``, which is over when the device has done it."""
        if self.device.type != "cuda":
            return Work(run, prepare)

        def waits(*args: Any) -> Any:
            out = run(*args)
            torch.cuda.synchronize(self.device)
            return out

        return Work(waits, prepare)


class Alone(Contest):
    """The model of one other library, in its own process.

    ``weights`` is the file that A and B come from.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[Contest, float], Any],
        base: Any,
        settings: BenchSettings,
        device: torch.device,
    ) -> None:
        super().__init__(base, settings, device)
        self.name, self.weights = name, ""
        self.missing = dict.fromkeys(PEERS, "")
        self._build = build

    def renew(self, weights: str) -> None:
        """Take A and B from this file from now on."""
        self.weights = weights
        self._made.clear()

    def _make(self, dropout: float) -> dict[str, Any]:
        from safetensors.torch import load_file

        model = self._build(self, dropout)
        load(model, load_file(self.weights, device=str(self.device)))
        return {self.name: model}


class Step:
    """A training step, forward and backward, on the models of a contest."""

    def __init__(self, contest: Contest, dropout: float) -> None:
        settings = contest.settings
        self.contest, self.models = contest, contest.models(dropout)
        self.ids = contest.tokens(settings.batch_size, settings.length)
        # the frozen model has nothing to train: its floor is the gradient of its embeddings
        embedded = contest.base.get_input_embeddings()(self.ids).detach()
        self.embedded = embedded.requires_grad_()
        self.works = {
            n: contest.work(partial(self.run, n), partial(self.forget, n)) for n in self.models
        }
        self.works |= contest.others("step", dropout=dropout)
        self.ready()

    def ready(self) -> None:
        """Put the models into training mode."""
        for model in self.models.values():
            model.train()

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

    def memory(self, name: str) -> tuple[float, float]:
        """(bytes kept for the backward, most bytes at once beyond the weights) of a step."""
        own = [*self.contest.base.parameters(), self.embedded, *self.models[name].parameters()]
        self.forget(name)
        self.run(name)  # what the first step alone needs (workspaces, tuned kernels) is no part
        self.forget(name)
        kept = kept_bytes(partial(self.loss, name), own)
        self.forget(name)
        return float(kept), float(self._peak(name))

    def _peak(self, name: str) -> int:
        device = self.contest.device
        if device.type != "cuda":
            return allocated(partial(self.run, name))[1]
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self.run(name)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before


class Answer:
    """An answer of ``new_tokens`` by greedy ``generate``, on the models of a contest."""

    def __init__(self, contest: Contest, new_tokens: int | None = None) -> None:
        settings = contest.settings
        n = settings.new_tokens if new_tokens is None else new_tokens
        self.models, self.ids = contest.models(), contest.tokens(1, settings.length)
        how = {
            "max_new_tokens": n,
            "min_new_tokens": n,
            "do_sample": False,
            "attention_mask": torch.ones_like(self.ids),
        }
        self.works = {
            name: contest.work(partial(model.generate, input_ids=self.ids, **how))
            for name, model in self.models.items()
        }
        self.works |= contest.others("answer", new_tokens=n)
        self.ready()

    def ready(self) -> None:
        """Put the models into evaluation mode."""
        for model in self.models.values():
            model.eval()


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
