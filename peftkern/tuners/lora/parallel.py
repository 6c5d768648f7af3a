"""LoRA on layers that transformers has sharded by tensor parallelism.

A layer's weight W is sharded, and so are its adapter's factors: of a column-parallel layer (W's
rows are shared out, and Y's columns) B, of a row-parallel one (W's columns, and X's) A. The other
factor is on every rank. All are DTensors, so that optimizers, norms of gradients and state dicts
see what one process has.

A call with one adapter is one operation on the shards, as in one process, and what transformers'
own forward sends goes for both parts together:

    columns:  y_i = x W_iᵀ + s · (x Aᵀ) B_iᵀ           backward: dX and dA are summed
    rows:     Y = Σ_i (x_i W_iᵀ + s · (x_i A_iᵀ) Bᵀ)   backward: dB is summed

Other calls run the base layer's forward and add the update with a collective of r numbers a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.func import functional_call
from torch.nn.functional import linear

from ...configs.lora import LoraConfig
from ...ops import autocast
from ...ops.lora import fused_linear
from ...ops.lora_group import lora_group
from ...ops.projection import Projection
from ...ops.tracing import is_tracing
from ...utils.collectives import (
    all_columns,
    local,
    own_columns,
    shared_out,
    span,
    summed,
    with_part,
    with_summed_grad,
)
from ...utils.handing import HERE, hand_over
from ...utils.private import GLOBAL_HOOKS, in_transform
from ..tensor_parallel import EMBEDDINGS, STYLES, Style, of_transformers
from .embedding import Embedding
from .group import Group
from .linear import SCALING_IS_A_TENSOR, Linear, _dtypes_fit
from .plan import hook_dicts, is_hooked
from .variant import LoraVariant, select, table_of


class LocalWeight:
    """What merging reads and writes of a sharded layer: this rank's part, in the layer's memory."""

    def __init__(self, base: Any) -> None:
        bias = getattr(base, "bias", None)
        with torch.no_grad():
            self.weight = local(base.weight)
            self.bias = None if bias is None else local(bias)
        self._parameters: dict[str, Any] = {}


class Part(Projection):
    """The projection that this rank computes, and the parameters that it is a part of."""

    held: list[Any]


class ParallelGroup(Group):
    """Column-parallel layers with the same X, whose gradient is summed over the ranks once.

    Few rows without gradients are computed apart, as nothing is summed for them.
    """

    def __init__(self, names: list[str], layers: list[Any]) -> None:
        super().__init__(names, layers)
        self.apart = True

    def _calls(self, index: int, x: Tensor, call: Projection) -> dict[int, Projection]:
        calls = {index: call}
        for i, other in enumerate(self.layers):
            if i != index and other.decline_reason() is None:
                part = other.local_projection(x)
                if part is not None:
                    calls[i] = part
        return calls

    def _run(self, x: Tensor, calls: list[Projection], token: Any) -> Any:
        return lora_group(self.layers[0].enter(x), calls, token)


class Parallel:
    """The part of a layer whose base weight is a DTensor on a mesh of one dimension."""

    base_layer: Any
    lora_B: Any
    plan_name: str
    variant_kind: str  # the key of its variants' table

    @property
    def mesh(self) -> Any:
        """The ranks that share the layer out."""
        return self.base_layer.weight.device_mesh

    def describe_sharing(self) -> str:
        return f"; tensor parallel over {self.mesh.size()} ranks: {self.plan_name}"

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        return table_of(self.variant_kind)

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> LoraVariant | None:
        return select(self.lora_variants, self.variant_kind, config)

    def _merge_target(self) -> tuple[Any, str]:
        return LocalWeight(self.base_layer), "weight"

    def _base_parameter(self) -> Tensor:
        weight: Tensor = self.base_layer.weight
        return weight

    def _unmerged_parameter(self) -> Tensor:
        merging: Any = super()
        return with_part(self.base_layer.weight, merging._unmerged_weight())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: a rank has a part of the update alone."""
        return False

    def _bias_update(self, adapter: str) -> Tensor:
        return local(self.lora_B[adapter].bias).detach()

    def _agreed(self, ok: bool) -> bool:
        """True when ``ok`` is true on every rank, so that all of them merge, or none."""
        from torch import distributed as dist

        answer = torch.tensor(int(ok), device=local(self.base_layer.weight).device)
        dist.all_reduce(answer, op=dist.ReduceOp.MIN, group=self.mesh.get_group())
        return bool(answer.item())


class ParallelLinear(Parallel, Linear):
    """A frozen linear layer with low-rank updates, shared out over the ranks of a mesh.

    ``lora_A[name].weight`` [r, K] and ``lora_B[name].weight`` [N, r] are DTensors. X and Y are
    plain tensors, whole or this rank's columns of them, as the plan has it.
    """

    variant_kind = "parallel linear"

    def __init__(self, base_layer: nn.Module, plan_name: str, **kwargs: Any) -> None:
        self.__dict__["plan_name"] = plan_name  # _make_weights reads it
        super().__init__(base_layer, **kwargs)

    @property
    def group_class(self) -> type[ParallelGroup] | None:
        """What makes layers of this kind one operation; None: nothing does."""
        return ParallelGroup if self.style.dim == 0 else None

    @property
    def style(self) -> Style:
        return STYLES[self.plan_name]

    def _make_weights(
        self, name: str, r: int, config: LoraConfig, place: dict[str, Any], trainable: bool
    ) -> None:
        super()._make_weights(name, r, config, place, trainable)
        rows = self.style.dim == 0
        a, b = self.lora_A[name]._parameters, self.lora_B[name]._parameters
        dims = ((a, "weight", None if rows else 1), (b, "weight", 0 if rows else None))
        for parameters, key, dim in (*dims, (b, "bias", 0 if rows else None)):
            if (whole := parameters[key]) is not None:
                parameters[key] = shared_out(whole.detach(), self.mesh, dim, trainable)

    # ---------------------------------------------------------------- calls

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if HERE.blocks:
            kwargs = hand_over(self, kwargs)
        if not (args or kwargs or is_compiling()) and self.decline_reason() is None:
            member = self.local_projection(x)
            if member is not None:
                y, group = None, self.__dict__["_group"]
                # without gradients only with dropout, as in Linear.forward
                if group is not None and not group.off:
                    if member.p > 0.0 or torch.is_grad_enabled():
                        y = group.output(self, x, member)
                return self.leave(fused_linear(self.enter(x), *member) if y is None else y)
        return self._forward_general(x, *args, **kwargs)

    def fused_call(self, x: Tensor) -> None:
        """None: this layer is called by :meth:`forward` alone."""

    def traced_call(self, x: Tensor) -> None:
        """None: a compiler gets the base layer's forward and the update."""

    def local_projection(self, x: Tensor) -> Part | None:
        """This rank's part of a call with x; :meth:`decline_reason` must be None.

        None for an x whose dtype the operation does not take. The bias of a row-parallel layer is
        left out, as it is added to the sum.
        """
        name, base = self.active_adapters[0], self.base_layer
        A: Any = self.lora_A[name]
        B: Any = self.lora_B[name]
        weight = local(base.weight)
        if not _dtypes_fit(x, weight.dtype, A.weight.dtype, B.weight.dtype):
            return None
        columns = self.style.dim == 0
        drop: Any = self.lora_dropout[name]
        p = drop.p if drop.training and isinstance(drop, nn.Dropout) else 0.0
        bias = local(base.bias) if columns and base.bias is not None else None
        low = local(A.weight, sums=columns), local(B.weight, sums=not columns)
        scale: Any = self.scaling[name]
        part = Part(weight, bias, *low, scale, p, False)
        part.held = [base.weight, base.bias, A.weight, B.weight]
        return part

    def enter(self, x: Tensor) -> Tensor:
        """The input of this rank's part of a call."""
        if self.style.dim == 0:
            return with_summed_grad(x, self.mesh.get_group())
        return own_columns(x, self.mesh) if self.style.whole_input else x

    def leave(self, y: Tensor) -> Tensor:
        """The layer's output, from this rank's part."""
        if self.style.dim == 0:
            return self.as_output(y)
        y = summed(y, self.mesh.get_group())
        return y if self.base_layer.bias is None else y + local(self.base_layer.bias).to(y.dtype)

    def _update(self, name: str, x: Tensor) -> Tensor:
        A: Any = self.lora_A[name]
        if not autocast.is_on(x):
            x = self._cast_input_dtype(x, A.weight.dtype)
        return self.low_rank(name, self._dropped(name, x)) * self.scaling[name]

    def low_rank(self, name: str, x: Tensor) -> Tensor:
        """B A x of an x with dropout, as the plan has the layer's input and output."""
        group, columns = self.mesh.get_group(), self.style.dim == 0
        if not columns and self.style.whole_input:
            x = own_columns(x, self.mesh)
        s = _called(self.lora_A[name], x)
        s = with_summed_grad(s, group) if columns else summed(s, group)
        return self.as_output(_called(self.lora_B[name], s))

    def base_product(self, x: Tensor) -> Tensor:
        """x Wᵀ of an x with dropout, as the plan has the layer's input and output."""
        weight = local(self.base_layer.weight).to(x.dtype)
        if self.style.dim == 0:
            return self.as_output(linear(with_summed_grad(x, self.mesh.get_group()), weight))
        x = own_columns(x, self.mesh) if self.style.whole_input else x
        return summed(linear(x, weight), self.mesh.get_group())

    def as_output(self, y: Tensor) -> Tensor:
        """What the layer gives of which this rank has y: its columns, or all of it already."""
        if self.style.dim == 0 and self.style.whole_output:
            return all_columns(y, self.out_features, self.mesh)
        return y

    def _dropped(self, name: str, x: Tensor) -> Tensor:
        """x with dropout; where it is a part of the columns, with this part of the whole mask.

        So every rank draws the same numbers as the others, and as one process.
        """
        drop: Any = self.lora_dropout[name]
        if self.style.whole_input or type(drop) is not nn.Dropout:
            dropped: Tensor = drop(x)
            return dropped
        if not drop.training or drop.p == 0.0:
            return x
        if drop.p == 1.0:
            return x * 0.0
        start, stop = span(self.in_features, self.mesh)
        mask = x.new_empty((*x.shape[:-1], self.in_features)).bernoulli_(1.0 - drop.p)
        return x * mask[..., start:stop].div(1.0 - drop.p)

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """This rank's part of the factors, whose product is the part of the weight's update."""
        B: Any = self.lora_B[adapter]
        A: Any = self.lora_A[adapter]
        return local(B.weight).detach(), local(A.weight).detach()

    # ---------------------------------------------------------------- why a call is fused, or not

    def product_reason(self, name: str) -> str | None:
        base: Any = self.base_layer
        A: Any = self.lora_A[name]
        B: Any = self.lora_B[name]
        drop: Any = self.lora_dropout[name]
        if is_tracing():
            return "torch.jit.trace records the plain formula"
        if in_transform():
            return "a transform of torch.func follows the plain formula"
        if any(GLOBAL_HOOKS):
            return "torch has global module hooks"
        if not of_transformers(base) or any(hook_dicts(base)):
            return "base layer has hooks, or another forward than transformers put there"
        for what, module in (("lora_A", A), ("lora_B", B), ("lora_dropout", drop)):
            if is_hooked(module):
                return f"{what} has hooks or an overridden forward"
        if type(A) is not nn.Linear or type(B) is not nn.Linear:
            return "lora_A or lora_B is not an nn.Linear"
        if B._parameters.get("bias") is not None:
            return "lora_bias"
        if torch.is_tensor(self.scaling[name]):
            return SCALING_IS_A_TENSOR
        if A.weight.is_meta or base.weight.is_meta:
            return "a weight is on the meta device (offloaded or not loaded yet)"
        low, dtype = A.weight.dtype, base.weight.dtype
        if low not in (dtype, torch.float32) or B.weight.dtype != low:
            return f"dtypes: base {dtype}, lora_A {low}, lora_B {B.weight.dtype}"
        if type(drop) not in (nn.Dropout, nn.Identity):
            return f"dropout is a {type(drop).__name__}"
        if type(drop) is nn.Dropout and drop.training and drop.p > 0.0:
            if self.style.dim == 1:
                return "each rank takes its part of a dropout mask that is drawn for the whole X"
            if drop.p >= 1.0:
                return "everything is dropped"
        return None


def _called(module: Any, x: Tensor) -> Tensor:
    """The output of lora_A or lora_B with this rank's parts of its parameters."""
    own = {name: local(p) for name, p in module.named_parameters(recurse=False)}
    y: Tensor
    if type(module) is nn.Linear and not is_hooked(module):  # compilers trace no functional_call
        y = linear(x, own["weight"], own.get("bias"))
    else:
        y = functional_call(module, own, (x,))
    return y


class ParallelEmbedding(Parallel, Embedding):
    """A frozen embedding that is shared out, with updates of which every rank has both factors.

    Its output is whole on every rank, so the update needs no collective.
    ``lora_embedding_A[name]`` [r, V] and ``lora_embedding_B[name]`` [D, r] are DTensors.
    """

    variant_kind = "parallel embedding"

    def __init__(self, base_layer: nn.Module, plan_name: str, **kwargs: Any) -> None:
        self.__dict__["plan_name"] = plan_name  # _make_weights reads it
        super().__init__(base_layer, **kwargs)

    def _make_weights(
        self, name: str, r: int, config: LoraConfig, place: dict[str, Any], trainable: bool
    ) -> None:
        super()._make_weights(name, r, config, place, trainable)
        for store in (self.lora_embedding_A, self.lora_embedding_B):
            store[name] = shared_out(store[name].detach(), self.mesh, None, trainable)

    def _weights(self, name: str) -> tuple[Tensor, Tensor]:
        return local(self.lora_embedding_A[name]), local(self.lora_embedding_B[name])

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        A, B = (w.detach() for w in self._weights(adapter))
        dim = EMBEDDINGS[self.plan_name]
        start, stop = span(A.shape[1] if dim == 0 else B.shape[0], self.mesh)
        return (A[:, start:stop].T, B.T) if dim == 0 else (A.T, B[start:stop].T)
