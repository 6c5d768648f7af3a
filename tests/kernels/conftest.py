"""Ring 2: the kernels in Triton's CPU interpreter, against the float64 formulas beside them."""

import importlib
import os
import sys

import pytest

os.environ["TRITON_INTERPRET"] = "1"


def _interpret() -> None:
    """Decorate Triton's own library for the interpreter, if an import has decorated it before.

    Triton reads TRITON_INTERPRET when a function is decorated. Its library is decorated when it is
    imported, as transformers does, so other tests may have done that in this process.
    """
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    if isinstance(tl.zeros, JITFunction):
        for name in (
            "triton.language.standard",
            "triton.language.math",
            "triton.language.random",
            "triton.language",
        ):
            importlib.reload(sys.modules[name])


_interpret()

from peftkern.kernels import common  # noqa: E402
from tests.kernels import interpreter  # noqa: E402

if not common.INTERPRET.value:
    raise pytest.UsageError(
        "peftkern.kernels was imported for the compiler before tests/kernels; "
        "run them in a process of their own, or set TRITON_INTERPRET=1"
    )

interpreter.install()


@pytest.fixture
def clock(monkeypatch, tmp_path):
    from tests.kernels.racing import FakeClock, dispatcher

    with dispatcher(monkeypatch, tmp_path, FakeClock()) as clock:
        yield clock


@pytest.fixture
def ran(monkeypatch):
    """(operation, way) of everything that the dispatcher ran."""
    from peftkern.ops import choices

    seen = []
    for op in ("forward", "backward", "infer", "mixed"):
        real = getattr(choices, op)

        def spy(how, *args, real=real, op=op):
            seen.append((op, how))
            return real(how, *args)

        monkeypatch.setattr(choices, op, spy)
    return seen
