"""Reads what an MLP's class computes, from the text of its ``forward``.

A forward that has another statement, call or operator than the following has no formula:

    down(act(gate(x)) * up(x))          Llama, Qwen, Mistral, Gemma
    down(up * act(gate))                with gate, up = gate_up(x).chunk(2, dim=-1): Phi-3
    down(act(up(x)))                    GPT-2
    dropout(...) of any of these
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

from ...utils.private import source_of


class Formula(NamedTuple):
    """The attributes that a forward calls; without a second linear before the activation, no up."""

    gate: str
    up: str | None
    down: str
    act: str
    packed: bool = False  # gate's output has up's behind it
    then: str | None = None  # called with the result: dropout

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for name in (self.gate, self.up, self.down) if name is not None)


class _Unknown(Exception):
    """The text is no formula."""


class _Call:
    """The result of calling an attribute of the module with a value."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value


class _Product:
    def __init__(self, left: Any, right: Any) -> None:
        self.sides = (left, right)


class _Half:
    """The first or the second half of a value's last dimension."""

    def __init__(self, index: int, value: Any) -> None:
        self.index, self.value = index, value


_known: dict[Callable[..., Any], Formula | None] = {}


def formula_of(cls: type) -> Formula | None:
    """The formula of a class of modules; None when its forward is none.

    The text of each forward is read once.
    """
    forward: Any = getattr(cls, "forward", None)
    try:
        return _known[forward]
    except KeyError:
        found = _known[forward] = _read(forward)
        return found


def _read(forward: Any) -> Formula | None:
    code = getattr(forward, "__code__", None)
    # most forwards have more arguments or names; their text need not be looked for
    if code is None or code.co_argcount != 2 or len(code.co_names) > 8 or code.co_kwonlyargcount:
        return None
    if hasattr(forward, "__wrapped__") or (source := source_of(forward)) is None:
        return None
    try:
        [function] = ast.parse(textwrap.dedent(source)).body
        return _match(*_Reading(function).result())
    except (_Unknown, SyntaxError, ValueError):
        return None


class _Reading:
    """Runs the statements of a forward with symbols for the values."""

    def __init__(self, function: ast.stmt) -> None:
        if not isinstance(function, ast.FunctionDef) or function.decorator_list:
            raise _Unknown
        a = function.args
        if len(a.args) != 2 or a.posonlyargs or a.kwonlyargs or a.vararg or a.kwarg or a.defaults:
            raise _Unknown
        self.itself, argument = (arg.arg for arg in a.args)
        self.values: dict[str, Any] = {argument: "x"}
        self.calls: list[_Call] = []  # in the order in which they happen
        self.body = function.body

    def result(self) -> tuple[Any, list[_Call]]:
        *statements, last = self.body
        for statement in statements:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # the docstring
            if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
                raise _Unknown
            self.assign(statement.targets[0], self.value(statement.value))
        if not isinstance(last, ast.Return) or last.value is None:
            raise _Unknown
        return self.value(last.value), self.calls

    def assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name) and not isinstance(value, tuple):
            self.values[target.id] = value
        elif isinstance(target, ast.Tuple) and isinstance(value, tuple):
            for name, part in zip(target.elts, value, strict=True):
                self.assign(name, part)
        else:
            raise _Unknown

    def value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and node.id in self.values:
            return self.values[node.id]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            left = self.value(node.left)
            return _Product(left, self.value(node.right))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == self.itself:
                if len(node.args) != 1 or node.keywords:
                    raise _Unknown
                self.calls.append(_Call(node.func.attr, self.value(node.args[0])))
                return self.calls[-1]
            if ast.unparse(node).endswith((".chunk(2, dim=-1)", ".chunk(2, -1)")):
                whole = self.value(owner)
                return _Half(0, whole), _Half(1, whole)
        raise _Unknown


def _match(result: Any, calls: list[_Call]) -> Formula | None:
    for then in (False, True):
        outer = result
        if then and isinstance(result, _Call):
            outer = result.value
        if not isinstance(outer, _Call):
            continue
        found = _gated(outer) if isinstance(outer.value, _Product) else _plain(outer)
        if found is None:
            continue
        *of_formula, packed = found
        used = of_formula + ([result] if then else [])
        # each is called once, and nothing else is; gate before up, which draw in this order
        if sorted(map(id, used)) != sorted(map(id, calls)) or len({c.name for c in used}) < len(
            used
        ):
            continue
        gate, act, *up, down = of_formula
        if up and calls.index(gate) > calls.index(up[0]):
            continue
        last = result.name if then else None
        return Formula(gate.name, up[0].name if up else None, down.name, act.name, packed, last)
    return None


def _plain(down: _Call) -> list[Any] | None:
    act = down.value
    if isinstance(act, _Call) and isinstance(act.value, _Call) and act.value.value == "x":
        return [act.value, act, down, False]
    return None


def _gated(down: _Call) -> list[Any] | None:
    left, right = down.value.sides
    for act, up in ((left, right), (right, left)):
        if not isinstance(act, _Call):
            continue
        gate = act.value
        if isinstance(gate, _Call) and isinstance(up, _Call) and gate.value == up.value == "x":
            return [gate, act, up, down, False]
        if isinstance(gate, _Half) and isinstance(up, _Half) and (gate.index, up.index) == (0, 1):
            both = gate.value
            if both is up.value and isinstance(both, _Call) and both.value == "x":
                return [both, act, down, True]
    return None
