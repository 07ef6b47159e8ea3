"""The configurations of convolutions that nobody measured: a few good tiles, of which the cost model takes one."""

from __future__ import annotations

from functools import lru_cache

from .config import GemmConfig
from .estimate import estimate_us
from .problem import ConvProblem
from .split import wgrad_split
from .target import Target

MODELLED = 90
"""The compute capability whose measurements the cost model was fitted to; on others the choice is one tile's."""

# Rows, columns, depth of a step, warps, stages, transposed, cap of registers. Few, since tests compile each of them for
# every layer: those that hold a tile within a twentieth of the fastest for whatever was measured.
Tile = tuple[int, int, int, int, int, bool, int | None]
FPROP_SHORT: tuple[Tile, ...] = ((128, 64, 64, 4, 2, True, None), (128, 128, 64, 8, 2, True, 128))
FPROP: tuple[Tile, ...] = (
    (128, 128, 64, 8, 3, True, 128),
    (128, 256, 64, 8, 3, True, None),
    (128, 64, 64, 4, 3, True, None),
)
# What follows ends in a residual and a ReLU: their registers beside the accumulators', or a third program instead.
FPROP_RESIDUAL_SHORT: tuple[Tile, ...] = ((128, 128, 64, 8, 2, True, None), (128, 64, 64, 4, 2, False, None))
FPROP_RESIDUAL: tuple[Tile, ...] = ((128, 128, 64, 4, 3, False, None), (64, 128, 64, 4, 3, False, None))
DGRAD_POINTWISE: tuple[Tile, ...] = (
    (64, 128, 64, 4, 2, False, None),
    (64, 256, 32, 4, 3, False, None),
    (64, 64, 64, 4, 3, False, None),
)
DGRAD: tuple[Tile, ...] = (
    (128, 128, 64, 4, 3, False, None),
    (128, 256, 64, 8, 3, False, None),
    (128, 64, 64, 4, 3, False, None),
)
# Output channels, input channels, rows, warps, stages, taps of a program.
WGRAD = ((128, 128, 64, 8, 3, 1), (128, 256, 64, 8, 3, 1), (64, 64, 64, 4, 4, 1))
WGRAD_ROW = ((128, 64, 64, 8, 3, 3), (64, 64, 64, 4, 3, 3), (128, 256, 64, 8, 3, 1))


@lru_cache(maxsize=4096)
def default_config(problem: ConvProblem, kind: str, target: Target, *, epilogue: str = "") -> GemmConfig:
    """The configuration of a problem that nobody measured: of :func:`choices` the one that should be the fastest."""
    found = choices(problem, kind, target, epilogue=epilogue)
    return found[0] if len(found) == 1 else min(found, key=lambda c: estimate_us(problem, kind, target, c))


def choices(problem: ConvProblem, kind: str, target: Target, *, epilogue: str = "") -> list[GemmConfig]:
    """What :func:`default_config` chooses from: few, and every one of them compiled for every layer by the tests.

    ``epilogue``, of an fprop: "residual" where it ends in a residual and a ReLU, "projection" where a second product
    joins it, whose accumulators leave no choice.
    """
    if target.interpreter:
        return [_interpreter_config(problem, kind)]
    if problem.is_stem and kind != "dgrad":
        return [_stem_config(problem, kind, target)]
    columns, depth = (problem.Co, problem.Ci) if kind == "fprop" else (problem.Ci, problem.Co)
    unmeasured = target.sm != MODELLED or problem.dtype == "float32" or min(columns, depth) <= 32
    if unmeasured or epilogue == "projection":
        return [_tile_config(problem, kind, target)]
    if kind == "wgrad":
        return [
            GemmConfig(m, n, k, warps, stages, wgrad_split(problem, m, n, k, target.sm_count, taps), row_taps=taps)
            for m, n, k, warps, stages, taps in (WGRAD_ROW if problem.S == 3 else WGRAD)
        ]
    return [
        GemmConfig(m, n, k, warps, stages, 1, maxnreg, transposed)
        for m, n, k, warps, stages, transposed, maxnreg in _tiles_of(problem, kind, target, epilogue)
    ]


def _tiles_of(problem: ConvProblem, kind: str, target: Target, epilogue: str) -> tuple[Tile, ...]:
    if kind == "dgrad":
        return DGRAD_POINTWISE if problem.is_pointwise else DGRAD
    short = problem.taps * problem.Ci <= 128
    if epilogue == "residual":
        return FPROP_RESIDUAL_SHORT if short else FPROP_RESIDUAL
    if short:
        return FPROP_SHORT
    programs = -(-problem.M // 128) * -(-problem.Co // 128)
    narrow = (
        problem.Co <= 128 or programs < target.sm_count
    )  # a narrow tile is for narrow layers, or to fill processors
    return FPROP if narrow else tuple(tile for tile in FPROP if tile[1] >= 128)


def _tile_config(problem: ConvProblem, kind: str, target: Target) -> GemmConfig:
    """The tile whose registers and shared memory leave room for two or three programs on any processor."""
    if kind == "wgrad":
        block_m, block_n = _tile(problem.Co), _tile(problem.Ci)
        row_taps = 3 if problem.S == 3 and block_m * block_n <= 64 * 64 else 1
        warps = 8 if block_m * block_n >= 128 * 128 else 4
        block_k = 32 if problem.dtype == "float32" or (row_taps == 3 and not target.has_group_products) else 64
        split = wgrad_split(problem, block_m, block_n, block_k, target.sm_count, row_taps)
        return GemmConfig(block_m, block_n, block_k, num_warps=warps, num_stages=3, split=split, row_taps=row_taps)
    columns = problem.Co if kind == "fprop" else problem.Ci
    reduced = problem.Ci if kind == "fprop" else problem.Co
    block_n = _tile(columns)
    # A wider step would not fit the registers of float32, nor of a dgrad's two operands without wgmma.
    narrow = problem.dtype == "float32" or (kind == "dgrad" and not target.has_group_products)
    block_k = 32 if narrow or reduced <= 32 else 64
    # Registers and shared memory for two or three programs on a processor: one's loads, another's products.
    if kind == "dgrad":
        return GemmConfig(
            64 if block_n == 128 else 128, block_n, block_k, num_warps=4, num_stages=2 + (problem.taps > 1)
        )
    stages = 2 if problem.taps * reduced <= 128 else 3
    if problem.is_pointwise and block_n == 128:  # three programs even where the epilogue adds a residual
        return GemmConfig(64, block_n, block_k, num_warps=4, num_stages=stages)
    return GemmConfig(128, block_n, block_k, num_warps=8 if block_n >= 128 else 4, num_stages=stages)


def _stem_config(problem: ConvProblem, kind: str, target: Target) -> GemmConfig:
    """Of stem_conv: a step is one long filter row or two short ones; the weight gradient takes all rows, if it can, to
    read dy once, and as many parts as there are processors: a program fills one."""
    block_co = _tile(problem.Co)
    if kind == "fprop":
        return GemmConfig(128, block_co, 32, num_warps=8 if block_co == 128 else 4, num_stages=4)
    block_n = _power(problem.R * problem.run, 256)
    block_k = 32 if problem.dtype == "float32" else 64
    tiles = -(-problem.Co // block_co) * -(-problem.R * problem.run // block_n)
    split = max(1, min(target.sm_count // tiles, problem.M // (4 * block_k)))
    return GemmConfig(block_co, block_n, block_k, num_warps=8, num_stages=3, split=split)


def _tile(columns: int) -> int:
    return 128 if columns > 64 else 64 if columns > 32 else 32


def _interpreter_config(problem: ConvProblem, kind: str) -> GemmConfig:
    # The interpreter's cost is per program and per loop step: the largest tile that is not mostly padding.
    depth = problem.R * problem.run if problem.is_stem and kind != "dgrad" else problem.Ci
    rows, columns = (problem.Co, depth) if kind == "wgrad" else (problem.M, problem.Co if kind == "fprop" else depth)
    reduced = problem.M if kind == "wgrad" else depth if kind == "fprop" else problem.Co
    return GemmConfig(_power(rows, 4096), _power(columns, 256), _power(reduced, 4096 if kind == "wgrad" else 256))


def _power(size: int, most: int) -> int:
    return min(most, max(16, 1 << (size - 1).bit_length()))
