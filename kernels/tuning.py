"""Tuning tables: what a race measured on one GPU, as JSON that ships beside the kernels.

One file a GPU, ``tuning/device_name=NVIDIA_H200.json``. Reading and writing only: nothing here
times, launches or decides (``benchmarks.gpu`` writes tables, a dispatcher reads them).

    {"schema": 1,
     "gpu": {"name": str, "capability": [major, minor], "sms": int, "memory_bytes": int, ...},
     "versions": {"driver": str, "cuda": str, "torch": str, "triton": str, ...},
     "sources": str,            # hash of the kernels that were raced
     "date": str,               # ISO 8601, UTC
     "entries": [{"op": str,    # one of OPS
                  "dtype": "bfloat16", "adapter_dtype": "float32",
                  "m": int,     # bucket of M, see bucket()
                  "n": int, "k": int, "r": int, "group": int, "mask": bool,
                  "choice": str | null,          # a name of CHOICES[op], for ops that have any
                  "config": {field: value} | null,  # of the op's *Config; null: its default
                  "us": {"p20": float, "p50": float, "p80": float},
                  "default_us": float | null,    # median of the kernel's own default config
                  "candidates": int}]}           # how many were right and timed

A dimension that an op does not have is 0 (shrink has no n). Readers ignore fields they do not know.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

SCHEMA = 1
FOLDER = Path(__file__).with_name("tuning")
LARGEST_BUCKET = 8192

# `forward`, `grad_input` and `grad_output` choose an implementation; the others only a config.
OPS = (
    "shrink", "expand", "low_rank_grad_input", "outer", "grad_a", "gemm", "gemm_grad_input",
    "small", "forward", "grad_input", "grad_output", "decode",
)  # fmt: skip
CHOICES = {
    "forward": ("torch", "hybrid", "fused"),  # Y = X Wᵀ + S Bᵀ, given S
    "grad_input": ("torch", "hybrid", "fused"),  # dX, given dS
    "grad_output": ("one_pass", "two_pass"),  # dS and dB
    "decode": ("torch", "small", "hybrid"),  # Y for M <= 16, from X
}

C = TypeVar("C")


@dataclass(frozen=True)
class Key:
    """What an entry was measured for; ``m`` is a bucket."""

    op: str
    dtype: str
    adapter_dtype: str
    m: int
    n: int
    k: int
    r: int
    group: int = 1
    mask: bool = False

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"op is {self.op!r}; allowed: {', '.join(OPS)}")
        if self.m != bucket(self.m):
            raise ValueError(f"m is {self.m}; allowed: a bucket, here {bucket(self.m)}")


@dataclass(frozen=True)
class Entry:
    """The winner for one key: which implementation, with which config, and its time in us."""

    key: Key
    choice: str | None
    config: dict[str, int | bool] | None
    us: dict[str, float]
    default_us: float | None = None
    candidates: int = 1

    def __post_init__(self) -> None:
        allowed = CHOICES.get(self.key.op, ())
        if self.choice not in (allowed or (None,)):
            raise ValueError(
                f"choice of {self.key.op} is {self.choice!r}; allowed: {', '.join(allowed) or None}"
            )
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
    """All entries for one GPU; the last one given for a key holds."""

    gpu: dict[str, Any]
    versions: dict[str, str]
    sources: str
    date: str
    entries: dict[Key, Entry] = field(default_factory=dict)

    def add(self, entries: Iterable[Entry]) -> None:
        self.entries.update({e.key: e for e in entries})

    def find(self, key: Key) -> Entry | None:
        """The entry of exactly this key."""
        return self.entries.get(key)

    def find_near(self, key: Key) -> Entry | None:
        """The entry of this key, or else of the nearest M-bucket with all else equal (the smaller
        of two as near)."""
        if (exact := self.find(key)) is not None:
            return exact
        same = {k.m: e for k, e in self.entries.items() if _without_m(k) == _without_m(key)}
        if not same:
            return None
        steps = {m: abs(m.bit_length() - key.m.bit_length()) for m in same}
        return same[min(same, key=lambda m: (steps[m], m))]

    def as_json(self) -> dict[str, Any]:
        rows = []
        for e in sorted(
            self.entries.values(), key=lambda e: tuple(map(str, asdict(e.key).items()))
        ):
            rest = {k: v for k, v in asdict(e).items() if k != "key"}
            rows.append({**asdict(e.key), **rest})
        return {
            "schema": SCHEMA,
            "gpu": self.gpu,
            "versions": self.versions,
            "sources": self.sources,
            "date": self.date,
            "entries": rows,
        }

    def save(self, path: Path) -> None:
        """Write to a temporary name, then rename."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)


def _without_m(key: Key) -> tuple[Any, ...]:
    return (key.op, key.dtype, key.adapter_dtype, key.n, key.k, key.r, key.group, key.mask)


def bucket(M: int) -> int:
    """The power of two that stands for M: rounded up, from 1 to 8192."""
    return min(LARGEST_BUCKET, 1 << max(M - 1, 0).bit_length())


def path_for(device_name: str, folder: Path = FOLDER) -> Path:
    """Where the table of a GPU lies: its name with underscores for what file names do not like."""
    safe = "".join(c if c.isalnum() or c in "-." else "_" for c in device_name.strip())
    return folder / f"device_name={safe}.json"


def from_json(data: Any, source: str = "table") -> Table:
    """A table out of parsed JSON.

    Raises:
        ValueError: another schema, or a field missing or of a wrong value; names ``source``.
    """
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{source} has schema {found!r}; allowed: {SCHEMA}")
    try:
        table = Table(data["gpu"], data["versions"], data["sources"], data["date"])
        for row in data["entries"]:
            key = Key(**{f.name: row[f.name] for f in fields(Key)})
            us = {k: float(v) for k, v in row["us"].items()}
            default_us, count = row.get("default_us"), row.get("candidates", 1)
            table.add([Entry(key, row["choice"], row["config"], us, default_us, count)])
    except KeyError as e:
        raise ValueError(f"{source} lacks the field {e}") from None
    except (TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"{source}: {e}") from None
    return table


def load(path: Path) -> Table:
    """The table in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no table of this schema; the file is named.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is no JSON: {e}") from None
    return from_json(data, str(path))
