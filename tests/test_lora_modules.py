"""LoRA on convolutions, attention modules and custom layer classes, compared with HF PEFT."""

from __future__ import annotations

import copy
import threading
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

import peftkern
from peftkern.tuners import lora
from tests.closeness import assert_as_good_as_torch, assert_same_number, differ

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")
    for said in (
        "`lora_bias=True` was passed but the targeted layer of type",
        "Adapter 'default'. . LoRA tensor.s. have invalid shape",  # HF PEFT's, about lora_bias
        "Careful, disabling adapter layers with bias",
        "LoRA adapter added to ConvNd layer with groups > 1",
        "All adapters are already merged",  # an attention merges its out_proj itself
        "Already following adapters were merged default",  # HF PEFT's attention, in a call
        "Unsupported layer type '<class '(torch.nn.modules.rnn.LSTM|tests.test_lora_modules.Mine)'",
        "The PyTorch API of nested tensors",
    )
]
LIBS = (peftkern, peft)


class Convs(nn.Module):
    def __init__(self, kind=nn.Conv2d, sizes=(7, 6), **settings) -> None:
        super().__init__()
        self.conv = kind(4, 6, **{"kernel_size": 3, **settings})
        self.second = kind(6, 5, 1)
        self.sizes = (2, 4, *sizes)

    def forward(self, x):
        return self.second(torch.relu(self.conv(x)))


class Attention(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.mha = nn.MultiheadAttention(8, 2, **settings)
        self.sizes = (2, 5, 8)

    def forward(self, x):
        x = self.first(x)
        return self.head(self.mha(x, x, x, need_weights=False)[0])


CASES = {
    "conv1d": (lambda: Convs(nn.Conv1d, (9,)), ["conv", "second"], {}),
    "conv2d": (Convs, ["conv", "second"], {"lora_dropout": 0.3}),
    "conv3d": (lambda: Convs(nn.Conv3d, (5, 4, 6)), ["conv"], {"use_rslora": True}),
    "stride_padding": (lambda: Convs(stride=2, padding=(1, 2), kernel_size=(3, 5)), ["conv"], {}),
    "same": (lambda: Convs(padding="same", dilation=2), ["conv"], {}),
    "reflect": (lambda: Convs(padding=1, padding_mode="reflect"), ["conv"], {}),
    "groups": (lambda: Convs(groups=2), ["conv"], {"r": 4}),
    "no_bias": (lambda: Convs(bias=False), ["conv"], {"lora_bias": True}),
    "conv_bias": (Convs, ["conv", "second"], {"lora_bias": True}),
    "conv_dora": (Convs, ["conv", "second"], {"use_dora": True}),
    "conv_trained_bias": (Convs, ["conv"], {"bias": "lora_only"}),
    "mha": (Attention, ["mha", "first"], {}),
    "mha_batch_first": (lambda: Attention(batch_first=True), ["mha"], {"use_rslora": True}),
    "mha_no_bias": (lambda: Attention(bias=False), ["mha"], {}),
    "mha_bias": (Attention, ["mha"], {"lora_bias": True}),
    "mha_extras": (lambda: Attention(add_bias_kv=True, add_zero_attn=True), ["mha"], {}),
    "mha_trained_bias": (Attention, ["mha"], {"bias": "all"}),
}
MERGES = [n for n in CASES if n not in ("same", "reflect", "groups", "no_bias")]


def build(name, dtype=torch.float64, **more):
    make, targets, settings = CASES[name]
    torch.manual_seed(0)
    base = make().to(dtype)
    settings = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, **settings, **more}
    out = []
    for lib in LIBS:
        torch.manual_seed(1)
        config = lib.LoraConfig(target_modules=targets, **settings)
        out.append(lib.get_peft_model(copy.deepcopy(base), config))
    return base, torch.randn(base.sizes, dtype=dtype), *out


def step(model, x):
    """The output in training and in evaluation mode, and the gradients of all that trains."""
    torch.manual_seed(2)
    y = model.train()(x.clone().requires_grad_())
    y.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        return {"y": y.detach(), "evaluated": model.eval()(x), **grads}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_peft_s(name, dtype):
    base, x, ours, theirs = build(name, dtype)
    exact = copy.deepcopy(theirs).double()
    mine, other = step(ours, x), step(theirs, x)
    assert {k: v is None for k, v in mine.items()} == {k: v is None for k, v in other.items()}
    mine, other = ({k: v for k, v in f.items() if v is not None} for f in (mine, other))
    assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in other.items()}
    assert mine["y"].dtype == dtype and len(mine) > 2
    if dtype == torch.float64:
        assert_same_number(mine, other)
    else:
        right = step(exact, x.double())
        assert_as_good_as_torch(mine, other, {k: right[k] for k in mine})
    with torch.no_grad():
        assert (ours(x) - base(x)).abs().max() > 1e-2
        with ours.disable_adapter():
            if "trained" not in name:
                assert torch.equal(ours(x), base.eval()(x))


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_checkpoints_in_both_directions(name, low, tmp_path):
    base, x, *models = build(name)
    for lib, other, model in zip(LIBS, LIBS[::-1], models, strict=True):
        model.eval().save_pretrained(tmp_path / lib.__name__)
        loaded = other.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path / lib.__name__, low_cpu_mem_usage=low
        )
        assert_same_number(loaded.eval()(x), model(x))
        assert all(not p.is_meta for p in loaded.parameters())


@pytest.mark.parametrize("name", MERGES)
def test_merging_is_peft_s(name):
    base, x, ours, theirs = build(name)
    ours.eval(), theirs.eval()
    state = {k: v.clone() for k, v in ours.state_dict().items()}
    with torch.no_grad():
        y = ours(x)
        ours.merge_adapter()
        assert_same_number(ours(x), y)
        ours.unmerge_adapter()
        for key, value in ours.state_dict().items():
            assert torch.equal(value, state[key]), key
        plain, plain_ = ours.merge_and_unload(safe_merge=True), theirs.merge_and_unload()
        assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
        assert_same_number(plain(x), plain_(x))
    assert_same_number(plain.state_dict(), plain_.state_dict())


def test_a_grouped_convolution_cannot_be_merged():
    _, _, ours, theirs = build("groups")
    for model in (ours, theirs):
        with pytest.raises(NotImplementedError, match="groups > 1"):
            model.merge_adapter()
    layer = ours.base_model.model.conv
    assert "2 groups, so it cannot be merged" in str(peftkern.explain(ours))
    assert not layer.merged
    with pytest.warns(UserWarning, match="groups > 1. Merging is not supported"):
        peftkern.get_peft_model(Convs(groups=2), peftkern.LoraConfig(r=2, target_modules=["conv"]))


def test_dilated_convolutions_which_peft_cannot_run():
    """PEFT's A has no dilation, so its shapes differ; merged, its kernel is what runs here."""
    torch.manual_seed(0)
    base = Convs(dilation=2).double()
    models = []
    for lib in LIBS:
        torch.manual_seed(1)
        config = lib.LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False)
        models.append(lib.get_peft_model(copy.deepcopy(base), config))
    x = torch.randn(base.sizes, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        models[1](x)
    assert_same_number(models[0](x), models[1].merge_and_unload()(x))


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"padding": "same", "dilation": 2}, "not dilated"),
        ({"padding": 1, "padding_mode": "reflect"}, "pads with zeros"),
        ({"padding_mode": "reflect"}, None),
    ],
)
def test_a_merge_that_changes_outputs_says_so(settings, says):
    config = peftkern.LoraConfig(target_modules=["0"], init_lora_weights=False)
    base = nn.Sequential(nn.Conv1d(4, 4, 3, **settings)).double()
    model = peftkern.get_peft_model(base, config)
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    y = model(x)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.merge_adapter()
    assert differ(model(x), y) is (says is not None)
    assert [w for w in said if "changes the outputs" in str(w.message)] == said
    assert len(said) == (says is not None) and all(says in str(w.message) for w in said)


@pytest.mark.parametrize("name", ["conv2d", "conv1d"])
def test_rows_of_a_batch_with_their_adapters(name):
    base, x, ours, theirs = build(name, lora_dropout=0.0)
    for model, lib in zip((ours, theirs), LIBS, strict=True):
        torch.manual_seed(5)
        model.add_adapter(
            "b",
            lib.LoraConfig(r=3, target_modules=CASES[name][1], init_lora_weights=False),
        )
        model.eval()
    x = torch.cat([x, x])
    names = ["b", "__base__", "default", "b"]
    y = ours(x, adapter_names=names)
    assert_same_number(y, theirs(x, adapter_names=names))
    assert_same_number(y[1], base(x)[1])
    assert (y[0] - y[2]).abs().max() > 1e-2


def test_an_attention_refuses_what_peft_s_refuses():
    base, x, *models = build("mha")
    for lib, model in zip(LIBS, models, strict=True):
        for settings, says in (({"use_dora": True}, "does not support DoRA"),):
            with pytest.raises(ValueError, match=says):
                lib.get_peft_model(Attention(), lib.LoraConfig(target_modules=["mha"], **settings))
        with pytest.raises(ValueError, match="Only same embed for query/key/value"):
            lib.get_peft_model(Attention(kdim=4, vdim=6), lib.LoraConfig(target_modules=["mha"]))
        layer = model.base_model.model.mha
        layer.base_layer.out_proj._active_adapter = ["other"]
        with pytest.raises(ValueError, match="out_proj layer of MultiheadAttention has merged"):
            model(x)
        # last: PEFT's model keeps the names after the error
        with pytest.raises(TypeError, match="does not support mixed adapter batches"):
            model.eval()(x, adapter_names=["default"] * len(x))


def test_an_attention_shows_what_models_read_and_is_never_changed_by_a_call():
    base, x, ours, _ = build("mha")
    layer, inner = ours.base_model.model.mha, base.mha
    names = "embed_dim kdim vdim num_heads head_dim dropout batch_first add_zero_attn bias_k bias_v"
    for name in [*names.split(), "_qkv_same_embed_dim"]:
        assert getattr(layer, name) == getattr(inner, name)
    assert torch.equal(layer.in_proj_weight, inner.in_proj_weight)
    assert type(layer.out_proj) is type(inner.out_proj)
    before = {n: (p, p._version) for n, p in ours.named_parameters()}
    ours(x).sum().backward()
    after = {n: (p, p._version) for n, p in ours.named_parameters()}
    assert list(before) == list(after)
    assert all(p is after[n][0] and v == after[n][1] for n, (p, v) in before.items())
    rows = {row.name: row for row in peftkern.explain(ours)}
    assert (
        not rows["base_model.model.mha"].fused
        and "adds the update" in rows["base_model.model.mha"].reason
    )
    assert "reads its weights" in rows["base_model.model.mha.base_layer.out_proj"].reason
    assert rows["base_model.model.first"].fused


def test_threads_share_an_attention():
    _, x, ours, _ = build("mha")
    ours.eval()
    with torch.no_grad():
        expected = ours(x)
    wrong = []

    def run():
        with torch.no_grad():
            wrong.extend(i for i in range(20) if not torch.equal(ours(x), expected))

    threads = [threading.Thread(target=run) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong


@pytest.mark.parametrize("padded", [False, True])
def test_torch_s_fused_encoder_layer_does_not_pass_over_the_adapter(padded):
    """It takes the attention's weights and skips its forward; PEFT's adapter has no effect then."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2).double()
    config = peftkern.LoraConfig(target_modules=["self_attn"], init_lora_weights=False)
    model = peftkern.get_peft_model(copy.deepcopy(base), config)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = padded
    given = {"src_key_padding_mask": mask} if padded else {}
    trained = model.train()(x, **given)
    model.eval()
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            y = model(x, **given)
        assert_same_number(y[~mask], trained[~mask])
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(x, **given), base.eval()(x, **given))
    with torch.no_grad():
        merged = model.merge_and_unload()(x, **given)
    assert_same_number(merged[~mask], trained[~mask])


def test_a_failed_injection_leaves_the_attention(monkeypatch):
    base = Attention()
    before = {n: type(m) for n, m in base.named_modules()}
    config = peftkern.LoraConfig(target_modules=["mha", "first"])
    monkeypatch.setattr("peftkern.tuners.lora.model.form_groups", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        peftkern.get_peft_model(base, config)
    assert {n: type(m) for n, m in base.named_modules()} == before


@pytest.mark.parametrize("name", ["conv2d", "mha"])
def test_two_adapters_switch_and_leave(name):
    base, x, ours, theirs = build(name, lora_dropout=0.0)
    outputs = []
    for lib, model in zip(LIBS, (ours, theirs), strict=True):
        torch.manual_seed(5)
        model.add_adapter(
            "b", lib.LoraConfig(r=3, target_modules=CASES[name][1], init_lora_weights=False)
        )
        model.set_adapter("b")
        trained = sorted(n for n, p in model.named_parameters() if p.requires_grad)
        both = [model(x)]
        model.base_model.set_adapter(["default", "b"])
        both.append(model(x))
        model.delete_adapter("default")
        outputs.append((trained, *both, model(x), type(model.unload())))
    assert_same_number(*outputs)


def test_the_message_about_a_layer_that_cannot_be_adapted_is_peft_s():
    texts = []
    for lib in LIBS:
        base = nn.Sequential(nn.Linear(3, 4), nn.LSTM(3, 4))
        with pytest.raises(ValueError) as error:
            lib.get_peft_model(base, lib.LoraConfig(target_modules=["0", "1"]))
        texts.append(str(error.value))
        if lib is peftkern:
            assert type(base[0]) is nn.Linear
    assert texts[0] == texts[1]


def test_a_vision_model_with_batch_norms_that_are_saved(tmp_path):
    """The buffers of norms trained in full travel with the adapter, in both directions."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    base = transformers.ResNetForImageClassification(config).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for lib, other in zip(LIBS, LIBS[::-1], strict=True):
        settings = lib.LoraConfig(
            r=2, target_modules=["convolution"], modules_to_save=["classifier", "normalization"]
        )
        model = lib.get_peft_model(copy.deepcopy(base), settings).train()
        for _ in range(2):
            model(pixel_values=x, labels=torch.tensor([0, 1])).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        model.eval().save_pretrained(tmp_path / lib.__name__)
        loaded = other.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / lib.__name__)
        with torch.no_grad():
            expected = model(x).logits
            assert_same_number(loaded.eval()(x).logits, expected)
            assert (base.eval()(x).logits - expected).abs().max() > 1e-2


# ---------------------------------------------------------------- classes of one's own


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 6
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


class MyLora(lora.Linear):
    pass


def test_a_registered_class_is_made_used_trained_and_loaded(tmp_path):
    base = nn.Sequential(nn.Linear(8, 8), Mine(), nn.Linear(6, 2)).double()
    x = torch.randn(3, 8, dtype=torch.float64)

    def config(**settings):
        found = peftkern.LoraConfig(target_modules=["0", "1"], init_lora_weights=False, **settings)
        found._register_custom_module({Mine: MyLora})
        return found

    with pytest.warns(UserWarning, match="Unsupported layer type .*Mine'>' encountered"):
        model = peftkern.get_peft_model(copy.deepcopy(base), config())
    layer = model.base_model.model[1]
    assert type(layer) is MyLora and type(layer.base_layer) is Mine
    assert type(model.base_model.model[0]) is lora.Linear
    y = model(x)
    y.sum().backward()
    assert layer.lora_A["default"].weight.grad is not None and layer.base_layer.weight.grad is None
    assert differ(y, base(x))
    model.add_adapter("b", config())
    model.set_adapter("b")
    assert not layer.lora_A["default"].weight.requires_grad
    model.set_adapter("default")
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    with pytest.raises(ValueError, match="Target module Mine"):
        peftkern.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    loaded = peftkern.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=config())
    assert_same_number(loaded(x), y)


def test_a_class_with_an_update_of_its_own_is_called_as_peft_calls_it():
    seen = []

    class Own(nn.Module, lora.LoraLayer):
        def __init__(self, base_layer, adapter_name, **kwargs) -> None:
            super().__init__()
            lora.LoraLayer.__init__(self, base_layer, **kwargs)
            self._active_adapter = adapter_name
            seen.append((adapter_name, kwargs["r"], kwargs["lora_alpha"], kwargs["target_name"]))

        def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs):
            seen.append((adapter_name, r, lora_alpha, kwargs["target_name"]))

    def config():
        found = peftkern.LoraConfig(r=3, lora_alpha=5, target_modules=["0"])
        found._register_custom_module({nn.LSTM: Own})
        return found

    model = peftkern.get_peft_model(nn.Sequential(nn.LSTM(3, 4)), config())
    model.add_adapter("b", config())
    assert seen == [("default", 3, 5, "0"), ("b", 3, 5, "0")]
    assert type(model.base_model.model[0]) is Own


class OwnMerge(nn.Module, lora.LoraLayer):
    """A layer with a forward and a merge of its own, as users write them."""

    def __init__(self, base_layer, adapter_name, config, r, **kwargs) -> None:
        super().__init__()
        lora.LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r)

    def update_layer(self, adapter_name, r, **kwargs):
        self.r[adapter_name], self.scaling[adapter_name] = r, 1.0
        self.lora_A[adapter_name] = nn.Linear(3, r)
        self.lora_B[adapter_name] = nn.Linear(r, 4)

    def forward(self, x):
        return self.base_layer(x)[0]

    def merge(self, safe_merge=False, adapter_names=None):
        self.merged_adapters.append("default")

    def unmerge(self):
        self.merged_adapters.clear()


def test_a_class_that_merges_in_its_own_way_is_explained_merged_and_rolled_back():
    config = peftkern.LoraConfig(target_modules=["0", "1"])
    config._register_custom_module({nn.LSTM: OwnMerge})
    model = peftkern.get_peft_model(nn.Sequential(nn.LSTM(3, 4), nn.Linear(4, 2)), config)
    own, linear = model.base_model.model
    row = peftkern.explain(model)[0]
    assert not row.fused and "OwnMerge has a forward of its own" in row.reason
    weight = linear.lora_B["default"].weight
    weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert not own.merged and not linear.merged
    weight.data.zero_()
    merged = model.merge_and_unload()
    assert type(merged[0]) is nn.LSTM and type(merged[1]) is nn.Linear


def test_layers_may_be_made_by_hand():
    torch.manual_seed(0)
    config = peftkern.LoraConfig(init_lora_weights=False)
    for cls, base, x in (
        (lora.Linear, nn.Linear(4, 5), torch.randn(2, 4).double()),
        (lora.Conv2d, nn.Conv2d(4, 5, 3), torch.randn(2, 4, 6, 6).double()),
        (lora.Embedding, nn.Embedding(4, 5), torch.tensor([1, 2])),
    ):
        layer = cls(base.double(), "a", config=config, r=2, lora_alpha=4)
        assert layer.active_adapters == ["a"] and layer.scaling == {"a": 2.0}
        assert differ(layer(x), base(x))
    with pytest.raises(ValueError, match="kernel must have 4 dimensions, not 3"):
        lora.Conv2d(nn.Conv1d(4, 5, 3), "a", config=config, r=2)
