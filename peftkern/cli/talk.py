"""``peftkern chat``: a talk with a model, in which adapters can be switched."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from .after_settings import ChatSettings
from .chat import read_template
from .errors import UserError
from .modelio import hush_transformers
from .opening import find
from .speaking import BASE, Speaker, TooLong

_HELP = "/adapter NAME, /base, /reset, /help, /quit"


class Talk:
    """The turns so far, and who answers."""

    def __init__(self, speaker: Speaker, settings: ChatSettings) -> None:
        self.speaker, self.settings = speaker, settings
        self.who = speaker.names[0]
        self.turns: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget all turns but the system's."""
        system = self.settings.system
        self.turns = [{"role": "system", "content": system}] if system else []

    def answer(self, said: str) -> None:
        """Write the answer to the user's next turn; both are remembered."""
        self.turns.append({"role": "user", "content": said})
        text = self.speaker.by_template(self.turns)
        answers = []
        compare = self.settings.compare_base and self.who != BASE
        try:
            for name in [self.who, *([BASE] if compare else [])]:
                print(f"{name}> ", end="", flush=True)
                answers.append(self.speaker.say(text, name, by_template=True))
        except TooLong as error:
            self.turns.pop()
            print(f"the talk has {error}, which leave no room for an answer; /reset starts over")
            return
        self.turns.append({"role": "assistant", "content": answers[0]})

    def obey(self, line: str) -> bool:
        """Do what a line that begins with a slash asks for; False when the talk is over."""
        command, _, name = line.partition(" ")
        name = name.strip()
        if command == "/quit":
            return False
        if command == "/reset":
            self.reset()
            print("the talk begins anew")
        elif command == "/base":
            self.who = BASE
            print("the base model answers")
        elif command == "/adapter" and name in self.speaker.names:
            self.who = name
            print(f"{name} answers")
        elif command == "/adapter":
            asked = f"no adapter {name!r}; " if name else ""
            print(f"{asked}there are {', '.join(self.speaker.names)}")
        elif command == "/help":
            print(_HELP)
        else:
            print(f"unknown: {command}; there are {_HELP}")
        return True


def chat(settings: ChatSettings) -> None:
    """Talk until /quit or the end of stdin. UserError when there is no chat template."""
    settings.validate()
    hush_transformers()
    opened = find(settings.adapter, settings.model, settings.gguf_file)
    if opened.task != "causal_lm":
        raise UserError(f"the adapter is for {opened.task}; a talk needs one for causal_lm")
    if BASE in opened.adapters:
        raise UserError(f"no adapter may be called {BASE} in a talk; give name=folder")
    template = None
    if settings.chat_template is not None:
        template = read_template(settings.chat_template)[0]
    speaker = Speaker(opened, settings)
    if template is not None:
        speaker.tokenizer.chat_template = template
    speaker.by_template([{"role": "user", "content": "?"}])  # before anybody has written anything
    talk = Talk(speaker, settings)
    asks = sys.stdin.isatty()
    if asks:
        print(f"{', '.join(speaker.names)}; {_HELP}")
    try:
        for line in _lines(asks):
            if line.startswith("/"):
                if not talk.obey(line):
                    return
            elif line:
                talk.answer(line)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print()


def _lines(asks: bool) -> Iterator[str]:
    """The lines of stdin, without spaces around them."""
    while True:
        if asks:
            try:
                yield input("you> ").strip()
            except EOFError:
                return
        else:
            line = sys.stdin.readline()
            if not line:
                return
            yield line.strip()
