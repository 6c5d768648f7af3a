"""CUDA graphs: a function's kernels, recorded once and launched together."""

from __future__ import annotations

from collections.abc import Callable

import torch

_WARM = 3  # calls before the recording: the first ones compile kernels and choose among them


def why_no_graph(device: torch.device) -> str | None:
    """The reason that work on a device cannot be recorded; None when it can."""
    if device.type != "cuda":
        return f"the model is on {device.type}, and graphs are CUDA's"
    return None


class Graph:
    """The kernels that ``run`` launches, recorded after a few calls of it.

    Args:
        run: reads and writes the same tensors in every call, and waits for nothing.
        device: where it runs.
    """

    def __init__(self, run: Callable[[], None], device: torch.device) -> None:
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                run()

    def replay(self) -> None:
        """Launch what was recorded."""
        self._graph.replay()
