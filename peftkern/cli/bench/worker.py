"""The process of one library in ``peftkern bench``: see :mod:`.remote`."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from typing import Any


class Worker:
    """Answers requests about the model that it makes.

    The first request says what it is: the fields of :class:`.peers.Peer`, the settings, device
    and threads. ``step`` and ``answer`` choose the work; their answer has the loss without
    dropout. ``round`` does and times it, ``memory`` counts the bytes of a step.
    """

    def __init__(self) -> None:
        self._contest: Any = None
        self._chosen: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What is written as answer to a request."""
        if self._contest is None:
            return self._begin(**request)
        what = request.pop("do")
        if what in ("step", "answer"):
            return self._choose(what, **request)
        if what == "round":
            return self._round(**request)
        kept, peak = self._chosen.memory(self._contest.name)
        return {"kept": kept, "peak": peak}

    def _begin(
        self, name: str, build: str, first: str, settings: dict[str, Any], device: str,
        threads: int, **rest: Any,
    ) -> dict[str, Any]:  # fmt: skip
        if first:
            importlib.import_module(first)
        import torch

        from ..modelio import hush_transformers
        from .base import base_of
        from .contest import Alone
        from .settings import BenchSettings

        hush_transformers()
        torch.set_num_threads(threads)
        module, _, function = build.partition(":")
        made = getattr(importlib.import_module(module), function)
        given, place = BenchSettings(**settings), torch.device(device)
        self._contest = Alone(name, made, base_of(given).to(place), given, place)
        return {}

    def _choose(self, what: str, weights: str, **how: Any) -> dict[str, Any]:
        from .contest import Answer, Step

        self._chosen = None
        self._contest.renew(weights)
        gc.unfreeze()
        gc.collect()  # the model before
        self._chosen = (Step if what == "step" else Answer)(self._contest, **how)
        loss = self._contest.loss(self._contest.name)
        self._chosen.ready()
        gc.collect()
        gc.freeze()
        gc.disable()
        return {"loss": loss}

    def _round(self, calls: int) -> dict[str, Any]:
        from .measure import time_round

        wall, cpu = time_round(self._chosen.works[self._contest.name], calls)
        gc.collect()
        return {"wall": wall, "cpu": cpu}


def main() -> None:
    """Answer the requests of standard input on standard output, until there are none."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    worker = Worker()
    for line in sys.stdin:
        try:
            said = worker.answer(json.loads(line))
        except Exception as error:  # what fails is told, whatever it is
            words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            said = {"error": " ".join(words.split())[:300]}
        answers.write(json.dumps(said) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
