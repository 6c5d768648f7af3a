"""Bad arguments of lora_experts: one error each, before anything is computed."""

from __future__ import annotations

import re

import pytest
import torch
from torch.autograd import forward_ad

from peftkern.ops.experts import double, grouped
from peftkern.ops.experts.parts import ExpertLinear, Factors, Gate
from peftkern.ops.lora_experts import lora_experts
from tests.closeness import assert_same_number
from tests.mixtures import GATES, E, Mixture, mixture

pytestmark = pytest.mark.numeric  # of `make test-versions`

m = mixture(bias=True)
mixed = mixture(mixed=True, ranks=((3, 3), (2, 2)))


def part(of: ExpertLinear, **changes) -> ExpertLinear:
    return of._replace(**changes)


def factors(**changes) -> ExpertLinear:
    return part(m.up, factors=(m.up.factors[0]._replace(**changes),))


A, B = m.up.factors[0].A.detach(), m.up.factors[0].B.detach()
CASES = {
    "x of three dimensions": (m._replace(x=m.x[None]), ValueError, "x has shape [1, 7, 6]"),
    "index of other tokens": (m._replace(index=m.index[:3]), ValueError, "index has shape [3, 2]"),
    "index of numbers": (m._replace(index=m.index.float()), TypeError, "index is torch.float32"),
    "index of signed bytes": (
        m._replace(index=m.index.to(torch.int8)),
        TypeError,
        "index is torch.int8; allowed: int64, int32, int16 or uint8",
    ),
    "weights": (m._replace(weights=m.weights[:, :1]), ValueError, "weights has shape [7, 1]"),
    "integer weights": (m._replace(weights=m.index), TypeError, "weights is torch.int64"),
    "up for another K": (m._replace(x=m.x[:, :5]), ValueError, "up.weight has shape [4, 20, 6]"),
    "odd up": (
        m._replace(up=ExpertLinear(m.up.weight[:, :19], None)),
        ValueError,
        "up.weight has shape [4, 19, 6]",
    ),
    "down for another width": (
        m._replace(gate=GATES["alone"]),
        ValueError,
        "allowed: [4, N, 20]",
    ),
    "down of other experts": (
        m._replace(down=ExpertLinear(m.down.weight[:3], None)),
        ValueError,
        "down.weight has shape [3, 5, 10]",
    ),
    "bias": (
        m._replace(down=part(m.down, bias=m.down.bias[:, :2])),
        ValueError,
        "down.bias has shape [4, 2]; allowed: [4, 5]",
    ),
    "A of other experts": (m._replace(up=factors(A=A[:-1])), ValueError, "A has shape [11, 6]"),
    "B of another rank": (m._replace(up=factors(B=B[:, :8])), ValueError, "B has shape [20, 8]"),
    "A and B of two dtypes": (
        m._replace(up=factors(B=B.float())),
        TypeError,
        "up.factors[0] has A in torch.float64 and B in torch.float32",
    ),
    "p": (m._replace(up=factors(p=1.0)), ValueError, "up.factors[0].p is 1.0"),
    "trained weight": (
        m._replace(up=part(m.up, weight=m.up.weight.detach().clone().requires_grad_())),
        ValueError,
        "up.weight requires a gradient",
    ),
    "x in another dtype": (m._replace(x=m.x.float()), TypeError, "x is torch.float32"),
    "down in another dtype": (
        m._replace(down=ExpertLinear(m.down.weight.float(), None)),
        TypeError,
        "down.weight is torch.float32",
    ),
    "gate's name": (m._replace(gate=Gate(len, "swish")), ValueError, "gate.name is 'swish'"),
    "gate's clamp": (
        m._replace(gate=Gate(len, "silu", clamp=(1.0, 2.0, 0.0))),
        ValueError,
        "gate.clamp is given with gate.name='silu'",
    ),
    "gate's layout": (
        m._replace(gate=Gate(len, "silu", "thirds")),
        ValueError,
        "gate.layout is 'thirds'",
    ),
    "index too large": (
        m._replace(index=m.index + E - 1),
        ValueError,
        "allowed: 0 to 3, for 4 experts",
    ),
    "negative index": (m._replace(index=m.index - 3), ValueError, "index has -3"),
    "choice too large": (
        mixed._replace(choice=torch.full((7,), 2)),
        ValueError,
        "choice has 2; allowed: -1 (no adapter) to 1",
    ),
    "choice below": (mixed._replace(choice=torch.full((7,), -2)), ValueError, "choice has -2"),
    "choice of other tokens": (
        mixed._replace(choice=torch.zeros(3, dtype=torch.int64)),
        ValueError,
        "choice has shape [3]",
    ),
    "choice of numbers": (mixed._replace(choice=torch.zeros(7)), TypeError, "choice is"),
    "choice among other adapters": (
        mixed._replace(up=part(mixed.up, factors=mixed.up.factors[:1])),
        ValueError,
        "up has 1 adapters and down 2",
    ),
}


def call(m: Mixture, **kwargs: bool) -> torch.Tensor:
    return lora_experts(*m[:6], norm=m.norm, choice=m.choice, **kwargs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("grad", [True, False])
def test_bad_arguments(case, grad):
    given, kind, words = CASES[case]

    def never(gu: torch.Tensor) -> torch.Tensor:
        raise AssertionError("something was computed")

    gate = given.gate._replace(function=never)
    with torch.set_grad_enabled(grad), pytest.raises(kind) as caught:
        call(given._replace(gate=gate))
    assert words in str(caught.value) and "allowed" in str(caught.value)


def test_sentinels_do_not_allow_negative_indices():
    with pytest.raises(ValueError, match="index has -3; allowed: 0 to 3"):
        call(m._replace(index=m.index - 3), sentinels=True)


def test_functions_with_trained_parameters_or_of_another_width():
    own = torch.ones(10, dtype=torch.float64, requires_grad=True)
    bound = {"norm": lambda y: y * own[:5]}
    gate = Gate(lambda gu: gu[:, :10] * own)
    with pytest.raises(ValueError, match="norm has a tensor of its own that requires a gradient"):
        lora_experts(*m[:6], **bound)
    with pytest.raises(ValueError, match=r"gate\.function has a tensor of its own"):
        lora_experts(*m[:5], gate)
    with pytest.raises(ValueError, match=r"makes \[1, 20\] of one row; allowed: \[1, 10\]"):
        lora_experts(*m[:5], Gate(torch.sigmoid))
    with torch.no_grad():
        assert lora_experts(*m[:5], gate, **bound).shape == (7, 5)


def test_a_device_for_all():
    meta = Factors(*(t.detach().to("meta") for t in m.up.factors[0][:2]), 1.0)
    with pytest.raises(ValueError, match=r"up.factors\[0\].A is on meta; allowed: cpu"):
        call(m._replace(up=part(m.up, factors=(meta,))))


def _call(m: Mixture, x: torch.Tensor, weights: torch.Tensor, **more) -> torch.Tensor:
    index = m.index + 0 * x[0, 0].detach().long()  # a value of the transform too
    return lora_experts(x, index, weights, *m[3:6], choice=m.choice, **more).sum()


def _dual(m: Mixture, **more) -> torch.Tensor:
    with forward_ad.dual_level():
        y = _call(m, forward_ad.make_dual(m.x.detach(), m.x.detach()), m.weights, **more)
        return forward_ad.unpack_dual(y).primal.detach()


def _vmapped(m: Mixture, **more) -> torch.Tensor:
    """Over routing weights, with one index for all."""
    weights, x = m.weights.detach(), m.x.detach()

    def one(w: torch.Tensor) -> torch.Tensor:
        return lora_experts(x, m.index, w, *m[3:6], choice=m.choice, **more).sum()

    return torch.func.vmap(one)(weights[None])[0]


TRANSFORMS = {
    "grad": lambda m, **more: torch.func.grad_and_value(
        lambda x: _call(m, x, m.weights.detach(), **more)
    )(m.x.detach())[1],
    "jvp": lambda m, **more: torch.func.jvp(
        lambda x: _call(m, x, m.weights.detach(), **more), (m.x.detach(),), (m.x.detach(),)
    )[0],
    "vmap": _vmapped,
    "dual numbers": _dual,
}


@pytest.mark.parametrize("way", TRANSFORMS)
@pytest.mark.parametrize("wrong", [E, E + 70, -1, "choice 2", "choice -2"])
def test_values_out_of_range_are_refused_in_transforms_as_outside_of_them(way, wrong):
    bad = mixture(mixed=True, ranks=((3, 3), (2, 2)))
    if isinstance(wrong, int):
        bad.index[2, 1] = wrong
        says = f"lora_experts: index has {wrong}; allowed: 0 to {E - 1}, for {E} experts"
    else:
        bad.choice[3] = int(wrong.split()[1])
        says = f"lora_experts: {wrong.replace(' ', ' has ')}; allowed: -1 (no adapter) to 1"
    for call in (lambda m: _call(m, m.x, m.weights), TRANSFORMS[way]):
        with pytest.raises(ValueError, match=re.escape(says)):
            call(bad)


@pytest.mark.parametrize("way", TRANSFORMS)
def test_experts_of_other_processes_add_nothing_in_transforms(way):
    own = mixture()
    own.index[0, 0] = own.index[3] = E + 7
    want = _call(own, own.x, own.weights, sentinels=True)
    assert_same_number(TRANSFORMS[way](own, sentinels=True), want.detach())
    own.index[1, 1] = -1
    with pytest.raises(ValueError, match="index has -1"):
        TRANSFORMS[way](own, sentinels=True)


@pytest.mark.parametrize("way", TRANSFORMS)
def test_the_check_of_a_device_runs_in_transforms(way, monkeypatch):
    """On a CPU torch's assertion does not wait, so the check of other devices can be run there."""
    monkeypatch.setattr(double.loop, "check_values", grouped.check_values)
    good = mixture(mixed=True, ranks=((3, 3), (2, 2)))
    want = _call(good, good.x, good.weights)
    assert_same_number(TRANSFORMS[way](good), want.detach())
    good.index[2, 1] = E
    with pytest.raises(RuntimeError, match="index is out of range"):
        TRANSFORMS[way](good)
    good.index[2, 1], good.choice[0] = 0, 5
    with pytest.raises(RuntimeError, match="choice is out of range"):
        TRANSFORMS[way](good)
