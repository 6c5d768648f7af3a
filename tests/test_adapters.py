"""Several adapters in one model: after every call, flags and names are those of HF PEFT."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import peftkern
from peftkern.tuners.lora import LoraLayer
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.tiny import fill, first, inputs, make

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}:UserWarning")
    for said in (
        "Adapter .* was active which is now deleted",
        "Adapter cannot be set when the model is merged",
        "Already found a `peft_config` attribute",
    )
]
Q, ALL = ["q_proj"], "all-linear"


def state(model):
    """(which parameters train, {layer: its enabled, active, merged and available adapters})."""
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    found = {}
    for layer in getattr(model, "get_layer_status", lambda: ())():
        if not layer.available_adapters:
            continue  # HF PEFT leaves such layers with other names than the rest of the model
        found[layer.name] = (
            layer.enabled,
            list(layer.active_adapters),
            list(layer.merged_adapters),  # HF PEFT hands out the layer's own
            layer.requires_grad,
            layer.available_adapters,
            layer.devices,
        )
    return flags, found


def settings(lib, **more):
    return lib.LoraConfig(**{"r": 3, "target_modules": Q, **more})


def disabled(m, inside=lambda m: None):
    with m.disable_adapter():
        inside(m)


def two_ways(m):
    m.base_model.set_adapter(["default", "b"])


# name: what to do with a model that has the adapter "default"; (library, model)
STEPS = {
    "add": lambda lib, m: m.add_adapter("b", settings(lib, target_modules=ALL)),
    "add_frozen": lambda lib, m: m.add_adapter("b", settings(lib, inference_mode=True)),
    "set": lambda lib, m: m.set_adapter("b"),
    "set_frozen": lambda lib, m: m.set_adapter("b", inference_mode=True),
    "back": lambda lib, m: m.set_adapter("default"),
    "both": lambda lib, m: m.base_model.set_adapter(["default", "b"]),
    "both_frozen": lambda lib, m: m.base_model.set_adapter(["b", "default"], inference_mode=True),
    "none": lambda lib, m: m.base_model.set_adapter([]),
    "train_b": lambda lib, m: m.set_requires_grad("b"),
    "freeze": lambda lib, m: m.set_requires_grad(["default", "b"], requires_grad=False),
    "disabled": lambda lib, m: disabled(m),
    "nested": lambda lib, m: disabled(m, disabled),
    "off": lambda lib, m: m.base_model.disable_adapter_layers(),
    "on": lambda lib, m: m.base_model.enable_adapter_layers(),
    "delete": lambda lib, m: m.delete_adapter("default"),
    "delete_b": lambda lib, m: m.delete_adapter("b"),
    "merge": lambda lib, m: m.merge_adapter(),
    "freeze_base": lambda lib, m: m.get_base_model().requires_grad_(False),
}
PLAIN = [
    "add set back",
    "add_frozen set back",
    "add set_frozen disabled",
    "add both disabled back",
    "add both_frozen delete_b",
    "add both delete",
    "add none set",
    "add train_b freeze set",
    "add set nested",
    "add off on set",
    "off disabled",
    "add delete",
    "add set delete_b",
    "add set delete delete_b",
    "freeze_base add",
    "freeze_base add set",
    "add merge set",
]
HEADS = ["add set back", "add off on set", "add set disabled", "add delete", "add set delete_b"]


def run(steps, **config):
    """The state after each step, of both libraries, and both models."""
    models = []
    for lib in (peft, peftkern):
        model = lib.get_peft_model(make("llama", "SEQ_CLS", torch.float64), settings(lib, **config))
        models.append((lib, model, [state(model)]))
    for step in steps.split():
        for lib, model, seen in models:
            STEPS[step](lib, model)
            seen.append((model.active_adapter, model.active_adapters, state(model)))
    (_, theirs, expected), (_, ours, found) = models
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a == b, (["start", *steps.split()][i], a, b)
    return ours, theirs


@pytest.mark.parametrize("steps", PLAIN)
def test_every_flag_is_pefts(steps):
    ours, theirs = run(steps)
    if ours.peft_config and "none" not in steps:
        for model in (ours, theirs):
            fill(model)
        batch = inputs("llama", "SEQ_CLS")
        assert_same_number(first(ours.eval()(**batch)), first(theirs.eval()(**batch)))


@pytest.mark.parametrize("steps", HEADS)
@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_flags_with_modules_trained_in_full(steps, task):
    if task is None:  # "b" has no head, and HF PEFT then leaves that of "default" unused
        steps = steps.removesuffix(" delete_b")
    run(steps, modules_to_save=None if task else ["score"], task_type=task)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_flags_with_biases(bias):
    run("add set disabled back", bias=bias)


def injected(lib, frozen=False, **more):
    """Two adapters put into a model without a PeftModel, the second beside the first."""
    model = make("llama")
    for name, targets in (("one", Q), ("two", ALL)):
        lib.inject_adapter_in_model(settings(lib, target_modules=targets, **more), model, name)
        if frozen:
            model.requires_grad_(False)
    return model


@pytest.mark.parametrize("frozen", [False, True])
def test_functions_on_an_injected_model(frozen):
    """peftkern.functional beside peft.functional, and the functions for status."""
    import peft.functional as theirs

    import peftkern.functional as ours

    a, b = injected(peftkern, frozen), injected(peft, frozen)
    calls = [
        lambda f, m: f.set_adapter(m, "one"),
        lambda f, m: f.set_adapter(m, ["one", "two"], inference_mode=True),
        lambda f, m: f.set_requires_grad(m, "two"),
        lambda f, m: f.cast_adapter_dtype(m.bfloat16(), "one"),
        lambda f, m: f.delete_adapter(m, "one", "lora_") == ["two"] or 1 / 0,
        lambda f, m: f.delete_adapter(m, "two", "lora_") == [] or 1 / 0,
    ]
    for call in [lambda f, m: None, *calls]:
        call(ours, a), call(theirs, b)
        mine, other = peftkern.get_model_status(a), peft.get_model_status(b)
        assert vars(mine) == vars(other)
        flags = [[(n, p.requires_grad, p.dtype) for n, p in m.named_parameters()] for m in (a, b)]
        assert flags[0] == flags[1]
        assert [vars(s) for s in peftkern.get_layer_status(a)] == [
            vars(s) for s in peft.get_layer_status(b)
        ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("low_cpu", [False, True])
def test_injection_from_a_state_dict(dtype, low_cpu):
    """The checkpoint's names decide which layers are adapted, against the configuration's.

    A warning tells the difference. The weights fit, with the right dtype, on the right device.
    """
    source = peftkern.inject_adapter_in_model(settings(peftkern), make("llama", dtype=dtype))
    fill(source)
    weights = {
        k: v for k, v in peftkern.get_peft_model_state_dict(source).items() if "layers.1" not in k
    }
    found = []
    for lib in (peftkern, peft):
        model = make("llama", dtype=dtype)
        with pytest.warns(RuntimeWarning, match="contained these additional target modules") as w:
            lib.inject_adapter_in_model(
                settings(lib, target_modules=["v_proj"]),
                model,
                low_cpu_mem_usage=low_cpu,
                state_dict=weights,
            )
        if low_cpu:
            assert any(p.is_meta for p in model.parameters())
        result = lib.set_peft_model_state_dict(model, weights, low_cpu_mem_usage=low_cpu)
        assert not result.unexpected_keys
        told = [str(one.message) for one in w if "additional target" in str(one.message)]
        params = [(n, p.requires_grad, p.dtype, p.device) for n, p in model.named_parameters()]
        batch = inputs("llama")
        found.append((told, params, sorted(result.missing_keys)))
        key = "model.layers.0.self_attn.q_proj.lora_A.weight"
        assert torch.equal(lib.get_peft_model_state_dict(model)[key], weights[key])
        found[-1] += (first(model(**batch)),)
    (*mine, y), (*theirs, z) = found
    assert mine == theirs
    if dtype == torch.float64:
        assert_same_number(y, z)
    else:
        exact = first(copy.deepcopy(model).double()(**batch))
        assert_as_good_as_torch(y, z, exact, average=True)


def test_base_weights_by_their_old_names():
    base = make("llama", "SEQ_CLS")
    original = {k: v.clone() for k, v in base.state_dict().items()}
    ours = peftkern.get_peft_model(
        base, settings(peftkern, target_modules=ALL, task_type="SEQ_CLS")
    )
    ours.add_adapter("b", settings(peftkern))
    found = peftkern.get_base_model_state_dict(ours)
    assert found.keys() == original.keys()
    assert all(torch.equal(found[k], v) for k, v in original.items())
    changed = {k: v + 1 for k, v in original.items()}
    gone = next(iter(changed))
    partial = {**changed, "nowhere.weight": torch.zeros(1)}
    del partial[gone]
    with pytest.raises(RuntimeError, match=f"(?s)Missing key.*{gone}.*Unexpected key.*nowhere"):
        peftkern.set_base_model_state_dict(ours, partial)
    assert torch.equal(peftkern.get_base_model_state_dict(ours)[gone], original[gone])
    result = peftkern.set_base_model_state_dict(ours, partial, strict=False)
    assert result.missing_keys == [gone] and result.unexpected_keys == ["nowhere.weight"]
    peftkern.set_base_model_state_dict(ours, changed)
    now = peftkern.get_base_model_state_dict(ours)
    assert all(torch.equal(now[k], v) for k, v in changed.items())


def test_a_state_dict_of_the_models_own_is_asked():
    """FSDP and DeepSpeed bring shards together in ``state_dict()``, under the plain names."""
    ours = peftkern.get_peft_model(make("llama"), settings(peftkern))
    whole = peftkern.get_peft_model_state_dict(ours)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self._fsdp_wrapped_module = ours
            self.peft_config = ours.peft_config

        def state_dict(self, *args, **kwargs):
            found = super().state_dict(*args, **kwargs)
            return {k.removeprefix("_fsdp_wrapped_module."): v + 1 for k, v in found.items()}

    wrapped = Wrapped()
    for model in (wrapped, ours):
        if model is ours:
            part = {k: v + 1 for k, v in ours.state_dict().items() if "layers.1" not in k}
            ours.state_dict = lambda part=part: part
        found = peftkern.get_peft_model_state_dict(model)
        assert found.keys() == whole.keys()  # what it lacks comes from the model
        for key, value in found.items():
            changed = model is wrapped or "layers.1" not in key
            assert torch.equal(value, whole[key] + 1 if changed else whole[key])


def test_replaced_modules_are_seen():
    """No list of layers that could go stale: a layer that was put in later is switched as well."""
    ours = peftkern.get_peft_model(make("llama"), settings(peftkern))
    ours.add_adapter("b", settings(peftkern))
    other = peftkern.get_peft_model(make("llama"), settings(peftkern))
    other.add_adapter("b", settings(peftkern))
    attention = ours.base_model.model.model.layers[0].self_attn
    attention.q_proj = other.base_model.model.model.layers[0].self_attn.q_proj
    ours.set_adapter("b")
    assert attention.q_proj.active_adapters == ["b"]
    assert attention.q_proj.lora_A["b"].weight.requires_grad


def test_after_a_deletion_all_layers_use_the_same_adapter():
    """Each layer would take the first that is left in it, as HF PEFT's do."""
    found = []
    for lib in (peftkern, peft):
        model = lib.get_peft_model(
            make("llama"), settings(lib, target_modules=["q_proj", "k_proj"])
        )
        model.add_adapter("x", settings(lib, target_modules=["q_proj"]))
        model.add_adapter("y", settings(lib, target_modules=["k_proj"]))
        model.delete_adapter("default")
        found.append((model.active_adapters, model.get_model_status().active_adapters))
    assert found == [(["x"], ["x"]), (["x"], "irregular")]


def test_status_names_the_quantisation():
    """Told by the classes of the base layer and its weight, which are stood in for."""
    named = {"bitsandbytes.nn.modules.Linear4bit": "bnb 4bit", "hqq.core.quantize.HQQLinear": "hqq"}
    for full, name in named.items():
        ours = peftkern.get_peft_model(make("llama"), settings(peftkern))
        first_layer, other = (m for m in ours.modules() if isinstance(m, LoraLayer))
        module, _, cls = full.rpartition(".")
        first_layer.base_layer.__class__ = type(cls, (nn.Linear,), {"__module__": module})
        found = {s.quantization_backend for s in ours.get_layer_status()}
        assert found == {name, None} and other.quantization_backend is None
        assert ours.get_model_status().quantization_backend == "irregular"


def test_several_copies_of_a_head_cannot_be_active_at_once():
    ours = peftkern.get_peft_model(
        make("llama", "SEQ_CLS"), settings(peftkern, task_type="SEQ_CLS")
    )
    ours.add_adapter("b", settings(peftkern))
    before = state(ours)
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        ours.base_model.set_adapter(["default", "b"])
    assert state(ours) == before and ours.active_adapters == ["default"]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m: m.set_adapter("c"), ValueError, "Adapter c not found."),
        (lambda m: m.delete_adapter("c"), ValueError, "Adapter c does not exist"),
        (lambda m: (m.merge_adapter(), m.delete_adapter("default")), ValueError, "while they are"),
        (lambda m: m.add_adapter("b", settings(peftkern)), ValueError, "already exists"),
        (
            lambda m: m.add_adapter("c", settings(peftkern, target_modules=["nothing"])),
            peftkern.NoMatchingPeftModuleError,
            "nothing",
        ),
        (lambda m: peftkern.get_layer_status(nn.Linear(2, 2)), ValueError, "No adapter layers"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refusals(call, error, says):
    ours = peftkern.get_peft_model(make("llama"), settings(peftkern))
    ours.add_adapter("b", settings(peftkern))
    flags = state(ours)[0]
    with pytest.raises(error, match=says):
        call(ours)
    assert state(ours)[0] == flags and set(ours.peft_config) == {"default", "b"}


def test_an_adapter_that_cannot_be_deleted_stays_whole():
    """Of a fully trained module's copies one is in use: refused before a layer has lost its own."""
    model = peftkern.get_peft_model(
        make("llama"), settings(peftkern, modules_to_save=["lm_head"]), adapter_name="one"
    )
    for name in ("b", "c"):
        model.add_adapter(name, settings(peftkern))
    model.base_model.set_adapter(["one", "b", "c"])
    before = state(model)
    with pytest.raises(ValueError, match="multiple"):
        model.delete_adapter("one")
    assert state(model) == before and list(model.peft_config) == ["one", "b", "c"]


def test_saved_after_the_first_of_several_active_ones_is_deleted(tmp_path):
    model = peftkern.get_peft_model(make("llama"), settings(peftkern), adapter_name="one")
    for name in ("b", "c"):
        model.add_adapter(name, settings(peftkern))
    model.base_model.set_adapter(["one", "b", "c"])
    model.delete_adapter("one")
    assert model.active_peft_config is model.peft_config["b"]
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").exists() and (tmp_path / "c").is_dir()


def test_a_failed_load_keeps_the_adapters_that_were_there(tmp_path):
    peftkern.get_peft_model(make("llama"), settings(peftkern)).save_pretrained(tmp_path)
    base = make("llama")
    model = peftkern.get_peft_model(base, settings(peftkern))
    before = state(model)
    (tmp_path / "adapter_config.json").write_text(
        (tmp_path / "adapter_config.json").read_text().replace('"r": 3', '"r": 4')
    )
    with pytest.raises(RuntimeError, match="size mismatch"):
        peftkern.PeftModel.from_pretrained(base, tmp_path, adapter_name="x")
    assert base.peft_config is model.peft_config and list(model.peft_config) == ["default"]
    assert state(model) == before
