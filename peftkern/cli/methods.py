"""The methods of ``peftkern train``: which options each takes, and its configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import UserError, first_line
from .options import option

if TYPE_CHECKING:
    from .settings import TrainSettings


@dataclass(frozen=True)
class Method:
    """A method: the name of its configuration's class, and {option: argument of it}."""

    config: str
    takes: dict[str, str]
    fixed: dict[str, Any] = field(default_factory=dict)

    @property
    def on_layers(self) -> bool:
        """True for an adapter in layers; False for a prompt or prefix."""
        return "target_modules" in self.takes


_LORA = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "target_modules",
    "target_parameters": "target_parameters",
    "rslora": "use_rslora",
}
_TOKENS = {"num_virtual_tokens": "num_virtual_tokens"}
_HIDDEN = {"encoder_hidden_size": "encoder_hidden_size"}
METHODS = {
    "lora": Method("LoraConfig", _LORA),
    "dora": Method("LoraConfig", _LORA, {"use_dora": True}),
    "prefix": Method(
        "PrefixTuningConfig", {**_TOKENS, **_HIDDEN, "prefix_projection": "prefix_projection"}
    ),
    "prompt": Method(
        "PromptTuningConfig", {**_TOKENS, "prompt_tuning_init_text": "prompt_tuning_init_text"}
    ),
    "p-tuning": Method("PromptEncoderConfig", {**_TOKENS, **_HIDDEN}),
}
OPTIONS = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.takes))


def refuse_inapplicable(settings: TrainSettings) -> None:
    """Raise a UserError for the first given option that the method does not take."""
    method = METHODS[settings.method]
    for name in OPTIONS:
        if name not in method.takes and settings.was_given(name):
            able = ", ".join(m for m, of in METHODS.items() if name in of.takes)
            raise UserError(
                f"{option(name)} does not go with --method {settings.method}; it is for {able}, "
                f"and {settings.method} takes {', '.join(map(option, method.takes))}"
            )
    with_prompt = not method.on_layers
    if with_prompt and settings.load_in == "fp8":
        raise UserError(f"--load-in fp8 is for adapted layers; {settings.method} has none")
    if settings.packing and settings.method in ("prompt", "p-tuning"):
        raise UserError(
            f"--packing does not go with --method {settings.method}: its virtual tokens would "
            "stand before the first example of a row alone"
        )
    if settings.encoder_hidden_size is not None and settings.method == "prefix":
        if not settings.prefix_projection:
            raise UserError("--encoder-hidden-size needs --prefix-projection with --method prefix")


def refuse_with_trl(settings: TrainSettings) -> None:
    """Raise a UserError for an option that does not go with the trainer."""
    if settings.was_given("beta") and settings.trainer != "dpo":
        raise UserError(f"--beta is for --trainer dpo, and the trainer is {settings.trainer}")
    if settings.trainer == "transformers":
        return
    on = f"does not go with --trainer {settings.trainer}"
    if settings.task != "causal_lm":
        raise UserError(f"--task {settings.task} {on}: causal_lm alone")
    for name in ("fsdp", "deepspeed", "liger", *(["packing"] if settings.trainer == "dpo" else [])):
        if getattr(settings, name):
            raise UserError(f"{option(name)} {on}")
    if settings.trainer == "dpo" and not METHODS[settings.method].on_layers:
        # TRL's reference is a copy of the adapter as it begins, and a prompt is never nothing
        raise UserError(f"--method {settings.method} {on}: lora, dora")


def applies(settings: TrainSettings, name: str) -> bool:
    """False for an option of other methods, or of another trainer, than the chosen one."""
    if name == "beta":
        return settings.trainer == "dpo"
    return name not in OPTIONS or name in METHODS[settings.method].takes


def make_config(settings: TrainSettings) -> Any:
    """The configuration of the adapter; a UserError when a value cannot be."""
    from .. import tuners

    method = METHODS[settings.method]
    values = {argument: getattr(settings, name) for name, argument in method.takes.items()}
    values = {argument: value for argument, value in values.items() if value is not None}
    if method.on_layers:
        values["target_modules"] = settings.target_list()
        if settings.target_parameters is not None:
            values["target_parameters"] = names_in(settings.target_parameters)
    if settings.prompt_tuning_init_text is not None:
        values |= {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": settings.model}
    values |= method.fixed
    try:
        return getattr(tuners, method.config)(task_type=settings.task.upper(), **values)
    except ValueError as error:
        raise UserError(f"--method {settings.method}: {first_line(error)}") from error


def names_in(listed: str) -> list[str]:
    """The names of an option that takes several, with commas."""
    return [name.strip() for name in listed.split(",") if name.strip()]


def refuse_unknown_targets(settings: TrainSettings, base: Any) -> None:
    """Raise a UserError for the first name of a module or parameter that the model does not have.

    The library takes a list of which some names match.
    """
    from ..tuners.targets import choice_of, linear_names, parameter_names

    if not METHODS[settings.method].on_layers:
        return
    targets = settings.target_list()
    modules = [name for name, _ in base.named_modules()]
    parameters = [name for name, _ in base.named_parameters()]
    for name, asked, have, named in (
        ("target_modules", targets, modules, linear_names),
        ("target_parameters", names_in(settings.target_parameters or ""), parameters,
         parameter_names),
    ):  # fmt: skip
        for target in asked if isinstance(asked, list) else ():
            if not any(own == target or own.endswith(f".{target}") for own in have):
                choice = choice_of([target], named(base))
                raise UserError(f"{option(name)} {target}: the model has no such name; {choice}")
