"""Every op of the table of kernels on the device: its default and candidates against float64."""

import pytest

from tests.gpu.ground import ON_CPU, poison

from benchmarks.gpu.device import Cuda, Dry  # isort: skip  (after the skip in ground)
from benchmarks.gpu.numerics import LIMITS, relative
from benchmarks.gpu.race_cases import contest, race_cases
from peftkern.kernels.registry import OPS


@pytest.mark.parametrize("op", OPS)
def test_every_entrant_computes_what_float64_does(op):
    case = next(case for case in race_cases() if case.op == op)
    case, device = (case.tiny(), Dry()) if ON_CPU else (case, Cuda())
    held = contest(case, device, 1)
    exact = held.exact()
    for label, config in list(held.entrants.items())[: 2 if ON_CPU else None]:
        poison()
        outs = held.run(config, 0)
        errors = [relative(o, e) for o, e in zip(outs, exact, strict=True)]
        assert max(errors) <= LIMITS[case.dtype], (case.key, label, errors)
