"""Every distinct convolution of a ResNet, with how often it occurs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fused_resnet.plan.plans import ChainProblem
from fused_resnet.plan.problem import ConvProblem

LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@dataclass(frozen=True)
class Layer:
    """A distinct convolution: its problem, what it is in a block, how many a network has."""

    problem: ConvProblem
    role: str
    count: int
    bottleneck: bool = False
    """Whether its blocks are bottlenecks."""

    @property
    def name(self) -> str:
        p = self.problem
        return f"{p.R}x{p.S}/{p.stride[0]} {p.H}px {p.Ci}->{p.Co}"


def layers(
    depth: int,
    batch: int = 256,
    size: int = 224,
    width: int = 64,
    dtype: str = "bfloat16",
    base_width: int = 64,
    groups: int = 1,
) -> list[Layer]:
    """The distinct convolutions of ResNet-``depth`` (v1.5), in network order.

    ``width`` is the first stage's; ``base_width`` and ``groups``, of bottlenecks, are torchvision's.
    """
    found: Counter[tuple[ConvProblem, str]] = Counter()
    for block in _walk(depth, batch, size, width, dtype, base_width, groups):
        for role, problem in block.items():
            found[problem, role] += 1
    return [Layer(problem, role, count, depth >= 50) for (problem, role), count in found.items()]


def blocks(*network: Any, **more: Any) -> Counter[ChainProblem]:
    """The distinct blocks of the same network in training, and how many of each it has."""
    found: Counter[ChainProblem] = Counter()
    for block in _walk(*network, **more):
        if "stem" not in block:
            projection = block.pop("projection", None)
            found[ChainProblem(tuple(block.values()), projection, "projection" if projection else "identity")] += 1
    return found


def _walk(
    depth: int,
    batch: int = 256,
    size: int = 224,
    width: int = 64,
    dtype: str = "bfloat16",
    base_width: int = 64,
    groups: int = 1,
) -> Iterator[dict[str, ConvProblem]]:
    """The stem, then each block: its convolutions by role, the projection last."""

    def conv(side: int, ci: int, co: int, kernel: int, stride: int = 1, groups: int = 1) -> ConvProblem:
        padding = (kernel // 2, kernel // 2)
        return ConvProblem(
            batch, side, side, ci, co, kernel, kernel, (stride, stride), padding, groups=groups, dtype=dtype
        )

    bottleneck = depth >= 50
    expansion = 4 if bottleneck else 1
    yield {"stem": conv(size, 3, width, 7, 2)}
    side, ci = math.ceil(math.ceil(size / 2) / 2), width
    for stage, count in enumerate(LAYERS[depth]):
        planes = width * 2**stage
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            after = -(-side // stride)
            if bottleneck:
                inner = planes * base_width // 64 * groups
                block = {
                    "conv1": conv(side, ci, inner, 1),
                    "conv2": conv(side, inner, inner, 3, stride, groups),
                    "conv3": conv(after, inner, 4 * planes, 1),
                }
            else:
                block = {"conv1": conv(side, ci, planes, 3, stride), "conv2": conv(after, planes, planes, 3)}
            if stride != 1 or ci != expansion * planes:
                block["projection"] = conv(side, ci, expansion * planes, 1, stride)
            yield block
            side, ci = after, expansion * planes


def conv_bytes(p: ConvProblem, itemsize: int = 2) -> int:
    """Bytes of one plain pass of a convolution, each operand once; a strided 1x1 reads the rows it samples alone."""
    rows_in = p.M if p.is_pointwise else p.N * p.H * p.W
    return (rows_in * p.Ci + p.M * p.Co + p.Co * p.Ci // p.groups * p.taps) * itemsize
