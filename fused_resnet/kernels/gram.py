"""The Gram matrix of a 1x1 convolution's input, and the small matrices of BatchNorm that follow from it.

For y = a Wᵀ with a [M, p] = relu(x * scale + shift), rounded, and W [q, p], batch statistics need no y:

    G = aᵀa,  c = Σ rows of a,  m = c / M        ->      mean = W m,  V = W (G / M - m mᵀ),  var = rowsum(V ∘ W)

and neither do the gradients, from T = dzᵀa and dbeta = Σ dz, with A = gamma * rstd and D = T - dbeta ⊗ m:

    dgamma = rstd * rowsum(W ∘ D),   B = -A * rstd * dgamma / M,   dW = A∘D + (B * M)∘V
    da = dz (A∘W) + a P + bias,      P = Wᵀ(B∘W),   bias = -(dbeta / M) (A∘W) - m P   (of both matrices as rounded)

D is what T would be of a centred input: the mean of dz, which may be 30 times its spread, cancels once and early.

    gram_kernel, gram_reduce_kernel     x [M, p] -> partials of G's upper tiles and of c -> G [p, p], c [p]
    gram_finalize_kernel                G, c -> stats [4, q], V [q, p], m [p]; the running statistics, in place
    gram_backward_kernel                T -> dgamma, B, dW, A∘W
    gram_product_kernel                 B -> P
    gram_bias_kernel                    A∘W, P -> bias

A float16 A∘W or P could vanish in its exponent range: both are stored multiplied by a power of two, ``scales`` [2].
"""

import triton
import triton.language as tl

from .bn_stats import store_stats, update_running
from .common import affine, relu


@triton.jit
def tile_pair(tile, TILES: tl.constexpr):
    """(row, column) of the upper triangle's tile of that number, column by column."""
    column = tile * 0
    for k in tl.static_range(1, TILES):
        column += (tile >= k * (k + 1) // 2).to(tl.int32)
    return tile - column * (column + 1) // 2, column


@triton.jit
def load_normalised(ptrs, mask_k, mask_n, scale, shift, ACC: tl.constexpr, EVEN_K: tl.constexpr):
    """relu(x * scale + shift), rounded to x's dtype; zero outside the masks. ``scale`` None: x itself."""
    mask = mask_n[None, :]
    if not EVEN_K:
        mask = mask & mask_k[:, None]
    x = tl.load(ptrs, mask=mask, other=0.0)
    if scale is not None:
        a = relu(affine(x.to(ACC), scale[None, :], shift[None, :]))
        if not EVEN_K:
            a = tl.where(mask_k[:, None], a, 0.0)  # a row past the end must not contribute relu(shift)
        x = a.to(x.dtype)
    return x


@triton.jit
def gram_kernel(
    x_ptr,
    affine_ptr,
    partial_ptr,
    M,
    C,
    rows_per_split,
    elements,
    TILES: tl.constexpr,
    FLUSH: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    EVEN_K: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One tile of the upper triangle over one range of rows; partials are [split, tiles of G, then c].

    ``FLUSH``: after so many steps the accumulator is added to a second one. Tensor cores may truncate the sums that
    they keep, an error that grows with the run. ``LANES``: rows of a step that different threads hold.
    """
    row_tile, column_tile = tile_pair(tl.program_id(0), TILES)
    part = tl.program_id(1)
    row_start = part * rows_per_split
    rows = tl.minimum(rows_per_split, M - row_start)

    offs_k = tl.arange(0, BLOCK_K)
    offs_i = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_j = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_i = offs_i < C
    mask_j = offs_j < C
    base = x_ptr + row_start.to(tl.int64) * C
    x_offs_i = offs_k[:, None] * C + offs_i[None, :]
    x_offs_j = offs_k[:, None] * C + offs_j[None, :]
    scale_i = None
    shift_i = None
    scale_j = None
    shift_j = None
    if HAS_AFFINE:
        scale_j = tl.load(affine_ptr + offs_j, mask=mask_j, other=0.0)
        shift_j = tl.load(affine_ptr + C + offs_j, mask=mask_j, other=0.0)
        if TILES > 1:
            scale_i = tl.load(affine_ptr + offs_i, mask=mask_i, other=0.0)
            shift_i = tl.load(affine_ptr + C + offs_i, mask=mask_i, other=0.0)

    acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=ACC)
    total = tl.zeros((BLOCK_N, BLOCK_N), dtype=ACC)
    sums = tl.zeros((LANES, BLOCK_N), dtype=ACC)  # in two dimensions: reduced across threads once, not at every step
    for step in range(tl.cdiv(rows, BLOCK_K)):
        mask_k = offs_k < rows - step * BLOCK_K
        a_j = load_normalised(base + x_offs_j, mask_k, mask_j, scale_j, shift_j, ACC, EVEN_K)
        if TILES == 1:
            a_i = a_j
        else:
            a_i = load_normalised(base + x_offs_i, mask_k, mask_i, scale_i, shift_i, ACC, EVEN_K)
        acc = tl.dot(tl.trans(a_i), a_j, acc, input_precision=INPUT_PRECISION, out_dtype=ACC)
        sums += tl.sum(tl.reshape(a_j, (BLOCK_K // LANES, LANES, BLOCK_N)).to(ACC), axis=0)
        if step % FLUSH == FLUSH - 1:
            total += acc
            acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=ACC)
        base += BLOCK_K * C
    total += acc

    partial_ptr += part.to(tl.int64) * elements
    offs = tl.arange(0, BLOCK_N)
    tile_ptr = partial_ptr + tl.program_id(0) * (BLOCK_N * BLOCK_N)
    tl.store(tile_ptr + offs[:, None] * BLOCK_N + offs[None, :], total)
    c_ptr = partial_ptr + TILES * (TILES + 1) // 2 * (BLOCK_N * BLOCK_N)
    tl.store(c_ptr + offs_j, tl.sum(sums, axis=0), mask=mask_j & (row_tile == column_tile))


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
):
    """The parts of partial [split, elements] summed in an order that BLOCK_S alone decides; G's lower half mirrored."""
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


@triton.jit
def gram_finalize_kernel(
    g_ptr,
    c_ptr,
    w_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    counter_ptr,
    stats_ptr,
    v_ptr,
    m_ptr,
    P,
    Q,
    inverse_rows: tl.float64,
    unbiased: tl.float64,
    eps: tl.float64,
    momentum: tl.float64,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RUNNING_MEAN: tl.constexpr,
    HAS_RUNNING_VAR: tl.constexpr,
    HAS_COUNTER: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program per BLOCK_Q output channels.

    M * Cov = G - c mᵀ may cancel most of G. Two fused multiply-adds, with the mean in two parts, round only what is
    left, as float64 would.
    """
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_p = tl.arange(0, BLOCK_P)
    mask_q = offs_q < Q
    rows_q = offs_q.to(tl.int64)[:, None] * P

    mean = tl.zeros((BLOCK_Q,), dtype=ACC)
    var = tl.zeros((BLOCK_Q,), dtype=ACC)
    for start_j in range(0, P, BLOCK_P):
        offs_j = start_j + offs_p
        mask_j = offs_j < P
        exact = tl.load(c_ptr + offs_j, mask=mask_j, other=0.0).to(tl.float64) * inverse_rows
        m_j = exact.to(ACC)
        rest_j = (exact - m_j.to(tl.float64)).to(ACC)
        acc = tl.zeros((BLOCK_Q, BLOCK_P), dtype=ACC)
        for start_i in range(0, P, BLOCK_P):
            offs_i = start_i + offs_p
            mask_i = offs_i < P
            c_i = tl.load(c_ptr + offs_i, mask=mask_i, other=0.0)
            mask_g = mask_i[:, None] & mask_j[None, :]
            g = tl.load(g_ptr + offs_i.to(tl.int64)[:, None] * P + offs_j[None, :], mask=mask_g, other=0.0)
            spread = tl.fma(-c_i[:, None], m_j[None, :], g)
            spread = tl.fma(-c_i[:, None], rest_j[None, :], spread)
            w = tl.load(w_ptr + rows_q + offs_i[None, :], mask=mask_q[:, None] & mask_i[None, :], other=0.0)
            acc = tl.dot(w.to(ACC), spread, acc, input_precision=INPUT_PRECISION, out_dtype=ACC)
        acc = (acc * inverse_rows).to(ACC)
        mask = mask_q[:, None] & mask_j[None, :]
        w = tl.load(w_ptr + rows_q + offs_j[None, :], mask=mask, other=0.0).to(ACC)
        tl.store(v_ptr + rows_q + offs_j[None, :], acc, mask=mask)
        mean += tl.sum(w * m_j[None, :], axis=1)
        var += tl.sum(w * acc, axis=1)
        if tl.program_id(0) == 0:
            tl.store(m_ptr + offs_j, m_j, mask=mask_j)

    var = tl.where(var < 0.0, 0.0, var)
    store_stats(stats_ptr, weight_ptr, bias_ptr, mean, var, eps, Q, offs_q, mask_q, HAS_WEIGHT, HAS_BIAS)
    if HAS_COUNTER:
        momentum = 1.0 / tl.load(counter_ptr).to(tl.float64)
    if HAS_RUNNING_MEAN:
        update_running(running_mean_ptr, mean, momentum, offs_q, mask_q)
    if HAS_RUNNING_VAR:
        update_running(running_var_ptr, (var * unbiased).to(ACC), momentum, offs_q, mask_q)


@triton.jit
def power_of_two(bound, TARGET: tl.constexpr):
    """The power of two that brings a float32 ``bound`` into [2^TARGET, 2^(TARGET + 1)); within 2^-60 and 2^60."""
    exponent = (bound.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(254 + TARGET - exponent, 127 - 60), 127 + 60)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def gram_backward_kernel(
    t_ptr,
    v_ptr,
    m_ptr,
    stats_ptr,
    w_ptr,
    dbeta_ptr,
    dgamma_ptr,
    b_ptr,
    bound_ptr,
    dw_ptr,
    aw_ptr,
    scales_ptr,
    P,
    Q,
    inverse_rows: tl.float64,
    SCALED: tl.constexpr,
    ALL_Q: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """dgamma, B, dW, A∘W of BLOCK_Q output channels; ``SCALED``: and how much each adds to abs(P) at most."""
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_p = tl.arange(0, BLOCK_P)
    mask_q = offs_q < Q
    rows_q = offs_q.to(tl.int64)[:, None] * P
    rstd = tl.load(stats_ptr + Q + offs_q, mask=mask_q, other=0.0)
    coeff_a = tl.load(stats_ptr + 2 * Q + offs_q, mask=mask_q, other=0.0)
    dbeta = tl.load(dbeta_ptr + offs_q, mask=mask_q, other=0.0)

    along = tl.zeros((BLOCK_Q,), dtype=ACC)
    widest = tl.zeros((BLOCK_Q,), dtype=ACC)
    for start in range(0, P, BLOCK_P):
        offs_n = start + offs_p
        mask_n = offs_n < P
        mask = mask_q[:, None] & mask_n[None, :]
        m = tl.load(m_ptr + offs_n, mask=mask_n, other=0.0)
        w = tl.load(w_ptr + rows_q + offs_n[None, :], mask=mask, other=0.0).to(ACC)
        centred = tl.load(t_ptr + rows_q + offs_n[None, :], mask=mask, other=0.0) - dbeta[:, None] * m[None, :]
        along += tl.sum(w * centred, axis=1)
        if SCALED:
            widest = tl.maximum(widest, tl.max(tl.abs(w), axis=1))
    dgamma = rstd * along
    slope = -coeff_a * rstd * dgamma
    coeff_b = (slope * inverse_rows).to(ACC)
    tl.store(dgamma_ptr + offs_q, dgamma, mask=mask_q)
    tl.store(b_ptr + offs_q, coeff_b, mask=mask_q)

    scaled_a = coeff_a
    if SCALED:
        tl.store(bound_ptr + offs_q, tl.abs(coeff_b) * widest * widest, mask=mask_q)
        # abs(A) times the scale is below 16: room for small A, and no overflow for weights below 4094.
        all_q = tl.arange(0, ALL_Q)
        largest = tl.max(tl.abs(tl.load(stats_ptr + 2 * Q + all_q, mask=all_q < Q, other=0.0)), axis=0)
        scale = power_of_two(largest, 3)
        scaled_a = coeff_a * scale
        if tl.program_id(0) == 0:
            tl.store(scales_ptr, scale)
    for start in range(0, P, BLOCK_P):
        offs_n = start + offs_p
        mask_n = offs_n < P
        mask = mask_q[:, None] & mask_n[None, :]
        offs = rows_q + offs_n[None, :]
        m = tl.load(m_ptr + offs_n, mask=mask_n, other=0.0)
        w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(ACC)
        v = tl.load(v_ptr + offs, mask=mask, other=0.0)
        centred = tl.load(t_ptr + offs, mask=mask, other=0.0) - dbeta[:, None] * m[None, :]
        dw = coeff_a[:, None] * centred + slope[:, None] * v
        tl.store(dw_ptr + offs, dw.to(dw_ptr.dtype.element_ty), mask=mask)
        tl.store(aw_ptr + offs, (scaled_a[:, None] * w).to(aw_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gram_product_kernel(
    w_ptr,
    b_ptr,
    bound_ptr,
    p_ptr,
    scales_ptr,
    P,
    Q,
    SCALED: tl.constexpr,
    ALL_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One tile of P = Wᵀ(B∘W), rounded."""
    tiles = tl.cdiv(P, BLOCK_N)
    offs_i = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_j = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_i = offs_i < P
    mask_j = offs_j < P

    acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=ACC)
    for start in range(0, Q, BLOCK_K):
        rows = start + offs_k
        mask_k = rows < Q
        mask_w = mask_k[:, None]
        left = tl.load(
            w_ptr + rows.to(tl.int64)[:, None] * P + offs_i[None, :], mask=mask_w & mask_i[None, :], other=0.0
        )
        right = tl.load(
            w_ptr + rows.to(tl.int64)[:, None] * P + offs_j[None, :], mask=mask_w & mask_j[None, :], other=0.0
        )
        b = tl.load(b_ptr + rows, mask=mask_k, other=0.0)
        scaled = b[:, None] * right.to(ACC)
        acc = tl.dot(tl.trans(left.to(ACC)), scaled, acc, input_precision=INPUT_PRECISION, out_dtype=ACC)
    if SCALED:
        all_q = tl.arange(0, ALL_Q)
        bound = tl.sum(tl.load(bound_ptr + all_q, mask=all_q < Q, other=0.0), axis=0)
        scale = power_of_two(bound, 14)
        acc *= scale
        if tl.program_id(0) == 0:
            tl.store(scales_ptr + 1, scale)
    offs = offs_i.to(tl.int64)[:, None] * P + offs_j[None, :]
    tl.store(p_ptr + offs, acc.to(p_ptr.dtype.element_ty), mask=mask_i[:, None] & mask_j[None, :])


@triton.jit
def gram_bias_kernel(
    aw_ptr,
    p_ptr,
    dbeta_ptr,
    m_ptr,
    scales_ptr,
    bias_ptr,
    P,
    Q,
    inverse_rows: tl.float64,
    SCALED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """bias = -(dbeta / M) (A∘W) - m P: what the two products of dgrad owe the means of dz and of a."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < P

    of_dz = tl.zeros((BLOCK_K, BLOCK_N), dtype=ACC)
    for start in range(0, Q, BLOCK_K):
        rows = start + offs_k
        mask_k = rows < Q
        aw = tl.load(
            aw_ptr + rows.to(tl.int64)[:, None] * P + offs_n[None, :], mask=mask_k[:, None] & mask_n[None, :], other=0.0
        )
        mean = (tl.load(dbeta_ptr + rows, mask=mask_k, other=0.0) * inverse_rows).to(ACC)
        of_dz += mean[:, None] * aw.to(ACC)
    of_a = tl.zeros((BLOCK_K, BLOCK_N), dtype=ACC)
    for start in range(0, P, BLOCK_K):
        rows = start + offs_k
        mask_k = rows < P
        p = tl.load(
            p_ptr + rows.to(tl.int64)[:, None] * P + offs_n[None, :], mask=mask_k[:, None] & mask_n[None, :], other=0.0
        )
        mean = tl.load(m_ptr + rows, mask=mask_k, other=0.0)
        of_a += mean[:, None] * p.to(ACC)
    sum_dz = tl.sum(of_dz, axis=0)
    sum_a = tl.sum(of_a, axis=0)
    if SCALED:
        sum_dz /= tl.load(scales_ptr)
        sum_a /= tl.load(scales_ptr + 1)
    tl.store(bias_ptr + offs_n, -sum_dz - sum_a, mask=mask_n)
