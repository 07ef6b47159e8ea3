"""The few device calls that the measurements need, in one place, so that a rehearsal can replace them all."""

from __future__ import annotations

import gc
import os
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


class Device:
    """The GPU."""

    dry = False
    name = "cuda"

    def __init__(self) -> None:
        torch.backends.cudnn.benchmark = True
        self.l2_bytes = int(torch.cuda.get_device_properties(0).L2_cache_size)

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def hold(self, seconds: float) -> None:
        """Keeps the stream busy, so that what is queued behind it runs without waiting for the host."""
        torch.cuda._sleep(int(seconds * 2e9))

    def capture(self, step: Callable[[], object], warmup: int = 3) -> Callable[[], object]:
        """``step`` as a CUDA graph, after ``warmup`` runs on a side stream; returns its replay."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warmup):
                step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def allocated(self) -> int:
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def facts(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(0)
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
        smi = _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
        return {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": self.l2_bytes,
            "driver": smi.split(",")[0].strip(),
            "nvidia_smi": {"query": query, "answer": smi},
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **versions(),
        }


class _HostEvent:
    at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _HostEvent) -> float:
        return (end.at - self.at) * 1e3


class DryDevice(Device):
    """The CPU in the GPU's place: same calls, tiny work, no meaning in the times."""

    dry = True
    name = "cpu"

    def __init__(self) -> None:
        self.l2_bytes = 1024

    def event(self) -> Any:
        return _HostEvent()

    def synchronize(self) -> None:
        pass

    def hold(self, seconds: float) -> None:
        pass

    def capture(self, step: Callable[[], object], warmup: int = 1) -> Callable[[], object]:
        return step

    def allocated(self) -> int:
        return 0

    def reset_peak(self) -> None:
        pass

    def peak(self) -> int:
        return 1

    def release(self) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        return {"gpu": "dry run on the CPU", "capability": "0.0", "dry": True, **versions()}


def commit() -> str:
    """What is measured: the environment's ``FUSED_RESNET_COMMIT``, or this checkout's; "" where nobody knows."""
    return os.environ.get("FUSED_RESNET_COMMIT") or _output(["git", "rev-parse", "--short=12", "HEAD"])


def versions() -> dict[str, Any]:
    """What the figures were taken with."""
    import platform

    import triton

    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpus": os.cpu_count(),
    }


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
