"""Models in batches whose rows name adapters, on the Triton kernels in the interpreter.

Each row equals the result of its adapter alone, and every projection is two launches.
"""

import copy

import pytest
import torch

import peftkern
from peftkern.kernels import common
from peftkern.ops import notes
from peftkern.tuners.lora.linear import Linear
from tests.closeness import assert_as_good_as_torch
from tests.models import build

RANKS = {"default": 3, "wide": 20, "part": 8}
NAMES = ["wide", "__base__", "default", "part", "wide"]


pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
]
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["wte", "c_attn", "c_fc"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}


def adapted(family, dtype=torch.float32, **settings):
    """Three adapters of different rank, one of them on some of the targets only."""
    base = build(family, width=32, inner=48, layers=1).to(dtype)
    model = None
    for name, r in RANKS.items():
        targets = TARGETS[family][: 2 if name == "part" else None]
        config = peftkern.LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, **settings)
        if model is None:
            model = peftkern.get_peft_model(base, config)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.normal_(std=0.2)
    return model.eval()


def alone(model, name, run):
    """The result of ``run`` when every row has this adapter, on the torch backend."""
    with peftkern.use_backend("torch"), torch.no_grad():
        if name == "__base__":
            with model.disable_adapter():
                return run()
        model.set_adapter(name)
        return run()


def prompt(family):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 40, (len(NAMES), 5), generator=g)
    more = {"decoder_input_ids": ids[:, :4]} if family == "t5" else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


@pytest.fixture
def launches(monkeypatch):
    ran, run = [], common.Launch.run
    monkeypatch.setattr(common.Launch, "run", lambda launch: (ran.append(launch), run(launch))[1])
    return ran


def projections(model):
    return sum(isinstance(m, Linear) for m in model.modules())


def firsts_and_seconds(launches):
    """The number of pairs of launches, as each projection has one."""
    names = [launch.kernel.__name__ for launch in launches]
    pairs = set(zip(names[::2], names[1::2], strict=True))
    allowed = {("_segment_kernel", "_product_kernel"), ("_parts_kernel", "_finish_kernel")}
    assert pairs and pairs <= allowed
    return len(names) // 2


@pytest.mark.parametrize("family", TARGETS)
def test_every_row_is_what_its_adapter_alone_says(family, launches):
    """Prefill: rows, and embeddings, Conv1D, encoder and decoder in one model."""
    model, batch = adapted(family), prompt(family)
    with peftkern.use_backend("triton"), torch.no_grad():
        mixed = model(**batch, adapter_names=NAMES).logits
    assert firsts_and_seconds(launches) == projections(model)
    found = [{}, {}]  # on torch, in float32 and in float64
    for one, rows in zip((model, copy.deepcopy(model).double()), found, strict=True):
        for i, name in enumerate(NAMES):
            row = {k: v[i : i + 1] for k, v in batch.items()}
            rows[i] = alone(one, name, lambda row=row, one=one: one(**row).logits)[0]
    assert_as_good_as_torch(dict(enumerate(mixed)), *found)
    assert (mixed[0] - mixed[4]).abs().max() > 1e-3  # the same adapter, other tokens
    others = [mixed[i] for i in range(4)]
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(others, others[1:], strict=False))


def test_bf16_rows_are_within_rounding():
    model, batch = adapted("llama", torch.bfloat16), prompt("llama")
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        with peftkern.use_backend("triton"):
            ours = model(**batch, adapter_names=NAMES).logits
        with peftkern.use_backend("torch"):
            torchs = model(**batch, adapter_names=NAMES).logits
            want = exact(**batch, adapter_names=NAMES).logits
    assert_as_good_as_torch(ours, torchs, want, average=True)


@pytest.mark.long
@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens_are_those_of_each_row_alone(family, beams, launches):
    model, batch = adapted(family), prompt(family)
    batch.pop("decoder_input_ids", None)
    how = dict(num_beams=beams, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    with peftkern.use_backend("triton"):
        mixed = model.generate(**batch, adapter_names=NAMES, **how)
    count = firsts_and_seconds(launches)
    if family != "t5":  # prefill, then two steps; T5's encoder and cross keys run once
        assert count == 3 * projections(model)
    for i, name in enumerate(NAMES):
        row = {k: v[i : i + 1] for k, v in batch.items()}
        want = alone(model, name, lambda row=row: model.generate(**row, **how))
        assert torch.equal(mixed[i : i + 1], want), (i, name)


@pytest.mark.long
def test_two_launches_for_a_step_of_decode_and_one_index_for_a_forward(launches, monkeypatch):
    model = adapted("llama")
    ids = prompt("llama")["input_ids"]
    made, on = [], peftkern.ops.lora_mixed.SampleIndex.on
    monkeypatch.setattr(
        peftkern.ops.lora_mixed.SampleIndex, "on",
        lambda index, device: (made.append(on(index, device)), made[-1])[1],
    )  # fmt: skip
    with peftkern.use_backend("triton"), torch.no_grad():
        cache = model(ids, adapter_names=NAMES, use_cache=True).past_key_values
        assert firsts_and_seconds(launches) == projections(model) == 7
        assert len({id(t) for t in made}) == 1 and len(made) == 7
        del launches[:]
        model(ids[:, :1], adapter_names=NAMES, past_key_values=cache)
    assert firsts_and_seconds(launches) == 7
    for launch in launches:
        named = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
        assert named["M"] == len(NAMES)


@pytest.mark.long
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_names_that_are_kept_follow_their_index(dropout):
    """As a captured graph would: the index is rewritten in place, the names stay."""
    model, batch = adapted("llama", lora_dropout=dropout), prompt("llama")
    names = peftkern.AdapterNames(NAMES)
    assert names == tuple(NAMES) and names.order == ("wide", "default", "part")
    with peftkern.use_backend("triton"), torch.no_grad():
        first = model(**batch, adapter_names=names).logits
        index = names.samples.on(batch["input_ids"].device)
        index.copy_(torch.tensor([1, 2, -1, 0, 0], dtype=torch.int32))
        second = model(**batch, adapter_names=names).logits
        other = ["default", "part", "__base__", "wide", "wide"]
        want = model(**batch, adapter_names=other).logits
    with peftkern.use_backend("torch"), torch.no_grad():
        exact = copy.deepcopy(model).double()(**batch, adapter_names=other).logits
    assert_as_good_as_torch(second, want, exact, average=True)
    assert (first - second)[:4].abs().amax((1, 2)).min() > 1e-2


def layer_of(**settings):
    torch.manual_seed(0)
    layer = Linear(torch.nn.Linear(12, 10))
    for name, r in RANKS.items():
        config = peftkern.LoraConfig(r=r, target_modules=["x"], init_lora_weights=False, **settings)
        layer.update_layer(name, r, 2 * r, config)
    layer.set_adapter(["default"])
    return layer.eval()


def test_gradients_in_eval_mode_take_the_differentiable_path(launches, caplog):
    layer = layer_of()
    x = torch.randn(5, 3, 12, requires_grad=True)
    caplog.set_level("INFO", logger="peftkern")
    notes._said.clear()
    found = {}
    for choice in ("triton", "torch"):
        with peftkern.use_backend(choice):
            y = layer(x, adapter_names=NAMES)
            (y * torch.linspace(-1, 1, y.numel()).view_as(y).cos()).sum().backward()
        grads = {"x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}
        found[choice] = {n: g.clone() for n, g in grads.items() if g is not None}
        x.grad = None
        layer.zero_grad()
    assert not launches and "gradients are wanted" in caplog.text
    assert "x" in found["torch"] and found["torch"].keys() == found["triton"].keys()
    for name, g in found["torch"].items():
        assert torch.equal(found["triton"][name], g)


def test_what_the_kernel_does_not_take_is_said_and_still_right(launches, caplog):
    layer, x = layer_of(), torch.randn(5, 12)
    caplog.set_level("INFO", logger="peftkern")
    notes._said.clear()
    with peftkern.use_backend("triton"), torch.no_grad():
        fast = layer(x, adapter_names=NAMES)
        assert len(launches) == 2 and not caplog.text
        layer.lora_A["wide"].weight = torch.nn.Parameter(torch.randn(300, 12))
        layer.lora_B["wide"].weight = torch.nn.Parameter(torch.randn(10, 300))
        slow = layer(x, adapter_names=NAMES)
    assert len(launches) == 2 and "rank 300 is above 256" in caplog.text
    same = torch.tensor([n != "wide" for n in NAMES])
    exact = copy.deepcopy(layer).double()
    with peftkern.use_backend("torch"), torch.no_grad():
        right = exact(x.double(), adapter_names=NAMES)
        wide = layer.base_layer(x) + layer._update("wide", x)
    assert_as_good_as_torch(fast[same], slow[same], right[same], average=True)
    assert_as_good_as_torch(slow[~same], wide[~same], right[~same], average=True)


def test_autocast():
    layer, x = layer_of(), torch.randn(5, 2, 12)
    with torch.no_grad(), peftkern.use_backend("torch"):
        exact = copy.deepcopy(layer).double()(x.double(), adapter_names=NAMES)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with peftkern.use_backend("triton"):
            ours = layer(x, adapter_names=NAMES)
        with peftkern.use_backend("torch"):
            want = layer(x, adapter_names=NAMES)
    assert ours.dtype == want.dtype == torch.bfloat16
    assert_as_good_as_torch(ours, want, exact, average=True)
