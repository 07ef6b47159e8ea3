"""The Gram matrix of a 1x1 convolution's input: G = aᵀa [p, p] and c = Σ rows of a [p], in one read of the input.

a [M, p] = relu(x * scale + shift), formed on load and rounded to x's dtype; c sums the same rounded values that the
products see. Batch statistics of y = a Wᵀ follow from G and c before y exists (gram_bn.py). Without the prologue a is
x itself, or the pixels of it that a strided filter samples: row m = (n*I + i)*J + j is pixel (n, i*stride, j*stride).

With a pivot, a row of p values of x near the mean, k = relu(pivot * scale + shift) is subtracted from every row of a:
G and c are those of a - k, and gram_bn.py, which centres them, cancels nothing of the mean's size. float16 wants it
where tensor cores cut off their sums; bfloat16 has no such digits to lose.

    gram_kernel           x [M, p] (of [N, H, W, p]) -> partials [split, upper tiles of G, then c]; on request a [M, p]
    gram_reduce_kernel    their sum, in a fixed order, mirrored
"""

import triton
import triton.language as tl

from .common import affine, begin, relu, widened
from .implicit_gemm import next_rows, sampled_rows, split_rows


@triton.jit
def tile_pair(tile, TILES: tl.constexpr):
    """(row, column) of the upper triangle's tile of that number, column by column."""
    column = tile * 0
    for k in tl.static_range(1, TILES):
        column += (tile >= k * (k + 1) // 2).to(tl.int32)
    return tile - column * (column + 1) // 2, column


@triton.jit
def load_normalised(ptrs, mask_k, mask_n, scale, shift, EVEN_K: tl.constexpr):
    """relu(x * scale + shift), rounded to x's dtype; zero outside the masks. ``scale`` None: x itself."""
    mask = mask_n[None, :]
    if not EVEN_K:
        mask = mask & mask_k[:, None]
    x = tl.load(ptrs, mask=mask, other=0.0)
    if scale is not None:
        a = relu(affine(x.to(scale.dtype), scale[None, :], shift[None, :]))
        if not EVEN_K:
            a = tl.where(mask_k[:, None], a, 0.0)  # a row past the end must not contribute relu(shift)
        x = a.to(x.dtype)
    return x


@triton.jit
def pivot_row(
    pivot_ptr,
    affine_ptr,
    offs,
    mask,
    C,
    pivot_stride,
    HAS_AFFINE: tl.constexpr,
    SEEN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """What is subtracted from each row of a, in its dtype: relu(mean * scale + shift), or the pivot's first row itself.

    From 16-bit data only where the difference is exact, elsewhere it would be rounded: where that is more than 8 std,
    or where all SEEN rows of the pivot are within a factor of two. Their minimum and maximum, unlike a sum, are the
    same in every program, however it holds them.
    """
    pivot = tl.load(pivot_ptr + offs, mask=mask, other=0.0)
    if HAS_AFFINE:
        scale = tl.load(affine_ptr + offs, mask=mask, other=0.0)
        shift = tl.load(affine_ptr + C + offs, mask=mask, other=0.0)
        pivot = relu(affine(pivot, scale, shift))
        if DTYPE.primitive_bitwidth == 16:
            rstd = tl.load(pivot_ptr + C + offs, mask=mask, other=0.0)
            pivot = tl.where(pivot * rstd > 8 * tl.abs(scale), pivot, 0.0)
    elif DTYPE.primitive_bitwidth == 16:
        rows = tl.arange(0, SEEN).to(tl.int64) * pivot_stride
        seen = tl.load(pivot_ptr + rows[:, None] + offs[None, :], mask=mask[None, :], other=0.0).to(tl.float32)
        least, most, first = tl.min(seen, axis=0), tl.max(seen, axis=0), pivot.to(tl.float32)
        above = (first > 0) & (2 * least >= first) & (most <= 2 * first)
        below = (first < 0) & (2 * most <= first) & (least >= 2 * first)
        pivot = tl.where(above | below, pivot, 0.0)
    return pivot.to(DTYPE)


@triton.jit
def gram_kernel(
    x_ptr,
    affine_ptr,
    pivot_ptr,
    partial_ptr,
    a_ptr,
    pivot_stride,
    M,
    C,
    H,
    W,
    I,
    J,
    rows_per_split,
    elements,
    TILES: tl.constexpr,
    FLUSH: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    HAS_PIVOT: tl.constexpr,
    SEEN: tl.constexpr,
    STORE_A: tl.constexpr,
    EVEN_K: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """One tile of the upper triangle over one range of rows; partials are [split, tiles of G, then c].

    ``FLUSH``: after so many steps the accumulator is added to a second one. Tensor cores may truncate the sums that
    they keep, an error that grows with the run. ``LANES``: rows of a step that different threads hold.
    """
    begin(DEPENDENT)
    row_tile, column_tile = tile_pair(tl.program_id(0), TILES)
    part = tl.program_id(1)
    SAMPLES: tl.constexpr = STRIDE_H > 1 or STRIDE_W > 1
    row_start = part * rows_per_split
    rows = tl.minimum(rows_per_split, M - row_start)

    offs_k = tl.arange(0, BLOCK_K)
    offs_i = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_j = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_i = offs_i < C
    mask_j = offs_j < C
    base = x_ptr + row_start.to(tl.int64) * C
    if SAMPLES:
        n, i, j = split_rows(row_start + offs_k, I, J)
        x_offs_i = offs_i[None, :]
        x_offs_j = offs_j[None, :]
    else:
        x_offs_i = offs_k[:, None] * C + offs_i[None, :]
        x_offs_j = offs_k[:, None] * C + offs_j[None, :]
    scale_i = None
    shift_i = None
    scale_j = None
    shift_j = None
    if HAS_AFFINE:
        scale_i = tl.load(affine_ptr + offs_i, mask=mask_i, other=0.0)
        shift_i = tl.load(affine_ptr + C + offs_i, mask=mask_i, other=0.0)
        if TILES > 1:
            scale_j = tl.load(affine_ptr + offs_j, mask=mask_j, other=0.0)
            shift_j = tl.load(affine_ptr + C + offs_j, mask=mask_j, other=0.0)

    if HAS_PIVOT:
        DTYPE: tl.constexpr = x_ptr.dtype.element_ty
        pivot_i = pivot_row(pivot_ptr, affine_ptr, offs_i, mask_i, C, pivot_stride, HAS_AFFINE, SEEN, DTYPE)[None, :]
        pivot_j = pivot_row(pivot_ptr, affine_ptr, offs_j, mask_j, C, pivot_stride, HAS_AFFINE, SEEN, DTYPE)[None, :]

    a_base = a_ptr
    if STORE_A:  # by the programs of the diagonal
        a_base += row_start.to(tl.int64) * C
        mask_a = mask_j & (row_tile == column_tile)

    # A left operand that is computed is computed one step ahead. What the step before has made, the compiler writes to
    # shared memory, once where it is the right operand too. What the same step makes, tensor cores take from registers:
    # there it is read for them from rows that all begin in one bank, and the right operand is computed apart.
    AHEAD: tl.constexpr = HAS_AFFINE and not HAS_PIVOT and not SAMPLES
    OPERAND: tl.constexpr = tl.float64 if ACC == tl.float64 else x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=ACC)
    total = tl.zeros((BLOCK_N, BLOCK_N), dtype=ACC)
    sums = tl.zeros((LANES, BLOCK_N), dtype=ACC)  # in two dimensions: reduced across threads once, not at every step
    steps = tl.cdiv(rows, BLOCK_K)
    if AHEAD:
        a_i = load_normalised(base + x_offs_i, offs_k < rows, mask_i, scale_i, shift_i, EVEN_K)
    for step in tl.range(0, steps, num_stages=STAGES):  # said here, so that what is loaded ahead is pipelined, too
        mask_k = offs_k < rows - step * BLOCK_K
        if SAMPLES:
            x_rows = x_ptr + (sampled_rows(n, i, j, H, W, STRIDE_H, STRIDE_W) * C)[:, None]
            n, i, j = next_rows(n, i, j, BLOCK_K, I, J)
        else:
            x_rows = base
        if not AHEAD:
            a_i = load_normalised(x_rows + x_offs_i, mask_k, mask_i, scale_i, shift_i, EVEN_K)
        if TILES == 1:
            a_j = a_i
        else:
            a_j = load_normalised(x_rows + x_offs_j, mask_k, mask_j, scale_j, shift_j, EVEN_K)
        left, right = a_i, a_j
        if HAS_PIVOT:
            left = (a_i - pivot_i).to(OPERAND)
            right = (a_j - pivot_j).to(OPERAND)
            if not EVEN_K:  # a row past the end must not contribute -k
                left = tl.where(mask_k[:, None], left, 0.0)
                right = tl.where(mask_k[:, None], right, 0.0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision=INPUT_PRECISION, out_dtype=ACC)
        # Of the left operand: if that had no other use, its loads would wait in registers, one step ahead at most.
        summed = widened(left, ACC) if HAS_AFFINE else left.to(ACC)
        sums += tl.sum(tl.reshape(summed, (BLOCK_K // LANES, LANES, BLOCK_N)), axis=0)
        if step % FLUSH == FLUSH - 1:
            total += acc
            acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=ACC)
        if STORE_A:
            tl.store(a_base + offs_k[:, None] * C + offs_j[None, :], a_j, mask=mask_k[:, None] & mask_a[None, :])
            a_base += BLOCK_K * C
        if not SAMPLES:
            base += BLOCK_K * C
        if AHEAD:
            mask_k = offs_k < rows - (step + 1) * BLOCK_K
            a_i = load_normalised(base + x_offs_i, mask_k, mask_i & (step + 1 < steps), scale_i, shift_i, EVEN_K)
    total += acc

    partial_ptr += part.to(tl.int64) * elements
    offs = tl.arange(0, BLOCK_N)
    tile_ptr = partial_ptr + tl.program_id(0) * (BLOCK_N * BLOCK_N)
    tl.store(tile_ptr + offs[:, None] * BLOCK_N + offs[None, :], total)
    c_ptr = partial_ptr + TILES * (TILES + 1) // 2 * (BLOCK_N * BLOCK_N)
    tl.store(c_ptr + offs_i, tl.sum(sums, axis=0), mask=mask_i & (row_tile == column_tile))


@triton.jit
def gram_reduce_kernel(
    partial_ptr,
    g_ptr,
    c_ptr,
    split,
    C,
    elements,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ACC: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """The parts of partial [split, elements] summed in an order that BLOCK_S alone decides; G's lower half mirrored."""
    begin(DEPENDENT)
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_s = tl.arange(0, BLOCK_S)
    mask_e = offs_e < elements
    ptrs = partial_ptr + offs_s.to(tl.int64)[:, None] * elements + offs_e[None, :]
    acc = tl.zeros((BLOCK_S, BLOCK_E), dtype=ACC)
    for start in range(0, split, BLOCK_S):
        acc += tl.load(ptrs, mask=(offs_s < split - start)[:, None] & mask_e[None, :], other=0.0)
        ptrs += BLOCK_S * elements.to(tl.int64)
    value = tl.sum(acc, axis=0)

    tile = offs_e // (BLOCK_N * BLOCK_N)
    row_tile, column_tile = tile_pair(tile, TILES)
    i = row_tile * BLOCK_N + offs_e // BLOCK_N % BLOCK_N
    j = column_tile * BLOCK_N + offs_e % BLOCK_N
    tiles: tl.constexpr = TILES * (TILES + 1) // 2
    inside = (tile < tiles) & (i < C) & (j < C)
    tl.store(g_ptr + i * C + j, value, mask=inside)
    tl.store(g_ptr + j * C + i, value, mask=inside & (row_tile != column_tile))
    tl.store(c_ptr + offs_e - tiles * (BLOCK_N * BLOCK_N), value, mask=mask_e & (tile >= tiles))
