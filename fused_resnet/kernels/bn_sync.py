"""BatchNorm over the processes of a group: what each of them sends, and what it makes of what all of them sent.

    bn_sync_pack            tiles [2, T, C] -> packed [2 C + 1]      mean, M2, count of this process's rows
    bn_sync_finalize        gathered [R, 2 C + 1] -> stats [4, C]    of all rows; the running statistics, in place
    bn_sync_grad_pack       tiles [K, T, C] -> packed [2 C + 1]      sum dz, sum dz * (y - mean), count
    bn_sync_grad_finalize   gathered [R, 2 C + 1], packed -> dgamma, dbeta of this process's rows; coeffs by all

Row r of ``gathered`` is what process r packed. All of them merge the same numbers in the same order, so that their
statistics agree to the last bit; counts may differ, and be 0. As in bn_stats.py, deviations are from a pivot, here

    p = sum n_r mean_r / N,   N = sum n_r     ->     S = sum n_r (mean_r - p),   Q = sum M2_r + n_r (mean_r - p)^2
"""

import triton
import triton.language as tl

from .bn_act_grad import tile_sums
from .bn_stats import centred, merge_tiles, store_stats, update_statistics
from .common import begin


@triton.jit
def store_packed(packed_ptr, first, second, rows, channels, offs_c, mask_c):
    """What travels: two numbers per channel, and how many rows they are of."""
    tl.store(packed_ptr + offs_c, first, mask=mask_c)
    tl.store(packed_ptr + channels + offs_c, second, mask=mask_c)
    if tl.program_id(0) == 0:
        tl.store(packed_ptr + 2 * channels + tl.arange(0, 1), tl.full((1,), rows, first.dtype))


@triton.jit
def load_ranks(gathered_ptr, start, ranks, offs_c, channels, BLOCK_R: tl.constexpr):
    """Both numbers of a block of processes, [BLOCK_R, BLOCK_C], and their counts, [BLOCK_R, 1]."""
    offs_r = start + tl.arange(0, BLOCK_R)[:, None]
    mask = (offs_r < ranks) & (offs_c < channels)[None, :]
    row_ptr = gathered_ptr + offs_r * (2 * channels + 1)
    first = tl.load(row_ptr + offs_c[None, :], mask=mask, other=0.0)
    second = tl.load(row_ptr + channels + offs_c[None, :], mask=mask, other=0.0)
    return first, second, tl.load(row_ptr + 2 * channels, mask=offs_r < ranks, other=0.0)


@triton.jit
def rank_sums(gathered_ptr, ranks, offs_c, channels, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sums over processes of both numbers, [BLOCK_C] each, and of their counts (1 for none)."""
    sum_first = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
    sum_second = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
    counts = tl.zeros([BLOCK_R, 1], dtype=ACC)
    for start in range(0, ranks, BLOCK_R):
        first, second, count = load_ranks(gathered_ptr, start, ranks, offs_c, channels, BLOCK_R)
        sum_first += first
        sum_second += second
        counts += count
    rows = tl.maximum(tl.sum(tl.sum(counts, axis=1), axis=0), 1.0)
    return tl.sum(sum_first, axis=0), tl.sum(sum_second, axis=0), rows


@triton.jit
def bn_sync_pack_kernel(
    tiles_ptr,
    packed_ptr,
    rows,
    channels,
    rows_per_tile,
    tiles,
    plane,
    VECTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin(DEPENDENT)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, m2 = merge_tiles(tiles_ptr, plane, tiles, rows, rows_per_tile, offs_c, channels, VECTORS, BLOCK_T)
    store_packed(packed_ptr, mean, m2, rows, channels, offs_c, offs_c < channels)


@triton.jit
def bn_sync_finalize_kernel(
    gathered_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    counter_ptr,
    ranks,
    channels,
    eps: tl.float64,
    momentum: tl.float64,
    ACC: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RUNNING_MEAN: tl.constexpr,
    HAS_RUNNING_VAR: tl.constexpr,
    HAS_COUNTER: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin(DEPENDENT)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    weighted = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
    counts = tl.zeros([BLOCK_R, 1], dtype=ACC)
    for start in range(0, ranks, BLOCK_R):
        mean, m2, count = load_ranks(gathered_ptr, start, ranks, offs_c, channels, BLOCK_R)
        weighted += count * mean
        counts += count
    counted = tl.sum(tl.sum(counts, axis=1), axis=0)
    rows = tl.maximum(counted, 1.0)
    pivot = tl.sum(weighted, axis=0) / rows
    shifted = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
    squared = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
    for start in range(0, ranks, BLOCK_R):
        mean, m2, count = load_ranks(gathered_ptr, start, ranks, offs_c, channels, BLOCK_R)
        deviation = mean - pivot[None, :]
        shifted += count * deviation
        squared += m2 + count * deviation * deviation
    mean, m2 = centred(pivot, tl.sum(shifted, axis=0), tl.sum(squared, axis=0), rows)

    store_stats(stats_ptr, weight_ptr, bias_ptr, mean, m2 / rows, eps, channels, offs_c, mask_c, HAS_WEIGHT, HAS_BIAS)
    mask_c = mask_c & (tl.zeros([BLOCK_C], dtype=ACC) + counted > 0.0)
    update_statistics(
        running_mean_ptr,
        running_var_ptr,
        counter_ptr,
        mean,
        m2 / tl.maximum(rows - 1.0, 1.0),
        momentum,
        offs_c,
        mask_c,
        HAS_RUNNING_MEAN,
        HAS_RUNNING_VAR,
        HAS_COUNTER,
        CUMULATIVE,
    )


@triton.jit
def bn_sync_grad_pack_kernel(
    tiles_ptr,
    packed_ptr,
    rows,
    channels,
    tiles,
    plane,
    ROW: tl.constexpr,
    ACC: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin(DEPENDENT)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_ptr = tiles_ptr + ROW * plane
    sum_dz, sum_dz_y = tile_sums(tiles_ptr, row_ptr, tiles, offs_c, channels, ACC, VECTORS, BLOCK_T, BLOCK_C)
    store_packed(packed_ptr, sum_dz, sum_dz_y, rows, channels, offs_c, offs_c < channels)


@triton.jit
def bn_sync_grad_finalize_kernel(
    gathered_ptr,
    packed_ptr,
    stats_ptr,
    weight_ptr,
    dgamma_ptr,
    dbeta_ptr,
    coeffs_ptr,
    ranks,
    channels,
    ACC: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin(DEPENDENT)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    sum_dz, sum_dz_y, rows = rank_sums(gathered_ptr, ranks, offs_c, channels, ACC, BLOCK_R, BLOCK_C)
    mean = tl.load(stats_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = tl.load(stats_ptr + channels + offs_c, mask=mask_c, other=0.0)
    a = rstd
    if HAS_WEIGHT:
        a = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(ACC) * rstd
    b = -a * rstd * (rstd * sum_dz_y) / rows
    c = -a * sum_dz / rows - b * mean
    dbeta = tl.load(packed_ptr + offs_c, mask=mask_c, other=0.0)
    dgamma = rstd * tl.load(packed_ptr + channels + offs_c, mask=mask_c, other=0.0)
    tl.store(dgamma_ptr + offs_c, dgamma, mask=mask_c)
    tl.store(dbeta_ptr + offs_c, dbeta, mask=mask_c)
    tl.store(coeffs_ptr + offs_c, a, mask=mask_c)
    tl.store(coeffs_ptr + channels + offs_c, b, mask=mask_c)
    tl.store(coeffs_ptr + 2 * channels + offs_c, c, mask=mask_c)
