"""Layers that tensor parallelism has sharded, as targets: their classes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from ...configs.lora import LoraConfig
from ...ops.bases.formats import reader_of
from ...utils.gathering import is_shard
from ..base_layer import BaseTunerLayer
from ..tensor_parallel import (
    EMBEDDINGS,
    STYLES,
    TensorParallel,
    check_copied,
    check_heads,
    refusal,
    shared_part,
)
from .loraga import GRADIENT
from .parallel import ParallelEmbedding, ParallelLinear
from .variant import settings_asked

# starts that are drawn ("eva" is given its factors later), and those that every rank computes from
# the whole weight
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "pissa", "olora", "loftq")


class ParallelTargets:
    """What an adapter may do with the layers of a model, by its plan of tensor parallelism.

    Args:
        plan: the model's; None: nothing is sharded by one, and everything is allowed.
        model: the base model.
        config: the new adapter's configuration.
    """

    def __init__(self, plan: TensorParallel | None, model: nn.Module, config: LoraConfig) -> None:
        self.plan, self.model, self.config = plan, model, config
        check_heads(model, plan)
        if plan is not None and config.layer_replication:
            raise ValueError(
                "`layer_replication` cannot copy layers that tensor parallelism has sharded: "
                "transformers has bound their forwards to the originals"
            )

    def layer_class(self, key: str, module: Any, custom: Any) -> Callable[..., Any] | None:
        """The callable that makes the layer for a sharded module; None for others.

        Raises:
            ValueError: the module is sharded in a way, or the configuration asks for something,
                that no adapter layer follows. The error names the layer and its plan.
        """
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if self.plan is None:
            return None
        name = self.plan.of(key)
        if not _in_parts(base):
            if name in (EMBEDDINGS if isinstance(base, nn.Embedding) else STYLES):
                reason = (
                    "its weight is no DTensor: adapters need a transformers that shards weights as "
                    "DTensors (5.17 and later), and weights that are not quantised"
                )
                raise refusal(key, name, reason)
            return None
        if (refused := self._refuses(base, name, custom)) is not None:
            raise refusal(key, name, refused)
        assert name is not None
        cls: Any = ParallelEmbedding if isinstance(base, nn.Embedding) else ParallelLinear
        return partial(cls, plan_name=name)

    def _refuses(self, base: Any, name: str | None, custom: Any) -> str | None:
        config = self.config
        if reader_of(base) is not None:
            return "adapters on a quantised weight that is sharded are not supported"
        known = EMBEDDINGS if isinstance(base, nn.Embedding) else STYLES
        if name not in known or type(base) not in (nn.Linear, nn.Embedding):
            return (
                f"of a {type(base).__name__}, adapters follow the plans {', '.join(known)} alone"
                if isinstance(base, (nn.Linear, nn.Embedding))
                else f"adapters do not follow the plan of a {type(base).__name__}"
            )
        assert name is not None
        weight = base.weight
        dim = EMBEDDINGS[name] if name in EMBEDDINGS else STYLES[name].dim
        shards = [p for p in weight.placements if p.is_shard()]
        if weight.device_mesh.ndim != 1 or len(shards) != 1 or shards[0].dim % 2 != dim:
            return (
                f"its weight is sharded over {weight.device_mesh.ndim} dimension(s) of ranks as "
                f"{tuple(weight.placements)}: adapters follow tensor parallelism alone, in one"
            )
        if custom is not None:
            return f"a {custom.__name__} of `_register_custom_module` does not follow it"
        if asked := [name for name in settings_asked(config) if name != "use_dora"]:
            return f"{', '.join(asked)} is not supported on a sharded layer"
        init: Any = config.init_name
        plain = init == "lora_ga" and not hasattr(base, GRADIENT)  # as when an adapter is loaded
        if not plain and init not in _STARTS and not str(init).startswith("pissa_niter_"):
            return (
                f"init_lora_weights={config.init_lora_weights!r} computes with more than the whole "
                "weight; a sharded layer takes True, False, 'gaussian', 'eva', 'orthogonal', "
                "'pissa', 'pissa_niter_[number of iters]', 'olora' and 'loftq'"
            )
        return None

    def check_others(self, whole: Iterable[str], extra: Any) -> None:
        """Refuse what reads or copies sharded modules otherwise than as adapter layers.

        Args:
            whole: names of the modules to train in full.
            extra: the further targets, an :class:`.extra_targets.ExtraTargets`.

        Raises:
            ValueError: one of them is sharded.
        """
        if self.plan is None:
            return
        check_copied(self.model, self.plan, whole)
        for target in extra.tokens:
            if shared_part(self.model.get_submodule(target.key)) is not None:
                reason = "`trainable_token_indices` reads whole embeddings alone"
                raise refusal(target.key, self.plan.of(target.key), reason)
        for target in (t for t, *_ in extra.parameters):
            owner, _, attribute = target.key.rpartition(".")
            parameter = getattr(self.model.get_submodule(owner), attribute, None)
            if parameter is None or is_shard(parameter):
                reason = "`target_parameters` takes whole parameters alone"
                raise refusal(target.key, self.plan.of(target.key), reason)
        for key in (*extra.tied, *extra.saved):
            if shared_part(self.model.get_submodule(key)) is not None:
                reason = "`ensure_weight_tying` ties whole layers alone"
                raise refusal(key, self.plan.of(key), reason)


def _in_parts(base: Any) -> bool:
    """True for a module with a parameter of its own that is a DTensor."""
    return any(is_shard(p) for p in base._parameters.values())
