"""Convolution, forward, as an implicit GEMM over NHWC memory.

    y[n, p, q, co] = epilogue( sum over r, s, ci of  prologue(x)[n, h, w, ci] * w[co, r, s, ci] )
                     with h = p*stride - padding + r*dilation, and w likewise

Row m = (n*P + p)*Q + q; the reduced index runs over blocks of Ci and, inside a block, over the R*S taps, which read
almost the same pixels and find them in the cache. Programs of one M tile and neighbouring N tiles are adjacent, so x
is read from memory once.

Reads   x [N*H*W, Ci], w [Co, R*S*Ci], residual [M, Co], input_affine [2, Ci], output_affine, residual_affine [2, Co];
        of a projection x [N*H*W, Ci], w [Co, Ci], affine [2, Co].
Writes  y [M, Co], tiles [2, T, Co]: mean and M2 of each M tile, of y as stored; the ReLU's mask, bits [M, Co / 8].
Prologue  relu(x*scale + shift), rounded to x's dtype; positions in the padding are zero after it.
Epilogue  y*scale + shift, + residual (or + residual*rscale + rshift), + projection, relu: each optional.
Projection  (x_s wᵀ)*scale + shift of a second, sampled input: a product of its own, because one accumulator for both
          would put their scales into the rounded weights.
"""

import triton
import triton.language as tl

from .bits import relu_bits
from .common import affine, begin, relu
from .implicit_gemm import as_stored, load_rows, sampled_rows, split_rows, tap_bits


@triton.jit
def sampled_product(
    x_ptr,
    w_ptr,
    offs_m,
    offs_n,
    M,
    H,
    W,
    P,
    Q,
    Ci,
    Co,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    EVEN_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of a 1x1 convolution of x [N*H*W, Ci], which may be strided."""
    offs_k = tl.arange(0, BLOCK_K)
    row = tl.minimum(offs_m, M - 1).to(tl.int64)
    if STRIDE_H > 1 or STRIDE_W > 1:
        n, p, q = split_rows(tl.minimum(offs_m, M - 1), P, Q)
        row = sampled_rows(n, p, q, H, W, STRIDE_H, STRIDE_W)
    x_ptrs = x_ptr + row[:, None] * Ci + offs_k[None, :]
    w_ptrs = w_ptr + tl.minimum(offs_n, Co - 1)[None, :] * Ci + offs_k[:, None]
    if TRANSPOSED:
        acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for k0 in range(0, Ci, BLOCK_K):
        mask_k = offs_k < Ci - k0
        a = load_rows(x_ptrs + k0, mask_k, mask_k, False, not EVEN_K)
        if EVEN_K:
            b = tl.load(w_ptrs + k0)
        else:
            b = tl.load(w_ptrs + k0, mask=mask_k[:, None], other=0.0)
        if TRANSPOSED:
            acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION, out_dtype=ACC)
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    if TRANSPOSED:
        acc = tl.trans(acc)
    return acc


@triton.jit
def conv_fprop_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    input_affine_ptr,
    output_affine_ptr,
    residual_ptr,
    residual_affine_ptr,
    projection_x_ptr,
    projection_w_ptr,
    projection_affine_ptr,
    tiles_ptr,
    bits_ptr,
    M,
    H,
    W,
    P,
    Q,
    Ci,
    Co,
    num_m,
    num_n,
    projection_H,
    projection_W,
    projection_Ci,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    HAS_INPUT_AFFINE: tl.constexpr,
    HAS_OUTPUT_AFFINE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_RESIDUAL_AFFINE: tl.constexpr,
    HAS_PROJECTION: tl.constexpr,
    PROJECTION_STRIDE_H: tl.constexpr,
    PROJECTION_STRIDE_W: tl.constexpr,
    PROJECTION_EVEN_K: tl.constexpr,
    APPLY_RELU: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_BITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    # Without padding a 1x1 tap always exists; with stride 1 as well, x is the left matrix as it lies.
    begin(DEPENDENT)
    POINTWISE: tl.constexpr = R == 1 and S == 1 and PADDING_H == 0 and PADDING_W == 0
    DENSE: tl.constexpr = POINTWISE and STRIDE_H == 1 and STRIDE_W == 1
    TAPS: tl.constexpr = R * S

    pid_m = tl.program_id(0) // num_n
    pid_n = tl.program_id(0) % num_n
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)

    # Rows and columns past the end repeat the last one: their loads need no mask, their results are not stored.
    row = tl.minimum(offs_m, M - 1)
    if not DENSE:
        n, p, q = split_rows(row, P, Q)
        h0 = p * STRIDE_H - PADDING_H
        w0 = q * STRIDE_W - PADDING_W
        row = (n * H + h0) * W + w0
    bits = row
    if not POINTWISE:
        bits = tap_bits(h0, w0, H, W, DILATION_H, DILATION_W, R, S)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * Ci + offs_k[None, :]
    w_ptrs = w_ptr + tl.minimum(offs_n, Co - 1)[None, :] * (TAPS * Ci) + offs_k[:, None]

    # Transposed, a column of the result lies in four threads, and its sums are cheap; but x is the right operand then,
    # which the tensor cores read from shared memory: a prologue must write it there. The left one stays in registers.
    if TRANSPOSED:
        acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for i in range(TAPS * tl.cdiv(Ci, BLOCK_K)):
        tap = i % TAPS
        k0 = i // TAPS * BLOCK_K
        x_tap = x_ptrs + ((tap // S * DILATION_H * W + tap % S * DILATION_W) * Ci + k0)
        w_tap = w_ptrs + (tap * Ci + k0)
        mask_k = offs_k < Ci - k0
        inside = ((bits >> tap) & 1) != 0
        a = load_rows(x_tap, inside, mask_k, not POINTWISE, not EVEN_K)
        if EVEN_K:
            b = tl.load(w_tap)
        else:
            b = tl.load(w_tap, mask=mask_k[:, None], other=0.0)
        if HAS_INPUT_AFFINE:
            scale = tl.load(input_affine_ptr + k0 + offs_k, mask=mask_k, other=0.0)
            shift = tl.load(input_affine_ptr + Ci + k0 + offs_k, mask=mask_k, other=0.0)
            a = relu(affine(a.to(ACC), scale[None, :], shift[None, :])).to(x_ptr.dtype.element_ty)
            if not POINTWISE:
                a = tl.where(inside[:, None], a, 0.0)
        if TRANSPOSED:
            acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION, out_dtype=ACC)
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)

    if TRANSPOSED:
        acc = tl.trans(acc)
    mask_m = offs_m < M
    mask_n = offs_n < Co
    mask = mask_m[:, None] & mask_n[None, :]
    offs_y = offs_m.to(tl.int64)[:, None] * Co + offs_n[None, :]
    if HAS_OUTPUT_AFFINE:
        scale = tl.load(output_affine_ptr + offs_n, mask=mask_n, other=0.0)
        shift = tl.load(output_affine_ptr + Co + offs_n, mask=mask_n, other=0.0)
        acc = affine(acc, scale[None, :], shift[None, :])
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offs_y, mask=mask, other=0.0).to(ACC)
        if HAS_RESIDUAL_AFFINE:
            scale = tl.load(residual_affine_ptr + offs_n, mask=mask_n, other=0.0)
            shift = tl.load(residual_affine_ptr + Co + offs_n, mask=mask_n, other=0.0)
            residual = affine(residual, scale[None, :], shift[None, :])
        acc += residual
    if HAS_PROJECTION:
        projected = sampled_product(
            projection_x_ptr,
            projection_w_ptr,
            offs_m,
            offs_n,
            M,
            projection_H,
            projection_W,
            P,
            Q,
            projection_Ci,
            Co,
            PROJECTION_STRIDE_H,
            PROJECTION_STRIDE_W,
            PROJECTION_EVEN_K,
            TRANSPOSED,
            ACC,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        scale = tl.load(projection_affine_ptr + offs_n, mask=mask_n, other=0.0)
        shift = tl.load(projection_affine_ptr + Co + offs_n, mask=mask_n, other=0.0)
        acc += affine(projected, scale[None, :], shift[None, :])
    if APPLY_RELU:
        acc = relu(acc)
    y = acc.to(y_ptr.dtype.element_ty)
    # Beside a residual, y lies as it is stored already.
    if (HAS_STATS and not TRANSPOSED) or (HAS_BITS and not HAS_RESIDUAL):
        y = as_stored(y_ptr + offs_y, y, M < 0)
    tl.store(y_ptr + offs_y, y, mask=mask)

    if HAS_BITS:
        # As stored, eight neighbouring channels lie in one thread: packing them is its own business.
        row_bytes = tl.cdiv(Co, 8)
        offs_b = pid_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        packed = relu_bits(y.to(ACC), mask_n[None, :])
        bits_ptr += (pid_m * BLOCK_M).to(tl.int64) * row_bytes
        offs_bits = tl.arange(0, BLOCK_M)[:, None] * row_bytes + offs_b[None, :]
        tl.store(bits_ptr + offs_bits, packed, mask=mask_m[:, None] & (offs_b < row_bytes)[None, :])
    if HAS_STATS:
        values = y.to(ACC)
        count = tl.minimum(M - pid_m * BLOCK_M, BLOCK_M)
        mean = tl.sum(tl.where(mask_m[:, None], values, 0.0), axis=0) / count
        centred = tl.where(mask_m[:, None], values - mean[None, :], 0.0)
        tile_ptrs = tiles_ptr + pid_m * Co + offs_n
        tl.store(tile_ptrs, mean, mask=mask_n)
        tl.store(tile_ptrs + num_m * Co, tl.sum(centred * centred, axis=0), mask=mask_n)
