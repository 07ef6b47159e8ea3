"""Both gradients of a 1x1 convolution of stride 1, in one walk over its pixels.

    dy[m, co] = A[co]*dz[m, co] + B[co]*y[m, co] + C[co]          formed on load, rounded to dz's dtype
    dx[m, ci] = sum over co of dy[m, co] * w[co, ci]  (+ residual[m, ci])
    dW[co, ci] = sum over m of dy[m, co] * x[m, ci]

Two kernels would both read dz and y. Here one program owns a contiguous range of pixels and a block of Ci: it reads its
columns of w once, and steps down the pixels with all of Co at a time, which bounds Co by a tile. The ranges are fixed
by the configuration; their float32 partials of dW are summed in a fixed order by ``conv_wgrad_reduce_kernel``.

Reads   dz, y [M, Co], x [M, Ci], w [Co, Ci], coeffs [3, Co], residual and residual_bits as conv_dgrad.py has them.
Writes  dx [M, Ci], dw [split, Co, Ci].
"""

import triton
import triton.language as tl

from .common import affine, begin, widened
from .conv_dgrad import epilogue_tile
from .implicit_gemm import load_rows


@triton.jit
def conv_pair_kernel(
    dz_ptr,
    y_ptr,
    x_ptr,
    w_ptr,
    coeffs_ptr,
    residual_ptr,
    residual_bits_ptr,
    dx_ptr,
    dw_ptr,
    M,
    H,
    W,
    Ci,
    Co,
    row_bytes,
    num_n,
    rows_per_split,
    RESIDUAL_STRIDE_H: tl.constexpr,
    RESIDUAL_STRIDE_W: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_RESIDUAL_BITS: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin(DEPENDENT)
    # The blocks of Ci of one range are neighbours in launch order: they read the same rows of dz and y from L2.
    pid_n = tl.program_id(0) % num_n
    split = tl.program_id(0) // num_n
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < Ci
    mask_k = offs_k < Co
    offs_w = offs_k[:, None] * Ci + offs_n[None, :]
    mask_w = mask_k[:, None] & mask_n[None, :]
    w = tl.load(w_ptr + offs_w, mask=mask_w, other=0.0)
    scale = tl.load(coeffs_ptr + offs_k, mask=mask_k, other=0.0)[None, :]
    y_scale = tl.load(coeffs_ptr + Co + offs_k, mask=mask_k, other=0.0)[None, :]
    shift = tl.load(coeffs_ptr + 2 * Co + offs_k, mask=mask_k, other=0.0)[None, :]

    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    # dy is the right operand of both products, and lies in shared memory for both. As a left one it would be formed in
    # registers once for each, from loads that are not pipelined.
    acc = tl.zeros((BLOCK_N, BLOCK_K), ACC)
    for start in tl.range(first, last, BLOCK_M, num_stages=STAGES):  # said here, so that the residual's load is, too
        offs_m = start + tl.arange(0, BLOCK_M)
        inside = offs_m < last
        row = offs_m.to(tl.int64)[:, None]
        dz = load_rows(dz_ptr + row * Co + offs_k[None, :], inside, mask_k, not EVEN_M, not EVEN_K)
        y = load_rows(y_ptr + row * Co + offs_k[None, :], inside, mask_k, not EVEN_M, not EVEN_K)
        x = load_rows(x_ptr + row * Ci + offs_n[None, :], inside, mask_n, not EVEN_M, not EVEN_N)
        dy = scale * widened(dz, ACC) + affine(widened(y, ACC), y_scale, shift)
        dy = dy.to(dz.dtype)  # C past the end, where x is zero and dx is not stored
        acc = tl.dot(tl.trans(x), dy, acc, input_precision=PRECISION, out_dtype=ACC)
        dx = tl.trans(tl.dot(tl.trans(w), tl.trans(dy), input_precision=PRECISION, out_dtype=ACC))
        offs_dx, mask, other = epilogue_tile(
            None, residual_ptr, residual_bits_ptr, offs_m, offs_n, pid_n, M, H, W, 0, 0, H, W, Ci, row_bytes, 1, 1,
            RESIDUAL_STRIDE_H, RESIDUAL_STRIDE_W, False, HAS_RESIDUAL, HAS_RESIDUAL_BITS,
        )  # fmt: skip
        if HAS_RESIDUAL:
            dx += other.to(ACC)
        tl.store(dx_ptr + offs_dx, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    dw_ptrs = dw_ptr + split.to(tl.int64) * Co * Ci + offs_w
    tl.store(dw_ptrs, tl.trans(acc).to(dw_ptr.dtype.element_ty), mask=mask_w)
