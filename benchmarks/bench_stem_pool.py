"""The stem's BatchNorm, ReLU and max pool, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import measured, registry
from benchmarks.registry import Entry
from benchmarks.timing import device_seconds


@pytest.mark.benchmark(timer=device_seconds)
@pytest.mark.parametrize(
    ("entry", "candidate"),
    registry.runs(registry.passes_of("stem_pool", "stem_pool_grad_reduce", "stem_pool_grad_apply")),
    ids=registry.identify,
)
def bench_stem_pool(benchmark: Any, gpu: measured.Machine, entry: Entry, candidate: str) -> None:
    measured.bench(benchmark, gpu, entry, candidate)
