"""The register of private names: each exists in the installed versions, and no other is used."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from peftkern.tuners.lora.mlp_formula import formula_of
from peftkern.utils import module_tree, private, tied
from peftkern.utils.private_names import IN_PLACE, OVERRIDDEN, REGISTER, Private, PrivateNameError
from tests.tiny import make

pytestmark = pytest.mark.numeric  # of `make test-versions`

ROOT = Path(__file__).resolve().parents[1]
HERE = ("private.py", "private_names.py")
SOURCES = [
    p
    for folder in ("peftkern", "kernels")
    for p in sorted((ROOT / folder).rglob("*.py"))
    if p.name not in HERE
]

# ------------------------------------------------------- each is where the register says it is


def at(path: str) -> Any:
    """The object of torch or transformers with a dotted name; AttributeError if there is none."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for name in parts[count:]:
            found = getattr(found, name)
        return found
    raise AttributeError(path)


def compiled() -> bool:
    model = nn.Linear(2, 2)
    wrapped: Any = torch.compile(model)
    called = nn.Linear(2, 2)
    assert not private.is_compiled(called)
    called.compile()
    assert private.is_compiled(called) and private.is_compiled(wrapped)
    return (
        private.uncompiled(wrapped) is model
        and private.uncompiled(model) is model
        and all(name.startswith(private.COMPILED) for name in wrapped.state_dict())
    )


def fsdp() -> bool:
    return at("torch.distributed.fsdp._common_utils.FSDP_PREFIX") in private.WRAPPERS


def checkpoint_wrapper() -> bool:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as module

    wrapped = module.checkpoint_wrapper(nn.Linear(2, 2))
    return all(f"{name}." in private.WRAPPERS for name, _ in wrapped.named_children())


def attention_is_set() -> bool:
    model = make("llama")
    private.set_attention(model.config, "eager")
    assert private.attention_name(model.config) == "eager"
    private.set_attention(model.config, "sdpa")
    return model.config._attn_implementation_internal == "sdpa"


def checkpoints() -> bool:
    model = make("llama")
    assert private.checkpoint_runners(model) == []
    model.gradient_checkpointing_enable()
    found = private.checkpoint_runners(model)
    return all(layer in found for layer in model.model.layers)


def one_gpu(monkeypatch: pytest.MonkeyPatch) -> bool:
    args = tf.TrainingArguments(use_cpu=True, report_to="none")
    args._n_gpu = 4
    assert args.n_gpu == 4
    private.use_one_gpu(args)
    return args.n_gpu == 1


def bnb4_gemv() -> bool:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    return set(private.bnb4_gemv()) == {"nf4", "fp4"} or not functional.has_avx512bf16()


def compressed_wrapper() -> bool:
    from compressed_tensors.offload.module import offload_module

    wrapped = nn.Linear(2, 2)
    offload_module(wrapped, torch.device("cpu"), torch.device("cpu"))
    return private.compressed_forward(wrapped) is nn.Linear.forward


def accelerate_hook() -> Any:
    from accelerate.hooks import ModelHook, add_hook_to_module

    module = nn.Linear(2, 2)
    before, hook = module.forward, ModelHook()
    assert private.hook_of(module) is None and private.forward_of(module) == before
    add_hook_to_module(module, hook)
    return private.hook_of(module) is hook, private.forward_of(module) == before


def model_declares(attribute: str) -> bool:
    return bool(getattr(tf.LlamaForCausalLM, attribute))


def kept_wide() -> list[str]:
    sizes = dict(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=8)
    return private.kept_wide(tf.T5Model(tf.T5Config(**sizes)))  # type: ignore[arg-type]


def experts() -> Any:
    """A module of experts of a tiny model."""
    return make("qwen3_moe").model.layers[0].mlp.experts


def experts_flag() -> bool:
    source = Path(at("transformers.integrations.moe").__file__).read_text()
    return "_is_expert_parallel" in vars(experts()) or "_is_expert_parallel" not in source  # 5.17


LAYER = "transformers.modeling_layers.GradientCheckpointingLayer"
# {name: how to tell that it is there, where it is not an attribute to be found by its path}
PROBES: dict[str, Callable[[], Any]] = {
    "sgemm_batch_64 and dgemm_batch_64 in the libraries of torch._C": lambda: (
        set(private.mkl_batches()) == {torch.float32, torch.float64}
        or not torch.backends.mkl.is_available()
    ),
    "gemv_4bit_inference_cpu_nf4_bf16 and ..._fp4_bf16 in its library": bnb4_gemv,
    "backends.cpu.ops.gemm_4bit_forward_kernel": bnb4_gemv,
    "compile(...)._orig_mod": compiled,
    "nn.Module._compiled_call_impl": compiled,
    "FSDP(...)._fsdp_wrapped_module": fsdp,
    "checkpoint_wrapper(...)._checkpoint_wrapped_module": checkpoint_wrapper,
    "distributions.Wishart._bartlett_sampling": lambda: (
        private.bartlett(torch.distributions.Wishart(4.0, scale_tril=torch.eye(3))).shape == (3, 3)
    ),
    "PreTrainedConfig._attn_implementation": attention_is_set,
    "PreTrainedConfig._attn_implementation_internal": attention_is_set,
    "GradientCheckpointingLayer._gradient_checkpointing_func": checkpoints,
    f"GradientCheckpointingLayer.{private.KEEPS_CACHE}": lambda: hasattr(
        at(LAYER), private.KEEPS_CACHE
    ),
    "GPT2Attention._upcast_and_reordered_attn": lambda: at(
        "transformers.models.gpt2.modeling_gpt2.GPT2Attention._upcast_and_reordered_attn"
    ),
    "RecurrentGemmaPreTrainedModel._setup_cache": lambda: private.recurrent_start(
        at("transformers.RecurrentGemmaPreTrainedModel")
    ),
    "conversion_mapping._MODEL_TO_CONVERSION_PATTERN": private.conversion_families,
    "PreTrainedModel._keep_in_fp32_modules": lambda: kept_wide() == ["wo"],
    "PreTrainedModel._is_stateful": lambda: (
        at("transformers.PreTrainedModel._is_stateful") in (0, 1)
        and private.keeps_other_state(SimpleNamespace(_is_stateful=True))
    ),
    "PreTrainedModel._no_split_modules": lambda: model_declares(private.NO_SPLIT),
    "PreTrainedModel._tied_weights_keys": lambda: model_declares(private.TIED),
    # transformers 5 has it no longer; HF PEFT reads it, for models with code of their own
    "model._checkpoint_conversion_mapping": lambda: (
        private.RENAMED in (Path(at("peft.__file__")).parent / "peft_model.py").read_text()
    ),
    "PreTrainedConfig.to_dict()['_name_or_path']": lambda: (
        tf.LlamaConfig(name_or_path="x").to_dict()[private.NAME_KEY] == "x"
    ),
    "TrainingArguments._n_gpu": lambda: one_gpu,
    "the text 'ALL_ATTENTION_FUNCTIONS' in an attention's forward (inspect.getsource)": lambda: (
        private.asks_for_attention(make("llama").model.layers[0].self_attn)
        and not private.asks_for_attention(nn.Linear(2, 2))
    ),
    "the text of an MLP's forward (inspect.getsource)": lambda: (
        formula_of(type(make("llama").model.layers[0].mlp)) is not None
        and formula_of(nn.Linear) is None
    ),
    "use_experts_implementation.<locals>.wrapper.<locals>.forward": lambda: (
        private.experts_form(type(experts())) is not None
        and private.experts_form(nn.Linear) is None
    ),
    "experts._apply_gate": lambda: (
        hasattr(experts(), private.EXPERTS_GATE)
        and private.experts_form(type(experts())).default_gate  # type: ignore[union-attr]
    ),
    "experts.config._experts_implementation": lambda: (
        private.experts_implementation(experts()) == "grouped_mm"
    ),
    "experts._is_expert_parallel": experts_flag,
    "module._hf_hook": lambda: accelerate_hook()[0],
    "module._old_forward": lambda: accelerate_hook()[1],
    "module._original_forward_func": compressed_wrapper,
    "nn.MultiheadAttention._qkv_same_embed_dim": lambda: hasattr(
        nn.MultiheadAttention(4, 2), "_qkv_same_embed_dim"
    ),
}


def is_there(entry: Private) -> bool:
    probe = PROBES.get(entry.name, lambda: at(f"{entry.of}.{entry.name}"))
    try:
        found = probe()
        return found is not None and found is not False
    except (AttributeError, ImportError, KeyError, PrivateNameError):
        return False


@pytest.mark.parametrize("entry", [*REGISTER, *OVERRIDDEN], ids=lambda e: e.name)
def test_the_name_is_there(entry: Private) -> None:
    pytest.importorskip(entry.of)  # owners of quantised weights are not in every environment
    assert is_there(entry), (
        f"{entry.of} {metadata.version(entry.of)} has no {entry.name} any longer, which is used "
        f"because: {entry.why}. Without it: {entry.without}."
    )


@pytest.mark.parametrize("name", sorted(IN_PLACE))
def test_names_used_in_place_are_there(name: str) -> None:
    owner = torch.zeros(1) if name == "_version" else nn.Linear(2, 2)
    assert hasattr(owner, name), f"torch {torch.__version__} has no {name}, which the code reads"


def test_a_name_that_is_gone_is_seen() -> None:
    assert not is_there(Private("torch", "_C._no_such_function", "", ""))
    assert not is_there(Private("transformers", "no_such_module._name", "", ""))


# ----------------------------------------------------------------------- what happens without


def without(*names: str) -> ModuleType:
    """The access to private names as it is imported where torch lacks these, all warnings shown."""
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            owner, _, attribute = f"torch.{name}".rpartition(".")
            if owner == "torch.ops.aten":
                real = torch.ops.aten.__class__.__getattr__

                def lacking(self: Any, asked: str, real: Any = real) -> Any:
                    if self is torch.ops.aten and f"ops.aten.{asked}" in names:
                        raise AttributeError(asked)
                    return real(self, asked)

                patch.delattr(torch.ops.aten, attribute, raising=False)
                patch.setattr(torch.ops.aten.__class__, "__getattr__", lacking)
            else:
                patch.delattr(at(owner), attribute)
        spec = importlib.util.spec_from_file_location(
            "peftkern.utils.private_without", private.__file__
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def test_without_the_question_for_transforms_one_is_taken_to_be_active() -> None:
    with pytest.warns(RuntimeWarning, match="right, and slow"):
        poor = without("_C._are_functorch_transforms_active")
    assert poor.transforms_active() is True and private.transforms_active() is False


def test_without_the_level_of_forward_mode_ad_one_is_taken_to_be_active() -> None:
    with pytest.warns(RuntimeWarning, match="right, and slow"):
        poor = without("autograd.forward_ad._current_level")
    assert poor.in_transform() is True and private.in_transform() is False
    with torch.autograd.forward_ad.dual_level():
        assert private.in_transform() is True


def test_without_the_fast_question_for_tracing_the_public_one_is_asked() -> None:
    from torch.jit import is_tracing  # type: ignore[attr-defined]

    assert without("_C._is_tracing").jit_is_tracing is is_tracing


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "backward", "backward_pre"])
def test_without_the_dicts_of_global_hooks_all_is_hooked(kind: str) -> None:
    with pytest.warns(RuntimeWarning, match=f"_global_{kind}_hooks"):
        poor = without(f"nn.modules.module._global_{kind}_hooks")
    assert any(poor.GLOBAL_HOOKS) and not any(private.GLOBAL_HOOKS)


def test_without_the_count_of_hooks_they_are_looked_for_every_time() -> None:
    counter = without("utils.hooks.RemovableHandle.next_id").HookCounter
    assert counter.next_id != counter.next_id


def test_without_assertions_on_the_device_nothing_is_asked() -> None:
    false = torch.zeros((), dtype=torch.bool)
    with pytest.raises(RuntimeError, match="out of range"):
        private.assert_later(false, "out of range")
    without("_assert_async").assert_later(false, "out of range")


def test_without_tensors_that_have_no_data_quantised_weights_are_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peftkern.ops.bases import formats

    # "Tensor._make_wrapper_subclass" cannot be taken from its class, so what was found is replaced
    assert private.make_wrapper == torch.Tensor._make_wrapper_subclass
    monkeypatch.setattr(formats, "make_wrapper", None)
    said = formats.checked(lambda module: pytest.fail("it was read"), torch.nn.Linear(2, 2))
    assert isinstance(said, str) and "_make_wrapper_subclass" in said


def test_without_the_disabled_function_torch_takes_its_detour() -> None:
    taken = without("_C._disabled_torch_function_impl").DisabledTorchFunction
    assert taken == torch.Tensor.__torch_function__


def test_without_torchs_products_with_int8_there_are_none() -> None:
    assert without("ops.aten._weight_int8pack_mm").int8_product is None
    assert private.int8_product is not None
    assert without("ops.aten._int_mm").integer_product is None
    assert private.integer_product is not None


def test_without_unsafe_view_outputs_are_copied() -> None:
    made = without("ops.aten._unsafe_view").unsafe_view
    x = torch.randn(6, 2)
    y = made(x, (2, 3, 2))
    assert torch.equal(y, private.unsafe_view(x, (2, 3, 2))) and not y._is_view()
    assert y.data_ptr() != x.data_ptr()


def test_without_attention_in_parts_prefix_attention_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peftkern.ops import prefix_merge
    from peftkern.ops.prefix_rule import Rule

    poor = without("ops.aten._scaled_dot_product_flash_attention_for_cpu_backward")
    assert poor.cpu_flash_backward is None and poor.cpu_flash is not None
    monkeypatch.setattr(prefix_merge, "_KNOWS_PARTS", False)
    reason = prefix_merge.why_not(torch.zeros(1, 1, 2, 8), Rule(1.0, False, 0))
    assert reason is not None and torch.__version__ in reason


@pytest.mark.parametrize("kind", ["nothing", "depth", "both"])
def test_without_ways_around_dispatch_modes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import _python_dispatch

    seen = []

    class Mode(_python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    names = private if kind == "nothing" else without("_C._len_torch_dispatch_stack")
    if kind == "both":
        monkeypatch.delattr(_python_dispatch, "_disable_current_modes")
        with pytest.raises(PrivateNameError, match="_disable_current_modes"):
            names.without_dispatch_modes()
        return
    with Mode():
        torch.zeros(1).add(1)
        before = len(seen)
        with names.without_dispatch_modes():
            torch.zeros(1).add(1)
    assert before == len(seen) > 0


@pytest.mark.parametrize("name", ["use_experts_implementation", "_default_apply_gate"])
def test_without_the_experts_interface_no_class_is_in_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = type(experts())
    assert private.experts_form(cls) is not None
    monkeypatch.delattr(f"transformers.integrations.moe.{name}")
    assert private.experts_form(cls) is None


def test_without_the_flag_an_index_beyond_the_experts_counts_as_anothers() -> None:
    module = experts()
    module._is_expert_parallel = False
    assert not private.experts_have_sentinels(module)
    del module._is_expert_parallel
    assert private.experts_have_sentinels(module)


def test_without_the_question_for_batches_of_gradients_there_are_none() -> None:
    asked = []

    def ask(grad: torch.Tensor) -> torch.Tensor:
        asked.append((private.is_grad_batch(grad), poor.is_grad_batch(grad)))
        return grad

    poor = without("_C._functorch.is_legacy_batchedtensor")
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    y.register_hook(ask)
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(3))
    assert asked == [(True, False), (False, False)]


@pytest.mark.parametrize("kind", ["nothing", "depth", "stack", *private.SELECTIVE])
def test_without_the_modes_of_selective_checkpoints_all_outputs_are_kept(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import _python_dispatch, checkpoint

    names = without("_C._len_torch_dispatch_stack") if kind == "depth" else private
    if kind == "stack":
        monkeypatch.delattr(_python_dispatch, "_get_current_dispatch_mode_stack")
    elif kind in private.SELECTIVE:
        monkeypatch.delattr(checkpoint, kind)
    unknown = kind not in ("nothing", "depth")
    assert not names.outputs_are_kept() or unknown
    with _python_dispatch.TorchDispatchMode():
        assert names.outputs_are_kept() == unknown
    for mode in checkpoint.create_selective_checkpoint_contexts([]) if not unknown else ():
        with mode:
            assert names.outputs_are_kept()
    assert not names.outputs_are_kept()


class Lacking:
    """A class without any of the names that are looked up in an object."""


GONE: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "_C._current_graph_task_id": lambda patch: (
        patch.delattr(torch._C, "_current_graph_task_id"),
        private.in_backward(),
    ),
    "nn.Conv2d._conv_forward": lambda patch: private.convolve(
        Lacking(), torch.zeros(1), torch.zeros(1)
    ),
    "distributions.Wishart._bartlett_sampling": lambda patch: private.bartlett(Lacking()),
    "PreTrainedConfig._attn_implementation": lambda patch: private.attention_name(Lacking()),
    "PreTrainedConfig._attn_implementation_internal": lambda patch: (
        patch.setattr(tf.PreTrainedConfig, "_attn_implementation", "sdpa"),
        private.set_attention(tf.LlamaConfig(), "eager"),
    ),
    "GradientCheckpointingLayer._gradient_checkpointing_func": lambda patch: (
        patch.setattr(private, "CHECKPOINT_RUNNER", "_no_such_function"),
        (model := make("llama")).gradient_checkpointing_enable(),
        private.checkpoint_runners(model),
    ),
    f"GradientCheckpointingLayer.{private.KEEPS_CACHE}": lambda patch: (
        patch.delattr(at(LAYER), private.KEEPS_CACHE),
        private.keep_cache(make("llama").model.layers[0]),
    ),
    "RecurrentGemmaPreTrainedModel._setup_cache": lambda patch: (
        patch.setattr(Lacking, "config", tf.RecurrentGemmaConfig(), raising=False),
        private.recurrent_start(Lacking()),
    ),
    "TrainingArguments._n_gpu": lambda patch: (
        patch.setattr(tf.TrainingArguments, "n_gpu", 2),
        private.use_one_gpu(tf.TrainingArguments(use_cpu=True, report_to="none")),
    ),
}


@pytest.mark.parametrize("name", GONE)
def test_what_nothing_stands_in_for_is_one_clear_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = next(p for p in REGISTER if p.name == name)
    with pytest.raises(PrivateNameError) as caught:
        GONE[name](monkeypatch)
    said = str(caught.value)
    for words in (entry.name, entry.of, metadata.version(entry.of), entry.why):
        assert words in said


def test_without_what_models_declare_they_are_as_if_they_had_not() -> None:
    plain = nn.Linear(2, 2)
    assert module_tree.no_split_modules(plain) == set()
    assert tied.modules_tied_to_embedding(plain) == []
    assert private.hook_of(plain) is None
    assert private.recurrent_start(plain) is None
    assert not private.asks_for_attention(plain)


def test_without_the_families_only_mixtral_has_renamed_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(at("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN")
    assert private.conversion_families() == {}


# ------------------------------------------------------------------ and no other is in the code


def own_names(trees: list[ast.AST]) -> set[str]:
    """Names that our sources define: functions, classes, variables, and attributes of `self`."""
    own = set()
    for node in (n for tree in trees for n in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.alias) and node.asname:
            own.add(node.asname)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                own.add(node.attr)
    return own


def private_uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every private name that is read, written or imported from elsewhere.

    Strings that are such a name, or end in one, count too.
    """
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value.rstrip(".")
            names = [text] if text.isidentifier() else []
        for name in names:
            if name.startswith("_") and not name.endswith("__"):
                yield node.lineno, name


# Underscored names that are no library's: what stands in `__dict__` of layers and models of ours
# under a string alone, the standard library's, and parts of words.
NOT_THEIRS = {
    "_autocast_dtype", "_breaks_seen", "_noted_mixed", "_noted_reason", "_peft_loraga_grad",
    "_peftkern_prefix", "_peftkern_prefix_slot", "_lora_kasa_truncation_deferred",
    "_custom_modules", "_get_kasa_loss", "_get_monteclora_loss",  # names of HF PEFT
    "_last_lr",  # of a scheduler's state, which is in every checkpoint
    "_hf_peft", "_per_", "_B",
    "_bundled", "_pydatetime", "_pydecimal", "_pyio", "_strptime", "_threading_local",
    "_niter_", "_token_id", "_token_index", "_g", "_orig",
    "_replace", "_fields", "_asdict", "_make",  # of named tuples
    "_exit",  # of os, and public
}  # fmt: skip


def foreign_uses(sources: dict[str, str]) -> list[str]:
    """The places in these sources that use a library's private name that is not in the register."""
    trees = {where: ast.parse(source) for where, source in sources.items()}
    registered = {p.name.rpartition(".")[2] for p in REGISTER}
    allowed = own_names(list(trees.values())) - registered
    allowed |= {p.name.rpartition(".")[2] for p in OVERRIDDEN} | IN_PLACE | NOT_THEIRS
    return [
        f"{where}:{line}: {name}"
        for where, tree in trees.items()
        for line, name in private_uses(tree)
        if name not in allowed
    ]


@pytest.mark.long
def test_private_names_are_used_through_the_register_alone() -> None:
    sources = {str(p.relative_to(ROOT)): p.read_text() for p in SOURCES}
    assert foreign_uses(sources) == []
    assert "next_id" not in "".join(
        source.replace("HookCounter.next_id", "") for source in sources.values()
    )
    assert "getsource(" not in "".join(sources.values())


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._is_tracing()",
        "from torch.utils._python_dispatch import TorchDispatchMode",
        "from torch.distributed.fsdp.wrap import _or_policy",
        "import torch._dynamo",
        "getattr(module, '_hf_hook', None)",
        "config._attn_implementation_internal = 'eager'",
        "key.removeprefix('_orig_mod.')",
        "self._hf_hook = None",
    ],
)
def test_other_uses_are_seen(line: str) -> None:
    assert foreign_uses({"new.py": line})


def test_own_names_are_not_taken_for_theirs() -> None:
    source = """
class Layer:
    _kept: int
    def _own(self):
        self._other = super()._apply(1)
        return self._kept, self._parameters, getattr(self, "_other"), row._replace(a=1)
"""
    assert foreign_uses({"new.py": source}) == []
