"""Processes that run the command as torchrun starts them, forked from one that has imported torch.

``python -m tests.launched FILE`` runs the launches listed in a JSON file and writes what they
printed beside it. As torchrun does, the launcher ends all processes of a launch when one fails.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from peftkern.cli import app, engine, modelio, prepare, resume
from tests.children import python

# imported when it is first read: here, and not once in each process
TRAINER = transformers.Trainer


def launch(folder: Path, **launches: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """{name: for each process its exit code ("code") and what it printed ("out", "err")}.

    A launch has the arguments of the command in ``args``, and may have ``processes`` (2), other
    arguments for one of them in ``args_of`` ({"1": [...]}), ``double`` for float64 models, and
    ``kill``: (number of a process, name in :data:`PLACES`, at which call), where it dies; the
    others are ended ``patience`` seconds after the first that fails.
    """
    (folder / "launches.json").write_text(json.dumps(launches))
    # where DeepSpeed is installed, accelerate imports it, and it warns that it looks for a device
    done = python("-m", "tests.launched", str(folder / "launches.json"), DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "launches.out.json").read_text())


# where a process may be killed: (owner of a function, its name)
PLACES: dict[str, tuple[Any, str]] = {
    "pass": (engine.AdapterTrainer, "compute_loss"),
    "save": (engine.AdapterTrainer, "_save_rng_state"),
    "seal": (resume, "seal"),
}


def _die_at(place: str, nth: int) -> None:
    owner, name = PLACES[place]
    whole: Callable[..., Any] = getattr(owner, name)
    calls = []

    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)

    setattr(owner, name, deadly)


def _double(*args: Any) -> Any:
    return modelio.load_model(*args).double()


def _become(rank: int, launch: dict[str, Any], port: int, files: tuple[Path, Path]) -> None:
    """Run the command in this forked process and end it; does not return."""
    torch.set_num_threads(1)  # torch 2.11's pool of threads does not outlive a fork
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    count = launch.get("processes", 2)
    os.environ |= {
        "WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo", **launch.get("env", {}),
    }  # fmt: skip
    if launch.get("double"):
        prepare.load_model = _double
    if "kill" in launch and launch["kill"][0] == rank:
        _die_at(*launch["kill"][1:])
    try:
        app.main(launch.get("args_of", {}).get(str(rank), launch["args"]))
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(3)


def _run(launch: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = launch.get("processes", 2)
    files = [(folder / f"{rank}.out", folder / f"{rank}.err") for rank in range(count)]
    children: dict[int, int] = {}
    for rank in range(count):
        for file in files[rank]:
            file.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            _become(rank, launch, port, files[rank])
        children[child] = rank
    codes: dict[int, int] = {}
    hang, ends = time.monotonic() + 100, None
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        now = time.monotonic()
        assert now < hang, "the processes hang"
        if child:
            codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
            if any(codes.values()) and ends is None:
                # as torchrun does, or later: then it is seen what the others do by themselves
                ends = now + launch.get("patience", 0)
        elif ends is not None and now > ends:
            for other in children:
                os.kill(other, signal.SIGTERM)
            ends = hang
        else:
            time.sleep(0.01)
    return [
        {"code": codes[rank], "out": out.read_text(), "err": err.read_text()}
        for rank, (out, err) in enumerate(files)
    ]


def main(file: Path) -> None:
    done = {n: _run(launch, file.parent) for n, launch in json.loads(file.read_text()).items()}
    file.with_suffix(".out.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
