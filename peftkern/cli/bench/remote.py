"""``Remote``: one library's model in a process of its own, which takes turns with the others.

The process (:mod:`.worker`) reads requests and writes answers, a line of JSON each. It measures
with its own clocks, as the others do, and waits while it is not asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from .measure import Work
from .peers import Peer

PATIENCE = 900.0  # seconds for an answer: kernels are compiled at the first call


class PeerGone(Exception):
    """A library failed in its process.

    Attributes:
        name: the library.
        reason: why, in a line.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class Remote:
    """The process of the library ``name``; its messages go into a file in ``folder``."""

    def __init__(self, name: str, peer: Peer, setup: dict[str, Any], folder: Path) -> None:
        self.name = name
        self._said = folder / f"{peer.package}.txt"
        path = os.pathsep.join(p for p in sys.path if p)
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env={**os.environ, "PYTHONPATH": path},
            )
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._setup: dict[str, Any] | None = {"name": name, **peer._asdict(), **setup}

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(b"")

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request; raises PeerGone with the reason when there is none."""
        if self._setup is not None:
            setup, self._setup = self._setup, None
            self.ask(**setup)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=PATIENCE)
        except queue.Empty:
            raise PeerGone(self.name, f"no answer within {PATIENCE:.0f} s") from None
        except OSError:
            line = b""
        if not line:
            raise PeerGone(self.name, self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerGone(self.name, answer["error"])
        return answer

    def work(self) -> Work:
        """The work that it was asked for last, done and timed there."""
        return Work(run=lambda: self._round(1), timed=self._round)

    def _round(self, calls: int) -> tuple[float, float]:
        answer = self.ask(do="round", calls=calls)
        return answer["wall"], answer["cpu"]

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        lines = self._said.read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return f"its process ended: {said[-1][:300] if said else self._process.returncode}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
