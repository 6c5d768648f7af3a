"""The components of layers' inputs, found batch by batch, and the ranks that follow from them.

For EVA, see :mod:`.eva`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ...configs.lora import LoraConfig
from ...utils.gathering import shares_weights
from ...utils.incremental_pca import IncrementalPCA
from .eva_inputs import gathered, layer_rows, move_inputs_to_device
from .ranks import rank_and_alpha

MAX_RHO = 1000  # a larger rho is reduced to what the model's largest dimension allows
Prepare = Callable[..., Any] | None


class _Watch:
    """A forward hook on one layer that hands the rows [M, K] of its inputs to ``take``."""

    def __init__(self, name: str, prepare: Prepare, gather: bool) -> None:
        self.name, self.prepare, self.gather = name, prepare or layer_rows, gather
        self.model_input: Any = None
        self.handle: Any = None

    def attach(self, module: nn.Module) -> None:
        self.handle = module.register_forward_hook(self)

    def detach(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        rows = self.prepare(args, self.model_input, self.name)
        self.take(gathered(rows) if self.gather else rows)

    def take(self, rows: Tensor) -> None:
        raise NotImplementedError


class _Fingerprint(_Watch):
    """A hook that keeps the bytes of a layer's first input, to find layers with equal inputs."""

    seen: Any = None

    def take(self, rows: Tensor) -> None:
        if self.seen is None:
            data = rows.detach().cpu().contiguous()
            self.seen = (tuple(data.shape), data.dtype, data.view(torch.uint8).numpy().tobytes())


class _Components(_Watch):
    """A hook that updates the components of a layer's inputs and notes those that converged."""

    def __init__(self, watch: _Watch, count: int, tau: float) -> None:
        super().__init__(watch.name, watch.prepare, watch.gather)
        self.pca = IncrementalPCA(count, lowrank=True, lowrank_seed=42)
        self.count, self.tau = count, tau
        self.converged = torch.zeros(count, dtype=torch.bool)
        self.complete = False
        self.steps = 0

    @property
    def started(self) -> bool:
        return hasattr(self.pca, "components_")

    def take(self, rows: Tensor) -> None:
        if len(rows) < self.count:
            return
        before = self.pca.components_ if self.started else None
        self.pca.partial_fit(rows.to(torch.float32))
        self.steps += 1
        if before is not None:
            same = torch.nn.functional.cosine_similarity(self.pca.components_, before)
            self.converged = same >= self.tau


def _ranks(
    watches: dict[str, _Components], source: dict[str, str], limit: dict[str, int], budget: int
) -> dict[str, int]:
    """{layer: number of its components among the ``budget`` largest by explained variance}."""
    pairs = [
        (name, share)
        for name, first in source.items()
        for share in watches[first].pca.explained_variance_ratio_[: limit[first]]
    ]
    order = torch.stack([share for _, share in pairs]).argsort(descending=True)
    counts = Counter(pairs[i][0] for i in order[:budget].tolist())
    ranks = {name: counts.get(name, 0) for name in source}
    # of layers with the same input the watched one gets the largest rank, as its components must
    # converge for all of them
    for name, first in source.items():
        if name != first and ranks[first] < ranks[name]:
            ranks[first], ranks[name] = ranks[name], ranks[first]
    return ranks


def _device_of(model: nn.Module) -> torch.device | None:
    devices = {p.device for p in model.parameters() if p.device.type != "meta"}
    if len(devices) > 1:
        warnings.warn(
            f"Could not determine device, model has multiple devices: {sorted(map(str, devices))}",
            stacklevel=5,
        )
    return devices.pop() if len(devices) == 1 else None


class _Search:
    """The search for the components of a model's layers, with :func:`components_of`'s arguments."""

    def __init__(
        self,
        model: nn.Module,
        targets: dict[str, nn.Module],
        dataloader: Any,
        config: LoraConfig,
        forward_fn: Callable[..., Any],
        prepare_model_inputs_fn: Prepare,
    ) -> None:
        self.model, self.targets, self.dataloader, self.config = model, targets, dataloader, config
        self.forward_fn, self.prepare = forward_fn, prepare_model_inputs_fn
        self.device = _device_of(model)
        self.limit: dict[str, int] = {}  # {layer: largest number of components that it may keep}
        self.budget = 0  # the number of components that all layers keep together
        settings: Any = config.eva_config
        rho = settings.rho
        if rho > MAX_RHO:
            rho = min(rho, max(max(p.shape) for p in model.parameters()) // config.r)
        for name in targets:
            rank, _ = rank_and_alpha(config, name)
            self.limit[name] = round(rank * rho)
            self.budget += rank

    def run(self, inputs: Any, watches: Collection[_Watch]) -> None:
        """Run the model on one batch, whose layer inputs the watches record."""
        if self.device is not None:
            inputs = move_inputs_to_device(inputs, self.device)
        prepare = self.prepare
        given = deepcopy(inputs) if prepare is None else prepare(inputs, self.config)
        for watch in watches:
            watch.model_input = given
        self.forward_fn(self.model, inputs)

    def sources(self, prints: dict[str, _Fingerprint]) -> dict[str, str]:
        """{layer: first layer with the same input}, by one batch; such layers share a limit."""
        try:
            for name, watch in prints.items():
                watch.attach(self.targets[name])
            self.run(next(iter(self.dataloader)), prints.values())
        finally:
            for watch in prints.values():
                watch.detach()
        first_with: dict[Any, str] = {}
        source: dict[str, str] = {}
        for name, watch in prints.items():
            if watch.seen is None:
                raise ValueError(f"the layer `{name}` was not called by `forward_fn`")
            source[name] = first = first_with.setdefault(watch.seen, name)
            self.limit[first] = max(self.limit[first], self.limit[name])
        self.limit = {name: self.limit[first] for name, first in source.items()}
        # the layers that are watched, each its own source, come first
        return dict(sorted(source.items(), key=lambda pair: pair[0] != pair[1]))

    def converge(
        self, watches: dict[str, _Components], source: dict[str, str], quiet: bool
    ) -> dict[str, int]:
        """{layer: number of components to keep}, after batches that no longer change them."""
        limit, ranks = self.limit, dict(self.limit)
        try:
            for name, found in watches.items():
                found.attach(self.targets[name])
            bar = tqdm(cycle(self.dataloader), position=0, leave=False, disable=quiet)
            for step, inputs in enumerate(bar):
                for name, found in watches.items():
                    complete = bool(found.converged[: ranks[name]].all())
                    if complete and not found.complete:
                        found.detach()
                    elif found.complete and not complete:
                        found.attach(self.targets[name])
                    found.complete = complete
                done = sum(watches[first].complete for first in source.values())
                bar.set_description(f"{done}/{len(source)} layers have converged")
                if done == len(source):
                    break
                self.run(inputs, watches.values())
                idle = [n for n, w in watches.items() if not w.steps]
                if idle and step + 1 == len(self.dataloader):
                    raise ValueError(
                        f"no batch has as many rows for the layers {idle} as they need components "
                        f"({limit[idle[0]]}, which is r * rho): use larger batches or a smaller "
                        "`rho`"
                    )
                if all(found.started for found in watches.values()):
                    ranks = _ranks(watches, source, limit, self.budget)
        finally:
            for found in watches.values():
                found.detach()
        return ranks


def components_of(
    model: nn.Module,
    targets: dict[str, nn.Module],
    dataloader: Any,
    config: LoraConfig,
    forward_fn: Callable[..., Any],
    prepare_model_inputs_fn: Prepare,
    prepare_layer_inputs_fn: Any,
    gather: bool,
    show_progress_bar: bool,
) -> dict[str, Tensor]:
    """{layer: components [rank, K]} for the layers ``targets``.

    The other arguments are those of :func:`.eva.get_eva_state_dict`. The model must be in
    evaluation mode.
    """
    settings: Any = config.eva_config
    if len(dataloader) == 0:
        raise ValueError("dataloader is empty")
    per_layer = isinstance(prepare_layer_inputs_fn, Mapping)
    if per_layer and (unknown := sorted(set(prepare_layer_inputs_fn) - set(targets))):
        raise ValueError(
            "prepare_layer_inputs_fn is a mapping but the following module names were not found in "
            f"the model: {unknown}"
        )
    distributed = shares_weights()
    if distributed and gather:
        warnings.warn(
            "torch.distributed is initialized and `gather_distributed_inputs` is True, therefore "
            "EVA initialization will gather tensors from all ranks. Ensure the model does not "
            "receive the same inputs on different ranks.",
            stacklevel=4,
        )
    search = _Search(model, targets, dataloader, config, forward_fn, prepare_model_inputs_fn)
    prints = {}
    for name in targets:
        prepare = prepare_layer_inputs_fn.get(name) if per_layer else prepare_layer_inputs_fn
        prints[name] = _Fingerprint(name, prepare, gather)
    source = search.sources(prints)
    watches = {
        name: _Components(prints[name], search.limit[name], settings.tau)
        for name, first in source.items()
        if name == first
    }
    quiet = not show_progress_bar or (distributed and torch.distributed.get_rank() != 0)
    ranks = search.converge(watches, source, quiet)

    out = {}
    for name, rank in ranks.items():
        pca = watches[source[name]].pca
        components = pca.components_[:rank]
        if settings.whiten:
            # in place, so it is repeated for each layer that shares them: HF PEFT's numbers
            components /= pca.singular_values_[:rank, None].sqrt()
        out[name] = components if search.device is None else components.to(search.device)
    return out
