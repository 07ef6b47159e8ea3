"""A 3x3 convolution of stride 1 as nine shifted plain GEMMs, read in boxes of pixels by tensor descriptors.

    fprop   y[n, h, w, co]  = sum over r, s, ci of x[n, h+r-1, w+s-1, ci] * w[co, r, s, ci]
    dgrad   dx[n, h, w, ci] = sum over r, s, co of dy[n, h+r-1, w+s-1, co] * w[co, 2-r, 2-s, ci]

A tile of the GEMM is a box of BOX_N images by BOX_H by BOX_W pixels. A tap reads the box one pixel further, and what
lies outside the image the copy engine fills with zeros: the loop has no offsets, masks or divisions of rows, nor does
the memory any padding. The boxes tile the batch exactly, so that every tile has BLOCK_M pixels.

Reads   x [N, H, W, K], w [Co, R*S*Ci], mask_input [N, H, W, C], mask_stats [4, C]     (dgrad: x is dy, K = Co, C = Ci)
Writes  y [N, H, W, C], tiles [2, T, C]: mean and M2 of each box of y as stored; with a mask, the sums of dgrad.
Epilogue  the statistics, or relu_grad(y, mask_input*scale + shift) with sum dz and sum dz*(mask_input - mean).

box_conv_kernel computes a box by itself, and reads each pixel nine times. walk_conv_kernel, for one step of channels
(K = BLOCK_K), walks down the rows of a column of boxes with all nine filters at hand: it reads a row of pixels three
times, once for each s, and adds it to the three rows of the result that it touches.
"""

import triton
import triton.language as tl

from .common import affine, begin, from_the_end, relu_grad


@triton.jit
def load_columns(row_ptr, offs_c, mask_c, ALONG_ROWS: tl.constexpr):
    """Per-channel numbers that broadcast over a tile whose channels are its rows, or its columns."""
    row = tl.load(row_ptr + offs_c, mask=mask_c, other=0.0)
    return row[:, None] if ALONG_ROWS else row[None, :]


@triton.jit
def load_filter(w_desc, tap, k0, c0, columns, FLIP: tl.constexpr):
    """[BLOCK_K, BLOCK_N] of one tap; ``columns``: the input channels of a tap in the weights' memory."""
    if FLIP:
        return w_desc.load([k0, (8 - tap) * columns + c0])
    else:
        return w_desc.load([c0, tap * columns + k0]).T


@triton.jit
def finish_box(
    acc,
    mask_desc,
    mask_stats_ptr,
    tiles_ptr,
    tile,
    num_m,
    n0,
    h0,
    w0,
    c0,
    C,
    stores,
    DTYPE: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_MASK_STATS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue of a box: the result as it is to be stored [BLOCK_M, BLOCK_N]; its tile, if it ``stores`` any."""
    # The tile stays as it was accumulated: transposed, a channel's sums run along its row, within four threads.
    PIXELS: tl.constexpr = 1 if TRANSPOSED else 0
    ACC: tl.constexpr = acc.dtype
    offs_c = c0 + tl.arange(0, BLOCK_N)
    mask_c = (offs_c < C) & stores
    if HAS_MASK:
        x = mask_desc.load([n0, h0, w0, c0]).reshape(BLOCK_M, BLOCK_N)
        if TRANSPOSED:
            x = x.T
        x = x.to(ACC)
        pre = x
        if HAS_MASK_STATS:
            scale = load_columns(mask_stats_ptr + 2 * C, offs_c, mask_c, TRANSPOSED)
            shift = load_columns(mask_stats_ptr + 3 * C, offs_c, mask_c, TRANSPOSED)
            pre = affine(x, scale, shift)
        acc = relu_grad(acc, pre)
    y = acc.to(DTYPE)
    values = y.to(ACC)
    if HAS_STATS or HAS_MASK:
        tile_ptrs = tiles_ptr + tile * C + offs_c
    if HAS_STATS:
        mean = tl.sum(values, axis=PIXELS) / BLOCK_M
        centred = values - tl.expand_dims(mean, PIXELS)
        tl.store(tile_ptrs, mean, mask=mask_c)
        tl.store(tile_ptrs + num_m * C, tl.sum(centred * centred, axis=PIXELS), mask=mask_c)
    if HAS_MASK:
        tl.store(tile_ptrs, tl.sum(values, axis=PIXELS), mask=mask_c)
        if HAS_MASK_STATS:
            mean = load_columns(mask_stats_ptr, offs_c, mask_c, TRANSPOSED)
            tl.store(tile_ptrs + num_m * C, tl.sum(values * (x - mean), axis=PIXELS), mask=mask_c)
        else:
            tl.store(tile_ptrs + num_m * C, tl.zeros((BLOCK_N,), ACC), mask=mask_c)
    return y.T if TRANSPOSED else y


@triton.jit
def box_conv_kernel(
    x_desc,
    w_desc,
    y_desc,
    mask_desc,
    mask_stats_ptr,
    tiles_ptr,
    boxes_h,
    boxes_w,
    K,
    C,
    columns,
    num_m,
    num_n,
    FLIP: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_MASK_STATS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """``FLIP``: dgrad. ``TRANSPOSED``: what for, as in conv_fprop."""
    begin(DEPENDENT)
    pid_m = tl.program_id(0) // num_n
    if FLIP:
        pid_m = from_the_end(pid_m, num_m)
    c0 = tl.program_id(0) % num_n * BLOCK_N
    n0 = pid_m // (boxes_h * boxes_w) * BOX_N
    h0 = pid_m // boxes_w % boxes_h * BOX_H
    w0 = pid_m % boxes_w * BOX_W

    if TRANSPOSED:
        acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for i in range(9 * tl.cdiv(K, BLOCK_K)):
        tap = i % 9
        k0 = i // 9 * BLOCK_K
        a = x_desc.load([n0, h0 + tap // 3 - 1, w0 + tap % 3 - 1, k0]).reshape(BLOCK_M, BLOCK_K)
        b = load_filter(w_desc, tap, k0, c0, columns, FLIP)
        if TRANSPOSED:
            acc = tl.dot(b.T, a.T, acc, input_precision=PRECISION, out_dtype=ACC)
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)

    y = finish_box(
        acc, mask_desc, mask_stats_ptr, tiles_ptr, pid_m, num_m, n0, h0, w0, c0, C, True,
        y_desc.dtype, HAS_STATS, HAS_MASK, HAS_MASK_STATS, TRANSPOSED, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    y_desc.store([n0, h0, w0, c0], y.reshape(BOX_N, BOX_H, BOX_W, BLOCK_N))


@triton.jit
def add_row(acc, left, middle, right, f0, f1, f2, PRECISION: tl.constexpr):
    """acc + the three taps of one filter row."""
    acc = tl.dot(left, f0, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    acc = tl.dot(middle, f1, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return tl.dot(right, f2, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def walk_conv_kernel(
    x_desc,
    w_desc,
    y_desc,
    mask_desc,
    mask_stats_ptr,
    tiles_ptr,
    H,
    boxes_w,
    C,
    columns,
    num_m,
    num_n,
    steps,
    steps_per_walk,
    FLIP: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_MASK_STATS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """The columns of boxes, H + 1 steps each, make one long walk that the programs share evenly.

    Step h of a column reads row h and finishes row h - 1. Row H, below the image, is zero: it adds nothing to the row
    that it finishes, nor to the first rows of the next column, which it leaves clean. The first step of a column
    finishes nothing. A program begins two steps early, for the rows whose share the one before it added.
    y has more images than N: spare ones.
    """
    begin(DEPENDENT)
    c0 = tl.program_id(0) % num_n * BLOCK_N
    walk = tl.program_id(0) // num_n
    first = walk * steps_per_walk
    last = tl.minimum(first + steps_per_walk, steps)
    f00 = load_filter(w_desc, 0, 0, c0, columns, FLIP)
    f01 = load_filter(w_desc, 1, 0, c0, columns, FLIP)
    f02 = load_filter(w_desc, 2, 0, c0, columns, FLIP)
    f10 = load_filter(w_desc, 3, 0, c0, columns, FLIP)
    f11 = load_filter(w_desc, 4, 0, c0, columns, FLIP)
    f12 = load_filter(w_desc, 5, 0, c0, columns, FLIP)
    f20 = load_filter(w_desc, 6, 0, c0, columns, FLIP)
    f21 = load_filter(w_desc, 7, 0, c0, columns, FLIP)
    f22 = load_filter(w_desc, 8, 0, c0, columns, FLIP)

    # A copy to a box that lies wholly outside traps: what finishes no row goes to a box of the walk's own, in the
    # images behind the last one.
    spare_n = (num_m // (H * boxes_w) + walk // (H * boxes_w)) * BOX_N
    spare_h = walk // boxes_w % H
    spare_w = walk % boxes_w * BOX_W

    start = tl.maximum(first - 2, 0)
    column = start // (H + 1)
    h = start % (H + 1)
    above = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    here = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for step in range(start, last):
        n0 = column // boxes_w * BOX_N
        w0 = column % boxes_w * BOX_W
        left = x_desc.load([n0, h, w0 - 1, 0]).reshape(BLOCK_M, BLOCK_K)
        middle = x_desc.load([n0, h, w0, 0]).reshape(BLOCK_M, BLOCK_K)
        right = x_desc.load([n0, h, w0 + 1, 0]).reshape(BLOCK_M, BLOCK_K)
        above = add_row(above, left, middle, right, f20, f21, f22, PRECISION)
        here = add_row(here, left, middle, right, f10, f11, f12, PRECISION)
        below = add_row(tl.zeros((BLOCK_M, BLOCK_N), ACC), left, middle, right, f00, f01, f02, PRECISION)

        stores = (step >= first) & (h > 0)
        y = finish_box(
            above, mask_desc, mask_stats_ptr, tiles_ptr, column * H + h - 1, num_m, n0, h - 1, w0, c0, C, stores,
            y_desc.dtype, HAS_STATS, HAS_MASK, HAS_MASK_STATS, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        place_n = tl.where(stores, n0, spare_n)
        place_h = tl.where(stores, h - 1, spare_h)
        place_w = tl.where(stores, w0, spare_w)
        y_desc.store([place_n, place_h, place_w, c0], y.reshape(BOX_N, 1, BOX_W, BLOCK_N))
        above = here
        here = below
        h += 1
        column += tl.where(h > H, 1, 0)
        h = tl.where(h > H, 0, h)
