"""What a run of ``peftkern train`` has to go on from: its data, a finished run, a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import resume
from .checks import refuse_liger, refuse_reports, refuse_sharding, refuse_trl, resolve_bf16
from .data import Dataset, read_data
from .errors import UserError
from .modelio import NOT_HERE, locate_model
from .options import option
from .ranks import Ranks, refuse_other_precision
from .settings import TrainSettings, differing


@dataclass
class Found:
    """What a run has to go on from, and its data."""

    folder: str
    data: Dataset
    identity: dict[str, Any]
    done: dict[str, Any] | None = None  # the record of the finished run
    checkpoint: resume.Checkpoint | None = None
    messages: list[str] = field(default_factory=list)
    extends: bool = False  # it goes on from a run of fewer steps


def look(settings: TrainSettings, fresh: bool, ranks: Ranks) -> Found:
    """Read the data and find the last checkpoint."""
    refuse_liger(settings)
    refuse_sharding(settings, ranks)
    refuse_reports(settings)
    refuse_trl(settings, ranks)
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: exists and is not a folder")
    resume.refuse_foreign_adapter(out)
    folder, gguf_file = locate_model(settings.model, settings.gguf_file)
    messages = [] if Path(folder).exists() else [f"--model {folder}: {NOT_HERE}"]
    data = read_data(settings.data, settings.forms_of(), settings.data_format)
    settings.bf16 = resolve_bf16(settings)
    refuse_other_precision(settings.bf16)
    settings.gguf_file = gguf_file
    found = Found(folder, data, settings.identity(data.sha256, ranks.count))
    found.messages = messages
    if fresh:
        return found
    done = resume.finished(out)
    if done is not None:
        where = f"the finished run in {out}"
        found.extends = resume.is_longer(found.identity, done["identity"], done["steps"])
        if not found.extends:
            was = {**done["identity"], "order": found.identity["order"]}  # it sees no example again
            resume.refuse_other_settings(was, found.identity, where)
            found.done = done
            return found
    found.checkpoint, skipped = resume.find(out)
    found.messages += skipped
    if found.checkpoint is None and found.extends:
        raise UserError(
            f"--out {out} holds a finished run, but no checkpoint from which it could go on; "
            "--fresh trains from the start"
        )
    if found.checkpoint is not None:
        before = found.checkpoint
        if resume.is_longer(found.identity, before.identity, before.total):
            found.extends, before.last = True, before.step >= (settings.steps or math.inf)
        else:
            resume.refuse_other_settings(before.identity, found.identity, str(before.path))
    return found


def refuse_unlike(ranks: Ranks, found: Found, out: str) -> None:
    """Raise a UserError when processes were started with unlike settings, or see unlike files."""
    step = found.checkpoint.step if found.checkpoint else None
    seen = ranks.gather((found.identity, found.done is not None, step))
    for number, (identity, *state) in enumerate(seen):
        name = differing(seen[0][0], identity)
        if name is not None:
            values = [str(seen[i][0].get(name)) for i in (0, number)]
            raise UserError(
                f"{option(name)} is {values[0]} in process 0 and {values[1]} in process {number}; "
                "all processes must have the same settings and data",
                everywhere=True,
            )
        if state != list(seen[0][1:]):
            raise UserError(
                f"--out {out} holds other checkpoints for process {number} than for process 0; it "
                "must be one folder that all processes see",
                everywhere=True,
            )
