"""Weight gradient of a convolution: a GEMM whose reduction runs over the output pixels.

    dW[co, (r, s, ci)] = sum over m = (n, p, q) of dy[m, co] * a[(n, h, w), ci]
                         h = p * stride_h - padding_h + r * dilation_h,  w likewise; a is zero outside the image

One program owns one (Co, Ci) tile of one tap, or of the three taps of a filter row, over one contiguous range of rows.
The ranges are fixed by the configuration; their float32 partials [split, Co, R * S * Ci] are summed in a fixed order:
two runs agree bit for bit.

Prologues, formed on load and rounded to the operands' dtype before the dot, so that neither tensor is ever written:

    dy = A * dz + B * y + C        the gradient of BatchNorm (A * dz alone with frozen statistics)
    a  = relu(x * scale + shift)   the normalised input

Of a 1x1 filter and wide data the input's mean may be subtracted from a: what a mean of dy makes of it never adds up.

reads  x [N, H, W, Ci], dy (or dz) and y [M, Co], affine [2, Ci], coeffs [3, Co]
writes dw [split, Co, R, S, Ci]
"""

import triton
import triton.language as tl

from .common import affine, begin, relu, widened
from .tiling import sum_rows


@triton.jit
def conv_wgrad_kernel(
    x_ptr,
    dy_ptr,
    y_ptr,
    affine_ptr,
    mean_ptr,
    coeffs_ptr,
    dw_ptr,
    M,
    H,
    W,
    Ci,
    P,
    Q,
    Co,
    S,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    rows_per_split,
    TAPS: tl.constexpr,
    ROW_TAPS: tl.constexpr,
    SAME_GRID: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_COEFFS: tl.constexpr,
    HAS_Y: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """``SAME_GRID``: stride 1 and P, Q = H, W, so a tap is a constant shift of the rows and only its mask needs (h, w).

    ``HAS_PADDING``: a tap can fall outside the image. Neither: a plain GEMM. ``ROW_TAPS`` (1 or 3): the taps of one
    program, with an accumulator each; they share one load of dy.
    """
    begin(DEPENDENT)
    # Neighbouring taps read almost the same rows of x: keep them in L1, which asynchronous copies pass by otherwise.
    L1: tl.constexpr = ".ca" if ROW_TAPS > 1 else ""

    # The tiles of one row range are neighbours in launch order: they read the same rows of x and dy from L2.
    tiles_ci = tl.cdiv(Ci, BLOCK_N)
    pid_m = tl.program_id(0) // (TAPS // ROW_TAPS * tiles_ci)
    pid_n = tl.program_id(0) % (TAPS // ROW_TAPS * tiles_ci)
    pid_split = tl.program_id(1)
    tap = pid_n // tiles_ci * ROW_TAPS
    r = tap // S
    s = tap % S

    offs_co = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_ci = (pid_n % tiles_ci) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_co = offs_co < Co
    mask_ci = offs_ci < Ci

    row_start = pid_split * rows_per_split
    rows = tl.minimum(rows_per_split, M - row_start)

    # dy is loaded as [Co, rows], which is what the dot wants; the memory stays contiguous along Co.
    first = row_start.to(tl.int64)
    dy_base = dy_ptr + first * Co
    y_base = y_ptr + first * Co
    dy_offs = offs_co[:, None] + offs_k[None, :] * Co

    shift_h = r * dilation_h - padding_h
    shift_w = s * dilation_w - padding_w
    if SAME_GRID:
        x_base = x_ptr + (first + shift_h * W + shift_w) * Ci
        x_offs = offs_k[:, None] * Ci + offs_ci[None, :]
    if HAS_PADDING or not SAME_GRID:
        # (image, h, w) of every row, advanced by BLOCK_K rows a step without a division in the loop.
        m = row_start + offs_k
        w = m % Q * stride_w + shift_w
        h = m // Q % P * stride_h + shift_h
        image = m // (P * Q) * (H * W)
        step_w = BLOCK_K % Q * stride_w
        step_h = BLOCK_K // Q % P * stride_h
        step_image = BLOCK_K // (P * Q) * (H * W)
        span_w = Q * stride_w
        span_h = P * stride_h

    if HAS_AFFINE:
        scale = tl.load(affine_ptr + offs_ci, mask=mask_ci, other=0.0)[None, :]
        shift = tl.load(affine_ptr + Ci + offs_ci, mask=mask_ci, other=0.0)[None, :]
    if HAS_MEAN:
        mean = tl.load(mean_ptr + offs_ci, mask=mask_ci, other=0.0)[None, :]
    if HAS_COEFFS:
        coeff_a = tl.load(coeffs_ptr + offs_co, mask=mask_co, other=0.0)[:, None]
        if HAS_Y:
            coeff_b = tl.load(coeffs_ptr + Co + offs_co, mask=mask_co, other=0.0)[:, None]
            coeff_c = tl.load(coeffs_ptr + 2 * Co + offs_co, mask=mask_co, other=0.0)[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if ROW_TAPS == 3:
        acc_1 = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        acc_2 = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for step in range(tl.cdiv(rows, BLOCK_K)):
        mask_dy = mask_co[:, None]
        mask_x = mask_ci[None, :]
        if not EVEN_K:
            mask_k = offs_k < rows - step * BLOCK_K
            mask_dy = mask_dy & mask_k[None, :]
            mask_x = mask_x & mask_k[:, None]
        if SAME_GRID:
            x_ptrs = x_base + x_offs
        else:
            x_ptrs = x_ptr + (image + h * W + w).to(tl.int64)[:, None] * Ci + offs_ci[None, :]

        dy = tl.load(dy_base + dy_offs, mask=mask_dy, other=0.0)
        if HAS_COEFFS:
            value = coeff_a * widened(dy, ACC)
            if HAS_Y:
                y = tl.load(y_base + dy_offs, mask=mask_dy, other=0.0)
                value += coeff_b * widened(y, ACC) + coeff_c
                if not EVEN_K:
                    value = tl.where(mask_k[None, :], value, 0.0)  # a row past the end must not contribute C
            dy = value.to(dy_ptr.dtype.element_ty)
        for t in tl.static_range(ROW_TAPS):
            mask_t = mask_x
            if HAS_PADDING:
                w_t = w + t * dilation_w
                inside = ((h >= 0) & (h < H) & (w_t >= 0) & (w_t < W))[:, None]
                mask_t = mask_t & inside
            a = tl.load(x_ptrs + t * dilation_w * Ci, mask=mask_t, other=0.0, cache_modifier=L1)
            if HAS_AFFINE:
                normalised = relu(affine(a.to(ACC), scale, shift))
                if HAS_PADDING:
                    normalised = tl.where(inside, normalised, 0.0)  # a padded position is zero after the prologue
                a = normalised.to(x_ptr.dtype.element_ty)
            if HAS_MEAN:
                a -= mean
            if t == 0:
                acc = tl.dot(dy, a, acc, input_precision=INPUT_PRECISION, out_dtype=ACC)
            elif t == 1:
                acc_1 = tl.dot(dy, a, acc_1, input_precision=INPUT_PRECISION, out_dtype=ACC)
            else:
                acc_2 = tl.dot(dy, a, acc_2, input_precision=INPUT_PRECISION, out_dtype=ACC)

        dy_base += BLOCK_K * Co
        y_base += BLOCK_K * Co
        if SAME_GRID:
            x_base += BLOCK_K * Ci
        if HAS_PADDING or not SAME_GRID:
            w += step_w
            carry_w = w >= span_w + shift_w
            w -= tl.where(carry_w, span_w, 0)
            h += step_h + tl.where(carry_w, stride_h, 0)
            carry_h = h >= span_h + shift_h
            h -= tl.where(carry_h, span_h, 0)
            image += step_image + tl.where(carry_h, H * W, 0)

    columns = TAPS * Ci
    dw_row = (pid_split * Co + offs_co).to(tl.int64) * columns
    dw_ptrs = dw_ptr + dw_row[:, None] + (tap * Ci + offs_ci)[None, :]
    mask = mask_co[:, None] & mask_ci[None, :]
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=mask)
    if ROW_TAPS == 3:
        tl.store(dw_ptrs + Ci, acc_1.to(dw_ptr.dtype.element_ty), mask=mask)
        tl.store(dw_ptrs + 2 * Ci, acc_2.to(dw_ptr.dtype.element_ty), mask=mask)


@triton.jit
def conv_wgrad_reduce_kernel(
    partial_ptr,
    dw_ptr,
    split,
    elements,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """dw[i] = sum over the parts of partial [split, elements], in an order that BLOCK_S alone decides."""
    begin(DEPENDENT)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_s = tl.arange(0, BLOCK_S)
    mask_n = offs_n < elements
    ptrs = partial_ptr + offs_s.to(tl.int64)[:, None] * elements + offs_n[None, :]
    acc = tl.zeros((BLOCK_S, BLOCK_N), dtype=ACC)
    for start in range(0, split, BLOCK_S):
        mask_s = offs_s < split - start
        acc += tl.load(ptrs, mask=mask_s[:, None] & mask_n[None, :], other=0.0)
        ptrs += BLOCK_S * elements.to(tl.int64)
    LOADED: tl.constexpr = partial_ptr.dtype.element_ty
    tl.store(dw_ptr + offs_n, sum_rows(acc, LOADED).to(dw_ptr.dtype.element_ty), mask=mask_n)
