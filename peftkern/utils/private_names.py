"""The register of private names of torch, transformers and accelerate that the code uses.

These libraries do not promise to keep them. Each is listed with the reason for its use and with
what happens in a version without it, and is used only through :mod:`peftkern.utils.private`.
``tests/test_private_names.py`` looks for each in the installed versions, and for unlisted ones in
the sources. Only these may be used in any file:

- ``IN_PLACE``: torch's names that will not disappear. ``nn.Module``'s own dicts are in every
  pickled module, and much other code reads them; :attr:`Tensor._version` is in torch's
  documentation.
- ``OVERRIDDEN``: methods of these libraries that classes here override.
"""

from __future__ import annotations

import warnings
from importlib import metadata
from typing import NamedTuple


class Private(NamedTuple):
    """A private name: library, name, reason for its use, and the effect of its absence."""

    of: str
    name: str
    why: str
    without: str


IN_PLACE = frozenset(
    "_parameters _buffers _modules _non_persistent_buffers_set _forward_hooks _forward_pre_hooks "
    "_backward_hooks _backward_pre_hooks _state_dict_hooks _state_dict_pre_hooks _version".split()
)

OVERRIDDEN = (
    Private(
        "torch",
        "nn.Module._apply",
        "moves and casts parameters one by one, which unties adapters that share a weight",
        "`model.to(...)` leaves two copies of a tied adapter's weight",
    ),
    Private(
        "torch",
        "nn.MultiheadAttention._qkv_same_embed_dim",
        "torch's functions read it from the layer that stands for their attention",
        "nothing: what they read instead comes from the base layer or fails by its name",
    ),
    Private(
        "transformers",
        "Trainer._get_output_dir",
        "checkpoints of `peftkern train` are written aside and renamed when complete",
        "a run that is killed while it saves may leave half a checkpoint",
    ),
    Private(
        "transformers",
        "Trainer._save_checkpoint",
        "as `_get_output_dir`",
        "no checkpoint of `peftkern train` gets its manifest, so that none is gone on from",
    ),
    Private(
        "transformers",
        "Trainer._save",
        "Trainer saves adapters alone only for HF PEFT's class",
        "checkpoints of `peftkern train` hold the base model",
    ),
    Private(
        "transformers",
        "Trainer._save_rng_state",
        "of several processes of `peftkern train` the first one writes the random states of all",
        "each process writes its own, into a checkpoint that may be complete already",
    ),
    Private(
        "transformers",
        "Trainer._load_from_checkpoint",
        "Trainer loads adapters alone only for HF PEFT's class",
        "`peftkern train` cannot go on from a checkpoint",
    ),
    Private(
        "transformers",
        "PreTrainedModel._upload_modified_files",
        "`push_to_hub` writes a card of its own over the adapter's",
        "an adapter on the hub has transformers' card",
    ),
)

REGISTER = (
    Private(
        "torch",
        "_assert_async",
        "an expert's index out of range is an error without a wait for the device",
        "on CUDA such an index gives wrong numbers",
    ),
    Private(
        "torch",
        "_C._are_functorch_transforms_active",
        "vmap, grad and jvp of torch.func cannot look into a fused operation",
        "one warning; every call goes as if one were active: right, and slow",
    ),
    Private(
        "torch",
        "autograd.forward_ad._current_level",
        "forward-mode AD cannot look into a fused operation, and has no public question",
        "one warning; every call goes as if it were on: right, and slow",
    ),
    Private(
        "torch",
        "_C._functorch.is_legacy_batchedtensor",
        "gradients of a batch of outputs (`is_grads_batched`) have no memory for a kernel",
        "such gradients raise torch's error, in an MLP's operation and on kernels",
    ),
    Private(
        "torch",
        "_functorch.pyfunctorch.temporarily_clear_interpreter_stack",
        "owners dequantise with autograd functions, which no transform of torch.func takes",
        "transforms of models with such weights (quanto's in 2 and 4 bits) raise torch's error",
    ),
    Private(
        "torch",
        "_C._is_tracing",
        "torch.jit.is_tracing at a third of its cost, asked in every call of every layer",
        "torch.jit.is_tracing",
    ),
    Private(
        "torch",
        "_C._len_torch_dispatch_stack",
        "whether any dispatch mode is on, before the import that hides a race from them",
        "the modes are switched off whether there are some or not",
    ),
    Private(
        "torch",
        "sgemm_batch_64 and dgemm_batch_64 in the libraries of torch._C",
        "MKL's products of a mixed batch read each adapter's factors where they lie, on a CPU",
        "the factors are copied side by side for torch's batched products; the log says so once",
    ),
    Private(
        "torch",
        "_C._dynamo.guards.TensorGuards",
        "whether a hundred tensors are as those of the call before, in one call",
        "each tensor is asked in Python, which takes longer",
    ),
    *(
        Private(
            "torch",
            f"utils.{name}",
            "an operation's output that selective checkpointing keeps may not be written to",
            "within a dispatch mode no output is written to: right, with more memory",
        )
        for name in (
            "_python_dispatch._get_current_dispatch_mode_stack",
            "checkpoint._CachingTorchDispatchMode",
            "checkpoint._CachedTorchDispatchMode",
        )
    ),
    Private(
        "torch",
        "utils._python_dispatch._disable_current_modes",
        "counters and selective checkpointing must not see the calls of a race",
        "a race within a dispatch mode raises PrivateNameError",
    ),
    Private(
        "torch",
        "_C._current_graph_task_id",
        "MonteCLoRA draws anew in every forward, but not in a replay within backward",
        "a forward of MonteCLoRA raises PrivateNameError",
    ),
    Private(
        "torch",
        "Tensor._make_wrapper_subclass",
        "a quantised weight passes through operations and autograd as a tensor without data",
        "layers with quantised weights run as base layer + update; `explain` says why",
    ),
    Private(
        "torch",
        "_C._disabled_torch_function_impl",
        "spares a quantised weight, as a tensor's subclass, a detour in each of torch's calls",
        "each call with a quantised weight takes some microseconds more",
    ),
    Private(
        "torch",
        "ops.aten._weight_int8pack_mm",
        "a few rows in bf16 times an int8 weight take a fifth of the time on a CPU",
        "the weight is dequantised for them",
    ),
    Private(
        "torch",
        "ops.aten._int_mm",
        "x in digits times an int8 weight takes half the time of float32 or less on some CPUs",
        "the weight becomes float32 for the product",
    ),
    Private(
        "torch",
        "ops.aten._unsafe_view",
        "an output that is a view of what a Function made may not be written to by callers",
        "outputs of more than two dimensions are copied",
    ),
    *(
        Private(
            "torch",
            f"ops.aten._scaled_dot_product_flash_attention{kind}",
            "attention that returns its log-sum-exp, and its backward, which takes a merged one",
            "prefix attention is not computed in parts; `explain` says why",
        )
        for kind in ("", "_backward", "_for_cpu", "_for_cpu_backward")
    ),
    *(
        Private(
            "torch",
            f"nn.modules.module._global_{kind}_hooks",
            "a fused call skips the modules' own calls, and must not skip a hook on all modules",
            "one warning; every module counts as hooked: right, and slow",
        )
        for kind in ("forward", "forward_pre", "backward", "backward_pre")
    ),
    Private(
        "torch",
        "utils.hooks.RemovableHandle.next_id",
        "tells whether a hook was registered anywhere since the last look for one",
        "hooks are looked for in every call",
    ),
    Private(
        "torch",
        "nn.Conv2d._conv_forward",
        "a convolution with other weights than its own, padded its own way",
        "DoRA on a convolution raises PrivateNameError",
    ),
    Private(
        "torch",
        "distributions.Wishart._bartlett_sampling",
        "the draws of MonteCLoRA's variances",
        "a MonteCLoRA adapter raises PrivateNameError",
    ),
    Private(
        "torch",
        "nn.Module._compiled_call_impl",
        "whether `model.compile()` was called",
        "preparing such a model for hot-swapping says nothing of the second compilation",
    ),
    Private(
        "torch",
        "compile(...)._orig_mod",
        "the model within torch.compile's wrapper, which puts it into the names of weights",
        "adapters of a wrapped model are not found: saving and hot-swapping raise",
    ),
    Private(
        "torch",
        "FSDP(...)._fsdp_wrapped_module",
        "names of weights within FSDP's wrappers",
        "saving an adapter of a model that FSDP wrapped raises, since its names are unknown",
    ),
    Private(
        "torch",
        "distributed.distributed_c10d._get_default_store",
        "the store in which processes found each other; notes on their adapters go through it, as "
        "they wait for nobody",
        "ranks with different adapters are not told of it before a collective fails",
    ),
    Private(
        "torch",
        "distributed.fsdp.FSDPModule._get_fsdp_state",
        "whether FSDP2 has run a module (its state's `_is_root`): from then on it gathers from "
        "memory that a cast of the parameters does not reach",
        "`prepare_model_for_kbit_training` after a forward has no effect on sharded weights",
    ),
    Private(
        "torch",
        "checkpoint_wrapper(...)._checkpoint_wrapped_module",
        "names of weights within torch's checkpoint wrappers",
        "as with FSDP's",
    ),
    Private(
        "transformers",
        "PreTrainedModel._keep_in_fp32_modules",
        "names the layers that transformers leaves out when it quantises, as the model reads the "
        "dtype of their weight (T5's `wo`)",
        "`quantize_base` makes those fp8 too, and T5 fails in its forward",
    ),
    Private(
        "transformers",
        "PreTrainedConfig._attn_implementation",
        "the attention that a model calls now; it has no public name",
        "injecting a prefix raises PrivateNameError",
    ),
    Private(
        "transformers",
        "PreTrainedModel._is_stateful",
        "a runner's steps rest on a cache of keys and values; no public name tells another state",
        "nothing: such a model is taken for one without another state",
    ),
    Private(
        "transformers",
        "PreTrainedConfig._attn_implementation_internal",
        "sets it for one configuration: the public way changes those within it, and checks a list",
        "injecting a prefix raises PrivateNameError",
    ),
    Private(
        "transformers",
        "GradientCheckpointingLayer._gradient_checkpointing_func",
        "what a replay has to be handed (offsets of aLoRA, the pass that a prefix is in)",
        "checkpointed models: PrivateNameError for aLoRA, AttributeError by this name for a prefix",
    ),
    Private(
        "transformers",
        "GradientCheckpointingLayer._can_checkpoint_with_cache",
        "a checkpointed layer is given no cache otherwise, and a prefix is found through it",
        "PrivateNameError when a prefix is injected into a family whose blocks are wrapped",
    ),
    Private(
        "transformers",
        "GPT2Attention._upcast_and_reordered_attn",
        "GPT-2's second eager attention, which is a method",
        "AttributeError by this name in GPT-2 models with reorder_and_upcast_attn",
    ),
    Private(
        "transformers",
        "RecurrentGemmaPreTrainedModel._setup_cache",
        "the states that a recurrent model starts from stand in its layers",
        "a prefix in the cache of RecurrentGemma starts from the states of the call before",
    ),
    Private(
        "transformers",
        "conversion_mapping._MODEL_TO_CONVERSION_PATTERN",
        "which models have their experts stacked, so that a config's old names find them",
        "old names of experts match no module (ValueError), but for mixtral's own",
    ),
    Private(
        "transformers",
        "PreTrainedModel._no_split_modules",
        "the layers that a device map, and FSDP, keep in one piece",
        "FSDP wraps what FSDP_TRANSFORMER_CLS_TO_WRAP names, and adapters",
    ),
    Private(
        "transformers",
        "PreTrainedModel._tied_weights_keys",
        "weights that are one while the model is on the meta device, where storages do not tell",
        "as for a model that ties nothing by name: told by storage alone",
    ),
    Private(
        "transformers",
        "model._checkpoint_conversion_mapping",
        "renamed weights of models with code of their own, written for transformers 4",
        "as for a model without one; since transformers 5 its own models have none",
    ),
    Private(
        "transformers",
        "PreTrainedConfig.to_dict()['_name_or_path']",
        "the base model that a card names",
        "a new card names no base model",
    ),
    Private(
        "torch",
        "nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model",
        "it broadcasts the frozen weights too, gigabytes that each process has read from its files",
        "they are broadcast, which fails for weights in fp8",
    ),
    Private(
        "transformers",
        "TrainingArguments._n_gpu",
        "Trainer splits batches with nn.DataParallel where there are several GPUs",
        "`peftkern train` on several GPUs raises PrivateNameError",
    ),
    Private(
        "transformers",
        "the text 'ALL_ATTENTION_FUNCTIONS' in an attention's forward (inspect.getsource)",
        "whether an attention asks for its implementation, so that a prefix can stand before it",
        "the model is refused, by the class's name",
    ),
    Private(
        "transformers",
        "the text of an MLP's forward (inspect.getsource)",
        "whether it is down(act(gate(x)) * up(x)), which one operation can compute",
        "its linears and its activation are computed one by one",
    ),
    Private(
        "transformers",
        "use_experts_implementation.<locals>.wrapper.<locals>.forward",
        "whether a class of experts is in the experts interface: its forward has this code",
        "the experts get W + scaling · B A for all experts; `explain` says why; for "
        "`target_parameters` 'all-experts' is an error that lists their names",
    ),
    *(
        Private("transformers", name, why, "as without the code of the interface's forward")
        for name, why in (
            ("integrations.moe._default_apply_gate", "whether a gate is one that kernels know"),
            ("experts._apply_gate", "the gate of a class of experts"),
            ("experts.config._experts_implementation", "the implementation that is replaced"),
        )
    ),
    Private(
        "transformers",
        "experts._is_expert_parallel",
        "whether an index beyond the experts stands for one of another process",
        "as in 5.17, which lacks it: such an index adds nothing",
    ),
    Private(
        "accelerate",
        "module._hf_hook",
        "weights kept elsewhere are brought in, to be merged into or adapted as parameters",
        "merging into an offloaded layer raises ValueError, as its weight is on the meta device; "
        "calls of adapted parameters fail in torch",
    ),
    Private(
        "bitsandbytes",
        "gemv_4bit_inference_cpu_nf4_bf16 and ..._fp4_bf16 in its library",
        "the product behind its operator, whose Python takes longer than the product of a row",
        "the operator is called: the same numbers, in more time",
    ),
    Private(
        "bitsandbytes",
        "backends.cpu.ops.gemm_4bit_forward_kernel",
        "whether the operator runs another kernel than that of the library",
        "the operator is called: the same numbers, in more time",
    ),
    Private(
        "compressed_tensors",
        "module._original_forward_func",
        "the forward that the owner's wrapper around every module of a compressed model calls",
        "wrapped layers count as hooked and run as base layer + update",
    ),
    Private(
        "accelerate",
        "module._old_forward",
        "whose forward a hook of accelerate's stands before",
        "an offloaded model does not count as transformers' own: its prefix is checked first",
    ),
)


class PrivateNameError(RuntimeError):
    """The installed version lacks a private name for which there is no replacement."""

    def __init__(self, name: str) -> None:
        entry = next(p for p in REGISTER if p.name == name)
        super().__init__(
            f"{entry.of} {metadata.version(entry.of)} has no {name}, which is needed for this: "
            f"{entry.why}. An older version has it; please report this one to peftkern."
        )


def warn_without(name: str) -> None:
    """Warn that a private name is missing, and say what is done instead."""
    entry = next(p for p in REGISTER if p.name == name)
    what = f"{entry.of} {metadata.version(entry.of)} has no {name} ({entry.why})"
    warnings.warn(f"{what}: {entry.without}", RuntimeWarning, stacklevel=3)
