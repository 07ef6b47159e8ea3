"""The kernels of a training step of ResNet-50 at their real sizes, one program each: no conflicts, whole sectors."""

from __future__ import annotations

import pytest

from fused_resnet.launch.record import Rehearsed
from fused_resnet.plan.target import H100
from fused_resnet.projection import launch_us
from tests.conftest import EMULATED

from .step import launches, ran

pytestmark = pytest.mark.skipif(EMULATED != 90, reason="the tiles are those of an H100")

WEIGHTY_US = 120
"""Of a step; less does not matter."""
SHARED, SECTORS = 1.25, 1.1
"""Over the fewest."""
EXCEPTIONS = {
    ("conv_dgrad_kernel", "shared"): 2.1,  # the sums of its epilogue, by tl.sum
    ("bn_stats_kernel", "shared"): 2.5,  # the pivot's, by tl.sum, which takes fewer registers
    ("bn_act_grad_reduce_kernel", "shared"): 1.7,  # where a mask's bytes say which channels a thread holds
    ("gram_finalize_kernel", "shared"): 1.4,  # vectors of eight weights a thread, in two halves; of a small matrix
    ("stem_conv_wgrad_kernel", "global"): 1.3,  # rows of three channels and a padding begin anywhere
    ("stem_pad_kernel", "global"): 3.3,  # three channels become four
    ("cast_kernel", "global"): 1.7,  # weights of one number a thread
}
"""Under the oldest Triton that is supported, whose sums across warps conflict."""


def weighty() -> list[Rehearsed]:
    """Of each kernel with the same flags the launches that take the longest, and none that hardly count."""
    found: dict[tuple[str, str], tuple[float, Rehearsed]] = {}
    for (shape, *_), (launch, times) in launches(H100).items():
        us = times * launch_us(launch.entry, H100)
        if us >= max(WEIGHTY_US, found.get((shape.kernel, shape.options), (0.0, None))[0]):
            found[shape.kernel, shape.options] = us, launch
    return [launch for _, launch in found.values()]


def test_no_conflicts_and_whole_sectors() -> None:
    checked, found = set(), []
    for launch in weighty():
        name = launch.kernel.fn.__name__
        moved = ran(launch, programs=1).traffic
        checked.add(name)
        for memory, bound in (("shared", SHARED), ("global", SECTORS)):
            total = moved.total(memory)
            if total.ratio > EXCEPTIONS.get((name, memory), bound):
                found.append(f"{name} {launch.entry.config}: {total.ratio:.2f} x the fewest of {memory} memory")
    assert not found, "\n".join(found)
    assert {"conv_fprop_kernel", "conv_wgrad_kernel", "gram_kernel", "gram_dgrad_kernel", "bn_stats_kernel"} <= checked
