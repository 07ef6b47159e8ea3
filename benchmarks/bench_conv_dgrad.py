"""The gradient with respect to the input, with its role's prologue, mask and sums or residual."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import measured
from benchmarks.cases import ConvCase
from benchmarks.device import Device


@pytest.mark.parametrize("who", ["ours", "vendor"])
@pytest.mark.parametrize("case", measured.conv_cases("dgrad"), ids=measured.identify)
def bench_conv_dgrad(benchmark: Any, gpu: Device, case: ConvCase, who: str) -> None:
    measured.bench_conv(benchmark, gpu, case, who)
