"""What a compiled kernel moves: each operand's tile, how far ahead it is asked for, how widely.

The tiles and the copies in flight are read from Triton's GPU dialect (TTGIR), in which loops are
pipelined already; the bytes that one thread moves in one access stand in the PTX alone. The lines
of the source, which both name, join the two.

A copy is in flight when the step before does not wait for it. That takes a tile asked for before
the loop, and a second place to put it: with one place the next copy is asked for when the products
of this step are done, and the next step then waits for all of it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

Place = tuple[str, ...]  # "file:line:column" of an operation, then of the calls that lead to it

_ALIAS = re.compile(r"^(#loc\w*) = loc\((.*)\)$")
_SPOT = re.compile(r'"(?:[^"]*/)?([^"/]*)":(\d+):(\d+)')
_RESULT = re.compile(r"^(%[^ :=]+)(?::\d+)? = (.*)$")
_VALUE = re.compile(r"%[\w#.-]+")
_COPY = re.compile(
    r"(tt\.load|tt\.store|ttg\.async_copy_global_to_local"
    r"|ttng\.async_tma_copy_global_to_local|ttng\.async_tma_copy_local_to_global) (.*)"
)
_STORES = ("tt.store", "ttng.async_tma_copy_local_to_global")
_TILE = re.compile(
    r"tensor<((?:\d+x)+)!tt\.ptr<[a-z]+(\d+)|tensordesc<(?:tensor<)?((?:\d+x)+)[a-z]+(\d+)"
)
_BUFFER = re.compile(r"memdesc<((?:\d+x)+)")
# operations whose result points to where their first operand does
_SAME = re.compile(
    r"(?:tt\.(?:addptr|splat|broadcast|expand_dims|reshape|bitcast|trans)|ttg\.convert_layout"
    r"|ttg\.memdesc_(?:index|subslice|trans|reinterpret)) (%[\w#.-]+)"
)
_MOVE = re.compile(r"\b(?:ld|st)\.global([\w.:]*)")
_ASYNC = re.compile(r"\bcp\.async\.c[ag]\.shared\.global.*?\], 0x([0-9a-fA-F]+)")
_LINE = re.compile(r"\.loc\s+\d+ \d+ \d+(?:,.*inlined_at \d+ (\d+) (\d+))?.*?// ([\w.]+:\d+:\d+)")


@dataclass(eq=False)
class _Region:
    """A region of the kernel: the body of a loop, or of anything else."""

    loop: bool
    arguments: list[str] = field(default_factory=list)  # what a loop carries to its next step
    yielded: list[str] = field(default_factory=list)
    uses: dict[str, int] = field(default_factory=dict)  # value -> first line in the body
    loads: bool = False  # some loads are done in each step
    inner: bool = False  # a loop inside of it has loads
    serial: bool = False  # the source says num_stages=1


@dataclass(eq=False)
class Access:
    """A load or a store of one tile by one program.

    ``ahead``: how many later tiles are on their way while this one is used; None where nobody asks
    for any: outside of loops, in loops around loops, in those that say num_stages=1, and in
    branches of a loop that has other loads in each step.
    ``width``: bytes a thread and access; 0 for a bulk copy, None if the PTX does not tell.
    """

    operand: str
    store: bool
    nbytes: int
    width: int | None
    place: Place
    ahead: int | None = None


@dataclass(eq=False)
class _Copy:
    """What the reader knows of an access beside it."""

    access: Access
    line: int
    result: str
    buffer: str | None  # the allocation in shared memory that it fills
    depth: int  # tiles that the allocation has room for
    loop: _Region | None
    branch: bool  # it is in a branch of that loop


@dataclass(eq=False)
class _Product:
    barrier: str
    loop: _Region
    depth: int


def _places(ttgir: str) -> dict[str, Place]:
    """{alias of a location: its place}."""
    raw = dict(m.groups() for line in ttgir.splitlines() if (m := _ALIAS.match(line)))

    def find(text: str) -> Place:
        if m := re.match(r"callsite\((#loc\w*) at (#loc\w*)\)", text):
            return find(raw.get(m[1], "")) + find(raw.get(m[2], ""))
        if m := _SPOT.match(text):
            return (":".join(m.groups()),)
        if m := re.search(r"#loc\w*", text):  # a name for another location
            return find(raw.get(m[0], ""))
        return ()

    return {alias: find(text) for alias, text in raw.items()}


def _size(dims: str) -> int:
    return math.prod(map(int, dims.split("x")[:-1]))


class _Reader:
    """Reads one module of TTGIR, line by line."""

    def __init__(self, ttgir: str, serial: set[Place]) -> None:
        self.places = _places(ttgir)
        self.serial = serial  # loops whose source says num_stages=1
        self.parameters: set[str] = set()
        self.came: dict[str, str] = {}  # value -> the value that it points into
        self.rooms: dict[str, int] = {}  # allocation -> elements
        self.stack: list[_Region] = []
        self.copies: list[_Copy] = []
        self.products: list[_Product] = []
        self.waits: set[tuple[str, _Region]] = set()
        self.pendings = 0  # products of warpgroups that a step of a loop leaves in flight
        for number, line in enumerate(ttgir.splitlines()):
            if not line.startswith("#"):
                self._read(number, line.strip())

    def _place(self, line: str) -> Place:
        where = re.search(r"loc\((#loc\w*)\)$", line)
        return self.places.get(where[1], ()) if where else ()

    def _loop(self) -> tuple[_Region | None, bool]:
        """The innermost loop, and whether a branch of it is open."""
        for i, region in enumerate(reversed(self.stack)):
            if region.loop:
                return region, i > 0
        return None, False

    def _root(self, value: str) -> tuple[str, str]:
        """(the value that ``value`` points into, the last name of the source on the way)."""
        name, seen = "", set()
        while value not in seen:
            seen.add(value)
            base = re.sub(r"(\.\d+|_\d+)+$", "", value.lstrip("%").partition("#")[0])
            name = name if base.isdigit() or base.startswith("arg") else base
            if value in self.parameters or value not in self.came:
                break
            value = self.came[value]
        return value, name

    def _read(self, number: int, line: str) -> None:
        if line.startswith("}") and self.stack:
            region = self.stack.pop()
            region.serial |= self._place(line) in self.serial
            if line.endswith("{"):  # the other branch, or the body of a while
                self.stack.append(region)
        match = _RESULT.match(line)
        result, text = match.groups() if match else ("", line)
        self.came.pop(result, None)  # regions side by side may use a name twice
        self.rooms.pop(result, None)
        loop, branch = self._loop()
        values = _VALUE.findall(text)
        if text.startswith("scf.yield"):
            if self.stack and self.stack[-1].loop:
                self.stack[-1].yielded = _VALUE.findall(text.partition(" : ")[0])
        else:
            for region in self.stack:
                for value in values:
                    region.uses.setdefault(value, number)
        if text.startswith("tt.func"):
            self.parameters = set(_VALUE.findall(text))
        elif same := _SAME.match(text):
            self.came[result] = same[1]
        elif text.startswith("ttg.local_alloc : ()"):
            self.rooms[result] = _size(_BUFFER.search(text)[1])
        elif match := re.match(r"ttng\.warp_group_dot_wait .*pendings = (\d+)", text):
            self.pendings = max(self.pendings, int(match[1]) if loop else 0)
        elif text.startswith("ttng.tc_gen5_mma") and loop:
            barrier = re.findall(r"(%[^ ,]+)\[%", text)[-1]
            self.products.append(_Product(barrier, loop, self.rooms[self._root(barrier)[0]]))
        elif text.startswith("ttng.wait_barrier") and loop:
            self.waits.add((values[0], loop))
        elif copy := _COPY.match(text):
            self._copy(number, line, result, copy[1], copy[2], loop, branch)
        if line.endswith("{") and not line.startswith("}"):
            region = _Region(text.startswith(("scf.for", "scf.while")))
            if region.loop:
                carried = re.findall(r"(%[\w.-]+) = (%[\w#.-]+)", text)
                self.came |= carried
                region.arguments = [name for name, _ in carried]
                if text.startswith("scf.for"):
                    del region.arguments[0]  # the loop's counter
            self.stack.append(region)

    def _copy(
        self, number: int, line: str, result: str, op: str, rest: str,
        loop: _Region | None, branch: bool,
    ) -> None:  # fmt: skip
        tile = _TILE.search(rest)
        if not tile:
            return  # a scalar
        elements, bits = _size(tile[1] or tile[3]), int(tile[2] or tile[4])
        pointer, *others = _VALUE.findall(re.sub(r"\[.*?\]", "", rest))  # no coordinates
        access = Access(
            operand=self._root(pointer)[1],
            store=op in _STORES,
            nbytes=elements * bits // 8,
            width=0 if "tma" in op else None,
            place=self._place(line),
        )
        buffer, depth = None, 0
        if "global_to_local" in op:
            buffer = self._root(others[0])[0]
            depth = self.rooms[buffer] // elements
        if not access.store and loop:
            loop.loads |= not branch
            for region in self.stack:
                region.inner |= region.loop and region is not loop
        self.copies.append(_Copy(access, number, result, buffer, depth, loop, branch))

    def ahead(self, copy: _Copy) -> int | None:
        loop = copy.loop
        if copy.access.store or loop is None or loop.inner or loop.serial:
            return None
        if copy.branch and loop.loads:
            return None
        if copy.buffer is not None:
            into = [c for c in self.copies if c.buffer == copy.buffer]
            inside = [c for c in into if c.loop is loop]
            return min((len(into) - len(inside)) // len(inside), copy.depth - 1)
        steps, value = 0, copy.result  # in registers, which are handed from step to step
        while value in loop.yielded and steps < len(loop.yielded):
            value = loop.arguments[loop.yielded.index(value)]
            steps += 1
        return steps - (steps > 0 and loop.uses.get(value, copy.line) < copy.line)

    def in_flight(self) -> int:
        """Matrix products that a step of some loop leaves in flight."""
        apart = [p.depth - 1 for p in self.products if (p.barrier, p.loop) not in self.waits]
        return max([self.pendings, *apart])


def widths(ptx: str) -> dict[tuple[str, str], int]:
    """{("file:line:column", "line:column" of the call or ""): fewest bytes of an access there}.

    Of an access to device memory, by one thread.
    """
    found: dict[tuple[str, str], int] = {}
    at = ("", "")
    inside = first = False  # the compiler counts lines on within inline assembly
    for line in map(str.strip, ptx.splitlines()):
        if line.startswith("// begin inline asm"):
            inside = first = True
        elif line.startswith("// end inline asm"):
            inside = False
        elif match := _LINE.match(line):
            if not inside or first:
                at = (match[3], f"{match[1]}:{match[2]}" if match[1] else "")
            first = False
        elif match := _MOVE.search(line) or _ASYNC.search(line):
            width = _bytes(match)
            found[at] = min(found.get(at, width), width)
    return found


def _bytes(match: re.Match[str]) -> int:
    if match.re is _ASYNC:
        return int(match[1], 16)
    vector = re.search(r"\.v(\d)", match[1])
    bits = re.search(r"\.[bfsu](\d+)$", match[1])
    return int(bits[1]) // 8 * (int(vector[1]) if vector else 1)


def _serial(ttir: str) -> set[Place]:
    """The places of the loops that say num_stages=1; TTGIR has lost some of these words."""
    places = _places(ttir)
    found = re.findall(r"^ *\} \{.*tt\.num_stages = 1 .*loc\((#loc\w*)\)$", ttir, re.MULTILINE)
    return {places[alias] for alias in found}


def accesses(ttir: str, ttgir: str, ptx: str) -> tuple[list[Access], int]:
    """(loads and stores of tiles in the order of the code, matrix products left in flight)."""
    reader, by_spot = _Reader(ttgir, _serial(ttir)), widths(ptx)
    for copy in reader.copies:
        access = copy.access
        access.ahead = reader.ahead(copy)
        if access.width is None and access.place:
            own, *callers = access.place
            caller = callers[0].partition(":")[2] if callers else ""
            # code of two calls that was merged stands at the helper's line alone
            merged = (width for (spot, _), width in by_spot.items() if spot == own)
            access.width = by_spot.get((own, caller)) or min(merged, default=None)
    return [copy.access for copy in reader.copies], reader.in_flight()


def summary(ttir: str, ttgir: str, ptx: str) -> dict[str, Any]:
    """The facts that are kept: ``loads``, ``stores``, and ``products`` left in flight by a step.

    A load is {operand: [bytes of a tile, tiles ahead, bytes a thread and access]}, a store lacks
    the second. Of several accesses to an operand the largest tile stands there, and the worst of
    the other two.
    """

    def worst(values: list[int | None]) -> int | None:
        return min((v for v in values if v is not None), default=None)

    found, products = accesses(ttir, ttgir, ptx)
    told: dict[str, Any] = {"loads": {}, "stores": {}, "products": products}
    for access in found:
        same = [a for a in found if (a.operand, a.store) == (access.operand, access.store)]
        facts = [max(a.nbytes for a in same), worst([a.width for a in same])]
        if not access.store:
            facts.insert(1, worst([a.ahead for a in same]))
        told["stores" if access.store else "loads"][access.operand] = facts
    return told
