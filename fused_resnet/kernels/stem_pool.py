"""The stem's BatchNorm, ReLU and 3x3 max pool of stride 2 and padding 1 as one pass over the convolution's output.

    out[n, p, q]   = max over the window of a = relu(y * scale + shift), a rounded to y's dtype
    index[n, p, q] = r * 3 + s of the first maximum in scan order; a NaN wins, the last one if there are several

Backward never stores dz, the gradient at y * scale + shift: two passes form it again from the windows,

    dz[n, h, w] = sum over the windows whose index is (h, w) of relu_grad(dout, out)
    reduce: sum(dz), sum(dz * (y - mean)) per channel        apply: dy = A * dz + B * y + C

P = ceil(H / 2) and Q = ceil(W / 2), so the positions fall into cells of 2x2, one for each output pixel: the cell at
(p, q) meets its own window and the next ones right, below and diagonally, and reads four windows for four positions.

y, dy [N, H, W, C]; out, dout, index [N, P, Q, C] (index uint8); stats [4, C]; coeffs [3, C]; tiles [2, T, C]
"""

import triton
import triton.language as tl

from .common import affine, begin, relu, relu_grad, widened
from .tiling import sum_rows


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """``value`` after rounding to ``dtype``."""
    return widened(value.to(dtype), value.dtype)


@triton.jit
def stem_pool_kernel(
    y_ptr,
    stats_ptr,
    out_ptr,
    index_ptr,
    M,
    H,
    W,
    C,
    P,
    Q,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
    KEEPS_INDEX: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """One program: BLOCK_M output pixels by BLOCK_C channels. ``index_ptr`` is None unless KEEPS_INDEX."""
    begin(DEPENDENT)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_c = (offs_c < C)[None, :]
    scale = tl.load(stats_ptr + 2 * C + offs_c, mask=offs_c < C, other=0.0)[None, :]
    shift = tl.load(stats_ptr + 3 * C + offs_c, mask=offs_c < C, other=0.0)[None, :]

    # A tap outside the image stands for its nearest neighbour inside, which is in the window too and so moves no
    # maximum. That keeps the taps free of masks, which would cost more than the arithmetic.
    row = tl.minimum(offs_m, M - 1)
    h = row // Q % P * 2 - 1
    w = row % Q * 2 - 1
    image = (row // (P * Q)).to(tl.int64) * H
    for r in tl.static_range(3):
        inside_h = tl.minimum(tl.maximum(h + r, 0), H - 1)
        line = (image + inside_h) * W
        for s in tl.static_range(3):
            inside_w = tl.minimum(tl.maximum(w + s, 0), W - 1)
            pixel = line + inside_w
            tap = ((inside_h - h) * 3 + inside_w - w)[:, None]
            y = tl.load(y_ptr + pixel[:, None] * C + offs_c[None, :], mask=mask_c, other=0.0).to(ACC)
            exact = affine(y, scale, shift)
            value = rounded(exact, y_ptr.dtype.element_ty)
            if r + s == 0:
                best = value
                first = tap
                index = tl.broadcast_to(tap, (BLOCK_M, BLOCK_C))
            else:
                wins = (value > best) | (exact != exact)
                best = tl.where(wins, value, best)
                index = tl.where(wins, tap, index)

    offs = offs_m.to(tl.int64)[:, None] * C + offs_c[None, :]
    mask = mask_m[:, None] & mask_c
    tl.store(out_ptr + offs, relu(best).to(out_ptr.dtype.element_ty), mask=mask)
    if KEEPS_INDEX:
        # The maximum was taken before ReLU: the same tap wins where it is positive; elsewhere all are equal, to zero.
        index = tl.where(best <= 0, first, index)
        tl.store(index_ptr + offs, index.to(tl.uint8), mask=mask)


@triton.jit
def window_grad(dout_ptr, out_ptr, index_ptr, offs, mask, ACC: tl.constexpr):
    """The gradient a window passes on, and the tap it goes to; zero where there is no window."""
    dout = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(ACC)
    out = tl.load(out_ptr + offs, mask=mask, other=0.0).to(ACC)
    index = tl.load(index_ptr + offs, mask=mask, other=0).to(tl.int32)
    return relu_grad(dout, out), index


@triton.jit
def cell_grad(dout_ptr, out_ptr, index_ptr, offs_m, offs_c, mask_m, mask_c, p, q, P, Q, C, ACC: tl.constexpr):
    """dz at the cell's positions (0, 0), (0, 1), (1, 0), (1, 1), each [BLOCK_M, BLOCK_C]."""
    offs = offs_m.to(tl.int64)[:, None] * C + offs_c[None, :]
    mask = mask_m[:, None] & mask_c
    has_right = (q + 1 < Q)[:, None]
    has_below = (p + 1 < P)[:, None]
    own, own_tap = window_grad(dout_ptr, out_ptr, index_ptr, offs, mask, ACC)
    right, right_tap = window_grad(dout_ptr, out_ptr, index_ptr, offs + C, mask & has_right, ACC)
    below, below_tap = window_grad(dout_ptr, out_ptr, index_ptr, offs + Q * C, mask & has_below, ACC)
    far, far_tap = window_grad(dout_ptr, out_ptr, index_ptr, offs + (Q + 1) * C, mask & has_right & has_below, ACC)

    dz_00 = tl.where(own_tap == 4, own, 0.0)
    dz_01 = tl.where(own_tap == 5, own, 0.0) + tl.where(right_tap == 3, right, 0.0)
    dz_10 = tl.where(own_tap == 7, own, 0.0) + tl.where(below_tap == 1, below, 0.0)
    dz_11 = tl.where(own_tap == 8, own, 0.0) + tl.where(right_tap == 6, right, 0.0)
    dz_11 += tl.where(below_tap == 2, below, 0.0) + tl.where(far_tap == 0, far, 0.0)
    return dz_00, dz_01, dz_10, dz_11


@triton.jit
def stem_pool_grad_reduce_kernel(
    dout_ptr,
    index_ptr,
    out_ptr,
    y_ptr,
    stats_ptr,
    tiles_ptr,
    M,
    H,
    W,
    C,
    P,
    Q,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """One program: STEPS * BLOCK_M cells by BLOCK_C channels into one tile."""
    begin(DEPENDENT)
    pid_m = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = (offs_c < C)[None, :]
    mean = tl.load(stats_ptr + offs_c, mask=offs_c < C, other=0.0)[None, :]

    # Two-dimensional sums: rows are added up once, at the end.
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), dtype=ACC)
    sum_dz_y = tl.zeros((BLOCK_M, BLOCK_C), dtype=ACC)
    for step in range(STEPS):
        offs_m = (pid_m * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        p = offs_m // Q % P
        q = offs_m % Q
        grads = cell_grad(dout_ptr, out_ptr, index_ptr, offs_m, offs_c, mask_m, mask_c, p, q, P, Q, C, ACC)
        corner = (((offs_m // (P * Q)).to(tl.int64) * H + 2 * p) * W + 2 * q) * C
        for i in tl.static_range(2):
            for j in tl.static_range(2):
                inside = (mask_m & (2 * p + i < H) & (2 * q + j < W))[:, None] & mask_c
                ptrs = y_ptr + (corner + (i * W + j) * C)[:, None] + offs_c[None, :]
                y = tl.load(ptrs, mask=inside, other=0.0).to(ACC)
                dz = grads[i * 2 + j]
                sum_dz += dz
                sum_dz_y += dz * (y - mean)

    T = tl.num_programs(0).to(tl.int64)
    tile_ptrs = tiles_ptr + pid_m.to(tl.int64) * C + offs_c
    LOADED: tl.constexpr = y_ptr.dtype.element_ty
    tl.store(tile_ptrs, sum_rows(sum_dz, LOADED), mask=offs_c < C)
    tl.store(tile_ptrs + T * C, sum_rows(sum_dz_y, LOADED), mask=offs_c < C)


@triton.jit
def stem_pool_grad_apply_kernel(
    dout_ptr,
    index_ptr,
    out_ptr,
    y_ptr,
    coeffs_ptr,
    dy_ptr,
    M,
    H,
    W,
    C,
    P,
    Q,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """One program: BLOCK_M cells by BLOCK_C channels of dy."""
    begin(DEPENDENT)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_c = (offs_c < C)[None, :]
    coeff_a = tl.load(coeffs_ptr + offs_c, mask=offs_c < C, other=0.0)[None, :]
    coeff_b = tl.load(coeffs_ptr + C + offs_c, mask=offs_c < C, other=0.0)[None, :]
    coeff_c = tl.load(coeffs_ptr + 2 * C + offs_c, mask=offs_c < C, other=0.0)[None, :]

    p = offs_m // Q % P
    q = offs_m % Q
    grads = cell_grad(dout_ptr, out_ptr, index_ptr, offs_m, offs_c, mask_m, mask_c, p, q, P, Q, C, ACC)
    corner = (((offs_m // (P * Q)).to(tl.int64) * H + 2 * p) * W + 2 * q) * C
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            inside = (mask_m & (2 * p + i < H) & (2 * q + j < W))[:, None] & mask_c
            offs = (corner + (i * W + j) * C)[:, None] + offs_c[None, :]
            y = tl.load(y_ptr + offs, mask=inside, other=0.0).to(ACC)
            dy = coeff_a * grads[i * 2 + j] + (coeff_b * y + coeff_c)
            tl.store(dy_ptr + offs, dy.to(dy_ptr.dtype.element_ty), mask=inside)
