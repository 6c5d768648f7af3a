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
from .linear import Linear
from .parameter_targets import Target, find_parameters, wrap_parameter
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
        ValueError: nothing is found; also those of :func:`find_parameters`.
    """
    if config.target_parameters and state_dict:
        raise ValueError(
            "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses "
            "`target_parameters`. This is not supported -- when using `target_parameters`, please "
            "inject the adapter without the state_dict."
        )
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
    if not matches and not parameters:
        assert error is not None
        raise error
    for what, found in (("module", matches), ("parameter", parameters)):
        wanted = getattr(config, f"target_{what}s")
        if wanted and not found:
            warnings.warn(
                f"target_{what}s={wanted} were set but no {what} was matched.",
                RuntimeWarning,
                stacklevel=5,
            )
    return matches, parameters


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
