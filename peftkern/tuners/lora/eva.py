"""EVA (Paischer et al., 2024, arXiv 2410.07170): A spans what the inputs of a layer vary in, and
ranks go to the layers whose inputs vary in more directions.

The components of each layer's inputs are found batch by batch, until none that is needed turns any
more. Layers that read the same input share them. The components of all layers are then ranked by
the share of variance that they explain, and as many are kept as the ranks sum to.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from copy import copy, deepcopy
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ...utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION
from ...utils.incremental_pca import IncrementalPCA
from ...utils.other import get_pattern_key, get_submodules
from ..target_names import _find_minimal_target_modules
from ..tuners_utils import BaseTunerLayer
from .attention import MultiheadAttention
from .base import LoraLayer
from .config import LoraConfig
from .conv import _ConvNd
from .embedding import Embedding
from .eva_inputs import (
    forward_fn_dict,
    gathered,
    layer_rows,
    move_inputs_to_device,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from .group import form_groups
from .inits.calibration import linear_targets
from .layer import Linear

UNSUPPORTED_LORA_MODULES = (Embedding, MultiheadAttention, _ConvNd)
MAX_RHO = 1000  # above it, rho is held to what the model's largest dimension allows
Prepare = Callable[..., Any] | None


class _Watch:
    """A forward hook on one layer: hands the rows [M, K] of its inputs to ``take``."""

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
    """Notes what the layer was called with, so that equal inputs can be told."""

    seen: Any = None

    def take(self, rows: Tensor) -> None:
        if self.seen is None:
            data = rows.detach().cpu().contiguous()
            self.seen = (tuple(data.shape), data.dtype, data.view(torch.uint8).numpy().tobytes())


class _Components(_Watch):
    """The components of the layer's inputs, and which of them the last step left as they were."""

    def __init__(self, watch: _Watch, count: int, tau: float) -> None:
        super().__init__(watch.name, watch.prepare, watch.gather)
        self.pca = IncrementalPCA(count, lowrank=True, lowrank_seed=42)
        self.count, self.tau = count, tau
        self.converged = torch.zeros(count, dtype=torch.bool)
        self.settled = False
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
    """How many components each layer keeps: the ``budget`` largest by explained variance."""
    pairs = [
        (name, share)
        for name, first in source.items()
        for share in watches[first].pca.explained_variance_ratio_[: limit[first]]
    ]
    order = torch.stack([share for _, share in pairs]).argsort(descending=True)
    counts = Counter(pairs[i][0] for i in order[:budget].tolist())
    ranks = {name: counts.get(name, 0) for name in source}
    # the layer that is watched gets the most of those with its input: it has to converge for them
    for name, first in source.items():
        if name != first and ranks[first] < ranks[name]:
            ranks[first], ranks[name] = ranks[name], ranks[first]
    return ranks


def _device_of(model: nn.Module) -> torch.device | None:
    devices = {p.device for p in model.parameters() if p.device.type != "meta"}
    if len(devices) > 1:
        warnings.warn(
            f"Could not determine device, model has multiple devices: {sorted(map(str, devices))}",
            stacklevel=4,
        )
    return devices.pop() if len(devices) == 1 else None


def _state_dict(
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
    settings: Any = config.eva_config
    if len(dataloader) == 0:
        raise ValueError("dataloader is empty")
    per_layer = isinstance(prepare_layer_inputs_fn, Mapping)
    if per_layer and (unknown := sorted(set(prepare_layer_inputs_fn) - set(targets))):
        raise ValueError(
            "prepare_layer_inputs_fn is a mapping but the following module names were not found in "
            f"the model: {unknown}"
        )
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and gather:
        warnings.warn(
            "torch.distributed is initialized and `gather_distributed_inputs` is True, therefore "
            "EVA initialization will gather tensors from all ranks. Ensure the model does not "
            "receive the same inputs on different ranks.",
            stacklevel=4,
        )
    rho = settings.rho
    if rho > MAX_RHO:
        rho = min(rho, max(max(p.shape) for p in model.parameters()) // config.r)
    device = _device_of(model)

    def run(inputs: Any, watches: Iterable[_Watch]) -> None:
        prepare = prepare_model_inputs_fn
        given = deepcopy(inputs) if prepare is None else prepare(inputs, config)
        for watch in watches:
            watch.model_input = given
        forward_fn(model, inputs)

    def moved(inputs: Any) -> Any:
        return inputs if device is None else move_inputs_to_device(inputs, device)

    limit: dict[str, int] = {}
    budget = 0
    prints: dict[str, _Watch] = {}
    ranks_of = config.rank_pattern
    for name in targets:
        rank = ranks_of.get(get_pattern_key(ranks_of, name), config.r)
        limit[name], budget = round(rank * rho), budget + rank
        prepare = prepare_layer_inputs_fn.get(name) if per_layer else prepare_layer_inputs_fn
        prints[name] = _Fingerprint(name, prepare, gather)

    # one batch, to see which layers read the same
    attached: list[_Watch] = list(prints.values())
    try:
        for name, watch in prints.items():
            watch.attach(targets[name])
        run(moved(next(iter(dataloader))), attached)
    finally:
        for watch in attached:
            watch.detach()
    first_with: dict[Any, str] = {}
    same_as: dict[str, str] = {}
    for name, watch in prints.items():
        seen = watch.seen  # type: ignore[attr-defined]
        if seen is None:
            raise ValueError(f"the layer `{name}` was not called by `forward_fn`")
        first = first_with.setdefault(seen, name)
        if first != name:
            same_as[name] = first
            limit[first] = max(limit[first], limit[name])
    for name, first in same_as.items():
        limit[name] = limit[first]
    watches = {
        name: _Components(watch, limit[name], settings.tau)
        for name, watch in prints.items()
        if name not in same_as
    }
    source = {**{name: name for name in watches}, **same_as}

    ranks = dict(limit)
    try:
        for name, found in watches.items():
            found.attach(targets[name])
        quiet = not show_progress_bar or (distributed and torch.distributed.get_rank() != 0)
        bar = tqdm(cycle(dataloader), position=0, leave=False, disable=quiet)
        for step, inputs in enumerate(bar):
            for name, found in watches.items():
                settled = bool(found.converged[: ranks[name]].all())
                if settled and not found.settled:
                    found.detach()
                elif found.settled and not settled:
                    found.attach(targets[name])
                found.settled = settled
            done = sum(watches[first].settled for first in source.values())
            bar.set_description(f"{done}/{len(source)} layers have converged")
            if done == len(source):
                break
            run(moved(inputs), watches.values())
            if step + 1 == len(dataloader) and (
                idle := [n for n, w in watches.items() if not w.steps]
            ):
                raise ValueError(
                    f"no batch has as many rows for the layers {idle} as they need components "
                    f"({limit[idle[0]]}, which is r * rho): use larger batches or a smaller `rho`"
                )
            if all(found.started for found in watches.values()):
                ranks = _ranks(watches, source, limit, budget)
    finally:
        for found in watches.values():
            found.detach()

    out = {}
    for name, rank in ranks.items():
        pca = watches[source[name]].pca
        components = pca.components_[:rank]
        if settings.whiten:
            # in place, so once for each of the layers that share them: HF PEFT's numbers
            components /= pca.singular_values_[:rank, None].sqrt()
        out[name] = components if device is None else components.to(device)
    return out


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[..., Any] = forward_fn_dict,
    prepare_model_inputs_fn: Prepare = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Prepare
    | dict[str, Prepare] = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """{layer: the components [rank, K] of its inputs}; a layer may get rank 0.

    Args:
        model: a model with adapters (which are off for this), or a plain one.
        dataloader: batches, with a length; gone through as often as it takes.
        peft_config: ranks and ``eva_config``; the adapter's by default. Needed for a plain model.
        forward_fn: ``forward_fn(model, batch)``; the default is ``model(**batch)``.
        prepare_model_inputs_fn: makes from (batch, peft_config) what the next one gets. The default
            finds the positions that are no padding and have a label. None: the batch itself.
        prepare_layer_inputs_fn: makes the rows [M, K] to look at from (the layer's positional
            arguments, the above, its name). The default takes those positions of the first
            argument; None takes all. A dict gives one for each layer name.
        adapter_name: which adapter's configuration.
        gather_distributed_inputs: look at the rows of all ranks together.
        show_progress_bar: whether to.

    Raises:
        ValueError: no batch, no configuration, a layer that is never called, or batches with too
            few rows.
    """
    adapted = hasattr(model, "peft_config")
    if peft_config is None:
        if not adapted:
            raise ValueError("peft_config is required if model is not a PeftModel")
        peft_config = model.peft_config[adapter_name]  # type: ignore[index,assignment]
    assert peft_config is not None
    targets: dict[str, Any]
    if adapted:
        kinds = UNSUPPORTED_LORA_MODULES
        inside = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, kinds))
        targets = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)
            and not isinstance(module, kinds)
            and not name.startswith(inside)
        }
    else:
        targets = dict(linear_targets(model, peft_config))
    training = model.training
    with model.disable_adapter() if adapted else nullcontext():  # type: ignore[operator]
        try:
            model.eval()
            return _state_dict(
                model,
                targets,
                dataloader,
                peft_config,
                forward_fn,
                prepare_model_inputs_fn,
                prepare_layer_inputs_fn,
                gather_distributed_inputs,
                show_progress_bar,
            )
        finally:
            model.train(training)


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[..., Any] = forward_fn_dict,
    prepare_model_inputs_fn: Prepare = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Prepare
    | dict[str, Prepare] = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Give the layers of an adapter made with ``init_lora_weights="eva"`` their ranks and A.

    Args:
        model: the model with the adapter, which must be the only active one.
        dataloader: see :func:`get_eva_state_dict`, as are the others.
        eva_state_dict: what that function returned, in place of ``dataloader``.

    A layer with rank 0 loses its adapter layer; one that is not in the state dict starts plainly,
    with a warning. The configuration's ``target_modules`` and patterns say afterwards what there
    is.
    """
    if not hasattr(model, "peft_config"):
        raise ValueError("model must be a PeftModel")
    active: Any = model.active_adapters
    if len(active() if callable(active) else active) > 1:
        raise ValueError(
            "`initialize_lora_eva_weights` currently only works with a single active adapter"
        )
    config: Any = model.peft_config[adapter_name]  # type: ignore[index]
    if config.init_lora_weights != "eva":
        raise ValueError(
            "`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`"
        )
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    _load(model, dict(eva_state_dict), adapter_name, config)


def _load(
    model: nn.Module, components: dict[str, Tensor], adapter: str, config: LoraConfig
) -> None:
    eva, plain = copy(config), copy(config)
    eva.init_lora_weights, plain.init_lora_weights = "eva", True
    settings: Any = config.eva_config
    kept: list[str] = []
    missing: list[str] = []
    others: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, module in list(model.named_modules()):
        short = name.replace("base_model.model.", "")
        if not isinstance(module, LoraLayer):
            others.append(short)
            continue
        r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
        alpha = config.alpha_pattern.get(
            get_pattern_key(config.alpha_pattern, name), config.lora_alpha
        )
        new = r
        if name in components:
            value = components.pop(name)
            new = len(value)
            if new == 0:
                parent, _, last = get_submodules(model, name)
                setattr(parent, last, module.get_base_layer())
                continue
            if new != r and settings.adjust_scaling_factors:
                alpha *= new / r
            weight: Any = module.lora_A[adapter].weight  # type: ignore[attr-defined]
            if new != r or weight.is_meta:
                _renew(module, adapter, new, alpha, eva)
            module.lora_A[adapter].weight.copy_(value)  # type: ignore[attr-defined]
            kept.append(short)
        else:
            _renew(module, adapter, r, alpha, plain)
            missing.append(short)
        if new != config.r:
            ranks[short] = new
        if alpha != config.lora_alpha:
            alphas[short] = alpha
    names: Any = kept + missing
    if len(names) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        names = _find_minimal_target_modules(names, others)
    config.target_modules = set(names)
    config.rank_pattern, config.alpha_pattern = ranks, alphas
    form_groups(model, Linear)
    if missing:
        warnings.warn(
            "the following layers were initialized with init_lora_weights=True because they were "
            f"not found in the eva state_dict: {missing}\ncurrently the following lora modules are "
            f"not supported by EVA: {UNSUPPORTED_LORA_MODULES}",
            stacklevel=3,
        )


def _renew(layer: Any, adapter: str, r: int, alpha: float, config: LoraConfig) -> None:
    """Make an adapter of a layer anew, in the dtype and trainable as it was."""
    stores = [s for s in layer._stores() if adapter in s]
    old = stores[0][adapter]
    old = old.weight if isinstance(old, nn.Module) else old
    base = next(layer.get_base_layer().parameters())
    layer.update_layer(
        adapter,
        r,
        alpha,
        config,
        autocast_dtype=old.dtype != base.dtype,
        trainable=old.requires_grad,
    )
