"""The forms of an example: which fields they have, and the record that is made of them.

=================  =================================================  ==============================
form               fields (others are ignored)                        loss (causal_lm)
=================  =================================================  ==============================
text               text                                               on all of it
prompt-completion  prompt, completion (texts, or lists of turns)      on the completion
messages           messages: turns {role, content}                    on the assistant's turns
sharegpt           conversations: turns {from, value}                 on the assistant's turns
alpaca             instruction, output, and input or none             on the output
preference         prompt, chosen, rejected (texts or turns)          (--trainer dpo)
labelled           text, label                                        (seq_cls)
tagged             tokens, labels: one label for each token           (token_cls)
=================  =================================================  ==============================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .errors import UserError
from .readers import kind_of

# the roles of turns, in the words of each form
ROLES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"},
}
# (who speaks, what is said), as the forms name it
_TURN_FIELDS = (("role", "content"), ("from", "value"))

# the prompt with which models without a chat template have been trained on Alpaca's data
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)

Turn = dict[str, Any]


@dataclass
class Record:
    """One example as the user wrote it. ``origin`` is ``file:line`` (a .txt file: ``file``).

    ``turns`` are those of a chat, ``{"role", "content", ...}``; those from number ``from_turn`` on
    may have loss. ``prompt`` and ``completion`` beside them are for a model without chat template.
    """

    origin: str
    text: str = ""
    prompt: str | None = None
    completion: str | None = None
    label: str | None = None
    tokens: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    from_turn: int = 0
    tools: list[Any] | None = None
    # what DPO compares: two texts after ``prompt``, or two lists of turns after ``turns``
    answers: tuple[Any, Any] | None = None

    def has_content(self) -> bool:
        """False for an example of white space alone."""
        if self.answers is not None:
            return True
        if self.completion is not None:
            return bool(self.completion.strip())
        return bool(self.text.strip() or self.tokens or self.turns)


@dataclass(frozen=True)
class Form:
    """A form of examples: the fields that it needs, the tasks that take it, and how it is read."""

    name: str
    needs: tuple[str, ...]
    tasks: tuple[str, ...]
    read: Callable[[str, dict[str, Any]], Record]

    def said(self) -> str:
        """The form's name and fields, for a message."""
        return f"{self.name} ({', '.join(self.needs)})"


def taker(task: str) -> str:
    """The option that decides which forms are taken: the task, or DPO, which has forms alone."""
    return "--trainer dpo" if task == DPO else f"--task {task}"


def form_of(where: str, fields: dict[str, Any], task: str, named: str) -> Form:
    """The form of a row, which ``named`` says if it is not "auto"; UserError when none fits."""
    able = [form for form in FORMS if task in form.tasks]
    if named != "auto":
        able = [form for form in able if form.name == named]
        if not able:
            fit = ", ".join(form.name for form in FORMS if task in form.tasks)
            raise UserError(f"--data-format {named}: {taker(task)} takes {fit}")
    fitting = [form for form in able if all(name in fields for name in form.needs)]
    if len(fitting) == 1:
        return fitting[0]
    allowed = " | ".join(form.said() for form in able)
    if fitting:
        has = " and ".join(form.said() for form in fitting)
        raise UserError(f"{where}: has both {has}; name one with --data-format")
    begun = [form for form in able if any(name in fields for name in form.needs)]
    if len(begun) == 1 or len(able) == 1:
        form = (begun or able)[0]
        absent = next(name for name in form.needs if name not in fields)
        raise UserError(f"{where}: missing field {absent!r} of {form.said()}")
    given = ", ".join(map(repr, fields)) or "none"
    raise UserError(f"{where}: the fields are {given}; {taker(task)} takes {allowed}")


def _plain(where: str, fields: dict[str, Any]) -> Record:
    return Record(where, text=_string(where, fields, "text"))


def _pair(where: str, fields: dict[str, Any]) -> Record:
    if isinstance(fields["prompt"], list) and isinstance(fields["completion"], list):
        asked, said = _turns(where, fields, "prompt"), _turns(where, fields, "completion")
        return _chat(where, fields, "completion", asked + said, len(asked))
    prompt, completion = _string(where, fields, "prompt"), _string(where, fields, "completion")
    return Record(where, prompt=prompt, completion=completion)


def _conversation(name: str) -> Callable[[str, dict[str, Any]], Record]:
    def read(where: str, fields: dict[str, Any]) -> Record:
        turns = _turns(where, fields, name)
        system = fields.get("system")
        if system and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": _string(where, fields, "system")}, *turns]
        return _chat(where, fields, name, turns)

    return read


def _chat(
    where: str, fields: dict[str, Any], name: str, turns: list[Turn], from_turn: int = 0
) -> Record:
    if not any(turn["role"] == "assistant" for turn in turns[from_turn:]):
        raise UserError(f"{where}: no turn of {name!r} is the assistant's: it has nothing to learn")
    return Record(where, turns=turns, from_turn=from_turn, tools=_tools(where, fields))


def _tools(where: str, fields: dict[str, Any]) -> list[Any] | None:
    tools = fields.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{where}: field 'tools' must be a list, not {kind_of(tools)}")
    return tools or None


def _turns(where: str, fields: dict[str, Any], name: str) -> list[Turn]:
    value = fields[name]
    if not isinstance(value, list):
        raise UserError(f"{where}: field {name!r} must be a list of turns, not {kind_of(value)}")
    if not value:
        raise UserError(f"{where}: field {name!r} holds no turn")
    return [_turn(f"{where}: turn {i} of {name!r}", turn) for i, turn in enumerate(value, 1)]


def _turn(where: str, turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise UserError(f"{where} must be an object, not {kind_of(turn)}")
    names = next((both for both in _TURN_FIELDS if all(n in turn for n in both)), None)
    if names is None:
        given = ", ".join(map(repr, turn)) or "none"
        raise UserError(f"{where} has the fields {given}; it needs role, content or from, value")
    who, said = turn[names[0]], turn[names[1]]
    role = ROLES.get(who) if isinstance(who, str) else None
    if role is None:
        raise UserError(f"{where} has the {names[0]} {who!r}; allowed: {', '.join(ROLES)}")
    # what else a turn has (tool_calls, name, ...) is for the template; tables fill it with null
    rest = {k: v for k, v in turn.items() if k not in names and v is not None}
    if said is None and rest.get("tool_calls"):
        said = ""
    elif not isinstance(said, str):
        raise UserError(f"{where} has a {names[1]} that must be a string, not {kind_of(said)}")
    elif not said.strip() and not rest.get("tool_calls"):
        raise UserError(f"{where} ({role}) is empty; leave it out, or the example")
    return {"role": role, "content": said, **rest}


def _alpaca(where: str, fields: dict[str, Any]) -> Record:
    instruction, output = _string(where, fields, "instruction"), _string(where, fields, "output")
    given = _string(where, fields, "input") if fields.get("input") else ""
    if not instruction.strip():
        raise UserError(f"{where}: field 'instruction' is empty")
    prompt = _ALPACA.format(
        paired=", paired with an input that provides further context" if given else "",
        instruction=instruction,
        input=f"### Input:\n{given}\n\n" if given else "",
    )
    asked = f"{instruction}\n\n{given}" if given else instruction
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
    if fields.get("system"):
        turns.insert(0, {"role": "system", "content": _string(where, fields, "system")})
    return Record(where, prompt=prompt, completion=output, turns=turns)


def _preference(where: str, fields: dict[str, Any]) -> Record:
    pair = ("chosen", "rejected")
    if all(isinstance(fields[name], str) for name in pair):
        if "prompt" not in fields:
            raise UserError(f"{where}: missing field 'prompt' before the texts chosen, rejected")
        for name in pair:
            if not fields[name].strip():
                raise UserError(f"{where}: field {name!r} is empty")
        answers = fields["chosen"], fields["rejected"]
        return Record(where, prompt=_string(where, fields, "prompt"), answers=answers)
    chosen, rejected = (_turns(where, fields, name) for name in pair)
    asked = _turns(where, fields, "prompt") if "prompt" in fields else []
    if not asked:  # both begin with it
        same = zip(chosen, rejected, strict=False)
        count = next(
            (i for i, (a, b) in enumerate(same) if a != b), min(len(chosen), len(rejected))
        )
        asked, chosen, rejected = chosen[:count], chosen[count:], rejected[count:]
    if not asked:
        raise UserError(f"{where}: 'chosen' and 'rejected' begin unlike, and there is no 'prompt'")
    for name, turns in zip(pair, (chosen, rejected), strict=True):
        if not any(turn["role"] == "assistant" for turn in turns):
            raise UserError(f"{where}: no turn of {name!r} after the prompt is the assistant's")
    return Record(where, turns=asked, answers=(chosen, rejected), tools=_tools(where, fields))


def _labelled(where: str, fields: dict[str, Any]) -> Record:
    text = _string(where, fields, "text")
    return Record(where, text=text, label=_label(where, fields["label"], "label"))


def _tagged(where: str, fields: dict[str, Any]) -> Record:
    tokens, labels = fields["tokens"], fields["labels"]
    for name, value in (("tokens", tokens), ("labels", labels)):
        if not isinstance(value, list):
            raise UserError(f"{where}: field {name!r} must be a list, not {kind_of(value)}")
    if not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{where}: field 'tokens' must hold strings only")
    if len(tokens) != len(labels):
        raise UserError(f"{where}: {len(tokens)} tokens but {len(labels)} labels")
    return Record(where, tokens=tokens, labels=[_label(where, x, "labels") for x in labels])


def _string(where: str, fields: dict[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} must be a string, not {kind_of(value)}")
    return value


def _label(where: str, value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise UserError(f"{where}: a label in {name!r} must be a non-empty string or an integer")
    return str(value)


DPO = "dpo"  # in place of a task
_LM, _PAIRED = ("causal_lm",), ("causal_lm", "seq_2_seq_lm")
FORMS = (
    Form("text", ("text",), _LM, _plain),
    Form("prompt-completion", ("prompt", "completion"), _PAIRED, _pair),
    Form("messages", ("messages",), _LM, _conversation("messages")),
    Form("sharegpt", ("conversations",), _LM, _conversation("conversations")),
    Form("alpaca", ("instruction", "output"), _PAIRED, _alpaca),
    Form("preference", ("chosen", "rejected"), (DPO,), _preference),
    Form("labelled", ("text", "label"), ("seq_cls",), _labelled),
    Form("tagged", ("tokens", "labels"), ("token_cls",), _tagged),
)
FORM_NAMES = ("auto", *(form.name for form in FORMS))
