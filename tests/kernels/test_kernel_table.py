"""Every line of the table of kernels names things that exist and fit its kernel."""

import ast
import itertools

import pytest
import torch

from benchmarks.gpu.device import Dry
from benchmarks.gpu.numerics import LIMITS, relative
from benchmarks.gpu.race_cases import contest, race_cases
from benchmarks.kernels.entry import Operands
from benchmarks.kernels.table import entries, ops, rules
from peftkern.kernels import registry, tuning
from tests.kernels.compiler import ROOT

NAMES = tuple(registry.KERNELS)


def jitted():
    """Names of the functions under kernels/ that are decorated with triton.jit."""
    for path in ROOT.glob("kernels/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            marks = getattr(node, "decorator_list", [])
            marks = [m.func if isinstance(m, ast.Call) else m for m in marks]
            if any(ast.unparse(mark) == "triton.jit" for mark in marks):
                yield node.name


def test_every_kernel_stands_in_the_table():
    assert sorted(rules()) == sorted(jitted())
    assert set(tuning.KERNELS) == set(ops()) == set(registry.OPS)


@pytest.fixture(scope="module")
def raced():
    """{op: its cases in the race}."""
    found = {}
    for case in race_cases():
        found.setdefault(case.op, []).append(case)
    return found


@pytest.mark.parametrize("op", registry.OPS)
def test_an_op_is_raced_with_its_own_configs(op, raced):
    made = registry.config_class(op)
    for case in raced[op]:
        found = ops()[op].candidates(case)
        assert 0 < len(found) <= 12 and len(set(found)) == len(found), case.key
        assert {type(config) for config in found} == {made}


@pytest.mark.parametrize("op", registry.OPS)
def test_every_entrant_computes_what_float64_does(op, raced):
    """On the shapes of a dry run, with the yardstick of the race."""
    device, tried = Dry(), 0
    cases = {case.tiny(): case for case in raced[op]}
    for case in list(cases)[:3]:
        held = contest(case, device, 1)
        exact = held.exact()
        entrants = list(held.entrants.values())
        for config in [*entrants[:3], *(c for c in entrants[3:] if isinstance(c, str))]:
            outs = held.run(config, 0)
            assert len(outs) == len(exact)
            errors = [relative(o, e) for o, e in zip(outs, exact, strict=True)]
            assert max(errors) <= LIMITS[case.dtype], (case.key, config, errors)
            tried += 1
    assert tried >= 2


@pytest.fixture
def nothing_written():
    """Memory that torch allocates without values holds NaN, as that of an earlier call may."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_what_the_sanitizer_runs_is_finite(name, nothing_written):
    torch.manual_seed(0)
    runs = entries()[name].sanitize(Operands("cpu", M=37, K=80, N=72, r=5))
    ran = list(itertools.islice(runs, 3))  # attention takes a second a run here
    assert len({what for what, _ in ran}) == len(ran)
    assert ran or name == "reduce"  # whose launches are others' second stage
    for what, outs in ran:
        assert outs and all(bool(o.isfinite().all()) for o in outs), what


def test_a_line_and_its_entry_name_the_same_ops(monkeypatch):
    monkeypatch.setitem(registry.KERNELS, "grad_a", {"dance": "GradAConfig"})
    with pytest.raises(ValueError, match=r"grad_a has the ops \['grad_a'\] here and \['dance'\]"):
        entries.__wrapped__()
