"""Makes tuning tables from race results, and shows the content of one.

    python -m benchmarks.gpu.table RESULTS.json ... [--to FOLDER]   write the table of its GPU
    python -m benchmarks.gpu.table --show TABLE.json

Several results of one GPU are merged, where later ones replace earlier ones. An existing table
keeps the entries that the results do not have, unless it was made for other kernels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from peftkern.kernels import tuning

from .race import table
from .store import Store


def write(results: list[Path], folder: Path = tuning.FOLDER) -> Path:
    """Write these results into the table of their GPU; returns its path.

    Raises:
        ValueError: the files are no results of a race, or are results of several GPUs.
    """
    made = [table(Store.open(path).data) for path in results]
    names = {t.gpu["name"] for t in made}
    if len(names) != 1:
        raise ValueError(f"results are of {', '.join(sorted(names))}; allowed: one GPU")
    path = tuning.path_for(names.pop(), folder)
    newest = made[-1]
    merged = tuning.Table(newest.gpu, newest.versions, newest.sources, newest.date)
    if path.exists() and (old := tuning.load(path)).sources == newest.sources:
        merged.add(old.entries.values())
    for one in made:
        merged.add(one.entries.values())
    if not merged.entries:
        raise ValueError("the results hold no race that gave a right and timed config")
    merged.save(path)
    return path


def show(path: Path) -> None:
    loaded = tuning.load(path)
    print(f"{loaded.gpu['name']}  {loaded.versions}  kernels {loaded.sources}  {loaded.date}")
    for key, e in loaded.entries.items():
        gain = f"{e.default_us / e.us['p50']:.2f}x default" if e.default_us else ""
        what = e.choice or " ".join(f"{k}={int(v)}" for k, v in (e.config or {}).items())
        shape = f"m={key.m} n={key.n} k={key.k} r={key.r} x{key.group}{' mask' if key.mask else ''}"
        print(f"{key.op:20} {shape:44} {e.us['p50']:9.1f} us  {gain:14} {what or 'default'}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--to", type=Path, default=tuning.FOLDER)
    args = parser.parse_args(argv)
    try:
        if args.show:
            for path in args.files:
                show(path)
        else:
            print(write(args.files, args.to))
    except (OSError, ValueError) as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
