"""Fewer names for the same target modules.

A checkpoint without a configuration names every single layer, and each name costs a comparison
with each module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def suffixes(name: str) -> Iterator[str]:
    """The suffixes of a dotted name, shortest first: "c", "b.c", "a.b.c" for "a.b.c"."""
    at = len(name)
    while (at := name.rfind(".", 0, at)) >= 0:
        yield name[at + 1 :]
    yield name


def ends_with_one_of(name: str, names: Iterable[str]) -> bool:
    """True when ``name`` is one of ``names`` (a set) or ends with "." and one of them."""
    return any(suffix in names for suffix in suffixes(name))


def _find_minimal_target_modules(
    target_modules: list[str] | set[str] | str, other_module_names: list[str] | set[str]
) -> set[str]:
    """The shortest suffixes that match all targets and no other module.

    Args:
        target_modules: names of the modules to adapt.
        other_module_names: names of all others; none of them may be a target.

    Returns:
        suffixes of whole name parts; every target ends with one of them, and no other module does.

    Raises:
        ValueError: no targets, an empty name, or a name that is in both.
    """
    if isinstance(target_modules, str) or not target_modules:
        raise ValueError("target_modules should be a list or set of strings.")
    targets, others = set(target_modules), set(other_module_names)
    if "" in targets:
        raise ValueError("target_modules should not contain an empty string.")
    if common := targets & others:
        raise ValueError(
            "target_modules and other_module_names contain common elements, this should not "
            "happen, please open a GitHub issue at https://github.com/huggingface/peft/issues with "
            f"the code to reproduce this issue: {sorted(common)[:5]}"
        )
    taken = {suffix for name in others for suffix in suffixes(name)}
    found: set[str] = set()
    # sorted by the reversed names, so that the result does not depend on the order of a set
    for name in sorted(targets, key=lambda n: list(suffixes(n))):
        if not ends_with_one_of(name, found):
            found |= {next((s for s in suffixes(name) if s not in taken), name)}
    return found
