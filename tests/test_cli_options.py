"""Options of commands, which are declared once, in the dataclass of the command's settings."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer

from peftkern.cli.options import setting, takes


@dataclass
class Settings:
    where: str = setting(help="A folder.")
    lora_r: int = setting(16, "Rank.")
    rate: float = setting(0.5, "A number.", "The loop")
    seed: int | None = setting(None)
    half: bool | None = setting(None, "In half.", flag="--half/--no-half")
    cpu: bool = setting(False, flag="--cpu")


def run(*args: str) -> list[tuple[Settings, bool]]:
    """The arguments of each call of the command."""
    app, seen = typer.Typer(), []

    @app.command()
    @takes(Settings)
    def command(
        settings: Settings, resume: Annotated[bool, typer.Option("--resume/--fresh")] = True
    ) -> None:
        """What the command does."""
        seen.append((settings, resume))

    app(args=list(args), standalone_mode=False)
    return seen


def refusal(*args: str) -> str:
    with pytest.raises(Exception) as caught:
        run(*args)
    error: Any = caught.value  # of whichever click typer carries
    assert error.exit_code == 2
    return error.format_message()


def test_defaults_are_the_settings_own() -> None:
    assert run("--where", "x") == [(Settings("x"), True)]


def test_every_option_reaches_its_field() -> None:
    given = "--where x --lora-r 4 --rate 0.25 --seed 3 --no-half --cpu --fresh".split()
    wanted = Settings("x", lora_r=4, rate=0.25, seed=3, half=False, cpu=True)
    assert run(*given) == [(wanted, False)]


def test_what_has_no_default_must_be_given() -> None:
    assert "--where" in refusal("--lora-r", "4")


def test_values_are_of_the_fields_type() -> None:
    assert "--lora-r" in refusal("--where", "x", "--lora-r", "four")


def test_help_says_what_the_field_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == []
    said = capsys.readouterr().out
    for words in ("What the command does.", "A folder.", "Rank.", "The loop", "--no-half"):
        assert words in said


@pytest.mark.parametrize("command", ["train", "tune", "demo", "inspect", "merge", "export", "chat"])
def test_help_loads_nothing_heavy(command: str) -> None:
    code = (
        "import sys; from peftkern.cli.app import run\n"
        f"assert run([{command!r}, '--help']) == 0\n"
        "print('heavy:', *sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "heavy:"
