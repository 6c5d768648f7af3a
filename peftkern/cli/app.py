"""The ``peftkern`` command.

Its options are defined by the settings of each command; ``train.py``, ``tune.py`` and
``demo/run.py`` do the work.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from . import ranks
from .after_settings import (
    ChatSettings,
    ExportSettings,
    GenerateSettings,
    InspectSettings,
    MergeSettings,
)
from .bench.settings import BenchSettings
from .demo.settings import DemoSettings
from .errors import CommandError, UserError, first_line
from .options import takes
from .settings import PLACE, TrainSettings
from .tune_settings import TuneSettings

app = typer.Typer(
    rich_markup_mode="markdown",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from .._version import __version__

        print(f"peftkern {__version__}")
        raise typer.Exit


@app.callback()
def options_of_all_commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """LoRA adapters on fused kernels: train one on your own text, or see the demo."""


@app.command("train")
@takes(TrainSettings)
def train_command(
    settings: TrainSettings,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--fresh",
            help="Go on from the last complete checkpoint in --out, or delete what is there.",
            rich_help_panel=PLACE,
        ),
    ] = True,
) -> None:
    """Train an adapter (LoRA, DoRA, a prefix or prompt) on your own text.

    The same command goes on where a killed run stopped. torchrun and accelerate
    launch start it in several processes. An example in --data has the fields:

    - causal_lm: text; or prompt, completion; or messages (role, content); or
    conversations (from, value); or instruction, output

    - seq_cls: text, label

    - token_cls: tokens, labels

    - seq_2_seq_lm: prompt, completion
    """
    settings.validate()  # before torch and transformers are loaded
    from .train import train

    train(settings, fresh=not resume)


@app.command("demo")
@takes(DemoSettings)
def demo_command(settings: DemoSettings) -> None:
    """Fine-tune a real model on this machine, beside HF PEFT, and write demo-report.html.

    lm is SmolLM2-135M-Instruct, seqcls is all-MiniLM-L6-v2; the text comes from the standard
    library of the running Python. Offline.
    """
    _refuse_several_processes("demo")
    from .demo.run import demo

    demo(settings)


@app.command("bench")
@takes(BenchSettings)
def bench_command(settings: BenchSettings) -> None:
    """Measure peftkern beside HF PEFT on your model and machine, and write report.html.

    Training steps with and without dropout, their memory, answers, mixed batches: all take turns,
    round by round. Liger is measured too where it is installed, on a GPU.
    """
    settings.validate()
    _refuse_several_processes("bench")
    from .bench.run import bench

    bench(settings)


@app.command("tune")
@takes(TuneSettings)
def tune_command(settings: TuneSettings) -> None:
    """Find the fastest way for each operation on this GPU, before the first step has to.

    What is found is kept in $PEFTKERN_CACHE (else ~/.cache/peftkern) for this GPU, driver, torch,
    triton and version of the kernels.
    """
    settings.validate()  # before torch is loaded
    _refuse_several_processes("tune")
    from .tune import tune

    tune(settings)


@app.command("inspect")
@takes(InspectSettings)
def inspect_command(
    settings: InspectSettings,
    path: Annotated[str, typer.Argument(help="Folder or file of an adapter.")],
) -> None:
    """Show a saved adapter: tensors, ranks, norms, and which programs load it."""
    settings.validate()
    from .inspect import inspect

    inspect(path, settings)


@app.command("generate")
@takes(GenerateSettings)
def generate_command(
    settings: GenerateSettings,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; else from stdin.")] = None,
) -> None:
    """Write a text from a prompt, by one adapter or several, or by the base model too."""
    settings.validate()
    _refuse_several_processes("generate")
    from .generate import generate

    generate(prompt, settings)


@app.command("chat")
@takes(ChatSettings)
def chat_command(settings: ChatSettings) -> None:
    """Talk with a model; /adapter NAME and /base change who answers.

    Lines from stdin are the user's turns, from a terminal or a pipe.
    """
    settings.validate()
    _refuse_several_processes("chat")
    from .talk import chat

    chat(settings)


@app.command("merge")
@takes(MergeSettings)
def merge_command(settings: MergeSettings) -> None:
    """Merge adapters into their base model, dense, with its tokenizer."""
    settings.validate()
    from .merge import merge

    merge(settings)


@app.command("export")
@takes(ExportSettings)
def export_command(settings: ExportSettings) -> None:
    """Write an adapter in the form that vLLM, SGLang or llama.cpp reads, or merged.

    What the target cannot read is refused by name; what it would read wrongly is written otherwise.
    """
    settings.validate()
    from .export import export

    export(settings)


def _refuse_several_processes(command: str) -> None:
    if ranks.started().count > 1:
        raise UserError(
            f"{command} runs in one process; start it without torchrun or accelerate launch"
        )


def main(args: list[str] | None = None) -> None:
    """Run the command and exit: 0 done, 1 the run failed, 2 bad input, 130 interrupted."""
    code = run(args)
    if code and ranks.in_group():
        # the group's other processes may be gone: nothing waits for them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(args: list[str] | None = None) -> int:
    """Run the command and return its exit code; every error becomes one line on stderr.

    Of several processes, the first one prints an error that all of them have.
    """
    # tqdm reads it when it is imported; without it, other libraries' bars would disturb ours
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        # in its standalone mode typer calls sys.exit itself and prints errors of several lines
        code = app(args=args, prog_name="peftkern", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except CommandError as error:
        # before a group is made, all processes know the same
        code, everywhere = (2 if isinstance(error, UserError) else 1), error.everywhere
        return _fail(str(error), code, everywhere or not ranks.in_group(), in_step=everywhere)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # the reader of our output has ended (`peftkern ... | head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        return _fail(f"cannot read or write: {error}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from the last checkpoint", 130, True)
    except Exception as error:
        # typer's own errors (unknown option, missing value), from any version of click
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            message = error.format_message()
            return _fail(message, error.exit_code, True) if message else error.exit_code
        if type(error).__name__ == "Abort":
            return _fail(
                "interrupted; the same command goes on from the last checkpoint", 130, True
            )
        if ranks.lost(error):
            reason = first_line(error).split(". ")[0]
            message = f"another process has ended, or does not answer ({reason}); the same command"
            return _fail(f"{message} goes on from the last checkpoint", 1, True)
        raise


def _fail(message: str, code: int, everywhere: bool = False, in_step: bool = False) -> int:
    """Print the message, unless the first process prints it for all of them; return ``code``.

    ``in_step`` says that the processes of a group all call this, one as the other.
    """
    if not everywhere or ranks.prints():
        which = "" if everywhere or not ranks.in_group() else f" (process {ranks.number()})"
        print(f"peftkern: {' '.join(message.split())}{which}", file=sys.stderr, flush=True)
        ranks.has_printed(in_step)
    else:
        ranks.wait_for_the_first(in_step)
    return code
