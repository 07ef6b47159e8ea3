"""Backward of BatchNorm, residual and ReLU: the sums, their merge, the gradient formed."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import measured
from benchmarks.device import Device
from benchmarks.passes import PassCase


@pytest.mark.parametrize(
    "case", measured.passes_named("bn_act_grad_reduce", "bn_grad_finalize", "bn_grad_apply"), ids=measured.identify
)
def bench_bn_act_grad(benchmark: Any, gpu: Device, case: PassCase) -> None:
    measured.bench_pass(benchmark, gpu, case)
