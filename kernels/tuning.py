"""Tuning tables: the measurements of races on one GPU, as JSON that ships with the kernels.

There is one file for each GPU, ``tuning/device_name=NVIDIA_H200.json``. This file only reads and
writes tables; it does not time, launch or decide. (``benchmarks.gpu`` and ``peftkern tune`` write
tables. The dispatcher in ``peftkern/ops`` reads them, and keeps its own races in files of the same
schema.)

    {"schema": 1,
     "gpu": {"name": str, "capability": [major, minor], "sms": int, "memory_bytes": int, ...},
     "versions": {"driver": str, "cuda": str, "torch": str, "triton": str, ...},
     "sources": str,            # hash of the code that was raced
     "date": str,               # ISO 8601, UTC
     "entries": [{"op": str,    # one of OPS
                  "dtype": "bfloat16", "adapter_dtype": "float32",
                  "m": int,     # bucket of M, see bucket()
                  "n": int, "k": int, "r": int, "group": int, "mask": bool,
                  "grads": str,                  # backward: which of x, a, b, e.g. "xab", and "s"
                                                 # for given dS; mlp: the activation, and more;
                                                 # experts: the gate, the tiles' rows, and more
                  "graph": bool,                 # infer, few rows: replayed in a CUDA graph
                  "experts": int, "top": int,    # of a mixture: E, and those of a token; else 0
                  "choice": str | null,          # for ops of WHOLE, and for "grad_sb"
                  "config": {field: value} | null,  # of the op's *Config; null: its default
                  "us": {"p20": float, "p50": float, "p80": float},
                  "default_us": float | null,    # median of the kernel's own default config
                  "candidates": int,             # how many were right and timed
                  "times": {choice: us},         # medians of all of them, for ops of WHOLE
                  "left_out": {choice: why},
                  "date": str}]}                 # of this entry, ISO 8601, UTC

A dimension that an op does not have is 0 (shrink has no n). For a group, n is the sum of n and r
the largest r of its projections; of a mixture m is its tokens, and group its adapters. Readers
ignore unknown fields.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from . import registry

SCHEMA = 1
FOLDER = Path(__file__).with_name("tuning")
LARGEST_BUCKET = 8192

# kernels: an entry holds the best config; "grad_sb" also chooses between PASSES over dY
KERNELS = registry.OPS
PASSES = ("one_pass", "two_pass")
# whole operations: an entry chooses the implementation; the dispatcher defines their names and
# ignores unknown ones
WHOLE = (
    "forward",  # X to Y and S, with a given mask
    "backward",  # dY to dX, dA and dB
    "infer",  # X to Y, without dropout, nothing kept for a backward
    "mixed",  # infer for samples that name different adapters: r the largest, group their number
    "mlp_forward",  # an MLP's G and U (k: their columns) to down's Y and S (r: 0 without adapter)
    "mlp_backward",  # down's dY to dG and dU, and what is made beside them for the adapters
    "experts",  # a mixture without gradients: n the columns of up's output, k of X
    "experts_step",  # its forward and backward together
)
OPS = KERNELS + WHOLE

C = TypeVar("C")


class Key(NamedTuple):
    """The call for which an entry was measured; the dispatcher looks a call's entry up by it.

    ``m`` is a bucket. It is a tuple, unchecked, because every call makes some; an :class:`Entry`
    checks the one that it has.
    """

    op: str
    dtype: str
    adapter_dtype: str
    m: int
    n: int
    k: int
    r: int
    group: int = 1
    mask: bool = False
    grads: str = ""
    graph: bool = False
    experts: int = 0
    top: int = 0


_FIELDS = Key._fields[:-2]  # those that every table has


@dataclass(frozen=True)
class Entry:
    """The winner for one key: the implementation, its config and its time in microseconds."""

    key: Key
    choice: str | None
    config: dict[str, int | bool] | None
    us: dict[str, float]
    default_us: float | None = None
    candidates: int = 1
    times: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    date: str = ""

    def __post_init__(self) -> None:
        op, m, choice = self.key.op, self.key.m, self.choice
        if op not in OPS:
            raise ValueError(f"op is {op!r}; allowed: {', '.join(OPS)}")
        if m != bucket(m):
            raise ValueError(f"m is {m}; allowed: a bucket, here {bucket(m)}")
        allowed = "a name" if op in WHOLE else "None"
        if op == "grad_sb":
            fine, allowed = choice in PASSES, ", ".join(PASSES)
        else:
            fine = (isinstance(choice, str) and choice != "") if op in WHOLE else choice is None
        if not fine:
            raise ValueError(f"choice of {op} is {choice!r}; allowed: {allowed}")
        if missing := {"p20", "p50", "p80"} - set(self.us):
            raise ValueError(f"us of {self.key.op} lacks {', '.join(sorted(missing))}")

    def make(self, config_class: type[C]) -> C | None:
        """The config as an object, or None for the kernel's default.

        Raises:
            ValueError: a field that ``config_class`` does not have, or a value that it refuses.
        """
        if self.config is None:
            return None
        known = {f.name for f in fields(config_class)}  # type: ignore[arg-type]
        if unknown := set(self.config) - known:
            raise ValueError(
                f"config of {self.key.op} has {', '.join(sorted(unknown))}; allowed for "
                f"{config_class.__name__}: {', '.join(sorted(known))}"
            )
        return config_class(**self.config)


@dataclass
class Table:
    """All entries for one GPU; a later entry replaces an earlier one with the same key."""

    gpu: dict[str, Any]
    versions: dict[str, str]
    sources: str
    date: str
    entries: dict[Key, Entry] = field(default_factory=dict)

    def add(self, entries: Iterable[Entry]) -> None:
        self.entries.update({e.key: e for e in entries})

    def find(self, key: Key) -> Entry | None:
        """The entry of exactly this key, or None."""
        return self.entries.get(key)

    def find_near(self, key: Key, steps: int | None = None) -> Entry | None:
        """The entry of this key, else of the nearest M-bucket with all else equal, or None.

        Of two that are equally near it is the smaller one. It is at most ``steps`` powers of two
        away.
        """
        if (exact := self.find(key)) is not None:
            return exact
        same = {k.m: e for k, e in self.entries.items() if _alike(k, key)}
        away = {m: abs(m.bit_length() - key.m.bit_length()) for m in same}
        near = [m for m in same if steps is None or away[m] <= steps]
        return same[min(near, key=lambda m: (away[m], m))] if near else None

    def as_json(self) -> dict[str, Any]:
        rows = []
        for e in sorted(
            self.entries.values(), key=lambda e: tuple(map(str, e.key._asdict().items()))
        ):
            rest = {k: v for k, v in asdict(e).items() if k != "key"}
            rows.append({**e.key._asdict(), **rest})
        return {
            "schema": SCHEMA,
            "gpu": self.gpu,
            "versions": self.versions,
            "sources": self.sources,
            "date": self.date,
            "entries": rows,
        }

    def save(self, path: Path) -> None:
        """Write the table to ``path``, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)


def _alike(a: Key, b: Key) -> bool:
    """True when two keys differ only in M.

    For "decode" one row and several rows are different kernels, and so not alike.
    """
    if a.op == "decode" and (a.m == 1) != (b.m == 1):
        return False
    return a._replace(m=b.m) == b


def bucket(M: int) -> int:
    """The bucket of M: M rounded up to a power of two, from 1 to 8192."""
    if M > LARGEST_BUCKET:
        return LARGEST_BUCKET
    return 1 << (M - 1).bit_length() if M > 1 else 1


def path_for(device_name: str, folder: Path = FOLDER) -> Path:
    """The path of a GPU's table: its name, with underscores for characters unsafe in file names."""
    safe = "".join(c if c.isalnum() or c in "-." else "_" for c in device_name.strip())
    return folder / f"device_name={safe}.json"


def from_json(data: Any, source: str = "table") -> Table:
    """The table in parsed JSON.

    Raises:
        ValueError: another schema, or a field missing or of a wrong value; names ``source``.
    """
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{source} has schema {found!r}; allowed: {SCHEMA}")
    try:
        table = Table(data["gpu"], data["versions"], data["sources"], data["date"])
        for row in data["entries"]:
            more = {name: row.get(name, 0) for name in ("experts", "top")}
            key = Key(*(row[name] for name in _FIELDS), **more)
            us = {k: float(v) for k, v in row["us"].items()}
            times = {k: float(v) for k, v in row.get("times", {}).items()}
            table.add([
                Entry(
                    key, row["choice"], row["config"], us, row.get("default_us"),
                    row.get("candidates", 1), times, dict(row.get("left_out", {})),
                    str(row.get("date", "")),
                )
            ])  # fmt: skip
    except KeyError as e:
        raise ValueError(f"{source} lacks the field {e}") from None
    except (TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"{source}: {e}") from None
    return table


def load(path: Path) -> Table:
    """The table in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no table of this schema; the message names the file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is no JSON: {e}") from None
    return from_json(data, str(path))
