"""The cases of each part of ``benchmarks.gpu``, and the floor of a case.

The most informative cases come first, as a budget that runs out cuts off the end. The floor is the
least time that the bytes and operations of a case take on the current card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Block = Literal["linear", "qkv", "mlp", "layer"]
What = Literal["train", "infer"]


@dataclass(frozen=True)
class Llama:
    """Shapes of a Llama model."""

    name: str
    hidden: int
    kv: int
    wide: int
    heads: int
    layers: int
    vocab: int = 128256

    def linears(self) -> dict[str, tuple[int, int]]:
        """{projection: (K, N)} of a layer's linears."""
        h, kv, wide = self.hidden, self.kv, self.wide
        return {
            "q_proj": (h, h), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (h, h),
            "gate_proj": (h, wide), "up_proj": (h, wide), "down_proj": (wide, h),
        }  # fmt: skip


LLAMA_8B = Llama("8B", 4096, 1024, 14336, 32, 32)
LLAMA_70B = Llama("70B", 8192, 1024, 28672, 64, 80)
TINY = Llama("tiny", 64, 32, 96, 4, 2, vocab=128)  # for dry runs
MODELS = {m.name: m for m in (LLAMA_8B, LLAMA_70B, TINY)}
MEMBERS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "layer": tuple(LLAMA_8B.linears()),
}


@dataclass(frozen=True)
class Case:
    """One row of a table; ``proj`` names the projection of a linear and is ignored for others."""

    part: str
    block: Block
    model: str
    M: int
    r: int
    p: float
    what: What = "train"
    graph: bool = False  # True replays a CUDA graph: the time of the device without the host
    proj: str = "q_proj"
    dtype: str = "bfloat16"
    compiled: bool = False  # True also measures PEFT under torch.compile, half a minute to build

    @property
    def key(self) -> str:
        where = self.proj if self.block == "linear" else self.block
        tail = " graph" if self.graph else ""
        return f"{where} {self.model} M={self.M} r={self.r} p={self.p:g} {self.what}{tail}"

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """{projection: (K, N)} of the case's linears."""
        all_of = MODELS[self.model].linears()
        names = (self.proj,) if self.block == "linear" else MEMBERS[self.block]
        return {name: all_of[name] for name in names}

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "shapes": {k: list(v) for k, v in self.shapes.items()}}

    def tiny(self) -> Case:
        """The same case in shapes that are fast on a CPU and in Triton's interpreter.

        A layer has more rows: over five, one provider's error can be thrice another's by chance.
        """
        rows = 37 if self.block == "layer" else 5
        return replace(self, model="tiny", M=min(self.M, rows), r=min(self.r, 4))


def first_of_each(cases: Iterable[Any], key: Callable[[Any], Any]) -> list[Any]:
    """The first case of each key, in order."""
    found: dict[Any, Any] = {}
    for case in cases:
        found.setdefault(key(case), case)
    return list(found.values())


def _unique(cases: Iterable[Case]) -> list[Case]:
    return first_of_each(cases, lambda case: case.key)


def linear_cases() -> list[Case]:
    def make(model: Llama, proj: str, M: int, r: int = 16, p: float = 0.1, **more: Any) -> Case:
        return Case("linear", "linear", model.name, M, r, p, proj=proj, **more)

    def order() -> Iterator[Case]:
        for p in (0.1, 0.0):  # the first two goals of docs/goals.md
            yield make(LLAMA_8B, "q_proj", 8192, p=p, compiled=True)
        for proj in ("gate_proj", "down_proj", "k_proj"):
            yield make(LLAMA_8B, proj, 8192)
        for proj in ("gate_proj", "q_proj"):
            yield make(LLAMA_70B, proj, 8192)
        for M in (4095, 2048, 512, 128):
            yield make(LLAMA_8B, "q_proj", M)
        for r in (64, 128, 8):
            yield make(LLAMA_8B, "q_proj", 8192, r=r)
        for M in (2048, 512, 128):  # few rows, where the host's time counts: also without it
            yield make(LLAMA_8B, "q_proj", M, graph=True)
        for M in (512, 128, 16, 1):
            yield make(LLAMA_8B, "q_proj", M, p=0.0, what="infer", graph=True)
        for M in (8192, 2048):
            yield make(LLAMA_8B, "q_proj", M, p=0.0, what="infer")
        for model in (LLAMA_8B, LLAMA_70B):
            for M in (8192, 4095, 2048, 512, 128):
                for proj in ("q_proj", "k_proj", "gate_proj", "down_proj"):
                    for r in (16, 64, 128, 8):
                        for p in (0.1, 0.0):
                            yield make(model, proj, M, r=r, p=p)
        for M in (16, 1):
            for proj in ("q_proj", "k_proj", "gate_proj", "down_proj"):
                yield make(LLAMA_8B, proj, M)

    return _unique(order())


def group_cases() -> list[Case]:
    def order() -> Iterator[Case]:
        for p in (0.1, 0.0):
            yield Case("group", "qkv", "8B", 8192, 16, p, compiled=p > 0)
        yield Case("group", "mlp", "8B", 8192, 16, 0.1)
        yield Case("group", "mlp", "8B", 8192, 16, 0.0)
        yield Case("group", "qkv", "70B", 8192, 16, 0.1)
        for M in (4095, 2048, 512, 128):
            yield Case("group", "qkv", "8B", M, 16, 0.1)
        for r in (64, 128, 8):
            yield Case("group", "qkv", "8B", 8192, r, 0.1)
        yield Case("group", "mlp", "70B", 8192, 16, 0.1)
        for M in (4095, 2048, 512, 128):
            yield Case("group", "mlp", "8B", M, 16, 0.1)
        for M in (512, 128):
            yield Case("group", "qkv", "8B", M, 16, 0.1, graph=True)
            yield Case("group", "mlp", "8B", M, 16, 0.1, graph=True)

    return _unique(order())


def layer_cases() -> list[Case]:
    def order() -> Iterator[Case]:
        for p in (0.1, 0.0):
            yield Case("layer", "layer", "8B", 8192, 16, p, compiled=p > 0)
        for M in (2048, 4095, 512, 128):
            yield Case("layer", "layer", "8B", M, 16, 0.1)
        for r in (64, 128, 8):
            yield Case("layer", "layer", "8B", 8192, r, 0.1)
        yield Case("layer", "layer", "8B", 512, 16, 0.1, graph=True)

    return _unique(order())


def decode_cases() -> list[Case]:
    def make(M: int, r: int, proj: str, model: str = "8B") -> Case:
        return Case("decode", "linear", model, M, r, 0.0, "infer", graph=True, proj=proj)

    def order() -> Iterator[Case]:
        for M in (1, 16):
            for proj in ("q_proj", "gate_proj", "down_proj", "k_proj"):
                yield make(M, 16, proj)
        for M in (1, 16):
            for r in (64, 8, 128):
                yield make(M, r, "q_proj")
            for proj in ("q_proj", "gate_proj", "down_proj"):
                yield make(M, 16, proj, "70B")
        for M in (1, 16, 128):
            yield Case("decode", "qkv", "8B", M, 16, 0.0, "infer", graph=True)
            yield Case("decode", "mlp", "8B", M, 16, 0.0, "infer", graph=True)

    return _unique(order())


CASES = {
    "linear": linear_cases,
    "group": group_cases,
    "layer": layer_cases,
    "decode": decode_cases,
}


def floor(case: Case, ceilings: dict[str, float]) -> dict[str, float]:
    """{"us", "bytes", "flops"}: the least time, traffic and work of any implementation.

    In each direction the block's inputs and weights are read once and its outputs written once; the
    mask is written as bits forward and read backward. Attention and norms of a layer, and tensors
    between a block's own linears, are left out. So for blocks of several steps this is less than
    any implementation can reach.
    """
    size = 4 if case.dtype == "float32" else 2
    rate = {"float32": "fp32", "float16": "fp16"}.get(case.dtype, "bf16")
    M, r = case.M, case.r
    shared = case.block in ("qkv", "layer", "mlp")
    directions = 2 if case.what == "train" else 1
    seconds = total_bytes = total_flops = 0.0
    names = list(case.shapes)
    inputs = [case.shapes[n][0] for n in names]
    if shared and case.block != "layer":
        inputs = [inputs[0]]  # one X for the group; the tensor before down_proj may stay on chip
    outputs = [n for _, n in case.shapes.values()]
    if case.block in ("mlp", "layer"):
        outputs = [case.shapes[names[-1]][1]]
        inputs = inputs[:1]
    for direction in range(directions):
        moved = size * (M * (sum(inputs) + sum(outputs)))
        flops = 0.0
        for K, N in case.shapes.values():
            moved += size * (K * N + r * (K + N)) + (M * K / 8 if case.p else 0)
            flops += 2.0 * M * K * N + (2 if direction == 0 else 4) * M * r * (K + N)
        if direction == 1:  # backward also reads X for dA, and writes the gradients of A and B
            moved += size * M * sum(inputs) + 4 * r * sum(K + N for K, N in case.shapes.values())
        time = max(
            moved / (ceilings["copy_tb_s"] * 1e12),
            flops / (ceilings[f"{rate}_tflop_s"] * 1e12),
        )
        seconds, total_bytes, total_flops = seconds + time, total_bytes + moved, total_flops + flops
    return {"us": seconds * 1e6, "bytes": total_bytes, "flops": total_flops}
