"""liger-kernel's norms, rope and loss beside adapters: ``fuse(model, liger=True)``.

The adapters come first, then liger's functions on the base model. Linears, groups and MLPs stay
peftkern's: liger's own MLP is never asked for. Nothing here imports liger-kernel before it is asked
for.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from types import MethodType, ModuleType
from typing import Any

from torch import nn

from .ops.notes import note_once
from .tuners.lora.plan import is_hooked, weight_layout
from .tuners.modules_to_save import ModulesToSaveWrapper
from .utils.handing import HERE

# transformers' model types; tests/kernels/test_liger.py compares each with the model without liger
FAMILIES = (
    *("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral"),
    *("olmo2", "phi3", "qwen2", "qwen3", "smollm3"),
)
NORMS = "rms_norm"
LOSS = "fused_linear_cross_entropy"
_SAID = {NORMS: "norms", LOSS: "fused linear cross-entropy"}
_RECORD = "peftkern_liger"


@dataclass
class _Applied:
    """What was changed in a base model, to be undone, and what was not applied."""

    modeling: str  # the module with the functions of the model's family
    # (module, attribute, its value before or () for none, the value that was applied)
    changes: list[tuple[nn.Module, str, tuple[Any, ...], Any]] = field(default_factory=list)
    declined: dict[str, str] = field(default_factory=dict)  # {switch: reason}


def patches() -> ModuleType:
    """liger-kernel's module of patches.

    Raises:
        ImportError: liger-kernel is not installed.
    """
    try:
        from liger_kernel.transformers import monkey_patch
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "liger_kernel":
            raise
        raise ImportError(
            'liger: liger-kernel is not installed; pip install "peftkern[liger]" brings it'
        ) from None
    found: ModuleType = monkey_patch
    return found


def runs_on(device_type: str) -> bool:
    """True when liger's kernels run on such a device: on any but the CPU.

    With TRITON_INTERPRET=1 also on the CPU.
    """
    if device_type in ("cpu", "meta"):
        from .kernels.common import INTERPRET  # imports triton, as liger-kernel does

        return device_type == "cpu" and bool(INTERPRET.value)
    return True


# ------------------------------------------------------------------------------ applying


def apply(model: nn.Module) -> None:
    """Apply liger's norms, rope and fused linear cross-entropy to the base model of ``model``.

    What was applied before is undone first. Where the norms or the loss would be wrong they are
    left out; :func:`describe` says why.

    Raises:
        ImportError: liger-kernel is not installed.
        ValueError: the model is none of transformers', of a family that liger or peftkern does not
            have, on the CPU, or with norms whose forward other code replaced. Nothing is changed.
        RuntimeError: as in :func:`undo`. Nothing is changed.
    """
    table = patches().MODEL_TYPE_TO_APPLY_LIGER_FN
    base = base_of(model)
    modeling = _modeling(base)
    family = getattr(getattr(base, "config", None), "model_type", None)
    if modeling is None:
        raise ValueError(
            f"liger: the base model must be one of transformers', got {type(base).__name__}"
        )
    if family not in FAMILIES or family not in table:
        known = ", ".join(name for name in FAMILIES if name in table)
        raise ValueError(f"liger: the model type must be one of {known}; got {family!r}")
    for name, weight in base.named_parameters():
        if not runs_on(weight.device.type):
            raise ValueError(
                f"liger: the model must be on a GPU, and {name} is on {weight.device.type}; "
                'move it first: model.to("cuda")'
            )
    for name, module in base.named_modules():
        if _is_norm(module) and _replaced(module):
            raise ValueError(
                f"liger: the forward of {name} was replaced, as the hooks of accelerate "
                "(`device_map`) do; load the model onto one device"
            )
    undo(model)
    _apply(base, table[family], modeling)


def _apply(base: nn.Module, liger: Callable[..., None], modeling: ModuleType) -> None:
    record = _Applied(modeling.__name__)
    switches = {}
    for name, parameter in inspect.signature(liger).parameters.items():
        if not isinstance(parameter.default, bool):
            continue
        # what is off by default, liger does not have for this family
        wanted = parameter.default and name in ("rope", NORMS, LOSS)
        reason = _why_not(base, name) if wanted else None
        if name == LOSS and not parameter.default:
            reason = "liger has none for this family"
        if reason is not None:
            record.declined[name] = reason
        switches[name] = wanted and reason is None
    modules = list(base.modules())
    before = [dict(module.__dict__) for module in modules]
    functions = dict(vars(modeling))
    try:
        liger(model=base, **switches)
    except Exception:
        for module, old in zip(modules, before, strict=True):
            module.__dict__.clear()
            module.__dict__.update(old)
        for name, own in functions.items():
            setattr(modeling, name, own)
        raise
    lce = base.__dict__.get("forward")
    if switches.get(LOSS):
        if lce is None or "skip_logits" not in inspect.signature(lce).parameters:
            base.__dict__.pop("forward", None)
            record.declined[LOSS] = "this liger-kernel cannot be told when to call lm_head"
        else:
            base.__dict__["forward"] = MethodType(_guarded(lce.__func__), base)
    for module, old in zip(modules, before, strict=True):
        for name, value in module.__dict__.items():
            was = (old[name],) if name in old else ()
            if not was or was[0] is not value:
                record.changes.append((module, name, was, value))
    base.__dict__[_RECORD] = record
    _restore_functions(base, modeling, functions)


def _restore_functions(base: nn.Module, modeling: ModuleType, before: dict[str, Any]) -> None:
    """Undo what liger replaced for every model of the family, apart from rope.

    The classes of norms were replaced for models made later. Rope is a function that attention
    looks up in its module, so there is no other place for it.
    """
    for name, value in list(vars(modeling).items()):
        own = before.get(name)
        if own is value or own is None:
            continue
        if "rotary" not in name or _is_ligers(own):
            setattr(modeling, name, own)
            continue
        users = own.__dict__.get("peftkern_liger_users")
        if users is None:
            own = _by_device(value, own)
            users = own.__dict__["peftkern_liger_users"]
        users.add(base)
        setattr(modeling, name, own)


def _by_device(liger: Any, own: Any) -> Any:
    """A rope that is liger's where its kernels run, and else the model's own."""

    @functools.wraps(own)
    def rotary(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = liger if runs_on(q.device.type) else own
        return chosen(q, k, *args, **kwargs)

    rotary.__dict__.update(peftkern_liger_own=own, peftkern_liger_users=weakref.WeakSet())
    return rotary


def _guarded(lce: Any) -> Any:
    """liger's forward, which calls lm_head where reading its weight alone would be wrong."""

    @functools.wraps(lce)
    def forward(base: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("skip_logits") is not False:
            reason = why_logits(base)
            if reason is not None:
                note_once("liger's fused linear cross-entropy is not used: %s", reason)
                kwargs["skip_logits"] = False
        return lce(base, *args, **kwargs)

    return forward


# ------------------------------------------------------------------------------ undoing


def undo(model: nn.Module) -> None:
    """Take out of a model what :func:`apply` put there; without any, do nothing.

    Rope becomes the family's own again with the last of its models.

    Raises:
        RuntimeError: a forward of liger was replaced by other code. Nothing is changed.
    """
    base = base_of(model)
    record: _Applied | None = base.__dict__.get(_RECORD)
    if record is None:
        return
    for module, name, _, applied in record.changes:
        if name == "forward" and module.__dict__.get(name) is not applied:
            raise RuntimeError(
                f"liger: the forward of a {type(module).__name__} was replaced after liger's was "
                "applied; undo that first"
            )
    for module, name, old, _ in record.changes:
        module.__dict__.pop(name, None)
        module.__dict__.update((name, value) for value in old)
    del base.__dict__[_RECORD]
    modeling = sys.modules[record.modeling]
    for name, value in list(vars(modeling).items()):
        state = getattr(value, "__dict__", {})
        if "rotary" in name and "peftkern_liger_users" in state:
            state["peftkern_liger_users"].discard(base)
            if not state["peftkern_liger_users"]:
                setattr(modeling, name, state["peftkern_liger_own"])


# ------------------------------------------------------------------------------ reasons


def _why_not(base: nn.Module, switch: str) -> str | None:
    """The reason that a part of liger would be wrong for this model; None when it is right."""
    if switch == NORMS:
        for name, module in base.named_modules():
            inner = module._modules.get("original_module") or module._modules.get("base_layer")
            if inner is not None and _is_norm(inner):
                return f"{name} trains beside an adapter"
    if switch == LOSS:
        cls = type(base)
        if not cls.__name__.endswith("ForCausalLM"):
            return f"a {cls.__name__} has another loss"
        if not str(cls.forward.__module__).startswith(("transformers.", "liger_kernel.")):
            return f"{cls.__name__} has a forward of its own"
        if _replaced(base):
            return "the model's forward was replaced"
        if getattr(getattr(base, "config", None), "pretraining_tp", 1) > 1:
            return "liger does not support pretraining_tp"
    return None


def why_logits(base: Any) -> str | None:
    """The reason that a loss needs a call of lm_head; None when the head's weight alone gives it.

    It is asked in every call, as adapters come and go.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    if base.loss_function is not ForCausalLMLoss:
        return "the model's loss_function was replaced"
    head = base._modules.get("lm_head")
    if head is None:
        return "the model has no lm_head"
    if is_hooked(head) or any(head in block for block in HERE.blocks):
        return "lm_head has hooks or adapter_names"
    if "modules_to_save" in head._modules:
        ours = isinstance(head, ModulesToSaveWrapper)
        # liger looks for the name "default" in a wrapper of HF PEFT, whichever is active
        if not ours and "default" not in head.modules_to_save:
            return "lm_head trains in full for an adapter that is not called default"
        head = head.in_use() if ours else _in_use(head)
        if head is None or is_hooked(head):
            return "lm_head has hooks, or no copy for the active adapter"
    if hasattr(head, "base_layer") or "original_module" in head._modules:
        return "lm_head has an adapter"
    if weight_layout(type(head)) is not False:
        return f"lm_head is a {type(head).__name__}"
    if head.bias is not None:
        return "lm_head has a bias"
    if type(head.weight) is not nn.Parameter or not head.weight.is_floating_point():
        return f"the weight of lm_head is a {type(head.weight).__name__} of {head.weight.dtype}"
    return None


def _in_use(wrapper: Any) -> nn.Module | None:
    """The module whose weight a wrapper of HF PEFT gives out."""
    names = wrapper.active_adapters
    if wrapper.disable_adapters or not names:
        return wrapper._modules["original_module"]
    copies: dict[str, nn.Module] = wrapper.modules_to_save._modules
    return copies.get(names[0])


# ------------------------------------------------------------------------------ what is there


def base_of(model: Any) -> nn.Module:
    """The model in a PeftModel of either library; any other model itself."""
    get = getattr(model, "get_base_model", None)
    base: nn.Module = model if get is None else get()
    return base


def _modeling(base: nn.Module) -> ModuleType | None:
    """transformers' module with the model's class, or with the class that it is derived from."""
    for cls in type(base).__mro__:
        if cls.__module__.startswith("transformers.models."):
            return sys.modules[cls.__module__]
    return None


def _version() -> str:
    try:
        return f" {metadata.version('liger-kernel')}"
    except metadata.PackageNotFoundError:  # on the path without being installed
        return ""


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _is_ligers(forward: Any) -> bool:
    return str(getattr(forward, "__module__", "")).startswith("liger_kernel.")


def _replaced(module: nn.Module) -> bool:
    """True when code other than liger replaced the forward of this one module."""
    forward = module.__dict__.get("forward")
    return forward is not None and not _is_ligers(forward)


def describe(model: nn.Module) -> str | None:
    """What liger-kernel does in a model as it is now, whoever applied it; None for nothing."""
    if "liger_kernel" not in sys.modules:
        return None
    base = base_of(model)
    modeling, record = _modeling(base), base.__dict__.get(_RECORD)
    if modeling is None:
        return None
    declined = {} if record is None else dict(record.declined)
    norms = others = 0
    for module in base.modules():
        if module is not base and _is_ligers(module.forward):
            norms += _is_norm(module)
            others += not _is_norm(module)
    parts = [f"norms ({norms})"] if norms else []
    if others:
        parts.append(f"other modules ({others})")
    for name, value in vars(modeling).items():
        users = getattr(value, "__dict__", {}).get("peftkern_liger_users", ())
        if "rotary" in name and (base in users or _is_ligers(value)):
            parts.append(f"rope (in every {modeling.__name__.split('.')[2]} of this process)")
    if _is_ligers(base.forward):
        reason = why_logits(base)
        if reason is None:
            parts.append("fused linear cross-entropy")
        elif record is not None:
            declined[LOSS] = reason
        else:
            parts.append(f"fused linear cross-entropy, WRONG here: {reason}")
    elif record is not None and _replaced(base):
        declined[LOSS] = "the model's forward was replaced"
    if not parts and not declined:
        return None
    words = f"liger-kernel{_version()}: {', '.join(parts) or 'nothing'}"
    for name, reason in declined.items():
        words += f"; not {_SAID.get(name, name)}: {reason}"
    return words
