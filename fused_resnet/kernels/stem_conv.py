"""Convolution of images of up to four channels, forward and its weight gradient.

Three channels fit no vector load and no tensor instruction. So the image is copied once, into

    x [N, H', 2*PAIRS, 4]     zero-padded in both directions and to four channels, an even number of pixels in a row

where the taps of one filter row of one output pixel are one run of contiguous elements: S*4 of them, the rest of its
RUN (16 or 32) elements meeting weights of zero. No mask is left, and at an even stride every run starts at a multiple
of eight elements, a 16-byte load. Both passes are then GEMMs whose other dimension holds R runs:

    y[m, co]       = sum over r, k of x[origin(m) + r * dilation_h * row + k] * w[co, r, k]
    dW[co, (r, k)] = sum over m of dy[m, co] * x[origin(m) + r * dilation_h * row + k]

w [Co, R, RUN] is padded by the same kernel. What lies in the rest of a run are real pixels, and zero
times infinity is NaN: an infinity or a NaN in the image shows in outputs up to RUN/4 - S pixels further left than its
window's.
"""

import triton
import triton.language as tl

from .common import begin
from .implicit_gemm import next_rows, split_rows


@triton.jit
def stem_pad_kernel(
    x_ptr,
    padded_ptr,
    rows,
    H,
    W,
    padded_h,
    pairs,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """x [N, H, W, CHANNELS] -> padded [N, padded_h, 2*pairs, 4], zero around and behind; ``rows`` = N * padded_h."""
    begin(DEPENDENT)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = offs_m // padded_h
    h = offs_m - n * padded_h - PADDING_H
    w = offs_c // 4 - PADDING_W
    c = offs_c % 4
    mask_m = offs_m < rows
    inside_m = mask_m & (h >= 0) & (h < H)
    inside_c = (w >= 0) & (w < W) & (c < CHANNELS)
    x_ptrs = x_ptr + (n * H + h).to(tl.int64)[:, None] * (W * CHANNELS) + (w * CHANNELS + c)[None, :]
    values = tl.load(x_ptrs, mask=inside_m[:, None] & inside_c[None, :], other=0.0)
    padded_ptrs = padded_ptr + offs_m.to(tl.int64)[:, None] * (pairs * 8) + offs_c[None, :]
    tl.store(padded_ptrs, values, mask=mask_m[:, None] & (offs_c < pairs * 8)[None, :])


@triton.jit
def stem_conv_fprop_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    tiles_ptr,
    M,
    P,
    Q,
    Co,
    padded_h,
    pairs,
    num_m,
    num_n,
    R: tl.constexpr,
    RUN: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    HAS_STATS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """Writes y [M, Co] and tiles [2, T, Co], the mean and M2 of each M tile of y as stored.

    A step of the loop takes BLOCK_K // RUN rows of the filter.
    """
    begin(DEPENDENT)
    # Elements that every origin is a multiple of.
    ALIGNED: tl.constexpr = 8 if STRIDE_W % 2 == 0 else 4
    FILTER_ROWS: tl.constexpr = BLOCK_K // RUN

    pid_m = tl.program_id(0) // num_n
    pid_n = tl.program_id(0) % num_n
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    filter_row = offs_k // RUN
    row_pitch = pairs * 8

    # Rows and columns past the end repeat the last one: their loads need no mask, their results are not stored.
    n, p, q = split_rows(tl.minimum(offs_m, M - 1), P, Q)
    origin = (n * padded_h + p * STRIDE_H) * (pairs * (8 // ALIGNED)) + q * (STRIDE_W * 4 // ALIGNED)
    x_offs = filter_row * (DILATION_H * row_pitch) + offs_k % RUN
    x_ptrs = x_ptr + (origin.to(tl.int64) * ALIGNED)[:, None] + x_offs[None, :]
    w_ptrs = w_ptr + tl.minimum(offs_n, Co - 1)[None, :] * (R * RUN) + offs_k[:, None]

    # Transposed: a column of the result lies in four threads, so its sums are cheap, and the few output channels take
    # the short side of the tensor instruction.
    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    for i in range(tl.cdiv(R, FILTER_ROWS)):
        if R % FILTER_ROWS == 0:
            a = tl.load(x_ptrs)
            b = tl.load(w_ptrs)
        else:
            mask_k = filter_row < R - i * FILTER_ROWS
            a = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            b = tl.load(w_ptrs, mask=mask_k[:, None], other=0.0)
        acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION, out_dtype=ACC)
        x_ptrs += FILTER_ROWS * DILATION_H * row_pitch
        w_ptrs += BLOCK_K

    y = tl.trans(acc).to(y_ptr.dtype.element_ty)
    mask_m = offs_m < M
    mask_n = offs_n < Co
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * Co + offs_n[None, :]
    tl.store(y_ptrs, y, mask=mask_m[:, None] & mask_n[None, :])

    if HAS_STATS:
        values = y.to(ACC)
        count = tl.minimum(M - pid_m * BLOCK_M, BLOCK_M)
        mean = tl.sum(tl.where(mask_m[:, None], values, 0.0), axis=0) / count
        centred = tl.where(mask_m[:, None], values - mean[None, :], 0.0)
        tile_ptrs = tiles_ptr + pid_m * Co + offs_n
        tl.store(tile_ptrs, mean, mask=mask_n)
        tl.store(tile_ptrs + num_m * Co, tl.sum(centred * centred, axis=0), mask=mask_n)


@triton.jit
def stem_conv_wgrad_kernel(
    x_ptr,
    dy_ptr,
    dw_ptr,
    M,
    P,
    Q,
    Co,
    padded_h,
    pairs,
    rows_per_split,
    stride_w,
    CHANNELS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    RUN: tl.constexpr,
    STRIDE_H: tl.constexpr,
    DILATION_H: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """Writes dw [split, Co, R*S*CHANNELS]: each program one tile of it, summed over a contiguous range of rows.

    BLOCK_N counts elements of runs: with R*RUN or more of them, dy is read once.

    ``stride_w`` is no constant so that the compiler knows origins to be multiples of 4 elements only: asynchronous
    copies of 16 bytes pass L1 by, those of 8 do not. Here a warp's lanes lie along the runs of one pixel, and what
    the next pixels' share with them is found in L1. (Forward, a warp holds several pixels of one row.)
    """
    begin(DEPENDENT)
    tiles_n = tl.cdiv(R * RUN, BLOCK_N)
    offs_co = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_co = offs_co < Co
    r = offs_n // RUN
    k = offs_n % RUN
    # Surplus columns repeat the first row of the filter; they are not stored.
    columns = tl.where(r < R, r, 0) * (DILATION_H * pairs * 8) + k

    pid_split = tl.program_id(1)
    row_start = pid_split * rows_per_split
    rows = tl.minimum(rows_per_split, M - row_start)
    # dy is loaded as [Co, rows], which is what the dot wants; the memory stays contiguous along Co.
    dy_base = dy_ptr + row_start.to(tl.int64) * Co
    dy_offs = offs_co[:, None] + offs_k[None, :] * Co

    # Origins are counted in pixels from that of a step's first row, which is a scalar's business: what a row adds is
    # known before the loop, but for the lines and images that begin inside the step.
    line = STRIDE_H * pairs * 2
    image = padded_h * pairs * 2
    n, p, q = split_rows(row_start, P, Q)
    n_k, p_k, q_k = split_rows(offs_k, P, Q)
    origin_k = (n_k * image + p_k * line + q_k * stride_w) * 4
    x_offs = columns[None, :] + origin_k[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for i in range(tl.cdiv(rows, BLOCK_K)):
        next_line = q_k >= Q - q
        next_image = p_k + next_line.to(tl.int32) >= P - p
        jump = tl.where(next_line, line - Q * stride_w, 0) + tl.where(next_image, image - P * line, 0)
        x_base = x_ptr + (n.to(tl.int64) * image + p * line + q * stride_w) * 4
        x_rows = x_base + (x_offs + (jump * 4)[:, None])
        if EVEN_K:
            dy = tl.load(dy_base + dy_offs, mask=mask_co[:, None], other=0.0)
            a = tl.load(x_rows)
        else:
            mask_k = offs_k < rows - i * BLOCK_K
            dy = tl.load(dy_base + dy_offs, mask=mask_co[:, None] & mask_k[None, :], other=0.0)
            a = tl.load(x_rows, mask=mask_k[:, None], other=0.0)
        acc = tl.dot(dy, a, acc, input_precision=PRECISION, out_dtype=ACC)

        dy_base += BLOCK_K * Co
        n, p, q = next_rows(n, p, q, BLOCK_K, P, Q)

    s = k // 4
    c = k % 4
    dw_rows = (pid_split * Co + offs_co).to(tl.int64) * (R * S * CHANNELS)
    dw_ptrs = dw_ptr + dw_rows[:, None] + ((r * S + s) * CHANNELS + c)[None, :]
    mask_n = (r < R) & (s < S) & (c < CHANNELS)
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=mask_co[:, None] & mask_n[None, :])
