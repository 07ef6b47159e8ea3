"""Sums along the rows of T = dzᵀa: what the gradient of a BatchNorm's weight needs where its statistics are by Gram.

Statistics may be of the rows of several processes, N in all. Then mean, rstd, A and S are by all of them, and G, m, V,
T, dbeta and D = T - dbeta ⊗ m (gram_bn_grad.py) by the M rows of this process. With off = W m - mean:

    S2 = Σ dz (y - mean) = rowsum(W ∘ D) + dbeta * off        summed over processes, as S1 = Σ dz is
    S = -rstd² * S2 / N,   dy = A (dz - S1 / N) + A S (y - mean)

y - mean is y - W m of a centred input, plus off. So the mean of dz that dy subtracts gives way to owed / M:

    owed / M = S1 / N - S * off
    dW = Σ dy ⊗ a = A∘(T - owed ⊗ m) + (M S A)∘V
    da = dy W = dz (A∘W) + a P + bias,   bias = -(owed / M) (A∘W) - m P

and nothing but S1 and S2 travels. Of one process alone off is 0 and owed is dbeta, as gram_bn_grad.py has it.

    gram_sums_kernel   T -> packed [2 q + 1], what bn_sync_grad_pack makes of tiles: dbeta, that sum, count
"""

import triton
import triton.language as tl

from .bn_sync import store_packed
from .common import begin


@triton.jit
def row_products(
    t_ptr,
    m_ptr,
    w_ptr,
    dbeta,
    rows_q,
    mask_q,
    P,
    CENTRED: tl.constexpr,
    SYNC: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """rowsum(W ∘ D), and with ``SYNC`` W m, with ``SCALED`` the largest abs(W), of BLOCK_Q output channels."""
    offs_p = tl.arange(0, BLOCK_P)
    along = tl.zeros((BLOCK_Q,), dtype=ACC)
    of_mean = tl.zeros((BLOCK_Q,), dtype=ACC)
    widest = tl.zeros((BLOCK_Q,), dtype=ACC)
    for start in range(0, P, BLOCK_P):
        offs_n = start + offs_p
        mask_n = offs_n < P
        mask = mask_q[:, None] & mask_n[None, :]
        w = tl.load(w_ptr + rows_q + offs_n[None, :], mask=mask, other=0.0).to(ACC)
        centred = tl.load(t_ptr + rows_q + offs_n[None, :], mask=mask, other=0.0)
        if SYNC or not CENTRED:
            m = tl.load(m_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
        if not CENTRED:
            centred -= dbeta[:, None] * m
        if SYNC:
            of_mean += tl.sum(w * m, axis=1)
        along += tl.sum(w * centred, axis=1)
        if SCALED:
            widest = tl.maximum(widest, tl.max(tl.abs(w), axis=1))
    return along, of_mean, widest


@triton.jit
def gram_sums_kernel(
    t_ptr,
    m_ptr,
    stats_ptr,
    w_ptr,
    dbeta_ptr,
    packed_ptr,
    P,
    Q,
    rows: tl.float64,
    CENTRED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin(DEPENDENT)
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_q = offs_q < Q
    rows_q = offs_q.to(tl.int64)[:, None] * P
    mean = tl.load(stats_ptr + offs_q, mask=mask_q, other=0.0)
    dbeta = tl.load(dbeta_ptr + offs_q, mask=mask_q, other=0.0)
    along, of_mean, _ = row_products(
        t_ptr, m_ptr, w_ptr, dbeta, rows_q, mask_q, P, CENTRED, True, False, BLOCK_Q, BLOCK_P, ACC
    )
    store_packed(packed_ptr, dbeta, along + dbeta * (of_mean - mean), rows, Q, offs_q, mask_q)
