"""The device that ``benchmarks.gpu`` measures on, and a stand-in for machines without one.

:class:`Cuda` is the real device. :class:`Dry` has the same methods on CPU tensors: its events come
from a counter and its graphs are plain calls, so that a dry run goes through every line but
measures nothing.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor


class Cuda:
    """The current CUDA device."""

    dry = False

    def __init__(self) -> None:
        self.torch = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.torch)
        self.l2 = getattr(self.properties, "L2_cache_size", 0) or 50 * 2**20

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def occupy(self) -> None:
        """Queue about 0.2 ms of work, so that the host is ahead when the device's clock starts."""
        if hasattr(torch.cuda, "_sleep"):
            torch.cuda._sleep(400_000)

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A function that replays ``run`` as a CUDA graph and returns the captured outputs."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()

        def replay(keep: Any = out) -> Any:
            graph.replay()
            return keep

        return replay

    def allocated(self) -> int:
        return torch.cuda.memory_allocated()

    def free(self) -> int:
        """Bytes that can still be allocated, with those that torch's allocator holds unused."""
        reserved = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + reserved

    def watch_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def poison(self, nbytes: int) -> None:
        """Fill memory with NaN and free it, so that a later output that is not written shows."""
        nbytes = min(nbytes, self.free() // 4)
        blocks = [torch.full((nbytes // 8,), float("nan"), device=self.torch) for _ in range(2)]
        del blocks

    def empty(self) -> None:
        torch.cuda.empty_cache()

    def facts(self) -> dict[str, Any]:
        p = self.properties
        return {
            "name": p.name,
            "capability": [p.major, p.minor],
            "sms": p.multi_processor_count,
            "l2_bytes": self.l2,
            "memory_bytes": p.total_memory,
            "shared_bytes": getattr(p, "shared_memory_per_block_optin", 0),
        }

    def ceilings(self) -> dict[str, float]:
        """Measured rates of this card: TB/s of a large copy, TFLOP/s of large products.

        A copy counts the bytes read and written; the products are of random data.
        """
        size = int(min(2**32, self.free() // 8))
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=self.torch)
        target = torch.empty_like(source)
        copy = self._best(functools.partial(target.copy_, source))
        del source, target
        found = {"copy_tb_s": 2 * size / copy / 1e12}
        for name, n, dtype in (
            ("bf16_tflop_s", 8192, torch.bfloat16),
            ("fp16_tflop_s", 8192, torch.float16),
            ("fp32_tflop_s", 4096, torch.float32),
        ):
            a, b = (torch.randn(n, n, device=self.torch).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            seconds = self._best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
            found[name] = 2 * n**3 / seconds / 1e12
        self.empty()
        return found

    def _best(self, run: Callable[[], Any]) -> float:
        """The median of ten runs in seconds, after three that are not counted."""
        for _ in range(3):
            run()
        times = []
        for _ in range(10):
            start, end = self.event(), self.event()
            start.record()
            run()
            end.record()
            self.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return sorted(times)[5]

    def is_broken(self) -> bool:
        """True when an earlier error, such as an illegal access, left the context unusable."""
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device=self.torch).add_(1).item()
        except Exception:
            return True
        return False


class _FakeEvent:
    """An event on a clock that moves at every record, by about 100 us and a varying rest."""

    ticks = 0

    def __init__(self) -> None:
        self.at = 0.0

    def record(self) -> None:
        _FakeEvent.ticks += 1
        self.at = 0.1 * _FakeEvent.ticks + 0.001 * (_FakeEvent.ticks * 7919 % 13)

    def elapsed_time(self, end: _FakeEvent) -> float:
        return end.at - self.at


class Dry:
    """A stand-in for a CUDA device, with CPU tensors and a fake clock."""

    dry = True
    l2 = 4096

    def __init__(self) -> None:
        self.torch = torch.device("cpu")

    def event(self) -> _FakeEvent:
        return _FakeEvent()

    def synchronize(self) -> None:
        pass

    def occupy(self) -> None:
        pass

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        run()
        return run

    def allocated(self) -> int:
        return 0

    def free(self) -> int:
        return 2**28

    def watch_peak(self) -> None:
        pass

    def peak(self) -> int:
        return 0

    def poison(self, nbytes: int) -> None:
        pass

    def empty(self) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        return {
            "name": "dry run",
            "capability": [0, 0],
            "sms": 4,
            "l2_bytes": self.l2,
            "memory_bytes": 0,
            "shared_bytes": 232448,
        }

    def ceilings(self) -> dict[str, float]:
        return {"copy_tb_s": 1.0, "bf16_tflop_s": 1.0, "fp16_tflop_s": 1.0, "fp32_tflop_s": 1.0}

    def is_broken(self) -> bool:
        return False


Device = Cuda | Dry


def slug(name: str) -> str:
    """A GPU's name as a folder's name, of letters, digits, ``.``, ``_`` and ``-``."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name.strip())


def versions() -> dict[str, str]:
    """{name: version} of driver, CUDA, python and related packages that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for name in ("triton", "transformers", "peft", "unsloth", "vllm", "liger-kernel"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    from peftkern import __version__

    found["peftkern"] = __version__
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        found["driver"] = done.stdout.split("\n")[0].strip() if done.returncode == 0 else "unknown"
    except (OSError, subprocess.TimeoutExpired):
        found["driver"] = "unknown"
    return found


def randn(device: Device, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """A tensor of normal numbers on the device, drawn in ``dtype``."""
    out = torch.empty(shape, dtype=dtype, device=device.torch)
    return out.normal_(std=scale)
