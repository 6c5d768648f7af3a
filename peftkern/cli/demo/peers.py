"""The coordinator's end of the demo's worker processes, and the environment of a run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..errors import RunError

NAMES = {"peftkern": "peftkern", "peft": "HF PEFT"}


class Peer:
    """The coordinator's end of a worker process."""

    def __init__(self, provider: str, log: Path) -> None:
        self.provider, self.log = provider, log
        self._log = open(log, "w", encoding="utf-8")
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # the worker must import this peftkern, from a checkout too
        root = str(Path(__file__).resolve().parents[2])
        env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peftkern.cli.demo.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=env,
            text=True,
        )

    def send(self, do: str, **job: Any) -> None:
        """Send a job; ``receive`` waits for its answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **job}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # receive() reports the reason

    def receive(self) -> dict[str, Any]:
        """The answer to the last job; RunError with the worker's message when it failed."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise RunError(f"the {NAMES[self.provider]} half of the demo failed: {answer['error']}")
        return answer

    def ask(self, do: str, **job: Any) -> dict[str, Any]:
        """Send a job and wait for its answer."""
        self.send(do, **job)
        return self.receive()

    def close(self) -> None:
        """Tell the worker to end, and wait until it has."""
        if self.process.stdin:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                pass
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self._log.close()

    def _last_words(self) -> str:
        code = self.process.wait()
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"exit code {code}" + (f", {lines[-1]}" if lines else "")


def environment(device: str, threads: int, loaded: dict[str, Any]) -> dict[str, str]:
    """The hardware, versions and threads of a run, for the readers of its report."""
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    versions = {NAMES[n]: answer["version"] for n, answer in loaded.items()}
    return {
        "device": f"{device}: {name}",
        "threads": str(threads),
        **versions,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "system": platform.platform(),
        "backend": os.environ.get("PEFTKERN_BACKEND", "auto"),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
