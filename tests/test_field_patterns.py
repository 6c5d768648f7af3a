"""Patterns from files match as in ``re``, and always in bounded time."""

from __future__ import annotations

import json
import random
import re
import time

import pytest
import regex

import peftkern
from peftkern.checkpoint.hotswap import hotswap_adapter
from peftkern.utils import patterns
from peftkern.utils.module_tree import get_pattern_key, match_target_against_key
from peftkern.utils.patterns import Pattern
from tests.field import quietly, trained
from tests.tiny import assert_same, make, snapshot

# `re` takes for ever for the first; `regex` sees that there is no "!", and for the second as well
SEEN_THROUGH = "(([a-z_.0-9])+)+!"
ENDLESS = "((a|[a-z_.0-9])+|[a-z])+[!?]"
LONGEST = 20  # seconds of the processor; without a limit it takes until the end of the world
FIELDS = {
    "target_modules": ENDLESS,
    "exclude_modules": ENDLESS,
    "rank_pattern": {ENDLESS: 2},
    "alpha_pattern": {ENDLESS: 2},
    "layers_pattern": [ENDLESS],
}


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    monkeypatch.setattr(patterns, "ONE_NAME", 0.05)
    monkeypatch.setattr(patterns, "IN_ALL", 0.1)


def settings_of(field):
    more = {"layers_to_transform": [0]} if field == "layers_pattern" else {}
    return {field: FIELDS[field], **more}


def edited(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


@pytest.mark.parametrize("field", FIELDS)
def test_a_pattern_that_backtracks_for_ever_fails_by_name(field, tmp_path) -> None:
    trained("lora").save_pretrained(tmp_path)
    edited(tmp_path, **settings_of(field))
    base, model = make("llama"), trained("lora")
    for target, load in (
        (base, lambda: peftkern.PeftModel.from_pretrained(base, tmp_path)),
        (model, lambda: model.load_adapter(tmp_path, "other")),
    ):
        before, start = snapshot(target), time.thread_time()
        with pytest.raises(ValueError, match=rf"`{field}` holds .*takes too long to match") as e:
            quietly(load)
        assert ENDLESS in str(e.value)
        assert time.thread_time() - start < LONGEST
        assert_same(target, before)


def test_one_that_fails_at_once_matches_nothing(tmp_path) -> None:
    trained("lora").save_pretrained(tmp_path)
    edited(tmp_path, target_modules=SEEN_THROUGH)
    with pytest.raises(ValueError, match="not found in the base model"):
        quietly(peftkern.PeftModel.from_pretrained, make("llama"), tmp_path)


@pytest.mark.parametrize("field", FIELDS)
def test_so_does_one_that_is_given_in_code(field) -> None:
    base = make("llama")
    before = snapshot(base)
    for inject in (peftkern.get_peft_model, lambda m, c: peftkern.inject_adapter_in_model(c, m)):
        with pytest.raises(ValueError, match="takes too long"):
            quietly(inject, base, peftkern.LoraConfig(**settings_of(field)))
        assert_same(base, before)
    # beside parameters, which are enough where no module matches
    config = peftkern.LoraConfig(target_modules=ENDLESS, target_parameters=["q_proj.weight"])
    with pytest.raises(ValueError, match="takes too long"):
        quietly(peftkern.get_peft_model, base, config)
    assert_same(base, before)


def test_ranks_of_a_hot_swap(tmp_path) -> None:
    trained("lora").save_pretrained(tmp_path)
    edited(tmp_path, rank_pattern={ENDLESS: 2})
    model = trained("lora")
    before = snapshot(model)
    with pytest.raises(ValueError, match="`rank_pattern` holds .*takes too long"):
        hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    assert_same(model, before)


def test_helpers_of_hf_pefts_are_limited_as_well() -> None:
    name = "model.layers.0.self_attn.q_proj"
    assert match_target_against_key(r".*\.(q|k)_proj", name)
    assert get_pattern_key(["k_proj", r"self_attn\.q_.*"], name) == r"self_attn\.q_.*"
    with pytest.raises(ValueError, match="takes too long"):
        match_target_against_key(ENDLESS, name)
    with pytest.raises(ValueError, match="takes too long"):
        get_pattern_key([ENDLESS], name)


def test_many_names_that_each_take_a_little_less(monkeypatch) -> None:
    monkeypatch.setattr(patterns, "ONE_NAME", 10.0)
    pattern = Pattern(ENDLESS, "target_modules")
    length = next(n for n in range(10, 40) if seconds(pattern, n) > 2 * patterns.LONG)
    start, seen = time.thread_time(), 0
    with pytest.raises(ValueError, match="for all"):
        for _ in range(1000):
            pattern.fullmatch("a" * length)
            seen += 1
    assert time.thread_time() - start < LONGEST


def seconds(pattern, length) -> float:
    start = time.thread_time()
    regex.fullmatch(pattern.shown, "a" * length)
    return time.thread_time() - start


@pytest.mark.parametrize(
    "text, says",
    [
        ("(", "is not a regular expression: missing"),
        ("a{99999999999999}", "is not a regular expression"),
        ("(" * 3000 + ")" * 3000, "is not a regular expression"),
        ("(" * 40 + "a+" + ")+" * 40, "40 levels of repetition; allowed are 20000 and 8"),
        ("(?x) " + "(" * 40 + "a+" + ")+" * 40, "levels of repetition"),
        ("(a|b)+" * 10_000, "60000 characters"),
        (3, "is not a regular expression"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(text, says) -> None:
    with pytest.raises(ValueError, match=f"`alpha_pattern` holds .*{says}") as error:
        Pattern(text, "alpha_pattern")
    assert len(str(error.value)) < 500
    if isinstance(text, str):
        with pytest.raises(ValueError, match="`alpha_pattern` holds"):
            peftkern.LoraConfig(alpha_pattern={text: 2})
        with pytest.raises(ValueError, match="`layers_pattern` holds"):
            config = peftkern.LoraConfig(
                target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=text
            )
            peftkern.get_peft_model(make("llama"), config)


def test_ordinary_patterns_are_re_s_own() -> None:
    """Their speed is, too."""
    for text in (
        r".*\.(q_proj|v_proj)",
        r"model\.layers\.(0|1|2)\.self_attn\.[qk]_proj",
        r".*layers\.\d+\..*(up|down)_proj",
        r"(?:.*\.)?(?:a|b)(?:$|\..*)",
        "q_proj",
        "[(+*]",
        r"\(a\)\+",
    ):
        assert isinstance(Pattern(text, "x").fullmatch.__self__, re.Pattern), text
    for text in ("(a|b)+", "(?:a+){2}", "(?:a)*", ".*.*.*.*.*.*", "a?a?a?a?a?a?", "(?x)(a)+"):
        assert not hasattr(Pattern(text, "x").fullmatch, "__self__"), text


PARTS = ["a", "b", ".", "[ab]", "[^a]", "[[:alpha:]]", r"\.", r"\w", "{", "}", "{e}", "{1}", "-"]
PARTS += ["q_proj", "(?:a)", "(a|b)", "(?P<n>a)", "$", "^", r"\b", "(?=a)", "(?!b)", r"\1", "[]a]"]
PARTS += ["[a{e}]", r"\{", "(?#x(y)", r"[\]]", "(?>a|ab)"]
TIMES = ["", "", "", "*", "+", "?", "{2}", "{1,3}", "*?", "+?", "{e<=1}", "{,2}", "{s}", "??"]
NAMES = [
    "a",
    "b",
    "aa",
    "ab",
    "a{e}",
    "aab",
    "abab",
    "q_proj",
    "a.b",
    "a:]",
    "{",
    "a]",
    "",
    "a" * 8,
]


def some(draw: random.Random, depth: int) -> str:
    if depth == 0 or draw.random() < 0.4:
        return draw.choice(PARTS) + draw.choice(TIMES)
    parts = [some(draw, depth - 1) for _ in range(draw.randrange(1, 4))]
    inner = draw.choice(["", "|"]).join(parts)
    return draw.choice(["({})", "(?:{})", "{}"]).replace("{}", inner, 1) + draw.choice(TIMES)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of re: "[[" may mean something one day
def test_what_matches_is_what_re_matches() -> None:
    """Fuzzy matching ({e<=1}) and classes ([[:alpha:]]) of ``regex`` mean nothing here."""
    draw = random.Random(0)
    limited = 0
    for _ in range(1500):
        text = some(draw, draw.randrange(1, 4))
        try:
            theirs = re.compile(text)
        except re.error:
            with pytest.raises(ValueError, match="not a regular expression"):
                Pattern(text, "x")
            continue
        ours = Pattern(text, "x")
        limited += not hasattr(ours.match, "__self__")
        for how in ("match", "fullmatch"):
            for name in NAMES:
                mine, other = getattr(ours, how)(name), getattr(theirs, how)(name)
                assert (mine and mine.span()) == (other and other.span()), (text, how, name)
                assert (mine and mine.groups()) == (other and other.groups()), (text, how, name)
    assert limited > 100
    assert regex.fullmatch("(ab){e<=1}", "ac")  # which is what could have happened
