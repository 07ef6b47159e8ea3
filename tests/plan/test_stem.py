"""Who convolves images of few channels, and with what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fused_resnet.plan.config import supports
from fused_resnet.plan.defaults import default_config
from fused_resnet.plan.planner import plan_conv
from fused_resnet.plan.problem import ConvProblem
from fused_resnet.plan.target import A100, H100, INTERPRETER, Target

pytestmark = pytest.mark.quick

STEM = ConvProblem(256, 224, 224, 3, 64, 7, 7, stride=(2, 2), padding=(3, 3))


@pytest.mark.parametrize("target", [A100, H100], ids=["a100", "h100"])
def test_a_strided_stem_is_ours_and_its_images_gradient_the_vendor_s(target: Target) -> None:
    for ci in (1, 3, 4):
        plan = plan_conv(replace(STEM, Ci=ci, N=2048), target, first=True)
        assert plan.fprop.fused and plan.wgrad.fused and not plan.dgrad.fused
    for other in (replace(STEM, Ci=5), replace(STEM, dilation=(2, 2)), replace(STEM, R=9, S=9)):
        assert not plan_conv(other, target, first=True).fprop.fused


@pytest.mark.parametrize("target", [A100, H100, INTERPRETER], ids=["a100", "h100", "interpreter"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_default_configurations_are_supported(target: Target, dtype: str) -> None:
    small = ConvProblem(1, 32, 32, 3, 16, 3, 3, padding=(1, 1))
    for problem in (STEM, small, replace(small, Co=200), replace(STEM, R=40, padding=(20, 3))):
        for kind in ("fprop", "wgrad"):
            typed = replace(problem, dtype=dtype)
            assert supports(typed, kind, target, default_config(typed, kind, target)) == (True, "supported")


def test_the_weight_gradient_reads_dy_once_and_fills_the_device() -> None:
    config = default_config(STEM, "wgrad", H100)
    assert config.block_m >= STEM.Co and config.block_n >= STEM.R * STEM.run and config.split == H100.sm_count
