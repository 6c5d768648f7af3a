"""Counts the kernels that a CUDA machine would launch, on a machine without CUDA.

Tensors live on the meta device: they have shapes, strides and dtypes, but no data. Every aten
operation that eager torch would send to the GPU passes through :class:`Counter`, which has a table
of how many kernels it launches there and what they read and write. Autograd runs unchanged.

FakeTensors on "cuda" would be the obvious stand-in, but torch built without CUDA cannot use them
in autograd: the forward aborts in the device guard, the backward asks for an accelerator. Four
decisions in the code depend on a CUDA device, and :func:`as_cuda` makes them as if there were one:
``Tensor.is_cuda``, ``Tensor.is_meta``, autocast, and dropout's choice of the fused kernel. Without
the last, HF PEFT would be counted with torch's dropout of three kernels: 8 launches forward,
1.04 GB.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern.kernels.common import Launch

from ..kernels.table import traffic
from ..kernels.traffic import Traffic, unit_of
from .routed import RULES
from .routed import distinct as _bytes

# The number of kernels that an operation launches on CUDA, by class. Views and allocation launch
# none. `_product` adds the copy of an addmm that is not in place and adds onto a full matrix.
_FREE, _PRODUCT, _FILL, _ONE, _PLACE = "free", "product", "fill", "one", "place"
_SCALED = "_scaled_mm_v2"
_TABLE: dict[str, tuple[str, int]] = {_SCALED: (_PRODUCT, 1)}
for _kind, _launches, _names in (
    (_FREE, 0, "empty empty_like empty_strided new_empty new_empty_strided _unsafe_view detach"),
    (_FREE, 0, "lift_fresh resize_ set_ device"),
    (_PRODUCT, 1, "mm addmm addmm_ bmm baddbmm baddbmm_"),
    # one pass that only writes and does not read its destination
    (_FILL, 1, "fill_ zero_ zeros zeros_like ones ones_like full full_like arange scalar_tensor"),
    (_FILL, 1, "bernoulli_ uniform_ normal_ new_zeros new_ones new_full"),
    # one pass over the inputs: copies and casts, reductions, gathers, row-wise kernels
    (_ONE, 1, "copy_ _to_copy clone cat stack sum mean amax amin var_mean constant_pad_nd flip"),
    (_ONE, 1, "embedding index_select gather index _softmax _softmax_backward_data"),
    (_ONE, 1, "all index_copy_ masked_fill_ searchsorted floor_divide _embedding_bag_forward_only"),
    (_ONE, 1, "_assert_async"),
    # zeros, then the counts; a state, then the sums
    (_ONE, 2, "histc cumsum"),
    (_ONE, 1, "native_dropout native_dropout_backward"),
    (_ONE, 1, "_scaled_dot_product_flash_attention"),
    # three kernels: the row sums of dO·O, the main kernel, the cast of dQ from its fp32 sum
    (_ONE, 3, "_scaled_dot_product_flash_attention_backward"),
    # two kernels: zeros, then a copy of the gradient into its place
    (_PLACE, 2, "slice_backward select_backward"),
):
    _TABLE |= dict.fromkeys(_names.split(), (_kind, _launches))


def rule(func: Any) -> tuple[str, int]:
    """(class, launches) of an aten overload.

    Raises:
        NotImplementedError: the table lacks the operation; a guess would make the count wrong.
    """
    name = func._schema.name.partition("::")[2]
    if name in _TABLE:
        return _TABLE[name]
    if func.is_view:
        return _FREE, 0
    if torch.Tag.pointwise in func.tags:
        return _ONE, 1
    raise NotImplementedError(f"{func} has no launch rule; add it to benchmarks.cost.count")


def _place(t: Tensor) -> tuple[Any, ...]:
    return t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), t.stride(), t.dtype


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for v in values:
            yield from _tensors(v)


def _split(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Tensor], ...]:
    """(tensor arguments that are read, tensor arguments that are written).

    An elementwise operation in place (add_, mul_) reads and writes its destination; copies and
    ``out=`` only write it.
    """
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    for i, a in enumerate(func._schema.arguments):
        found = list(_tensors(args[i] if i < len(args) else kwargs.get(a.name)))
        if a.alias_info is None or not a.alias_info.is_write:
            reads += found
            continue
        writes += found
        pointwise = torch.Tag.pointwise in func.tags or func._schema.name == "aten::masked_fill_"
        if pointwise and not a.kwarg_only:
            reads += found
    return reads, writes


def _product(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> list[Traffic]:
    name = func._schema.name.partition("::")[2]
    adds = "add" in name
    a, b = (args[1], args[2]) if adds else (args[0], args[1])
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    batch = a.shape[0] if a.dim() == 3 else 1
    read, written = _bytes(a) + _bytes(b), _bytes(out)
    copies = []
    if adds and kwargs.get("beta", 1) != 0:
        onto = args[0]
        if name.endswith("_"):
            read += written
        elif onto.dim() == 1:  # a bias is added while the product is written
            read += _bytes(onto)
        else:  # cuBLAS accumulates in place, so torch copies first
            copies = [Traffic(f"{name} (copy)", 1, _bytes(onto), written)]
            read += written
    return [*copies, Traffic(name, 1, read, written, 2 * batch * m * n * k, unit_of(a.dtype))]


def _scaled_product(args: Sequence[Any], out: Tensor) -> list[Traffic]:
    """A product of fp8 matrices with scales, which adds to nothing."""
    a, b, scales_a, scales_b = args[0], args[1], args[2], args[5]
    read = _bytes(a) + _bytes(b) + sum(map(_bytes, (*scales_a, *scales_b)))
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
    return [Traffic("scaled_mm", 1, read, _bytes(out), flops, "fp8")]


def _attention_flops(func: Any, args: Sequence[Any]) -> int:
    """FLOPs of attention: two products forward, five backward, half of each if causal."""
    name = func._schema.name
    if "attention" not in name:
        return 0
    backward = name.endswith("_backward")
    q, k = (args[1], args[2]) if backward else (args[0], args[1])
    batch, heads, queries, width = q.shape
    causal = args[11] if backward else args[4]
    products = 5 if backward else 2
    return products * 2 * batch * heads * queries * k.shape[2] * width // (2 if causal else 1)


def operation(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> list[Traffic]:
    """The launches of one aten call; none for views and allocations."""
    name = func._schema.name.partition("::")[2]
    if name in RULES:
        return RULES[name](func, args, kwargs, out)
    kind, launches = rule(func)
    if kind == _FREE:
        return []
    if name == _SCALED:
        return _scaled_product(args, out)
    if kind == _PRODUCT:
        return _product(func, args, kwargs, out)
    reads, writes = _split(func, args, kwargs)
    changed = writes or [t for t in _tensors(out) if t.numel()]
    if kind == _FILL:
        reads = []
    elif kind == _PLACE:
        changed = [*changed, *reads]
    if name in ("embedding", "index_select", "gather", "index"):
        # a row that is picked again comes from the cache: at most the whole table is read
        table, *index = reads
        picked = min(_bytes(table), sum(map(_bytes, changed)))
        read = picked + sum(map(_bytes, index))
    else:
        read = sum(_bytes(t) for t in {_place(t): t for t in reads}.values())
    flops = _attention_flops(func, args)
    unit = unit_of(reads[0].dtype) if flops else "none"
    return [Traffic(name, launches, read, sum(map(_bytes, changed)), flops, unit)]


class Counter(TorchDispatchMode):
    """Lists the launches of every aten operation within its block, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Traffic] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [*_tensors(args), *_tensors(list(kwargs.values())), *_tensors(out)]
        if not any(t.device.type == "meta" for t in tensors):
            return out  # an operation on the host, such as drawing a seed
        if func.namespace == "aten":
            self.launches += operation(func, args, kwargs, out)
        elif func.namespace != "prim":
            raise NotImplementedError(f"{func} is neither aten nor a kernel with a traffic rule")
        return out

    def __enter__(self) -> Counter:
        _open.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _open.pop()
        super().__exit__(*error)


_open: list[Counter] = []


class Launched(Traffic):
    """Traffic of a Triton launch, with the launch itself."""

    launch: Launch

    @classmethod
    def of(cls, launch: Launch) -> Launched:
        found = cls(*traffic(launch))
        found.launch = launch
        return found


def record(launches: Sequence[Traffic]) -> None:
    """Add launches that are not aten operations (Triton's) to the open counter, if there is one."""
    if _open:
        _open[-1].launches += launches


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout as at::dropout computes it for CUDA tensors."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0.0 else x


@contextlib.contextmanager
def as_cuda() -> Iterator[None]:
    """Make meta tensors answer as CUDA tensors do, within the block."""
    here = torch._C.TensorBase.is_meta.__get__
    there = torch._C.TensorBase.is_cuda.__get__
    # neither accepts the meta device
    asked, autocast = torch.is_autocast_enabled, torch.autocast

    def is_autocast_enabled(*device: str) -> bool:
        return asked(*("cuda" if d == "meta" else d for d in device))

    def autocast_on(device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
        return autocast("cuda" if device_type == "meta" else device_type, *args, **kwargs)

    with (
        mock.patch.object(torch.Tensor, "is_cuda", property(lambda t: here(t) or there(t))),
        mock.patch.object(torch.Tensor, "is_meta", property(lambda t: False)),
        mock.patch.object(torch.nn.functional, "dropout", _dropout),
        mock.patch.object(torch, "is_autocast_enabled", is_autocast_enabled),
        mock.patch.object(torch, "autocast", autocast_on),
    ):
        yield


class Count(NamedTuple):
    """Launches of a forward and a backward, and bytes kept in between without X and weights."""

    forward: list[Traffic]
    backward: list[Traffic]
    kept: int


def count(model: torch.nn.Module, x: Tensor) -> Count:
    """Count ``model(x)`` and the gradients of x and of all trainable parameters.

    All runs twice and the second run counts, as some tensors are made at their first use. ``x`` is
    on the meta device and requires its gradient.
    """
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    known = {t.untyped_storage()._cdata for t in (x, *model.parameters(), *model.buffers())}
    result = Count([], [], 0)
    for _ in range(2):
        kept: dict[int, Any] = {}

        def keep(t: Tensor, kept: dict[int, Any] = kept) -> Tensor:
            storage = t.untyped_storage()
            # a packed weight as a tensor has no data but the layer's
            if storage._cdata not in known and not hasattr(t, "packed"):
                kept[storage._cdata] = storage  # held, so that its address is not reused
            return t

        with as_cuda():
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), Counter() as fw:
                out = model(x)
            outs = list(_tensors(out))
            seeds = [torch.empty_like(y) for y in outs]
            with Counter() as bw:
                torch.autograd.grad(outs, wanted, seeds)
        result = Count(fw.launches, bw.launches, sum(s.nbytes() for s in kept.values()))
    return result
