"""``peftkern export`` and ``merge``: what is written computes what the adapter did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import peftkern
from peftkern.checkpoint import writing
from peftkern.checkpoint.serving import Adapter, refusals
from peftkern.cli import merge as merging
from peftkern.cli.app import run
from tests.closeness import assert_same_number, differ
from tests.command import tokenizer
from tests.gguf_files import permuted
from tests.tiny import fill, inputs, make

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7},
        "alpha_pattern": {"v_proj": 1, "layers.1.mlp.up_proj": 12},
        "use_rslora": True,
    },
    "pattern_of_names": {"target_modules": r".*\.(q_proj|up_proj)"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ in float64, and an adapter on it for each of KINDS."""
    root = tmp_path_factory.mktemp("export")
    make("llama", dtype=torch.float64).save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    for name, settings in KINDS.items():
        adapted(root / "base", **settings).save_pretrained(root / name)
    return root


def base_model(folder: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def adapted(folder: Path, **settings: Any) -> Any:
    config = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": LINEAR}
    torch.manual_seed(0)
    model = peftkern.get_peft_model(base_model(folder), peftkern.LoraConfig(**config | settings))
    fill(model)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs("llama")).logits


def loaded(place: Path, name: str) -> Any:
    """The adapter as HF PEFT loads it."""
    return peft.PeftModel.from_pretrained(base_model(place / "base"), str(place / name))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_folder_computes_the_same(place: Path, kind: str, target: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(["export", "--adapter", str(place / kind), "--to", target, "--out", str(out)]) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    state = load_file(out / "adapter_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert refusals(target, Adapter(config, shapes)) == []
    again = peft.PeftModel.from_pretrained(base_model(place / "base"), str(out))
    assert_same_number(logits(again), logits(loaded(place, kind)))
    assert str(place) not in json.dumps(config)
    if target == "sglang":  # one alpha / r for all layers is all that it reads
        assert {shape[0] for name, shape in shapes.items() if "lora_A" in name} == {config["r"]}
        assert not (config["use_rslora"] or config["rank_pattern"] or config["alpha_pattern"])
    if kind == "plain":  # no number changes
        for name, tensor in load_file(place / kind / "adapter_model.safetensors").items():
            assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("start, given", [("pissa", False), ("olora", True)])
def test_a_start_that_changed_the_base_is_taken_out(
    place: Path, start: str, given: bool, tmp_path: Path, capsys: Any
) -> None:
    """The adapter that is written is for the unchanged base model."""
    base = base_model(place / "base").float()
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    config = peftkern.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=LINEAR, init_lora_weights=start
    )
    model = peftkern.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "initial")
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    args = ["export", "--adapter", str(tmp_path / "adapter"), "--out", str(out), "--to", "vllm"]
    known = ["--initial", str(tmp_path / "initial")] if given else []
    assert run([*args, *known]) == 0
    assert f'init_lora_weights="{start}"' in capsys.readouterr().out
    again = peft.PeftModel.from_pretrained(base_model(place / "base"), str(out))
    written = updates(again)
    for name, update in updates(model).items():
        changed = model.base_model.model.get_submodule(name).base_layer.weight
        W = before[f"{name}.weight"].double()
        wanted = changed.double() + update.double() - W
        rounding = torch.finfo(torch.float32).eps * W.norm()  # of the changed weight
        assert (written[name].double() - wanted).norm() < 8 * rounding, name


def test_a_start_that_is_not_the_same_each_time_must_be_given(
    place: Path, tmp_path: Path, capsys: Any
) -> None:
    config = peftkern.LoraConfig(
        r=4, target_modules=LINEAR, task_type="CAUSAL_LM", init_lora_weights="pissa_niter_4"
    )
    model = peftkern.get_peft_model(base_model(place / "base").float(), config)
    model.save_pretrained(tmp_path / "adapter")
    args = ["--to", "vllm", "--out", str(tmp_path / "out")]
    assert run(["export", "--adapter", str(tmp_path / "adapter"), *args]) == 2
    assert "--initial" in capsys.readouterr().err and not (tmp_path / "out").exists()


def updates(model: Any) -> dict[str, torch.Tensor]:
    """{name of a layer: the update of its weight}."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("kind", ["plain", "rslora", "patterns"])
def test_gguf_holds_the_updates(place: Path, kind: str, tmp_path: Path) -> None:
    out = tmp_path / "adapter.gguf"
    assert run(["export", "--adapter", str(place / kind), "--to", "gguf", "--out", str(out)]) == 0
    reader = gguf.GGUFReader(out)
    field = {name: reader.fields[name].contents() for name in reader.fields}
    assert field["general.type"] == "adapter" and field["adapter.type"] == "lora"
    assert field["general.architecture"] == "llama"
    found = {t.name: torch.tensor(t.data, dtype=torch.float64) for t in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    config = tf.AutoConfig.from_pretrained(place / "base")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    wanted = updates(adapted(place / "base", **KINDS[kind]))
    assert len(found) == 2 * len(wanted)
    for name, update in wanted.items():
        key = names.get_name(name) + ".weight"
        A, B = found[f"{key}.lora_a"], found[f"{key}.lora_b"]
        if (last := name.rpartition(".")[2]) in heads:
            update = permuted(update, heads[last])
        # llama.cpp's scale; the file is in float32
        got = field["adapter.lora.alpha"] / A.shape[0] * (B @ A)
        error = (got - update).norm() / update.norm()
        rounding = (update.float().double() - update).norm() / update.norm()
        assert error < 16 * rounding, name


def test_gguf_of_an_embedding_is_transposed(place: Path, tmp_path: Path) -> None:
    model = adapted(place / "base", target_modules=["embed_tokens"])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    out = tmp_path / "adapter.gguf"
    args = ["--model", str(place / "base"), "--to", "gguf", "--out", str(out), "--dtype", "float16"]
    assert run(["export", "--adapter", str(tmp_path / "adapter"), *args]) == 0
    found = {t.name: t for t in gguf.GGUFReader(out).tensors}
    assert found["token_embd.weight.lora_a"].data.shape == (model.config.vocab_size, 4)
    assert {t.tensor_type.name for t in found.values()} == {"F16"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA"),
    "bias": ({"lora_bias": True}, "lora_bias"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "head": ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head"),
    "tokens_before": ({"alora_invocation_tokens": [1]}, "aLoRA"),
}


@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_no_server_reads_is_refused_by_name(
    place: Path, kind: str, tmp_path: Path, capsys: Any
) -> None:
    settings, said = REFUSED[kind]
    adapted(place / "base", **settings).save_pretrained(tmp_path / "adapter")
    for target in ("vllm", "sglang", "gguf"):
        out = tmp_path / ("out.gguf" if target == "gguf" else "out")
        args = ["--to", target, "--out", str(out)]
        assert run(["export", "--adapter", str(tmp_path / "adapter"), *args]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and said in lines[0] and "--to merged" in lines[0]
        assert not out.exists()


VLLM_033 = [
    ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
    ({"use_dora": True}, "DoRA"),
    ({"bias": "lora_only"}, "bias"),
    ({"modules_to_save": ["score", "classifier"]}, None),
    ({"modules_to_save": ["score", "embed_tokens"]}, "embed_tokens"),
    ({"use_rslora": True, "rank_pattern": {"q": 16}, "alpha_pattern": {"q": 3}}, None),
    *(({"init_lora_weights": start}, None) for start in (True, False, "gaussian", "eva", "mica")),
    *(
        ({"init_lora_weights": start}, start)
        for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq")
    ),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"r": 600}, "rank 600 is above 512"),
]


@pytest.mark.parametrize("settings, said", VLLM_033, ids=str)
def test_vllms_rules(settings: dict[str, Any], said: str | None) -> None:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "bias": "none", **settings}
    found = refusals("vllm", Adapter(config, {}))
    assert len(found) == (said is not None) and (said is None or said in found[0])


def test_saving_tells_once_what_servers_do_not_read(
    place: Path, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(writing, "_TOLD", set())
    for settings, said in (({}, None), ({"use_dora": True}, "DoRA"), ({"use_rslora": True}, "rs")):
        model, count = adapted(place / "base", **settings), len(caplog.messages)
        for step in (1, 2):
            model.save_pretrained(tmp_path / f"{said}{step}")
        new = caplog.messages[count:]
        assert len(new) == (said is not None) and all("\n" not in line for line in new)
        assert said is None or said in new[0]
    assert "vLLM 0.33 and SGLang" in caplog.messages[0] and "peftkern merge" in caplog.messages[0]
    assert "vLLM" not in caplog.messages[1] and "peftkern export" in caplog.messages[1]
    config = peftkern.LoraConfig(target_modules=["q_proj"], use_dora=True)  # no task that is served
    peftkern.get_peft_model(base_model(place / "base"), config).save_pretrained(tmp_path / "none")
    assert len(caplog.messages) == 2


def test_rank_is_that_of_the_started_server(place: Path, tmp_path: Path, capsys: Any) -> None:
    args = ["--to", "vllm", "--out", str(tmp_path / "out"), "--max-rank", "6"]
    assert run(["export", "--adapter", str(place / "patterns"), *args]) == 2
    assert "rank 7 is above 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, said",
    [
        (["--to", "onnx", "--out", "x"], "--to is onnx; it must be one of vllm, sglang, gguf"),
        (["--to", "gguf", "--out", "x"], "must be a .gguf file"),
        (["--to", "vllm", "--out", "{}"], "exists and is no empty folder"),
        (["--to", "vllm", "--out", "x", "--dtype", "int8"], "--dtype is int8"),
        (["--to", "vllm", "--out", "x", "--load-in", "4bit"], "--load-in is for --to merged"),
    ],
)
def test_bad_options_are_one_line(place: Path, args: list[str], said: str, capsys: Any) -> None:
    args = [arg.format(place / "base") for arg in args]
    assert run(["export", "--adapter", str(place / "plain"), *args]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_merged_is_the_adapted_model(place: Path, tmp_path: Path) -> None:
    for command in (["merge"], ["export", "--to", "merged"]):
        out = tmp_path / command[0]
        assert run([*command, "--adapter", str(place / "patterns"), "--out", str(out)]) == 0
        assert_same_number(logits(base_model(out)), logits(loaded(place, "patterns")))
        assert tf.AutoTokenizer.from_pretrained(out).vocab_size > 0
        readers = {path.stat().st_mode & 0o666 for path in out.iterdir()}
        assert readers == {out.stat().st_mode & 0o666}  # those of the umask, weights too
    assert run(["merge", "--adapter", str(place / "plain"), "--out", str(out)]) == 2


def test_several_are_merged_by_their_weights(place: Path, tmp_path: Path, capsys: Any) -> None:
    both = ["--adapter", f"one={place / 'plain'}", "--adapter", f"two={place / 'rslora'}"]
    out = tmp_path / "out"
    assert run(["merge", *both, "--weights", "0.25,-2", "--out", str(out)]) == 0
    one, two = (updates(adapted(place / "base", **KINDS[kind])) for kind in ("plain", "rslora"))
    merged, before = base_model(out), base_model(place / "base")
    for name, update in one.items():
        change = merged.get_submodule(name).weight - before.get_submodule(name).weight
        assert_same_number(change.detach(), 0.25 * update - 2 * two[name])
    assert run(["merge", *both, "--weights", "1", "--out", str(tmp_path / "no")]) == 2
    assert "must be 2 numbers" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_quantised_base_is_dequantised(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    args = ["merge", "--adapter", str(place / "plain"), "--load-in", "4bit", "--dtype", "float32"]
    assert run([*args, "--out", str(tmp_path / "out"), "--cpu"]) == 0
    merged = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    weight = merged.model.layers[0].self_attn.q_proj.weight
    whole = base_model(tmp_path / "out")  # the weights are those of NF4 and the update
    update = updates(adapted(place / "base"))["model.layers.0.self_attn.q_proj"]
    start = base_model(place / "base").model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.float32 and weight.shape == start.shape
    rest = whole.model.layers[0].self_attn.q_proj.weight - update
    assert differ(rest, start.detach())  # NF4's rounding is in it
    assert (rest - start).abs().max() < 0.5 * start.abs().max()


def test_nothing_is_left_of_a_merge_that_fails(
    place: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(merging, "_save", fail)
    out = ["--out", str(tmp_path / "deep" / "out")]
    assert run(["merge", "--adapter", str(place / "plain"), *out]) == 1
    assert list((tmp_path / "deep").iterdir()) == []


def test_virtual_tokens_are_not_merged(place: Path, tmp_path: Path, capsys: Any) -> None:
    config = peftkern.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peftkern.get_peft_model(base_model(place / "base"), config).save_pretrained(tmp_path / "p")
    assert run(["merge", "--adapter", str(tmp_path / "p"), "--out", str(tmp_path / "out")]) == 2
    assert "virtual tokens (PROMPT_TUNING)" in capsys.readouterr().err
