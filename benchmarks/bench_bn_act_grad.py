"""Backward of BatchNorm, residual and ReLU: the sums, their merge, the gradient formed."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import measured, registry
from benchmarks.registry import Entry
from benchmarks.timing import device_seconds


@pytest.mark.benchmark(timer=device_seconds)
@pytest.mark.parametrize(
    ("entry", "candidate"),
    registry.runs(registry.passes_of("bn_act_grad_reduce", "bn_grad_finalize", "bn_grad_apply")),
    ids=registry.identify,
)
def bench_bn_act_grad(benchmark: Any, gpu: measured.Machine, entry: Entry, candidate: str) -> None:
    measured.bench(benchmark, gpu, entry, candidate)
