"""The one way to skip a test on some of the versions that ``make test-versions`` runs.

It is for a version that lacks something or does it wrong. If only HF PEFT is wrong and there is a
plain reference, ``plain_reference.peft_is_right`` tells which of them to compare with.
"""

from __future__ import annotations

from importlib import metadata

import pytest
from packaging.requirements import Requirement


def needs(requirement: str, why: str) -> None:
    """Skip the running test unless a ``requirement`` such as "transformers>=5.23" is installed."""
    wanted = Requirement(requirement)
    version = metadata.version(wanted.name)
    if not wanted.specifier.contains(version, prereleases=True):
        pytest.skip(f"{wanted.name} {version}, needs {wanted.specifier}: {why}")


def merging_on_a_cpu() -> None:
    needs("torch>=2.13", "its CPU attention takes no groups, so there are no parts to merge")
