"""LoRA on an ``nn.Parameter``, for example the fused weights of a mixture's experts."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...configs.lora import LoraConfig
from ...ops.bases.formats import Unusable, reader_of
from ...ops.tracing import is_compiling, is_tracing
from ...utils.gathering import held_in, is_shard, shares_weights
from ...utils.handing import HERE, TokenNames, hand_over
from . import experts_call, parameter_product
from .base import NOTHING, LoraLayer
from .experts import shape_of
from .linear import Linear, bare_linear
from .offload import in_place, is_away
from .parameter_proxies import (
    _LoraFactorsProxy,
    _LoraParameterProxy,
    _Proxy,
    _StepsProxy,
)
from .plan import is_hooked
from .ran import FUSED
from .variant import table_of, take_kwargs, variant_class

COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# For one thread at a time: a parametrization changes the module's class, and torch's cache of
# parametrized values is shared by all threads.
_ONE_AT_A_TIME = threading.RLock()


def operation_of(wrapper: Any) -> Any:
    """The file whose ``run`` may compute a wrapper's calls as one operation."""
    is_product = parameter_product.is_product(wrapper.base_layer, wrapper.parameter_name)
    return parameter_product if is_product else experts_call


def separate_reason(wrapper: Any, active: list[str]) -> str | None:
    """The reason that a wrapper's calls get W + scaling · B A; None when they are an operation."""
    if operation_of(wrapper) is parameter_product:
        reason = parameter_product.why_separate(wrapper, active)
    else:
        reason = experts_call.why_separate(wrapper)
    if reason is None:
        return None
    of = f"`{wrapper.parameter_name}` is a parameter of {type(wrapper.get_base_layer()).__name__}"
    formula = "W + scaling · B A"
    if any(name in wrapper.lora_variant for name in active):
        formula = "m / ‖W + scaling · B A‖ · (W + scaling · B A)"
    return f"{of} and gets {formula}: {reason}"


def variant_reason(wrapper: Any, active: list[str]) -> str | None:
    """The reason that a wrapper's operation is not plain LoRA's; None when it is."""
    of_variants = [name for name in active if name in wrapper.lora_variant]
    if not of_variants:
        return None
    if len(active) > 1:
        return f"several adapters are active: {', '.join(active)}"
    reason: str = wrapper.lora_variant[active[0]].decline(wrapper, active[0])
    return reason


class ParamWrapper(nn.Module, LoraLayer):
    """A module with LoRA on one of its parameters; see :class:`LoraConfig` ``target_parameters``.

    The parameter W is [N, K]; for E experts [E, N, K], or [E, K, N] in a module with a true
    ``is_transposed``. ``lora_A[name].weight`` is [r·E, K] and ``lora_B[name].weight`` [N, r·E]:
    expert e has rows e·r … e·r+r-1 of A, and columns e, e+E, e+2E … of B.

    Several parameters of a module have nested wrappers, one for each. The experts of transformers'
    experts interface run as one operation with all of them (:mod:`.experts_call`), and the weight
    of a linear layer as a LoRA linear does (:mod:`.parameter_product`). In other modules the
    parameter is W + scaling · B A during a call, computed for all experts, as the module itself
    selects them; :meth:`decline_reason` says why.

    Args:
        base_layer: the module, or another wrapper around it.
        parameter_name: the attribute of the module that is adapted.

    Raises:
        ValueError: the parameter has neither 2 nor 3 dimensions.
    """

    layer_kind = "parameter"
    # attributes of PEFT's layers that are always empty here
    lora_embedding_A = lora_embedding_B = NOTHING
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    _update = Linear._update

    def __init__(self, base_layer: nn.Module, parameter_name: str) -> None:
        super().__init__()
        self.parameter_name = parameter_name
        self.fan_in_fan_out = False
        self._init_lora(base_layer, lora_A=nn.ModuleDict(), lora_B=nn.ModuleDict())

    def _in_out_features(self) -> tuple[int, int]:
        parameter = self.get_param()
        shape = getattr(parameter, "ds_shape", parameter.shape)  # DeepSpeed's shards are empty
        shape = self._packed_shape() or shape
        self.in_first = len(shape) == 3 and getattr(self.get_base_layer(), "is_transposed", False)
        if len(shape) == 2:
            self.num_experts = 1
            return shape[1], shape[0]
        if len(shape) != 3:
            raise ValueError(
                f"lora.{type(self).__name__} was initialized with {len(shape)} dimensional "
                "Parameter, but only 2d and 3d are supported."
            )
        self.num_experts = shape[0]
        return (shape[1], shape[2]) if self.in_first else (shape[2], shape[1])

    def _packed_shape(self) -> Any:
        """The shape [E, N, K] of quantised experts as numbers, or None."""
        return shape_of(self.get_base_layer(), self.parameter_name)

    def get_param(self) -> Any:
        """The module's present parameter."""
        return getattr(self.get_base_layer(), self.parameter_name)

    # ---------------------------------------------------------------- adapters

    @staticmethod
    def check_config(config: LoraConfig) -> None:
        """Raise a ValueError for a setting that has no meaning for any parameter."""
        settings: dict[str, Any] = {
            "fan_in_fan_out": config.fan_in_fan_out,
            "lora_bias=True": config.lora_bias,
        }
        for what, asked in settings.items():
            if asked:
                raise ValueError(f"lora.ParamWrapper does not work with {what}.")
        if config.init_name not in (True, False, "gaussian"):
            raise ValueError(
                f"lora.ParamWrapper does not work with init_lora_weights="
                f"{config.init_lora_weights!r}, only with True, False and 'gaussian'."
            )
        kind = ParamWrapper.layer_kind
        variant_class(table_of(kind), kind, config)

    def check_here(self, config: LoraConfig) -> None:
        """Raise a ValueError for a setting that has no meaning for this parameter.

        That is dropout where W + scaling · B A is all that can be computed, and DoRA on a packed
        weight, whose sum with B A cannot stand in its place.
        """
        operation = operation_of(self)
        reason = operation.why_never(self.get_base_layer(), self.parameter_name)
        packed = reader_of(self.get_base_layer()) is not None or self._packed_shape() is not None
        if config.use_dora and (packed or not self.get_param().is_floating_point()):
            of = f"`{self.parameter_name}` of {type(self.get_base_layer()).__name__}"
            raise ValueError(
                f"lora.ParamWrapper does not work with use_dora=True on {of}, which is quantised "
                f"({self.get_param().dtype}): DoRA needs the parameter as floating-point numbers. "
                "Allowed: use_dora=False, parameters that are not quantised, or target_modules "
                "for a quantised linear layer"
            )
        if config.lora_dropout and config.use_dora and operation is not parameter_product:
            raise ValueError(
                f"lora.ParamWrapper does not work with lora_dropout={config.lora_dropout} and "
                f"use_dora=True together on `{self.parameter_name}`: DoRA multiplies the whole "
                "parameter, and dropout needs the inputs of its products. Allowed: lora_dropout=0, "
                "use_dora=False, or only weights of linear layers in target_parameters"
            )
        if config.lora_dropout and reason is not None:
            raise ValueError(
                "lora.ParamWrapper does not work with lora_dropout != 0 on "
                f"`{self.parameter_name}`, whose input it does not see: {reason}."
            )

    def _adapter_placement(self, autocast_dtype: bool, meta: bool) -> dict[str, Any]:
        parameter = self.get_param()
        dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
        if dtype.itemsize == 1 or (autocast_dtype and dtype in (torch.float16, torch.bfloat16)):
            dtype = torch.float32
        return {"device": "meta" if meta else parameter.device, "dtype": dtype}

    def _make_weights(
        self, name: str, r: int, config: LoraConfig, place: dict[str, Any], trainable: bool
    ) -> None:
        self.check_config(config)
        self.check_here(config)
        rank = r * self.num_experts
        A = torch.empty((rank, self.in_features), **place)
        B = torch.zeros((self.out_features, rank), **place)
        if config.init_name == "gaussian":
            A.normal_(std=1 / r)
        else:
            A.uniform_(-(self.in_features**-0.5), self.in_features**-0.5)
            if config.init_name is False:
                B.uniform_(-(rank**-0.5), rank**-0.5)
        self.lora_A._modules[name] = bare_linear(A, None, trainable)
        self.lora_B._modules[name] = bare_linear(B, None, trainable)

    # ---------------------------------------------------------------- the update

    def _merge_target(self) -> tuple[nn.Module, str]:
        return self.get_base_layer(), self.parameter_name

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """(left [..., r], right [r, ...]) in the adapter's dtype, batched over experts."""
        A: Any = self.lora_A[adapter].weight
        B: Any = self.lora_B[adapter].weight
        return self.apart(A, B)

    def apart(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """(left [..., r], right [r, ...]) of factors as they are stored, batched over experts."""
        if self.get_param().dim() == 2:
            return B, A
        A, B = self.of_experts(A, B)
        return (A.transpose(1, 2), B.transpose(1, 2)) if self.in_first else (B, A)

    def of_experts(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """(A [E, r, K], B [E, N, r]) of factors as they are stored."""
        A = A.reshape(self.num_experts, -1, A.shape[1])
        return A, B.reshape(B.shape[0], -1, self.num_experts).permute(2, 0, 1)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's update, in the parameter's shape and dtype (for 8 bits, the adapter's)."""
        left, right = self._factors(adapter)
        delta = (left @ right) * self.scaling[adapter]
        dtype = self.get_param().dtype
        return delta.to(dtype) if dtype in COMPUTED else delta

    def _proxy(self, names: Sequence[str]) -> _Proxy:
        parameter = self.get_param()
        if any(name in self.lora_variant for name in names):
            return _StepsProxy([self._step(name) for name in names])
        if len(names) == 1 and parameter.dtype.itemsize > 1:
            left, right = self._factors(names[0])
            scaling = self.scaling[names[0]]
            return _LoraFactorsProxy(left.to(parameter.dtype), right.to(parameter.dtype), scaling)
        delta = self.get_delta_weight(names[0])
        for name in names[1:]:
            delta = delta + self.get_delta_weight(name)
        return _LoraParameterProxy(delta)

    def _step(self, name: str) -> tuple[Tensor, Tensor, float, Tensor | None]:
        variant: Any = self.lora_variant.get(name)
        gain = None if variant is None else variant.weight_gain(self, name)
        return *self._factors(name), self.scaling[name], gain

    @contextmanager
    def _activate_lora(self, active_adapters: Sequence[str]) -> Iterator[None]:
        """A context in which the parameter includes the updates of these adapters."""
        names = [name for name in active_adapters if name in self.lora_A]
        if not names:
            yield
            return
        with ExitStack() as stack:
            if not is_compiling():
                stack.enter_context(_ONE_AT_A_TIME)
            module, attribute = self._merge_target()
            trains = self.get_param().requires_grad
            proxy = self._proxy(names)
            parametrize.register_parametrization(module, attribute, proxy)
            stack.callback(self._deactivate, proxy)
            proxy.registering = False
            original: Any = module.parametrizations[attribute]  # type: ignore[index]
            original.original.requires_grad_(trains)  # torch's registration resets it
            if not is_tracing():  # torch refuses the cache then, and each read computes W + update
                stack.enter_context(parametrize.cached())
            yield

    def _deactivate(self, proxy: _Proxy) -> None:
        module, attribute = self._merge_target()
        parametrizations: Any = module.parametrizations[attribute]  # type: ignore
        if len(parametrizations) == 1:
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            return
        # other parametrizations must stay, and torch has no function to remove one of several
        del parametrizations[next(i for i, p in enumerate(parametrizations) if p is proxy)]

    # ---------------------------------------------------------------- a call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if HERE.blocks:
            kwargs = hand_over(self, kwargs)
            take_kwargs(kwargs)  # dropped: parameters have no variants
        names = kwargs.pop("adapter_names", None)
        if isinstance(names, TokenNames):
            names = names.each
        if self._disable_adapters and self.merged:
            self.unmerge()
        if self._disable_adapters and names is not None:
            if self._packed_shape() is None:
                return self.base_layer(*args, **kwargs)
            names = None
        return self._call(args, kwargs, names)

    def _call(self, args: Any, kwargs: Any, names: Any) -> Any:
        found = operation_of(self).run(self, args, kwargs, names)
        if isinstance(found, Tensor):
            ran = self.__dict__["_ran"]
            if ran is None or not ran.fused:  # else the product has noted it
                self.__dict__["_ran"] = FUSED
            return found
        idle = names is None and (self._disable_adapters or self.merged)
        if not idle and not is_compiling() and is_away(self):
            with in_place(self, args, kwargs) as (args, kwargs):
                return self._call(args, kwargs, names)
        if names is not None:
            raise ValueError(
                f"lora.{type(self).__name__} does not support mixed adapter batches here: {found}"
            )
        if idle:
            if isinstance(found, Unusable):
                of = f"`{self.parameter_name}` of {type(self.get_base_layer()).__name__}"
                raise RuntimeError(f"{of} cannot be computed with: {found}")
            return self.base_layer(*args, **kwargs)
        self._check_dropout_rests(found)
        if self._packed_shape() is not None:
            raise RuntimeError(
                f"`{self.parameter_name}` of {type(self.get_base_layer()).__name__} is quantised, "
                f"and its adapters cannot be applied: {found}"
            )
        self._check_sharding()
        if not is_compiling():
            self._note_decline()
        with self._activate_lora(self.active_adapters):
            return self.base_layer(*args, **kwargs)

    def _check_dropout_rests(self, reason: str) -> None:
        """Raise a RuntimeError where W + scaling · B A would leave dropout out."""
        for name in self.active_adapters:
            drop = self.lora_dropout._modules.get(name)
            if drop is not None and not isinstance(drop, nn.Identity) and drop.training:
                raise RuntimeError(
                    f"lora_dropout of adapter {name!r} on `{self.parameter_name}` needs the "
                    f"parameter's product as one operation, which cannot run: {reason}. Set "
                    "lora_dropout=0, or model.eval() for a call without dropout"
                )

    def _check_sharding(self) -> None:
        """Raise a RuntimeError where W or an adapter's factors are sharded apart from each other.

        FSDP1 does so in every case: W may not be written to where it is a view.
        """
        name = next((n for n in self.active_adapters if n in self.lora_A), None)
        if name is None or not shares_weights():
            return
        W = self.get_param()
        factors = [held_in(store[name]) for store in (self.lora_A, self.lora_B)]
        of = f"`{self.parameter_name}` of {type(self.get_base_layer()).__name__}"
        if type(W) is Tensor or any(type(t) is Tensor or t is None for t in factors):
            raise RuntimeError(
                f"{of} is a view of FSDP1's in the call of adapter {name!r}, which cannot be added "
                "to it: shard by FSDP2 (fully_shard; fsdp_version=2 of accelerate)"
            )
        if len({is_shard(t) for t in (W, *factors)}) > 1:
            what, rest = ("", "are not") if is_shard(W) else (" not", "are")
            raise RuntimeError(
                f"{of} is{what} sharded (a DTensor) in the call of adapter {name!r}, whose "
                f"factors {rest}: "
                "give fully_shard the adapted module or a block around it, and neither the "
                "experts nor the factors alone"
            )

    def decline_reason(self) -> str | None:
        if self._disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return f"merged: {', '.join(self.merged_adapters)}"
        active = [n for n in self.active_adapters if n in self.lora_A]
        if not active:
            return experts_call.NOTHING_ACTIVE
        return separate_reason(self, active) or variant_reason(self, active)

    def is_called_apart(self) -> bool:
        """True when a call runs more than this class's forward."""
        return is_hooked(self)

    def _note_decline(self) -> None:
        base = self.get_base_layer()
        of_wrappers = getattr(base, "parametrizations", {}).values()
        if not any(isinstance(p, _Proxy) for held in of_wrappers for p in held):
            super()._note_decline()  # the outer wrapper has said why, where there is one

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None, "_ran": None}  # a copy has other modules

    def __repr__(self) -> str:
        head, _, rest = super().__repr__().partition("(")
        return f"lora.{head}(\n  parameter_name='{self.parameter_name}',{rest}"
