"""Targets of a configuration beside ``target_modules``: parameters, tied modules, single tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...configs.lora import LoraConfig
from ...utils.error import NoMatchingPeftModuleError
from ...utils.tied import input_embedding_name
from ..base_layer import get_model_config
from ..modules_to_save import find_modules_to_save
from ..targets import match_targets, resolve_targets
from ..trainable_tokens.inject import find_tokens, wrap_tokens
from .expert_families import fused_names
from .expert_targets import find_experts, setting_for
from .linear import Linear
from .parameter_targets import Target, find_parameters, unmatched, wrap_parameter
from .ranks import rank_and_alpha
from .tying import is_tied_target, shares_embedding, tie_adapter, tie_saved_modules


def find_targets(
    config: LoraConfig,
    model: nn.Module,
    others: Sequence[tuple[str, Any]],
    state_dict: dict[str, Tensor] | None = None,
) -> tuple[list[tuple[str, nn.Module]], list[Target]]:
    """(modules, parameters) that the configuration adapts; resolves ``config.target_modules``.

    Modules tied to the input embedding come last.

    Raises:
        ValueError: nothing is found; ``target_parameters`` match nothing and no
            ``target_modules`` that match were given; also those of :func:`find_parameters`.
    """
    if config.target_parameters and state_dict:
        raise ValueError(
            "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses "
            "`target_parameters`. This is not supported -- when using `target_parameters`, please "
            "inject the adapter without the state_dict."
        )
    given = config.target_modules
    try:
        config.target_modules = resolve_targets(config, model)
    except ValueError:
        if config.target_modules is not None or not config.target_parameters:
            raise  # else the architecture has no defaults, and the parameters are enough
    error: ValueError | None = None
    matches: list[tuple[str, nn.Module]] = []
    tied: list[tuple[str, nn.Module]] = []
    if getattr(config, "target_modules_to_tie", None):
        tied = [(n, m) for n, m in model.named_modules() if is_tied_target(config, n)]
    try:
        matches = match_targets(config, model, config.target_modules or set(), state_dict)
    except NoMatchingPeftModuleError as exc:
        error = exc
    if tied:
        matches = [(n, m) for n, m in matches if not is_tied_target(config, n)] + tied
    parameters = find_parameters(config, model, others, [name for name, _ in matches])
    wanted = config.target_parameters
    if wanted and not parameters and (given is None or not matches):
        raise NoMatchingPeftModuleError(f"{error or ''} {_nothing_named(wanted, model)}".lstrip())
    if not matches and not parameters:
        assert error is not None
        raise error
    if config.target_modules and not matches:
        _warn(f"target_modules={config.target_modules} were set but no module was matched.")
    if wanted and not parameters:
        said = f"target_parameters={wanted} were set but no parameter was matched."
        _warn(f"{said} {_nothing_named(wanted, model)}")
    elif wanted and (rest := _meant_in_vain(wanted, model, parameters)):
        _warn(_nothing_named(rest, model))
    return matches, parameters


def _warn(said: str) -> None:
    warnings.warn(said, RuntimeWarning, stacklevel=6)


def _meant_in_vain(names: Sequence[str], model: nn.Module, found: Sequence[Target]) -> list[str]:
    """The names that match no parameter, without those that old targets were converted to."""
    converted = set(fused_names(model).values())
    return [name for name in unmatched(model, names, found) if name not in converted]


def _nothing_named(names: Sequence[str], model: nn.Module) -> str:
    """The sentence about ``target_parameters`` that are not in the model, with those that are."""
    said = f"`target_parameters` names {sorted(names)}, which no parameter of"
    setting = setting_for(find_experts(model))
    there = f" Its experts are adapted by {setting}." if setting else ""
    return f"{said} {type(model).__name__} is called or ends with.{there}"


class ExtraTargets:
    """The targets that are not in ``target_modules``; making one checks all, and changes nothing.

    Args:
        config: the new adapter's configuration.
        model: the base model.
        keys: names of the modules that get an adapter layer.
        parameters: from :func:`find_targets`.
    """

    def __init__(
        self, config: LoraConfig, model: nn.Module, keys: list[str], parameters: list[Target]
    ) -> None:
        self.config = config
        self.parameters = [(t, *rank_and_alpha(config, t.key)) for t in parameters]
        self.tied = [key for key in keys if shares_embedding(config, key)]
        if self.tied and input_embedding_name(model) not in keys:
            raise ValueError(
                f"`ensure_weight_tying` cannot tie {self.tied}: the input embedding gets no "
                "adapter. Is it among the `exclude_modules`?"
            )
        self.saved = find_modules_to_save(
            model, sorted(getattr(config, "modules_to_tie", ()) or ())
        )
        self.tokens = find_tokens(model, config, get_model_config(model), keys)

    @property
    def parameter_names(self) -> list[str]:
        return [target.key for target, *_ in self.parameters]

    def put_layers(self, model: Any, adapter_name: str, active: Any, *how: Any) -> None:
        """Wrap the parameters' modules and share the weights of tied adapters.

        ``how`` are the arguments of ``update_layer`` after the configuration.
        """
        config = self.config
        for target, r, alpha in self.parameters:
            layer = wrap_parameter(model, target, active)
            layer.update_layer(adapter_name, r, alpha, config, *how)
        for key in self.tied:
            tied = model.get_submodule(key)
            if isinstance(tied, Linear):
                source = model.get_input_embeddings()
                tie_adapter(tied, source, adapter_name, config.init_name)

    def put_modules(
        self, model: nn.Module, adapter_name: str, activate: bool, autocast_dtype: bool
    ) -> None:
        """Wrap modules that train in full or by tokens; to call after ``modules_to_save``."""
        tie_saved_modules(model, adapter_name, self.config, activate, self.saved)
        mode = self.config.inference_mode
        wrap_tokens(model, adapter_name, self.tokens, mode, activate, autocast_dtype)
