"""Gradients of a convolution's weight and of its BatchNorm's, where the statistics are frozen and y was never written.

With y = conv(x), z = (y - mean)*rstd*gamma + beta and T = sum over pixels of dz (x) x, what a plain weight gradient is:

    dW = scale∘T,   dgamma = rstd*(Σ dz*y - mean*dbeta),   Σ dz*y = rowsum(W∘T)

Reads   t [Co, K] (K = R*S*Ci), w [Co, K] and dbeta [Co] if dgamma is wanted, stats [4, Co].
Writes  dw [Co, K], dgamma [Co], each if it is wanted.
"""

import triton
import triton.language as tl

from .common import begin


@triton.jit
def frozen_grad_kernel(
    t_ptr,
    w_ptr,
    stats_ptr,
    dbeta_ptr,
    dw_ptr,
    dgamma_ptr,
    channels,
    K,
    HAS_DW: tl.constexpr,
    HAS_DGAMMA: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """One program per BLOCK_C output channels."""
    begin(DEPENDENT)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    rows = offs_c.to(tl.int64)[:, None] * K
    scale = tl.load(stats_ptr + 2 * channels + offs_c, mask=mask_c, other=0.0)
    along = tl.zeros((BLOCK_C, BLOCK_K), dtype=ACC)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask = mask_c[:, None] & (offs_k < K)[None, :]
        t = tl.load(t_ptr + rows + offs_k[None, :], mask=mask, other=0.0).to(ACC)
        if HAS_DGAMMA:
            along += tl.load(w_ptr + rows + offs_k[None, :], mask=mask, other=0.0).to(ACC) * t
        if HAS_DW:
            dw = scale[:, None] * t
            tl.store(dw_ptr + rows + offs_k[None, :], dw.to(dw_ptr.dtype.element_ty), mask=mask)
    if HAS_DGAMMA:
        mean = tl.load(stats_ptr + offs_c, mask=mask_c, other=0.0)
        rstd = tl.load(stats_ptr + channels + offs_c, mask=mask_c, other=0.0)
        dbeta = tl.load(dbeta_ptr + offs_c, mask=mask_c, other=0.0)
        tl.store(dgamma_ptr + offs_c, rstd * (tl.sum(along, axis=1) - mean * dbeta), mask=mask_c)
