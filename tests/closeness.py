"""Assertions that tell rounding from mistakes on any machine, without tolerances tuned on one.

Processors, instruction sets and libraries sum in different orders, so fp32 results differ by
amounts that no test can know beforehand. These hold on all of them:

- two ways to compute one number agree in float64: :func:`assert_same_number`;
- in a test of the dtype itself, our error against float64 is not above that of torch's own
  computation (or HF PEFT's) in the same dtype: :func:`assert_as_good_as_torch`;
- the same operations in the same order give the same bits: ``torch.equal``.

A module that imports its assertion from here belongs to the numeric part of the suite, which
``make test-cpus`` and ``make test-versions`` repeat (see conftest.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# In a float64 model transformers still computes norms, softmaxes and rotary angles in fp32. Two
# orders of float64 sums differ by 1e-16, which those round away, or now and then up to the next
# fp32 number: a few of its roundings are what may remain. A mistake is orders of magnitude larger.
ISLANDS = 16 * torch.finfo(torch.float32).eps
_TINY = 2.0**-20  # of tensors that are smaller than this everywhere, what may remain is absolute


def assert_same_number(actual: Any, expected: Any, name: str = "") -> None:
    """The same numbers by another way, computed in float64.

    Args:
        actual, expected: float64 tensors (others must be equal), or mappings, sequences and
            transformers' outputs of such, of the same keys and lengths.
        name: said when they differ.

    Raises:
        AssertionError: they differ by more than 16 fp32 roundings of the largest number of
            ``expected``, in shape, or in dtype; or are floating point but not float64.
    """
    if isinstance(expected, Mapping):
        assert isinstance(actual, Mapping), f"{name}: {type(actual).__name__}, expected a mapping"
        assert actual.keys() == expected.keys(), (
            f"{name}: keys differ: {sorted(map(str, actual.keys() ^ expected.keys()))}"
        )
        for key in expected:
            assert_same_number(actual[key], expected[key], f"{name}[{key!r}]")
        return
    if isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(actual) == len(expected), f"{name}: {len(actual)}, expected {len(expected)}"
        for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_same_number(a, b, f"{name}[{index}]")
        return
    if isinstance(expected, float):
        actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    if not isinstance(expected, Tensor):
        assert actual == expected, f"{name}: {actual!r}, expected {expected!r}"
        return
    assert isinstance(actual, Tensor), f"{name}: {type(actual).__name__}, expected a tensor"
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), f"{name}: {actual}, expected {expected}"
        return
    assert expected.dtype == torch.float64, (
        f"{name} is {expected.dtype}: compare float64 models, or use assert_as_good_as_torch"
    )
    if not expected.numel():
        return
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    finite = expected.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(0.5), expected[~finite].nan_to_num(0.5)), name
    if not finite.any():
        return
    scale = max(float(expected[finite].abs().max()), _TINY)
    error = float((actual - expected)[finite].abs().max())
    assert error <= ISLANDS * scale, f"{name}: differs by {error:.3e} where numbers reach {scale:g}"


def differ(actual: Tensor, expected: Tensor) -> bool:
    """True when two float64 results are different numbers, to test that something has an effect."""
    try:
        assert_same_number(actual, expected)
    except AssertionError:
        return True
    return False


def assert_as_good_as_torch(
    ours: Any, torch_result: Any, exact: Any, *, average: bool = False
) -> None:
    """Assert max |ours - exact| <= 2 max |torch - exact|, or two roundings if torch is exact.

    For the results of a whole model, the median of all errors may be twice torch's instead, and the
    largest 16 times. A sharp softmax enlarges early roundings, so that the largest errors of two
    runs differ threefold by chance, their medians only by a seventh.

    Args:
        ours: the tested result, of any dtype; or a mapping of several, such as all numbers of a
            training step, which are measured together, each in units of its largest number.
        torch_result: the same by torch's (or HF PEFT's) own computation in the same dtype; or
            several such results, if several orders of sums are equally good.
        exact: the same in float64.
        average: measure a single tensor as mappings are measured.
    """
    results = torch_result if isinstance(torch_result, list | tuple) else [torch_result]
    if average and isinstance(exact, Tensor):
        ours, exact, *results = ({"": t} for t in (ours, exact, *results))
    if isinstance(exact, Mapping):
        error, *references = (_scaled_errors(result, exact) for result in (ours, *results))
        if not error.numel():
            return
        rounding = 2 * max(torch.finfo(t.dtype).eps for t in results[0].values())
        _at_most(error.median(), 2, [r.median() for r in references], rounding, "median error")
        _at_most(error.max(), 16, [r.max() for r in references], rounding, "largest error")
        return
    assert ours.shape == exact.shape, f"shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert exact.dtype == torch.float64, f"exact is {exact.dtype}, expected float64"
    if not exact.numel():
        return
    error, *references = ((r.double() - exact).abs().max() for r in (ours, *results))
    rounding = 2 * torch.finfo(results[0].dtype).eps * exact.abs().max().item()
    _at_most(error, 2, references, rounding, "error")


def _scaled_errors(found: Mapping[Any, Tensor], exact: Mapping[Any, Tensor]) -> Tensor:
    """All errors of a mapping, each tensor's in units of its largest number."""
    assert found.keys() == exact.keys(), f"keys differ: {found.keys() ^ exact.keys()}"
    errors = [torch.empty(0, dtype=torch.float64)]
    for key, value in exact.items():
        assert value.dtype == torch.float64, f"exact[{key!r}] is {value.dtype}, expected float64"
        shape = tuple(found[key].shape)
        assert shape == tuple(value.shape), f"{key}: {shape}, expected {tuple(value.shape)}"
        if value.numel():
            scale = value.abs().max().clamp_min(_TINY)
            errors.append(((found[key].double() - value).abs() / scale).flatten())
    return torch.cat(errors)


def _at_most(
    error: Tensor, times: int, references: list[Tensor], rounding: float, what: str
) -> None:
    reference = max(r.item() for r in references)
    assert error.item() <= max(times * reference, rounding), (
        f"{what} {error.item():.3e}, torch's {reference:.3e}, rounding {rounding:.3e}"
    )
