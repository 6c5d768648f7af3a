"""Python processes that start with torch imported, which saves a second for each.

One process imports torch and forks for each process that a test asks for.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def python(
    *arguments: str, root: Path = ROOT, without: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """The result of ``python -m module ...`` or ``python -c code ...`` in the checkout ``root``.

    Its environment is this one's with ``env``, without variables that begin with ``without``.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(without)}
    kept |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **env}
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, name)) for name in ("out", "err")]
        server = _server()
        assert server.stdin and server.stdout
        print(json.dumps([arguments, str(root), kept, files]), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(
            arguments, status, *(Path(file).read_text(encoding="utf-8") for file in files)
        )


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The process that forks; it ends with its input, and so with this process in any case."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON"))}
    server = subprocess.Popen(
        [sys.executable, __file__], env=env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(server.communicate)
    return server


def _serve() -> None:
    import torch  # noqa: F401

    del sys.path[0]  # this file's folder
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(arguments: list[str], root: str, env: dict[str, str], files: list[str]) -> None:
    """Run the command in this forked process and end it; does not return."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(root)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [root, *env["PYTHONPATH"].split(os.pathsep)]
    (kind, what), sys.argv[1:] = arguments[:2], arguments[2:]
    status: Any = 1
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv[0] = "-c"
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), main.__dict__)
        status = 0
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
