"""The pictures of docs/kernels.md agree with the launches that the code plans and their bytes."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cost.cases import PROVIDERS, Shape, measure
from benchmarks.cost.gpus import GPUS
from benchmarks.kernels import decode, prefix_attention, prefix_backward, prefix_decode
from benchmarks.kernels import mlp as mlp_entry
from benchmarks.kernels import mlp_grad as mlp_grad_entry
from benchmarks.kernels.entry import BF16, FP32, INT32, meta
from benchmarks.kernels.prefix import problem
from benchmarks.kernels.table import traffic
from benchmarks.kernels.traffic import Traffic
from peftkern.kernels import dora_grad, dora_norm, gemm, mixed, mlp, mlp_grad
from peftkern.kernels.common import Arch

from .pages import ROOT, read

FILE = ROOT / "docs" / "draw_passes.py"
ARCH = Arch(*GPUS["H100"].arch)
M, K, N, R = 8192, 4096, 2048, 16
SIZES = {"1": 1, "M": M, "K": K, "N": N, "r": R, "K/32": K // 32,
         "B": 8, "H": 32, "Hₖᵥ": 8, "T": 1024, "S": 1024, "P": 128, "D": 128}  # fmt: skip
FOUR_BYTES = {"mask", "LSE", "delta", "norms", "gain", "sums", "dKₚ", "dVₚ"}


def load() -> Any:
    spec = importlib.util.spec_from_file_location("draw_passes", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # typing looks a NamedTuple's module up there
    spec.loader.exec_module(module)
    return module


DRAWN = load()


def linear(name: str) -> tuple[list[Traffic], list[Traffic]]:
    """(forward, backward) of a LoRA linear with dropout."""
    (who,) = (p for p in PROVIDERS if p.name == name)
    found = measure(who, "linear", Shape(M, K, N, R), 0.1, ARCH)
    return found.forward, found.backward


def few_rows() -> list[Traffic]:
    return [traffic(launch) for launch in decode.launches(16, [N], K, [R], ARCH, adapter=BF16)]


def mixed_batch() -> list[Traffic]:
    As, Bs = [meta(r, K) for r in (8, R)], [meta(N, r) for r in (8, R)]
    config = mixed.default_config(16, N, K, 2, [8, R], ARCH, adapter_itemsize=2)
    y, x, w, index = meta(16, N), meta(16, K), meta(N, K), meta(8, dtype=INT32)
    launches = mixed.plan_mixed(y, x, w, As, Bs, [1.0, 1.0], index, None, config, ARCH)
    return [traffic(launch) for launch in launches]


def dora_forward() -> list[Traffic]:
    x, w, s, b = meta(M, K), meta(N, K), meta(M, R), meta(N, R)
    found = dora_norm.plan_norms(
        w, meta(R, K), b, 1.0, meta(N, dtype=FP32), dora_norm.default_config(N, K, ARCH, 2)
    )
    config = gemm.default_config(M, N, ARCH, gain=True)
    product = gemm.plan_gemm(
        meta(M, N), [x], [w], [s], [b.T], [None], None, ARCH, config,
        gain=meta(N, dtype=FP32), v=meta(M, N),
    )  # fmt: skip
    shrinks = [t for t in linear("triton fused")[0] if t.name == "shrink"]
    # the same launch without a mask, and the seed of one
    mask, seed = 4 * M * K // 32, 8
    shrinks = [t._replace(read=t.read - seed, written=t.written - mask) for t in shrinks]
    return [*map(traffic, found), *shrinks, *map(traffic, product)]


def dora_backward() -> list[Traffic]:
    found = dora_grad.plan_scale_grad(
        meta(M, N), meta(N, dtype=FP32), meta(M, N), None, meta(M, N), meta(N, dtype=FP32),
        dora_grad.default_config(M, N, ARCH),
    )  # fmt: skip
    return [traffic(launch) for launch in found]


def mlp_forward() -> list[Traffic]:
    config = mlp.default_config(M, K, R, ARCH)
    return [
        traffic(launch)
        for launch in mlp_entry.launches(M, K, R, "silu", True, config, adapter=BF16)
    ]


def mlp_backward() -> list[Traffic]:
    config = mlp_grad.default_config(M, K, R, ARCH)
    return [
        traffic(launch)
        for launch in mlp_grad_entry.launches(M, K, R, "silu", True, config, ARCH, adapter=BF16)
    ]


def prefix(of: Any, T: int = 1024) -> list[Traffic]:
    return [traffic(launch) for launch in of.launches(problem(T, 1024, 128), ARCH)]


def planned() -> dict[str, list[Traffic]]:
    joined, fused = linear("triton joined"), linear("triton fused")
    return {
        "forward-joined": joined[0],
        "forward-fused": fused[0],
        "grad-b": joined[1][:2],
        "grad-xa": joined[1][2:],
        "decode": few_rows(),
        "mixed": mixed_batch(),
        "dora-forward": dora_forward(),
        "dora-backward": dora_backward(),
        "mlp-forward": mlp_forward(),
        "mlp-backward": mlp_backward(),
        "prefix-forward": prefix(prefix_attention),
        "prefix-backward": prefix(prefix_backward),
        "prefix-decode": prefix(prefix_decode, T=1),
    }


@pytest.fixture(scope="module")
def code() -> dict[str, list[Traffic]]:
    return planned()


def nbytes(tensor: str, sizes: dict[str, int]) -> int | None:
    """Bytes of text such as "Q, dO [B, H, T, D]", with bf16 activations and adapters.

    None when the picture gives no sizes.
    """
    found = re.match(r"([^\[…]+) \[([^\]]+)\]", tensor)
    if found is None or not set(found[2].split(", ")) <= sizes.keys():
        return None
    length = math.prod(sizes[letter] for letter in found[2].split(", "))
    times = 2 if tensor.endswith(" twice") else 1
    width = {"seed": 8} | dict.fromkeys(FOUR_BYTES, 4)
    return sum(width.get(n, 2) * length * times for n in found[1].split(", "))


def total(tensors: tuple[str, ...], sizes: dict[str, int]) -> int | None:
    found = [nbytes(tensor, sizes) for tensor in tensors]
    return None if None in found else sum(n for n in found if n is not None)


def test_every_pass_is_drawn_and_planned(code: dict[str, list[Traffic]]) -> None:
    assert list(DRAWN.PASSES) == list(code)


@pytest.mark.parametrize("name", list(DRAWN.PASSES))
def test_a_picture_has_the_launches_and_the_bytes_of_the_code(
    name: str, code: dict[str, list[Traffic]]
) -> None:
    drawn = DRAWN.PASSES[name]
    assert [d.kernel.removesuffix(" (vendor)") for d in drawn] == [t.name for t in code[name]]
    few = {"decode": {"M": 16}, "mixed": {"M": 16}, "prefix-decode": {"T": 1}}.get(name, {})
    sizes, judged = SIZES | few, 0
    for launch, counted in zip(drawn, code[name], strict=True):
        for tensors, moved in ((launch.reads, counted.read), (launch.writes, counted.written)):
            said = total(tensors, sizes)
            if said is not None:
                judged += 1
                assert said == moved, (launch.kernel, tensors, moved)
    assert judged, "a picture of which no bytes could be held against the code's"


def test_the_committed_pictures_are_what_the_script_draws(tmp_path: Path) -> None:
    assert DRAWN.main(["--check"]) == 0, "run `python docs/draw_passes.py`"
    text = read("docs/kernels.md")
    assert sorted(re.findall(r"\(images/pass-([^)]*)\.svg\)", text)) == sorted(DRAWN.PASSES)


def test_a_stale_picture_is_seen_and_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(DRAWN, "IMAGES", tmp_path)
    assert DRAWN.main([]) == 0 and DRAWN.main(["--check"]) == 0
    (tmp_path / "pass-mixed.svg").write_text("<svg/>")
    (tmp_path / "pass-of-old.svg").write_text("<svg/>")
    assert DRAWN.main(["--check"]) == 1
    assert "pass-mixed.svg" in capsys.readouterr().err
    assert DRAWN.main([]) == 0 and DRAWN.main(["--check"]) == 0
    assert not (tmp_path / "pass-of-old.svg").exists()


def test_bytes_are_read_out_of_a_picture() -> None:
    assert nbytes("Q, dO [B, H]", {"B": 3, "H": 5}) == 2 * 2 * 15
    assert nbytes("Q, dO [B, H] twice", {"B": 3, "H": 5}) == 2 * 2 * 2 * 15
    assert nbytes("mask [M, K/32]", {"M": 2, "K/32": 3}) == 24
    assert nbytes("parts fp32", {}) is None and nbytes("A₁ … [rᵢ, K]", {}) is None
