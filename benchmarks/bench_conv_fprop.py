"""The forward convolution, with the normalising prologue and the statistics of its role in a block."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import measured
from benchmarks.cases import ConvCase
from benchmarks.device import Device


@pytest.mark.parametrize("who", ["ours", "vendor"])
@pytest.mark.parametrize("case", measured.conv_cases("fprop"), ids=measured.identify)
def bench_conv_fprop(benchmark: Any, gpu: Device, case: ConvCase, who: str) -> None:
    measured.bench_conv(benchmark, gpu, case, who)
