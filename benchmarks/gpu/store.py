"""The file that a part of ``benchmarks.gpu`` writes row by row, and continues after a cut.

Every change writes the whole file under a temporary name and renames it, so that a machine that
disappears leaves the last complete state. ``current`` names the running case: from it the
supervisor sees that a case hangs, and the next run sees which case killed its process.
"""

from __future__ import annotations

import datetime
import gc
import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from peftkern.ops import tuned

from .device import Device

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parents[1] / "results"
MEASURED = ("kernels", "peftkern/ops", "peftkern/tuners/lora")  # the code that a row measures


def now() -> str:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()


def stamp() -> str:
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H%M%SZ}"


def sources() -> str:
    """A hash of the code that is measured; results with another hash are not continued."""
    digest = hashlib.sha256()
    for folder in MEASURED:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str | None:
    """The checkout's commit; None without git."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class Broken(RuntimeError):
    """The device is unusable after ``culprit`` ran, so that this process must end."""

    def __init__(self, culprit: str, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {str(error)[:300]}")
        self.culprit = culprit


class Watch:
    """Records which provider of a case is running, and holds those that it must leave out.

    Left out are providers that broke the device, or hung, in an earlier try at the same case.
    """

    def __init__(self, banned: dict[str, str] | None = None, store: Store | None = None) -> None:
        self.banned = banned or {}
        self._store = store

    def keep(self, row: dict[str, Any]) -> None:
        """Write what there is of the running case, which a later run measures again."""
        if self._store is not None:
            self._store.put_partly(row)

    def at(self, culprit: str | None) -> None:
        """Record that ``culprit`` is running now; None stands for several at once."""
        if self._store is not None and self._store.data["current"] is not None:
            self._store.data["current"]["culprit"] = culprit
            self._store.write()

    def each(
        self,
        row: dict[str, Any],
        makers: Mapping[str, Any],
        device: Device,
        attempt: Callable[[str, Any, dict[str, Any]], None],
    ) -> None:
        """Call ``attempt(name, maker, entry)`` for each provider of a row that is not left out.

        An error is told in the provider's entry, and the row is kept after each.

        Raises:
            Broken: the device is unusable after a provider ran.
        """
        for name, maker in makers.items():
            entry = row["providers"][name] = {}
            if name in self.banned:
                entry["error"] = f"left out after: {self.banned[name]}"
                continue
            self.at(name)
            try:
                attempt(name, maker, entry)
            except Exception as e:
                if device.is_broken():
                    raise Broken(name, e) from e
                entry["error"] = f"{type(e).__name__}: {str(e)[:300]}"
            gc.collect()  # what a provider has made is not held while the next one runs
            self.keep(row)
        self.at(None)


class Store:
    """One results file, open for writing."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    @classmethod
    def create(cls, path: Path, part: str, **header: Any) -> Store:
        data = {
            "schema": SCHEMA,
            "part": part,
            "sources": sources(),
            "kernels": tuned.sources(),  # the code that a tuning table from this holds for
            "commit": commit(),
            "started": now(),
            "updated": now(),
            "finished": False,
            **header,
            "current": None,
            "not_run": [],
            "notes": [],
            "banned": {},
            "rows": [],
        }
        store = cls(path, data)
        store.write()
        return store

    @classmethod
    def open(cls, path: Path) -> Store:
        """The store with the file's present content.

        Raises:
            ValueError: it is not a results file of this schema.
        """
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema") != SCHEMA or "rows" not in data:
            raise ValueError(f"{path} is no results file of schema {SCHEMA}")
        return cls(path, data)

    def write(self) -> None:
        self.data["updated"] = now()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.data["rows"]

    def done(self) -> set[str]:
        """Keys that need no second run: those with a result or that killed their process."""
        return {row["key"] for row in self.rows if not row.get("partial")}

    def begin(self, key: str, limit_s: float) -> None:
        """Record that a case starts, which counts as hung after ``limit_s`` seconds."""
        self.data["current"] = {"key": key, "since": time.time(), "limit_s": limit_s}
        self.write()

    def put(self, row: dict[str, Any]) -> None:
        """Add a row, which replaces one with the same key."""
        self._replace(row)
        self.data["current"] = None
        self.write()

    def put_partly(self, row: dict[str, Any]) -> None:
        """Add what there is of the row of the running case."""
        self._replace({**row, "partial": True})
        self.write()

    def _replace(self, row: dict[str, Any]) -> None:
        self.data["rows"] = [r for r in self.rows if r["key"] != row["key"]] + [row]

    def watch(self, key: str) -> Watch:
        return Watch(self.data["banned"].get(key), self)

    def blame(self, why: str, culprit: str | None = None) -> str | None:
        """Record that the running case ended its process; returns the one to blame.

        A culprit, recorded or given, is left out of the next try at the case. Without one, or after
        three culprits, the case is closed with an error. Returns None when no case was running.
        """
        current = self.data["current"]
        if current is None:
            return None
        key, culprit = current["key"], culprit or current.get("culprit")
        banned = self.data["banned"].setdefault(key, {})
        if culprit is None or len(banned) >= 3:
            begun = next((r for r in self.rows if r["key"] == key), {})
            row = {**begun, "key": key, "part": self.data["part"], "error": why}
            row.pop("partial", None)
            self.put(row)
            return key
        banned[culprit] = why
        self.data["current"] = None
        self.write()
        return f"{culprit} in {key}"

    def note(self, text: str) -> None:
        if text not in self.data["notes"]:
            self.data["notes"].append(text)
            self.write()

    def finish(self, not_run: Iterable[str]) -> None:
        """Record the keys of cases that had no budget; without any the part is finished."""
        self.data["not_run"] = list(not_run)
        self.data["finished"] = not self.data["not_run"]
        self.data["current"] = None
        self.write()


def earlier(part: str, gpu: str, folders: Iterable[Path]) -> list[Store]:
    """The results of this part, this GPU and the present code, oldest first."""
    found = []
    for folder in dict.fromkeys(folders):
        for path in sorted(folder.glob(f"*-{part}.json")):
            try:
                store = Store.open(path)
            except (ValueError, OSError):
                continue  # not a results file, or one that something else has cut off
            same = store.data["part"] == part and store.data["sources"] == sources()
            if same and store.data.get("gpu", {}).get("name") == gpu:
                found.append(store)
    return sorted(found, key=lambda s: s.data["started"])


def results_folder(gpu: str, given: Path | None = None) -> Path:
    """The folder for results: ``given``, else benchmarks/results/<gpu>."""
    return given if given is not None else RESULTS / gpu
