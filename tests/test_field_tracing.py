"""``torch.jit.trace`` and the older ONNX exporter.

Their graphs have only torch's own operations and take any batch size and length.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import peftkern
from peftkern.helpers import DoraCaching
from tests import models
from tests.closeness import assert_same_number, differ
from tests.prompts import prompt_model
from tests.tiny import fill, make

# transformers' models look at shapes, which torch says at each; torch looks at every attribute of
# a module, deprecated ones included, and plans to drop the trace
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]


def _batch(rows: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.arange(3, 3 + rows * length).view(rows, length)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return ids, mask


class _Logits(nn.Module):
    """A model as a function of tensors, which is what a tracer takes."""

    def __init__(self, model: Any, **more: Any) -> None:
        super().__init__()
        self.model, self.more = model, more
        if model is not None and (reason := _why_not()):
            pytest.skip(
                f"transformers {tf.__version__} cannot be traced without adapters: {reason}"
            )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False, **self.more).logits


@functools.cache
def _why_not() -> str | None:
    """The reason that transformers' own models cannot be traced; None when they can.

    Before 5.6 they misinterpret a traced length.
    """
    bare = _Logits(None)
    bare.model = make("llama")
    try:
        torch.jit.trace(bare, _batch(2, 7), check_trace=False)
    except IndexError as error:
        return str(error)
    return None


def _check(model: nn.Module, example: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    """Traced with gradients on, torch's own check included, the graph is right on other shapes."""
    traced = torch.jit.trace(model, example)
    for batch in (example, other):
        assert_same_number(traced(*batch), model(*batch))


def _lora(family: str, adapters: int = 1, **settings: Any) -> Any:
    task = settings.pop("task_type", "CAUSAL_LM")
    config = peftkern.LoraConfig(task_type=task, r=4, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peftkern.get_peft_model(make(family, task, torch.float64), config)
        for i in range(1, adapters):
            model.add_adapter(f"more{i}", peftkern.LoraConfig(task_type=task, r=2, **settings))
    fill(model)
    return model.eval()


_GPT2 = ["c_attn", "c_fc", "wte"]
_LLAMA = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]  # grouped where they share x
LORA = {
    "conv1d": ("gpt2", {"target_modules": _GPT2, "lora_dropout": 0.3}),
    "grouped": ("llama", {"target_modules": _LLAMA}),
    "bias of B": ("gpt2", {"target_modules": ["c_fc"], "lora_bias": True}),
    "dora": ("gpt2", {"target_modules": _GPT2, "use_dora": True}),
    "bdlora": (
        "llama",
        {
            "target_modules": ["q_proj", "o_proj"],
            "use_bdlora": peftkern.BdLoraConfig(
                target_modules_bd_a=["q_proj"], target_modules_bd_b=["o_proj"], nblocks=2
            ),
        },
    ),
    "kasa": ("llama", {"target_modules": _LLAMA, "kasa_config": peftkern.KasaConfig()}),
    "velora": (
        "llama",
        {"target_modules": _LLAMA, "velora_config": peftkern.VeloraConfig(num_groups=4)},
    ),
    "monteclora": (
        "llama",
        {"target_modules": _LLAMA, "monteclora_config": peftkern.MontecloraConfig()},
    ),
    "tokens": ("llama", {"target_modules": _LLAMA, "trainable_token_indices": [4, 9, 30]}),
    "in full": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}),
    "classifier": ("llama", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    "a parameter": ("llama", {"target_parameters": ["q_proj.weight"], "target_modules": []}),
}


@pytest.mark.parametrize("case", LORA)
def test_a_traced_model_computes_what_it_does_untraced(case: str) -> None:
    family, settings = LORA[case]
    _check(_Logits(_lora(family, **dict(settings))), _batch(2, 7), _batch(3, 11))


def test_a_trace_computes_the_norms_that_are_kept() -> None:
    """A traced graph follows weights that change, though DoraCaching keeps norms of old weights."""
    model = _lora("gpt2", target_modules=["c_attn"], use_dora=True)
    batch = _batch(2, 7)
    with DoraCaching(), torch.no_grad():
        model(input_ids=batch[0], attention_mask=batch[1])  # keeps them
        traced = torch.jit.trace(_Logits(model), batch)
    before = traced(*batch)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name:
                weight.mul_(3)
    assert_same_number(traced(*batch), _Logits(model)(*batch))
    assert differ(traced(*batch), before)


def test_several_active_adapters_are_traced() -> None:
    model = _lora("gpt2", 2, target_modules=_GPT2)
    model.base_model.set_adapter(["default", "more1"])
    _check(_Logits(model), _batch(2, 7), _batch(3, 11))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_mixed_batch_is_traced_with_its_names(family: str) -> None:
    model = _lora(family, 2, target_modules=_GPT2 if family == "gpt2" else _LLAMA)
    named = _Logits(model, adapter_names=["more1", "__base__", "default"])
    _check(named, _batch(3, 7), _batch(3, 11))


def test_training_is_traced_with_its_gradients() -> None:
    for case in ("grouped", "dora", "velora"):
        family, settings = LORA[case]
        model = _Logits(_lora(family, **dict(settings)).train())
        batch, other = _batch(2, 7), _batch(3, 11)
        traced = torch.jit.trace(model, batch)
        model.zero_grad()
        model(*other).square().mean().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        traced(*other).square().mean().backward()
        again = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        if case != "velora":  # whose gradient of A is that of a compressed x, on purpose
            assert_same_number(again, found)
        assert again.keys() == found.keys()


class _Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv1d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 4, (3, 1), stride=(1, 1))
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, L]
        x = self.conv2(self.conv1(x)[..., None])[..., 0]
        return self.linear(x.transpose(1, 2))


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_are_traced(dora: bool) -> None:
    config = peftkern.LoraConfig(r=2, target_modules=["conv1", "conv2", "linear"], use_dora=dora)
    model = peftkern.get_peft_model(_Image().double(), config).eval()
    fill(model)
    a, b = torch.randn(2, 3, 9, dtype=torch.float64), torch.randn(4, 3, 13, dtype=torch.float64)
    _check(model, (a,), (b,))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_an_attention_is_traced() -> None:
    config = peftkern.LoraConfig(r=2, target_modules=["attention"])
    model = peftkern.get_peft_model(_Attention().double(), config)
    fill(model)
    a, b = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(3, 9, 8, dtype=torch.float64)
    _check(model, (a,), (b,))


@pytest.mark.parametrize(
    ("kind", "family"),
    [*((k, "llama") for k in ("prefix", "projection", "prompt", "lstm")), ("prefix", "gpt2")],
)
def test_prompts_and_prefixes_are_traced(kind: str, family: str) -> None:
    base = make(family, "CAUSAL_LM", torch.float64)
    model = prompt_model(peftkern, kind, family, base=base).eval()
    _check(_Logits(model), _batch(2, 7), _batch(3, 11))


# that take a prefix in ways of their own
@pytest.mark.parametrize("family", ["mpt", "bloom", "gptj", "falcon", "mistral"])
def test_prefixes_of_other_families_are_traced(family: str) -> None:
    own = {"alibi": True, "new_decoder_architecture": False} if family == "falcon" else {}
    base = models.build(family, **own).double()
    model = prompt_model(peftkern, "prefix", base=base)
    _check(_Logits(model.eval()), _batch(2, 7), _batch(3, 11))


class _Seq2Seq(_Logits):
    def forward(self, ids: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": target}
        return self.model(**given, use_cache=False).logits


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_prompts_of_an_encoder_and_a_decoder_are_traced(kind: str) -> None:
    base = make("t5", "SEQ_2_SEQ_LM", torch.float64)
    model = prompt_model(peftkern, kind, "t5", "SEQ_2_SEQ_LM", base=base).eval()
    example, other = ((*_batch(r, n), _batch(r, n - 2)[0]) for r, n in ((2, 7), (3, 9)))
    _check(_Seq2Seq(model), example, other)


def test_a_fused_model_of_hf_peft_is_traced() -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=_LLAMA)
    model = peft.get_peft_model(make("llama", "CAUSAL_LM", torch.float64), config).eval()
    fill(model)
    peftkern.fuse(model)
    _check(_Logits(model), _batch(2, 7), _batch(3, 11))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_trace_of_a_full_batch_sees_padding_later(kind: str) -> None:
    """The graph must not depend on facts of the example's values, such as a mask of ones."""
    base = make("llama", "CAUSAL_LM", torch.float64)
    model = prompt_model(peftkern, kind, "llama", base=base).eval()
    ids, mask = _batch(2, 7)
    _check(_Logits(model), (ids, torch.ones_like(mask)), _batch(3, 11))


def test_a_prefix_among_others_of_another_length_is_traced() -> None:
    base = make("llama", "CAUSAL_LM", torch.float64)
    model = prompt_model(peftkern, "prefix", "llama", base=base, P=5)
    model.add_adapter(
        "short", peftkern.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    model.set_adapter("short")
    _check(_Logits(model.eval()), _batch(2, 7), _batch(3, 11))


@pytest.mark.parametrize("case", ["conv1d", "dora", "tokens", "prefix"])
def test_the_older_onnx_exporter_knows_every_operation(case: str) -> None:
    """Without the onnx package the exporter stops where the finished graph is packed."""
    if case == "prefix":
        model = prompt_model(peftkern, "prefix", "gpt2").eval()
    else:
        model = _lora(LORA[case][0], **dict(LORA[case][1])).float()
    file = io.BytesIO()

    def export() -> None:
        torch.onnx.export(_Logits(model), _batch(2, 7), file, dynamo=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, which is to go
        if importlib.util.find_spec("onnx") is not None:
            export()
            assert b"MatMul" in file.getvalue()
            return
        with pytest.raises(Exception, match="onnx is not installed"):
            export()
