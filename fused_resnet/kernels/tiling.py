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
def step_offsets(start, count, offs_c, channels, BLOCK_M: tl.constexpr):
    """(offsets from the tile's first element, mask) of BLOCK_M rows from row ``start`` of the tile on."""
    offs_m = start + tl.arange(0, BLOCK_M)
    offsets = offs_m[:, None] * channels + offs_c[None, :]
    return offsets, (offs_m < count)[:, None] & (offs_c < channels)[None, :]
