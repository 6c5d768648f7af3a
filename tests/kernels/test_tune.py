"""``peftkern tune`` and ``explain`` on the dispatcher, in Triton's interpreter."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

import peftkern
from peftkern.cli import tune, tune_experts
from peftkern.cli.app import run
from peftkern.cli.errors import UserError
from peftkern.kernels import tuning
from peftkern.ops import device, tuned
from tests import expert_families, moe_models
from tests.kernels.racing import FakeClock, decided, dispatcher, drawn, entry, ship, step
from tests.models import config as config_of

CONFIG = config_of("llama", layers=1)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "_device", lambda: torch.device("cpu"))
    monkeypatch.setenv("COLUMNS", "300")
    with dispatcher(monkeypatch, tmp_path, FakeClock("hybrid", in_graph="decode")) as clock:
        yield clock


@pytest.mark.long
def test_tune_races_ahead_and_the_first_step_does_not(clock, tmp_path, capsys):
    small = ["--dtype", "float32", "--rows", "12", "--r", "4", "--dropout", "0,0.1"]
    assert run(["tune", "--shapes", "24x40", *small]) == 0
    out = capsys.readouterr().out
    assert "5 operations on CPU" in out and "6 results, kept in" in out  # infer: in a graph too
    line = next(line for line in out.splitlines() if "forward, dropout " in line)
    assert "hybrid" in line and "2.00" in line and "fused 200000.0" in line and "24 x 40" in line
    assert any("infer, in a graph" in line and "decode" in line for line in out.splitlines())
    assert clock.races == 5
    tuned.forget()  # another process
    step(*drawn(), 0.1)
    with torch.no_grad():
        x, w, A, B = drawn(grad=False)
        peftkern.lora_linear(x, w, None, A, B, 2.0)
    assert clock.races == 5 and decided("infer").how == "hybrid"
    assert run(["tune", "--shapes", "24x40", *small]) == 0
    assert clock.races == 10  # asked for again: raced again


@pytest.mark.long
def test_a_models_projections_are_raced_alone_and_in_their_groups(clock, tmp_path):
    CONFIG.save_pretrained(tmp_path)
    args = ["--dtype", "float32", "--rows", "8", "--r", "4", "--dropout", "0"]
    assert run(["tune", "--model", str(tmp_path), *args]) == 0
    races = clock.races
    torch.manual_seed(0)
    config = peftkern.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peftkern.get_peft_model(LlamaForCausalLM(CONFIG), config)
    tuned.forget()
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    # the input of the first projections needs no gradient: without dX it is another operation
    assert clock.races - races <= 1
    assert {k.group for k in tuned.book(-1).cached.entries} == {1, 2, 3}


@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_models_mixtures_are_raced_as_their_calls_would_be(clock, tmp_path, capsys, family):
    base = expert_families.make(family, torch.float32)
    base.config.save_pretrained(tmp_path)
    args = ["--dtype", "float32", "--rows", "12", "--r", "3", "--dropout", "0"]
    assert run(["tune", "--model", str(tmp_path), "--experts", *args]) == 0
    raced = {k: e for k, e in tuned.book(-1).cached.entries.items() if k.experts}
    assert {key.op for key in raced} == {"experts", "experts_step"} and len(raced) == 2
    top, E = base.config.num_experts_per_tok, base.config.num_local_experts
    assert f"{top} of {E} experts" in capsys.readouterr().out
    assert {(key.top, key.experts, key.m) for key in raced} == {(top, E, 16)}
    tuned.forget()
    clock.races = 0
    model = moe_models.adapt(peftkern, base, target_parameters="all-experts")
    ids = expert_families.IDS
    with torch.no_grad():
        model(ids)
    model.train()(ids).logits.sum().backward()
    assert clock.races == 0
    assert {"experts", "experts_step"} <= {key.op for key in tuned.book(-1).decisions}


def test_a_model_without_experts_or_their_number(clock, tmp_path, capsys):
    CONFIG.save_pretrained(tmp_path)
    asked = ["tune", "--model", str(tmp_path), "--experts", "--dtype", "float32"]
    assert run(asked) == 2
    assert "no experts of the model run on kernels" in capsys.readouterr().err
    with pytest.raises(UserError, match="none of num_experts_per_tok, top_k_experts"):
        tune_experts.mixtures_of(moe_models.tiny(), CONFIG)


def test_show_and_export(clock, tmp_path, capsys):
    target = tmp_path / "table.json"
    assert run(["tune", "--export", str(target)]) == 2
    assert "nothing is known for CPU yet" in capsys.readouterr().err and not target.exists()
    shrink = {"block_m": 16}
    ship(tmp_path, [entry("forward", "fused"), entry("shrink", None, N=0, config=shrink)])
    tuned.forget()
    times = {"torch": 3.0, "hybrid": 1.0}
    tuned.book(-1).keep([entry("infer", "hybrid", times=times), entry("forward", "hybrid")])
    assert run(["tune", "--show", "--export", str(target)]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[1]: line for line in out.splitlines() if " x 40" in line}
    assert set(lines) == {"forward", "infer"}  # kernels have no choice to show
    assert "raced here on 2020-01-02" in lines["forward"] and "hybrid" in lines["forward"]
    assert "3.00" in lines["infer"] and "torch 3.0" in lines["infer"]
    assert "shipped table of CPU" in out and clock.races == 0
    table = tuning.load(target)
    assert {(k.op, e.choice) for k, e in table.entries.items()} == {
        ("forward", "hybrid"), ("infer", "hybrid"), ("shrink", None),
    }  # fmt: skip
    assert table.sources == tuned.sources() and json.loads(target.read_text())["schema"] == 1


def test_tune_says_what_keeps_it_from_racing(clock, monkeypatch, capsys):
    small = ["--shapes", "8x8", "--dtype", "float32", "--rows", "2", "--r", "2", "--dropout", "0"]
    monkeypatch.setenv("PEFTKERN_RACE", "0")
    assert run(["tune", *small]) == 2
    assert "PEFTKERN_RACE is 0; tune needs it unset, or 1" in capsys.readouterr().err
    monkeypatch.delenv("PEFTKERN_RACE")

    def broken(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(clock, "seconds", broken)
    assert run(["tune", *small]) == 1
    out, err = capsys.readouterr()
    assert "no race gave a result" in err and "out of memory in a race" in out


def adapted(**settings):
    torch.manual_seed(0)
    config = peftkern.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "o_proj"], init_lora_weights=False, **settings
    )
    return peftkern.get_peft_model(LlamaForCausalLM(CONFIG), config)


def reasons(model):
    rows = peftkern.explain(model)
    assert {row.backend for row in rows} == {"auto fused"}
    return {row.name.rsplit(".", 1)[1]: row.reason for row in rows}


def test_explain_says_what_was_decided_and_why(clock, monkeypatch):
    model = adapted()
    ids = torch.arange(12)[None]
    for why in reasons(model).values():
        assert why.startswith("auto: not called yet: raced at its first call; no table ships")
    model(input_ids=ids, labels=ids).loss.backward()
    said = reasons(model)
    day = tuned.now()[:10]
    assert said["o_proj"] == (
        "auto: backward M<=16 hybrid 2.00x torch, forward M<=16 hybrid 2.00x torch: "
        f"raced here on {day}"
    )
    assert said["q_proj"].startswith("auto: backward of 2 M<=16 hybrid 2.00x torch, forward of 2")
    assert "trains as one operation with k_proj" in said["q_proj"]
    with torch.no_grad():
        model.eval()(ids[:, :1])
    assert "infer M<=1 hybrid (in a graph decode) 2.00x torch" in reasons(model)["o_proj"]
    tuned.forget()
    assert "not called yet: M<=1, 16 known from earlier, else raced" in reasons(model)["o_proj"]
    monkeypatch.setenv("PEFTKERN_CACHE", str(tuned.cache_folder() / "other"))
    monkeypatch.setenv("PEFTKERN_RACE", "0")
    tuned.forget()
    assert "not called yet: torch, for PEFTKERN_RACE=0" in reasons(model)["o_proj"]
    model(ids)
    assert "M<=16 torch: PEFTKERN_RACE=0: torch" in reasons(model)["o_proj"]


def test_explain_of_what_was_decided_without_a_race(clock, monkeypatch):
    model = adapted()
    monkeypatch.setattr(device, "capturing", lambda x: True)
    tuned.book(-1)
    with torch.no_grad():
        model(torch.arange(3)[None])
    assert reasons(model)["o_proj"] == (
        "auto: infer M<=4 torch: inside a CUDA graph capture, and never called before"
    )


def test_explain_names_what_the_kernels_do_not_take(clock):
    model = adapted().double()
    assert reasons(model)["o_proj"] == "auto: torch, dtype torch.float64"
