"""Calls that start compiled kernels by a plan give the bits that they give as written."""

import pytest
import torch

from tests.gpu.ground import DEVICE, ON_CPU, poison

# after the ground, which skips where nothing may be imported
from peftkern.kernels import launching  # noqa: E402  isort: skip
from tests.kernels.planning import CALLS, planned_kinds, split, tensors_in  # noqa: E402  isort: skip


def made(name):
    function, make = CALLS[name]
    with torch.device(DEVICE):
        args, kwargs = split(make())
    return lambda: tensors_in(function(*args, **kwargs))


def bits_of(tensors):
    return [t.contiguous().view(torch.uint8) for t in tensors]


def agree(found, wanted):
    assert len(found) == len(wanted) > 0
    return all(torch.equal(a, b) for a, b in zip(bits_of(found), bits_of(wanted), strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_a_call_with_a_plan_gives_the_same_bits(name):
    launching.forget()
    for _ in range(
        2 if ON_CPU else 5
    ):  # as written, recorded, and by the plan; on other tensors each time
        call = made(name)
        with launching.as_written():
            wanted = call()
        poison()
        assert agree(call(), wanted)
    assert planned_kinds() == (0 if ON_CPU else 1)


@pytest.mark.skipif(ON_CPU, reason="a CPU captures no graph")
@pytest.mark.parametrize("name", CALLS)
def test_a_plan_runs_in_a_graph(name):
    launching.forget()
    call = made(name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            wanted = call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for t in found:
        t.zero_()
    graph.replay()
    assert planned_kinds() == 1 and agree(found, wanted)
