"""The weight gradient, with its role's prologues."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import measured
from benchmarks.cases import ConvCase
from benchmarks.device import Device


@pytest.mark.parametrize("who", ["ours", "vendor"])
@pytest.mark.parametrize("case", measured.conv_cases("wgrad"), ids=measured.identify)
def bench_conv_wgrad(benchmark: Any, gpu: Device, case: ConvCase, who: str) -> None:
    measured.bench_conv(benchmark, gpu, case, who)
