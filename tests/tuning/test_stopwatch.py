"""The stopwatch's calls of the device, on a stand-in that has what ``torch.cuda`` has and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

from fused_resnet.launch import record
from fused_resnet.plan.config import PassConfig
from fused_resnet.tuning.stopwatch import Stopwatch

pytestmark = pytest.mark.quick


class Event:
    """As much of ``torch.cuda.Event`` as is used: each is 2 ms after the one before."""

    now = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.now += 2.0
        self.at = Event.now

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    stand_in = create_autospec(torch.cuda)
    stand_in.Event = Event
    monkeypatch.setattr(torch, "cuda", stand_in)
    return stand_in


class Kernel:
    """A jitted function's launch, as ``record.launch`` makes it."""

    fn = SimpleNamespace(__name__="some_kernel")
    arg_names = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **_: None


def launch(config: PassConfig) -> None:
    cpu = torch.device("cpu")
    record.launch(Kernel(), (1,), touched=(), flops=0, config=config, device=cpu)


def test_kernels_are_timed_one_by_one(cuda: Any) -> None:
    first, second = PassConfig(1, 16), PassConfig(1, 16)
    laps = Stopwatch(torch.device("cuda", 0)).kernels(lambda: (launch(first), launch(second)), samples=3)
    assert [(lap.kernel, lap.us) for lap in laps] == [("some_kernel", 2000.0)] * 2
    assert laps[0].config is first and laps[1].config is second, "the very objects, equal as they are"
    assert cuda._sleep.call_count == 3 and not record._watches


def test_steps_take_turns_as_graphs_in_one_memory(cuda: Any) -> None:
    ran: list[str] = []
    times = Stopwatch(torch.device("cuda", 0)).steps({n: lambda n=n: ran.append(n) for n in "ab"}, samples=4)
    assert times == {"a": 2000.0, "b": 2000.0}
    assert ran == ["a"] * 3 + ["b"] * 3, "two runs and the capture; what is timed are replays"
    graphs = cuda.CUDAGraph.return_value
    assert graphs.replay.call_count == 2 * 5
    pools = [call.kwargs["pool"] for call in cuda.graph.call_args_list]
    assert len(pools) == 2 and pools[0] is pools[1] is cuda.graph_pool_handle.return_value
