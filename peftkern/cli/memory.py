"""``PeakMeter``: the memory that training needs beyond the loaded model, peak minus start.

On CUDA it is measured by ``torch.cuda.max_memory_allocated``. On Linux CPUs it is the growth of the
process's peak resident set (VmHWM, which the kernel measures exactly and /proc/self/clear_refs
resets); elsewhere the growth of ru_maxrss, which shows only peaks above all earlier ones.
"""

from __future__ import annotations

import ctypes
import gc
import sys

import torch


class PeakMeter:
    """Measures peak memory: ``start()`` after loading, then ``peak_mib()``; ``how`` says how."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self._base = 0
        self._exact = False
        self.how = "torch.cuda.max_memory_allocated above what was allocated before the first step"

    def start(self) -> None:
        """Reset the peak and note the present memory."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._base = torch.cuda.memory_allocated()
            return
        _return_free_memory()
        self._exact = _reset_peak()
        self.how = (
            "peak resident set size (VmHWM, reset before the first step) above the size then"
            if self._exact
            else "growth of the largest resident set size (ru_maxrss) since before the first step"
        )
        self._base = _status("VmRSS") if self._exact else _max_rss()

    def peak_mib(self) -> float:
        """The highest memory since :meth:`start`, in MiB above that at the start."""
        if self.cuda:
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = _status("VmHWM") if self._exact else _max_rss()
        return (peak - self._base) / 2**20


def _status(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as f:
        for line in f:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def _reset_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as f:
            f.write("5")
        # some sandboxes accept the write but keep the old peak
        return _status("VmHWM") <= _status("VmRSS") + 2**24
    except OSError:
        return False


def _max_rss() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _return_free_memory() -> None:
    """Return freed heap memory to the system, so that using it again counts (glibc only)."""
    if sys.platform.startswith("linux"):
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except AttributeError:
            pass  # another libc, without this function
