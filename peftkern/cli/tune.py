"""``peftkern tune``: runs the dispatcher's races before training does, and shows known results.

The races are those of :mod:`peftkern.ops.auto_backend`, on random tensors of the shapes of a model
(its configuration is enough) or of ``--shapes``. Results go to the dispatcher's file on disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from ..kernels.tuning import WHOLE, Key
from ..kernels.tuning import Table as TuningTable
from ..ops import tuned
from .errors import RunError, UserError, first_line
from .tune_settings import TuneSettings

if TYPE_CHECKING:
    from ..tuners.lora.mlp import MlpShape
    from .tune_experts import MixtureShape


@dataclass(frozen=True)
class Job:
    """One operation to race: projections [N_i, K] for M rows; p is None for "infer".

    For "mlp" it is an MLP's forward and backward, with its numbers in ``mlp``, and for "experts" a
    mixture for M tokens, with its numbers in ``mixture``; with its backward unless p is None.
    """

    op: str
    M: int
    ns: tuple[int, ...]
    K: int
    p: float | None = None
    mlp: MlpShape | None = None
    mixture: MixtureShape | None = None


def tune(settings: TuneSettings) -> None:
    """Race, show and export results as ``settings`` (validated) say.

    Raises:
        UserError: no CUDA device, or an option that does not fit.
        RunError: races were run and none gave a result.
    """
    console = Console()
    device = _device()
    if device is None:
        if not settings.show or settings.export is not None:
            raise UserError("peftkern tune needs a CUDA device, and there is none (try --show)")
        _show_shipped(console)
        return
    index = -1 if device.index is None else device.index
    if settings.races:
        if os.environ.get("PEFTKERN_RACE") not in (None, "", "1"):
            given = os.environ["PEFTKERN_RACE"]
            raise UserError(f"PEFTKERN_RACE is {given}; tune needs it unset, or 1")
        jobs = list(jobs_of(settings))
        console.print(f"{len(jobs)} operations on {tuned.machine(index).gpu}")
        _race(jobs, settings, device, console)
    book = tuned.book(index)
    if settings.show:
        console.print(_known(book))
        console.print(f"{book.shipped_note}; races are kept in {book.path or 'memory only'}")
    if settings.export is not None:
        _export(book, settings.export, device, console)


def _device() -> torch.device | None:
    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", torch.cuda.current_device())


# ------------------------------------------------------------------------------ what to race


def jobs_of(settings: TuneSettings) -> Iterator[Job]:
    """Every operation of the given shapes, each once, small ones first."""
    from ..ops.auto_backend import group_rows

    alone: dict[tuple[tuple[int, ...], int], None] = {}
    together: dict[tuple[tuple[int, ...], int], None] = {}
    mlps: dict[MlpShape, None] = {}
    mixtures: dict[MixtureShape, None] = {}
    if settings.model is not None:
        alone, together, mlps, mixtures = shapes_of(settings.model, settings)
    for N, K in settings.shape_list():
        alone[((N,), K)] = None
    for M in sorted(settings.row_list()):
        for ns, K in alone:
            yield Job("infer", M, ns, K)
        for ns, K in together if M <= group_rows else ():
            yield Job("infer", M, ns, K)
        for ns, K in alone | together:
            for p in settings.dropout_list():
                yield Job("forward", M, ns, K, p)
                yield Job("backward", M, ns, K, p)
        for mlp in mlps:
            for p in settings.dropout_list():
                yield Job("mlp", M, mlp.ns, mlp.K, p, mlp)
        for shape in mixtures:
            for way in (None, *settings.dropout_list()):
                yield Job("experts", M, (shape.N1,), shape.K, way, mixture=shape)


def shapes_of(
    path: str, settings: TuneSettings
) -> tuple[dict[Any, None], dict[Any, None], dict[MlpShape, None], dict[MixtureShape, None]]:
    """((N,), K) of a model's layers named by ``targets``, (N of each, K) of its groups, its MLPs.

    They are the keys of dicts, and with ``experts`` the model's mixtures are those of a fourth.
    Only the model's configuration is read; the model is built on the meta device.
    """
    import transformers

    from .. import LoraConfig, get_peft_model
    from ..tuners.lora.linear import Linear
    from ..tuners.lora.mlp import shapes_of_blocks
    from .modelio import hush_transformers, locate_model

    hush_transformers()
    folder, gguf = locate_model(path)
    if gguf is not None:
        raise UserError(f"--model {path}: a GGUF file cannot be tuned for; name its --shapes")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--model {path}: its config.json cannot be read: {first_line(error)}"
        ) from error
    model = _on_meta(config, path)
    lora = LoraConfig(r=settings.r, target_modules=settings.target_list())
    try:
        adapted: Any = get_peft_model(model, lora, low_cpu_mem_usage=True)
    except ValueError as error:
        raise UserError(f"--targets is {settings.targets}; {first_line(error)}") from error
    alone: dict[Any, None] = {}
    together: dict[Any, None] = {}
    for layer in adapted.modules():
        if not isinstance(layer, Linear):
            continue
        alone[((layer.out_features,), layer.in_features)] = None
        if layer._group is not None:
            ns = tuple(member.out_features for member in layer._group.layers)
            together[(ns, layer.in_features)] = None
    if not alone:
        raise UserError(f"--targets is {settings.targets}; no linear layer of the model has it")
    mixtures: dict[MixtureShape, None] = {}
    if settings.experts:
        from .tune_experts import mixtures_of

        mixtures = mixtures_of(adapted, config)
    return alone, together, shapes_of_blocks(adapted), mixtures


def _on_meta(config: Any, path: str) -> Any:
    import transformers

    failed: Exception | None = None
    for name in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel"):
        try:
            with torch.device("meta"):
                return getattr(transformers, name).from_config(config)
        except ValueError as error:  # this class is not for such a model
            failed = failed or error
    raise UserError(f"--model {path}: {first_line(failed or ValueError('unknown'))}")


# ----------------------------------------------------------------------------------- racing


def _race(jobs: list[Job], settings: TuneSettings, device: torch.device, console: Console) -> None:
    from ..ops import auto_backend

    rows: list[tuple[Job, *tuple[Key, ...]]] = []
    failed: dict[Job, str] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with auto_backend.anew(), Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("racing", total=len(jobs))
        for job in jobs:
            try:
                rows.append((job, *run(job, settings, device)))
            except torch.OutOfMemoryError:
                failed[job] = "out of memory"
            progress.advance(task)
    book = tuned.book(-1 if device.index is None else device.index)
    console.print(_results(rows, failed, book))
    found = [key for _, *keys in rows for key in keys if book.cached.find(key)]
    if not found:
        raise RunError("no race gave a result; the last column says why")
    where = f"kept in {book.path}" if book.path is not None else "not kept: see the warning above"
    console.print(f"{len(set(found))} results, {where}")


def run(job: Job, settings: TuneSettings, device: torch.device) -> tuple[Key, ...]:
    """Call the dispatcher once for a job, which races it inside :func:`.auto_backend.anew`.

    Returns the keys of its results outside and inside of a CUDA graph, of an MLP or a mixture those
    that no earlier job has raced.
    """
    if job.mixture is not None:
        from .tune_experts import run_mixture

        dtypes = getattr(torch, settings.dtype), getattr(torch, settings.adapter_dtype)
        return run_mixture(job.mixture, job.M, job.p, settings.r, *dtypes, device)
    if job.mlp is not None:
        return _run_mlp(job.mlp, job, settings, device)
    from ..ops import auto_backend as auto
    from ..ops import choices
    from ..ops.projection import Projection, ProjectionGrad

    dtype, low = getattr(torch, settings.dtype), getattr(torch, settings.adapter_dtype)
    M, K, r, p = job.M, job.K, settings.r, job.p or 0.0

    def some(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=scale)

    x = some(M, K, dtype=dtype)
    members = [
        Projection(
            some(N, K, dtype=dtype, scale=K**-0.5), None, some(r, K, dtype=low, scale=K**-0.5),
            some(N, r, dtype=low, scale=r**-0.5), 2.0, p, False,
        )
        for N in job.ns
    ]  # fmt: skip
    grads = "xab" if job.op == "backward" else ""
    with torch.no_grad():
        if job.op == "infer":
            m = members[0]
            if len(members) > 1:
                auto.infer_group(x, members)
            else:
                auto.infer(x, m.weight, None, m.A, m.B, m.scale, False)
        else:
            done = auto.forward(x, members)
        if job.op == "backward":
            dys = [some(M, N, dtype=dtype) for N in job.ns]
            behind = [
                ProjectionGrad(dy, m.w, m.A, m.B, s, bits, m.scale, p, True, True)
                for dy, m, (_, s, bits) in zip(dys, members, done, strict=True)
            ]
            auto.backward(x, behind, True)
    key = tuned.key_of(job.op, dtype, low, M, sum(job.ns), K, r, len(job.ns), p > 0, grads)
    return key, choices.in_graph(key)


def _run_mlp(
    mlp: MlpShape, job: Job, settings: TuneSettings, device: torch.device
) -> tuple[Key, ...]:
    from ..ops.lora_mlp import Part, lora_mlp
    from ..ops.projection import Plain, Projection

    dtype, low = getattr(torch, settings.dtype), getattr(torch, settings.adapter_dtype)

    def some(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=shape[-1] ** -0.5)

    r, parts = settings.r, list[Part]()
    for i, (N, adapted) in enumerate(zip(mlp.ns, mlp.adapted, strict=True)):
        K = mlp.K
        if i == len(mlp.ns) - 1:
            K = mlp.ns[0] // 2 if mlp.packed else mlp.ns[0]
        w = some(N, K, dtype=dtype)
        if adapted:
            A, B = some(r, K, dtype=low), some(N, r, dtype=low)
            adapter = A.requires_grad_(), B.requires_grad_()
            parts.append(Projection(w, None, *adapter, 2.0, job.p or 0.0, False))
        else:
            parts.append(Plain(w, None, False))
    book = tuned.book(-1 if device.index is None else device.index)
    before = set(book.decisions)
    x = some(job.M, mlp.K, dtype=dtype).requires_grad_()
    up = parts[1] if len(parts) == 3 else None
    y = lora_mlp(x, parts[0], up, parts[-1], mlp.act, mlp.packed)
    y.backward(some(*y.shape, dtype=dtype))
    return tuple(key for key in book.decisions if key not in before)


# ----------------------------------------------------------------------------------- showing


def _columns(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("operation", "rows", "N x K", "choice", "us", "x torch", "all, us"):
        table.add_column(name, justify="right" if name in ("rows", "us", "x torch") else "left")
    return table


def _cells(key: Key, entry: Any, note: str = "") -> list[str]:
    times = entry.times
    gain = f"{times['torch'] / entry.us['p50']:.2f}" if "torch" in times else ""
    everybody = "  ".join(f"{name} {t:.1f}" for name, t in sorted(times.items()))
    out = "".join(f"; {name} left out: {why}" for name, why in entry.left_out.items())
    tail = f" ({note})" if note else ""
    return [*_what(key), str(entry.choice), f"{entry.us['p50']:.1f}", gain, everybody + out + tail]


def _what(key: Key) -> list[str]:
    mask = ", dropout" if key.mask else ""
    graph = ", in a graph" if key.graph else ""
    group = f" (sum of {key.group})" if key.group > 1 else ""
    if key.experts:
        group += f", {key.top} of {key.experts} experts"
    return [f"{key.op}{mask}{graph}", str(key.m), f"{key.n} x {key.k}, r {key.r}{group}"]


def _results(rows: list[tuple[Job, *tuple[Key, ...]]], failed: dict[Job, str], book: Any) -> Table:
    from ..ops.auto_report import undecided

    table = _columns("races")
    for key in dict.fromkeys(key for _, *keys in rows for key in keys):
        entry = book.cached.find(key)
        if entry is not None:
            table.add_row(*_cells(key, entry))
        elif not key.graph:
            table.add_row(*_what(key), "torch", "", "", undecided(book, key))
    for job, why in failed.items():
        shape = f"{'+'.join(map(str, job.ns))} x {job.K}"
        table.add_row(job.op, str(job.M), shape, "", "", "", why)
    return table


def _known(book: Any) -> Table:
    """The choices for operations on this GPU; results of races replace those that ship."""
    table = _columns(f"known for {book.machine.gpu}")
    keys = {k for t in (book.shipped, book.cached) if t is not None for k in t.entries}
    for key in sorted((k for k in keys if k.op in WHOLE), key=lambda k: (k.op, k.m, k.n, k.k)):
        entry, where = book.find(key)
        table.add_row(*_cells(key, entry, where))
    return table


def _show_shipped(console: Console) -> None:
    from ..kernels.tuning import FOLDER, load

    console.print("There is no CUDA device here: every operation runs on torch.")
    found = sorted(FOLDER.glob("device_name=*.json"))
    for path in found:
        table = load(path)
        fits = "" if table.sources == tuned.sources() else ", of other kernels: not used"
        name = table.gpu.get("name")
        console.print(f"ships for {name}: {len(table.entries)} entries, {table.date[:10]}{fits}")
    if not found:
        console.print("No table ships with this version.")


def _export(book: Any, path: str, device: torch.device, console: Console) -> None:
    facts: dict[str, Any] = {"name": book.machine.gpu}
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        facts |= {
            "capability": [p.major, p.minor],
            "sms": p.multi_processor_count,
            "memory_bytes": p.total_memory,
        }
    made = TuningTable(facts, book.machine.versions, tuned.sources(), tuned.now())
    for table in (book.shipped, book.cached):
        if table is not None:
            made.add(table.entries.values())
    if not made.entries:
        raise UserError(f"--export {path}: nothing is known for {book.machine.gpu} yet")
    made.save(Path(path))
    console.print(f"{len(made.entries)} entries in {path}")
