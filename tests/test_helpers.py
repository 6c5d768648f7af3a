"""Small functions at HF PEFT's import paths, compared with HF PEFT's."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import random
import threading
from types import ModuleType
from typing import Any

import peft
import peft.helpers
import peft.tuners._buffer_dict
import peft.tuners.tuners_utils as theirs_utils
import pytest
import torch
from torch import nn

import peftkern
import peftkern.helpers
import peftkern.tuners._buffer_dict
import peftkern.tuners.tuners_utils as ours_utils
from peftkern.utils.integrations import init_empty_weights, skip_init_on_device
from tests.closeness import assert_same_number, differ
from tests.test_imports import FACES
from tests.tiny import fill, first, inputs, make

# what code written for HF PEFT imports from elsewhere than the top
NAMES = {
    "functional": "inject_adapter_in_model set_adapter delete_adapter cast_adapter_dtype",
    "helpers": "DoraCaching rescale_adapter_scale check_if_peft_model update_signature",
    "mapping": "get_peft_model PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING",
    "peft_model": "PeftModelForCausalLM PeftModelForSeq2SeqLM TunerLayerStatus get_model_status",
    "tuners": "LoraConfig PromptEmbedding PrefixEncoder PromptEncoder",
    "tuners.lora": "Linear Conv2d Embedding ParamWrapper LoraLayer",
    "tuners.lora.layer": "LoraLayer Embedding Conv2d MultiheadAttention ParamWrapper",
    "tuners.tuners_utils": "BaseTuner BaseTunerLayer check_adapters_to_merge replicate_layers "
    "inspect_matched_modules _maybe_include_all_linear_layers clone_module",
    "utils": "get_peft_model_state_dict TrainableTokensWrapper _get_submodules UPCAST_DTYPES",
    "utils.other": "ModulesToSaveWrapper fsdp_auto_wrap_policy _get_input_embeddings_name",
    "utils.hotswap": "hotswap_adapter hotswap_adapter_from_state_dict",
    "utils.save_and_load": "_insert_adapter_name_into_state_dict load_peft_weights",
}


@pytest.mark.parametrize("address", NAMES)
def test_names_are_where_they_are_looked_for(address):
    ours = importlib.import_module(f"peftkern.{address}")
    for name in NAMES[address].split():
        found = getattr(ours, name)
        assert (getattr(found, "__module__", None) or "peftkern").startswith("peftkern"), name
    with pytest.raises(AttributeError):
        ours.no_such_name  # noqa: B018


def test_minimal_names_are_pefts():
    """For random trees of names with some targets, the suffixes are HF PEFT's.

    They match the targets and no other name.
    """
    rng = random.Random(0)
    for _ in range(150):
        names = {".".join(rng.choice("abc") for _ in range(rng.randint(1, 4))) for _ in range(25)}
        targets = {n for n in names if rng.random() < 0.4}
        others = {n for n in names - targets if not any(n.endswith("." + t) for t in targets)}
        if not targets:
            continue
        found = ours_utils._find_minimal_target_modules(targets, others)
        assert found == theirs_utils._find_minimal_target_modules(targets, others)
        told = {
            n for n in targets | others if n in found or n.endswith(tuple("." + f for f in found))
        }
        assert told == targets
    many = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(12) for n in "qv"]
    config = peftkern.LoraConfig(target_modules=many[:4])
    peftkern.get_peft_model(make("llama"), config)
    assert config.target_modules == set(many[:4])  # too few to reduce
    config = peftkern.LoraConfig(target_modules=many)
    peftkern.get_peft_model(make("llama"), config)
    assert config.target_modules == {"q_proj", "v_proj"}


def test_buffer_dicts():
    tensors = {"b": torch.ones(2), "a": torch.zeros(3)}
    for persistent in (False, True):
        for given in (tensors, list(tensors.items()), None):
            mine, other = (
                lib.tuners._buffer_dict.BufferDict(given, persistent) for lib in (peftkern, peft)
            )
            assert (
                list(mine) == list(other) and mine.state_dict().keys() == other.state_dict().keys()
            )
            assert len(mine) == len(other) and ("a" in mine) == ("a" in other)
    mine.update(tensors)
    assert mine.pop("a").shape == (3,) and list(mine.keys()) == ["b"]
    assert mine.to(torch.float64)["b"].dtype == torch.float64
    with pytest.raises(TypeError, match="iterable"):
        mine.update(3)
    with pytest.raises(ValueError, match="has length 1"):
        mine.update([("c", torch.ones(1)), ("d",)])
    assert "c" not in mine
    with pytest.raises(RuntimeError, match="should not be called"):
        mine(1)
    mine.clear()
    assert len(mine) == 0 and not mine._non_persistent_buffers_set


@pytest.mark.parametrize("method", ["forward", "generate", "all"])
def test_signatures(method):
    """A model without a task shows its base's signatures, and still answers."""
    model = peftkern.get_peft_model(make("llama"), peftkern.LoraConfig(target_modules=["q_proj"]))
    batch = inputs("llama")
    before = first(model(**batch))
    shown = {m: inspect.signature(getattr(model, m)) for m in ("forward", "generate")}
    peftkern.helpers.update_signature(model, method)
    for m, was in shown.items():
        base = getattr(type(model.get_base_model()), m)
        changed = method in (m, "all")
        assert (getattr(model, m).__doc__ == base.__doc__) is changed
        assert (inspect.signature(getattr(model, m)) == was) is not changed or not changed
    assert torch.equal(first(model(**batch)), before)
    with pytest.raises(ValueError, match="not supported please choose one of"):
        peftkern.helpers.update_signature(model, "backward")


def test_rescaling(tmp_path):
    base = make("llama", dtype=torch.float64)
    model = peftkern.get_peft_model(base, peftkern.LoraConfig(target_modules=["q_proj"]))
    fill(model)
    batch = inputs("llama")
    adapted = first(model(**batch))
    with model.disable_adapter():
        plain = first(model(**batch))
    with pytest.raises(ZeroDivisionError), peftkern.helpers.rescale_adapter_scale(model, 0):
        assert_same_number(first(model(**batch)), plain)
        raise ZeroDivisionError
    assert torch.equal(first(model(**batch)), adapted) and differ(adapted, plain)
    with pytest.raises(TypeError, match="multiplier should be of type float"):
        with peftkern.helpers.rescale_adapter_scale(model, "2"):
            pass
    model.save_pretrained(tmp_path)
    assert peftkern.helpers.check_if_peft_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    assert not peftkern.helpers.check_if_peft_model(tmp_path)


def test_scaling_methods_of_layers():
    """set_scale, scale_layer and unscale_layer leave the numbers that HF PEFT's leave."""
    found = []
    for lib in (peftkern, peft):
        seen = []
        for rslora in (False, True):
            config = lib.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], use_rslora=rslora)
            model = lib.get_peft_model(make("llama"), config)
            model.add_adapter("b", config)
            layer = model.base_model.model.model.layers[0].self_attn.q_proj
            for call in (
                lambda q: q.scale_layer(2),
                lambda q: q.set_scale("b", 3),
                lambda q: q.set_scale("nobody", 3),
                lambda q: q.unscale_layer(4.0),
                lambda q: q.scale_layer(1),
                lambda q: q.unscale_layer(),
            ):
                call(layer)
                seen.append(dict(layer.scaling))
        found.append(seen)
    assert found[0] == found[1]


def test_casting_of_inputs_can_be_left_to_hooks():
    model = peftkern.get_peft_model(
        make("llama", dtype=torch.bfloat16), peftkern.LoraConfig(target_modules=["q_proj"])
    )
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].register_forward_pre_hook(lambda m, a: seen.append(a[0].dtype) or a)
    x = torch.ones(2, layer.in_features, dtype=torch.bfloat16)
    for active, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        seen: list[torch.dtype] = []
        with peftkern.helpers.disable_input_dtype_casting(model, active):
            try:
                layer(x)
            except RuntimeError:  # bfloat16 meets float32, as no hook casts the weight
                assert active
        assert seen == [dtype]
    assert layer.cast_input_dtype_enabled


def test_preparing_a_model():
    for lib in (peftkern, peft):
        model = make("llama", dtype=torch.bfloat16)
        assert lib.prepare_model_for_kbit_training(model) is model
        assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, False)}
        assert not model.is_gradient_checkpointing
        model.is_loaded_in_8bit = True
        lib.prepare_model_for_kbit_training(
            model, gradient_checkpointing_kwargs={"use_reentrant": True}
        )
        assert model.is_gradient_checkpointing
        adapted = lib.get_peft_model(make("llama"), lib.LoraConfig(target_modules=["q_proj"]))
        lib.cast_mixed_precision_params(adapted, torch.float16)
        for name, p in adapted.named_parameters():
            assert p.dtype == (torch.float32 if "lora_" in name else torch.float16)
    ids = torch.tensor([[5, 6, -100], [7, -100, -100]])
    assert torch.equal(peftkern.shift_tokens_right(ids, 0, 2), peft.shift_tokens_right(ids, 0, 2))
    with pytest.raises(ValueError, match="pad_token_id has to be defined"):
        peftkern.shift_tokens_right(ids, None, 2)
    cache = tuple(torch.randn(2, 3, 4, 5, 6) for _ in range(2))
    for mine, other in zip(
        peftkern.bloom_model_postprocess_past_key_value(cache),
        peft.bloom_model_postprocess_past_key_value(cache),
        strict=True,
    ):
        assert all(map(torch.equal, mine, other))


def test_condition_numbers_choose_as_pefts():
    model = make("llama")
    mine, other = (
        lib.helpers.KappaTuneSelector(model, show_progress=False) for lib in (peftkern, peft)
    )
    for how in ({"top_p": 0.3}, {"num_modules": 4}, {"threshold": 50.0}, {}):
        assert mine.get_best_targets(**how) == other.get_best_targets(**how) != []
    small = peftkern.helpers.KappaTuneSelector(model, 16, show_progress=False)
    assert not any("mlp" in name for name in small.get_best_targets())
    model.experts = nn.Module()
    model.experts.down_proj = nn.Parameter(torch.randn(3, 4, 5))
    found = [lib.find_kappa_target_modules(model, show_progress=False) for lib in (peftkern, peft)]
    assert found[0] == found[1] and found[0]["target_parameters"] == ["experts.down_proj"]


def test_empty_weights():
    make_linear = skip_init_on_device(lambda: nn.Linear(2, 2))
    with init_empty_weights():
        assert nn.Linear(2, 2).weight.is_meta and not make_linear().weight.is_meta
        assert not nn.BatchNorm1d(2).running_mean.is_meta
    with init_empty_weights(include_buffers=True):
        assert nn.BatchNorm1d(2).running_mean.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_empty_weights_are_those_of_one_thread():
    register = nn.Module.register_parameter
    first, second = init_empty_weights(), init_empty_weights()
    first.__enter__()
    thread = threading.Thread(target=lambda: seen.append(nn.Linear(2, 2).weight.is_meta))
    seen: list[bool] = []
    thread.start()
    thread.join()
    second.__enter__()
    first.__exit__(None, None, None)  # blocks of two threads need not end in order
    assert nn.Linear(2, 2).weight.is_meta
    second.__exit__(None, None, None)
    assert seen == [False] and nn.Module.register_parameter is register


@functools.cache
def defined_here() -> set[str]:
    """Names that a file of the package defines, its own classes, functions and constants."""
    found: set[str] = set()
    for module in pkgutil.walk_packages(peftkern.__path__, "peftkern."):
        if not module.name.endswith("__main__") and ".cli" not in module.name:
            names = vars(importlib.import_module(module.name))
            found |= {n for n, v in names.items() if is_own(n, v, "peftkern")}
    return found


def is_own(name: str, value: Any, package: str) -> bool:
    if name.startswith("__") or name == "TYPE_CHECKING" or isinstance(value, ModuleType):
        return False
    constant = name.isupper() and not isinstance(value, type)  # ABC is a class
    return constant or str(getattr(value, "__module__", "")).startswith(package)


@pytest.mark.parametrize("face", sorted(FACES))
def test_what_hf_peft_has_at_an_address_is_there(face: str) -> None:
    """Whatever of it peftkern has anywhere: users import from where HF PEFT's own files do."""
    theirs = vars(importlib.import_module(f"peft.{face}"))
    wanted = {n for n, v in theirs.items() if is_own(n, v, "peft.")} & defined_here()
    ours = importlib.import_module(f"peftkern.{face}")
    assert wanted and {name for name in wanted if not hasattr(ours, name)} == set()
