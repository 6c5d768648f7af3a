"""Merging and unmerging: HF PEFT's numbers and behaviour, and base weights restored to the bit."""

from __future__ import annotations

import copy
import re
import warnings
from unittest import mock

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import peftkern
from peftkern.tuners.lora import Linear, adding, restore, unloading
from peftkern.tuners.lora.adding import Sum
from peftkern.tuners.lora.exact_product import ExactProduct
from peftkern.tuners.lora.restore import KeptCopy, KeptSum
from tests.closeness import assert_as_good_as_torch, assert_same_number, differ
from tests.test_weighted import Net, layers, models
from tests.tiny import assert_same, fill, first, inputs, make, pair, snapshot

INTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
X = torch.arange(12).view(2, 6)


def same_bits(a, b):
    kind = INTS[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" not in n}


def stepping(elements, small=0):
    """Records by difference for weights above ``small`` elements, with steps of so many."""
    patch = mock.patch.object
    return mock.patch.multiple(adding, SMALL=small, CPU_SMALL=small), patch(
        restore, "CPU_STEP", max(1, elements // torch.get_num_threads())
    )


def quietly(call, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


# ---------------------------------------------------------------- bits


@given(
    dtype=st.sampled_from(DTYPES),
    low=st.sampled_from([torch.float32, None]),
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    r=st.sampled_from([1, 3, 8, 70]),
    weight_scale=st.floats(-12, 6),
    update_scale=st.floats(-20, 12),
    step=st.sampled_from([50, restore.CPU_STEP]),
    small=st.sampled_from([0, adding.CPU_SMALL]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_unmerging_brings_back_every_bit(
    dtype, low, n, k, r, weight_scale, update_scale, step, small, seed
):
    torch.manual_seed(seed)
    base = nn.Linear(k, n).to(dtype)
    with torch.no_grad():
        base.weight.copy_(torch.randn(n, k, dtype=torch.float64) * 2.0**weight_scale)
        base.weight.view(-1)[: seed % 5] = torch.tensor(0.0)
        base.weight.view(-1)[: seed % 3] = torch.tensor(-0.0)
    layer = Linear(base)
    for name in ("a", "b"):
        config = peftkern.LoraConfig(r=r, init_lora_weights=False)
        layer.update_layer(name, r, 2 * r, config, autocast_dtype=low is not None)
        layer.lora_B[name].weight.data.mul_(2.0**update_scale)
    before = base.weight.detach().clone()
    storage = base.weight.data_ptr()
    records, size = stepping(step, small)
    with records, size:
        layer.merge(adapter_names=["a", "b"])
    kept = layer._kept[0][1]
    by_sum = small == 0 and dtype != torch.float64
    assert type(kept) is (KeptSum if by_sum else KeptCopy)
    factors = [*kept.product.tensors] if by_sum else kept.tensors[1:]
    assert kept.nbytes - sum(t.nbytes for t in factors) <= before.nbytes  # never more than a copy
    A, B = ([getattr(layer, s)[n].weight.double() for n in "ab"] for s in ("lora_A", "lora_B"))
    exact = before.double() + 2 * (B[0] @ A[0]) + 2 * (B[1] @ A[1])
    merged = base.weight.double()
    # one rounding to the dtype, after sums of r + 4 terms and factors, in float32 at least
    ulp = torch.finfo(dtype).eps / 2
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    sizes = before.double().abs() + 2 * sum(b.abs() @ a.abs() for a, b in zip(A, B, strict=True))
    noise = (r + 4) * wide * sizes
    finite = merged.isfinite()
    tiny = torch.finfo(dtype).smallest_normal * ulp * 2
    off = (merged - exact).abs()
    assert (off <= ulp * exact.abs() + (1 + ulp) * noise + tiny)[finite].all()
    # the adapters are trained, and one is deleted, meanwhile
    layer.lora_A["a"].weight.data.normal_()
    layer.scaling["a"] = 17.0
    layer.delete_adapter("b")
    layer.unmerge()
    assert same_bits(base.weight.data, before) and base.weight.data_ptr() == storage
    assert layer.merged_adapters == [] and layer._kept == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_calls_one_after_the_other_come_back_as_well(dtype):
    ours, _ = models({"r": 4}, {"r": 3, "use_rslora": True}, {"r": 2})
    ours = ours.to(dtype)
    before = weights(ours)
    ours.merge_adapter(["a1"])
    once = weights(ours)
    quietly(ours.merge_adapter, ["a2", "a0"], safe_merge=True)
    assert all(m.merged_adapters == ["a1", "a2", "a0"] for m in layers(ours).values())
    for layer in layers(ours).values():
        layer._unmerge_last()
        assert layer.merged_adapters == ["a1"]
    assert all(same_bits(v, once[n]) for n, v in weights(ours).items())
    quietly(ours.merge_adapter, ["a2"])
    ours = copy.deepcopy(ours)  # what is kept is copied with the model
    ours.unmerge_adapter()
    assert all(same_bits(v, before[n]) for n, v in weights(ours).items())


def test_what_is_kept_is_small_and_leaves_with_the_layers():
    torch.manual_seed(0)
    A, B = torch.randn(4, 512), torch.randn(512, 4) * 1e-4  # 1% of the weight
    for dtype in (torch.bfloat16, torch.float32):
        weight = (torch.randn(512, 512) * 0.02).to(dtype)
        for small, most in ((0, 0.25), (2**18, dtype.itemsize + 0.1)):
            merged = weight.clone()
            records, size = stepping(5000, small)
            with records, size:
                kept = Sum(merged, [(B, A, 1.0)]).write(keep=True)
            assert kept.nbytes / weight.numel() < most
            assert not same_bits(merged, weight) and same_bits(kept.restored(merged), weight)
            assert Sum(merged, [(B, A, 1.0)]).write(keep=False) is None
    ours, _ = models({"r": 4})
    seen = [layer for layer in layers(ours).values()]
    ours.merge_and_unload()
    assert all(kept is None for layer in seen for _, kept in layer._kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_that_keeps_nothing_is_taken_out_by_subtraction(dtype):
    ours = models({"r": 4})[0].to(dtype)
    before = weights(ours)
    ours.merge_adapter(exact=False)
    assert all(kept is None for layer in layers(ours).values() for _, kept in layer._kept)
    assert all(layer.merged_adapters == ["a0"] for layer in layers(ours).values())
    ours.unmerge_adapter()
    for name, value in weights(ours).items():
        step = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(value, before[name], rtol=step, atol=step)


def test_the_prediction_is_the_same_in_whatever_order_it_is_summed():
    """Its products are exact, so another device, BLAS or number of threads gives the same bits."""
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(9, 900, generator=g), torch.randn(900, 7, generator=g) * 1e-3
    product = ExactProduct(left, right)
    order = torch.randperm(900, generator=g)
    a, b = product.left.double(), product.right.double()
    assert torch.equal(a @ b, a[:, order] @ b[order])
    assert torch.equal(a @ b, sum(a[:, i : i + 1] * b[i] for i in reversed(range(900))))
    found = product.on(left.device)((slice(2, 5),))
    assert torch.equal(found, (a @ b)[2:5].float())
    # terms of very different sizes: each counts with the precision of the largest
    scale = torch.ldexp(torch.ones(900), torch.arange(900) % 40 - 20)
    for factor in (torch.ones(900), scale):
        product = ExactProduct(left * factor, right / factor[:, None])
        exact = left.double() @ right.double()
        close = (product.left.double() @ product.right.double() - exact).norm()
        # of 21 bits, one is lost by each factor's rounding, and more as rows differ from their max
        assert close <= 2**-18 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [100, 3, 20])
def test_stacked_weights_are_kept_one_by_one(dtype, elements):
    """Experts' weights: three dimensions, a product for each of the first."""
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(5, 6, 2, generator=g), torch.randn(5, 2, 7, generator=g) * 1e-3
    weight = torch.randn(5, 6, 7, generator=g).to(dtype)
    want = weight.double() + 0.5 * left.double() @ right.double()
    merged = weight.clone()
    records, size = stepping(elements)
    with records, size:
        total = Sum(merged, [(left, right, 0.5)])
        assert total.finite() == [True] and same_bits(merged, weight)
        kept = total.write(keep=True)
        assert type(kept) is KeptSum and len(list(restore.steps(merged))) > 1
        torch.testing.assert_close(merged.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert same_bits(kept.restored(merged), weight)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("small", [0, 10**6])
@pytest.mark.parametrize("scale", [1e-3, 30.0])  # by a list, and by a copy that it has become
def test_a_merge_that_is_interrupted_leaves_the_weight_as_it_was(keep, small, scale):
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(40, 3, generator=g), torch.randn(3, 8, generator=g) * scale
    before = torch.randn(40, 8, generator=g)
    in_place = keep and small > 0  # then the product is added to the weight itself
    method = "addmm_" if in_place else "copy_"
    write = getattr(torch.Tensor, method)
    for late in (False, True):
        weight = before.clone()
        calls = []

        def third_fails(self, *args, late=late, weight=weight, calls=calls, **kwargs):
            mine = self.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
            calls.extend([1] * mine)
            third = mine and len(calls) == 3
            if third and not late:
                raise KeyboardInterrupt
            found = write(self, *args, **kwargs)
            if third:
                raise KeyboardInterrupt
            return found

        records, size = stepping(40, small)
        with records, size, mock.patch.object(torch.Tensor, method, third_fails):
            with pytest.raises(KeyboardInterrupt):
                Sum(weight, [(left, right, 1.0)]).write(keep)
        assert len(calls) >= 3
        if keep:
            assert same_bits(weight, before)
        else:
            torch.testing.assert_close(weight, before, rtol=1e-5, atol=1e-5 * max(1.0, scale))


def test_a_weight_that_is_not_contiguous_is_merged_in_place():
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(6, 2, generator=g), torch.randn(2, 8, generator=g) * 1e-2
    weight = torch.randn(8, 6, generator=g).T
    before = weight.clone()
    records, size = stepping(20)
    for small in (0, 100):
        with mock.patch.object(adding, "CPU_SMALL", small), size:
            kept = Sum(weight, [(left, right, 1.0)]).write(True)
            torch.testing.assert_close(weight, before + left @ right)
            weight.copy_(kept.restored(weight))
        assert same_bits(weight.contiguous(), before.contiguous())


@pytest.mark.parametrize("small", [0, adding.CPU_SMALL])
def test_a_weight_that_was_changed_meanwhile_keeps_the_change(small):
    """To nearly float32's precision: the product that was added is subtracted."""
    ours, exact = models({"r": 4}, dtype=torch.float32)
    exact = exact.double()
    updates = {n: m.get_delta_weight("a0") for n, m in layers(exact).items()}
    records, _ = stepping(1, small)
    for model in (ours, exact):
        with records:
            model.merge_adapter()
        for layer in layers(model).values():
            layer.get_base_layer().weight.data.mul_(1.5)
        model.unmerge_adapter()
    for name, layer in layers(exact).items():
        off = (layers(ours)[name].weight - layer.weight).norm()
        assert off <= 2**-15 * updates[name].norm()


def test_merged_names_without_a_record_are_subtracted():
    ours, _ = models({"r": 4})
    before = weights(ours)
    ours.merge_adapter()
    for layer in layers(ours).values():
        layer._kept.clear()
    ours.unmerge_adapter()
    assert_same_number(weights(ours), before)


# ---------------------------------------------------------------- beside HF PEFT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("safe", [False, True])
def test_merged_models_agree(dtype, safe):
    both = [m.to(dtype) for m in models({"r": 4}, {"r": 3, "lora_alpha": 6})]
    exact = copy.deepcopy(both[0]).double()
    before = weights(both[0])
    for model in (*both, exact):
        model.base_model.set_adapter(["a0", "a1"])
        model.merge_adapter(safe_merge=safe)
    wide = dict(exact.named_parameters())
    for mine, other in zip(layers(both[0]).items(), layers(both[1]).values(), strict=True):
        name, mine = mine
        want = wide[f"{name}.base_layer.weight"]
        assert_as_good_as_torch(mine.weight, other.weight, want)
        if dtype.itemsize == 2:  # rounded once, after sums in float32
            errors = [(m.weight.double() - want).abs().mean() for m in (mine, other)]
            assert errors[0] <= errors[1]
        assert mine.merged_adapters == other.merged_adapters
        assert mine.weight.dtype == dtype
    assert_as_good_as_torch(*({"y": m(X)} for m in (*both, exact)))
    both[0].unmerge_adapter()
    assert all(same_bits(v, before[n]) for n, v in weights(both[0]).items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_a_merged_model_computes_what_it_did(family):
    """Also where projections are grouped: the merged layers of a set leave it."""
    task = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}.get(family, "CAUSAL_LM")
    ours, theirs = (
        m.eval() for m in pair(family, task, torch.float64, target_modules="all-linear")
    )
    batch = inputs(family, task)
    with torch.no_grad():
        want = first(theirs(**batch))
        ours.merge_adapter()
        merged = first(ours(**batch))
        ours.unmerge_adapter()
        assert_same_number(first(ours(**batch)), want)
        assert_same_number(merged, want)
        one = next(m for m in ours.modules() if isinstance(m, Linear))
        one.merge()  # one layer of many
        assert_same_number(first(ours(**batch)), want)
        assert "merged: default" in str(peftkern.explain(ours))


def test_warnings_are_peft_s():
    for model in models({"r": 4}, {"r": 4}):
        layer = layers(model)["base_model.model.lin"]
        with pytest.warns(UserWarning, match="Already unmerged. Nothing to do."):
            layer.unmerge()
        layer.merge()
        with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do."):
            layer.merge()
        text = "Already following adapters were merged a0. You are now additionally merging a1."
        with pytest.warns(UserWarning, match=text):
            layer.merge(adapter_names=["a0", "a1"])
        assert layer.merged_adapters == ["a0", "a1"]
        with pytest.raises(TypeError, match="adapter_names should be a list of strings"):
            layer.merge(adapter_names="a1")
        with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do."):
            layer.merge(adapter_names=[])
        text = "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge"
        with pytest.raises(ValueError, match=re.escape(text)):
            model.eval()(X, adapter_names=["a0", "a1"])


def test_a_disabled_forward_unmerges():
    for model in models({"r": 4}):
        before, want = weights(model), model(X).detach()
        with model.disable_adapter():
            base = model(X).detach()
        model.merge_adapter()
        with model.disable_adapter():
            assert_same_number(model(X), base)
        assert not any(layer.merged for layer in layers(model).values())
        assert_same_number(model(X), want)
        assert_same_number(weights(model), before)


def test_bias_of_lora_goes_to_the_base_bias_and_back():
    ours, theirs = models({"r": 4, "lora_bias": True}, targets=("lin", "conv"))
    before = weights(ours)
    for model in (ours, theirs):
        model.merge_adapter()
    for mine, other in zip(layers(ours).values(), layers(theirs).values(), strict=True):
        assert_same_number(mine.bias, other.bias)
        assert not torch.equal(mine.bias, before["base_model.model.lin.base_layer.bias"])
    ours.unmerge_adapter()
    assert all(same_bits(v, before[n]) for n, v in weights(ours).items())


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload_gives_peft_s_model(safe):
    ours, theirs = models({"r": 4}, {"r": 4}, modules_to_save=["head"])
    want = ours(X).detach()
    mine, other = (
        m.merge_and_unload(safe_merge=safe, adapter_names=["a1", "a0"]) for m in (ours, theirs)
    )
    assert type(mine) is Net and not hasattr(mine, "peft_config")
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in Net().named_parameters()]
    flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (mine, other)]
    assert flags[0] == flags[1]
    for (name, a), b in zip(mine.named_parameters(), other.parameters(), strict=True):
        assert_same_number(a, b, name)
    assert differ(mine(X), want)
    again = peftkern.get_peft_model(mine, peftkern.LoraConfig(target_modules=["lin"]))
    assert list(again.peft_config) == ["default"]


@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_unloading_takes_the_active_copy(how):
    for model in models({"modules_to_save": ["head"]}, {}, r=4):
        model.base_model.model.head.modules_to_save["a0"].weight.data.fill_(2.0)
        copies = [(copy.deepcopy(model), 2.0)]
        model.set_adapter("a1")
        copies.append((model, None))
        for one, value in copies:
            base = one.base_model.model.head.original_module.weight.detach().clone()
            lin = layers(one)["base_model.model.lin"].weight.detach().clone()
            off = copy.deepcopy(one)
            off.base_model.disable_adapter_layers()
            for found in (getattr(one, how)(), getattr(off, how)()):
                assert type(found.head) is nn.Linear
                want = base if value is None else torch.full_like(base, value)
                assert torch.equal(found.head.weight, want)
                assert torch.equal(found.lin.weight, lin) is (how == "unload")


def test_tied_weights_warn_and_come_back():
    both = pair("llama", target_modules=["embed_tokens", "lm_head"], base=tied())
    for model in both:
        with pytest.warns(UserWarning, match="Model with `tie_word_embeddings=True` and the"):
            model.merge_adapter()
    emb, head = (both[0].base_model.model.model.embed_tokens, both[0].base_model.model.lm_head)
    assert emb.weight is head.weight
    assert_same_number(emb.weight, both[1].base_model.model.lm_head.weight)
    ours, _ = pair("llama", target_modules=["embed_tokens", "lm_head"], base=tied())
    before = weights(ours)
    quietly(ours.merge_adapter)
    ours.unmerge_adapter()
    assert all(same_bits(v, before[n]) for n, v in weights(ours).items())


def tied():
    base = make("llama", dtype=torch.float64)
    base.config.tie_word_embeddings = True
    base.lm_head.weight = base.model.embed_tokens.weight
    return base


def test_embeddings_that_are_not_tied_are_said_so():
    base = tied()
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    ours, _ = pair("llama", target_modules=["q_proj"], base=base)
    with pytest.warns(UserWarning, match="Setting `tie_word_embeddings=False`"):
        assert ours.merge_and_unload().config.tie_word_embeddings is False


# ---------------------------------------------------------------- all or nothing


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_adapter_is_refused_by_safe_merge(how, poison):
    ours, theirs = models({"r": 4}, {"r": 4})
    for model in (ours, theirs):  # in the last layer, and in the second adapter
        layers(model)["base_model.model.conv"].lora_B["a1"].weight.data[1, 1] = poison
    text = "NaNs detected in the merged weights. The adapter a1 seems to be broken"
    before = weights(ours)
    for model in (ours, theirs):
        with pytest.raises(ValueError, match=text):
            getattr(model, how)(safe_merge=True, adapter_names=["a0", "a1"])
    assert all(same_bits(v, before[n]) for n, v in weights(ours).items())
    assert not any(layer.merged for layer in layers(ours).values())
    ours.merge_adapter(["a1"])  # unsafe: merged, and taken out again all the same
    ours.unmerge_adapter()
    assert all(same_bits(v, before[n]) for n, v in weights(ours).items())


def test_float16_that_overflows_is_refused():
    ours = models({"r": 4})[0].to(torch.float16)
    before = weights(ours)
    layers(ours)["base_model.model.lin"].lora_B["a0"].weight.data.fill_(6e4)
    with pytest.raises(ValueError, match="NaNs detected"):
        ours.merge_adapter(safe_merge=True)
    assert all(same_bits(v, before[n]) for n, v in weights(ours).items())


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_a_failure_half_way_takes_everything_back(how, monkeypatch):
    ours, _ = models({"r": 4}, {"r": 4})
    quietly(ours.merge_adapter, ["a1"])
    before = weights(ours)
    add, calls = torch.Tensor.addmm_, []

    def third_fails(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room")
        return add(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "addmm_", third_fails)
    with pytest.raises(MemoryError, match="no room"):
        quietly(getattr(ours, how), adapter_names=["a0"])
    monkeypatch.undo()
    assert len(calls) >= 3
    assert all(layer.merged_adapters == ["a1"] for layer in layers(ours).values())
    for name, value in weights(ours).items():
        if how == "merge_adapter":
            assert same_bits(value, before[name])
        else:  # keeps nothing, so what was merged is subtracted
            assert_same_number(value, before[name])


def test_lora_bias_without_a_base_bias_is_refused_before_anything_is_merged():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    ours = quietly(
        peftkern.get_peft_model,
        Two(),
        peftkern.LoraConfig(target_modules=["a", "b"], lora_bias=True),
    )
    fill(ours)
    before = snapshot(ours)
    for how in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True`"):
            getattr(ours, how)()
        assert_same(ours, before)


def test_what_cannot_be_written_is_refused_by_name():
    cases = [
        (lambda m: m.lin.base_layer.to("meta"), "the weight of a Linear is on the meta device"),
        (lambda m: m.lin.lora_A.to("meta"), "the weights of 'a0' are on the meta device"),
        (lambda m: m.lin.base_layer.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn"),
        (lambda m: weight_norm(m.lin.base_layer), "Linear is parametrized"),
        (lambda m: nn.utils.spectral_norm(m.lin.base_layer), "Linear is parametrized"),
        (lambda m: setattr(m, "quantization_method", "gptq"), "gptq quantized"),
        (lambda m: setattr(m.peft_config["a0"], "layer_replication", [(0, 1)]), "are replicated"),
    ]
    for change, text in cases:
        ours, _ = models({"r": 4})
        change(ours.base_model.model)
        before = snapshot(ours)
        for how in ("merge_adapter", "merge_and_unload"):
            with pytest.raises(ValueError, match=text):
                getattr(ours, how)()
        assert not any(layer.merged for layer in layers(ours).values())
        if "meta" not in text:
            assert_same(ours, before)
    with pytest.raises(ValueError, match=re.escape("`adapter_names` has ['typo']")):
        models({"r": 4})[0].merge_adapter(["typo"])


def test_weights_that_accelerate_offloads_are_merged():
    from accelerate import cpu_offload

    ours, theirs = models({"r": 4}, targets=("lin", "conv"))
    want = ours(X).detach()
    cpu_offload(ours, execution_device=torch.device("cpu"))
    layer = layers(ours)["base_model.model.lin"]
    hook = layer.get_base_layer()._hf_hook

    class Disk(dict):  # gives a new tensor each time, as files do
        def __getitem__(self, name):
            return super().__getitem__(name).clone()

    hook.weights_map = Disk({n: hook.weights_map[n] for n in ("weight", "bias")})
    assert layer.get_base_layer().weight.is_meta and layer.lora_A["a0"].weight.is_meta
    ours.merge_adapter()
    assert layer.get_base_layer().weight.is_meta and layer.merged_adapters == ["a0"]
    assert_same_number(ours(X), want)
    ours.unmerge_adapter()
    weight = hook.weights_map["weight"]
    assert same_bits(weight, layers(theirs)["base_model.model.lin"].weight.detach())
    assert_same_number(ours(X), want)


def test_prompts_have_nothing_to_merge():
    config = peftkern.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    theirs = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    for model in (
        peftkern.get_peft_model(make("llama"), config),
        peft.get_peft_model(make("llama"), theirs),
    ):
        for how in ("merge_adapter", "unmerge_adapter", "merge_and_unload", "unload"):
            with pytest.raises(AttributeError, match=how):
                getattr(model, how)()


def test_merging_walks_a_model_twice_and_never_fails_to_find_a_hook():
    """The modules' walks and failed look-ups took as long as a small layer's arithmetic."""
    config = peftkern.LoraConfig(target_modules="all-linear")
    model, walks, missed = peftkern.get_peft_model(make("llama"), config), [], []
    found, of = unloading.all_modules, nn.Module.__getattr__

    def walk(root):
        walks.append(root)
        return found(root)

    def look(module, name):
        missed.append(name)
        return of(module, name)

    with (
        mock.patch.object(unloading, "all_modules", walk),
        mock.patch.object(nn.Module, "__getattr__", look),
    ):
        model.merge_adapter()
    assert len(walks) == 2  # for adapter layers, and for modules that train in full
    assert missed and "_hf_hook" not in missed
