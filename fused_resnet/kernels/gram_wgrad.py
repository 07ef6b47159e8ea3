"""Gradient of a 1x1 convolution's weight up to its BatchNorm, from the gradient above the last ReLU.

    T = dzᵀ·a [q, p],   sum dz [q],   dz = dout where the ReLU let it through, else 0
                                      a = relu(y*scale + shift), rounded

Both operands are formed on load. One program owns a (q, p) tile over one contiguous range of rows; the partials of the
ranges are summed in a fixed order by ``conv_wgrad_reduce_kernel``.

Reads   dout [M, q], bits [M, ceil(q / 8)] (the ReLU's mask, see bits.py), y [M, p], affine [2, p].
Writes  partial [split, q*p + q]: T, then sum dz; dz [M, q] on request, by the programs of the first tile of p.
"""

import triton
import triton.language as tl

from .bits import unpack_bits
from .common import affine, begin, relu


@triton.jit
def gram_wgrad_kernel(
    dout_ptr,
    bits_ptr,
    y_ptr,
    affine_ptr,
    mean_ptr,
    dz_ptr,
    partial_ptr,
    M,
    P,
    Q,
    row_bytes,
    num_n,
    rows_per_split,
    HAS_MEAN: tl.constexpr,
    STORE_DZ: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_P: tl.constexpr,
    EVEN_Q: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    # The tiles of one row range are neighbours in launch order: they read the same rows from L2.
    begin(DEPENDENT)
    pid_q = tl.program_id(0) // num_n
    pid_p = tl.program_id(0) % num_n
    pid_split = tl.program_id(1)
    offs_q = pid_q * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_p = pid_p * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_q = offs_q < Q
    mask_p = offs_p < P
    offs_b = pid_q * (BLOCK_M // 8) + tl.arange(0, BLOCK_M // 8)

    row_start = pid_split * rows_per_split
    rows = tl.minimum(rows_per_split, M - row_start)
    first = row_start.to(tl.int64)
    dout_base = dout_ptr + first * Q
    y_base = y_ptr + first * P
    dz_base = dz_ptr
    if STORE_DZ:
        dz_base += first * Q
    bits_base = bits_ptr + first * row_bytes
    dout_offs = offs_k[:, None] * Q + offs_q[None, :]
    bits_offs = offs_k[:, None] * row_bytes + offs_b[None, :]
    y_offs = offs_k[:, None] * P + offs_p[None, :]
    scale = tl.load(affine_ptr + offs_p, mask=mask_p, other=0.0)[None, :]
    shift = tl.load(affine_ptr + P + offs_p, mask=mask_p, other=0.0)[None, :]
    if HAS_MEAN:
        mean = tl.load(mean_ptr + offs_p, mask=mask_p, other=0.0)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    sums = tl.zeros((BLOCK_K, BLOCK_M), ACC)  # reduced once, after the loop
    for step in range(tl.cdiv(rows, BLOCK_K)):
        inside = offs_k[:, None] < rows - step * BLOCK_K
        if EVEN_M and EVEN_Q:
            dout = tl.load(dout_base + dout_offs)
            packed = tl.load(bits_base + bits_offs)
        else:
            dout = tl.load(dout_base + dout_offs, mask=inside & mask_q[None, :], other=0.0)
            packed = tl.load(bits_base + bits_offs, mask=inside & (offs_b < row_bytes)[None, :], other=0)
        dz = tl.where(unpack_bits(packed), dout, 0.0).to(dout.dtype)
        if EVEN_M and EVEN_P:
            y = tl.load(y_base + y_offs)
        else:
            y = tl.load(y_base + y_offs, mask=inside & mask_p[None, :], other=0.0)
        a = relu(affine(y.to(ACC), scale, shift)).to(y.dtype)
        if HAS_MEAN:
            a -= mean
        sums += dz.to(ACC)
        acc = tl.dot(tl.trans(dz), a, acc, input_precision=PRECISION, out_dtype=ACC)
        if STORE_DZ:
            tl.store(dz_base + dout_offs, dz, mask=inside & mask_q[None, :] & (pid_p == 0))
            dz_base += BLOCK_K * Q
        dout_base += BLOCK_K * Q
        bits_base += BLOCK_K * row_bytes
        y_base += BLOCK_K * P

    partial_base = partial_ptr + pid_split.to(tl.int64) * (Q * P + Q)
    tl.store(partial_base + offs_q[:, None] * P + offs_p[None, :], acc, mask=mask_q[:, None] & mask_p[None, :])
    tl.store(partial_base + Q * P + offs_q, tl.sum(sums, axis=0), mask=mask_q & (pid_p == 0))
