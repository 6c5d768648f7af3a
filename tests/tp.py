"""Two processes that train and save adapters on a Llama under transformers' tensor parallelism.

``python -m tests.tp FOLDER CASE...`` forks two processes, which run these cases (of :data:`CASES`,
:data:`PROMPTS` and :data:`REST`) and save their numbers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import peftkern
from peftkern.checkpoint import saving
from tests.ranks import fork, whole

RANKS, STEPS = 2, 2
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# every rank has all of what these layers take and give
WHOLE = {
    "model.layers.*.mlp.gate_proj": "colwise_gather_output",
    "model.layers.*.mlp.up_proj": "colwise_gather_output",
    "model.layers.*.mlp.down_proj": "rowwise_split_input",
}
# {name: settings of the adapter, and what is special}
_OLDER = {"colwise_gather_output": "colwise_rep", "rowwise_split_input": "rowwise_rep"}
CASES: dict[str, dict[str, Any]] = {
    "all layers": {"target_modules": ATTENTION + MLP},
    "whole inputs and outputs": {"target_modules": MLP, "plan": WHOLE},
    "dropout": {"target_modules": ATTENTION + MLP, "lora_dropout": 0.3},
    "dropout of whole inputs": {"target_modules": MLP, "plan": WHOLE, "lora_dropout": 0.3},
    "head and embedding": {"target_modules": ["lm_head", "embed_tokens"]},
    "tied embedding": {"target_modules": ["embed_tokens"], "tied": True},
    "biases": {"target_modules": ATTENTION + MLP, "bias": "lora_only"},
    "lora_bias": {"target_modules": ATTENTION + MLP, "lora_bias": True},
    "two adapters": {"target_modules": ATTENTION + MLP, "two": True},
    "checkpoints": {"target_modules": ATTENTION + MLP, "reentrant": False, "lora_dropout": 0.3},
    "reentrant checkpoints": {"target_modules": ATTENTION + MLP, "reentrant": True},
    "embedding by columns": {
        "target_modules": ["embed_tokens"],
        "plan": {"model.embed_tokens": "embedding_colwise"},
    },
    "DoRA": {"target_modules": [*ATTENTION, *MLP, "embed_tokens"], "use_dora": True},
    "DoRA with dropout": {
        "target_modules": [*ATTENTION, *MLP],
        "use_dora": True,
        "lora_dropout": 0.3,
    },
    "DoRA of whole inputs": {"target_modules": MLP, "plan": WHOLE, "use_dora": True},
    "DoRA with dropout of whole inputs": {
        "target_modules": MLP,
        "plan": WHOLE,
        "use_dora": True,
        "lora_dropout": 0.3,
    },
    "two of DoRA": {"target_modules": ATTENTION + MLP, "use_dora": True, "two": True},
    "two of DoRA of whole inputs": {
        "target_modules": MLP,
        "plan": WHOLE,
        "use_dora": True,
        "two": True,
    },
    "DoRA of an embedding by columns": {
        "target_modules": ["embed_tokens"],
        "plan": {"model.embed_tokens": "embedding_colwise"},
        "use_dora": True,
    },
    "modules in full": {
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "modules_to_save": ["lm_head", "embed_tokens", "v_proj", "down_proj"],
    },
    "a block in full": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "older names": {
        "target_modules": MLP,
        "plan": {name: _OLDER[style] for name, style in WHOLE.items()},
    },
}
ALL = {"target_modules": [*ATTENTION, *MLP, "lm_head", "embed_tokens"]}
_PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
PROMPTS: dict[str, Any] = {
    "prefix": lambda: peftkern.PrefixTuningConfig(**_PROMPT),
    "prefix of a network": lambda: peftkern.PrefixTuningConfig(
        **_PROMPT, prefix_projection=True, encoder_hidden_size=8
    ),
    "virtual tokens": lambda: peftkern.PromptTuningConfig(
        **_PROMPT, prompt_tuning_init="SAMPLE_VOCAB"
    ),
}
# what is refused, each with the settings that ask for it
REFUSED: dict[str, dict[str, Any]] = {
    "KaSA": {"target_modules": ["o_proj"], "kasa_config": peftkern.KasaConfig()},
    "CorDA": {"target_modules": ["o_proj"], "init_lora_weights": "corda"},
    "tokens": {"target_modules": ["o_proj"], "trainable_token_indices": [1, 2]},
    "replication": {"target_modules": ["o_proj"], "layer_replication": [[0, 2], [1, 2]]},
}
# and of a model that FSDP has divided too
DIVIDED: dict[str, dict[str, Any]] = {
    "FSDP too": {"target_modules": ["embed_tokens", "o_proj"]},
    "FSDP too, in full": {"target_modules": ["embed_tokens"], "modules_to_save": ["mlp"]},
}
_OWN = ("tied", "plan", "two", "reentrant")


def save_llama(folder: Path, tied: bool = False, heads: int = 4) -> None:
    """A Llama with sizes that the ranks cannot share out evenly, but for its 4 heads of 8."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=8 * heads,
        intermediate_size=45,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=1 if heads % 2 else 2,
        max_position_embeddings=32,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).double()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    model.save_pretrained(folder)


def llama(folder: Path, shared: bool, plan: Any = None, dtype: torch.dtype = torch.float64) -> Any:
    """The saved Llama, in this process alone or shared out over all."""
    how: dict[str, Any] = {}
    if shared:
        from transformers.distributed import DistributedConfig

        how["distributed_config"] = DistributedConfig(tp_plan=plan or "auto", tp_size=RANKS)
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, **how)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """A loss in float64; transformers' own is computed in float32."""
    logits = model(input_ids=ids).logits[:, -ids.shape[1] :]
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def config_of(case: dict[str, Any]) -> Any:
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
    settings |= {k: v for k, v in case.items() if k not in _OWN}
    return peftkern.LoraConfig(**settings)


def numbers(case: dict[str, Any], folder: Path, rank: int | None, files: Path) -> dict[str, Any]:
    """What a case computes, by name; ``rank`` is the process's, None for one process alone."""
    folder = folder / ("tied" if case.get("tied") else "llama")
    model = llama(folder, rank is not None, case.get("plan"))
    torch.manual_seed(1 + (rank or 0))  # the adapter's start is the first rank's nevertheless
    model = peftkern.get_peft_model(model, config_of(case))
    if case.get("two"):
        model.add_adapter("other", config_of(case))
        model.base_model.set_adapter(["default", "other"])
    torch.manual_seed(5)
    if "reentrant" in case:
        how = {"use_reentrant": case["reentrant"]}
        model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        model.enable_input_require_grads()
    ids = torch.randint(61, (3, 6), generator=torch.Generator().manual_seed(2))
    found: dict[str, Any] = {}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # foreach: DTensors and plain tensors together would be an error
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05, foreach=True)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sums:
            loss.backward()
        found["sums"] = sums.call_count
        found[f"loss {step}"] = loss.detach()
        if step == 0:
            found |= {f"{n}.grad": whole(p.grad) for n, p in trained.items()}
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
        found[f"norm {step}"] = whole(norm)
        optimizer.step()
    found |= {n: whole(p) for n, p in trained.items()}
    model.eval()
    with torch.no_grad():
        found["logits"] = model(input_ids=ids).logits
        with model.disable_adapter():
            found["disabled"] = model(input_ids=ids).logits
        before = {n: whole(p) for n, p in model.named_parameters() if "base_layer" in n}
        model.merge_adapter(safe_merge=True)
        found["merged"] = model(input_ids=ids).logits
        found |= {f"{n} merged": whole(p) for n, p in model.named_parameters() if n in before}
        model.unmerge_adapter()
        for n, p in model.named_parameters():
            assert n not in before or torch.equal(whole(p), before[n]), n
        found["greedy"] = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False
        )
        found["runs as"] = sorted({row.reason for row in peftkern.explain(model)})
    with_embeddings = "embed_tokens" in case["target_modules"]
    model.save_pretrained(files)
    if with_embeddings:
        model.merge_adapter()
        model.save_pretrained(files / "merged")
    del model
    again = llama(folder, rank is not None, case.get("plan"))
    again = peftkern.PeftModel.from_pretrained(again, files, is_trainable=True)
    if case.get("two"):
        again.load_adapter(files / "other", "other", is_trainable=True)
        again.base_model.set_adapter(["default", "other"])
    again.eval()
    found["loaded"] = again(input_ids=ids).logits.detach()
    unloaded = again.merge_and_unload(adapter_names=list(again.peft_config))
    found["unloaded"] = unloaded(input_ids=ids).logits.detach()
    return found


def life(folder: Path, rank: int | None, files: Path) -> dict[str, Any]:
    """What becomes of adapters that are combined, swapped, mixed in a batch and loaded."""
    torch.manual_seed(1)
    model = peftkern.get_peft_model(llama(folder / "llama", rank is not None), config_of(ALL))
    torch.manual_seed(3)
    model.add_adapter("other", config_of(ALL))
    ids = torch.randint(61, (3, 6), generator=torch.Generator().manual_seed(2))
    found: dict[str, Any] = {}

    def look(name: str, **how: Any) -> None:
        with torch.no_grad():
            found[name] = model(input_ids=ids, **how).logits

    model.eval()
    look("mixed", adapter_names=["other", "__base__", "default"])
    model.save_pretrained(files)
    for kind in ("svd", "linear", "cat", "dare_linear"):
        torch.manual_seed(4 + (rank or 0))
        model.add_weighted_adapter(
            ["default", "other"], [0.7, -0.4], kind, combination_type=kind, density=0.5
        )
        model.set_adapter(kind)
        look(kind)
    model.set_adapter("default")
    peftkern.utils.hotswap.hotswap_adapter(model, files / "other", "default")
    look("swapped")
    model.delete_adapter("other")
    model.load_adapter(files, "again", low_cpu_mem_usage=True)
    model.set_adapter("again")
    look("again")
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=ids).logits.isfinite().all()
    found["trainable"] = torch.tensor(model.get_nb_trainable_parameters())
    theirs = peftkern.get_peft_model_state_dict(model, adapter_name="again")
    result = peftkern.set_peft_model_state_dict(model, theirs, "default")
    assert not result.unexpected_keys
    model.set_adapter("default")
    look("set")
    return found


def prompted(kind: str, folder: Path, rank: int | None, files: Path) -> dict[str, Any]:
    """What a prefix, or virtual tokens, compute; the ranks share the heads of the keys out."""
    model = llama(folder / "llama", rank is not None)
    torch.manual_seed(1 + (rank or 0))
    model = peftkern.get_peft_model(model, PROMPTS[kind]()).double()
    ids = torch.randint(61, (3, 6), generator=torch.Generator().manual_seed(2))
    loss = loss_of(model, ids)
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {f"{n}.grad": p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.eval()
    found["greedy"] = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False
    )
    model.save_pretrained(files)
    again = peftkern.PeftModel.from_pretrained(llama(folder / "llama", rank is not None), files)
    found["loaded"] = again.double()(input_ids=ids).logits.detach()
    return found


def _refused(rank: int, folder: Path) -> dict[str, str]:
    """{what is asked for: the error}; the model must be as it was."""
    model = llama(folder / "llama", True)
    before = {n: id(m) for n, m in model.named_modules()}
    found = {}
    for name, settings in REFUSED.items():
        try:
            peftkern.get_peft_model(model, peftkern.LoraConfig(**settings))
        except (ValueError, NotImplementedError) as error:
            found[name] = str(error)
        assert {n: id(m) for n, m in model.named_modules()} == before, name
    mixture = mixture_of(folder, True)
    asked: dict[str, dict[str, Any]] = {
        "experts": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
        "experts in full": {"target_modules": ["o_proj"], "modules_to_save": ["mlp"]},
    }
    for name, settings in asked.items():
        try:
            peftkern.get_peft_model(mixture, peftkern.LoraConfig(**settings))
        except ValueError as error:
            found[name] = str(error)
    plan = {"model.layers.*.self_attn.k_proj": "rowwise_split_input"}
    try:
        peftkern.get_peft_model(llama(folder / "llama", True, plan), PROMPTS["prefix"]())
    except ValueError as error:
        found["prefix"] = str(error)
    uneven = llama(folder / "three heads", True)
    before = {n: id(m) for n, m in uneven.named_modules()}
    try:
        peftkern.get_peft_model(uneven, peftkern.LoraConfig(target_modules=["q_proj"]))
    except ValueError as error:
        found["three heads"] = str(error)
    assert {n: id(m) for n, m in uneven.named_modules()} == before
    divided = divided_again(folder)
    before = {n: id(m) for n, m in divided.named_modules()}
    for name, settings in DIVIDED.items():
        try:
            peftkern.get_peft_model(divided, peftkern.LoraConfig(**settings))
        except ValueError as error:
            found[name] = str(error)
        assert {n: id(m) for n, m in divided.named_modules()} == before, name
    return found


def divided_again(folder: Path) -> Any:
    """The Llama shared out by tensor parallelism, of which FSDP2 has divided each layer too."""
    from torch.distributed.fsdp import fully_shard

    model = llama(folder / "llama", True)
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("fsdp", "tp"))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["fsdp"])
    return model


def mixture_of(folder: Path, shared: bool) -> Any:
    """The saved Mixtral, in this process alone or shared out over all."""
    how: dict[str, Any] = {"experts_implementation": "eager"}  # the only one for float64
    if shared:
        from transformers.distributed import DistributedConfig

        how["distributed_config"] = DistributedConfig(tp_plan="auto", tp_size=RANKS)
    return MixtralForCausalLM.from_pretrained(folder / "mixture", dtype=torch.float64, **how)


def routed(rank: int | None, folder: Path) -> dict[str, Tensor]:
    """What adapters of a mixture's attention and of its router, which no rank shares out, get."""
    settings = {"r": 2, "target_modules": ["q_proj", "o_proj", "gate"], "init_lora_weights": False}
    model = mixture_of(folder, rank is not None)
    torch.manual_seed(1 + (rank or 0))
    model = peftkern.get_peft_model(model, peftkern.LoraConfig(**settings))
    ids = torch.randint(61, (3, 6), generator=torch.Generator().manual_seed(2))
    loss = loss_of(model, ids)
    loss.backward()
    grads = {n: whole(p.grad) for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **grads}


def save_mixture(folder: Path) -> None:
    """A Mixtral, whose experts ranks share out."""
    config = MixtralConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        tie_word_embeddings=False,
    )
    MixtralForCausalLM(config).save_pretrained(folder)


def _failed_save(rank: int, folder: Path) -> str:
    """The error that a save gives which fails in the process that writes."""
    model = peftkern.get_peft_model(llama(folder / "llama", True), config_of(ALL))

    def full(*_: Any) -> None:
        raise OSError("no space left")

    with mock.patch.object(saving, "write_adapters", full if rank == 0 else saving.write_adapters):
        try:
            model.save_pretrained(folder / "full")
        except (OSError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def _compiled(rank: int, folder: Path, **more: Any) -> dict[str, float]:
    """How far a compiled layer's output and gradients are from the same layer's."""
    model = peftkern.get_peft_model(llama(folder / "llama", True), config_of({**ALL, **more}))
    layers = model.base_model.model.model.layers[0].self_attn
    far = {}
    for name, K in (("q_proj", 32), ("o_proj", 16)):
        layer = layers.get_submodule(name)
        x = torch.randn(3, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
        found = []
        for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
            y = call(x)
            found.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
        for i, (a, b) in enumerate(zip(*found, strict=True)):
            far[f"{name} {i}"] = float((whole(a) - whole(b)).abs().max())
    return far


STARTS: dict[str, dict[str, Any]] = {
    "pissa": {},
    "pissa_niter_2": {},
    "olora": {},
    "loftq": {"loftq_config": peftkern.LoftQConfig(loftq_bits=4, loftq_iter=2)},
}


def _starts(rank: int, folder: Path) -> dict[str, list[str]]:
    """{start: names of weights that differ from those of a model that is not shared out}.

    The ranks draw other numbers, of which the first one's are taken.
    """
    found = {}
    for init, more in STARTS.items():
        case = {"target_modules": ATTENTION + MLP, "init_lora_weights": init, **more}
        weights = []
        for shared in (True, False):
            base = llama(folder / "llama", shared, dtype=torch.float32)
            torch.manual_seed(1 + rank if shared else 1)
            model = peftkern.get_peft_model(base, config_of(case))
            weights.append({n: whole(p) for n, p in model.named_parameters()})
        ours, alone = weights
        assert ours.keys() == alone.keys()
        found[init] = [n for n in alone if not torch.equal(ours[n], alone[n])]
    return found


def _given_factors(rank: int, folder: Path) -> tuple[str, bool]:
    """(the error of EVA's pass over data, True when a rank has the factors that EVA was given)."""
    case = {"target_modules": ["q_proj", "o_proj"], "init_lora_weights": "eva"}
    model = peftkern.get_peft_model(
        llama(folder / "llama", True), config_of({**case, "eva_config": peftkern.EvaConfig()})
    )
    said = ""
    try:
        peftkern.initialize_lora_eva_weights(model, [{"input_ids": torch.ones(1, 4).long()}])
    except ValueError as error:
        said = str(error)
    layers = {n: m for n, m in model.named_modules() if n.endswith(("q_proj", "o_proj"))}
    draws = torch.Generator().manual_seed(0)
    given = {n: torch.randn(3, 32, generator=draws, dtype=torch.float64) for n in layers}
    peftkern.initialize_lora_eva_weights(model, eva_state_dict=given)
    equal = [torch.equal(whole(m.lora_A["default"].weight), given[n]) for n, m in layers.items()]
    return said, all(equal)


REST: dict[str, Any] = {
    "given factors": _given_factors,
    "starts": _starts,
    "compiled": _compiled,
    "compiled DoRA": lambda rank, folder: _compiled(rank, folder, use_dora=True),
    "routed": routed,
    "life": lambda rank, folder: life(folder, rank, folder / "life shared"),
    "refused": _refused,
    "failed save": _failed_save,
}
# the cases of `make test`; the others are slow
HEADLINE = (
    "all layers",
    "dropout",
    "DoRA",
    "head and embedding",
    "prefix",
    "refused",
    "failed save",
)


def _run(rank: int, folder: Path, names: list[str]) -> dict[str, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    found: dict[str, Any] = {}
    for name in names:
        files = folder / f"{name} shared"
        if name in CASES:
            found[name] = numbers(CASES[name], folder, rank, files)
        elif name in PROMPTS:
            found[name] = prompted(name, folder, rank, files)
        else:
            found[name] = REST[name](rank, folder)
    return found


def main(folder: Path, names: list[str]) -> None:
    save_llama(folder / "llama")
    save_llama(folder / "tied", tied=True)
    save_llama(folder / "three heads", heads=3)
    save_mixture(folder / "mixture")
    fork(folder, RANKS, lambda rank: _run(rank, folder, names))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
