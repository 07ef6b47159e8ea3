"""Batch statistics: the pass for the vendor's convolution, and the merge of tiles."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import measured
from benchmarks.device import Device
from benchmarks.passes import PassCase


@pytest.mark.parametrize("case", measured.passes_named("bn_stats", "bn_finalize"), ids=measured.identify)
def bench_bn_stats(benchmark: Any, gpu: Device, case: PassCase) -> None:
    measured.bench_pass(benchmark, gpu, case)
