"""A whole bottleneck with frozen statistics in one launch: 1x1, 3x3, 1x1, shortcut and ReLU.

    a1  = relu(bn1(x W1))             on a tile of output pixels and the border that its 3x3 reads (its halo)
    a2  = relu(bn2(a1 * W2))          on the tile
    out = relu(bn3(a2 W3) + shortcut)

The shortcut is a tensor, or bn(x_s Wr) of the pixels x_s that the 3x3 is centred on. Each program works through tiles
of TILE_P x TILE_Q output pixels. A tile's a1, zero outside the image, goes through a scratch in global memory that is
the program's own and that its next tile overwrites: it stays in L2. a2 is the left operand of the last product and
never leaves the registers. The price is the halo: half as much again of x, from L2, and of its product.

What one thread writes to the scratch others read. Three explicit barriers order that: behind the scale and shift of
every BatchNorm, which a program works out first; between the writes of a1 and the shifted reads of the 3x3; between
those and the next tile's writes. Ordinary loads alone read the scratch: no barrier orders those by a descriptor.

Reads   x [N*H*W, Ci], residual [N*P*Q, Co], and of each layer (a tuple) weight, gamma, beta, mean, var, eps.
Writes  out [N*P*Q, Co], scratch [programs, halo pixels, BLOCK_C], affine [programs, channels of all layers, twice].
"""

import triton
import triton.language as tl

from .common import affine, begin, relu
from .implicit_gemm import load_rows


@triton.jit
def store_affine(affine_ptr, layer, channels, ACC: tl.constexpr):
    """The rows scale and shift [2, channels] of a BatchNorm. All at once: a step would take as long as memory does."""
    BLOCK: tl.constexpr = 256
    for c0 in range(0, channels, BLOCK):
        offs_c = c0 + tl.arange(0, BLOCK)
        mask_c = offs_c < channels
        mean = tl.load(layer.mean + offs_c, mask=mask_c, other=0.0).to(ACC)
        var = tl.load(layer.var + offs_c, mask=mask_c, other=1.0).to(ACC)
        scale = 1.0 / tl.sqrt(var + layer.eps)
        if layer.gamma is not None:
            scale *= tl.load(layer.gamma + offs_c, mask=mask_c, other=0.0).to(ACC)
        shift = -mean * scale
        if layer.beta is not None:
            shift += tl.load(layer.beta + offs_c, mask=mask_c, other=0.0).to(ACC)
        tl.store(affine_ptr + offs_c, scale, mask=mask_c)
        tl.store(affine_ptr + channels + offs_c, shift, mask=mask_c)


@triton.jit
def normalise(y, affine_ptr, channels, offs_n, mask_n):
    scale = tl.load(affine_ptr + offs_n, mask=mask_n, other=0.0)
    shift = tl.load(affine_ptr + channels + offs_n, mask=mask_n, other=0.0)
    return affine(y, scale[None, :], shift[None, :])


@triton.jit
def product(
    x_ptr,
    row,
    inside,
    w_ptr,
    offs_n,
    Ci,
    EVEN_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x[row, :] W^T for the output channels ``offs_n``; rows that are not ``inside`` are zero, and not read."""
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (row[:, None] * Ci + offs_k[None, :])
    w_ptrs = w_ptr + (offs_n[None, :] * Ci + offs_k[:, None])
    acc = tl.zeros((row.shape[0], offs_n.shape[0]), ACC)
    for k0 in range(0, Ci, BLOCK_K):
        mask_k = offs_k < Ci - k0
        a = load_rows(x_ptrs + k0, inside, mask_k, True, not EVEN_K)
        if EVEN_K:
            b = tl.load(w_ptrs + k0)
        else:
            b = tl.load(w_ptrs + k0, mask=mask_k[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def bottleneck_single_kernel(
    x_ptr,
    out_ptr,
    residual_ptr,
    scratch_ptr,
    affine_ptr,
    first,
    second,
    third,
    shortcut,
    H,
    W,
    P,
    Q,
    Ci,
    Co,
    tiles,
    tiles_p,
    tiles_q,
    C: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_PROJECTION: tl.constexpr,
    APPLY_RELU: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_HALO: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin(DEPENDENT)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    HALO_W: tl.constexpr = (TILE_Q - 1) * STRIDE_W + 3
    HALO: tl.constexpr = ((TILE_P - 1) * STRIDE_H + 3) * HALO_W
    pid = tl.program_id(0).to(tl.int64)
    scratch_ptr += pid * (HALO * BLOCK_C)
    first_ptr = affine_ptr + pid * (4 * C + (2 + 2 * HAS_PROJECTION) * Co)
    second_ptr = first_ptr + 2 * C
    third_ptr = second_ptr + 2 * C
    shortcut_ptr = third_ptr + 2 * Co
    store_affine(first_ptr, first, C, ACC)
    store_affine(second_ptr, second, C, ACC)
    store_affine(third_ptr, third, Co, ACC)
    if HAS_PROJECTION:
        store_affine(shortcut_ptr, shortcut, Co, ACC)
    tl.debug_barrier()

    # Channels past the width repeat the last one's weights, but are zero in a1 and a2.
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    column = tl.minimum(offs_c, C - 1)
    # The tile's pixels; what fills BLOCK_M up repeats the last row of pixels, and is not stored.
    offs_m = tl.arange(0, BLOCK_M)
    i = tl.minimum(offs_m // TILE_Q, TILE_P - 1)
    j = offs_m % TILE_Q
    offs_tap = (i * (STRIDE_H * HALO_W) + j * STRIDE_W)[:, None] * BLOCK_C + offs_c[None, :]
    offs_w2 = column[None, :] * (9 * C) + offs_c[:, None]

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        n = tile // (tiles_p * tiles_q)
        p0 = tile // tiles_q % tiles_p * TILE_P
        q0 = tile % tiles_q * TILE_Q
        # Pixels are counted from the tile's first, which alone needs 64 bits.
        tile_x_ptr = x_ptr + ((n * H + p0 * STRIDE_H) * W + q0 * STRIDE_W).to(tl.int64) * Ci
        first_out = ((n * P + p0) * Q + q0).to(tl.int64) * Co

        for start in range(0, HALO, BLOCK_HALO):
            offs_h = start + tl.arange(0, BLOCK_HALO)
            mask_h = offs_h < HALO
            h = offs_h // HALO_W - 1
            w = offs_h % HALO_W - 1
            inside = (h >= -p0 * STRIDE_H) & (h < H - p0 * STRIDE_H) & (w >= -q0 * STRIDE_W) & (w < W - q0 * STRIDE_W)
            inside &= mask_h
            a1 = product(tile_x_ptr, h * W + w, inside, first.weight, column, Ci, EVEN_K, ACC, PRECISION, BLOCK_K)
            a1 = relu(normalise(a1, first_ptr, C, offs_c, mask_c))
            a1 = tl.where(inside[:, None] & mask_c[None, :], a1, 0.0).to(DTYPE)
            tl.store(scratch_ptr + (offs_h[:, None] * BLOCK_C + offs_c[None, :]), a1, mask=mask_h[:, None])
        tl.debug_barrier()

        acc = tl.zeros((BLOCK_M, BLOCK_C), ACC)
        for tap in range(9):
            a = tl.load(scratch_ptr + (offs_tap + (tap // 3 * HALO_W + tap % 3) * BLOCK_C))
            if C == BLOCK_C:
                b = tl.load(second.weight + (offs_w2 + tap * C))
            else:
                b = tl.load(second.weight + (offs_w2 + tap * C), mask=mask_c[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
        tl.debug_barrier()
        a2 = relu(normalise(acc, second_ptr, C, offs_c, mask_c)).to(DTYPE)
        if C != BLOCK_C:
            a2 = tl.where(mask_c[None, :], a2, 0.0)

        mask_m = (offs_m < TILE_P * TILE_Q) & (i < P - p0) & (j < Q - q0)
        offs_out = (i * Q + j) * Co
        row_x = i * STRIDE_H * W + j * STRIDE_W
        for n0 in range(0, Co, BLOCK_N):
            offs_n = n0 + tl.arange(0, BLOCK_N)
            mask_n = offs_n < Co
            column_n = tl.minimum(offs_n, Co - 1)
            b = tl.load(third.weight + (column_n[None, :] * C + offs_c[:, None]), mask=mask_c[:, None], other=0.0)
            z = tl.dot(a2, b, input_precision=PRECISION, out_dtype=ACC)
            z = normalise(z, third_ptr, Co, offs_n, mask_n)
            offs_z = offs_out[:, None] + offs_n[None, :]
            mask = mask_m[:, None] & mask_n[None, :]
            if HAS_RESIDUAL:
                z += tl.load(residual_ptr + first_out + offs_z, mask=mask, other=0.0).to(ACC)
            if HAS_PROJECTION:
                r = product(tile_x_ptr, row_x, mask_m, shortcut.weight, column_n, Ci, EVEN_K, ACC, PRECISION, BLOCK_K)
                z += normalise(r, shortcut_ptr, Co, offs_n, mask_n)
            if APPLY_RELU:
                z = relu(z)
            tl.store(out_ptr + first_out + offs_z, z.to(DTYPE), mask=mask)
