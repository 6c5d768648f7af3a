"""Adapter files in which bytes and values are changed at random.

Loading gives a clear error or the adapter that the files describe, never a crash or a model that is
changed in part.
"""

from __future__ import annotations

import copy
import json
import random
import struct
import warnings

import pytest
import torch
from safetensors import SafetensorError, safe_open

import peftkern
from tests.tiny import assert_same, fill, make, snapshot

SAFE, PICKLE, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
# what bad files may raise: all of it says which file or setting is wrong
CLEAR = (ValueError, RuntimeError, NotImplementedError)
VALUES = [
    *(None, True, False, 0, -1, 1, 3, 7, 10**6, 10**9, 2**63, 2**70, -(2**70), 0.5, -0.5, 1e308),
    *("", "x", "default", "all-linear", "q_proj", "(", "[a", ".*", "../../x", "/etc/passwd", "\0"),
    *("LORA", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "CAUSAL_LM", "SEQ_CLS", "é" * 300),
    *([], [0], ["q_proj"], [[1, 2]], {}, {"a": 1}, {"q_proj": 2}, {"q_proj": "x"}, [None], [[]]),
    *(float("nan"), float("inf")),
]


def bytes_changed(data: bytes, draw: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        if not data:
            break
        at = draw.randrange(len(data))
        how = draw.randrange(5)
        if how == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            del data[at:]
        elif how == 2:
            del data[at : at + draw.randrange(1, 40)]
        elif how == 3:
            data[at:at] = draw.randbytes(draw.randrange(1, 40))
        else:
            data[at : at + 4] = draw.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b'"}{"'))
    return bytes(data)


def values_changed(data: bytes, draw: random.Random) -> bytes:
    """A JSON object with values, keys and nesting changed; still JSON as Python reads it."""
    found = json.loads(data)
    for _ in range(draw.choice((1, 1, 2))):
        key = draw.choice(sorted(found))
        how = draw.randrange(4)
        if how == 0:
            del found[key]
            if not found:
                break
        elif how == 1:
            found[draw.choice((key + "x", "", "r", "new"))] = found.pop(key)
        else:
            found[key] = draw.choice(VALUES)
    return json.dumps(found).encode()


def header_changed(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header says something else about the same bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    key = draw.choice(sorted(k for k in header if k != "__metadata__"))
    entry = header[key]
    how = draw.randrange(6)
    if how == 0:
        entry["shape"] = draw.choice(([], [2**40, 2**40], [-1], [0], entry["shape"][::-1], "x"))
    elif how == 1:
        entry["dtype"] = draw.choice(("F64", "BF16", "I64", "BOOL", "F8_E4M3", "no", 3))
    elif how == 2:
        entry["data_offsets"] = draw.choice(([0, 0], [2**50, 2**51], [8, 4], [0], None))
    elif how == 3:
        header[draw.choice(("other.key", "", key.replace("lora_A", "lora_C")))] = header.pop(key)
    elif how == 4:
        del header[key]
    else:
        header["__metadata__"] = draw.choice((None, {"format": "tf"}, {"a": 1}, []))
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data[8 + length :]


MUTATIONS = [
    (CONFIG, bytes_changed),
    (CONFIG, values_changed),
    (SAFE, bytes_changed),
    (SAFE, header_changed),
    (PICKLE, bytes_changed),
]


def adapters(tmp_path):
    """Folders with a LoRA adapter and a prefix, in both kinds of files."""
    configs = {
        "lora": peftkern.LoraConfig(
            r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], rank_pattern={"q_proj": 2}
        ),
        "prefix": peftkern.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prompt": peftkern.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    for name, config in configs.items():
        model = peftkern.get_peft_model(make("llama"), config)
        fill(model)
        for kind in (SAFE, PICKLE):
            folder = tmp_path / f"{name}-{kind}"
            model.save_pretrained(folder, safe_serialization=kind == SAFE)
            yield folder


def fuzz(tmp_path, count):
    """Returns how many mutated files loaded, and how many were refused."""
    originals = [{p.name: p.read_bytes() for p in f.iterdir()} for f in adapters(tmp_path)]
    bare = make("llama")
    host = peftkern.get_peft_model(
        make("llama"), peftkern.LoraConfig(r=3, target_modules=["q_proj", "up_proj"])
    )
    folder = tmp_path / "fuzzed"
    folder.mkdir()
    outcomes = {True: 0, False: 0}
    for original, load, seeds in (
        (bare, peftkern.PeftModel.from_pretrained, range(0, count, 2)),
        (host, lambda model, path: model.load_adapter(path, "other"), range(1, count, 2)),
    ):
        model = copy.deepcopy(original)
        before = snapshot(model)
        for seed in seeds:
            draw = random.Random(seed)
            name, mutate = draw.choice(MUTATIONS)
            files = draw.choice([f for f in originals if name in f])
            for old in folder.iterdir():
                old.unlink()
            for each, data in (files | {name: mutate(files[name], draw)}).items():
                (folder / each).write_bytes(data)
            loaded = None
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    loaded = load(model, folder)
            except CLEAR as exc:
                assert str(exc), f"seed {seed}: an error without words"
                assert_same(model, before)
            except Exception as exc:
                raise AssertionError(f"seed {seed}: {name}, {mutate.__name__}: {exc!r}") from exc
            else:
                adapter = "default" if original is bare else "other"
                adapted = loaded if original is bare else model
                _is_what_the_files_say(adapted, adapter, folder, seed)
                model = copy.deepcopy(original)
            outcomes[loaded is not None] += 1
    return outcomes[True], outcomes[False]


def _is_what_the_files_say(model, adapter, folder, seed):
    config = json.loads((folder / CONFIG).read_bytes())
    # put right while loading, the last with a warning where it is not asked for
    ours = ("inference_mode", "peft_version", "fan_in_fan_out", "loftq_config")
    for key, value in model.peft_config[adapter].to_dict().items():
        if key in config and key not in ours:
            said = config[key]
            got = sorted(value) if isinstance(value, set) else value
            if isinstance(said, dict) and key in ("corda_config", "eva_config", "lora_ga_config"):
                said = got | {k: v for k, v in said.items() if k in got}  # others: a warning
            assert got == said or not said, f"seed {seed}: {key} is {got!r}, the file says {said!r}"
    if (folder / SAFE).exists():
        try:
            with safe_open(folder / SAFE, "pt") as file:
                said = {k: file.get_tensor(k) for k in file.keys()}
        except SafetensorError as exc:
            raise AssertionError(f"seed {seed}: loaded from a file that is none: {exc}") from exc
    else:
        said = torch.load(folder / PICKLE, "cpu", weights_only=True)
    state = peftkern.get_peft_model_state_dict(model, adapter_name=adapter)
    assert state.keys() == said.keys(), f"seed {seed}"
    for key, value in said.items():
        assert torch.equal(state[key], value.to(state[key].dtype)), f"seed {seed}: {key}"


def test_fuzzed_files(tmp_path):
    loaded, refused = fuzz(tmp_path, 600)
    assert loaded > 40 and refused > 400


@pytest.mark.slow
def test_ten_thousand_fuzzed_files(tmp_path):
    loaded, refused = fuzz(tmp_path, 10_000)
    assert loaded > 1000 and refused > 3000
