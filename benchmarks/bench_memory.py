"""The peak memory of a training step."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import measured, registry
from benchmarks.registry import Entry
from benchmarks.timing import peak_gib


@pytest.mark.benchmark(timer=peak_gib)
@pytest.mark.parametrize(("entry", "candidate"), registry.runs(registry.memory()), ids=registry.identify)
def bench_memory(benchmark: Any, gpu: measured.Machine, entry: Entry, candidate: str) -> None:
    measured.bench_memory(benchmark, gpu, entry, candidate)
