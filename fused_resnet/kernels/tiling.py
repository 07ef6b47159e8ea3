"""Which rows and channels one program of a bandwidth-bound pass works on."""

import triton
import triton.language as tl


@triton.jit
def pass_tile(rows, channels, rows_per_tile, BLOCK_C: tl.constexpr):
    """(tile, its first row as int64, how many rows it has, its channels).

    Channel blocks of the same rows are neighbours in launch order, so that together they read whole rows of memory.
    """
    blocks_c = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    tile = pid // blocks_c
    first = tile.to(tl.int64) * rows_per_tile
    count = tl.minimum(rows - first, rows_per_tile).to(tl.int32)
    offs_c = (pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    return tile, first, count, offs_c


@triton.jit
def step_rows(start, VECTORS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows of one step, [VECTORS, BLOCK_M, 1].

    A thread holds one vector of channels in each of VECTORS row groups: it loads them at once, and adds them up
    (axis 0) without a word to its neighbours.
    """
    groups = start + tl.arange(0, VECTORS) * BLOCK_M
    return (groups[:, None] + tl.arange(0, BLOCK_M)[None, :])[:, :, None]


@triton.jit
def step_offsets(start, count, offs_c, channels, VECTORS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(offsets from the tile's first element, mask) of the step that begins at row ``start`` of the tile."""
    offs_m = step_rows(start, VECTORS, BLOCK_M)
    offs_c = offs_c[None, None, :]
    return offs_m * channels + offs_c, (offs_m < count) & (offs_c < channels)
