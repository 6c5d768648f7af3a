"""Earlier measurements for a GPU: the table that ships for it, and the file of races on disk.

A :class:`Book` holds both for one kind of machine, and the dispatcher's decisions. The shipped
table counts only for the code that it was measured with. There is one file on disk for each (GPU,
driver, torch, triton, code, shipped table), so that nothing in it can be out of date. When several
processes write it at the same time, no entry is lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import hashlib
import importlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.registry import config_class
from ..kernels.switches import tf32
from ..kernels.tuning import FOLDER, WHOLE, Entry, Key, Table, bucket, load, path_for
from . import device
from .notes import note_once

log = logging.getLogger("peftkern")

CACHE_ENV = "PEFTKERN_CACHE"
# a config found for one number of rows serves others up to this many powers of two away; beyond
# that the kernel's default, which depends on M, is better
CONFIG_STEPS = 2
MOST_DECIDED = 4096  # facts of calls on one kind of device; when there are more, all are forgotten
_OPS = Path(__file__).parent
# the code that a timing holds for, besides the kernels: the files that call them
_OWN = (
    *("bits.py", "choices.py", "torch_backend.py", "triton_backend.py"),
    *("experts/configs.py", "experts/triton_way.py"),
    *("experts/grouped.py", "experts/grouped_linear.py"),
)
_NOT_MEASURED = ("reference.py", "registry.py", "tuning.py")


class Machine(NamedTuple):
    """The machine and the versions that a timing holds for, besides the code."""

    gpu: str
    driver: str
    torch: str
    triton: str

    @property
    def versions(self) -> dict[str, str]:
        return {"driver": self.driver, "torch": self.torch, "triton": self.triton}


_DRIVER_FILES = ("/sys/module/nvidia/version", "/sys/module/amdgpu/version")


def _driver() -> str:
    for path in _DRIVER_FILES:
        with contextlib.suppress(OSError):
            return Path(path).read_text().strip()
    with contextlib.suppress(OSError):  # under WSL, and in some containers, there are no such files
        cuda, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0:
            return f"CUDA {number.value}"
    return "none"


@functools.cache
def machine(index: int) -> Machine:
    """The machine of CUDA device ``index``; -1 is the CPU, where Triton's interpreter runs."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    if index < 0 or not torch.cuda.is_available():  # the latter: FakeTensors on "cuda"
        where = "CPU" if index < 0 else "no GPU"
        return Machine(where, "none", torch.__version__, triton)
    return Machine(torch.cuda.get_device_name(index), _driver(), torch.__version__, triton)


@functools.cache
def sources() -> str:
    """A hash of the code that a timing holds for, the same in a checkout and a wheel."""
    folder = FOLDER.parent
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        if path.name not in _NOT_MEASURED:
            digest.update(path.name.encode() + path.read_bytes())
    for name in _OWN:
        digest.update(name.encode() + (_OPS / name).read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """The folder where races are kept.

    It is $PEFTKERN_CACHE, else $XDG_CACHE_HOME/peftkern, else ~/.cache/peftkern.

    Raises:
        RuntimeError: there is no home folder.
    """
    if given := os.environ.get(CACHE_ENV):
        return Path(given)
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "peftkern"


def now() -> str:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()


class Book:
    """All measurements and decisions for one kind of machine; with ``instead`` only that table."""

    def __init__(self, machine: Machine, instead: Table | None = None) -> None:
        self.machine = machine
        self.shipped, self.shipped_note = instead, "under measurement"
        if instead is None:
            self.shipped, self.shipped_note = _shipped(machine)
        self.racing = threading.Lock()
        self.decisions: dict[Key, Any] = {}  # those of the dispatcher
        self.provisional: dict[Key, Any] = {}
        self.tries: Counter[Key] = Counter()
        self.looked_up: dict[Key, Any] = {}  # the results of `config` and `best_of`
        self.decided: dict[Any, Any] = {}  # what operations made of these, by their facts
        self._mine: dict[Key, Entry] = {}  # entries that this process raced
        self.path: Path | None = None
        if instead is None:
            try:
                self.path = self._file()
            except RuntimeError as e:
                _warn_once(f"races are not kept on disk: {e}")
        self.cached = self._read()

    def _file(self) -> Path:
        shipped = path_for(self.machine.gpu)
        digest = hashlib.sha256("\n".join([*self.machine, sources()]).encode())
        if self.shipped is not None:  # its configs are part of what was timed
            digest.update(shipped.read_bytes())
        name = f"{shipped.stem}-{digest.hexdigest()[:12]}.json"
        return cache_folder() / "tuning" / name

    def _empty(self) -> Table:
        return Table({"name": self.machine.gpu}, self.machine.versions, sources(), now())

    def _read(self) -> Table:
        """The file's content; an empty table without a file or with one that cannot be used."""
        empty = self._empty()
        if self.path is None:
            return empty
        try:
            found = load(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return empty
        except (OSError, ValueError) as e:
            _warn_once(f"{self.path} is not used, and written anew after the next race: {e}")
            return empty
        mine = (empty.gpu["name"], empty.versions, empty.sources)
        if (found.gpu.get("name"), found.versions, found.sources) != mine:
            _warn_once(
                f"{self.path} is not used, and written anew after the next race: "
                "it is of another machine or of other code"
            )
            return empty
        return found

    def keep(self, entries: Iterable[Entry]) -> None:
        """Keep the entries of a race, also on disk if that can be written."""
        self._mine.update({e.key: e for e in entries})
        # a new table, as other threads may be reading the old one
        self.cached = replace(self.cached, entries={**self.cached.entries, **self._mine})
        self.looked_up.clear()
        self.decided.clear()
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path):
                merged = self._read()  # with entries that other processes have written
                merged.add(self._mine.values())
                merged.date = now()
                merged.save(self.path)
        except OSError as e:
            _warn_once(f"races are not kept on disk: {e}")
            self.path = None
            return
        self.cached = merged

    def find(self, key: Key) -> tuple[Entry, str] | None:
        """(entry of exactly this key, its source in words); None without one."""
        for table, of in self._tables():
            if (entry := table.find(key)) is not None:
                return entry, of(entry)
        return None

    def find_near(self, key: Key, steps: int | None = None) -> tuple[Entry, str] | None:
        for table, of in self._tables():
            if (entry := table.find_near(key, steps)) is not None:
                return entry, of(entry)
        return None

    def _tables(self) -> Iterator[tuple[Table, Any]]:
        yield self.cached, lambda e: f"raced here on {e.date[:10]}"
        if self.shipped is not None:
            yield self.shipped, lambda e: f"shipped table of {self.machine.gpu}"


def _warn_once(text: str) -> None:
    note_once("%s", text, level=logging.WARNING)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock ``path`` for one process within the block, if the system has such locks."""
    try:
        fcntl: Any = importlib.import_module("fcntl")
    except ImportError:
        yield
        return
    with open(path.with_suffix(".lock"), "w") as f:
        with contextlib.suppress(OSError):
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _shipped(machine: Machine) -> tuple[Table | None, str]:
    """(shipped table or None, the table's name or why it does not count)."""
    path = path_for(machine.gpu)
    try:
        table = load(path)
    except FileNotFoundError:
        return None, f"no table ships for {machine.gpu}"
    except (OSError, ValueError) as e:
        log.warning("the shipped table is ignored: %s", e)
        return None, f"the shipped table is ignored: {e}"
    if table.sources != sources():
        return None, f"the shipped table of {machine.gpu} is ignored: it is of other kernels"
    return table, f"shipped table of {machine.gpu}, {table.date[:10]}"


open_books: dict[int, Book] = {}  # by device, once its files have been read
_by_machine: dict[Machine, Book] = {}
_opening = threading.Lock()


def book(index: int) -> Book:
    """The book of a device, which devices of one kind share; the first call reads files."""
    found = open_books.get(index)
    if found is None:
        with _opening:
            of = machine(index)
            if of not in _by_machine:
                _by_machine[of] = Book(of)
            found = open_books[index] = _by_machine[of]
    return found


def books() -> list[Book]:
    """The books that have been opened."""
    return list(_by_machine.values())


def forget() -> None:
    """Drop all books of this process; files are read again at the next use."""
    open_books.clear()
    _by_machine.clear()


@contextlib.contextmanager
def measured_with(table: Table) -> Iterator[None]:
    """Use this table instead of the shipped ones within the block; no file is read or written.

    This is for a race of whole operations with the configs that a race of kernels has found.
    """
    before = dict(open_books), dict(_by_machine)
    forget()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    made = Book(machine(0 if count else -1), instead=table)
    open_books.update(dict.fromkeys(range(-1, count), made))
    try:
        yield
    finally:
        forget()
        open_books.update(before[0])
        _by_machine.update(before[1])


class _Names(dict[torch.dtype, str]):
    def __missing__(self, dtype: torch.dtype) -> str:
        self[dtype] = name = str(dtype).removeprefix("torch.")
        return name


NAMES = _Names()  # of dtypes, as in keys
_tuple = tuple.__new__  # a NamedTuple's constructor calls it, at three times the cost


def products_in(dtype: torch.dtype) -> str:
    """The dtype's name in the key of a whole operation.

    It is "tf32" for float32 products in TF32, which have races of their own.
    """
    return "tf32" if dtype is torch.float32 and tf32() else NAMES[dtype]


def key_of(
    op: str,
    dtype: torch.dtype,
    adapter: torch.dtype,
    M: int,
    n: int,
    k: int,
    r: int,
    group: int = 1,
    mask: bool = False,
    grads: str = "",
    experts: int = 0,
    top: int = 0,
) -> Key:
    """The key of a call.

    Args:
        op: one of :data:`kernels.tuning.OPS`.
        dtype: of the activations.
        adapter: dtype of A and B.
        M: rows; the key has their bucket.
        n, k: as in :class:`Key`; ``n`` is the sum over a group's projections.
        r: a group's largest rank.
        group: the number of projections.
        mask: True if one of them drops.
        grads: the gradients that a backward makes, as letters of "xab"; or what else decides.
        experts, top: of a mixture, all and those of a token.
    """
    name = products_in(dtype) if dtype is torch.float32 and op in WHOLE else NAMES[dtype]
    low, m = NAMES[adapter], bucket(M)
    return _tuple(Key, (op, name, low, m, n, k, r, group, mask, grads, False, experts, top))


def _opened(like: Tensor) -> Book | None:
    """The book of a tensor's device; None in a CUDA graph's capture, which may read no files."""
    return None if device.capturing(like) else book(like.get_device())


def config(
    op: str,
    like: Tensor,
    adapter: torch.dtype,
    n: int,
    k: int,
    r: int,
    group: int = 1,
    mask: bool = False,
    grads: str = "",
    experts: int = 0,
    top: int = 0,
) -> Any:
    """The config that a table has for a kernel on ``like`` [M, ...], for ``config=``, or None.

    The other arguments are those of :func:`key_of`. After the first call it is one dict lookup.
    """
    M = like.shape[0]
    key = key_of(op, like.dtype, adapter, M, n, k, r, group, mask, grads, experts, top)
    of = open_books.get(like.get_device()) or _opened(like)
    if of is None:
        return None
    try:
        return of.looked_up[key]
    except KeyError:
        pass
    # a tile that is right for float32 adapters also has room for narrower ones
    keys = dict.fromkeys([key, key._replace(adapter_dtype="float32")])
    hits = [hit for key in keys if (hit := of.find_near(key, CONFIG_STEPS)) is not None]
    of.looked_up[key] = made = _make(hits[0][0]) if hits else None
    return made


def _make(entry: Entry) -> Any:
    if entry.choice == "two_pass":
        return entry.choice  # as kernels.grad_sb.grad_sb takes it
    try:
        return entry.make(config_class(entry.key.op))
    except (TypeError, ValueError) as e:
        log.warning("a config of a tuning table is ignored: %s", e)
        return None


def best_of(allowed: tuple[str, ...], key: Key, like: Tensor) -> str | None:
    """The fastest of ``allowed``, the same for all keys of an operation, in a table, or None."""
    of = open_books.get(like.get_device()) or _opened(like)
    if of is None:
        return None
    try:
        found: str | None = of.looked_up[key]
        return found
    except KeyError:
        pass
    hit, best = of.find_near(key), None
    if hit is not None:
        times = {name: t for name, t in hit[0].times.items() if name in allowed}
        chosen = hit[0].choice if hit[0].choice in allowed else None
        best = min(times, key=lambda name: times[name]) if times else chosen
    of.looked_up[key] = best
    return best


def decided(like: Tensor, facts: tuple[Any, ...], decide: Callable[..., Any], *args: Any) -> Any:
    """``decide(*args)``, kept for calls with the same facts on the device until a table changes."""
    of = open_books.get(like.get_device()) or _opened(like)
    if of is None:
        return decide(*args)
    try:
        return of.decided[facts]
    except KeyError:
        pass
    if len(of.decided) >= MOST_DECIDED:
        of.decided.clear()
    of.decided[facts] = made = decide(*args)
    return made
