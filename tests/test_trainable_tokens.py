"""Single tokens trained with LoRA (``trainable_token_indices``), compared with HF PEFT."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern.tuners.trainable_tokens import TrainableTokensLayer, TrainableTokensWrapper
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.models import VOCAB, WIDTH
from tests.tiny import assert_same, gradients, inputs, make, pair, snapshot

TOKENS = [5, 9, 3, 40]
# family, settings, dtype; llama's head is its own, gemma's is the embedding (which it scales)
CASES = {
    "untied_list": ("llama", {"trainable_token_indices": TOKENS}, torch.float64),
    "untied_both": (
        "llama",
        {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [7, 8]}},
        torch.float64,
    ),
    "tied_scaled": ("gemma", {"trainable_token_indices": TOKENS}, torch.float64),
    "tied_wte": ("gpt2", {"trainable_token_indices": {"wte": TOKENS}}, torch.float64),
    "tied_apart": (
        "gemma",
        {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [7]}},
        torch.float64,
    ),
    "tied_both": (
        "gemma",
        {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
        torch.float64,
    ),
    "tied_seq2seq": ("t5", {"trainable_token_indices": {"shared": TOKENS}}, torch.float64),
    "padding_token": ("llama", {"trainable_token_indices": [0, 5]}, torch.float64),
    "fp32": ("gemma", {"trainable_token_indices": TOKENS}, torch.float32),
    "bf16": ("llama", {"trainable_token_indices": TOKENS}, torch.bfloat16),
}
TASK = {"t5": "SEQ_2_SEQ_LM"}


def two(case: str, **more: Any) -> tuple[Any, Any]:
    family, settings, dtype = CASES[case]
    models = pair(family, TASK.get(family, "CAUSAL_LM"), dtype, **settings, **more)
    for model in models:
        train(model)
    return models


def train(model: nn.Module, seed: int = 3) -> None:
    """Other values in the trained rows, the same in both libraries."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, rows in sorted(model.named_parameters(), key=lambda item: item[0]):
            if "trainable_tokens_delta" in name:
                rows.copy_(torch.randn(rows.shape, generator=g))


def batch_of(family: str) -> dict[str, Tensor]:
    batch = inputs(family, TASK.get(family, "CAUSAL_LM"))
    batch["input_ids"][:, :5] = torch.tensor([*TOKENS, 7])
    return batch


def logits(model: Any, family: str = "llama", **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch_of(family), **more).logits


def numbers(model: Any, family: str) -> dict[str, Tensor]:
    """The loss, all gradients, and the logits without the adapter."""
    loss, grads = gradients(model, batch_of(family))
    with model.disable_adapter():
        return {"loss": loss, "disabled": logits(model, family), **grads}


def assert_as_good(dtype: torch.dtype, ours: Any, theirs: Any, exact: Callable[[], Any]) -> None:
    if dtype is torch.float64:
        assert_same_number(ours, theirs)
    else:
        found = (ours, theirs, exact())
        assert_as_good_as_torch(*(f if isinstance(f, dict) else {"logits": f} for f in found))


@pytest.mark.parametrize("case", CASES)
def test_numbers_gradients_and_files_are_hf_pefts(case, tmp_path) -> None:
    family, _, dtype = CASES[case]
    ours, theirs = two(case)
    names = {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == names
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    found = [numbers(ours, family), numbers(theirs, family)]
    exact = copy.deepcopy(theirs).double()
    assert_as_good(dtype, *found, lambda: numbers(exact, family))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / w / "adapter_model.safetensors") for w in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    base = make(family, TASK.get(family, "CAUSAL_LM"), dtype)
    there = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    here = peftkern.PeftModel.from_pretrained(base, tmp_path / "theirs")
    want = logits(theirs, family)
    for model in (here, there):
        assert_as_good(dtype, logits(model, family), want, lambda: logits(exact, family))


@pytest.mark.parametrize("case", ["untied_list", "tied_scaled", "tied_seq2seq", "bf16"])
def test_merging_brings_back_the_very_bits(case) -> None:
    family = CASES[case][0]
    ours, theirs = two(case)
    exact = copy.deepcopy(theirs).double()
    before = {k: v.clone() for k, v in ours.state_dict().items()}

    def assert_as_before(model: Any, other: Any) -> None:
        found = (logits(m, family) for m in (model, other))
        assert_as_good(CASES[case][2], *found, lambda: logits(exact, family))

    assert_as_before(ours, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said of tied weights: the rows are the same
        ours.merge_adapter()
    theirs.merge_adapter()
    assert_as_before(ours, theirs)
    ours.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
    merged = ours.merge_and_unload()
    assert_as_before(merged, theirs)
    assert not any(isinstance(m, TrainableTokensWrapper) for m in merged.modules())
    heads = (merged.get_input_embeddings(), merged.get_output_embeddings())
    tied = merged.config.tie_word_embeddings
    assert (heads[0].weight is heads[1].weight) is bool(tied)


def test_several_adapters(tmp_path) -> None:
    ours, theirs = two("tied_scaled")
    lora = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
    ours.add_adapter("other", peftkern.LoraConfig(trainable_token_indices=[9, 11], **lora))
    theirs.add_adapter("other", peft.LoraConfig(trainable_token_indices=[9, 11], **lora))
    ours.add_adapter("plain", peftkern.LoraConfig(**lora))
    for model in (ours, theirs):
        train(model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name and ".other" in name:
                    p.fill_(0.1)
    each = {}
    for name in ("default", "other"):
        ours.set_adapter(name)
        theirs.set_adapter(name)
        each[name] = logits(ours, "gemma")
        assert_same_number(each[name], logits(theirs, "gemma"))
        flags = {n: p.requires_grad for n, p in theirs.named_parameters()}
        assert all(p.requires_grad == flags[n] for n, p in ours.named_parameters() if n in flags)
    ours.eval()
    names = ["default", "other", "default"]
    mixed = logits(ours, "gemma", adapter_names=names)
    for i, name in enumerate(names):
        assert_same_number(mixed[i], each[name][i])
    ours.set_adapter("plain")  # which has no rows here
    embed = ours.get_input_embeddings()
    assert embed.active_adapters == [] and embed.weight is embed.original_module.weight
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        ours.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="are already defined and would result in undefined"):
        ours.merge_adapter(adapter_names=["default", "other"])
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with torch.no_grad():
        embed.token_adapter.trainable_tokens_delta["other"][0, 0] = torch.nan
    for merge in (ours.merge_adapter, ours.merge_and_unload):  # all layers are merged, or none
        with pytest.raises(ValueError, match="The adapter other seems to be broken"):
            merge(adapter_names=["other"], safe_merge=True)
    with torch.no_grad():
        key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.other"
        embed.token_adapter.trainable_tokens_delta["other"].copy_(before[key])
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
    ours.set_adapter("other")
    ours.delete_adapter("default")
    assert_same_number(logits(ours, "gemma"), each["other"])
    assert set(embed.token_adapter.token_indices) == {"other"}
    ours.save_pretrained(tmp_path)
    base = make("gemma", dtype=torch.float64)
    again = peftkern.PeftModel.from_pretrained(base, tmp_path / "other")
    assert_same_number(logits(again, "gemma"), each["other"])


def test_a_resized_embedding_is_saved_beside_the_rows(tmp_path) -> None:
    base = make("llama", dtype=torch.float64)
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base", dtype=torch.float64)
    base.resize_token_embeddings(VOCAB + 2)
    config = peftkern.LoraConfig(r=2, trainable_token_indices=[VOCAB, 5])
    ours = peftkern.get_peft_model(copy.deepcopy(base), config)
    train(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.save_pretrained(tmp_path / "ours")
    key = "base_model.model.model.embed_tokens.token_adapter.base_layer.weight"
    assert key in load_file(tmp_path / "ours" / "adapter_model.safetensors")
    again = peftkern.PeftModel.from_pretrained(base, tmp_path / "ours")
    assert_same_number(logits(again), logits(ours))
    # an embedding that is adapted as well is not saved whole
    config = peftkern.LoraConfig(target_modules=["lm_head"], trainable_token_indices=[5])
    saved = peftkern.get_peft_model_state_dict(peftkern.get_peft_model(make("llama"), config))
    assert not any(k.endswith("base_layer.weight") for k in saved)


class _Sizes(TorchDispatchMode):
    """Lists the operations that make a tensor of the size of the whole vocabulary's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = ("t.", "detach", "alias", "transpose", "view")
        if isinstance(out, Tensor) and sorted(out.shape) == [WIDTH, VOCAB]:
            if not any(v in str(func) for v in views):
                self.found.append(str(func))
        return out


def test_nothing_of_the_vocabularys_size_is_computed() -> None:
    ours, theirs = two("tied_scaled")
    for model, expected in ((ours, False), (theirs, True)):
        with _Sizes() as sizes:
            gradients(model, batch_of("gemma"))
        assert bool(sizes.found) is expected, sizes.found


def test_tables_of_tokens_last_as_long_as_their_adapter() -> None:
    ours, _ = two("tied_scaled")
    with torch.inference_mode():
        ours(**batch_of("gemma"))
    gradients(ours, batch_of("gemma"))  # inference tensors would be refused here
    lora = {"target_modules": ["q_proj"], "r": 4}
    ours.add_adapter("other", peftkern.LoraConfig(**lora))
    ours.set_adapter("other")
    plain = logits(ours, "gemma")
    for tokens in ([5, 9], [3, 40]):  # one name, one number of tokens
        with contextlib.ExitStack() as expected:
            if ours.active_adapter == "default":
                expected.enter_context(pytest.warns(UserWarning, match="which is now deleted"))
            ours.delete_adapter("default")
        ours.add_adapter("default", peftkern.LoraConfig(trainable_token_indices=tokens, **lora))
        ours.set_adapter("default")
        train(ours)
        embed = ours.get_input_embeddings()
        changed = (embed(torch.arange(VOCAB)) != embed.original_module(torch.arange(VOCAB))).any(1)
        assert changed.nonzero().flatten().tolist() == sorted(tokens)
        assert not torch.equal(logits(ours, "gemma"), plain)


@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}], ids=str)
def test_an_embedding_that_looks_at_its_whole_weight(options) -> None:
    torch.manual_seed(0)
    base = nn.Embedding(10, 4, **options).double()
    weight = base.weight.detach().clone()
    layer = TrainableTokensLayer(base)
    layer.update_layer("a", [1, 7])
    layer.set_adapter("a")
    with torch.no_grad():
        layer.trainable_tokens_delta["a"].normal_()
    x = torch.tensor([[1, 1, 2], [7, 0, 1]])
    layer(x).square().sum().backward()
    W = weight.index_copy(0, torch.tensor([1, 7]), layer.trainable_tokens_delta["a"].detach())
    whole = nn.Embedding(10, 4, _weight=W, **options)
    whole(x).square().sum().backward()
    assert_same_number(layer(x), whole(x))
    grad = layer.trainable_tokens_delta["a"].grad
    assert_same_number(grad, whole.weight.grad[[1, 7]])  # type: ignore[index]


def test_a_bias_of_a_tied_head_is_kept() -> None:
    """HF PEFT drops it while tokens train, and not when they are merged."""
    head, embed = nn.Linear(4, 10).double(), nn.Embedding(10, 4).double()
    head.weight = embed.weight
    source = TrainableTokensLayer(embed)
    source.update_layer("a", [1, 7])
    tied = TrainableTokensLayer(head, source)
    for layer in (source, tied):
        layer.set_adapter("a")
    with torch.no_grad():
        source.trainable_tokens_delta["a"].normal_()
    x = torch.randn(3, 4, dtype=torch.float64)
    want = nn.functional.linear(x, tied.get_merged_weights(["a"]), head.bias)
    assert_same_number(tied(x), want)
    source.merge()
    assert_same_number(head(x), want)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no_such_layer": ({"trainable_token_indices": {"no": [1]}}, ValueError, r"Target modules \{'n"),
    "in_full_as_well": (
        {"trainable_token_indices": {"embed_tokens": [1]}, "modules_to_save": ["embed_tokens"]},
        ValueError,
        "already marked to be trained fully",
    ),
    "adapted_as_well": (
        {"trainable_token_indices": [1], "target_modules": ["embed_tokens"]},
        TypeError,
        "trainable_token_indices cannot be applied",
    ),
    "no_embedding": (
        {"trainable_token_indices": {"0.mlp": [1]}},
        TypeError,
        "trainable_token_indices cannot be applied to modules of type",
    ),
    "too_large": ({"trainable_token_indices": [1, VOCAB]}, ValueError, "from 0 to 63, got .64"),
    "negative": ({"trainable_token_indices": [-1]}, ValueError, "from 0 to 63, got .-1"),
    "indices_of_tied_modules": (
        {
            "trainable_token_indices": {"lm_head": [1], "embed_tokens": [2]},
            "ensure_weight_tying": True,
        },
        ValueError,
        "different token indices are specified for tied layers",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_and_nothing_is_changed(case) -> None:
    settings, error, says = BAD[case]
    model = make("gemma")
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error, match=says):
            peftkern.get_peft_model(model, peftkern.LoraConfig(**settings))
    assert_same(model, before)
