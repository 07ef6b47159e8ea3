"""Which rows and channels one program of a bandwidth-bound pass works on."""

import triton
import triton.language as tl

from .common import from_the_end


@triton.jit
def pass_tile(rows, channels, rows_per_tile, BLOCK_C: tl.constexpr, FROM_THE_END: tl.constexpr = False):
    """(tile, its first row as int64, how many rows it has, its channels).

    Channel blocks of the same rows are neighbours in launch order, so that together they read whole rows of memory.
    ``FROM_THE_END``: the tiles of the last rows come first.
    """
    blocks_c = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    tile = pid // blocks_c
    if FROM_THE_END:
        tile = from_the_end(tile, tl.num_programs(0) // blocks_c)
    first = tile.to(tl.int64) * rows_per_tile
    count = tl.minimum(rows - first, rows_per_tile).to(tl.int32)
    offs_c = (pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    return tile, first, count, offs_c


@triton.jit
def step_offsets(start, count, offs_c, channels, ROWS: tl.constexpr):
    """(offsets from the tile's first element, mask), [ROWS, BLOCK_C], of the step that begins at row ``start``."""
    offs_m = start + tl.arange(0, ROWS)[:, None]
    return offs_m * channels + offs_c[None, :], (offs_m < count) & (offs_c < channels)[None, :]


@triton.jit
def step_bits(start, count, channels, row_bytes, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The same, [ROWS, BLOCK_C / 8], of the bytes of a mask."""
    block_c = tl.program_id(0) % tl.cdiv(channels, BLOCK_C)
    offs_b = block_c * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    return step_offsets(start, count, offs_b, row_bytes, ROWS)


@triton.jit
def fold(values, VECTORS: tl.constexpr):
    """Adds up the row groups of a step, [VECTORS * BLOCK_M, BLOCK_C] -> [BLOCK_M, BLOCK_C].

    A thread holds a vector of channels in each of the groups: it adds them up without a word to its neighbours.
    """
    ROWS: tl.constexpr = values.shape[0]
    BLOCK_C: tl.constexpr = values.shape[1]
    return tl.sum(tl.reshape(values, (VECTORS, ROWS // VECTORS, BLOCK_C)), axis=0)


@triton.jit
def sum_rows(values, LOADED: tl.constexpr):
    """The sum over the rows of ``values`` [R, C], which came in 16-byte vectors of the dtype ``LOADED``.

    The rows of a warp first, by exchanges of registers; then halves of the rest, a row for each warp, until one is
    left. tl.sum has every warp write its row to shared memory channel by channel, eight or more threads to one bank
    (Triton 3.6), and takes four barriers for one. It takes fewer registers, where others are still needed.
    """
    R: tl.constexpr = values.shape[0]
    C: tl.constexpr = values.shape[1]
    VECTOR: tl.constexpr = 128 // LOADED.primitive_bitwidth
    ALIKE: tl.constexpr = 32 * VECTOR // C if C < 32 * VECTOR else 1
    TOGETHER: tl.constexpr = ALIKE if ALIKE < R else R
    rows = tl.sum(tl.reshape(values, (R // TOGETHER, TOGETHER, C)), axis=1)
    for _ in tl.static_range(6):
        if rows.shape[0] > 1:
            upper, lower = tl.split(tl.permute(tl.reshape(rows, (2, rows.shape[0] // 2, C)), (1, 2, 0)))
            rows = upper + lower
    return tl.sum(rows, axis=0)
