"""Whole chains whose 3x3 convolutions run in boxes of pixels, by the numerics rule."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fused_resnet.launch.record import record_launches
from tests.conftest import INTERPRETED
from tests.staged_case import BOXES, boxed

pytestmark = [pytest.mark.usefixtures("ieee"), pytest.mark.skipif(not INTERPRETED, reason="the interpreter's tiles")]


@pytest.mark.parametrize("source", BOXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bottleneck(dtype: torch.dtype, source: str) -> None:
    boxed(dtype, source).check()


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("source", BOXES)
def test_a_basic_block(source: str, frozen: bool) -> None:
    """Its first 3x3 has a residual in dgrad, and frozen statistics an epilogue: boxes leave both to others."""
    boxed(torch.float32, source, basic=True, frozen=frozen).check()


def test_which_kernels_run() -> None:
    for source, kernel in (("box", "box_conv_kernel"), ("walk", "walk_conv_kernel")):
        with record_launches() as launches:
            boxed(torch.float32, source).run()
        names = Counter(launch.kernel for launch in launches)
        assert (names[kernel], names["box_wgrad_kernel"]) == (2, 1)
        assert (names["conv_fprop_kernel"], names["conv_dgrad_kernel"], names["conv_wgrad_kernel"]) == (2, 2, 2)
