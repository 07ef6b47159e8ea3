"""Blocks of every stage, forward and backward, on each route; with frozen statistics forward alone."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import measured, registry
from benchmarks.registry import Entry
from benchmarks.timing import device_seconds


@pytest.mark.benchmark(timer=device_seconds)
@pytest.mark.parametrize(("entry", "candidate"), registry.runs(registry.blocks()), ids=registry.identify)
def bench_blocks(benchmark: Any, gpu: measured.Machine, entry: Entry, candidate: str) -> None:
    measured.bench(benchmark, gpu, entry, candidate)
