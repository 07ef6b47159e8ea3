"""Both gradients of a 1x1 by one kernel, with their prologue and the residual."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import measured, registry
from benchmarks.registry import Entry
from benchmarks.timing import device_seconds


@pytest.mark.benchmark(timer=device_seconds)
@pytest.mark.parametrize(("entry", "candidate"), registry.runs(registry.convolutions("pair")), ids=registry.identify)
def bench_conv_pair(benchmark: Any, gpu: measured.Machine, entry: Entry, candidate: str) -> None:
    measured.bench(benchmark, gpu, entry, candidate)
