"""The configurations of convolutions that nobody measured."""

from __future__ import annotations

from .config import GemmConfig
from .problem import ConvProblem
from .split import wgrad_split
from .target import Target


def default_config(problem: ConvProblem, kind: str, target: Target) -> GemmConfig:
    """The configuration of a problem that nobody measured."""
    if target.interpreter:
        return _interpreter_config(problem, kind)
    if problem.is_stem and kind != "dgrad":
        return _stem_config(problem, kind, target)
    if kind == "wgrad":
        block_m, block_n = _tile(problem.Co), _tile(problem.Ci)
        row_taps = 3 if problem.S == 3 and block_m * block_n <= 64 * 64 else 1
        warps = 8 if block_m * block_n >= 128 * 128 else 4
        block_k = 32 if problem.dtype == "float32" or (row_taps == 3 and target.sm < 90) else 64
        split = wgrad_split(problem, block_m, block_n, block_k, target.sm_count, row_taps)
        return GemmConfig(block_m, block_n, block_k, num_warps=warps, num_stages=3, split=split, row_taps=row_taps)
    columns = problem.Co if kind == "fprop" else problem.Ci
    reduced = problem.Ci if kind == "fprop" else problem.Co
    block_n = _tile(columns)
    # A wider step would not fit the registers of float32, nor of a dgrad's two operands without wgmma.
    narrow = problem.dtype == "float32" or (kind == "dgrad" and target.sm < 90)
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
