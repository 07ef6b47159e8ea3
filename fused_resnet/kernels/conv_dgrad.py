"""Convolution, gradient of the input, as one implicit GEMM per parity class over NHWC memory.

    dx[n, h, w, ci] = sum over r, s, co of  prologue(dy)[n, p, q, co] * w[co, r, s, ci]
                      with p*stride = h + padding - r*dilation, and q likewise

Which taps a pixel meets depends on (h mod stride, w mod stride) = (ch, cw) alone, its class. With h = hc*stride +
ch, tap r counts if stride divides ch + padding - r*dilation. Those taps are r = first + j*STEP, STEP =
stride/gcd(stride, dilation), and they read p = hc + offset - j*dilation/gcd(stride, dilation): a convolution of
stride 1 over dy. The class ch = (kh - padding) mod stride has the taps with r*dilation = kh (mod stride). A class
without taps writes zero (and the residual). One launch does all classes.

Reads   dy, y [N*P*Q, Co], w [Co, R*S*Ci], coeffs [3, Co], mask_input [N*H*W, Ci], mask_stats [4, Ci], residual,
        residual_bits [N*H*W, ceil(Ci / 8)] (see bits.py).
Writes  dx [N*H*W, Ci], tiles [2, T, Ci]: of dx as stored, per M tile, sum dz and sum dz*(mask_input - mean).
Prologue  dy' = A*dy (+ B*y + C), rounded to dy's dtype; with y only where no padding is read.
Epilogue  + residual (where it has a pixel, and a bit if there are bits), or relu_grad(dx, mask_input*scale + shift) and
          the sums.
"""

import triton
import triton.language as tl

from .bits import unpack_bits
from .common import affine, begin, from_the_end, relu_grad, widened
from .implicit_gemm import as_stored, load_rows, split_rows, tap_bits


@triton.jit
def class_taps(
    k, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, STEP: tl.constexpr, R: tl.constexpr
):
    """Of the k-th class along one dimension: its first pixel, its first tap, how many taps, the first tap's offset."""
    c = (k + STRIDE - PADDING % STRIDE) % STRIDE
    first = k * 0 + R
    for r in tl.static_range(R):
        first = tl.where((k + (R - 1 - r) * DILATION * (STRIDE - 1)) % STRIDE == 0, R - 1 - r, first)
    return c, first, (R - first + STEP - 1) // STEP, (c + PADDING - first * DILATION) // STRIDE


@triton.jit
def epilogue_tile(
    mask_input_ptr,
    residual_ptr,
    residual_bits_ptr,
    offs_m,
    offs_n,
    pid_n,
    M,
    Hc,
    Wc,
    ch,
    cw,
    H,
    W,
    Ci,
    row_bytes,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    RESIDUAL_STRIDE_H: tl.constexpr,
    RESIDUAL_STRIDE_W: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_RESIDUAL_BITS: tl.constexpr,
):
    """Of a tile of dx: its offsets, its mask, and the tile of mask_input or of the residual (of neither: the mask)."""
    RESIDUAL_STRIDED: tl.constexpr = HAS_RESIDUAL and (RESIDUAL_STRIDE_H > 1 or RESIDUAL_STRIDE_W > 1)
    mask = (offs_m < M)[:, None] & (offs_n < Ci)[None, :]
    row = offs_m
    if STRIDE_H > 1 or STRIDE_W > 1 or RESIDUAL_STRIDED:
        n, hc, wc = split_rows(offs_m, Hc, Wc)
        h = hc * STRIDE_H + ch
        w = wc * STRIDE_W + cw
        row = (n * H + h) * W + w
    offs_dx = row.to(tl.int64)[:, None] * Ci + offs_n[None, :]
    other = mask
    if HAS_MASK:
        other = tl.load(mask_input_ptr + offs_dx, mask=mask, other=0.0)
    elif RESIDUAL_STRIDED:
        rows_h = (H + RESIDUAL_STRIDE_H - 1) // RESIDUAL_STRIDE_H
        rows_w = (W + RESIDUAL_STRIDE_W - 1) // RESIDUAL_STRIDE_W
        residual_row = (n * rows_h + h // RESIDUAL_STRIDE_H) * rows_w + w // RESIDUAL_STRIDE_W
        sampled = (h % RESIDUAL_STRIDE_H == 0) & (w % RESIDUAL_STRIDE_W == 0)
        offs_residual = residual_row.to(tl.int64)[:, None] * Ci + offs_n[None, :]
        other = tl.load(residual_ptr + offs_residual, mask=mask & sampled[:, None], other=0.0)
    elif HAS_RESIDUAL:
        other = tl.load(residual_ptr + offs_dx, mask=mask, other=0.0)
        if HAS_RESIDUAL_BITS:
            BYTES: tl.constexpr = offs_n.shape[0] // 8
            offs_b = pid_n * BYTES + tl.arange(0, BYTES)
            packed_ptrs = residual_bits_ptr + offs_m.to(tl.int64)[:, None] * row_bytes + offs_b[None, :]
            packed = tl.load(packed_ptrs, mask=(offs_m < M)[:, None] & (offs_b < row_bytes)[None, :], other=0)
            other = tl.where(unpack_bits(packed), other, 0.0).to(other.dtype)
    return offs_dx, mask, other


@triton.jit
def conv_dgrad_kernel(
    dy_ptr,
    y_ptr,
    w_ptr,
    dx_ptr,
    coeffs_ptr,
    mask_input_ptr,
    mask_stats_ptr,
    residual_ptr,
    residual_bits_ptr,
    tiles_ptr,
    N,
    H,
    W,
    P,
    Q,
    Ci,
    Co,
    row_bytes,
    num_m,
    num_n,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STEP_R: tl.constexpr,
    STEP_S: tl.constexpr,
    RESIDUAL_STRIDE_H: tl.constexpr,
    RESIDUAL_STRIDE_W: tl.constexpr,
    HAS_COEFFS: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_MASK_STATS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_RESIDUAL_BITS: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    # A 1x1 tap without padding exists for every pixel of its class; with stride 1, dy is the left matrix as it lies.
    begin(DEPENDENT)
    POINTWISE: tl.constexpr = R == 1 and S == 1 and PADDING_H == 0 and PADDING_W == 0
    UNSTRIDED: tl.constexpr = STRIDE_H == 1 and STRIDE_W == 1
    STEP_P: tl.constexpr = DILATION_H * STEP_R // STRIDE_H
    STEP_Q: tl.constexpr = DILATION_W * STEP_S // STRIDE_W

    # Of all programs, not of num_m tiles, which would stay in a register through the main loop: one program fewer.
    pid = from_the_end(tl.program_id(0), tl.num_programs(0))
    tile = pid // num_n
    pid_n = pid % num_n

    # Tiles of the same pixels of dy, one of each class, are neighbours: they find it in L2.
    kh = tile % (STRIDE_H * STRIDE_W) // STRIDE_W
    kw = tile % STRIDE_W
    pid_m = tile // (STRIDE_H * STRIDE_W)
    ch, first_r, taps_r, offset_p = class_taps(kh, STRIDE_H, PADDING_H, DILATION_H, STEP_R, R)
    cw, first_s, taps_s, offset_q = class_taps(kw, STRIDE_W, PADDING_W, DILATION_W, STEP_S, S)
    Hc = (H - ch + STRIDE_H - 1) // STRIDE_H
    Wc = (W - cw + STRIDE_W - 1) // STRIDE_W
    M = N * Hc * Wc
    if not UNSTRIDED:  # a class may have fewer tiles than another, and no pixel at all
        Hc = tl.maximum(Hc, 1)
        Wc = tl.maximum(Wc, 1)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < Ci

    # Rows past the end repeat the last one: their loads need no mask, their results are not stored.
    row = tl.minimum(offs_m, M - 1)
    if not (POINTWISE and UNSTRIDED):
        n, hc, wc = split_rows(row, Hc, Wc)
        p0 = hc + offset_p
        q0 = wc + offset_q
        row = (n * P + p0) * Q + q0
    bits = row
    if not POINTWISE:
        bits = tap_bits(p0, q0, P, Q, -STEP_P, -STEP_Q, R, S)
    offs_a = row.to(tl.int64)[:, None] * Co + offs_k[None, :]
    w_ptrs = w_ptr + offs_k[:, None] * (R * S * Ci) + offs_n[None, :]

    if PREFETCH:  # it arrives while the main loop runs
        offs_dx, mask, other = epilogue_tile(
            mask_input_ptr, residual_ptr, residual_bits_ptr, offs_m, offs_n, pid_n, M, Hc, Wc, ch, cw, H, W, Ci,
            row_bytes, STRIDE_H, STRIDE_W, RESIDUAL_STRIDE_H, RESIDUAL_STRIDE_W, HAS_MASK, HAS_RESIDUAL,
            HAS_RESIDUAL_BITS,
        )  # fmt: skip
    iterations = taps_r * taps_s * tl.cdiv(Co, BLOCK_K)
    if not UNSTRIDED:
        iterations = tl.where(pid_m * BLOCK_M < M, iterations, 0)
    taps_s = tl.maximum(taps_s, 1)  # a class without taps runs no iteration, and must not divide by zero either
    taps = tl.maximum(taps_r, 1) * taps_s
    if TRANSPOSED:  # what for: as in conv_fprop
        acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for i in range(iterations):
        tap = i % taps
        k0 = i // taps * BLOCK_K
        j_r = tap // taps_s
        j_s = tap % taps_s
        offs_tap = k0 - (j_r * STEP_P * Q + j_s * STEP_Q) * Co
        mask_k = offs_k < Co - k0
        inside = ((bits >> (j_r * S + j_s)) & 1) != 0
        a = load_rows(dy_ptr + offs_a + offs_tap, inside, mask_k, not POINTWISE, not EVEN_K)
        w_tap = w_ptrs + (((first_r + j_r * STEP_R) * S + first_s + j_s * STEP_S) * Ci + k0.to(tl.int64) * (R * S * Ci))
        if EVEN_K and EVEN_N:
            b = tl.load(w_tap)
        elif EVEN_K:
            b = tl.load(w_tap, mask=mask_n[None, :], other=0.0)
        else:
            b = tl.load(w_tap, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        if HAS_COEFFS:
            scale = tl.load(coeffs_ptr + k0 + offs_k, mask=mask_k, other=0.0)
            scaled = a.to(ACC) * scale[None, :]
            if HAS_Y:
                y_scale = tl.load(coeffs_ptr + Co + k0 + offs_k, mask=mask_k, other=0.0)
                shift = tl.load(coeffs_ptr + 2 * Co + k0 + offs_k, mask=mask_k, other=0.0)
                y = load_rows(y_ptr + offs_a + offs_tap, inside, mask_k, not POINTWISE, not EVEN_K)
                # Of dy, the same would cost some tiles the registers of a program.
                scaled += affine(widened(y, ACC), y_scale[None, :], shift[None, :])
            a = scaled.to(dy_ptr.dtype.element_ty)
        if TRANSPOSED:
            acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION, out_dtype=ACC)
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)

    if TRANSPOSED:
        acc = tl.trans(acc)
    if not PREFETCH:
        offs_dx, mask, other = epilogue_tile(
            mask_input_ptr, residual_ptr, residual_bits_ptr, offs_m, offs_n, pid_n, M, Hc, Wc, ch, cw, H, W, Ci,
            row_bytes, STRIDE_H, STRIDE_W, RESIDUAL_STRIDE_H, RESIDUAL_STRIDE_W, HAS_MASK, HAS_RESIDUAL,
            HAS_RESIDUAL_BITS,
        )  # fmt: skip
    if HAS_RESIDUAL:
        acc += other.to(ACC)
    if HAS_MASK:
        if not TRANSPOSED:  # rounded before the mask selects: the same values
            acc = as_stored(dx_ptr + offs_dx, acc.to(dx_ptr.dtype.element_ty), N < 0).to(ACC)
        x = other.to(ACC)
        if HAS_MASK_STATS:
            scale = tl.load(mask_stats_ptr + 2 * Ci + offs_n, mask=mask_n, other=0.0)
            shift = tl.load(mask_stats_ptr + 3 * Ci + offs_n, mask=mask_n, other=0.0)
            acc = relu_grad(acc, affine(x, scale[None, :], shift[None, :]))
        else:
            acc = relu_grad(acc, x)
    dx = acc.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + offs_dx, dx, mask=mask)

    if HAS_MASK:
        dz = tl.where((offs_m < M)[:, None], dx.to(ACC), 0.0)
        tile_ptrs = tiles_ptr + tile * Ci + offs_n
        tl.store(tile_ptrs, tl.sum(dz, axis=0), mask=mask_n)
        if HAS_MASK_STATS:
            mean = tl.load(mask_stats_ptr + offs_n, mask=mask_n, other=0.0)
            product = dz * (x - mean[None, :])
            tl.store(tile_ptrs + num_m * Ci, tl.sum(product, axis=0), mask=mask_n)
        else:
            tl.store(tile_ptrs + num_m * Ci, tl.zeros((BLOCK_N,), ACC), mask=mask_n)
