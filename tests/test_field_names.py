"""Unusual names and classes in users' code: of adapters, of modules, and of custom layers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.utils.warning import PeftWarning
from tests import models
from tests.closeness import assert_same_number
from tests.tiny import assert_same, fill, inputs, make, snapshot

# HF PEFT asks for it in every model
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

# -------------------------------------------------------------------- adapters' names

BATCH = {k: v for k, v in inputs("llama", "SEQ_CLS").items() if k != "labels"}
HARMLESS = ["a", "r", "_", "ora_", "A", "lora_A", "my_lora", "weight", "bias", "q_proj", "score"]


def _lora(**settings: Any) -> peftkern.LoraConfig:
    return peftkern.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})


def _classifier(name: str) -> Any:
    settings = {"task_type": "SEQ_CLS", "trainable_token_indices": [4, 9]}
    base = make("llama", "SEQ_CLS", torch.float64)
    model = peftkern.get_peft_model(base, _lora(**settings), adapter_name=name)
    model.add_adapter("other", _lora(**settings))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in ("lora_", "score.modules_to_save", "tokens_delta")):
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", HARMLESS)
def test_a_name_that_says_something_elsewhere_is_a_name_as_any_other(
    name: str, tmp_path: Any
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = _classifier(name)
    model.save_pretrained(tmp_path, selected_adapters=[name])
    base = make("llama", "SEQ_CLS", torch.float64)
    again = peftkern.PeftModel.from_pretrained(base, tmp_path / name, adapter_name=name)
    assert_same_number(again(**BATCH).logits, model(**BATCH).logits)


@pytest.mark.parametrize("name", ["lora", "lora_"])
def test_a_name_that_begins_the_names_of_parameters_warns(name: str) -> None:
    with pytest.warns(UserWarning, match=f"'{name}' should not be contained in the prefix 'lora_'"):
        model = peftkern.get_peft_model(make("llama"), _lora(), adapter_name=name)
    with pytest.warns(UserWarning, match="'lor' should not be contained"):
        model.add_adapter("lor", _lora())


@pytest.mark.parametrize("name", ["train", "keys", "type", "copy", "persistent", "forward"])
def test_a_name_of_torch_itself_is_refused(name: str) -> None:
    base = make("llama")
    before = snapshot(base)
    with pytest.raises(ValueError, match=f"`adapter_name` must not be .* got '{name}'"):
        peftkern.get_peft_model(base, _lora(), adapter_name=name)
    assert_same(base, before)
    model = peftkern.get_peft_model(base, _lora())
    with pytest.raises(ValueError, match="`adapter_name` must not be"):
        model.add_adapter(name, _lora())


# -------------------------------------------------------------------- layers of the user's classes


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _DoubledEmbedding(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _DoubledConv(nn.Conv1d):
    def _conv_forward(self, x: Tensor, *rest: Any) -> Tensor:
        return 2 * super()._conv_forward(x, *rest)


class _Named(nn.Linear):
    """A class of its own that computes as its parent."""


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = _DoubledEmbedding(9, 4)
        self.linear = _Doubled(4, 4)
        self.named = _Named(4, 4)
        self.conv = _DoubledConv(4, 2, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.conv(self.named(self.linear(self.embedding(ids))).transpose(1, 2))


@pytest.mark.parametrize(
    ("name", "cls"),
    [("linear", "_Doubled"), ("embedding", "_DoubledEmbedding"), ("conv", "_DoubledConv")],
)
def test_merging_into_a_layer_with_a_forward_of_its_own_warns(name: str, cls: str) -> None:
    model = peftkern.get_peft_model(_Net(), _lora(target_modules=[name]))
    fill(model)
    said = f"Merging into a {cls}, which has another forward than"
    with pytest.warns(PeftWarning, match=said):
        model.merge_adapter()
    model.unmerge_adapter()
    with pytest.warns(PeftWarning, match=said):
        model.merge_and_unload()


def test_a_start_that_changes_such_a_weight_warns() -> None:
    config = _lora(target_modules=["linear"], init_lora_weights="pissa")
    with pytest.warns(PeftWarning, match="'pissa' takes .* out of the weight of a _Doubled"):
        peftkern.get_peft_model(_Net(), config)


def test_a_subclass_that_computes_as_its_parent_is_merged_without_a_word() -> None:
    ids = torch.arange(8).view(2, 4)
    model = peftkern.get_peft_model(_Net().double(), _lora(target_modules=["named"]))
    fill(model)
    expected = model(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_number(model.merge_and_unload()(ids), expected)


def test_an_embedding_that_scales_its_output_is_merged_without_a_word() -> None:
    ids = torch.arange(3, 11).view(2, 4)
    base = make("gemma", "CAUSAL_LM", torch.float64)
    base.config.tie_word_embeddings = False
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    model = peftkern.get_peft_model(base, _lora(target_modules=["embed_tokens"]))
    fill(model)
    expected = model.get_input_embeddings()(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_number(model.merge_and_unload().get_input_embeddings()(ids), expected)


# -------------------------------------------------------------------- modules trained in full


class _Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.dropout, self.sublayer, self.pre_out = (
            nn.Dropout(0.0),
            nn.Linear(4, 4),
            nn.Linear(4, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.sublayer(self.dropout(self.layer(self.lin(x))))
        return self.out(self.pre_out(x))


def _in_full(model: nn.Module, adapter: str) -> list[str]:
    found = (name for name, _ in model.named_parameters() if f"modules_to_save.{adapter}." in name)
    return sorted({name.split(".modules_to_save")[0].split("model.")[-1] for name in found})


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["out"], ["out", "pre_out"]),  # whole words, so that DistilBERT's pre_classifier is found
        (["layer"], ["layer"]),
        ("out", ["out", "pre_out"]),
        ("layer", ["layer"]),
        (("layer", "pre_out"), ["layer", "pre_out"]),
        (["ut"], []),
        (["o.t"], []),
        (["nope"], []),
    ],
)
def test_whole_names_outside_of_adapter_layers_are_trained_in_full(
    names: Any, expected: list[str], tmp_path: Any
) -> None:
    def config() -> peftkern.LoraConfig:
        return _lora(target_modules=["lin"], modules_to_save=names, lora_dropout=0.1)

    model = peftkern.get_peft_model(_Parts().double(), config()).eval()
    model.add_adapter("second", config())
    model.set_adapter("second")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "second" in name:
                parameter.normal_()
    assert _in_full(model, "default") == _in_full(model, "second") == expected
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save.second" in name for name in trains)
    model.save_pretrained(tmp_path)
    again = peftkern.PeftModel.from_pretrained(_Parts().double(), tmp_path / "second")
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_same_number(again(x), model(x))


@pytest.mark.parametrize("names", [["base_layer"], ["lin.base_layer"], ["lora_A"], ["default"]])
def test_names_that_are_only_inside_of_adapter_layers_are_refused(names: list[str]) -> None:
    base = _Parts()
    before = snapshot(base)
    config = _lora(target_modules=["lin"], modules_to_save=names)
    with pytest.raises(ValueError, match="is a child of"):
        peftkern.get_peft_model(base, config)
    assert_same(base, before)
    model = peftkern.get_peft_model(base, _lora(target_modules=["lin"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match="is a child of"):
        model.add_adapter("second", config)
    assert_same(model, before)


def test_a_head_is_trained_in_full_and_not_adapted_as_well() -> None:
    base = models.build("distilbert")
    config = _lora(task_type="SEQ_CLS", target_modules="all-linear")
    model = peftkern.get_peft_model(base, config)  # HF PEFT stops here
    assert _in_full(model, "default") == ["classifier", "pre_classifier"]
    assert not hasattr(model.base_model.model.pre_classifier.original_module, "lora_A")


def test_a_part_of_an_adapted_layer_is_not_trained_in_full() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    base = Net()
    before = snapshot(base)
    config = _lora(target_modules=["attention"], modules_to_save=["out_proj"])
    with pytest.raises(TypeError, match="`attention.out_proj`: it is a part of a layer that gets"):
        peftkern.get_peft_model(base, config)
    assert_same(base, before)


# -------------------------------------------------------------------- types in configurations


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rank_pattern", {"q_proj": "8"}, r"`rank_pattern\['q_proj'\]` .* is '8' \(str\)"),
        ("rank_pattern", {"q_proj": 2.0}, r"`rank_pattern\['q_proj'\]` .* is 2.0"),
        ("rank_pattern", ["q_proj"], r"`rank_pattern` must be a dict .* \(a list of str\)"),
        ("rank_pattern", {3: 8}, "`rank_pattern` must be a dict"),
        ("alpha_pattern", {"q_proj": "8"}, r"`alpha_pattern\['q_proj'\]` .* is '8' \(str\)"),
        ("alpha_pattern", [8], "`alpha_pattern` must be a dict"),
        ("r", "8", r"`r` should be a positive integer value but .* '8' \(str\)"),
        ("lora_alpha", "8", r"`lora_alpha` should be a number but .* '8' \(str\)"),
        ("lora_dropout", "0.1", r"`lora_dropout` should be in \[0, 1\) but .* '0.1' \(str\)"),
        ("target_modules", 3, r"`target_modules` must be a list of names.* got 3 \(int\)"),
        ("target_modules", [3], r"`target_modules` must be .* \(a list of int\)"),
        ("target_modules", ["q_proj", None], "`target_modules` must be"),
        ("target_modules", b"q_proj", r"`target_modules` must be .* \(bytes\)"),
        ("target_modules", [""], "`target_modules` must be"),
        ("exclude_modules", [3], "`exclude_modules` must be"),
        ("layers_pattern", [3], "`layers_pattern` must be"),
        ("layers_pattern", 5, "`layers_pattern` must be"),
        ("target_parameters", [3], "`target_parameters` must be a list of names"),
        ("modules_to_save", 5, r"`modules_to_save` must be a list of names, or a str: one name"),
        ("modules_to_save", [5], "`modules_to_save` must be"),
        ("modules_to_save", [""], "`modules_to_save` must be"),
        ("layers_to_transform", "1", "`layers_to_transform` must be an integer or a list"),
        ("layers_to_transform", ["1"], r"`layers_to_transform` must be .* \(a list of str\)"),
        ("layers_to_transform", [1.0], "`layers_to_transform` must be"),
        ("layers_to_transform", True, "`layers_to_transform` must be"),
        ("trainable_token_indices", "12", "`trainable_token_indices` must be a list of integers"),
        ("trainable_token_indices", 3, "`trainable_token_indices` must be"),
        ("trainable_token_indices", [1.5], "`trainable_token_indices` must be"),
        ("trainable_token_indices", [True], "`trainable_token_indices` must be"),
        ("trainable_token_indices", [[1]], "`trainable_token_indices` must be"),
        ("trainable_token_indices", {"wte": "3"}, r"`trainable_token_indices\['wte'\]` must be"),
        ("trainable_token_indices", {3: [3]}, "`trainable_token_indices` must be"),
        ("use_dora", "no", r"`use_dora` must be True or False, got 'no' \(str\)"),
        ("fan_in_fan_out", "yes", "`fan_in_fan_out` must be"),
    ],
)
def test_a_wrong_type_is_named(field: str, value: Any, said: str) -> None:
    more = {"layers_to_transform": [1]} if field == "layers_pattern" else {}
    with pytest.raises(ValueError, match=said):
        _lora(**{field: value, **more})


@pytest.mark.parametrize("cls", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_prompts_take_one_name_as_one_name(cls: str) -> None:
    make_config = getattr(peftkern, cls)
    config = make_config(num_virtual_tokens=3, modules_to_save="lm_head", task_type="CAUSAL_LM")
    assert config.modules_to_save == ["lm_head"]
    model = peftkern.get_peft_model(make("llama"), config)
    assert _in_full(model, "default") == ["lm_head"]
    with pytest.raises(ValueError, match="`modules_to_save` must be"):
        make_config(num_virtual_tokens=3, modules_to_save=[4])


def test_what_stands_for_a_list_is_taken() -> None:
    config = _lora(
        target_modules=("q_proj", "v_proj"),
        exclude_modules={"lm_head"},
        layers_to_transform=range(1, 2),
        trainable_token_indices={9, 4},
        modules_to_save={"lm_head": None},
    )
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.layers_to_transform == [1]
    assert config.trainable_token_indices == [4, 9]
    assert config.modules_to_save == ["lm_head"]
    model = peftkern.get_peft_model(make("llama"), config)
    assert {n.split(".")[4] for n, _ in model.named_parameters() if "lora_A" in n} == {"1"}


# -------------------------------------------------------------------- the indices of layers


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.ModuleDict({"w": nn.Linear(4, 4)}) for _ in range(3)])


class _Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Block() for _ in range(3)])


class _Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = _Mixture()


def _places(model: nn.Module, **settings: Any) -> set[str]:
    found = peftkern.get_peft_model(model, _lora(**settings)).named_parameters()
    return {
        n.removeprefix("base_model.model.").split(".lora_")[0] for n, _ in found if "lora_A" in n
    }


@pytest.mark.parametrize("indices", [1, [0, 2], [1]])
@pytest.mark.parametrize(
    ("root", "make_model"),
    [("layers.", _Mixture), ("model.layers.", _Headed), ("", lambda: _Mixture().layers)],
)
def test_layers_are_counted_and_never_their_experts(
    root: str, make_model: Any, indices: Any
) -> None:
    model = make_model()
    if isinstance(model, nn.ModuleList):
        model = nn.Sequential(*model)
    found = _places(model, target_modules=["q", "w"], layers_to_transform=indices)
    wanted = [indices] if isinstance(indices, int) else indices
    inner = ["q", *(f"experts.{e}.w" for e in range(3))]
    assert found == {f"{root}{i}.{name}" for i in wanted for name in inner}


@pytest.mark.parametrize(
    ("family", "names"),
    [("llama", ["q_proj", "up_proj"]), ("gpt2", ["c_attn"]), ("bert", ["query"])],
)
def test_a_bare_model_has_layers_too(family: str, names: list[str]) -> None:
    how = {"target_modules": names, "layers_to_transform": [1], "fan_in_fan_out": family == "gpt2"}
    bare = _places(make(family, None), **how)
    headed = "TOKEN_CLS" if family == "bert" else "CAUSAL_LM"
    found = _places(make(family, headed), **how)
    assert bare and {n.split(".", 1)[1] for n in found} == bare


@pytest.mark.parametrize(
    ("family", "task"), [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")]
)
def test_where_layers_are_not_at_the_root_they_are_those_of_hf_peft(family: str, task: str) -> None:
    import peft

    targets = {"llama": ["q_proj"], "gpt2": ["c_attn", "c_fc"], "t5": ["q", "wo"]}[family]
    for layers in ([1], 0):
        how = {"layers_to_transform": layers, "fan_in_fan_out": family == "gpt2"}
        config = peft.LoraConfig(target_modules=targets, **how)
        theirs = peft.get_peft_model(make(family, task), config).targeted_module_names
        assert _places(make(family, task), target_modules=targets, **how) == set(theirs)
