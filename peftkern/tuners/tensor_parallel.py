"""Models that transformers has sharded by tensor parallelism: which layers, and how.

``from_pretrained(..., tp_plan="auto")`` makes a layer's weight a DTensor, replaces its ``forward``
by one that sums or gathers over the ranks, and keeps {name of a layer: plan} in ``model.tp_plan``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import deepcopy
from inspect import getclosurevars
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..utils.collectives import from_first_rank
from ..utils.gathering import is_shard, shares_weights

_HOME = "transformers.distributed.tensor_parallel"
# projections whose output holds keys: of keys alone, and with others'
SPLIT_KEYS = {"k_proj", "key", "k"}
KEYS = SPLIT_KEYS | {"qkv_proj", "query_key_value", "c_attn", "kv_b_proj", "kv_proj", "Wqkv"}


class Style(NamedTuple):
    """What a plan's layer is sharded in, and what it takes and gives."""

    dim: int  # the dimension of the weight [N, K] that is sharded: 0 or 1
    whole_input: bool  # True: every rank has all of X
    whole_output: bool  # True: every rank gets all of Y


# the names of transformers' plans for linear layers that adapters can follow
STYLES = {
    "colwise": Style(0, True, False),
    "colwise_gather_output": Style(0, True, True),
    "colwise_rep": Style(0, True, True),
    "rowwise": Style(1, False, True),
    "rowwise_split_input": Style(1, True, True),
    "rowwise_rep": Style(1, True, True),
}
# of keys, the styles that give each rank all heads
_WHOLE_KEYS = "colwise_rep", "colwise_gather_output"
# and for embeddings: the dimension of the weight [V, D] that is sharded
EMBEDDINGS = {"embedding_rowwise": 0, "embedding_colwise": 1}


class TensorParallel(NamedTuple):
    """The plan of a model, by the names of its layers with ``*`` for numbers."""

    at: str  # the name of the transformers model within the adapted model, with a dot, or ""
    plan: dict[str, str]

    def of(self, key: str) -> str | None:
        """The name of the plan of the layer ``key``, or of the module that it is in; or None."""
        if not key.startswith(self.at):
            return None
        name = re.sub(r"\.\d+(?=\.|$)", ".*", key[len(self.at) :])
        while name:
            if name in self.plan:
                return self.plan[name]
            name = name.rpartition(".")[0]
        return None


def tensor_parallel(model: nn.Module) -> TensorParallel | None:
    """The plan by which transformers has sharded ``model`` or a part of it; None without one."""
    if not shares_weights():
        return None
    for name, module in model.named_modules():
        plan = _plan_of(module)
        if plan is not None:
            return TensorParallel(f"{name}." if name else "", plan)
    return None


def _plan_of(module: Any) -> dict[str, str] | None:
    """The plan of a module that transformers has sharded, by the names of its layers."""
    plan = getattr(module, "tp_plan", None)
    return plan if isinstance(plan, dict) and (getattr(module, "tp_size", None) or 1) > 1 else None


def shared_part(module: nn.Module) -> str | None:
    """The name of the first module in ``module`` ("" for itself) that ranks share out.

    It has a DTensor, or a forward by transformers, which is bound to it: a copy would call it.
    None when there is none.
    """
    for name, part in module.named_modules():
        if any(map(is_shard, part._parameters.values())) or of_transformers(part):
            return name
    return None


def of_transformers(module: nn.Module) -> bool:
    """True for a module whose ``forward`` is one that transformers puts into sharded models."""
    return getattr(module.__dict__.get("forward"), "__module__", "") == _HOME


def refusal(key: str, plan: str | None, reason: str) -> ValueError:
    """The error about a layer that adapters cannot follow; nothing was changed."""
    has = "is sharded, by no plan of the model" if plan is None else f"has the plan {plan!r}"
    return ValueError(f"Tensor parallelism: `{key}` {has}, and {reason}. Nothing was changed.")


class Installed(NamedTuple):
    """What has put a sharded module's ``forward`` there: a style of transformers, and a mesh."""

    style: Any
    mesh: Any


def installed(module: nn.Module) -> Installed | None:
    """What makes the same ``forward`` for a copy of ``module``; None when that is not known.

    transformers' forward is a function that holds its style, the mesh and the forward within.
    """
    held = getclosurevars(module.__dict__["forward"]).nonlocals if of_transformers(module) else {}
    style, mesh, within = (held.get(name) for name in ("self", "mesh", "original_forward"))
    own = getattr(within, "__func__", None) is type(module).forward
    if not own or mesh is None or not hasattr(style, "install_forward"):
        return None
    return Installed(style, mesh)


def copied(module: nn.Module) -> nn.Module:
    """A deep copy of a module; what ranks share out in it is shared out in the copy too.

    :func:`check_copied` has refused modules of which no copy can be made.
    """
    # deepcopy of a DTensor ends in "invalid python storage"
    parts = {p: p.detach().clone() for p in module.parameters() if is_shard(p)}
    memo: dict[int, Any] = {
        id(p): nn.Parameter(part, requires_grad=p.requires_grad) for p, part in parts.items()
    }
    found = deepcopy(module, memo)
    for old, new in zip(module.modules(), found.modules(), strict=True):
        if of_transformers(old) and (how := installed(old)) is not None:
            del new.__dict__["forward"]  # it is the original's
            how.style.install_forward(new, how.mesh)
    return found


def _not_copied(module: nn.Module) -> str | None:
    """The name of the first module in ``module`` ("" for itself) that `copied` cannot copy."""
    for name, part in module.named_modules():
        replaced = "forward" in part.__dict__
        shards: list[Any] = [p for p in part._parameters.values() if is_shard(p)]
        plain = all(
            p.device_mesh.ndim == 1 and type(place).__name__ in ("Shard", "Replicate")
            for p in shards
            for place in p.placements
        )
        if not plain or (replaced and installed(part) is None):
            return name
    return None


def check_copied(model: nn.Module, plan: TensorParallel | None, keys: Iterable[str]) -> None:
    """Refuse modules to train in full that ranks share out in a way which no copy can have.

    Raises:
        ValueError: one of the modules named ``keys`` is or holds such a one.
    """
    for key in () if plan is None else keys:
        module = model.get_submodule(key)
        inside = None if shared_part(module) is None else _not_copied(module)
        if inside is not None:
            at = f"{key}.{inside}" if inside else key
            assert plan is not None
            reason = "a module that trains in full cannot be a copy of one that is shared out so"
            raise refusal(at, plan.of(at), reason)


def key_mesh(model: Any) -> Any:
    """The mesh over which ranks share out the heads of the keys; None when each has all heads.

    ``model`` is a transformers model.

    Raises:
        ValueError: the plan shares out keys in another way than by whole heads.
    """
    plan = _plan_of(model)
    if plan is None:
        return None
    own = {key: style for key, style in plan.items() if key.rpartition(".")[2] in KEYS}
    by_head = {key for key, style in own.items() if style == "colwise"}
    for key, style in own.items():
        alone = key.rpartition(".")[2] in SPLIT_KEYS
        if style not in _WHOLE_KEYS and not (alone and style == "colwise"):
            reason = "a prefix follows keys that are shared out by whole heads alone"
            raise refusal(key, style, reason)
    if not by_head:
        return None
    for name, p in model.named_parameters():
        if is_shard(p) and set(name.split(".")) & SPLIT_KEYS:
            shard: Any = p
            return shard.device_mesh
    return None


def own_heads(heads: int, model: Any) -> int:
    """How many of the ``heads`` of the keys this rank has.

    Raises:
        ValueError: the ranks cannot share them out evenly; and as :func:`key_mesh`.
    """
    mesh = key_mesh(model)
    if mesh is None:
        return heads
    if heads % mesh.size():
        raise ValueError(
            f"Tensor parallelism: {mesh.size()} ranks cannot share out {heads} heads of keys. "
            "Nothing was changed."
        )
    return heads // mesh.size()


# projections that transformers' attention cuts into heads, and the setting with their number
_HEADS = {
    "q_proj": "num_attention_heads",
    "k_proj": "num_key_value_heads",
    "v_proj": "num_key_value_heads",
}


def check_heads(model: nn.Module, plan: TensorParallel | None) -> None:
    """Refuse attention of which a rank gets a part of a head: its own forward would fail.

    Raises:
        ValueError: the ranks cannot share out the heads of a ``colwise`` projection.
    """
    for name, attention in () if plan is None else model.named_modules():
        head_dim = getattr(attention, "head_dim", None)
        if not isinstance(head_dim, int):
            continue
        for child, setting in _HEADS.items():
            base: Any = attention._modules.get(child)
            heads = getattr(getattr(attention, "config", None), setting, None)
            if type(base) is not nn.Linear or not is_shard(base.weight):
                continue
            # other sizes are cut in other ways
            if not isinstance(heads, int) or heads * head_dim != base.out_features:
                continue
            weight: Any = base.weight
            ranks, key = weight.device_mesh.size(-1), f"{name}.{child}"  # FSDP's are others
            assert plan is not None
            if plan.of(key) == "colwise" and heads % ranks:
                reason = f"{ranks} ranks cannot share out its {heads} heads"
                raise refusal(key, "colwise", reason)


def _group(model: nn.Module) -> Any:
    """The group of the ranks that tensor parallelism has shared ``model`` out to; None without."""
    if tensor_parallel(model) is None:
        return None
    mesh: Any = next((p.device_mesh for p in model.parameters() if is_shard(p)), None)  # type: ignore
    if mesh is None:
        return None
    return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")


def ranks_of(model: nn.Module) -> list[int]:
    """The global ranks that tensor parallelism has shared ``model`` out to; [] without it."""
    group = _group(model)
    return [] if group is None else torch.distributed.get_process_group_ranks(group)


@torch.no_grad()
def same_on_all_ranks(tensors: Iterable[Tensor], model: nn.Module) -> None:
    """Give each rank the first rank's values of plain tensors that a sharded model gets.

    Nothing happens for other models than those that tensor parallelism has sharded.
    """
    group = _group(model)
    if group is None:
        return
    for tensor in tensors:
        if not (is_shard(tensor) or tensor.is_meta):
            tensor.data.copy_(from_first_rank(tensor.data, group))
