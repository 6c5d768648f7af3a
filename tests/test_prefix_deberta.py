"""A prefix in DeBERTa's attention, which uses distances, compared with the models' own code.

The reference is transformers' model over P more tokens in front, whose keys and values are replaced
in every layer by the prefix; later tokens see nothing else of them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import peftkern
from peftkern.tuners.prefix_tuning import deberta
from peftkern.tuners.prefix_tuning.inject import PrefixInjection
from tests import models
from tests.closeness import assert_same_number, differ
from tests.models import LABELS, LAYERS, VOCAB
from tests.prefix_models import HEADS, WIDTH, P, config, settings, split
from tests.tiny import loss_of

BOTH = ["c2p", "p2c"]
V2 = {"relative_attention": True, "pos_att_type": BOTH, "position_biased_input": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "v1": ("deberta", V2),
    "v1 at once": ("deberta", {**V2, "pos_att_type": ["c2p"], "max_relative_positions": 4}),
    "v3": (
        "deberta-v2",
        {**V2, "share_att_key": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm"},
    ),
    "v2": ("deberta-v2", {**V2, "max_relative_positions": 6}),
    "positions": (
        "deberta-v2",
        {**V2, "pos_att_type": ["p2c"], "position_biased_input": True},
    ),
    "none": ("deberta-v2", {"relative_attention": False, "position_biased_input": True}),
}


@functools.cache
def _original(name: str) -> Any:
    family, own = MODELS[name]
    model = models.build(family, **settings(family), **own)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.1 * torch.randn_like(weight))
    return model.double().eval()


def make(name: str) -> Any:
    return copy.deepcopy(_original(name))


def injected(model: Any) -> PrefixInjection:
    return PrefixInjection(
        model, num_layers=LAYERS, kv_heads=HEADS, head_dim=WIDTH // HEADS, num_virtual_tokens=P
    )


def batch(T: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (3, T), generator=g)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    mask[2, 0] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2])}


@contextlib.contextmanager
def in_place(model: Any, prefixes: list[tuple[Tensor, Tensor]]) -> Any:
    """Within the block the first P tokens have the prefix's keys and values, in each layer."""
    handles = []

    def put(heads: Tensor, layer: int, which: int) -> Tensor:
        """heads [B, S, H, D] with the prefix in the first P rows."""
        prefix = prefixes[layer][which]
        prefix = prefix if prefix.dim() == 4 else prefix.expand(len(heads), -1, -1, -1)
        return torch.cat([prefix.transpose(1, 2), heads[:, P:]], dim=1)

    for i, layer in enumerate(model.base_model.encoder.layer):
        attention = layer.attention.self
        if hasattr(attention, "in_proj"):

            def joined(module: Any, args: Any, out: Tensor, i: int = i, a: Any = attention) -> Any:
                query, key, value = out.unflatten(-1, (HEADS, 3, -1)).unbind(-2)
                bias = a.v_bias.view(HEADS, -1)  # added to all values behind this product
                value = put(value + bias, i, 1) - bias
                return torch.stack([query, put(key, i, 0), value], dim=-2).flatten(-3)

            handles.append(attention.in_proj.register_forward_hook(joined))
            continue
        for which, projection in enumerate((attention.key_proj, attention.value_proj)):

            def one(module: Any, args: Any, out: Tensor, i: int = i, which: int = which) -> Any:
                if out.shape[0] == 1:  # of the table of distances
                    return out
                return put(out.unflatten(-1, (HEADS, -1)), i, which).flatten(-2)

            handles.append(projection.register_forward_hook(one))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reference(model: Any, call: dict[str, Tensor], prefixes: Any) -> Tensor:
    """Hidden states [B, T, d] behind the prefix."""
    front = torch.full((3, P), 7)
    ids = torch.cat([front, call["input_ids"]], dim=1)
    mask = torch.cat([torch.ones_like(front), call["attention_mask"]], dim=1)
    with in_place(model, prefixes):
        return model.base_model(ids, attention_mask=mask).last_hidden_state[:, P:]


def draw(*rows: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*rows, P, 2 * LAYERS * WIDTH, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("T", [4, 15])
@pytest.mark.parametrize("name", MODELS)
def test_is_what_tokens_with_those_keys_give(name: str, T: int, monkeypatch: Any) -> None:
    model, call = make(name), batch(T)
    real = call["attention_mask"].bool()
    weight = draw()
    expected = reference(model, call, split(weight, HEADS, LAYERS, False))
    (expected[real] ** 2 * torch.arange(1, WIDTH + 1)).sum().backward()
    wanted, weight.grad = weight.grad, None

    injection = injected(model)
    inputs = {k: v for k, v in call.items() if k != "labels"}
    with injection.active(split(weight, HEADS, LAYERS, False)):
        got = model.base_model(**inputs).last_hidden_state
    assert_same_number(got[real], expected[real])
    (got[real] ** 2 * torch.arange(1, WIDTH + 1)).sum().backward()
    assert wanted.any()
    assert_same_number(weight.grad, wanted)

    # it could have failed: without the prefix, and at other distances
    with torch.no_grad():
        bare = model.base_model(**inputs).last_hidden_state
        assert differ(bare[real], expected[real])
        if name == "none":
            return
        where = deberta._where
        monkeypatch.setattr(deberta, "_where", lambda *a: where(*a).roll(1, 1))
        with injection.active(split(weight, HEADS, LAYERS, False)):
            wrong = model.base_model(**inputs).last_hidden_state
        assert differ(wrong[real], expected[real])


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_a_prefix_for_each_row_or_none(name: str) -> None:
    model, call = make(name), batch(6)
    call["attention_mask"] = torch.ones_like(call["input_ids"])
    rows = [split(w, HEADS, LAYERS, False) for w in draw(3).detach()]
    each = [tuple(torch.stack([r[i][k] for r in rows]) for k in (0, 1)) for i in range(LAYERS)]
    labels = call.pop("labels")
    with torch.no_grad():
        bare = model(**call, labels=labels).logits
        expected = reference(model, call, each)
        injection = injected(model)
        with injection.active(each):
            assert_same_number(model.base_model(**call).last_hidden_state, expected)
        with injection.active(each, no_prefix=torch.tensor([False, True, False])):
            mixed = model.base_model(**call).last_hidden_state
            logits = model(**call).logits
        assert_same_number(mixed[[0, 2]], expected[[0, 2]])
        assert_same_number(logits[1], bare[1])
        injection.remove()
        assert torch.equal(model(**call).logits, bare)
        assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # under no_grad
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["v1", "v3"])
def test_checkpoints_dropout_and_weights(name: str, reentrant: bool) -> None:
    model, call = make(name).requires_grad_(False), batch(6)
    injection, weight = injected(model), draw()
    found = []
    for _ in range(2):
        model.train()
        with injection.active(split(weight * 1.0, HEADS, LAYERS, False)):
            loss = loss_of(model(**call))
        loss.backward()
        found.append((loss.detach(), weight.grad.clone()))
        weight.grad = None
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_number(found[1][0], found[0][0])
    assert_same_number(found[1][1], found[0][1])

    model.eval()
    with torch.no_grad(), injection.active(split(weight, HEADS, LAYERS, False)):
        attentions = model(**call, output_attentions=True).attentions
        still = model(**call).loss
        for layer in model.base_model.encoder.layer:
            layer.attention.self.dropout.p = 0.5
        assert torch.equal(model(**call).loss, still)
        model.train()
        assert model(**call).loss != still
    assert [a.shape for a in attentions] == [(3, HEADS, 6, P + 6)] * LAYERS
    ones = torch.ones(3, HEADS, 6, dtype=torch.float64)
    assert_same_number(attentions[0].sum(-1), ones)
    assert not attentions[0][1, :, :4, P + 4 :].any()  # nobody real looks at padding


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"])
def test_prefix_tuning(task: str, tmp_path: Any) -> None:
    """The prefix works from ``get_peft_model`` to a file and back.

    HF PEFT is no oracle: it refuses classifiers of this family, and its features ignore the prefix.
    """
    base = {"SEQ_CLS": make("v3"), "FEATURE_EXTRACTION": make("v3").base_model}.get(task)
    if base is None:
        torch.manual_seed(0)
        base = tf.AutoModelForTokenClassification.from_config(make("v3").config)
    config = peftkern.PrefixTuningConfig(task_type=task, num_virtual_tokens=P)
    model = peftkern.get_peft_model(copy.deepcopy(base), config).train()
    call = batch(6)
    call["labels"] = call["labels"] if task == "SEQ_CLS" else call["input_ids"] % LABELS
    if task == "FEATURE_EXTRACTION":
        del call["labels"]
    before = model(**call)[0].sum()
    before.backward()
    weight = model.prompt_encoder["default"].embedding.weight
    assert weight.grad.any()
    with torch.no_grad():
        weight.sub_(weight.grad)
    model.eval().save_pretrained(tmp_path)
    again = peftkern.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(model(**call)[0], again(**call)[0])
        with model.disable_adapter():
            assert not torch.equal(model(**call)[0], again(**call)[0])


def test_talking_heads_are_refused() -> None:
    talking = config("deberta", **V2, talking_head=True)
    with pytest.raises(ValueError, match="DebertaModel.*talking_head"):
        injected(tf.DebertaModel(talking))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
def test_compiles_to_one_graph() -> None:
    model, call, weight = make("v3"), batch(6), draw()
    del call["labels"]  # the head's loss looks at them

    def run(**call: Tensor) -> Tensor:
        return model(**call).logits.square().sum()

    with injected(model).active(split(weight, HEADS, LAYERS, False)):
        expected = torch.autograd.grad(run(**call), weight)[0]
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        assert_same_number(torch.autograd.grad(compiled(**call), weight)[0], expected)
