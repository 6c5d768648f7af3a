"""Prefix tuning of more families, each tested for one special reason, compared with HF PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor

import peftkern
from tests import models, prefix_zoo
from tests.closeness import assert_same_number, differ
from tests.models import VOCAB, task_of
from tests.needs import needs
from tests.plain_reference import CACHE, peft_is_right, recomputed, with_prefix
from tests.prefix_models import HEADS, WIDTH, P, inputs, make, numbers, real, split
from tests.prefix_models import config as config_of
from tests.prefix_zoo import weight_of

FAMILIES = ["gemma4", "gemma3n", "stablelm", "longt5", "xglm", "gpt_neox_japanese", "m2m_100",
            "plbart", "rembert", "rembert decoder", "ernie", "modernbert-decoder"]  # fmt: skip
SLOW = """nemotron umt5 switch_transformers blenderbot-small pegasus_x nllb-moe megatron-bert
bert-generation roc_bert xlm-roberta-xl data2vec-text roberta-prelayernorm xmod camembert""".split()
EACH = [*FAMILIES, *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW)]


@pytest.fixture(autouse=True)
def xglm_in_float64(request: pytest.FixtureRequest) -> Iterator[None]:
    """Its attention fills a tensor of the default dtype with the least number of the model's."""
    named = "xglm" in request.node.name
    torch.set_default_dtype(torch.float64 if named else torch.float32)
    yield
    torch.set_default_dtype(torch.float32)


def tuned(library: Any, family: str, **more: Any) -> Any:
    return prefix_zoo.tuned(library, family, task_of(family), **more)


def batch_of(family: str, padding: str | None = "left") -> dict[str, Any]:
    return inputs("", padding, task_of(family))


def prefixes_of(family: str, model: Any, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each layer's, for those of one size: layers that share another's keys have none."""
    config = model.peft_config["default"]
    seq2seq = family in models.SEQ2SEQ
    pairs = split(weight, config.num_attention_heads, config.num_layers, seq2seq)
    if family in ("gemma4", "gemma3n"):
        kinds, own = models.SHARED["layer_types"], 6 - models.SHARED["num_kv_shared_layers"]
        widths = [8 if kind == "sliding_attention" else 16 for kind in kinds[:own]]
        pairs = [(k[..., :w], v[..., :w]) for (k, v), w in zip(pairs, widths, strict=False)]
    return pairs


@pytest.mark.filterwarnings("ignore:Prefix tuning")
@pytest.mark.parametrize("family", EACH)
def test_is_what_the_oracles_say(family: str) -> None:
    """The plain reference's numbers, and HF PEFT's where it is right."""
    sizes = {"num_attention_heads": HEADS} if family == "xglm" else {}  # it cannot tell
    ours, theirs = tuned(peftkern, family), tuned(peft, family, **sizes)
    task, batch = task_of(family), batch_of(family)
    found = numbers(batch, ours(**batch), weight_of(ours))
    weight = weight_of(ours).detach().clone().requires_grad_()
    base = make(family, task)
    run = partial(with_prefix, base, prefixes_of(family, theirs, weight))
    assert_same_number(found, numbers(batch, run(**batch), weight))
    if peft_is_right("prefix of a head" if task == "SEQ_CLS" else "prefix"):
        assert_same_number(found, numbers(batch, theirs(**batch), weight_of(theirs)))
    assert found["gradient"].any()
    with torch.no_grad(), ours.disable_adapter():
        assert differ(real(batch, ours(**batch).logits), found["logits"])
    if task == "SEQ_CLS":
        return
    if family == "rembert decoder":  # before, it counts padded positions anew without a cache
        needs("transformers>=5.23", "the model itself differs with and without a cache")
    del batch["labels"]
    plain = recomputed(base, lambda model: partial(with_prefix, model, *run.args[1:]))
    for how in ({}, {"num_beams": 3}):
        how |= {"max_new_tokens": 6, "do_sample": False}
        tokens = ours.generate(**batch, **how)
        assert torch.equal(tokens, plain.generate(**batch, **how))
        assert torch.equal(tokens, ours.generate(**batch, **how, use_cache=False))
        if peft_is_right("prefix generate"):
            assert torch.equal(tokens, theirs.generate(**batch, **how))


@pytest.mark.filterwarnings("ignore:Prefix tuning")
@pytest.mark.parametrize("family", ["stablelm", "gemma4", "xglm"])
def test_static_cache(family: str) -> None:
    """For which generate() makes the masks, and not the model."""
    model, batch = tuned(peftkern, family), batch_of(family)
    del batch["labels"]
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    dynamic = model.generate(**batch, **how)
    assert torch.equal(model.generate(**batch, **how, cache_implementation="static"), dynamic)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**batch, **how), dynamic)


@pytest.mark.filterwarnings("ignore:Prefix tuning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "family", ["gemma4", "stablelm", "longt5", "xglm", "m2m_100", "rembert", "gemma3n"]
)
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    model, batch = tuned(peftkern, family).train(), batch_of(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "layerdrop"):
            module.layerdrop = 0.0
    found = []
    for _ in range(2):
        model(**batch).loss.backward()
        found.append(weight_of(model).grad.clone())
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant and "gemma" in family:  # the keys that layers share would get no gradient
            with pytest.raises(ValueError, match="use_reentrant=False"):
                model(**batch)
            return
    assert found[0].any()
    assert_same_number(found[1], found[0])


@pytest.mark.filterwarnings("ignore:Prefix tuning")
@pytest.mark.parametrize("family", ["gemma4", "stablelm", "longt5", "xglm", "m2m_100", "plbart"])
def test_a_prefix_for_each_row_or_none(family: str) -> None:
    model, batch = tuned(peftkern, family), batch_of(family)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    names = ["other", "__base__", "default"]
    call = {**batch, "labels": None}
    if "labels" in batch and family in models.SEQ2SEQ:
        call["decoder_input_ids"] = batch["labels"]
    with torch.no_grad():
        together = model(**call, adapter_names=names).logits
        model.set_adapter("default")
        assert_same_number(together[2], model(**call).logits[2])
        model.set_adapter("other")
        whole = together.shape[1] == batch["input_ids"].shape[1]
        keep = [m.bool() if whole else slice(None) for m in batch["attention_mask"]]
        assert_same_number(together[0][keep[0]], model(**call).logits[0][keep[0]])
        with model.disable_adapter():
            plain = model(**call).logits
        assert_same_number(together[1][keep[1]], plain[1][keep[1]])
        assert differ(together[2], plain[2])


def test_whisper() -> None:
    """Its input is no text; HF PEFT asks for ``input_ids``, but has the right prefix to hand on."""
    ours, theirs = tuned(peftkern, "whisper"), tuned(peft, "whisper")
    torch.manual_seed(2)
    features = torch.randn(2, 8, 40, dtype=torch.float64)
    call = {"input_features": features, "labels": torch.randint(3, VOCAB, (2, 6))}
    mine = ours(**call)
    wanted = theirs.base_model(**call, **{CACHE: theirs.get_prompt(2)})
    found, expected = (
        numbers({}, output, weight_of(model)) for output, model in ((mine, ours), (wanted, theirs))
    )
    assert_same_number(found, expected)
    tokens = ours.generate(input_features=features, max_new_tokens=6, num_beams=2)
    bare = ours.base_model.generate(input_features=features, max_new_tokens=6, num_beams=2)
    assert tokens.shape[0] == 2 and not torch.equal(tokens, bare)
    with pytest.raises(ValueError, match="65 positions.*WhisperForConditionalGeneration has 64"):
        ours(input_features=features, labels=torch.full((2, 60), 5))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        ours(labels=call["labels"])


def _llava() -> tuple[Any, dict[str, Tensor]]:
    vision = models.config("clip vision", width=WIDTH, heads=HEADS, image_size=16, patch_size=8)
    config = tf.LlavaConfig(text_config=config_of("llama"), vision_config=vision, image_token_id=60)
    ids = torch.tensor([[1, 60, 60, 60, 60, 5, 6, 7]])
    call = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16).double()}
    return tf.LlavaForConditionalGeneration(config), call


def _qwen_vl() -> tuple[Any, dict[str, Tensor]]:
    """Positions of three kinds for each token."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = config_of("qwen2_5_vl_text", rope_parameters=rope).to_dict()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    marks = ("image", "video", "vision_start", "vision_end")
    marks = {f"{name}_token_id": 60 + i for i, name in enumerate(marks)}
    config = tf.Qwen2_5_VLConfig(text_config=text, vision_config={"depth": 1, **sizes}, **marks)
    ids = torch.tensor([[5, 6, 62, 60, 60, 60, 60, 63, 7, 8]])
    call = {
        "input_ids": ids,
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14).double(),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 60).int(),
    }
    return tf.Qwen2_5_VLForConditionalGeneration(config), call


def positions_of(model: Any, call: dict[str, Tensor]) -> Tensor | None:
    """The positions that the model computes without a prefix, by a mask of T tokens with images."""
    found = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, rest: found.append(rest.get("position_ids")), with_kwargs=True
    )
    model(**call)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("family", [_llava, _qwen_vl])
def test_models_of_images_and_text(family: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    base, call = family()
    words = {"input_ids": call["input_ids"].clamp(max=59)}
    how = {"attention_mask": torch.ones_like(call["input_ids"])}
    longer = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    ours, theirs = (
        library.get_peft_model(
            copy.deepcopy(base),
            library.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
        )
        .double()
        .eval()
        for library in (peftkern, peft)
    )
    prefix = ours.peft_config["default"]
    with torch.no_grad():
        for model in (ours, theirs):
            weight_of(model).normal_(generator=torch.Generator().manual_seed(1))
        pairs = split(weight_of(ours), prefix.num_attention_heads, prefix.num_layers, False)
        base = base.double().eval()
        logits = ours(**words, **how).logits
        seen = ours(**call, **how).logits
        assert_same_number(logits, with_prefix(base, pairs, **words, **how).logits)
        where = {"position_ids": positions_of(base, call)}
        assert_same_number(seen, with_prefix(base, pairs, **call, **how, **where).logits)
        assert differ(seen, logits)
        assert_same_number(logits, theirs(**words, **how).logits)
        if family is _llava:  # HF PEFT's mask is too long for Qwen's images
            assert_same_number(seen, theirs(**call, **how).logits)
    plain = recomputed(base, lambda model: partial(with_prefix, model, pairs))
    tokens = ours.generate(**call, **how, **longer)
    assert torch.equal(tokens, plain.generate(**call, **how, **longer))
    if peft_is_right("prefix generate"):
        assert torch.equal(tokens, theirs.generate(**call, **how, **longer))


def test_families_refused_by_name() -> None:
    """The error names the model's class and the reason, and the model is unchanged."""
    for family in ("vit", "albert", "xlnet"):
        model = tf.AutoModel.from_config(models.config(family))
        config = peftkern.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=P)
        with pytest.raises(ValueError, match=f"does not support {type(model).__name__}: no layers"):
            peftkern.get_peft_model(model, config)
        assert all(p.requires_grad for p in model.parameters())
