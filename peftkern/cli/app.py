"""The ``peftkern`` command: options and their help. The work is done in ``train.py``, ``tune.py``
and ``demo.py``.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from .errors import RunError, UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_LORA = "The adapter"
_LOOP = "The training"
_PLACE = "Saving and going on"


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
def train_command(
    model: Annotated[str, typer.Option(help="Folder of the base model (or a .gguf file).")],
    data: Annotated[str, typer.Option(help="A .jsonl or .txt file, or a folder of such files.")],
    out: Annotated[str, typer.Option(help="Folder for checkpoints and the adapter.")],
    task: Annotated[
        str, typer.Option(help="causal_lm, seq_cls, token_cls or seq_2_seq_lm.")
    ] = "causal_lm",
    gguf_file: Annotated[
        str | None, typer.Option(help="Which .gguf file, if the model folder holds several.")
    ] = None,
    lora_r: Annotated[int, typer.Option(help="Rank.", rich_help_panel=_LORA)] = 16,
    lora_alpha: Annotated[
        float, typer.Option(help="Scale: alpha / r.", rich_help_panel=_LORA)
    ] = 32.0,
    lora_dropout: Annotated[
        float, typer.Option(help="Dropout before A.", rich_help_panel=_LORA)
    ] = 0.0,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, or names with commas.", rich_help_panel=_LORA)
    ] = "all-linear",
    rslora: Annotated[
        bool, typer.Option("--rslora", help="Scale: alpha / sqrt(r).", rich_help_panel=_LORA)
    ] = False,
    lr: Annotated[float, typer.Option(help="Learning rate.", rich_help_panel=_LOOP)] = 2e-4,
    scheduler: Annotated[
        str,
        typer.Option(
            help="linear, cosine, constant or constant_with_warmup.", rich_help_panel=_LOOP
        ),
    ] = "linear",
    warmup_steps: Annotated[int, typer.Option(rich_help_panel=_LOOP)] = 0,
    weight_decay: Annotated[float, typer.Option(rich_help_panel=_LOOP)] = 0.0,
    max_grad_norm: Annotated[
        float, typer.Option(help="Gradient clipping; 0: none.", rich_help_panel=_LOOP)
    ] = 1.0,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps; instead of --epochs.", rich_help_panel=_LOOP),
    ] = None,
    epochs: Annotated[
        float, typer.Option(help="Passes over the data.", rich_help_panel=_LOOP)
    ] = 3.0,
    batch_size: Annotated[
        int, typer.Option(help="Examples per forward pass.", rich_help_panel=_LOOP)
    ] = 4,
    grad_accumulation: Annotated[
        int, typer.Option(help="Forward passes per optimizer step.", rich_help_panel=_LOOP)
    ] = 1,
    max_length: Annotated[
        int, typer.Option(help="Longest example, in tokens.", rich_help_panel=_LOOP)
    ] = 512,
    eval_split: Annotated[
        float, typer.Option(help="Share of the examples held out.", rich_help_panel=_LOOP)
    ] = 0.1,
    seed: Annotated[int, typer.Option(rich_help_panel=_LOOP)] = 0,
    bf16: Annotated[
        bool | None,
        typer.Option(
            "--bf16/--no-bf16",
            help="Base in bfloat16 (default: on a GPU that has it).",
            rich_help_panel=_LOOP,
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=_LOOP
        ),
    ] = False,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Leave the GPU alone.", rich_help_panel=_LOOP)
    ] = False,
    save_every: Annotated[
        int, typer.Option(help="Steps between checkpoints.", rich_help_panel=_PLACE)
    ] = 100,
    keep: Annotated[
        int, typer.Option(help="How many checkpoints stay on disk.", rich_help_panel=_PLACE)
    ] = 2,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--fresh",
            help="Go on from the last complete checkpoint in --out, or delete what is there.",
            rich_help_panel=_PLACE,
        ),
    ] = True,
) -> None:
    """Train a LoRA adapter on your own text.

    The same command goes on where a killed run stopped. A line of a .jsonl file holds:

    - causal_lm: {"text"} or {"prompt", "completion"}

    - seq_cls: {"text", "label"}

    - token_cls: {"tokens", "labels"}

    - seq_2_seq_lm: {"prompt", "completion"}
    """
    given: dict[str, Any] = dict(locals())
    fresh = not given.pop("resume")
    from .settings import TrainSettings

    settings = TrainSettings(**given)
    settings.validate()  # before torch and transformers are loaded
    from .train import train

    train(settings, fresh=fresh)


@app.command("demo")
def demo_command(
    task: Annotated[
        str, typer.Option(help="lm: write docstrings. seqcls: sort docstrings by topic.")
    ] = "lm",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    out: Annotated[str, typer.Option(help="Folder for the report and the adapter.")] = "demo-out",
    lora_dropout: Annotated[float, typer.Option(help="Dropout before A.")] = 0.0,
    seed: Annotated[
        int, typer.Option(help="Selection and order of the data, initial weights.")
    ] = 0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave the GPU alone.")] = False,
) -> None:
    """Fine-tune a real model on this machine, beside HF PEFT, and write demo-report.html.

    lm is SmolLM2-135M-Instruct, seqcls is all-MiniLM-L6-v2; the text comes from the standard
    library of the running Python. Offline.
    """
    given: dict[str, Any] = dict(locals())
    from .demo import DemoSettings, demo

    demo(DemoSettings(**given))


@app.command("tune")
def tune_command(
    model: Annotated[
        str | None, typer.Option(help="Folder of a model: its config.json gives the shapes.")
    ] = None,
    shapes: Annotated[
        str | None, typer.Option(help="OUTxIN of weights instead: 4096x4096,14336x4096.")
    ] = None,
    r: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    rows: Annotated[
        str, typer.Option(help="Tokens in a batch; each stands for its power of two.")
    ] = "1,16,2048,8192",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    adapter_dtype: Annotated[str, typer.Option(help="float32, or that of --dtype.")] = "float32",
    dropout: Annotated[
        str, typer.Option(help="Dropout of A's input; only 0 or not 0 matters.")
    ] = "0,0.1",
    targets: Annotated[str, typer.Option(help="all-linear, or names with commas.")] = "all-linear",
    show: Annotated[
        bool, typer.Option("--show", help="Print what is known for this GPU, and race nothing.")
    ] = False,
    export: Annotated[
        str | None, typer.Option(help="Write what is known to a file, as tables ship.")
    ] = None,
) -> None:
    """Find the fastest way for each operation on this GPU, before the first step has to.

    What is found is kept in $PEFTKERN_CACHE (else ~/.cache/peftkern) for this GPU, driver, torch,
    triton and version of the kernels.
    """
    given: dict[str, Any] = dict(locals())
    from .tune_settings import TuneSettings

    settings = TuneSettings(**given)
    settings.validate()  # before torch is loaded
    from .tune import tune

    tune(settings)


def main(args: list[str] | None = None) -> None:
    """Run the command and exit: 0 done, 1 the run failed, 2 bad input, 130 interrupted."""
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """The exit code of the command; every error becomes one line on stderr."""
    # read when tqdm is imported: the bars of the libraries below would run through ours
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        # typer calls sys.exit itself in its standalone mode, with errors of several lines
        code = app(args=args, prog_name="peftkern", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UserError as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # whoever read our output is gone (`peftkern ... | head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        return _fail(f"cannot read or write: {error}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from the last checkpoint", 130)
    except Exception as error:
        # typer's own errors (unknown option, missing value), of whichever click typer carries
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            message = error.format_message()
            return _fail(message, error.exit_code) if message else error.exit_code
        if type(error).__name__ == "Abort":
            return _fail("interrupted; the same command goes on from the last checkpoint", 130)
        raise


def _fail(message: str, code: int) -> int:
    print(f"peftkern: {' '.join(message.split())}", file=sys.stderr)
    return code
