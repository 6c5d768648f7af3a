"""What explain says of the ways of mixtures: those that their calls take, and the reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import peftkern
from peftkern.ops.experts import choosing
from peftkern.ops.experts.parts import Call
from tests import moe_models
from tests.mixtures import mixture

LOOP = ": a loop over the experts (on a CPU the host knows how many tokens each expert got)"


def model(
    kind: str = "plain", dtype: torch.dtype = torch.float32, names: Any = ("default",), **settings
) -> Any:
    if kind not in moe_models.FLAGS:
        pytest.skip("transformers has no norm after experts")
    base = moe_models.tiny(kind, dtype=dtype)
    settings = {"target_parameters": moe_models.both(kind), **settings}
    made = moe_models.adapt(peftkern, base, names, **settings)
    made.base_model.set_adapter(list(names))
    return made


def said(of: Any) -> str:
    """The words that the rows of both parameters have."""
    (words,) = {row.reason for row in peftkern.explain(of)}
    return words


# {what is special: (model, the reason that the kernels decline)}
DECLINED: dict[str, tuple[Any, str]] = {
    "norm": (lambda: model("post_norm"), "a norm follows each expert"),
    "several": (
        lambda: model(names=("default", "other")),
        "several adapters are added to one linear",
    ),
    "dtype": (lambda: model(dtype=torch.float64), "dtype torch.float64"),
    "rank": (lambda: model(r=257), "rank 257 is above 256"),
}
TAKEN = {kind: (lambda kind=kind: model(kind)) for kind in ("plain", "bias", "interleaved")}


@pytest.fixture
def choices(monkeypatch) -> list[Any]:
    """The choices that calls have made."""
    from peftkern.ops import lora_experts

    found: list[Any] = []
    real = choosing.choose

    def choose(call: Call, keep: bool) -> Any:
        found.append(real(call, keep))
        return found[-1]

    monkeypatch.setattr(lora_experts, "choose", choose)
    return found


@pytest.mark.parametrize("what", DECLINED)
def test_why_the_kernels_decline(what, choices):
    make, reason = DECLINED[what]
    made = make()
    with peftkern.use_backend("triton"):
        assert said(made).endswith(f"{LOOP}, as the kernels decline: {reason}")
        made(moe_models.ids()).sum().backward()
        with torch.no_grad():
            made(moe_models.ids())
    assert [(c.name, c.declined) for c in choices] == [("loop", reason)] * 2
    with peftkern.use_backend("torch"):
        assert said(made).endswith(LOOP)


@pytest.mark.parametrize("kind", TAKEN)
def test_the_kernels_run(kind, choices):
    made = TAKEN[kind]()
    with peftkern.use_backend("triton"):
        assert said(made).endswith(": the kernels (asked for: PEFTKERN_BACKEND=triton)")
        made(moe_models.ids()).sum().backward()
    assert [(c.name, c.declined) for c in choices] == [("triton", None)]


def test_a_call_with_gradients_may_go_another_way():
    m = mixture(bias=True, dtype=torch.float32)
    with peftkern.use_backend("triton"):
        words = choosing.describe(Call(*m, False))
    assert words.startswith("the kernels (asked for: PEFTKERN_BACKEND=triton); with gradients a")
    assert words.endswith("as the kernels decline: a bias trains")


def test_away_from_a_cpu_torchs_grouped_products_run():
    m = mixture(dtype=torch.float32, sizes=(4, 8, 16, 8, 3, 2)).to(torch.float32)

    def away(part: Any) -> Any:
        return part._replace(weight=part.weight.to("meta"), factors=())

    x, index, weights, up, down, *rest = m
    call = Call(x.to("meta"), index, weights, away(up), away(down), *rest, False)
    with peftkern.use_backend("torch"):
        words = choosing.describe(call)
    assert words == "torch's grouped products (the host does not wait for the device)"


def test_weights_that_accelerate_places():
    from accelerate import cpu_offload

    made = cpu_offload(model(), execution_device="cpu")
    assert said(made).endswith(": what computes it is chosen where accelerate places its weights")


@pytest.mark.parametrize("fastest", ["kernels", "torch"])
def test_races_are_told(clock, fastest):
    clock.fastest = fastest
    made = model()
    assert ": not called yet: raced at its first call; no table ships for" in said(made)
    with torch.no_grad():
        made(moe_models.ids())
    gain = " 2.00x torch" if fastest == "kernels" else ""
    one = f": experts M<=16 {fastest}{gain}"
    assert f"{one}: raced here on" in said(made)
    assert clock.races == 1
    made(moe_models.ids()).sum().backward()
    assert f"{one}, experts_step M<=16 {fastest}{gain}: raced here on" in said(made)
    assert clock.races == 2
    other = model("interleaved")  # of the same sizes
    assert "not called yet" in said(other)


def test_no_race_may_run(clock, monkeypatch):
    monkeypatch.setenv("PEFTKERN_RACE", "0")
    made = model()
    assert ": not called yet: torch, for PEFTKERN_RACE=0" in said(made)
    made(moe_models.ids())
    assert "experts_step M<=16 torch: PEFTKERN_RACE=0: torch" in said(made)
    assert clock.races == 0
