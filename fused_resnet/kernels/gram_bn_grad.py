"""BatchNorm of a 1x1 convolution's output from the Gram matrix of its input: the gradients, without that output.

From T = dzᵀa and dbeta = Σ dz, with A = gamma * rstd, D = T - dbeta ⊗ m, and m, V, var of gram_bn.py:

    dgamma = rstd * rowsum(W ∘ D),   B = -A * rstd * dgamma / M,   dW = A∘D + (B * M)∘V
    da = dz (A∘W) + a P + bias,      P = Wᵀ(S∘A∘W),  S = -rstd * dgamma / M,   bias = -(dbeta / M) (A∘W) - m P

D is what T would be of a centred input: the mean of dz, which may be 30 times its spread, cancels once and early. P and
bias are made of A∘W as rounded, and bias of P as rounded: da is then the centred (dz + S∘y) times the very matrix A∘W
that dgrad reads, and what cancels between dz and its share along y or the mean cancels whatever the rounding was.

    gram_backward_kernel     T, dbeta -> dgamma, dbeta (in memory of its own), S, dW, A∘W
    gram_product_kernel      S, A∘W -> P
    gram_bias_kernel         A∘W, P -> bias

Of wide data (float32, float64) backward subtracts m from a and dbeta / M from dz on load (gram_wgrad.py,
gram_dgrad.py): T is D, and the bias is 0.

A float16 A∘W or P could vanish in its exponent range: both are stored multiplied by a power of two, ``scales`` [2].
P is stored as two 16-bit terms that add up: a rounding of P is the same in every row of a P, so that it adds up in the
sums that the layer below makes of da, and where dz lies along y's own direction those are small differences.

A∘W is stored as two terms too. P, the bias and dgrad use the second where data demand it: ``aw_terms``, on the device,
says how many count. Rounding turns a filter a little, into any direction. Where channels of a share most of what they
are, and filters of large A are orthogonal to that, da has next to nothing along it but what the rounding left there, in
proportion to da as Σ A² alone to Σ A² var (gram_bn.py), and a convolution below whose filters are alike passes on just
that. One term makes dx 1.1 to 1.6 times as wrong as eager's where var / alone, so weighted, is below 0.16, and 1.05
times (some draws 1.3) from 0.25 to 0.4; from there on it is as good as eager rounded elsewhere. A ResNet-50 at its
start has more than 0.5 (its first projection, of images that vary slowly) and 0.8 elsewhere, one that has learned more
than 1. Below LEAST both terms count, which are as good as an exact A∘W; an ordinary network never pays for the second.
"""

import triton
import triton.language as tl

from .bn_sync import rank_sums
from .common import begin, widened
from .gram_bn import dot_parts
from .gram_rows import row_products


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
    dbeta_out_ptr,
    dgamma_ptr,
    s_ptr,
    bound_ptr,
    dw_ptr,
    aw_ptr,
    aw_terms_ptr,
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
    TERMS: tl.constexpr,
    LEAST: tl.constexpr,
    ALL_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """dgamma, S, dW, A∘W of BLOCK_Q output channels; ``SCALED``: and how much each adds to abs(P) at most.

    ``TERMS`` of A∘W are stored, and the first program says how many count. ``CENTRED``: T is that of a centred input.
    ``SYNC``: S is by the sums of all processes, and ``owed`` is made: see gram_rows.py.
    """
    begin(DEPENDENT)
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_p = tl.arange(0, BLOCK_P)
    mask_q = offs_q < Q
    rows_q = offs_q.to(tl.int64)[:, None] * P
    rstd = tl.load(stats_ptr + Q + offs_q, mask=mask_q, other=0.0)
    coeff_a = tl.load(stats_ptr + 2 * Q + offs_q, mask=mask_q, other=0.0)
    dbeta = tl.load(dbeta_ptr + offs_q, mask=mask_q, other=0.0)
    tl.store(dbeta_out_ptr + offs_q, dbeta, mask=mask_q)

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
    all_q = tl.arange(0, ALL_Q)
    if TERMS == 2:
        if tl.program_id(0) == 0:
            all_a = tl.load(stats_ptr + 2 * Q + all_q, mask=all_q < Q, other=0.0)
            var = tl.load(m_ptr + P + all_q, mask=all_q < Q, other=0.0)
            alone = tl.load(m_ptr + P + Q + all_q, mask=all_q < Q, other=0.0)
            spare = tl.sum(all_a * all_a * (var - LEAST * alone), axis=0)
            tl.store(aw_terms_ptr, tl.where(spare < 0.0, 2, 1))
    if SCALED:
        tl.store(bound_ptr + offs_q, tl.abs(coeff_a * share) * widest * widest, mask=mask_q)
        # abs(A) times the scale is below 16: room for small A, and no overflow for weights below 4094.
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
        aw = scaled_a[:, None] * w
        rounded = aw.to(aw_ptr.dtype.element_ty)
        tl.store(aw_ptr + offs, rounded, mask=mask)
        if TERMS == 2:
            rest = (aw - widened(rounded, ACC)).to(aw_ptr.dtype.element_ty)
            tl.store(aw_ptr + Q * P + offs, rest, mask=mask)


@triton.jit
def gram_product_kernel(
    w_ptr,
    aw_ptr,
    aw_terms_ptr,
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
    DEPENDENT: tl.constexpr = False,
):
    """One tile of P = Wᵀ(S∘A∘W), as one rounded term or two. ``PARTS``: two have as many bits as two terms."""
    begin(DEPENDENT)
    tiles = tl.cdiv(P, BLOCK_N)
    offs_i = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_j = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_i = offs_i < P
    mask_j = offs_j < P

    acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=ACC)
    padded = tl.cdiv(Q, BLOCK_K) * BLOCK_K
    reach = padded
    if TERMS == 2:
        reach *= tl.load(aw_terms_ptr)
    for start in range(0, reach, BLOCK_K):
        k0, term_ptr = start, aw_ptr
        if TERMS == 2:
            k0 = tl.where(start < padded, start, start - padded)
            term_ptr += tl.where(start < padded, 0, Q * P)
        rows = k0 + offs_k
        mask_k = rows < Q
        mask_w = mask_k[:, None]
        left = tl.load(
            w_ptr + rows.to(tl.int64)[:, None] * P + offs_i[None, :], mask=mask_w & mask_i[None, :], other=0.0
        )
        right = tl.load(
            term_ptr + rows.to(tl.int64)[:, None] * P + offs_j[None, :], mask=mask_w & mask_j[None, :], other=0.0
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
    aw_terms_ptr,
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
    DEPENDENT: tl.constexpr = False,
):
    """bias = -(dbeta / M) (A∘W) - m P: what the two products of dgrad owe the means of dz and of a."""
    begin(DEPENDENT)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < P

    of_dz = tl.zeros((BLOCK_K, BLOCK_N), dtype=ACC)
    count = Q
    if TERMS == 2:
        count *= tl.load(aw_terms_ptr)
    for start in range(0, count, BLOCK_K):
        rows = start + offs_k
        mask_k = rows < count
        aw = tl.load(
            aw_ptr + rows.to(tl.int64)[:, None] * P + offs_n[None, :], mask=mask_k[:, None] & mask_n[None, :], other=0.0
        )
        mean = (tl.load(dbeta_ptr + rows % Q, mask=mask_k, other=0.0) * inverse_rows).to(ACC)
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
