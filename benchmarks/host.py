"""What the host pays for a block: ours with the launches left out beside eager's dispatch, on the CPU, turn by turn."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import thread_time
from typing import NamedTuple

import torch
from torch import nn

import fused_resnet as fr
from fused_resnet import reference
from fused_resnet.plan.target import H100
from tests.no_launches import launches_left_out


def _projection() -> nn.Module:
    return nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32))


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "bottleneck": lambda family: family.Bottleneck(32, 8),
    "bottleneck with projection": lambda family: family.Bottleneck(32, 8, 1, _projection()),
    "basic block": lambda family: family.BasicBlock(32, 32),
}


class HostTime(NamedTuple):
    """Microseconds of this thread, medians."""

    forward: float
    backward: float


def host_times(
    kind: str, rounds: int = 200, *, autocast: bool = False, vendors: bool = False
) -> tuple[HostTime, HostTime]:
    """(ours, eager's) for one block of ``kind`` over two images of one pixel, few channels, so that little computes.

    Ours is planned for an H100 and its kernels are left out; the vendor's convolutions run in both, and take most of
    eager's time. ``vendors``: among our launches they are left out as well.
    """
    blocks = [BLOCKS[kind](family).to(memory_format=torch.channels_last) for family in (fr, reference)]
    x = torch.randn(2, 32, 1, 1, dtype=torch.bfloat16 if autocast else torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    times: list[list[tuple[float, float]]] = [[], []]
    with launches_left_out(H100, vendors=vendors):
        for _ in range(rounds + 10):
            for block, taken in zip(blocks, times, strict=True):
                block.zero_grad(set_to_none=True)
                leaf = x.clone().requires_grad_()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    start = thread_time()
                    out = block(leaf)
                    forward = thread_time() - start
                dout = torch.ones_like(out)
                start = thread_time()
                out.backward(dout)
                taken.append((forward, thread_time() - start))
    ours, eager = (HostTime(*(1e6 * median(column) for column in zip(*taken[10:], strict=True))) for taken in times)
    return ours, eager
