"""``Pace``: the time of each optimizer step, with its tokens and examples."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback


class Pace(TrainerCallback):  # type: ignore[misc]  # transformers is not read
    """Measures steps from the making of their batches to their end, without saving and logging.

    ``steps`` has (seconds, tokens, examples) of each step of this call; those of all processes.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.steps: list[tuple[float, int, int]] = []
        self._began = 0.0
        self._held = (0, 0)

    def begins(self) -> None:
        """Note the time: what follows belongs to the next step."""
        self._began = time.perf_counter()

    def holds(self, tokens: int, examples: int) -> None:
        """Note what the step is of."""
        self._held = tokens, examples

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.cuda:
            torch.cuda.synchronize()  # the loss that is logged after each step would do it
        self.steps.append((time.perf_counter() - self._began, *self._held))

    def of_last_step(self) -> dict[str, float]:
        """Tokens and examples a second of the last step, as they are logged."""
        return _rates(self.steps[-1:])

    def of_all(self) -> dict[str, float]:
        """The same of all steps of this call but the first, which warms up, if it is not alone."""
        return _rates(self.steps[1:] or self.steps)


def _rates(steps: list[tuple[float, int, int]]) -> dict[str, float]:
    seconds = sum(step[0] for step in steps)
    if not seconds:
        return {}
    return {
        "tokens_per_second": sum(step[1] for step in steps) / seconds,
        "examples_per_second": sum(step[2] for step in steps) / seconds,
    }
