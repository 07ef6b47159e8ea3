"""Gradient of the input of a 1x1 convolution with BatchNorm, from the Gram matrix: one GEMM over [dz | a].

    da = dz·AW + a·P + bias,   AW = A∘W [q, p],   P = Wᵀ(S∘A∘W) [p, p],   a = relu(y*scale + shift), rounded

is what dgrad makes of dy = A*dz + B*y3 + C, without y3 = a·Wᵀ. P comes in one term, or in two that add up, and so does
AW, of which ``aw_terms`` count: the device decides (gram_bn_grad.py), and most often the second is not read. The ReLU
that made a then masks da. A projection reads the block's input as it is: then a = y, of which it may sample every
stride-th pixel, and da is the result.

Reads   dz [M, q], or dout [M, q] and bits [M, ceil(q / 8)] (see bits.py): dz is dout where they are set, else zero;
        y [M, p] (raw, before its BatchNorm), AW [terms, q, p], aw_terms [1], P [terms, p, p], bias [p], stats [4, p] of
        y, scales [2]; or, in place of the bias, what it stands for: sum dz [q] and the mean of a [p], subtracted from
        wide data on load, and a P is summed in float64 then (but for tf32, which has no such digits).
Writes  dx [M, p] = relu_grad(da, y*scale + shift), tiles [2, T, p]: of dx as stored, per M tile, sum dx and
        sum dx*(y - mean). Of a projection dx = da [M, p] alone.
``scales``: AW and P come multiplied by scales[0] and scales[1], powers of two, so that float16 holds them.
"""

import triton
import triton.language as tl

from .bits import unpack_bits
from .common import affine, begin, from_the_end, relu, relu_grad
from .implicit_gemm import sampled_rows, split_rows
from .tiling import fold, sum_rows


@triton.jit
def load_matrix(ptrs, mask_k, mask_n, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr):
    """A [BLOCK_K, BLOCK_N] tile, zero outside the masks that are needed."""
    if EVEN_K and EVEN_N:
        return tl.load(ptrs)
    elif EVEN_K:
        return tl.load(ptrs, mask=mask_n[None, :], other=0.0)
    else:
        return tl.load(ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)


@triton.jit
def store_rows(acc, dx_ptr, first, M, P, offs_n, mask_n, ROWS: tl.constexpr):
    """Stores ``acc`` [BLOCK_N, ROWS], the rows from ``first`` on."""
    mask = ((first + tl.arange(0, ROWS)) < M)[:, None] & mask_n[None, :]
    offs = tl.arange(0, ROWS)[:, None] * P + offs_n[None, :]
    tl.store(dx_ptr + first.to(tl.int64) * P + offs, tl.trans(acc.to(dx_ptr.dtype.element_ty)), mask=mask)


@triton.jit
def masked_rows(
    acc,
    y_ptr,
    dx_ptr,
    first,
    M,
    P,
    offs_n,
    mask_n,
    stats_ptr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Stores relu_grad of ``acc`` [BLOCK_N, ROWS], the rows from ``first`` on. Returns its sums, with y - mean too."""
    offs_m = first + tl.arange(0, ROWS)
    mask_m = offs_m < M
    mask = mask_m[:, None] & mask_n[None, :]
    # Rounded before it changes layout: half the registers and shared memory, and the selection loses nothing.
    da = tl.trans(acc.to(dx_ptr.dtype.element_ty)).to(ACC)
    start = first.to(tl.int64) * P
    offs = tl.arange(0, ROWS)[:, None] * P + offs_n[None, :]
    x = tl.load(y_ptr + start + offs, mask=mask, other=0.0).to(ACC)
    mean = tl.load(stats_ptr + offs_n, mask=mask_n, other=0.0)
    scale = tl.load(stats_ptr + 2 * P + offs_n, mask=mask_n, other=0.0)
    shift = tl.load(stats_ptr + 3 * P + offs_n, mask=mask_n, other=0.0)
    dx = relu_grad(da, affine(x, scale[None, :], shift[None, :]))
    tl.store(dx_ptr + start + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    stored = tl.where(mask_m[:, None], dx, 0.0)
    LOADED: tl.constexpr = y_ptr.dtype.element_ty
    # The rows that one thread holds are added first.
    FOLDS: tl.constexpr = max(1, min(ROWS, ROWS * mean.shape[0] * LOADED.primitive_bitwidth // (32 * WARPS * 128)))
    products = stored * (x - mean[None, :])
    return sum_rows(fold(stored, FOLDS), LOADED), sum_rows(fold(products, FOLDS), LOADED)


@triton.jit
def gram_dgrad_kernel(
    dz_ptr,
    bits_ptr,
    y_ptr,
    aw_ptr,
    aw_terms_ptr,
    p_ptr,
    bias_ptr,
    stats_ptr,
    scales_ptr,
    sum_dz_ptr,
    mean_ptr,
    dx_ptr,
    tiles_ptr,
    M,
    P,
    Q,
    H,
    W,
    I,
    J,
    row_bytes,
    num_m,
    num_n,
    HAS_BITS: tl.constexpr,
    HAS_RELU: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_AW_TERMS: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    TERMS: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_P: tl.constexpr,
    EVEN_N: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """``HAS_RELU``: a = relu(y*scale + shift), else a = y. ``WHOLE``: one N tile holds all of p, and a is one block."""
    begin(DEPENDENT)
    SAMPLES: tl.constexpr = STRIDE_H > 1 or STRIDE_W > 1
    pid_m = from_the_end(tl.program_id(0) // num_n, num_m)
    pid_n = tl.program_id(0) % num_n
    first = pid_m * BLOCK_M
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < P
    # Rows past the end repeat the last one: their loads need no mask, their results are not stored.
    row = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first)
    dz_base = dz_ptr + first.to(tl.int64) * Q
    if SAMPLES:
        n, i, j = split_rows(first + row, I, J)
        y_base = y_ptr
        y_rows = sampled_rows(n, i, j, H, W, STRIDE_H, STRIDE_W)[:, None] * P
    else:
        y_base = y_ptr + first.to(tl.int64) * P
        y_rows = row[:, None] * P

    dz_offs = row[:, None] * Q + offs_k[None, :]
    if HAS_BITS:
        offs_b = tl.arange(0, BLOCK_K // 8)
        bits_base = bits_ptr + first.to(tl.int64) * row_bytes
        bits_offs = row[:, None] * row_bytes + offs_b[None, :]
    aw_ptrs = aw_ptr + offs_k[:, None] * P + offs_n[None, :]
    # Transposed: y*scale + shift then goes to shared memory straight from the layout it was loaded in, and the bias and
    # the rounding are few registers' work.
    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    # Both terms of AW stand below each other, and dz comes round for the second; a scalar says if it has to.
    padded = Q if EVEN_Q else tl.cdiv(Q, BLOCK_K) * BLOCK_K
    reach = padded
    if HAS_AW_TERMS:
        reach *= tl.load(aw_terms_ptr)
    for start in range(0, reach, BLOCK_K):
        k0, row_aw = start, start
        if HAS_AW_TERMS:
            # The hint, without which bits are loaded by twos: 2 q is no multiple of BLOCK_K that the compiler knows.
            k0 = tl.multiple_of(tl.where(start < padded, start, start - padded), BLOCK_K)
            if not EVEN_Q:
                row_aw = tl.where(start < padded, k0, k0 + Q)
        mask_k = offs_k < Q - k0
        if EVEN_Q:
            dz = tl.load(dz_base + k0 + dz_offs)
        else:
            dz = tl.load(dz_base + k0 + dz_offs, mask=mask_k[None, :], other=0.0)
        if HAS_BITS:
            if EVEN_Q:
                packed = tl.load(bits_base + k0 // 8 + bits_offs)
            else:
                inside = k0 // 8 + offs_b < row_bytes
                packed = tl.load(bits_base + k0 // 8 + bits_offs, mask=inside[None, :], other=0)
            dz = tl.where(unpack_bits(packed), dz, 0.0).to(dz.dtype)
        if HAS_MEANS:
            dz -= (tl.load(sum_dz_ptr + k0 + offs_k, mask=mask_k, other=0.0) / M)[None, :]
        aw = load_matrix(aw_ptrs + row_aw * P, mask_k, mask_n, EVEN_Q, EVEN_N)
        acc = tl.dot(tl.trans(aw), tl.trans(dz), acc, input_precision=PRECISION, out_dtype=ACC)

    if HAS_SCALES:
        scale_p = tl.load(scales_ptr + 1)
        acc *= scale_p / tl.load(scales_ptr)
    # Where channels of a share most of what they are, a P all but cancels, and what float32 sums leave there has a part
    # along what they share, unlike eager's errors, which W bounds: a convolution below whose filters are alike sees it.
    WIDER: tl.constexpr = HAS_MEANS and PRECISION == "ieee"
    OPERAND: tl.constexpr = tl.float64 if WIDER else y_ptr.dtype.element_ty
    SUMS: tl.constexpr = tl.float64 if WIDER else ACC
    acc = acc.to(SUMS)
    if WHOLE:
        y_offs = y_rows + offs_n[None, :]
        if EVEN_N:
            y = tl.load(y_base + y_offs)
        else:
            y = tl.load(y_base + y_offs, mask=mask_n[None, :], other=0.0)
        a = y
        if HAS_RELU:
            scale = tl.load(stats_ptr + 2 * P + offs_n, mask=mask_n, other=0.0)
            shift = tl.load(stats_ptr + 3 * P + offs_n, mask=mask_n, other=0.0)
            a = relu(affine(y.to(ACC), scale[None, :], shift[None, :])).to(y.dtype)
        if HAS_MEANS:
            a = (a - tl.load(mean_ptr + offs_n, mask=mask_n, other=0.0)[None, :]).to(OPERAND)
        b = load_matrix(p_ptr + offs_n[:, None] * P + offs_n[None, :], mask_n, mask_n, EVEN_N, EVEN_N).to(OPERAND)
        acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION, out_dtype=SUMS)
        if TERMS == 2:
            b = load_matrix(p_ptr + (P + offs_n)[:, None] * P + offs_n[None, :], mask_n, mask_n, EVEN_N, EVEN_N)
            acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION, out_dtype=SUMS)
    else:
        y_offs = y_rows + offs_k[None, :]
        p_ptrs = p_ptr + offs_k[:, None] * P + offs_n[None, :]
        # Two terms fill half as many buffers: as much shared memory as the loop before, and as many programs beside.
        STAGES: tl.constexpr = 2 if TERMS == 2 else None
        for k0 in tl.range(0, P, BLOCK_K, num_stages=STAGES):
            mask_k = offs_k < P - k0
            if EVEN_P:
                y = tl.load(y_base + k0 + y_offs)
            else:
                y = tl.load(y_base + k0 + y_offs, mask=mask_k[None, :], other=0.0)
            b = load_matrix(p_ptrs + k0 * P, mask_k, mask_n, EVEN_P, EVEN_N).to(OPERAND)
            a = y
            if HAS_RELU:
                scale_k = tl.load(stats_ptr + 2 * P + k0 + offs_k, mask=mask_k, other=0.0)
                shift_k = tl.load(stats_ptr + 3 * P + k0 + offs_k, mask=mask_k, other=0.0)
                a = relu(affine(y.to(ACC), scale_k[None, :], shift_k[None, :])).to(y.dtype)
            if HAS_MEANS:
                a = (a - tl.load(mean_ptr + k0 + offs_k, mask=mask_k, other=0.0)[None, :]).to(OPERAND)
            acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION, out_dtype=SUMS)
            if TERMS == 2:
                b = load_matrix(p_ptrs + (P + k0) * P, mask_k, mask_n, EVEN_P, EVEN_N)
                acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION, out_dtype=SUMS)

    acc = acc.to(ACC)
    if HAS_SCALES:
        acc *= 1.0 / scale_p
    if not HAS_MEANS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    # Half of the rows after the other: the accumulator keeps rows in registers, so a half costs half of them.
    HALF: tl.constexpr = BLOCK_M // 2
    upper, lower = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, HALF)), (0, 2, 1)))
    if HAS_RELU:
        sums, products = masked_rows(upper, y_ptr, dx_ptr, first, M, P, offs_n, mask_n, stats_ptr, HALF, WARPS, ACC)
        more, more_products = masked_rows(
            lower, y_ptr, dx_ptr, first + HALF, M, P, offs_n, mask_n, stats_ptr, HALF, WARPS, ACC
        )
        tile_ptrs = tiles_ptr + pid_m * P + offs_n
        tl.store(tile_ptrs, sums + more, mask=mask_n)
        tl.store(tile_ptrs + num_m * P, products + more_products, mask=mask_n)
    else:
        store_rows(upper, dx_ptr, first, M, P, offs_n, mask_n, HALF)
        store_rows(lower, dx_ptr, first + HALF, M, P, offs_n, mask_n, HALF)
