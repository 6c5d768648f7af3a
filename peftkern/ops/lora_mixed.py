"""The LoRA linear of a batch whose samples name different adapters.

    Y[b] = X[b] Wᵀ + bias + scale_i · X[b] A_iᵀ B_iᵀ      i = index[b], nothing added for -1

If the backend has kernels for it (``kernels/mixed.py``), it is two launches. Otherwise, and when
gradients are wanted, torch's products run: the base product, then all adapters side by side
(:mod:`.mixed_torch`); on a CPU without gradients, products that read each adapter's factors where
they lie (:mod:`.mixed_direct`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import autocast, mixed_direct, torch_backend
from . import backend as _backend
from .bases.weight import BaseWeight
from .mixed_direct import Adapter, Batches, Factors
from .mixed_torch import Facts, Plan, make_plan
from .notes import note_once
from .tracing import is_recording

__all__ = ["Adapter", "Factors", "SampleIndex", "lora_mixed"]


def _tensors_for_later() -> torch.inference_mode:
    """Tensors made in inference mode could not be kept for a backward when they are used again."""
    return torch.inference_mode(False)


class SampleIndex:
    """The adapter of each sample of a batch, and tensors of it on devices.

    Args:
        choice: for each sample the number of its adapter, or -1 for none.
        adapters: the number of adapters.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, choice: Sequence[int], adapters: int) -> None:
        for i, v in enumerate(choice):
            if not -1 <= v < adapters:
                raise ValueError(
                    f"index[{i}] is {v}; allowed: -1 (base only) to {adapters - 1}, "
                    f"for {adapters} adapters"
                )
        self.choice, self.adapters = tuple(choice), adapters
        self.batches = Batches(self.choice)
        self._index: dict[torch.device, Tensor] = {}
        self._rows: dict[torch.device, list[Tensor | None]] = {}
        self._plans: dict[tuple[Facts, int, int, torch.device], Plan] = {}

    def __len__(self) -> int:
        return len(self.choice)

    def on(self, device: torch.device) -> Tensor:
        """The choice as int32 [samples] on ``device``: the same tensor at every call.

        The kernel reads it when it runs, so a captured CUDA graph replays with values that are
        written into it.

        Raises:
            RuntimeError: the first call for the device is in the capture of a CUDA graph, which
                cannot copy from the host.
        """
        found = self._index.get(device)
        if found is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "the index of adapter_names is not on the device yet, and a CUDA graph being "
                    "captured cannot copy it there; before the capture, call samples.on(device) of "
                    "the AdapterNames that you pass"
                )
            with _tensors_for_later():
                made = torch.tensor(self.choice, dtype=torch.int32, device=device)
            found = self._index.setdefault(device, made)  # of several threads the first one's
        return found

    def rows(self, device: torch.device) -> list[Tensor | None]:
        """For each adapter the numbers of its samples, int64 on ``device``; None without samples.

        The None lets callers skip an adapter without waiting for the device.
        """
        found = self._rows.get(device)
        if found is None or is_recording():
            of: list[list[int]] = [[] for _ in range(self.adapters)]
            for sample, i in enumerate(self.choice):
                if i >= 0:
                    of[i].append(sample)
            with _tensors_for_later():
                found = [torch.tensor(rows, device=device) if rows else None for rows in of]
            if not is_recording():  # tensors made in a trace belong to its graph
                self._rows[device] = found
        return found

    def plan(self, facts: Facts, row_bytes: int, size: int, device: torch.device) -> Plan:
        """The plan of :func:`.mixed_torch.make_plan` for this batch; made once for equal facts."""
        key = (facts, row_bytes, size, device)
        found = self._plans.get(key)
        if found is None or is_recording():
            with _tensors_for_later():
                found = make_plan(self.choice, facts, row_bytes, size, device)
            if not is_recording():  # tensors made in a trace belong to its graph
                self._plans[key] = found
        return found


def lora_mixed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter | tuple[Tensor, Tensor, float] | None] | Factors,
    index: SampleIndex,
    transposed: bool = False,
) -> Tensor:
    """A linear layer on a batch whose samples take different low-rank updates.

    Args:
        x: [samples, ..., K], floating point.
        weight: [N, K], or [K, N] when ``transposed``; x's dtype.
        bias: [N] or None.
        adapters: (A [r_i, K], B [N, r_i], scale_i), each of its own rank, in x's dtype or float32;
            None for one without weights in this layer. Or the same as ``Factors``.
        index: the adapter of each sample.
        transposed: layout of ``weight``.

    Returns:
        [samples, ..., N] in x's dtype (autocast's when that is on). Differentiable in all tensors,
        without the kernel.

    Raises:
        ValueError: ``index`` is for another number of samples or adapters.
        RuntimeError: torch's matrix product refuses the shapes, devices or dtypes.
    """
    if x.dim() < 2 or len(index) != x.shape[0]:
        raise ValueError(
            f"index has {len(index)} entries; allowed: one for each sample of x, {tuple(x.shape)}"
        )
    factors = adapters if isinstance(adapters, Factors) else Factors.of(adapters)
    if len(factors.place) != index.adapters:
        raise ValueError(
            f"adapters has {len(factors.place)} entries; allowed: {index.adapters}, as index has"
        )
    backend: _backend.Backend = _backend.active
    if backend is torch_backend and not torch.is_grad_enabled():
        w = weight.t() if transposed else weight
        direct = mixed_direct.mixed(x, w, bias, factors, index.batches)
        if direct is not None:
            return direct.view(*x.shape[:-1], direct.shape[-1])
    if autocast.is_on(x) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = bias.to(dtype) if bias is not None else None
    found = factors.adapters()
    if not any(found):
        backend = torch_backend  # the base product alone
    if torch.is_grad_enabled():
        tensors = [x, weight, bias, *(t for a in found if a is not None for t in a[:2])]
        if any(t is not None and t.requires_grad for t in tensors):
            if backend is not torch_backend:
                note_once("a mixed batch runs on torch's products: gradients are wanted")
            backend = torch_backend
    if weight.__class__ is BaseWeight and backend is not torch_backend:
        compute = weight.packed.compute_dtype(x.dtype)
        if compute != x.dtype:
            note_once(f"a mixed batch runs on torch's products: a base multiplies in {compute}")
            backend = torch_backend
    y = backend.mixed(
        x.reshape(-1, x.shape[-1]), weight.t() if transposed else weight, bias, found, index
    )
    return y.view(*x.shape[:-1], y.shape[-1])
