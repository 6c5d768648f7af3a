"""KaSA against HF PEFT: the truncated base, numbers, training, its loss, merging, files."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import peftkern
from tests.closeness import assert_as_good_as_torch, assert_same_number, differ
from tests.tiny import fill, first, gradients, make, step

IDS = torch.arange(3, 17).view(2, 7)
BATCH = {"input_ids": IDS, "labels": IDS}
NAMES = ["q_proj", "v_proj", "down_proj"]


def config(library=peftkern, **settings):
    settings = {"r": 4, "target_modules": NAMES, "lora_alpha": 12, "kasa_config": {}, **settings}
    return library.LoraConfig(task_type="CAUSAL_LM", **settings)


def models(dtype=torch.float64, **settings):
    base, found = make("llama", dtype=dtype), []
    for library in (peftkern, peft):
        torch.manual_seed(0)
        found.append(library.get_peft_model(copy.deepcopy(base), config(library, **settings)))
    return found


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_as_in_peft(init, dtype):
    ours, theirs = models(dtype, init_lora_weights=init)
    want = dict(theirs.named_parameters())
    assert set(want) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, want[name]), name
        assert parameter.requires_grad == want[name].requires_grad
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj
    if dtype == torch.float32:
        assert torch.linalg.matrix_rank(layer.base_layer.weight) == 12  # 16 less 4


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_numbers_and_gradients(p):
    ours, theirs = models(lora_dropout=p)
    fill(ours), fill(theirs)
    found = [gradients(m.train(), BATCH) for m in (ours, theirs)]
    assert_same_number(*found)
    assert any("lora_diag" in name for name in found[0][1])


def test_fp32_errs_no_more_than_peft():
    ours, theirs = models(torch.float32)
    fill(ours), fill(theirs)
    exact = step(copy.deepcopy(theirs).double(), BATCH)
    assert_as_good_as_torch(step(ours, BATCH), step(theirs, BATCH), exact)


def test_two_active_adapters_are_not_one_operation():
    pairs = models(init_lora_weights=False)
    for model, library in zip(pairs, (peftkern, peft), strict=True):
        torch.manual_seed(1)
        model.add_adapter("b", config(library, r=6, init_lora_weights=False))
        model.base_model.set_adapter(["b", "default"])
    mine, other = (gradients(m.train(), BATCH) for m in pairs)
    assert_same_number(mine, other)
    with torch.no_grad():
        rows = [first(m.eval()(input_ids=IDS, adapter_names=["b", "__base__"])) for m in pairs]
    assert_same_number(*rows)


def test_one_operation_says_so():
    ours, _ = models()
    assert all(row.fused and "KaSA: one operation" in row.reason for row in peftkern.explain(ours))


def test_loss(doubled):
    ours, theirs = models(init_lora_weights=False, kasa_config={"beta": 0.3, "gamma": 0.2})
    losses = [m._get_kasa_loss() for m in (ours, theirs)]
    assert_same_number(*losses)
    for loss in losses:
        loss.backward()
    want = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert_same_number(parameter.grad, want[name].grad, name)
    assert ours._get_kasa_loss("default").item() == losses[0].item()
    assert ours._get_kasa_loss(["other"]) == 0.0
    plain = peftkern.get_peft_model(make("llama"), config(kasa_config=None))
    assert plain._get_kasa_loss() == 0.0


def test_merging():
    ours, theirs = models()
    fill(ours), fill(theirs)
    before = {n: p.clone() for n, p in ours.named_parameters() if "base_layer" in n}
    want = first(ours.eval()(input_ids=IDS))
    for safe in (False, True):
        ours.merge_adapter(safe_merge=safe), theirs.merge_adapter(safe_merge=safe)
        merged = dict(theirs.named_parameters())
        for name, old in before.items():
            assert_same_number(ours.get_parameter(name), merged[name], name)
            assert not torch.equal(ours.get_parameter(name), old)
        assert_same_number(first(ours(input_ids=IDS)), want)
        ours.unmerge_adapter(), theirs.unmerge_adapter()
        assert all(torch.equal(ours.get_parameter(n), old) for n, old in before.items())
    assert not theirs.supports_lora_conversion() and not ours.supports_lora_conversion()
    assert_same_number(first(ours.merge_and_unload()(input_ids=IDS)), want)


@pytest.mark.parametrize("low", [False, True])
def test_files_go_both_ways(tmp_path, doubled, low):
    ours, theirs = models(kasa_config={"beta": 0.5})
    fill(ours), fill(theirs)
    ours.save_pretrained(tmp_path / "ours"), theirs.save_pretrained(tmp_path / "theirs")
    want = first(theirs.eval()(input_ids=IDS))
    for library, name in ((peft, "ours"), (peftkern, "theirs")):
        model = library.PeftModel.from_pretrained(
            make("llama", dtype=torch.float64), tmp_path / name, low_cpu_mem_usage=low
        )
        for _ in range(2):
            assert_same_number(first(model.eval()(input_ids=IDS)), want)
    settings = peftkern.LoraConfig.from_pretrained(tmp_path / "theirs").kasa_config
    assert settings == peftkern.KasaConfig(beta=0.5)
    merged = peftkern.PeftModel.from_pretrained(
        make("llama", dtype=torch.float64), tmp_path / "theirs", low_cpu_mem_usage=low
    ).merge_and_unload()
    assert_same_number(first(merged(input_ids=IDS)), want)


@pytest.mark.parametrize("merge", [False, True])
def test_a_base_that_comes_after_the_adapter(merge):
    """The base weight is on the meta device when the adapter is added, and is loaded later."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 6)).double()
    settings = config(target_modules=["0"], init_lora_weights=False)
    want = peftkern.inject_adapter_in_model(settings, copy.deepcopy(base))
    model = peftkern.inject_adapter_in_model(settings, copy.deepcopy(base).to("meta"))
    x = torch.randn(3, 8, dtype=torch.float64)
    for call in (lambda: model(x), model[0].merge):
        with pytest.raises(RuntimeError, match="still on the meta device"):
            call()
    for store in ("lora_A", "lora_B"):
        getattr(model[0], store)["default"] = getattr(want[0], store)["default"]
    model[0].lora_diag["default"] = want[0].lora_diag["default"]
    model[0].base_layer.load_state_dict(base[0].state_dict(), assign=True)
    if merge:
        model[0].merge()
    for _ in range(2):
        assert_same_number(model(x), want(x))
    assert differ(model[0].base_layer.weight, want[0].base_layer.weight) is merge


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"r": 16}, "KaSA requires `r` .16. to be smaller"),
        ({"use_dora": True}, "variant combination.*kasa_config"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "variant combination.*kasa_config"),
    ],
)
def test_refusals_leave_the_model(settings, said):
    with pytest.raises(ValueError, match=said):
        peft.get_peft_model(make("llama"), config(peft, **settings))
    model = make("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=said):
        peftkern.get_peft_model(model, config(**settings))
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_failure_after_the_truncation_takes_it_back(monkeypatch):
    from peftkern.tuners.lora import kasa

    model, calls = make("llama"), []
    before = copy.deepcopy(model.state_dict())

    def failing(weight, r, whole=kasa.split):
        calls.append(weight)
        if len(calls) == 4:
            raise RuntimeError("no convergence")
        return whole(weight, r)

    monkeypatch.setattr(kasa, "split", failing)
    with pytest.raises(RuntimeError, match="no convergence"):
        peftkern.get_peft_model(model, config())
    assert list(before) == list(model.state_dict())
    restored, exact = {}, {}
    for name, value in model.state_dict().items():
        if not torch.equal(value, before[name]):
            restored[name], exact[name] = value, before[name].double()
    assert len(restored) <= 4
    # the sum of a weight's parts, as torch's own is
    sums = {}
    for name in restored:
        u, s, vh = torch.linalg.svd(before[name], full_matrices=False)
        sums[name] = (u * s) @ vh
    assert_as_good_as_torch(restored, sums, exact)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but")
def test_more_refusals():
    for library in (peftkern, peft):
        for one, two in ((None, {}), ({}, None)):
            model = library.get_peft_model(make("llama"), config(library, kasa_config=one))
            with pytest.raises(ValueError, match="KaSA cannot be combined with adapters that"):
                model.add_adapter("second", config(library, kasa_config=two))
        with pytest.raises(ValueError, match="KaSA does not support `fan_in_fan_out=True`"):
            library.get_peft_model(make("gpt2"), config(library, target_modules=["c_attn"]))
        with pytest.raises(TypeError, match="`KasaConfig` must be a `KasaConfig`, a dict, or None"):
            library.LoraConfig(kasa_config=123)
        with pytest.raises(ValueError, match="`beta` must be non-negative"):
            library.KasaConfig(beta=-1.0)
        attention = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
        with pytest.raises(ValueError, match="MultiheadAttention does not support KaSA"):
            library.get_peft_model(
                attention, library.LoraConfig(target_modules=["0"], kasa_config={})
            )
