"""docs/benchmarks.md and its plots agree with benchmarks/results/."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import plots


def test_the_committed_plots_and_page_are_what_the_results_say(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert plots.main(["--check"]) == 0, (
        "run `python -m benchmarks.plots` and commit what it writes"
    )
    assert not capsys.readouterr().err
    text = plots.PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"\(images/(bench-[^)]*)\)", text)
    assert sorted(shown) == sorted(plots.plots()) and len(shown) >= 6
    held = plots.newest(plots.RESULTS / "cpu")
    assert all(f"| {row['row']} |" in text for row in held) and len(held) > 40


@pytest.fixture
def copies(tmp_path: Path) -> dict[str, Path]:
    """Results, page and plots that a test may change."""
    shutil.copytree(plots.RESULTS, tmp_path / "results")
    shutil.copytree(plots.IMAGES, tmp_path / "images")
    shutil.copy(plots.PAGE, tmp_path / "page.md")
    return {"results": tmp_path / "results", "page": tmp_path / "page.md",
            "images": tmp_path / "images"}  # fmt: skip


def test_a_new_result_makes_its_plot_and_the_page_stale(copies: dict[str, Path]) -> None:
    assert plots.stale(**copies) == []
    (row,) = (r for r in plots.newest(plots.RESULTS / "cpu") if r["row"].startswith("from_pre"))
    path = copies["results"] / "cpu" / "2999-01-01T000000Z.json"
    machine = json.loads(next(copies["results"].glob("cpu/*.json")).read_text())["machine"]
    new = {"date": "", "machine": machine, "rows": [row | {"ratio": 0.5}]}
    path.write_text(json.dumps(new))
    assert plots.stale(**copies) == ["bench-adapters.svg", "page.md"]
    path.unlink()
    (copies["images"] / "bench-merging.svg").unlink()
    (copies["images"] / "bench-of-old.svg").write_text("<svg/>")
    assert plots.stale(**copies) == ["bench-merging.svg", "bench-of-old.svg"]


def test_a_page_without_its_marks_is_an_error(copies: dict[str, Path]) -> None:
    copies["page"].write_text(f"{plots.END}\n{plots.START}\n")
    with pytest.raises(ValueError, match="page.md: one line .* are needed"):
        plots.stale(**copies)


def test_a_gpu_gets_plots_and_goals(copies: dict[str, Path]) -> None:
    assert "None: no GPU has run this." in plots.page_part(copies["results"])
    key = "q_proj 8B M=8192 r=16 p=0.1 train"
    times = {"plain frozen": 700.0, "PEFT bf16": 1000.0, "PEFT default (fp32)": 1900.0,
             "peftkern joined": 800.0, "peftkern fused": 750.0}  # fmt: skip
    providers: dict[str, dict[str, object]] = {n: {"us": {"p50": v}} for n, v in times.items()}
    providers["peftkern fused"] = {"ok": False, "errors": {"y": 0.5}}
    rows = [
        {"key": key, "part": "linear", "providers": providers},
        {"key": "tests/gpu", "part": "tests", "outcome": "passed"},
    ]
    folder = copies["results"] / "NVIDIA_H200"
    folder.mkdir()
    (folder / "2999-01-01T000000Z-linear.json").write_text(json.dumps({"rows": rows}))
    title, bars = plots.plots(copies["results"])["bench-nvidia-h200-linear.svg"]
    assert title == "NVIDIA_H200: linear"
    assert bars == [plots.Bar(key, ratio=0.8, floor=0.7, aim=None)]  # the wrong one does not count
    text = plots.page_part(copies["results"])
    assert "### NVIDIA_H200" in text and "(images/bench-nvidia-h200-linear.svg)" in text
    linear = "linear fwd+bwd, M=8192, 4096^2, p=0.1, over the plain linear"
    assert f"met           {linear}: 1.14 x, <= 1.15" in text


def test_a_plot_is_drawn_the_same_again_and_holds_its_numbers(tmp_path: Path) -> None:
    bars = [plots.Bar("a & b <c>", 0.5, 0.25, 0.75), plots.Bar("d", 2.0, None, None)]
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    for path in (first, second):
        plots.draw(path, "A title", bars)
    assert first.read_bytes() == second.read_bytes()
    assert plots.series_of(first) == plots.series("A title", bars)
    assert list(tmp_path.iterdir()) in ([first, second], [second, first])
    assert plots.series_of(tmp_path / "none.svg") is None


def test_pictures_ask_no_other_host() -> None:
    for path in plots.IMAGES.glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"""(?:href|src)=["'](?:https?:)?//""", text), path
        assert "@import" not in text and "@font-face" not in text, path
