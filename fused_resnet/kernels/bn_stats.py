"""Batch statistics: per-tile mean and M2 of y [M, C], their merge, and the rows every other kernel normalises with.

    bn_stats      y [M, C] -> tiles [2, T, C]                mean and M2 = sum (y - mean)^2 of every rows_per_tile rows
    bn_merge      tiles [2, T, C] -> tiles [2, G, C]         Chan's merge of every group of neighbours into one tile
    bn_finalize   tiles [2, T, C] -> stats [4, C]            the same of all of them; the running statistics, in place
    bn_frozen     running_mean, running_var -> stats [4, C], of up to four layers in one launch
    stats rows    0 mean, 1 rstd, 2 scale = gamma * rstd, 3 shift = beta - mean * scale

All reductions sum deviations from a pivot p, the mean of the first block of what they reduce:

    S = sum (v - p),  Q = sum (v - p)^2      ->      mean = p + S / n,  M2 = Q - S^2 / n

S and Q of different lanes simply add, so no lane needs a count. The subtraction cancels at most a factor
1 + (p - mean)^2 / var. One block of B among n values holds at most n * var of the squared deviations, so
(p - mean)^2 <= var * n / B: float32 loses no more than the number of blocks, whatever the mean and the data.
"""

import triton
import triton.language as tl

from .common import begin
from .tiling import fold, pass_tile, step_offsets, sum_rows


@triton.jit
def centred(pivot, shifted_sum, squared_sum, count):
    """(mean, M2) from sums of deviations from the pivot. Rounding may not take M2 below zero, and NaN stays NaN."""
    offset = shifted_sum / count
    m2 = squared_sum - shifted_sum * offset
    return pivot + offset, tl.where(m2 < 0.0, 0.0, m2)


@triton.jit
def deviations(y, mask, pivot, VECTORS: tl.constexpr):
    """(S, Q) of one step, a sum per lane."""
    deviation = tl.where(mask, y - pivot[None, :], 0.0)
    return fold(deviation, VECTORS), fold(deviation * deviation, VECTORS)


@triton.jit
def bn_stats_kernel(
    y_ptr,
    tiles_ptr,
    rows,
    channels,
    rows_per_tile,
    plane,
    ACC: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin(DEPENDENT)
    tile, first, count, offs_c = pass_tile(rows, channels, rows_per_tile, BLOCK_C)
    y_ptr += first * channels
    LOADED: tl.constexpr = y_ptr.dtype.element_ty

    offsets, mask = step_offsets(0, count, offs_c, channels, VECTORS * BLOCK_M)
    y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(ACC)
    pivot = tl.sum(fold(y, VECTORS), axis=0) / tl.minimum(count, VECTORS * BLOCK_M)
    shifted, squared = deviations(y, mask, pivot, VECTORS)
    for start in range(VECTORS * BLOCK_M, count, VECTORS * BLOCK_M):
        offsets, mask = step_offsets(start, count, offs_c, channels, VECTORS * BLOCK_M)
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(ACC)
        more_shifted, more_squared = deviations(y, mask, pivot, VECTORS)
        shifted += more_shifted
        squared += more_squared

    mean, m2 = centred(pivot, sum_rows(shifted, LOADED), sum_rows(squared, LOADED), count)
    tiles_ptr += tile.to(tl.int64) * channels
    tl.store(tiles_ptr + offs_c, mean, mask=offs_c < channels)
    tl.store(tiles_ptr + plane + offs_c, m2, mask=offs_c < channels)


@triton.jit
def store_stats(
    stats_ptr,
    weight_ptr,
    bias_ptr,
    mean,
    var,
    eps,
    channels,
    offs_c,
    mask_c,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """The four rows of stats from the mean and the biased variance."""
    dtype = mean.dtype
    rstd = (1.0 / tl.sqrt(var + eps)).to(dtype)  # eps is a float64, and so is the root: exact, and cheap per channel
    scale = rstd
    if HAS_WEIGHT:
        scale = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(dtype) * rstd
    shift = -mean * scale
    if HAS_BIAS:
        shift = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(dtype) - mean * scale
    tl.store(stats_ptr + offs_c, mean, mask=mask_c)
    tl.store(stats_ptr + channels + offs_c, rstd, mask=mask_c)
    tl.store(stats_ptr + 2 * channels + offs_c, scale, mask=mask_c)
    tl.store(stats_ptr + 3 * channels + offs_c, shift, mask=mask_c)


@triton.jit
def update_running(running_ptr, value, momentum, offs_c, mask_c):
    """running = (1 - momentum) * running + momentum * value, in the running tensor's own dtype."""
    running = tl.load(running_ptr + offs_c, mask=mask_c, other=0.0)
    updated = (1.0 - momentum) * running.to(value.dtype) + momentum * value
    tl.store(running_ptr + offs_c, updated.to(running.dtype), mask=mask_c)


@triton.jit
def update_statistics(
    running_mean_ptr,
    running_var_ptr,
    counter_ptr,
    mean,
    unbiased,
    momentum,
    offs_c,
    mask_c,
    HAS_RUNNING_MEAN: tl.constexpr,
    HAS_RUNNING_VAR: tl.constexpr,
    HAS_COUNTER: tl.constexpr,
    CUMULATIVE: tl.constexpr,
):
    """Both running statistics, in place, from the mean and the unbiased variance.

    The counter counts up; ``CUMULATIVE``: it did before, because here every program reads it, and makes the momentum.
    """
    if CUMULATIVE:
        momentum = 1.0 / tl.load(counter_ptr).to(tl.float64)
    elif HAS_COUNTER:
        if tl.program_id(0) == 0:
            tl.store(counter_ptr, tl.load(counter_ptr) + 1)
    if HAS_RUNNING_MEAN:
        update_running(running_mean_ptr, mean, momentum, offs_c, mask_c)
    if HAS_RUNNING_VAR:
        update_running(running_var_ptr, unbiased, momentum, offs_c, mask_c)


@triton.jit
def tile_deviations(mean, m2, mask, pivot, start, rows, rows_per_tile, VECTORS: tl.constexpr):
    """(S, Q) of all values in the step of tiles that begins at tile ``start``, a sum per lane."""
    first_row = (start + tl.arange(0, mean.shape[0]))[:, None].to(tl.int64) * rows_per_tile
    count = tl.minimum(rows - first_row, rows_per_tile).to(mean.dtype)
    deviation = tl.where(mask, mean - pivot[None, :], 0.0)
    return fold(count * deviation, VECTORS), fold(m2 + count * deviation * deviation, VECTORS)


@triton.jit
def merge_tiles(
    tiles_ptr,
    plane,
    tiles,
    rows,
    rows_per_tile,
    offs_c,
    channels,
    VECTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """(mean, M2), [BLOCK_C] each, of ``tiles`` tiles that hold ``rows`` rows together."""
    ROWS: tl.constexpr = VECTORS * BLOCK_T
    offsets, mask = step_offsets(0, tiles, offs_c, channels, ROWS)
    mean = tl.load(tiles_ptr + offsets, mask=mask, other=0.0)
    m2 = tl.load(tiles_ptr + plane + offsets, mask=mask, other=0.0)
    pivot = tl.sum(fold(mean, VECTORS), axis=0) / tl.minimum(tiles, ROWS)
    shifted, squared = tile_deviations(mean, m2, mask, pivot, 0, rows, rows_per_tile, VECTORS)
    for start in range(ROWS, tiles, ROWS):
        offsets, mask = step_offsets(start, tiles, offs_c, channels, ROWS)
        mean = tl.load(tiles_ptr + offsets, mask=mask, other=0.0)
        m2 = tl.load(tiles_ptr + plane + offsets, mask=mask, other=0.0)
        more_shifted, more_squared = tile_deviations(mean, m2, mask, pivot, start, rows, rows_per_tile, VECTORS)
        shifted += more_shifted
        squared += more_squared
    return centred(pivot, tl.sum(shifted, axis=0), tl.sum(squared, axis=0), rows)


@triton.jit
def bn_merge_kernel(
    tiles_ptr,
    merged_ptr,
    rows,
    channels,
    rows_per_tile,
    tiles,
    tiles_per_group,
    plane,
    merged_plane,
    VECTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin(DEPENDENT)
    group, first, count, offs_c = pass_tile(tiles, channels, tiles_per_group, BLOCK_C)
    rows_here = tl.minimum(rows - first * rows_per_tile, count.to(tl.int64) * rows_per_tile)
    tiles_ptr += first * channels
    mean, m2 = merge_tiles(tiles_ptr, plane, count, rows_here, rows_per_tile, offs_c, channels, VECTORS, BLOCK_T)
    merged_ptr += group * channels
    tl.store(merged_ptr + offs_c, mean, mask=offs_c < channels)
    tl.store(merged_ptr + merged_plane + offs_c, m2, mask=offs_c < channels)


@triton.jit
def bn_finalize_kernel(
    tiles_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    counter_ptr,
    rows,
    channels,
    rows_per_tile,
    tiles,
    plane,
    eps: tl.float64,
    momentum: tl.float64,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RUNNING_MEAN: tl.constexpr,
    HAS_RUNNING_VAR: tl.constexpr,
    HAS_COUNTER: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin(DEPENDENT)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    mean, m2 = merge_tiles(tiles_ptr, plane, tiles, rows, rows_per_tile, offs_c, channels, VECTORS, BLOCK_T)
    store_stats(stats_ptr, weight_ptr, bias_ptr, mean, m2 / rows, eps, channels, offs_c, mask_c, HAS_WEIGHT, HAS_BIAS)
    update_statistics(
        running_mean_ptr,
        running_var_ptr,
        counter_ptr,
        mean,
        m2 / tl.maximum(rows - 1, 1),
        momentum,
        offs_c,
        mask_c,
        HAS_RUNNING_MEAN,
        HAS_RUNNING_VAR,
        HAS_COUNTER,
        CUMULATIVE,
    )


@triton.jit
def frozen_rows(norm, eps, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """One layer's stats; nothing past its channels."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < norm.channels
    mean = tl.load(norm.mean + offs_c, mask=mask_c, other=0.0).to(ACC)
    var = tl.load(norm.var + offs_c, mask=mask_c, other=1.0).to(ACC)
    HAS_WEIGHT: tl.constexpr = norm.weight is not None
    HAS_BIAS: tl.constexpr = norm.bias is not None
    store_stats(norm.stats, norm.weight, norm.bias, mean, var, eps, norm.channels, offs_c, mask_c, HAS_WEIGHT, HAS_BIAS)


@triton.jit
def bn_frozen_kernel(
    norm0,
    norm1,
    norm2,
    norm3,
    eps0: tl.float64,
    eps1: tl.float64,
    eps2: tl.float64,
    eps3: tl.float64,
    COUNT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """Layer ``program_id(1)`` of the ``COUNT`` that there are, each a tuple; the others are None."""
    begin(DEPENDENT)
    layer = tl.program_id(1)
    if layer == 0:
        frozen_rows(norm0, eps0, ACC, BLOCK_C)
    if COUNT > 1:
        if layer == 1:
            frozen_rows(norm1, eps1, ACC, BLOCK_C)
    if COUNT > 2:
        if layer == 2:
            frozen_rows(norm2, eps2, ACC, BLOCK_C)
    if COUNT > 3:
        if layer == 3:
            frozen_rows(norm3, eps3, ACC, BLOCK_C)
