"""``peftkern train`` on chats: templates, where the loss is, and packed rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from peftkern.cli.app import run
from peftkern.cli.chat import encode_turns, read_template
from peftkern.cli.encode import collator, encode
from peftkern.cli.errors import UserError
from peftkern.cli.forms import Record
from peftkern.cli.packing import pack, packed_collator, sees_across
from peftkern.cli.train import train
from tests.closeness import assert_same_number
from tests.command import command, make_folder, settings
from tests.models import build

# words stand for the ends of turns: w57 for the user's, w58 before and w59 after the assistant's
BODY = "{%- if m.role == 'user' %}w57 {{ m.content }} {% endif %}"
PLAIN = (
    "{%- for m in messages %}" + BODY + "{%- if m.role == 'assistant' %}w58 {{ m.content }} w59 "
    "{% endif %}{%- endfor %}{%- if add_generation_prompt %}w58 {% endif %}"
)
MARKED = PLAIN.replace(
    "{{ m.content }} w59", "{% generation %}{{ m.content }} w59{% endgeneration %}"
)
# as some templates do, it leaves out what was thought before the last question
FORGETFUL = PLAIN.replace("{{ m.content }} w59", "{% if loop.last %}w56 {% endif %}{{ m.content }}")
TURNS = [
    {"role": role, "content": said}
    for role, said in (("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4 w5"))
]
# w0 has the id 3
IDS = [60, 4, 61, 5, 62, 60, 6, 61, 7, 8, 62]
LOSS = [-100, -100, -100, 5, 62, -100, -100, -100, 7, 8, 62]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama without chat template, chats in chat.jsonl, and templates."""
    root = make_folder(tmp_path_factory.mktemp("chat"), ("llama",))
    for name, template in (("plain", PLAIN), ("marked", MARKED), ("forgetful", FORGETFUL)):
        (root / f"{name}.jinja").write_text(template)
    with open(root / "chat.jsonl", "w") as file:
        for i in range(20):
            said = [f"w{i}", f"w{i + 9} w1", f"w{i + 1}", f"w{i + 10} w2"]
            turns = [{**t, "content": s} for t, s in zip(TURNS, said, strict=True)]
            file.write(json.dumps({"messages": turns}) + "\n")
    return root


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "llama")


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_loss_is_on_the_assistants_turns_alone(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    assert encode_turns(tokenizer, Record("f:1", turns=TURNS)) == {
        "input_ids": IDS,
        "labels": LOSS,
    }
    # of a prompt of turns, none has loss
    coded = encode_turns(tokenizer, Record("f:1", turns=TURNS, from_turn=3))
    assert coded == {"input_ids": IDS, "labels": [-100] * 8 + LOSS[8:]}
    short = encode([Record("f:1", turns=TURNS)], tokenizer, "causal_lm", 4, [])
    assert short.examples == [{"input_ids": IDS[:4], "labels": LOSS[:4]}] and short.cut == 1
    assert encode([Record("f:1", turns=TURNS)], tokenizer, "causal_lm", 3, []).unusable == 1


def test_templates_that_cannot_be_used(tokenizer: Any) -> None:
    record = Record("f:7", turns=TURNS)
    with pytest.raises(UserError, match="^f:7: turns need a chat template.*--chat-template FILE"):
        encode_turns(tokenizer, record)
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(UserError, match="^f:7: the chat template writes turn 2 otherwise when mor"):
        encode_turns(tokenizer, record)
    assert encode_turns(tokenizer, Record("f:8", turns=TURNS[:2]))["labels"][-2:] == [59, 5]
    tokenizer.chat_template = "{{ raise_exception('turns must alternate') }}"
    with pytest.raises(UserError, match="^f:7: the chat template refuses the turns: turns must al"):
        encode_turns(tokenizer, record)
    tokenizer.chat_template = "{% if false %}{% generation %}{% endgeneration %}{% endif %}w1"
    with pytest.raises(UserError, match="^f:7: the chat template marks no token as the assistant"):
        encode_turns(tokenizer, record)


def test_template_files(folder: Path, tmp_path: Path) -> None:
    assert read_template(str(folder / "marked.jinja"))[0] == MARKED
    bad = tmp_path / "bad.jinja"
    bad.write_text("w1\n{% for m in messages %}\n{% endif %}")
    for path, said in ((bad, f"{bad}:3: "), (tmp_path / "none", "no such file")):
        with pytest.raises(UserError, match="^--chat-template ") as error:
            read_template(str(path))
        assert said in str(error.value)


def test_alpaca_is_a_chat_where_there_is_a_template(tokenizer: Any) -> None:
    record = Record("f:1", prompt="w7", completion="w2", turns=TURNS[:2])
    coded = encode([record], tokenizer, "causal_lm", 9, []).examples[0]
    assert coded["input_ids"] == [10, 5, 1]
    tokenizer.chat_template = PLAIN
    coded = encode([record], tokenizer, "causal_lm", 9, []).examples[0]
    assert coded == {"input_ids": IDS[:5], "labels": LOSS[:5]}


def test_a_chat_is_trained(folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    chat = {"data": str(folder / "chat.jsonl"), "steps": 8}
    args = command(folder, out, **chat)
    assert run(args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "chat.jsonl:1: turns need a chat template" in error
    assert not out.exists()
    template = ["--chat-template", str(folder / "plain.jinja")]
    assert run([*args, *template]) == 0
    printed = capsys.readouterr().out
    assert "loss on the assistant's turns, found by prefixes of the text" in printed
    record = json.loads((out / "training.json").read_text())
    assert record["after"]["loss"] < record["before"]["loss"]
    assert AutoTokenizer.from_pretrained(out).chat_template == PLAIN
    # the content of the template counts, not where it lies
    again = tmp_path / "again.jinja"
    again.write_text(PLAIN)
    assert run([*args, "--chat-template", str(again)]) == 0
    again.write_text(MARKED)
    assert run([*args, "--chat-template", str(again)]) == 2
    assert "the content of --chat-template has changed since" in capsys.readouterr().err


def test_rows_are_packed_by_best_fit() -> None:
    examples = [
        {"input_ids": [i] * length, "labels": [i] * length}
        for i, length in enumerate((2, 5, 3, 4, 1))
    ]
    rows = pack(examples, 6)
    assert [row["input_ids"] for row in rows] == [[1] * 5 + [4], [0, 0] + [3] * 4, [2] * 3]
    assert rows[1]["labels"] == [-100, 0, -100, 3, 3, 3]
    assert rows[1]["position_ids"] == [0, 1, 0, 1, 2, 3]
    batch = packed_collator(9)(rows)
    assert batch["input_ids"][2].tolist() == [2, 2, 2, 9, 9, 9]
    assert batch["position_ids"][2].tolist() == [0, 1, 2, 0, 1, 2]
    assert "attention_mask" not in batch


def test_a_packed_example_is_computed_as_alone() -> None:
    model = build("llama", vocab=63).double().eval()
    model.config.use_cache = False
    examples = [
        {"input_ids": list(range(a, a + n)), "labels": list(range(a, a + n))}
        for a, n in ((3, 5), (20, 7), (40, 3))
    ]
    packed = packed_collator(0)(pack(examples, 12))
    assert packed["input_ids"].shape == (2, 12)
    alone = collator(0)(examples)
    with torch.no_grad():
        rows, wanted = (model(**batch).logits for batch in (packed, alone))
    assert_same_number(rows[0, :5], wanted[0, :5])
    assert_same_number(rows[0, 5:], wanted[1, :7])
    assert_same_number(rows[1, :3], wanted[2, :3])


@pytest.mark.parametrize("name, across", [("llama", False), ("qwen3_moe", False), ("bloom", True)])
def test_models_that_see_across_a_row_are_found(name: str, across: bool) -> None:
    model = build(name, vocab=63).train()
    cached = model.config.use_cache
    assert sees_across(model) == across
    assert model.config.use_cache == cached and model.training


def test_packing_trains_and_says_what_it_does(folder: Path, tmp_path: Path, capsys: Any) -> None:
    record = train(settings(folder, tmp_path / "out", packing=True, eval_split=0.0, steps=6))
    printed = " ".join(capsys.readouterr().out.split())
    assert "packed into 8 rows of up to 32 tokens" in printed
    assert "sees the earlier examples" not in printed
    assert record["losses"][-1][1] < record["losses"][0][1]
    with pytest.raises(UserError, match="--packing does not go with --task seq_cls"):
        settings(folder, tmp_path, packing=True, task="seq_cls").validate()
