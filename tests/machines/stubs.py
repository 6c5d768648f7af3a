"""Empty CUDA libraries, with which a CUDA build of torch runs on a machine without CUDA.

They have all functions that torch's libraries ask the loader for, with the same names and versions.
Every function returns "no device" (cudaErrorNoDevice, 100), so that ``torch.cuda.is_available()``
is False. This saves the gigabytes of the real libraries. It needs gcc and readelf, and Linux on
x86_64.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

_CUDA = re.compile(r"_*(?:lib)?(?:cu|nv|nccl)")  # of libraries, and of what is in them
_TORCHS = ("libtorch", "libc10", "libcaffe2", "libshm")
_TEXTS = ("ErrorString", "ErrorName", "StatusString", "StatusName")


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _wanted(folder: Path) -> tuple[dict[str, set[str]], dict[str, str]]:
    """({library: versions}, {symbol: version}) that torch's libraries in ``folder`` lack."""
    libraries: dict[str, set[str]] = defaultdict(set)
    wanted: dict[str, str] = {}
    defined: set[str] = set()
    for path in folder.glob("*.so*"):
        if not path.name.startswith(_TORCHS):
            continue
        for name in re.findall(r"NEEDED.*\[(.*)\]", _run("readelf", "-d", str(path))):
            if _CUDA.match(name):
                libraries[name]  # without a version, so far
        of = ""
        for line in _run("readelf", "-V", "-W", str(path)).splitlines():
            if found := re.search(r"File: (\S+)", line):
                of = found[1]
            elif of in libraries and (found := re.search(r"Name: (\S+)\s+Flags", line)):
                libraries[of].add(found[1])
        for line in _run("readelf", "--dyn-syms", "-W", str(path)).splitlines():
            fields = line.split()
            if len(fields) >= 8 and fields[0].rstrip(":").isdigit():
                name, _, version = fields[7].partition("@")
                if fields[6] == "UND":
                    wanted.setdefault(name, version)
                else:
                    defined.add(name)
    here = {n: v for n, v in wanted.items() if n not in defined and _CUDA.match(n)}
    return libraries, here


def make(folder: Path) -> list[str]:
    """Makes the libraries that are missing in torch's ``lib`` folder; their names."""
    libraries, symbols = _wanted(folder)
    if not libraries:
        return []
    texts = [name for name in symbols if name.endswith(_TEXTS)]
    lines = [".text"]
    for group, code in (
        (sorted(set(symbols) - set(texts)), "mov $100, %eax"),
        (texts, "lea nothing(%rip), %rax"),
    ):
        lines += [f".globl {name}\n{name}:" for name in group]
        lines += [code, "ret"]
    lines += ['nothing: .string "no CUDA on this machine"', ".section .note.GNU-stack", ""]
    source, thing = folder / "stub.s", folder / "stub.o"
    source.write_text("\n".join(lines))
    _run("gcc", "-c", "-o", str(thing), str(source))
    for library, versions in libraries.items():
        command = ["gcc", "-shared", "-nostdlib", f"-Wl,-soname,{library}"]
        if versions:
            script = folder / "stub.map"
            script.write_text(
                "\n".join(
                    f"{version} {{ global: "
                    + "".join(f"{n};" for n, v in sorted(symbols.items()) if v == version)
                    + " };"
                    for version in sorted(versions)
                )
            )
            command.append(f"-Wl,--version-script,{script}")
        _run(*command, "-o", str(folder / library), str(thing))
    return sorted(libraries)
