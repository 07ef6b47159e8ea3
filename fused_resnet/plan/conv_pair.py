"""Tiles of both gradients of a 1x1 convolution in one kernel, which walks the pixels once.

It moves 14 parts of memory where two kernels move 16 (of a quarter as many output channels as input's, each part as
large as the output). Nothing chooses it that was not measured.
"""

from __future__ import annotations

from .config import GemmConfig, supports
from .passes import next_power_of_2
from .problem import ConvProblem
from .split import wgrad_split
from .target import Target

MOST_OUTPUTS = 64
"""A wider output's accumulators leave too few input channels to a program, and dz and y are read for each such part."""

# Rows, input channels, warps, stages, and by what the weight gradient's split is divided: a loop that has a processor
# to itself needs no second wave. Compiled, with a residual: 160 to 220 registers, 64 KiB or more in flight.
PAIR = (
    (32, 128, 4, 4, 1), (32, 256, 8, 4, 2), (64, 64, 4, 3, 1), (32, 256, 8, 3, 2), (64, 128, 4, 2, 1),
    (32, 64, 4, 4, 1),
)  # fmt: skip
# Without wgmma both operands lie in registers, too.
PAIR_SM80 = ((32, 64, 4, 3, 1), (32, 128, 8, 3, 1))


def pair_candidates(problem: ConvProblem, target: Target) -> list[GemmConfig]:
    """Worth measuring where both gradients are asked for, the likeliest first; empty where one kernel is not for it."""
    if problem.Co > MOST_OUTPUTS:
        return []
    outputs = max(16, next_power_of_2(problem.Co))
    found = []
    for rows, channels, warps, stages, share in PAIR if target.has_group_products else PAIR_SM80:
        if channels <= max(64, problem.Ci):
            split = wgrad_split(problem, outputs, channels, rows, target.sm_count)
            found.append(GemmConfig(rows, channels, outputs, warps, stages, max(1, split // share)))
    return [config for config in found if supports(problem, "pair", target, config)[0]]
