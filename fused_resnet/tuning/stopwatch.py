"""Times on a GPU: of each kernel inside a step, and of whole steps turn by turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ..launch.record import Config, watch_launches

Step = Callable[[], object]


class Lap(NamedTuple):
    """One kernel of a step: its name, its configuration (the very object that was launched), its microseconds."""

    kernel: str
    config: Config
    us: float


class _Laps:
    """An event before and after every launch."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.seen: list[tuple[str, Config, Any, Any]] = []

    def begin(self, kernel: str, config: Config) -> None:
        self.seen.append((kernel, config, self.stopwatch.mark(), None))

    def end(self) -> None:
        kernel, config, start, _ = self.seen[-1]
        self.seen[-1] = (kernel, config, start, self.stopwatch.mark())


class Stopwatch:
    """Device events, behind work that holds the stream until everything is queued: no kernel waits for the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Microseconds."""
        return float(start.elapsed_time(end)) * 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def hold(self, seconds: float) -> None:
        torch.cuda._sleep(int(min(seconds, 0.2) * 2e9))  # type: ignore[no-untyped-call]

    def pool(self) -> Any:
        """Memory for graphs that take turns: all of them use the same."""
        return torch.cuda.graph_pool_handle()

    def captured(self, step: Step, pool: Any) -> Step:
        """``step`` as a CUDA graph's replay: what Python costs is not the GPU's time."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
        return graph.replay

    def kernels(self, step: Step, samples: int = 4) -> list[Lap]:
        """Medians of every launch of ``step``, in the order in which they are launched; a first run compiles."""
        step()
        self.synchronize()
        start = time.perf_counter()
        step()
        host = time.perf_counter() - start
        runs = []
        for _ in range(samples):
            laps = _Laps(self)
            self.synchronize()
            self.hold(3 * host + 1e-3)
            with watch_launches(laps):
                step()
            self.synchronize()
            runs.append([Lap(kernel, config, self.between(a, b)) for kernel, config, a, b in laps.seen])
        return [lap._replace(us=statistics.median(run[i].us for run in runs)) for i, lap in enumerate(runs[0])]

    def steps(self, steps: Mapping[str, Step], samples: int = 10) -> dict[str, float]:
        """Microseconds of each, medians of turns A B A B …"""
        pool = self.pool()
        replays = {name: self.captured(step, pool) for name, step in steps.items()}
        for replay in replays.values():
            replay()
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(samples):
            for name, replay in replays.items():
                self.synchronize()
                self.hold(1e-3)
                start = self.mark()
                replay()
                end = self.mark()
                self.synchronize()
                times[name].append(self.between(start, end))
        return {name: statistics.median(found) for name, found in times.items()}
