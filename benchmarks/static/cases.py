"""The launches that ``benchmarks.static`` compiles.

They are the launches that ship (:mod:`benchmarks.kernels`) and those of the configs in tuning
tables, as a race may have picked a tile that no default uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from peftkern.kernels import registry, tuning
from peftkern.kernels.common import Arch

from ..kernels.entry import Case, TableTensors
from ..kernels.table import entries, ops


def cases(arch: Arch) -> Iterator[Case]:
    """Every case for ``arch``.

    Names are unique; equal launches (same kernel and specialisation) may repeat.
    """
    for entry in entries().values():
        yield from entry.cases(arch)


def tuned_cases(arch: Arch, folder: Path = tuning.FOLDER) -> Iterator[Case]:
    """A case for each launch of each config in the tables for ``arch``'s capability.

    Entries that keep the default, or that choose a way to run a whole operation, have none.

    Raises:
        ValueError: a table, an entry or its config is not valid; the message names the file.
    """
    for path in sorted(folder.glob("device_name=*.json")):
        table = tuning.load(path)
        major, minor = table.gpu["capability"]
        if 10 * major + minor != arch.capability:
            continue
        device = path.stem.removeprefix("device_name=")
        for key, entry in table.entries.items():
            if entry.config is None:
                continue
            op = ops()[key.op]
            try:
                config = entry.make(registry.config_class(key.op))
                launches = op.plan(TableTensors(key), config, arch)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path.name}, {key.op}: {error}") from None
            fast = op.matrix_bound and key.dtype != "float32"
            ranks = f"r{key.r}{f'x{key.group}' if key.group > 1 else ''}"
            name = f"{device} {key.op} M{key.m} N{key.n} K{key.k} {ranks}"
            name += f"{' mask' if key.mask else ''} {key.dtype}/{key.adapter_dtype}"
            for i, launch in enumerate(launches):
                yield Case(f"{name} +{i}" if i else name, launch, fast)
