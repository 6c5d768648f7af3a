"""``peftkern generate`` and ``chat``, and the way from chats on disk to all that follows."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import gguf
import peft
import pytest
import torch
import transformers as tf

import peftkern
from peftkern.cli.app import run
from tests.command import VOCAB, tokenizer
from tests.models import build
from tests.tiny import fill

ROOT = Path(__file__).resolve().parents[1]
# every turn is its words; a turn of the assistant's ends with </s>
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}w1 {{ m['content'] }} </s> "
    "{% else %}w0 {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w1 {% endif %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ with a chat template, and the adapters one/ and two/ on it; chats.jsonl."""
    root = tmp_path_factory.mktemp("talk")
    base = build("llama", vocab=len(VOCAB), eos_token_id=1, draw=0.3)
    base.save_pretrained(root / "base")
    words = tokenizer()
    words.chat_template = TEMPLATE
    words.save_pretrained(root / "base")
    for seed, name in enumerate(("one", "two")):
        model = tf.AutoModelForCausalLM.from_pretrained(root / "base")
        config = peftkern.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        adapted = peftkern.get_peft_model(model, config)
        fill(adapted, seed=seed)
        adapted.save_pretrained(root / name)
    with open(root / "chats.jsonl", "w") as file:
        for i in range(20):
            turns = [("user", f"w{i}"), ("assistant", f"w{i + 9} w2")]
            chat = {"messages": [{"role": who, "content": said} for who, said in turns]}
            file.write(json.dumps(chat) + "\n")
    return root


@functools.cache
def _model(place: Path, name: str | None) -> Any:
    model = tf.AutoModelForCausalLM.from_pretrained(place / "base")
    if name is not None:
        model = peft.PeftModel.from_pretrained(model, str(place / name))
    return model, tf.AutoTokenizer.from_pretrained(place / "base")


def wanted(place: Path, text: str, name: str | None, new: int = 6) -> str:
    """What HF PEFT's model says after ``text``, greedily."""
    model, words = _model(place, name)
    ids = words(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        found = model.generate(
            input_ids=ids, max_new_tokens=new, do_sample=False, eos_token_id=1, pad_token_id=0
        )
    return words.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def talk(monkeypatch: Any, capsys: Any, lines: list[str], *args: str) -> list[str]:
    """What a talk prints, line by line, for these lines on stdin, which is no terminal."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    assert run(["chat", "--cpu", "--max-new-tokens", "6", *args]) == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_generate_is_hf_pefts_text(place: Path, capsys: Any, monkeypatch: Any) -> None:
    args = ["generate", "--adapter", str(place / "one"), "--max-new-tokens", "6", "--cpu"]
    want = wanted(place, "w5 w6", "one")
    assert run([*args, "w5 w6"]) == 0
    assert said(capsys) == want and want
    (place / "prompt.txt").write_text("w5 w6\n")
    assert run([*args, "--prompt-file", str(place / "prompt.txt")]) == 0
    assert said(capsys) == want
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6\n"))
    assert run(args) == 0
    assert said(capsys) == want
    assert run([*args, "--chat", "w5 w6"]) == 0
    assert said(capsys) == wanted(place, "w0 w5 w6 w1", "one")


def test_several_adapters_and_the_base_one_after_the_other(place: Path, capsys: Any) -> None:
    adapters = ["--adapter", f"a={place / 'one'}", "--adapter", f"b={place / 'two'}"]
    args = ["w5 w6", "--compare-base", "--max-new-tokens", "6", "--cpu"]
    assert run(["generate", *adapters, *args]) == 0
    texts = [wanted(place, "w5 w6", name) for name in ("one", "two", None)]
    assert len(set(texts)) == 3
    assert said(capsys) == f"== a == {texts[0]} == b == {texts[1]} == base == {texts[2]}"


def test_samples_are_those_of_the_seed(place: Path, capsys: Any) -> None:
    args = ["generate", "--adapter", str(place / "one"), "w5", "--max-new-tokens", "8", "--cpu"]
    texts = []
    for more in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"]):
        assert run([*args, "--temperature", "2.5", *more]) == 0
        texts.append(said(capsys))
    assert texts[0] == texts[1] != texts[2]


def test_a_talk_switches_adapters(place: Path, capsys: Any, monkeypatch: Any) -> None:
    adapters = ["--adapter", f"a={place / 'one'}", "--adapter", f"b={place / 'two'}"]
    lines = ["w5", "/adapter b", "w6", "/base", "", "w7", "/reset", "w5", "/adapter c", "/what"]
    found = talk(monkeypatch, capsys, [*lines, "/quit", "w9"], *adapters)
    history = "w0 w5 w1"
    answers = []
    for name, turn in (("one", "w6"), ("two", "w7"), (None, "")):
        answers.append(wanted(place, history, name))
        history += f" {answers[-1]} </s> w0 {turn} w1"
    assert found[:4] == [
        f"a> {answers[0]}",
        "b answers",
        f"b> {answers[1]}",
        "the base model answers",
    ]
    assert found[4:6] == [f"base> {answers[2]}", "the talk begins anew"]
    assert found[6] == f"base> {wanted(place, 'w0 w5 w1', None)}"
    assert found[7] == "no adapter 'c'; there are a, b" and found[8].startswith("unknown: /what")
    assert len(found) == 9  # nothing after /quit


def test_a_talk_beside_the_base_model(place: Path, capsys: Any, monkeypatch: Any) -> None:
    args = ["--adapter", str(place / "one"), "--compare-base", "--system", "w3"]
    found = talk(monkeypatch, capsys, ["w5", "w6"], *args)
    first = wanted(place, "w0 w3 w0 w5 w1", "one")
    assert found[:2] == [f"one> {first}", f"base> {wanted(place, 'w0 w3 w0 w5 w1', None)}"]
    # the base model's answer is not remembered
    second = f"w0 w3 w0 w5 w1 {first} </s> w0 w6 w1"
    assert found[2] == f"one> {wanted(place, second, 'one')}"


def test_a_talk_that_is_too_long_goes_on(place: Path, capsys: Any, monkeypatch: Any) -> None:
    found = talk(monkeypatch, capsys, ["w5 " * 600, "w5"], "--adapter", str(place / "one"))
    assert "leave no room for an answer; /reset starts over" in found[0]
    assert found[1] == f"one> {wanted(place, 'w0 w5 w1', 'one')}"


def test_a_template_is_needed(place: Path, capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    tf.AutoModelForCausalLM.from_pretrained(place / "base").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    args = ["--adapter", str(place / "one"), "--model", str(tmp_path / "base")]
    assert run(["chat", *args]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "has no chat template" in error
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    template = ["--chat-template", str(tmp_path / "mine.jinja")]
    found = talk(monkeypatch, capsys, ["w5"], *args, *template)
    assert found == [f"one> {wanted(place, 'w0 w5 w1', 'one')}"]


BAD = [
    (["generate", "w5", "--prompt-file", "x"], "do not go together"),
    (["generate", "  "], "the prompt is empty"),
    (["generate", "--prompt-file", "none.txt"], "--prompt-file none.txt: cannot be read"),
    (["generate", "w5", "--adapter", "nowhere"], "--adapter nowhere: no such folder"),
    (["generate", "w5", "--adapter", "a.b=x"], "a name has no dots"),
    (["generate", "w5", "--temperature", "-1"], "--temperature is -1.0; it must be 0 or above"),
    (["generate", "w5", "--top-p", "0.5"], "--top-p is for sampling"),
    (["generate", "w5", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
    (["generate", "w5", "--dtype", "half"], "--dtype is half; it must be one of float32"),
    (["chat", "--model", "nowhere"], "--model nowhere: no such folder"),
    (["chat", "--chat-template", "none"], "--chat-template none: no such file"),
]


@pytest.mark.parametrize("args, expected", BAD)
def test_bad_input_is_one_line(place: Path, args: list[str], expected: str, capsys: Any) -> None:
    given = [] if "--adapter" in args else ["--adapter", str(place / "one")]
    assert run([*args, *given]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and expected in lines[0]


@pytest.mark.long
def test_the_readmes_four_commands(
    place: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """From chats on disk to a talk, a merged model and a GGUF file, as the README shows it."""
    text = (ROOT / "README.md").read_text()
    lines = [shlex.split(line) for line in re.findall(r"^    peftkern (.*)$", text, re.M)]
    start = next(i for i, line in enumerate(lines) if line[0] == "train" and "chats.jsonl" in line)
    train, talking, merge, export = lines[start : start + 4]
    assert [line[0] for line in (talking, merge, export)] == ["chat", "merge", "export"]
    train = [str(place / "base") if part == "MODEL" else part for part in train]
    (tmp_path / "chats.jsonl").symlink_to(place / "chats.jsonl")
    monkeypatch.chdir(tmp_path)
    fast = ["--steps", "3", "--batch-size", "8", "--lr", "0.1", "--lora-r", "4", "--cpu"]
    assert run([*train, *fast]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("w3\n/quit\n"))
    capsys.readouterr()
    assert run([*talking, "--cpu", "--max-new-tokens", "6"]) == 0
    answer = capsys.readouterr().out
    assert run([*merge, "--cpu"]) == 0 and run(export) == 0
    adapter, merged, file = talking[-1], merge[-1], export[-1]
    for folder in (adapter, f"{adapter}/checkpoint-3"):  # written elsewhere, then moved there
        config = peftkern.PeftConfig.from_pretrained(folder)
        named = json.loads((Path(folder) / "adapter_config.json").read_text())
        assert Path(config.base_model_name_or_path).samefile(place / "base"), named
    ids = torch.arange(3, 12)[None]
    base = tf.AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float64)
    wholes = [
        tf.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32),
        peft.PeftModel.from_pretrained(base.float(), adapter),
    ]
    with torch.no_grad():
        one, two = (model.eval()(input_ids=ids).logits for model in wholes)
    assert (one - two).norm() < 1e-5 * two.norm()
    words = tf.AutoTokenizer.from_pretrained(merged)
    prompt = words("w0 w3 w1", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = wholes[0].generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
    text = words.decode(found[0, prompt.shape[1] :], skip_special_tokens=True)
    assert " ".join(answer.split()) == f"{Path(adapter).name}> {text}".strip()
    tensors = gguf.GGUFReader(file).tensors
    assert len(tensors) == 2 * 2 * 7 and os.path.getsize(file) > 0
    assert str(tmp_path) not in (Path(adapter) / "adapter_config.json").read_text()
