"""``peftkern generate``: one text from a prompt, by each adapter."""

from __future__ import annotations

import sys
from pathlib import Path

from .after_settings import GenerateSettings
from .errors import UserError
from .modelio import hush_transformers
from .opening import find
from .speaking import BASE, Speaker, TooLong


def generate(prompt: str | None, settings: GenerateSettings) -> dict[str, str]:
    """Write the text of each adapter (and of the base model) to stdout; {name: text}."""
    settings.validate()
    hush_transformers()
    opened = find(settings.adapter, settings.model, settings.gguf_file)
    if BASE in opened.adapters and settings.compare_base:
        raise UserError(f"--compare-base: no adapter may be called {BASE} then; give name=folder")
    text = _prompt(prompt, settings.prompt_file)
    speaker = Speaker(opened, settings)
    if settings.chat:
        text = speaker.by_template([{"role": "user", "content": text}])
    names = [*speaker.names, *([BASE] if settings.compare_base else [])]
    found = {}
    for name in names:
        if len(names) > 1:
            print(f"== {name} ==", flush=True)
        try:
            found[name] = speaker.say(text, name, settings.chat)
        except TooLong as error:
            raise UserError(f"the prompt has {error}, which leave no room for a text") from None
    return found


def _prompt(given: str | None, file: str | None) -> str:
    if given is not None and file is not None:
        raise UserError("a prompt and --prompt-file do not go together; give one of them")
    if given is not None:
        text, where = given, "the prompt"
    elif file is not None:
        where = f"--prompt-file {file}"
        try:
            text = Path(file).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{where}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{where}: not valid UTF-8") from None
    else:
        if sys.stdin.isatty():
            raise UserError("no prompt: give one, --prompt-file, or text on stdin")
        text, where = sys.stdin.read(), "the prompt on stdin"
    if not text.strip():
        raise UserError(f"{where} is empty")
    return text.removesuffix("\n") if given is None else text
