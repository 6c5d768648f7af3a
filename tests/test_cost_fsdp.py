"""``benchmarks.cost --fsdp``: what ranks gather of a layer."""

from __future__ import annotations

import json

import pytest

from benchmarks.cost import sharded
from benchmarks.cost.run import main

D, INNER, KV, R = 8192, 28672, 1024, 16
LINEARS = [(D, D), (D, KV), (D, KV), (D, D), (D, INNER), (D, INNER), (INNER, D)]


def test_the_layer_is_counted_from_its_modules():
    layer = sharded.llama_70b(R)
    weights = sum(k * n for k, n in LINEARS)
    assert layer.weights == weights and layer.frozen == 2 * (weights + 2 * D)
    assert layer.modules == 14
    assert layer.trained == 4 * R * sum(k + n for k, n in LINEARS)
    assert sharded.llama_70b(R, adapters=False).frozen == layer.frozen


def test_adapters_add_little(capsys):
    assert main(["--fsdp", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    together, alone, whole = rows
    assert together["adapters_share"] == alone["adapters_share"] <= sharded.LIMIT
    assert whole["adapters_share"] == 0
    assert alone["collectives"] == 3 * 15 and together["collectives"] == 3
    assert main(["--fsdp", "--r", "64"]) == 0
    assert "NOT met" in capsys.readouterr().out  # more than the limit, and said


def test_it_is_one_table(capsys):
    with pytest.raises(SystemExit):
        main(["--fsdp", "--time"])
    assert "argument --fsdp: it is one table" in capsys.readouterr().err
