"""Compiler backends that look at the graphs and run them as they are."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor

# pytest's handlers make torch format every step of a compilation
logging.getLogger("torch.__trace").propagate = False


def operators(graph: torch.fx.GraphModule) -> Counter[str]:
    """The number of calls of each operator of peftkern in a graph, such as {"lora_linear": 14}."""
    names = (str(node.target).split(".") for node in graph.graph.nodes)
    return Counter(name[1] for name in names if name[0] == "peftkern")


class Graphs(list[Counter[str]]):
    """As ``torch.compile``'s backend: one entry for each graph that Dynamo made."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.append(operators(graph))
        return graph.forward


class JointGraphs:
    """The same behind AOTAutograd and the partitioner: ``forward`` and ``backward`` graphs."""

    def __init__(self) -> None:
        from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
        from torch._dynamo.backends.common import aot_autograd

        self.forward, self.backward = Graphs(), Graphs()
        self._compile = aot_autograd(
            fw_compiler=lambda *args: make_boxed_func(self.forward(*args)),
            bw_compiler=lambda *args: make_boxed_func(self.backward(*args)),
            partition_fn=min_cut_rematerialization_partition,
        )

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        return self._compile(graph, inputs)


def unwrapped(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by the names that they have without ``torch.compile``'s wrapper."""
    return {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}
