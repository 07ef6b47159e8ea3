"""pytest-benchmark's clocks on a GPU."""

from __future__ import annotations

from typing import ClassVar
from unittest.mock import create_autospec

import pytest
import torch

from benchmarks import timing


class Event:
    """Four milliseconds after the one before."""

    made: ClassVar[list[Event]] = []

    def __init__(self, enable_timing: bool) -> None:
        self.at = 4.0 * len(self.made)
        self.made.append(self)

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.mark.quick
def test_device_seconds_and_peak_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = create_autospec(torch.cuda)
    cuda.Event, cuda.max_memory_allocated.return_value = Event, 3 << 30
    monkeypatch.setattr(torch, "cuda", cuda)
    clock, memory = timing._DeviceClock(), timing._PeakMemory()
    first, second, third = clock(), clock(), clock()
    assert second - first == third - second == pytest.approx(4e-3)
    before = memory()
    assert memory() - before == 3.0 and cuda.reset_peak_memory_stats.call_count == 2
