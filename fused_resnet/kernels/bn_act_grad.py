"""Backward of out = relu(y * scale + shift + r), in two passes over [M, C] and a merge between them.

    bn_act_grad_reduce   dz = dout where the ReLU passed it; tiles of sum dz, sum dz * (y - mean),
                         and for a projection's raw output r, sum dz * (r - residual_mean). The ReLU's mask
                         is that of its output, its bits (see bits.py), or y * scale + shift
    bn_grad_merge        where there are many tiles: those of every group of neighbours added up into one
    bn_grad_finalize     dbeta = sum dz,  dgamma = rstd * sum dz * (y - mean)
                         A = gamma * rstd,  B = -A * rstd * dgamma / M,  C = -A * dbeta / M - B * mean
    bn_grad_apply        dy = A * dz + B * y + C, or A * dz where the statistics are frozen

Sums over a tile stay in two dimensions, one sum per lane, and meet once at its end.
"""

import triton
import triton.language as tl

from .bits import unpack_bits
from .bn_act import load_channels
from .common import affine, begin, relu_grad
from .tiling import fold, pass_tile, step_bits, step_offsets, sum_rows


@triton.jit
def bn_act_grad_reduce_kernel(
    dout_ptr,
    y_ptr,
    out_ptr,
    bits_ptr,
    residual_ptr,
    stats_ptr,
    residual_stats_ptr,
    dz_ptr,
    tiles_ptr,
    rows,
    channels,
    row_bytes,
    rows_per_tile,
    plane,
    ACC: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_BITS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    APPLY_RELU: tl.constexpr,
    STORE_DZ: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin(DEPENDENT)
    tile, first, count, offs_c = pass_tile(rows, channels, rows_per_tile, BLOCK_C, FROM_THE_END=True)
    dout_ptr += first * channels
    if HAS_Y:
        y_ptr += first * channels
        mean = load_channels(stats_ptr, offs_c, channels)
        scale = load_channels(stats_ptr + 2 * channels, offs_c, channels)
        shift = load_channels(stats_ptr + 3 * channels, offs_c, channels)
    if HAS_OUT:
        out_ptr += first * channels
    if HAS_BITS:
        bits_ptr += first * row_bytes
    if HAS_RESIDUAL:
        residual_ptr += first * channels
        residual_mean = load_channels(residual_stats_ptr, offs_c, channels)
    if STORE_DZ:
        dz_ptr += first * channels

    sum_dz = tl.zeros([BLOCK_M, BLOCK_C], dtype=ACC)
    sum_dz_y = tl.zeros([BLOCK_M, BLOCK_C], dtype=ACC)
    sum_dz_residual = tl.zeros([BLOCK_M, BLOCK_C], dtype=ACC)
    for start in range(0, count, VECTORS * BLOCK_M):
        offsets, mask = step_offsets(start, count, offs_c, channels, VECTORS * BLOCK_M)
        dout = tl.load(dout_ptr + offsets, mask=mask, other=0.0)
        if HAS_Y:
            y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(ACC)
        if HAS_OUT:
            pre = tl.load(out_ptr + offsets, mask=mask, other=0.0).to(ACC)
        if HAS_BITS:
            offsets_b, mask_b = step_bits(start, count, channels, row_bytes, VECTORS * BLOCK_M, BLOCK_C)
            passed = unpack_bits(tl.load(bits_ptr + offsets_b, mask=mask_b, other=0))
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(ACC)

        dz = dout.to(ACC)
        if HAS_BITS:
            dz = tl.where(passed, dz, 0.0)
        elif APPLY_RELU:
            if not HAS_OUT:
                pre = affine(y, scale, shift)
            dz = relu_grad(dz, pre)
        if STORE_DZ:
            tl.store(dz_ptr + offsets, dz.to(dout.dtype), mask=mask)
        sum_dz += fold(dz, VECTORS)
        if HAS_Y:
            sum_dz_y += fold(dz * (y - mean), VECTORS)
        if HAS_RESIDUAL:
            sum_dz_residual += fold(dz * (residual - residual_mean), VECTORS)

    mask_c = offs_c < channels
    tiles_ptr += tile.to(tl.int64) * channels
    LOADED: tl.constexpr = dout_ptr.dtype.element_ty
    tl.store(tiles_ptr + offs_c, sum_rows(sum_dz, LOADED), mask=mask_c)
    tl.store(tiles_ptr + plane + offs_c, sum_rows(sum_dz_y, LOADED), mask=mask_c)
    if HAS_RESIDUAL:
        tl.store(tiles_ptr + 2 * plane + offs_c, sum_rows(sum_dz_residual, LOADED), mask=mask_c)


@triton.jit
def tile_sums(
    dz_ptr,
    dz_y_ptr,
    tiles,
    offs_c,
    channels,
    ACC: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Both sums over ``tiles`` tiles, [BLOCK_C] each."""
    sum_dz = tl.zeros([BLOCK_T, BLOCK_C], dtype=ACC)
    sum_dz_y = tl.zeros([BLOCK_T, BLOCK_C], dtype=ACC)
    for start in range(0, tiles, VECTORS * BLOCK_T):
        offsets, mask = step_offsets(start, tiles, offs_c, channels, VECTORS * BLOCK_T)
        sum_dz += fold(tl.load(dz_ptr + offsets, mask=mask, other=0.0), VECTORS)
        sum_dz_y += fold(tl.load(dz_y_ptr + offsets, mask=mask, other=0.0), VECTORS)
    return tl.sum(sum_dz, axis=0), tl.sum(sum_dz_y, axis=0)


@triton.jit
def bn_grad_merge_kernel(
    tiles_ptr,
    merged_ptr,
    channels,
    tiles,
    tiles_per_group,
    plane,
    merged_plane,
    ROW: tl.constexpr,
    ACC: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin(DEPENDENT)
    group, first, count, offs_c = pass_tile(tiles, channels, tiles_per_group, BLOCK_C)
    tiles_ptr += first * channels
    row_ptr = tiles_ptr + ROW * plane
    sum_dz, sum_dz_y = tile_sums(tiles_ptr, row_ptr, count, offs_c, channels, ACC, VECTORS, BLOCK_T, BLOCK_C)
    merged_ptr += group * channels
    tl.store(merged_ptr + offs_c, sum_dz, mask=offs_c < channels)
    tl.store(merged_ptr + merged_plane + offs_c, sum_dz_y, mask=offs_c < channels)


@triton.jit
def bn_grad_finalize_kernel(
    tiles_ptr,
    stats_ptr,
    weight_ptr,
    dgamma_ptr,
    dbeta_ptr,
    coeffs_ptr,
    rows,
    channels,
    tiles,
    plane,
    ROW: tl.constexpr,
    ACC: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin(DEPENDENT)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    row_ptr = tiles_ptr + ROW * plane
    dbeta, sum_dz_y = tile_sums(tiles_ptr, row_ptr, tiles, offs_c, channels, ACC, VECTORS, BLOCK_T, BLOCK_C)

    mean = tl.load(stats_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = tl.load(stats_ptr + channels + offs_c, mask=mask_c, other=0.0)
    dgamma = rstd * sum_dz_y
    a = rstd
    if HAS_WEIGHT:
        a = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(ACC) * rstd
    b = -a * rstd * dgamma / rows
    c = -a * dbeta / rows - b * mean
    tl.store(dgamma_ptr + offs_c, dgamma, mask=mask_c)
    tl.store(dbeta_ptr + offs_c, dbeta, mask=mask_c)
    tl.store(coeffs_ptr + offs_c, a, mask=mask_c)
    tl.store(coeffs_ptr + channels + offs_c, b, mask=mask_c)
    tl.store(coeffs_ptr + 2 * channels + offs_c, c, mask=mask_c)


@triton.jit
def bn_grad_apply_kernel(
    dz_ptr,
    y_ptr,
    coeffs_ptr,
    dy_ptr,
    rows,
    channels,
    rows_per_tile,
    HAS_Y: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin(DEPENDENT)
    _, first, count, offs_c = pass_tile(rows, channels, rows_per_tile, BLOCK_C)
    dz_ptr += first * channels
    dy_ptr += first * channels
    a = load_channels(coeffs_ptr, offs_c, channels)
    if HAS_Y:
        y_ptr += first * channels
        b = load_channels(coeffs_ptr + channels, offs_c, channels)
        c = load_channels(coeffs_ptr + 2 * channels, offs_c, channels)

    for start in range(0, count, VECTORS * BLOCK_M):
        offsets, mask = step_offsets(start, count, offs_c, channels, VECTORS * BLOCK_M)
        dz = tl.load(dz_ptr + offsets, mask=mask)
        if HAS_Y:
            y = tl.load(y_ptr + offsets, mask=mask).to(a.dtype)
        dy = a * dz.to(a.dtype)
        if HAS_Y:
            dy += affine(y, b, c)
        tl.store(dy_ptr + offsets, dy.to(dz.dtype), mask=mask)
