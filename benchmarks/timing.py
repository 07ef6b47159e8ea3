"""Times: device events, medians, candidates that take turns, inputs that do not fit in the cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .device import Device

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one candidate, one sample each."""

    samples: tuple[float, ...]

    @property
    def us(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        if len(self.samples) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.us if self.us else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"us": self.us, "spread": self.spread, "samples": [round(s, 2) for s in self.samples]}


def interleave(
    device: Device, candidates: Mapping[str, Sequence[Call]], samples: int = 20, *, hold: bool = True
) -> dict[str, Timing]:
    """Times each candidate, A B A B …

    A candidate is a sequence of calls that do the same on different inputs; one sample runs them all between two
    events and divides. With ``hold`` nothing waits for the host: the stream is kept busy until a round is queued. Whole
    steps are timed without, since a step that the host cannot feed is slow.
    """
    host = {}
    for name, calls in candidates.items():
        for call in calls:
            call()
        device.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        host[name] = time.perf_counter() - start
        device.synchronize()
    found: dict[str, list[float]] = {name: [] for name in candidates}
    samples = 1 if device.dry else samples
    round_host = sum(host.values())
    rounds_per_wait = max(1, min(samples, int(0.02 / max(round_host, 1e-6)))) if hold else samples
    done = 0
    while done < samples:
        rounds = min(rounds_per_wait, samples - done)
        device.hold(min(0.1, 1.5 * rounds * round_host + 2e-4) if hold else 1e-3)
        marks = []
        for _ in range(rounds):
            for name, calls in candidates.items():
                begin, end = device.event(), device.event()
                begin.record()
                for call in calls:
                    call()
                end.record()
                marks.append((name, begin, end, len(calls)))
        device.synchronize()
        for name, begin, end, count in marks:
            found[name].append(begin.elapsed_time(end) * 1e3 / count)
        done += rounds
    return {name: Timing(tuple(values)) for name, values in found.items()}


def rotation(device: Device, bytes_per_set: int, limit: int = 16) -> int:
    """How many input sets to rotate among, so that a set is out of the cache when its turn comes again."""
    if device.dry:
        return 1
    return max(1, min(limit, -(-3 * device.l2_bytes // max(1, bytes_per_set))))


def floor_us(ceilings: Mapping[str, float], nbytes: int, flops: int) -> float:
    """The larger of the bytes over the bandwidth and the operations over the matrix rate."""
    return max(nbytes / ceilings["bytes_per_s"], flops / ceilings["flops_per_s"]) * 1e6


class _DeviceClock:
    """Seconds on the GPU's own clock. Two readings differ by what lies between two events, waited for.

    Each reading adds the time since the last one: an event's own clock is a float32, too coarse after minutes.
    """

    last: torch.cuda.Event | None = None
    seconds = 0.0

    def __call__(self) -> float:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        if self.last is not None:
            self.seconds += self.last.elapsed_time(now) * 1e-3
        self.last = now
        return self.seconds


class _PeakMemory:
    """GiB in place of seconds: two readings differ by the peak of what was allocated between them."""

    total = 0.0

    def __call__(self) -> float:
        torch.cuda.synchronize()
        self.total += torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return self.total


_clock, _memory = _DeviceClock(), _PeakMemory()


def device_seconds() -> float:
    """pytest-benchmark's timer where a GPU is timed."""
    return _clock()


def peak_gib() -> float:
    """pytest-benchmark's timer where memory is measured: what it prints as seconds are GiB."""
    return _memory()
