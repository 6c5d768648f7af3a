"""The only uses of private names of torch, transformers and accelerate.

:mod:`.private_names` says why each is used, and what happens without it. This file imports nothing
of peftkern but that one, so that :mod:`peftkern.ops` may import it too.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.jit import is_tracing  # type: ignore[attr-defined]  # it is not in its `__all__`
from torch.nn.modules import module as _nn_module
from torch.utils.hooks import RemovableHandle

from .private_names import PrivateNameError, warn_without

# ------------------------------------------------------------------------------------ torch

if hasattr(torch._C, "_are_functorch_transforms_active"):
    transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
else:
    warn_without("_C._are_functorch_transforms_active")

    def transforms_active() -> bool:
        return True


# the level of torch's forward-mode AD; -1 outside of any
if hasattr(forward_ad, "_current_level"):
    # as fast as a property of a tensor; a function of Python's own would take three times as long
    forward_level: Callable[[], int] = partial(getattr, forward_ad, "_current_level")
else:
    warn_without("autograd.forward_ad._current_level")

    def forward_level() -> int:
        return 0


def in_transform() -> bool:
    """True within a transform of torch.func (vmap, grad, jvp) or a level of forward-mode AD.

    Both see only torch's own operations.
    """
    return transforms_active() or forward_level() >= 0


def outside_transforms() -> Any:
    """A context in which no transform of torch.func is active, for work on plain tensors."""
    from torch._functorch import pyfunctorch

    clear = getattr(pyfunctorch, "temporarily_clear_interpreter_stack", contextlib.nullcontext)
    return clear()


# torch's gradients of a batch of outputs (`is_grads_batched`) come in tensors without memory, while
# no transform is active
is_grad_batch: Callable[[Tensor], bool] = getattr(
    getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", lambda t: False
)
jit_is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", is_tracing)
# the number of dispatch modes; without the name there may be one
dispatch_depth: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)

# (class, shape, dtype=, device=) -> a tensor of that class without data; None without the name
make_wrapper: Callable[..., Any] | None = getattr(Tensor, "_make_wrapper_subclass", None)
DisabledTorchFunction: Any = getattr(
    torch._C, "_disabled_torch_function_impl", Tensor.__torch_function__
)


def _aten(name: str) -> Any:
    packet = getattr(torch.ops.aten, name, None)
    return None if packet is None else packet.default


# (x [M, K] bf16, q [N, K] int8, scales [N] bf16) -> x qᵀ · scales on a CPU; None without the name
int8_product: Callable[..., Tensor] | None = _aten("_weight_int8pack_mm")
# (a [M, R] int8, b [R, C] int8) -> a b in int32; None without the name
integer_product: Callable[..., Tensor] | None = _aten("_int_mm")


@cache
def mkl_batches() -> dict[torch.dtype, Callable[..., None]]:
    """{float32, float64: MKL's ?gemm_batch_64}; empty where torch's libraries do not export them.

    Fifteen addresses, as in Fortran, of 64-bit integers: ``void (transa, transb, m, n, k, alpha,
    A, lda, B, ldb, beta, C, ldc, groups, products of each group)``.
    """
    found: dict[torch.dtype, Callable[..., None]] = {}
    if not torch.backends.mkl.is_available():
        return found
    try:
        library = ctypes.CDLL(torch._C.__file__)  # with all that it is linked with
        for dtype, name in (
            (torch.float32, "sgemm_batch_64"),
            (torch.float64, "dgemm_batch_64"),
        ):
            call = getattr(library, name)
            call.restype, call.argtypes = None, [ctypes.c_void_p] * 15
            found[dtype] = call
    except (OSError, AttributeError):
        return {}
    return found


@cache
def bnb4_gemv() -> dict[str, Callable[..., None]]:
    """{"nf4", "fp4": the function behind bitsandbytes' operator gemv_4bit on CPUs}; {} without it.

    ``void (M, N, K, x, w, scales, y, blocksize, stride of x, stride of y)``, 64-bit integers and
    addresses, x [M, K] and y [M, N] in bfloat16. It cannot be asked for its arguments; those of
    version 0.50 count.
    """
    kind = ctypes.CFUNCTYPE(
        None, *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3
    )
    try:
        if not metadata.version("bitsandbytes").startswith("0.50."):
            return {}
        owner: Any = importlib.import_module("bitsandbytes.backends.cpu.ops")
        if owner.gemm_4bit_forward_kernel is not None:  # from the hub, which the operator prefers
            return {}
        names = {name: f"gemv_4bit_inference_cpu_{name}_bf16" for name in ("nf4", "fp4")}
        found = {kind_: getattr(owner.lib, name) for kind_, name in names.items()}
        at = {name: ctypes.cast(call, ctypes.c_void_p).value for name, call in found.items()}
    except (ImportError, AttributeError, ctypes.ArgumentError):
        return {}
    return {name: kind(address) for name, address in at.items() if address}


def _facts(t: Tensor) -> tuple[Any, ...]:
    kind = t.__class__, t.dtype, t.device, t.layout, t.requires_grad
    return *kind, t.is_neg(), t.shape, t.stride() if t.layout is torch.strided else None


def like(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A check whether as many tensors are like these, one by one, in all but their values.

    It compares class, dtype, device, layout, negation, shape, strides and ``requires_grad``. It may
    say no in another mode of torch (inference mode, a transform), but yes only when they are alike.
    """
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    kind: Any = getattr(guards, "TensorGuards", None)
    if kind is not None and all(t.layout is torch.strided for t in tensors):
        check: Callable[..., bool] = kind(
            *tensors,
            dynamic_dims_sizes=[[*t.shape] for t in tensors],
            dynamic_dims_strides=[[*t.stride()] for t in tensors],
        ).check
        if check(*tensors):  # it says no where one tensor stands twice
            return check
    facts = [*map(_facts, tensors)]
    return lambda *others: [*map(_facts, others)] == facts


flash = _aten("_scaled_dot_product_flash_attention")
flash_backward = _aten("_scaled_dot_product_flash_attention_backward")
cpu_flash = _aten("_scaled_dot_product_flash_attention_for_cpu")
cpu_flash_backward = _aten("_scaled_dot_product_flash_attention_for_cpu_backward")
# (tensor, shape) -> the tensor in that shape, but not marked as a view, as torch's own linear
# returns it: callers may not write to a view that a custom Function returns
unsafe_view: Callable[..., Tensor] = _aten("_unsafe_view") or torch.view_copy


_assert_async: Callable[[Tensor, str], None] | None = getattr(torch, "_assert_async", None)

# torch's dispatch modes in the forward and the recomputation of a selective checkpoint
SELECTIVE = ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")


def assert_later(condition: Tensor, words: str) -> None:
    """Raise an error with these words if the tensor is False; on CUDA without waiting for it."""
    if _assert_async is not None:
        _assert_async(condition, words)


def without_dispatch_modes() -> contextlib.AbstractContextManager[Any]:
    """A context in which no dispatch mode (selective checkpointing, counters) sees calls."""
    if dispatch_depth() == 0:
        return contextlib.nullcontext()
    try:
        from torch.utils._python_dispatch import _disable_current_modes
    except ImportError:
        raise PrivateNameError("utils._python_dispatch._disable_current_modes") from None
    return _disable_current_modes()


def outputs_are_kept() -> bool:
    """True when selective checkpointing may keep the output of any operation of torch.

    Such outputs may not be written to.
    """
    if dispatch_depth() == 0:
        return False
    from torch.utils import _python_dispatch, checkpoint

    stack = getattr(_python_dispatch, "_get_current_dispatch_mode_stack", None)
    kinds: list[Any] = [getattr(checkpoint, name, None) for name in SELECTIVE]
    if stack is None or None in kinds:
        return True
    return any(isinstance(mode, tuple(kinds)) for mode in stack())


def in_backward() -> bool:
    """True when this thread runs a backward pass."""
    ask = getattr(torch._C, "_current_graph_task_id", None)
    if ask is None:
        raise PrivateNameError("_C._current_graph_task_id")
    return bool(ask() != -1)


def _global_hooks() -> tuple[Any, ...]:
    found = []
    for kind in ("forward", "forward_pre", "backward", "backward_pre"):
        hooks = getattr(_nn_module, f"_global_{kind}_hooks", None)
        if hooks is None:
            warn_without(f"nn.modules.module._global_{kind}_hooks")
            hooks = {"unknown": None}
        found.append(hooks)
    return tuple(found)


# torch's own dicts of hooks on all modules; not copies, so that later hooks are seen
GLOBAL_HOOKS = _global_hooks()


class _Uncounted:
    next_id = float("nan")  # never equal to the number seen before


# ``next_id`` changes whenever a hook is registered on anything
HookCounter: Any = RemovableHandle if hasattr(RemovableHandle, "next_id") else _Uncounted

CONV_FORWARD = "_conv_forward"


def convolve(conv: Any, x: Tensor, weight: Tensor) -> Tensor:
    """``x`` through the convolution ``conv`` with this weight and no bias."""
    if not hasattr(conv, CONV_FORWARD):
        raise PrivateNameError("nn.Conv2d._conv_forward")
    y: Tensor = getattr(conv, CONV_FORWARD)(x, weight, None)
    return y


def bartlett(wishart: Any) -> Tensor:
    """One random L [r, r] for which L Lᵀ has the Wishart distribution."""
    draw = getattr(wishart, "_bartlett_sampling", None)
    if draw is None:
        raise PrivateNameError("distributions.Wishart._bartlett_sampling")
    drawn: Tensor = draw(torch.Size())
    return drawn


def default_store() -> Any:
    """The store in which the processes of the default group found each other; None without one."""
    from torch.distributed import distributed_c10d

    find = getattr(distributed_c10d, "_get_default_store", None)
    return None if find is None else find()


# parts that torch.compile, FSDP and torch's checkpoint_wrapper add to the names of weights
COMPILED = "_orig_mod."
FSDP = "_fsdp_wrapped_module."
WRAPPERS = (COMPILED, FSDP, "_checkpoint_wrapped_module.")


def uncompiled(model: Any) -> Any:
    """The model inside torch.compile's wrapper; any other model itself."""
    return getattr(model, "_orig_mod", model)


def is_compiled(model: nn.Module) -> bool:
    """True when torch.compile has wrapped the model or will compile its calls."""
    return uncompiled(model) is not model or bool(getattr(model, "_compiled_call_impl", None))


def fsdp_has_run(model: nn.Module) -> bool:
    """True when FSDP2 shards a module of the model, and a forward of it has run."""
    for module in model.modules():
        ask = getattr(module, "_get_fsdp_state", None)
        if ask is not None and getattr(ask(), "_is_root", None) is not None:
            return True
    return False


# ----------------------------------------------------------------------------- transformers


def kept_wide(model: nn.Module) -> list[str]:
    """The names of layers that transformers leaves out when it quantises this model."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_keep_in_fp32_modules", None) or ())
    return sorted(names)


CHECKPOINT_RUNNER = "_gradient_checkpointing_func"
KEEPS_CACHE = "_can_checkpoint_with_cache"
NO_SPLIT = "_no_split_modules"
TIED = "_tied_weights_keys"
RENAMED = "_checkpoint_conversion_mapping"
NAME_KEY = "_name_or_path"


def attention_name(config: Any) -> str | None:
    """The name of the attention that a model with this configuration calls ("sdpa", ...)."""
    if not hasattr(config, "_attn_implementation"):
        raise PrivateNameError("PreTrainedConfig._attn_implementation")
    name: str | None = config._attn_implementation
    return name


def keeps_other_state(model: Any) -> bool:
    """True when a model keeps a state between calls other than keys and values."""
    return bool(getattr(model, "_is_stateful", False))


def set_attention(config: Any, name: str | None) -> None:
    """Make models with this configuration, but not with its sub-configurations, call ``name``."""
    config._attn_implementation_internal = name
    if attention_name(config) != name:
        raise PrivateNameError("PreTrainedConfig._attn_implementation_internal")


def _checkpointing_layer() -> Any:
    """transformers' base class of checkpointed layers; before it is loaded, an empty tuple."""
    layers = sys.modules.get("transformers.modeling_layers")
    return getattr(layers, "GradientCheckpointingLayer", ())


def keep_cache(block: Any) -> None:
    """Let transformers pass the cache to this block within a gradient checkpoint too."""
    if isinstance(block, _checkpointing_layer()) and not hasattr(type(block), KEEPS_CACHE):
        raise PrivateNameError("GradientCheckpointingLayer._can_checkpoint_with_cache")
    setattr(block, KEEPS_CACHE, True)


def checkpoint_runners(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that transformers may run within a gradient checkpoint."""
    wrapped, found = _checkpointing_layer(), []
    for module in model.modules():
        if CHECKPOINT_RUNNER in module.__dict__:
            found.append(module)
        elif isinstance(module, wrapped) and module.gradient_checkpointing:
            raise PrivateNameError("GradientCheckpointingLayer._gradient_checkpointing_func")
    return found


def upcast_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
    """GPT-2's attention with ``reorder_and_upcast_attn``."""
    return module._upcast_and_reordered_attn(q, k, v, mask)


def recurrent_start(model: Any) -> Callable[..., None] | None:
    """The function that resets the states of a recurrent model's layers; None for other models."""
    start = getattr(model, "_setup_cache", None)
    if start is None and getattr(getattr(model, "config", None), "model_type", "") == _RECURRENT:
        raise PrivateNameError("RecurrentGemmaPreTrainedModel._setup_cache")
    return start


_RECURRENT = "recurrent_gemma"


def conversion_families() -> dict[str, str]:
    """{model type: the model type whose renamings of weights it uses}."""
    from transformers import conversion_mapping

    return getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})


def leave_out_of_ddp(model: nn.Module, names: Sequence[str]) -> None:
    """Keep DistributedDataParallel from broadcasting these parameters and buffers of a model."""
    name = "_set_params_and_buffers_to_ignore_for_model"
    ignore = getattr(nn.parallel.DistributedDataParallel, name, None)
    if ignore is None:
        warn_without(f"nn.parallel.DistributedDataParallel.{name}")
    else:
        ignore(model, names)


def use_one_gpu(args: Any) -> None:
    """Keep a Trainer with these arguments from splitting batches with ``nn.DataParallel``."""
    args._n_gpu = 1
    if args.n_gpu != 1:
        raise PrivateNameError("TrainingArguments._n_gpu")


def asks_for_attention(attention: nn.Module) -> bool:
    """True when the module's forward calls the attention that its configuration names."""
    return "ALL_ATTENTION_FUNCTIONS" in (source_of(type(attention).forward) or "")


def source_of(function: Any) -> str | None:
    """The text of a function; None when it is not to be had."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return None


def _nested_code(function: Any, *names: str) -> Any:
    """The code of the function that is defined by these names, one in the other; None without."""
    code: Any = getattr(function, "__code__", None)
    for name in names:
        inner: Any = getattr(code, "co_consts", ())
        code = next((c for c in inner if getattr(c, "co_name", None) == name), None)
    return code


class ExpertsForm(NamedTuple):
    """What transformers' experts interface has made of a class of experts."""

    eager: Callable[..., Any]  # the forward that the class itself defines
    default_gate: bool  # act_fn(gate) * up, of two halves
    # {name that a configuration may have: (the interface's table, the function known by it)}
    known: dict[str, Any]
    table: Any


def experts_form(cls: Any) -> ExpertsForm | None:
    """The form of a class in transformers' experts interface; None for any other class."""
    moe: Any = sys.modules.get("transformers.integrations.moe")
    decorator = getattr(moe, "use_experts_implementation", None)
    code, forward = _nested_code(decorator, "wrapper", "forward"), cls.forward
    own: Any = getattr(forward, "__code__", None)
    if own is None or own is not code:
        return None
    cells = dict(zip(own.co_freevars, forward.__closure__, strict=True))
    names = ("experts_interface", "original_forward")
    default = getattr(moe, "_default_apply_gate", None)
    if any(name not in cells for name in names) or default is None:
        return None
    table, eager = (cells[name].cell_contents for name in names)
    if table is not getattr(moe, "ALL_EXPERTS_FUNCTIONS", None):
        return None
    known = {name: getattr(moe, f"{name}_experts_forward", None) for name in EXPERTS_FUNCTIONS}
    gate = getattr(cls, EXPERTS_GATE, None)
    return None if gate is None else ExpertsForm(eager, gate is default, known, table)


EXPERTS_FUNCTIONS = ("grouped_mm", "batched_mm")
EXPERTS_GATE = "_apply_gate"


def experts_implementation(module: Any) -> Any:
    """The name of the implementation that a module of experts asks the interface for."""
    return getattr(module.config, "_experts_implementation", "unknown")


def experts_have_sentinels(module: Any) -> bool:
    """True when an index of E stands for an expert of another process.

    transformers 5.17 has no flag for it and reckons with such indices always.
    """
    return bool(module.__dict__.get("_is_expert_parallel", True))


# ------------------------------------------------------------------------------- accelerate


def compressed_forward(module: Any) -> Any:
    """The function that compressed-tensors' wrapper of a module's forward calls, or None."""
    return module.__dict__.get("_original_forward_func")


def hook_of(module: Any) -> Any:
    """The hook that accelerate put on a module, or None."""
    # not getattr: for a module without hook torch raises and catches an error
    return module.__dict__.get("_hf_hook")


def forward_of(module: Any) -> Callable[..., Any]:
    """The module's own forward, which a hook of accelerate may have replaced."""
    forward: Callable[..., Any] = getattr(module, "_old_forward", module.forward)
    return forward
