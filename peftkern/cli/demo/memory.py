"""How much memory training needs beyond the loaded model: peak minus what was held when it began.

On CUDA that is ``torch.cuda.max_memory_allocated``. On Linux CPUs it is the growth of the process's
peak resident set (VmHWM, which the kernel keeps exactly and /proc/self/clear_refs sets back);
elsewhere the growth of ru_maxrss, which can only see peaks above all earlier ones.
"""

from __future__ import annotations

import ctypes
import gc
import sys

import torch


class PeakMeter:
    """``start()`` after loading, then ``peak_mib()``; ``how`` says what was measured."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self._base = 0
        self._exact = False
        self.how = "torch.cuda.max_memory_allocated above what was allocated before the first step"

    def start(self) -> None:
        """Set the peak back and remember what is held now."""
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
        """MiB above the start, at the highest point since."""
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
        # some sandboxes accept the write and keep the old peak
        return _status("VmHWM") <= _status("VmRSS") + 2**24
    except OSError:
        return False


def _max_rss() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _return_free_memory() -> None:
    """Give freed heap back to the system, so that re-using it counts as growth (glibc only)."""
    if sys.platform.startswith("linux"):
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except AttributeError:
            pass  # another libc, which has no such call
