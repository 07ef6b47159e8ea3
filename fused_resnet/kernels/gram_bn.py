"""BatchNorm of a 1x1 convolution's output from the Gram matrix of its input: the statistics, before it runs.

For y = a Wᵀ with a [M, p] and W [q, p], batch statistics need no y:

    G = aᵀa,  c = Σ rows of a,  m = c / M        ->      mean = W m,  V = W (G / M - m mᵀ),  var = rowsum(V ∘ W)

    gram_finalize_kernel     G, c -> stats [4, q], V [q, p], m [p]; the running statistics, in place

Wide data (float32, float64): their every digit counts, and a Gram matrix squares their condition. So G, V and P are
summed in float64. G is that of a minus a pivot (gram.py), which changes nothing in V; m gets the pivot back.

16-bit data: behind m come var [q] and what it would be if the channels of a shared nothing, alone_n = Σ_i W_ni² Cov_ii
[q]. By these backward finds whether one 16-bit term of A∘W will do (gram_bn_grad.py).
"""

import triton
import triton.language as tl

from .bn_stats import store_stats, update_statistics
from .bn_sync import store_packed
from .common import begin, widened
from .gram import pivot_row


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
    COMPARES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    ACC: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """One program per BLOCK_Q output channels.

    M * Cov = G - c mᵀ may cancel most of G. Two fused multiply-adds, with the mean in two parts, round only what is
    left, as float64 would. ``PACKS``: ``stats_ptr`` takes up what the process tells others of its rows (bn_sync.py).
    ``COMPARES``: ``m_ptr`` takes up var and alone, [q] each, behind the mean.
    """
    begin(DEPENDENT)
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_q = offs_q < Q
    rows_q = offs_q.to(tl.int64)[:, None] * P

    mean = tl.zeros((BLOCK_Q,), dtype=ACC)
    var = tl.zeros((BLOCK_Q,), dtype=ACC)
    alone = tl.zeros((BLOCK_Q,), dtype=ACC)
    for start_j in range(0, P, BLOCK_N):
        offs_j = start_j + offs_n
        mask_j = offs_j < P
        c_j = tl.load(c_ptr + offs_j, mask=mask_j, other=0.0)
        exact = c_j.to(tl.float64) * inverse_rows
        m_j = exact.to(ACC)
        rest_j = (exact - m_j.to(tl.float64)).to(ACC)
        if COMPARES:
            own = tl.load(g_ptr + offs_j.to(tl.int64) * (P + 1), mask=mask_j, other=0.0)
            own = tl.fma(-c_j, rest_j, tl.fma(-c_j, m_j, own))
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
        if COMPARES:
            alone += tl.sum(w * w * (own * inverse_rows).to(ACC)[None, :], axis=1)
        if tl.program_id(0) == 0:
            tl.store(m_ptr + offs_j, m_j, mask=mask_j)

    var = tl.where(var < 0.0, 0.0, var)
    if COMPARES:
        tl.store(m_ptr + P + offs_q, var, mask=mask_q)
        tl.store(m_ptr + P + Q + offs_q, alone, mask=mask_q)
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
