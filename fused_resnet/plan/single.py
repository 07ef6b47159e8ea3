"""When a bottleneck with frozen statistics runs in one launch, and the tile of pixels that a program then owns."""

from __future__ import annotations

from functools import lru_cache

from .config import SingleConfig
from .passes import ceil_div, next_power_of_2
from .plans import ChainProblem
from .target import Target

MOST_SINGLE_WIDTH = 64
"""A wider bottleneck's weights do not stay near the processor: every tile would read them from L2 again."""
GAINFUL_SINGLE_WIDTH = 0
"""Up to here one launch was measured to be faster than three. Not measured yet, so that "auto" takes it nowhere."""

MOST_ROWS = 128
"""Of pixels in a tile, at most."""


def why_not_single(problem: ChainProblem, route: str) -> str:
    """Why the block does not run in one launch, or "" where it does."""
    reason = why_not_shape(problem)
    if reason:
        return reason
    if problem.backward:
        return "one launch for the whole block keeps nothing for a backward pass"
    width = problem.convs[0].Co
    if route != "single" and width > GAINFUL_SINGLE_WIDTH:
        return "whether one launch for the whole block pays was not measured"
    return ""


def why_not_shape(problem: ChainProblem) -> str:
    """Why the kernel does not take this chain, or ""."""
    if [(conv.R, conv.S) for conv in problem.convs] != [(1, 1), (3, 3), (1, 1)]:
        return "one launch takes a bottleneck: a 1x1, a 3x3 and a 1x1"
    first, second, last = problem.convs
    if not first.is_gemm or not last.is_gemm or (second.padding, second.dilation, second.groups) != ((1, 1), (1, 1), 1):
        return "one launch takes 1x1 convolutions of stride 1 around an ungrouped 3x3 with a padding of 1"
    if second.Ci != second.Co:
        return "one launch takes a 3x3 with as many channels out as in"
    if second.Co > MOST_SINGLE_WIDTH:
        return f"one launch takes a bottleneck up to {MOST_SINGLE_WIDTH} wide, not {second.Co}"
    shortcut = problem.projection
    if shortcut and not (shortcut.is_pointwise and shortcut.groups == 1 and shortcut.stride == second.stride):
        return "one launch takes a 1x1 projection of the 3x3's stride"
    if (MOST_ROWS * second.stride[0] + 2) * first.W * max(first.Ci, last.Co) >= 2**31:
        return "one launch counts a tile's elements in 32 bits, too many in rows as wide as these"
    if problem.batch_statistics:
        return "batch statistics are known only when a whole convolution has run"
    return ""


def halo(config: SingleConfig, stride: tuple[int, int]) -> int:
    """Pixels of the second convolution's input that a tile of its output reads."""
    return ((config.tile_p - 1) * stride[0] + 3) * ((config.tile_q - 1) * stride[1] + 3)


@lru_cache(maxsize=256)
def single_config(problem: ChainProblem, target: Target) -> SingleConfig:
    """The tile with the fewest products, those of the halo and of unused rows included; then the smallest halo."""
    first, second, last = problem.convs
    if target.interpreter:
        tile_p, tile_q = min(last.P, 16), min(last.Q, 16)
        rows, block_n, block_k = (max(16, next_power_of_2(size)) for size in (tile_p * tile_q, last.Co, first.Ci))
        return SingleConfig(rows, block_n, block_k, block_halo=512, tile_p=tile_p, tile_q=tile_q, programs=2)
    # Registers for two programs on a processor: float32, a projection's second accumulator and products without wgmma
    # leave too few of them for wide steps.
    wide = first.dtype == "float32"
    block_k = 32 if wide or problem.projection is not None or not target.has_group_products else 64
    block_m, maxnreg = (64, None) if wide else (MOST_ROWS, 128)
    found = []
    for most_p in range(1, min(block_m, last.P) + 1):
        tile_p, tile_q = _evenly(last.P, most_p), _evenly(last.Q, block_m // most_p)
        config = SingleConfig(
            block_m,
            32,
            block_k,
            num_warps=8,
            num_stages=2,
            maxnreg=maxnreg,
            tile_p=tile_p,
            tile_q=tile_q,
            programs=2 * target.sm_count,
        )
        found.append((_products(config, problem), halo(config, second.stride), most_p, config))
    return min(found)[-1]


def _evenly(size: int, most: int) -> int:
    """The smallest tile that needs no more of them than tiles of ``most`` do."""
    return ceil_div(size, ceil_div(size, most))


def _products(config: SingleConfig, problem: ChainProblem) -> int:
    first, second, last = problem.convs
    tiles = last.N * ceil_div(last.P, config.tile_p) * ceil_div(last.Q, config.tile_q)
    rows = ceil_div(halo(config, second.stride), config.block_halo) * config.block_halo
    projected = first.Ci * last.Co if problem.projection else 0
    return tiles * (rows * first.Ci * first.Co + config.block_m * (9 * second.Co**2 + last.Ci * last.Co + projected))
