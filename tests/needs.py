"""The one way to leave a test out on some of the versions that ``make test-versions`` runs.

Where HF PEFT is wrong and the plain reference is there, ``plain_reference.peft_is_right`` says who
is asked; this is for what a version has not, or does wrong itself.
"""

from __future__ import annotations

from importlib import metadata

import pytest
from packaging.requirements import Requirement


def needs(requirement: str, why: str) -> None:
    """Skips the test that runs, unless the installed version is one of ``requirement``, such as
    "transformers>=5.23"."""
    wanted = Requirement(requirement)
    version = metadata.version(wanted.name)
    if not wanted.specifier.contains(version, prereleases=True):
        pytest.skip(f"{wanted.name} {version}, needs {wanted.specifier}: {why}")


def merging_on_a_cpu() -> None:
    needs("torch>=2.13", "its CPU attention takes no groups, so there are no parts to merge")
