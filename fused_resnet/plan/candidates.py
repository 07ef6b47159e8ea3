"""Which configurations are worth measuring for a pass of a convolution, the most likely first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .config import GemmConfig, supports
from .planner import default_config
from .problem import ConvProblem
from .split import wgrad_split
from .target import Target

MOST = 26

# Rows, columns, warps, stages. One or two steps of the reduction have nothing to pipeline: shared memory is better
# spent on a second program.
SHORT = (
    (128, 64, 4, 2), (128, 128, 8, 2), (64, 256, 8, 2), (128, 256, 8, 2), (64, 64, 4, 2), (256, 64, 8, 2),
    (64, 128, 4, 2), (128, 128, 4, 2), (256, 128, 8, 2), (64, 256, 4, 2), (128, 64, 8, 2), (128, 32, 4, 2),
)  # fmt: skip
LONG = (
    (128, 128, 8, 4), (128, 256, 8, 3), (128, 64, 4, 4), (256, 128, 8, 3), (64, 256, 8, 4), (128, 128, 4, 4),
    (256, 64, 8, 4), (64, 64, 4, 5), (128, 256, 8, 4), (64, 128, 4, 4), (256, 128, 8, 4), (64, 256, 4, 3),
    (256, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2),
)  # fmt: skip
# Output channels, input channels, rows, warps, stages; of one tap, and of a row of three.
WGRAD = (
    (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (64, 64, 64, 4, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4),
    (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (64, 256, 64, 8, 3), (256, 64, 64, 8, 3), (64, 64, 128, 4, 3),
    (128, 128, 32, 8, 4), (128, 64, 128, 8, 2), (64, 128, 128, 8, 2), (64, 64, 64, 4, 2),
)  # fmt: skip
WGRAD_ROW = ((64, 64, 64, 4, 3), (128, 64, 64, 8, 3), (64, 128, 64, 8, 3), (64, 64, 32, 4, 4))
OTHER_SPLITS = WGRAD[:1] + WGRAD[2:5]
"""Those of which half and twice the parts are worth a try."""


def candidates(problem: ConvProblem, kind: str, target: Target, most: int = MOST) -> list[GemmConfig]:
    """At most ``most`` distinct configurations of ``kind`` that ``target`` supports, the planner's default first."""
    default = default_config(problem, kind, target)
    proposed = _wgrad(problem, target) if kind == "wgrad" else _gemm(problem, kind)
    found = dict.fromkeys([default, *proposed])
    return [config for config in found if supports(problem, kind, target, config)[0]][:most]


def _gemm(problem: ConvProblem, kind: str) -> Iterator[GemmConfig]:
    """fprop and dgrad: rows by output channels, reduced over input channels and taps (dgrad: the other way)."""
    columns, depth = (problem.Co, problem.Ci) if kind == "fprop" else (problem.Ci, problem.Co)
    k = 64 if depth > 32 else 32
    steps = problem.taps * -(-depth // k)
    tiles = SHORT if steps <= 2 else LONG
    fitting = [GemmConfig(m, n, k, warps, stages) for m, n, warps, stages in tiles if n <= max(columns, 32)]
    yield from fitting[:8]
    # Transposed, an epilogue's sums stay inside few threads, but a prologue's operand goes through shared memory.
    yield from (replace(config, transposed=True) for config in fitting[:6])
    if columns >= 512:
        yield GemmConfig(64, 512, 32, 8, 3)  # a prologue is computed once for every N tile: the fewer the better
    if columns >= 128:
        yield GemmConfig(128, 128, k, 8, 3, maxnreg=128)
        yield GemmConfig(128, 128, 32, 8, 4)
    if depth % 128 == 0:
        yield GemmConfig(128, min(128, max(32, columns)), 128, 8, 2)
    yield from fitting[8:]


def _wgrad(problem: ConvProblem, target: Target) -> Iterator[GemmConfig]:
    """Output by input channels of one tap, reduced over the rows, which are split into parts."""
    shapes = [(tile, 1) for tile in WGRAD] + [(tile, 3) for tile in WGRAD_ROW if problem.S == 3]
    for tile, row_taps in shapes:
        co, ci, k, warps, stages = tile
        if co > max(64, problem.Co) or ci > max(64, problem.Ci):
            continue
        split = wgrad_split(problem, co, ci, k, target.sm_count, row_taps)
        config = GemmConfig(co, ci, k, warps, stages, split, row_taps=row_taps)
        yield config
        if row_taps == 1 and tile in OTHER_SPLITS:
            yield from (replace(config, split=other) for other in (split // 2, 2 * split) if other >= 1)
