"""Weight gradient of a 3x3 convolution of stride 1, read in boxes of pixels by tensor descriptors.

    dW[co, r, s, ci] = sum over n, h, w of dy[n, h+1-r, w, co] * a[n, h, w+s-1, ci]

A step of the reduction is a box of BOX_N images by BOX_H by BOX_W pixels; both operands are plain boxes, dy's shifted
by r and a's by s, and what lies outside the image or the batch the copy engine fills with zeros. One program owns one
(Co, Ci) tile of one tap, of the three taps of a filter row, which share dy, or of all nine, which share three dy and
three a, over one contiguous range of boxes. The float32 partials of the ranges are summed in a fixed order by
conv_wgrad's second kernel: two runs agree bit for bit.

reads  a [N, H, W, Ci], dy [N, H, W, Co]
writes dw [split, Co, R, S, Ci]
"""

import triton
import triton.language as tl

from .common import begin


@triton.jit
def add_row(acc_0, acc_1, acc_2, dy, left, middle, right, PRECISION: tl.constexpr):
    """The accumulators of the three taps of a filter row, a box further."""
    acc_0 = tl.dot(dy, left, acc_0, input_precision=PRECISION, out_dtype=acc_0.dtype)
    acc_1 = tl.dot(dy, middle, acc_1, input_precision=PRECISION, out_dtype=acc_1.dtype)
    acc_2 = tl.dot(dy, right, acc_2, input_precision=PRECISION, out_dtype=acc_2.dtype)
    return acc_0, acc_1, acc_2


@triton.jit
def store_tap(dw_ptrs, tap, Ci, acc, mask):
    tl.store(dw_ptrs + tap * Ci, acc.to(dw_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def box_wgrad_kernel(
    x_desc,
    dy_desc,
    dw_ptr,
    boxes,
    boxes_h,
    boxes_w,
    Ci,
    Co,
    boxes_per_split,
    TAPS: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """``TAPS`` (1, 3 or 9): the taps of one program, with an accumulator each."""
    begin(DEPENDENT)
    # The tiles of one range are neighbours in launch order: they read the same boxes from L2.
    tiles_ci = tl.cdiv(Ci, BLOCK_N)
    tiles_row = 9 // TAPS * tiles_ci
    co0 = tl.program_id(0) // tiles_row * BLOCK_M
    ci0 = tl.program_id(0) % tiles_ci * BLOCK_N
    tap = tl.program_id(0) % tiles_row // tiles_ci * TAPS
    r = tap // 3
    s = tap % 3

    zero = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    acc_0, acc_1, acc_2, acc_3, acc_4, acc_5, acc_6, acc_7, acc_8 = zero, zero, zero, zero, zero, zero, zero, zero, zero

    # The box's place is counted up, not divided out, a step.
    pid_split = tl.program_id(1)
    first = pid_split * boxes_per_split
    n0 = first // (boxes_h * boxes_w) * BOX_N
    h0 = first // boxes_w % boxes_h * BOX_H
    w0 = first % boxes_w * BOX_W
    for _ in range(tl.minimum(boxes_per_split, boxes - first)):
        dy = dy_desc.load([n0, h0 + 1 - r, w0, co0]).reshape(BLOCK_K, BLOCK_M).T
        left = x_desc.load([n0, h0, w0 + s - 1, ci0]).reshape(BLOCK_K, BLOCK_N)
        if TAPS == 1:
            acc_0 = tl.dot(dy, left, acc_0, input_precision=PRECISION, out_dtype=ACC)
        else:
            middle = x_desc.load([n0, h0, w0, ci0]).reshape(BLOCK_K, BLOCK_N)
            right = x_desc.load([n0, h0, w0 + 1, ci0]).reshape(BLOCK_K, BLOCK_N)
            acc_0, acc_1, acc_2 = add_row(acc_0, acc_1, acc_2, dy, left, middle, right, PRECISION)
        if TAPS == 9:
            dy = dy_desc.load([n0, h0, w0, co0]).reshape(BLOCK_K, BLOCK_M).T
            acc_3, acc_4, acc_5 = add_row(acc_3, acc_4, acc_5, dy, left, middle, right, PRECISION)
            dy = dy_desc.load([n0, h0 - 1, w0, co0]).reshape(BLOCK_K, BLOCK_M).T
            acc_6, acc_7, acc_8 = add_row(acc_6, acc_7, acc_8, dy, left, middle, right, PRECISION)
        w0 += BOX_W
        carry_w = w0 == boxes_w * BOX_W
        w0 = tl.where(carry_w, 0, w0)
        h0 = tl.where(carry_w, h0 + BOX_H, h0)
        carry_h = h0 == boxes_h * BOX_H
        h0 = tl.where(carry_h, 0, h0)
        n0 = tl.where(carry_h, n0 + BOX_N, n0)

    offs_co = co0 + tl.arange(0, BLOCK_M)
    offs_ci = ci0 + tl.arange(0, BLOCK_N)
    row = (pid_split * Co + offs_co).to(tl.int64) * (9 * Ci)
    dw_ptrs = dw_ptr + row[:, None] + (tap * Ci + offs_ci)[None, :]
    mask = (offs_co < Co)[:, None] & (offs_ci < Ci)[None, :]
    store_tap(dw_ptrs, 0, Ci, acc_0, mask)
    if TAPS > 1:
        store_tap(dw_ptrs, 1, Ci, acc_1, mask)
        store_tap(dw_ptrs, 2, Ci, acc_2, mask)
    if TAPS == 9:
        store_tap(dw_ptrs, 3, Ci, acc_3, mask)
        store_tap(dw_ptrs, 4, Ci, acc_4, mask)
        store_tap(dw_ptrs, 5, Ci, acc_5, mask)
        store_tap(dw_ptrs, 6, Ci, acc_6, mask)
        store_tap(dw_ptrs, 7, Ci, acc_7, mask)
        store_tap(dw_ptrs, 8, Ci, acc_8, mask)
