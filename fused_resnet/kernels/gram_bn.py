"""BatchNorm of a 1x1 convolution's output from the Gram matrix of its input: statistics, gradients, small matrices.

For y = a Wᵀ with a [M, p] and W [q, p], batch statistics need no y:

    G = aᵀa,  c = Σ rows of a,  m = c / M        ->      mean = W m,  V = W (G / M - m mᵀ),  var = rowsum(V ∘ W)

and neither do the gradients, from T = dzᵀa and dbeta = Σ dz, with A = gamma * rstd and D = T - dbeta ⊗ m:

    dgamma = rstd * rowsum(W ∘ D),   B = -A * rstd * dgamma / M,   dW = A∘D + (B * M)∘V
    da = dz (A∘W) + a P + bias,      P = Wᵀ(S∘A∘W),  S = -rstd * dgamma / M,   bias = -(dbeta / M) (A∘W) - m P

D is what T would be of a centred input: the mean of dz, which may be 30 times its spread, cancels once and early. P and
bias are made of A∘W as rounded, and bias of P as rounded: da is then the centred (dz + S∘y) times the very matrix A∘W
that dgrad reads, and what cancels between dz and its share along y or the mean cancels whatever the rounding was.

    gram_finalize_kernel     G, c -> stats [4, q], V [q, p], m [p]; the running statistics, in place
    gram_backward_kernel     T -> dgamma, S, dW, A∘W
    gram_product_kernel      S, A∘W -> P
    gram_bias_kernel         A∘W, P -> bias

Wide data (float32, float64): their every digit counts, and a Gram matrix squares their condition. So G, V and P are
summed in float64. G is that of a minus a pivot (gram.py), which changes nothing in V; m gets the pivot back. And
backward subtracts m from a and dbeta / M from dz on load (gram_wgrad.py, gram_dgrad.py): T is D, and the bias is 0.

A float16 A∘W or P could vanish in its exponent range: both are stored multiplied by a power of two, ``scales`` [2].
P is stored as two 16-bit terms that add up: a rounding of P is the same in every row of a P, so that it adds up in the
sums that the layer below makes of da, and where dz lies along y's own direction those are small differences.
"""

import triton
import triton.language as tl

from .bn_stats import store_stats, update_statistics
from .bn_sync import rank_sums, store_packed
from .common import widened
from .gram import pivot_row
from .gram_rows import row_products


@triton.jit
def dot_parts(left, right, acc, LEFT: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """acc + left right, where ``left`` is a weight as stored (of dtype ``LEFT``) and ``right`` has the dtype ``ACC``.

    ``PARTS``: for a bfloat16 ``left``, into how many bfloat16 terms of 8 bits ``right`` is split. Three are all of a
    float32, and three such products take half as long as three in tf32.
    """
    if PARTS == 0:
        return tl.dot(left.to(ACC), right, acc, input_precision=PRECISION, out_dtype=ACC)
    for _ in tl.static_range(PARTS):
        part = right.to(LEFT)
        acc = tl.dot(left.to(LEFT), part, acc, out_dtype=ACC)
        right -= widened(part, ACC)
    return acc


@triton.jit
def gram_finalize_kernel(
    g_ptr,
    c_ptr,
    pivot_ptr,
    affine_ptr,
    w_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    counter_ptr,
    stats_ptr,
    v_ptr,
    m_ptr,
    pivot_stride,
    P,
    Q,
    inverse_rows: tl.float64,
    unbiased: tl.float64,
    rows: tl.float64,
    eps: tl.float64,
    momentum: tl.float64,
    PACKS: tl.constexpr,
    HAS_PIVOT: tl.constexpr,
    SEEN: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RUNNING_MEAN: tl.constexpr,
    HAS_RUNNING_VAR: tl.constexpr,
    HAS_COUNTER: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    ACC: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program per BLOCK_Q output channels.

    M * Cov = G - c mᵀ may cancel most of G. Two fused multiply-adds, with the mean in two parts, round only what is
    left, as float64 would. ``PACKS``: ``stats_ptr`` takes up what the process tells others of its rows (bn_sync.py).
    """
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_q = offs_q < Q
    rows_q = offs_q.to(tl.int64)[:, None] * P

    mean = tl.zeros((BLOCK_Q,), dtype=ACC)
    var = tl.zeros((BLOCK_Q,), dtype=ACC)
    for start_j in range(0, P, BLOCK_N):
        offs_j = start_j + offs_n
        mask_j = offs_j < P
        exact = tl.load(c_ptr + offs_j, mask=mask_j, other=0.0).to(tl.float64) * inverse_rows
        m_j = exact.to(ACC)
        rest_j = (exact - m_j.to(tl.float64)).to(ACC)
        acc = tl.zeros((BLOCK_Q, BLOCK_N), dtype=ACC)
        for start_i in range(0, P, BLOCK_K):
            offs_i = start_i + offs_k
            mask_i = offs_i < P
            c_i = tl.load(c_ptr + offs_i, mask=mask_i, other=0.0)
            mask_g = mask_i[:, None] & mask_j[None, :]
            g = tl.load(g_ptr + offs_i.to(tl.int64)[:, None] * P + offs_j[None, :], mask=mask_g, other=0.0)
            spread = tl.fma(-c_i[:, None], m_j[None, :], g)
            spread = tl.fma(-c_i[:, None], rest_j[None, :], spread)
            w = tl.load(w_ptr + rows_q + offs_i[None, :], mask=mask_q[:, None] & mask_i[None, :], other=0.0)
            acc = dot_parts(w, spread, acc, w_ptr.dtype.element_ty, PARTS, ACC, INPUT_PRECISION)
        acc = (acc * inverse_rows).to(ACC)
        mask = mask_q[:, None] & mask_j[None, :]
        w = tl.load(w_ptr + rows_q + offs_j[None, :], mask=mask, other=0.0).to(ACC)
        tl.store(v_ptr + rows_q + offs_j[None, :], acc, mask=mask)
        if HAS_PIVOT:
            dtype: tl.constexpr = w_ptr.dtype.element_ty
            pivot = pivot_row(pivot_ptr, affine_ptr, offs_j, mask_j, P, pivot_stride, HAS_AFFINE, SEEN, dtype)
            m_j = (exact + pivot.to(tl.float64)).to(ACC)
        mean += tl.sum(w * m_j[None, :], axis=1)
        var += tl.sum(w * acc, axis=1)
        if tl.program_id(0) == 0:
            tl.store(m_ptr + offs_j, m_j, mask=mask_j)

    var = tl.where(var < 0.0, 0.0, var)
    if PACKS:
        store_packed(stats_ptr, mean, (var * rows).to(ACC), rows, Q, offs_q, mask_q)
        return
    store_stats(stats_ptr, weight_ptr, bias_ptr, mean, var, eps, Q, offs_q, mask_q, HAS_WEIGHT, HAS_BIAS)
    update_statistics(
        running_mean_ptr,
        running_var_ptr,
        counter_ptr,
        mean,
        (var * unbiased).to(ACC),
        momentum,
        offs_q,
        mask_q,
        HAS_RUNNING_MEAN,
        HAS_RUNNING_VAR,
        HAS_COUNTER,
        CUMULATIVE,
    )


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
    s_ptr,
    bound_ptr,
    dw_ptr,
    aw_ptr,
    scales_ptr,
    gathered_ptr,
    owed_ptr,
    ranks,
    P,
    Q,
    inverse_rows: tl.float64,
    rows: tl.float64,
    CENTRED: tl.constexpr,
    SYNC: tl.constexpr,
    SCALED: tl.constexpr,
    ALL_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """dgamma, S, dW, A∘W of BLOCK_Q output channels; ``SCALED``: and how much each adds to abs(P) at most.

    ``CENTRED``: T is that of a centred input. ``SYNC``: S is by the sums of all processes, and ``owed`` is made: see
    gram_rows.py.
    """
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_p = tl.arange(0, BLOCK_P)
    mask_q = offs_q < Q
    rows_q = offs_q.to(tl.int64)[:, None] * P
    rstd = tl.load(stats_ptr + Q + offs_q, mask=mask_q, other=0.0)
    coeff_a = tl.load(stats_ptr + 2 * Q + offs_q, mask=mask_q, other=0.0)
    dbeta = tl.load(dbeta_ptr + offs_q, mask=mask_q, other=0.0)

    along, of_mean, widest = row_products(
        t_ptr, m_ptr, w_ptr, dbeta, rows_q, mask_q, P, CENTRED, SYNC, SCALED, BLOCK_Q, BLOCK_P, ACC
    )
    owed = dbeta
    if SYNC:
        off = of_mean - tl.load(stats_ptr + offs_q, mask=mask_q, other=0.0)
        sum_dz, sum_dz_y, all_rows = rank_sums(gathered_ptr, ranks, offs_q, Q, ACC, BLOCK_R, BLOCK_Q)
        dgamma = rstd * (along + dbeta * off)
        share = -rstd * (rstd * sum_dz_y) / all_rows
        slope = (share * rows).to(ACC)
        owed = (sum_dz / all_rows * rows).to(ACC) - slope * off
        tl.store(owed_ptr + offs_q, owed, mask=mask_q)
    else:
        dgamma = rstd * along
        slope = -rstd * dgamma
        share = (slope * inverse_rows).to(ACC)
    slope *= coeff_a
    tl.store(dgamma_ptr + offs_q, dgamma, mask=mask_q)
    tl.store(s_ptr + offs_q, share, mask=mask_q)

    scaled_a = coeff_a
    if SCALED:
        tl.store(bound_ptr + offs_q, tl.abs(coeff_a * share) * widest * widest, mask=mask_q)
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
        w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(ACC)
        v = tl.load(v_ptr + offs, mask=mask, other=0.0)
        centred = tl.load(t_ptr + offs, mask=mask, other=0.0)
        if SYNC or not CENTRED:
            left = owed - dbeta if CENTRED else owed
            centred -= left[:, None] * tl.load(m_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
        dw = coeff_a[:, None] * centred + slope[:, None] * v
        tl.store(dw_ptr + offs, dw.to(dw_ptr.dtype.element_ty), mask=mask)
        tl.store(aw_ptr + offs, (scaled_a[:, None] * w).to(aw_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gram_product_kernel(
    w_ptr,
    aw_ptr,
    s_ptr,
    bound_ptr,
    p_ptr,
    scales_ptr,
    P,
    Q,
    SCALED: tl.constexpr,
    ALL_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    TERMS: tl.constexpr,
    ACC: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One tile of P = Wᵀ(S∘A∘W), as one rounded term or two. ``PARTS``: two have as many bits as two terms."""
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
            aw_ptr + rows.to(tl.int64)[:, None] * P + offs_j[None, :], mask=mask_w & mask_j[None, :], other=0.0
        )
        share = tl.load(s_ptr + rows, mask=mask_k, other=0.0)
        scaled = share[:, None] * right.to(ACC)
        acc = dot_parts(tl.trans(left), scaled, acc, w_ptr.dtype.element_ty, PARTS, ACC, INPUT_PRECISION)
    if SCALED:
        all_q = tl.arange(0, ALL_Q)
        bound = tl.sum(tl.load(bound_ptr + all_q, mask=all_q < Q, other=0.0), axis=0)
        scale = power_of_two(bound, 14)
        acc *= scale / tl.load(scales_ptr)
        if tl.program_id(0) == 0:
            tl.store(scales_ptr + 1, scale)
    offs = offs_i.to(tl.int64)[:, None] * P + offs_j[None, :]
    rounded = acc.to(p_ptr.dtype.element_ty)
    tl.store(p_ptr + offs, rounded, mask=mask_i[:, None] & mask_j[None, :])
    if TERMS == 2:
        rest = (acc - widened(rounded, ACC)).to(p_ptr.dtype.element_ty)
        tl.store(p_ptr + P * P + offs, rest, mask=mask_i[:, None] & mask_j[None, :])


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
    TERMS: tl.constexpr,
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
    for start in range(0, TERMS * P, BLOCK_K):
        rows = start + offs_k
        mask_k = rows < TERMS * P
        p = tl.load(
            p_ptr + rows.to(tl.int64)[:, None] * P + offs_n[None, :], mask=mask_k[:, None] & mask_n[None, :], other=0.0
        )
        mean = tl.load(m_ptr + rows % P, mask=mask_k, other=0.0)
        of_a += mean[:, None] * p.to(ACC)
    sum_dz = tl.sum(of_dz, axis=0)
    sum_a = tl.sum(of_a, axis=0)
    if SCALED:
        sum_dz /= tl.load(scales_ptr)
        sum_a /= tl.load(scales_ptr + 1)
    tl.store(bias_ptr + offs_n, -sum_dz - sum_a, mask=mask_n)
