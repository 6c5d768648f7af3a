"""Checkpoints that survive a kill at any moment: writing them and finding the newest complete one.

A checkpoint is written to ``OUT/.partial/``, gets a manifest with the size of every file, is
flushed to disk and only then renamed to ``OUT/checkpoint-N``. So a folder without a manifest, or
with other files than in its manifest, is from an interrupted save or damaged, and is never used.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.atomic import write_text_atomically
from .errors import UserError
from .settings import differing, first_difference

MANIFEST = "peftkern_checkpoint.json"
PARTIAL = ".partial"
FINISHED = "training.json"
CONFIG = "run.yaml"
REPORT = "report.html"
_NAME = re.compile(r"checkpoint-(\d+)")
# the files that Trainer needs besides the adapter and `rng_files` to continue exactly
STATE_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
DEEPSPEED_FILES = ("trainer_state.json", "latest")


@dataclass
class Checkpoint:
    """A complete checkpoint: its folder, its step and the values of its manifest."""

    path: Path
    step: int
    last: bool  # True: no step is left
    total: int  # the steps of the run that made it
    identity: dict[str, Any]
    notes: dict[str, Any]


def rng_files(processes: int) -> tuple[str, ...]:
    """The files with the random state of each process."""
    if processes == 1:
        return ("rng_state.pth",)
    return tuple(f"rng_state_{i}.pth" for i in range(processes))


def seal(
    folder: Path, identity: dict[str, Any], notes: dict[str, Any], wanted: Sequence[str]
) -> None:
    """Flush every file of a written checkpoint to disk and add its manifest.

    Raises RuntimeError when a ``wanted`` file is not there.
    """
    sizes = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(file, "rb+") as f:
            os.fsync(f.fileno())
            sizes[file.relative_to(folder).as_posix()] = os.fstat(f.fileno()).st_size
    absent = [name for name in wanted if name not in sizes]
    if absent:
        raise RuntimeError(
            f"Trainer wrote no {', '.join(absent)} into {folder}: it could not be resumed"
        )
    manifest = {"identity": identity, "notes": notes, "files": sizes}
    write_text_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def publish(folder: Path, out: Path) -> Path:
    """Rename a sealed checkpoint into ``out``, after removing an older one of the same step."""
    target = out / folder.name
    if target.exists():
        shutil.rmtree(target)
    os.replace(folder, target)
    _sync_folder(out)
    return target


def rotate(out: Path, keep: int) -> None:
    """Delete all complete checkpoints except the newest ``keep``."""
    complete = [c for c in _folders(out) if _why_incomplete(c[1]) is None]
    for _, path in complete[:-keep]:
        # the manifest goes first, so that a half-deleted checkpoint does not count as complete
        (path / MANIFEST).unlink()
        shutil.rmtree(path)


def find(out: Path) -> tuple[Checkpoint | None, list[str]]:
    """(the newest complete checkpoint in ``out`` or None, a message for each skipped folder)."""
    messages: list[str] = []
    if (out / PARTIAL).is_dir():
        names = sorted(p.name for p in (out / PARTIAL).iterdir())
        messages += [f"{n}: the run was killed while writing it; skipped" for n in names]
    for step, path in reversed(_folders(out)):
        reason = _why_incomplete(path)
        if reason is not None:
            messages.append(
                f"{path.name}: {reason}; skipped, the run replaces it when it gets there"
            )
            continue
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        total = state["max_steps"]
        made = manifest["identity"], manifest["notes"]
        return Checkpoint(path, step, step >= total, total, *made), messages
    return None, messages


def finished(out: Path) -> dict[str, Any] | None:
    """The record of a finished run in ``out``, or None."""
    try:
        record = json.loads((out / FINISHED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UserError(
            f"{out / FINISHED} cannot be read ({error}); pass --fresh to start over"
        ) from None
    if not isinstance(record, dict) or not isinstance(record.get("identity"), dict):
        raise UserError(f"{out / FINISHED} was not written by peftkern train; choose another --out")
    return record


def is_longer(now: dict[str, Any], was: dict[str, Any], steps: int) -> bool:
    """True when a run has the settings of an earlier one of ``steps`` steps, but goes on longer."""
    lengths = ("steps", "epochs")
    if differing(*({k: v for k, v in of.items() if k not in lengths} for of in (was, now))):
        return False
    for name in lengths:
        if was.get(name) and now.get(name):
            return bool(now[name] > was[name])
    return (now.get("steps") or 0) > steps


def refuse_other_settings(was: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Raise a UserError when a run would be continued with other settings than it began with."""
    difference = first_difference(was, now)
    if difference:
        raise UserError(
            f"{where} was made with other settings: {difference}. Give the same settings to go on, "
            "or --fresh to start over, or another --out"
        )


def refuse_foreign_adapter(out: Path) -> None:
    """Raise a UserError when saving into ``out`` would replace an adapter from another program."""
    ours = (out / FINISHED).exists() or any((path / MANIFEST).exists() for _, path in _folders(out))
    if (out / "adapter_config.json").exists() and not ours:
        raise UserError(
            f"--out {out} holds an adapter that peftkern train did not make; choose another"
        )


def clear(out: Path) -> None:
    """Delete an earlier run's checkpoints, record and adapter in ``out`` (``--fresh``), no more."""
    for name in (FINISHED, CONFIG, REPORT, "adapter_config.json", "adapter_model.safetensors"):
        (out / name).unlink(missing_ok=True)
    for _, path in _folders(out):
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


def _folders(out: Path) -> list[tuple[int, Path]]:
    if not out.is_dir():
        return []
    found = [(_NAME.fullmatch(p.name), p) for p in out.iterdir() if p.is_dir()]
    return sorted((int(match[1]), p) for match, p in found if match)


def _why_incomplete(path: Path) -> str | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        dict(manifest["identity"])
    except FileNotFoundError:
        return f"half-written (no {MANIFEST})"
    except (ValueError, KeyError, TypeError):
        return f"damaged ({MANIFEST} cannot be read)"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"incomplete ({name} is missing)"
        if file.stat().st_size != size:
            return f"damaged ({name} has {file.stat().st_size} bytes, not {size})"
    return None


def _sync_folder(folder: Path) -> None:
    """Flush a rename in ``folder`` to disk, if the system can (Windows cannot open a folder)."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
