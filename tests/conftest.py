"""The numeric part of the suite: modules that take their yardstick from closeness.py."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        module = getattr(item, "module", None)
        names = vars(module).values() if module is not None else ()
        if any(getattr(x, "__module__", "") == "tests.closeness" for x in names):
            item.add_marker(pytest.mark.numeric)
