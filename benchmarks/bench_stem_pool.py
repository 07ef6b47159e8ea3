"""The stem's BatchNorm, ReLU and max pool, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import measured
from benchmarks.device import Device
from benchmarks.passes import PassCase


@pytest.mark.parametrize(
    "case", measured.passes_named("stem_pool", "stem_pool_grad_reduce", "stem_pool_grad_apply"), ids=measured.identify
)
def bench_stem_pool(benchmark: Any, gpu: Device, case: PassCase) -> None:
    measured.bench_pass(benchmark, gpu, case)
