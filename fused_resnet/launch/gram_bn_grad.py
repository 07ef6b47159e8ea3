"""Launches BatchNorm's gradients from a Gram matrix, and the matrices of the input's gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from ..kernels.gram_bn_grad import gram_backward_kernel, gram_bias_kernel, gram_product_kernel
from ..plan.gram import gram_bias_config, gram_product_config, gram_rows_config
from ..plan.passes import ceil_div, next_power_of_2
from ..plan.target import interprets
from .check import accumulation_dtype, require_device, require_dtype, require_shape, triton_dtype
from .gram_bn import _require_weight, moments_size, product_precision
from .record import launch

MOST_RANKS = 32
"""Processes whose sums a program adds up at once."""
LEAST = 0.4
"""Of y's variance, as a part of what channels that share nothing would give it, both weighted by A²: below, A∘W counts
as two 16-bit terms (kernels/gram_bn_grad.py)."""


class GramGrads(NamedTuple):
    """What :func:`gram_backward` computes. ``aw`` and ``p`` are multiplied by ``scales`` where those are not None.

    ``aw_terms`` [1], of 16-bit data: how many of the terms of ``aw`` count, 1 but for data that demand 2.
    """

    dw: torch.Tensor
    dgamma: torch.Tensor
    dbeta: torch.Tensor
    aw: torch.Tensor
    aw_terms: torch.Tensor | None
    p: torch.Tensor
    bias: torch.Tensor | None
    scales: torch.Tensor | None
    owed: torch.Tensor


class Others(NamedTuple):
    """What statistics over the processes of a group take of them: ``gathered`` [R, 2 q + 1], the rows that
    :func:`gram_sums` makes. ``moments``, :func:`gram_finalize`'s, are of this process's rows alone."""

    gathered: torch.Tensor
    moments: torch.Tensor


def gram_backward(
    t: torch.Tensor,
    v: torch.Tensor,
    moments: torch.Tensor | None,
    stats: torch.Tensor,
    weight: torch.Tensor,
    sum_dz: torch.Tensor,
    rows: int,
    *,
    out_dtype: torch.dtype,
    others: Others | None = None,
) -> GramGrads:
    """The gradients of BatchNorm and of its 1x1 convolution, and the matrices of the input's gradient.

    ``t`` = dzᵀa ([q, p] or [q, p, 1, 1]) and ``sum_dz`` [q] in the accumulation dtype; ``v``, ``moments`` and ``stats``
    are :func:`gram_finalize`'s; without ``moments``, of wide data alone, ``t`` is that of a minus its mean.

    Returns dW [q, p, 1, 1] in ``out_dtype``, dgamma, dbeta [q], and in the weight's dtype AW and P [terms, p, p], with
    which da = dz AW + a P + bias [p]. Of 16 bits both are two terms that add up, AW [2, q, p] so far as ``aw_terms``
    says; else there is one, and AW is [q, p]. For float16 ``scales`` [2] are powers of two by which AW and P are
    multiplied, else None. Without ``moments`` there is no bias (None): that is the gradient of a minus its mean and dz
    minus ``owed`` / rows, its mean as well.

    ``others``: ``stats`` are of the rows of several processes. dgamma, dbeta and dW are by this one's alone, as those
    that data parallelism averages; AW, P, the bias and ``owed`` make the gradient through all of them (gram_rows.py).
    """
    q, p = _require_weight(weight)
    if t.dim() == 4:
        t = t.flatten(1)
    acc_dtype, size = accumulation_dtype(weight.dtype), (moments_size(q, p, weight.dtype),)
    shapes = {"t": (t, (q, p)), "v": (v, (q, p)), "stats": (stats, (4, q)), "sum_dz": (sum_dz, (q,))}
    if moments is not None:
        shapes["moments"] = (moments, size)
    if others is not None:
        ranks = others.gathered.shape[0]
        shapes |= {"moments": (others.moments, size), "gathered": (others.gathered, (ranks, 2 * q + 1))}
    for name, (tensor, shape) in shapes.items():
        require_shape(tensor, shape, name)
        require_dtype(tensor, acc_dtype, name)
        require_device(weight.device, **{name: tensor})
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    device = weight.device
    interpreter = interprets(device)
    scaled, terms = weight.dtype == torch.float16, 2 if weight.element_size() == 2 else 1
    if moments is None and terms == 2:
        raise ValueError("gram_backward of 16-bit data takes the moments")

    dw = torch.empty((q, p, 1, 1), dtype=out_dtype, device=device, memory_format=torch.channels_last)
    dgamma, dbeta, share = (torch.empty((q,), dtype=acc_dtype, device=device) for _ in range(3))
    aw = torch.empty((2, q, p) if terms == 2 else (q, p), dtype=weight.dtype, device=device)
    aw_terms = torch.empty((1,), dtype=torch.int32, device=device) if terms == 2 else None
    product = torch.empty((terms, p, p), dtype=weight.dtype, device=device)
    bound = torch.empty((q,), dtype=acc_dtype, device=device) if scaled else None
    scales = torch.empty((2,), dtype=acc_dtype, device=device) if scaled else None
    owed = sum_dz if others is None else torch.empty_like(sum_dz)
    common = {"P": p, "Q": q, "SCALED": scaled, "TERMS": terms, "ACC": triton_dtype(stats.dtype)}
    all_q = next_power_of_2(q) if terms == 2 else 1

    first_term = q * p * aw.element_size()  # bytes and FLOPs are those of data that need no more, as most do
    rows_config = gram_rows_config(p, interpreter=interpreter)
    others_touched = () if others is None else (others.gathered, owed)
    launch(
        gram_backward_kernel,
        (ceil_div(q, rows_config.block_m),),
        touched=(t, v, moments, stats, weight, sum_dz, dbeta, dgamma, share, bound, dw, aw, aw_terms, *others_touched),
        flops=0,
        config=rows_config,
        device=device,
        t_ptr=t,
        v_ptr=v,
        m_ptr=moments if others is None else others.moments,
        stats_ptr=stats,
        w_ptr=weight,
        dbeta_ptr=sum_dz,
        dbeta_out_ptr=dbeta,
        dgamma_ptr=dgamma,
        s_ptr=share,
        bound_ptr=bound,
        dw_ptr=dw,
        aw_ptr=aw,
        aw_terms_ptr=aw_terms,
        scales_ptr=scales,
        gathered_ptr=None if others is None else others.gathered,
        owed_ptr=owed,
        ranks=0 if others is None else others.gathered.shape[0],
        inverse_rows=1.0 / rows,
        rows=float(rows),
        CENTRED=moments is None,
        SYNC=others is not None,
        LEAST=LEAST,
        ALL_Q=all_q,
        BLOCK_R=1 if others is None else min(next_power_of_2(others.gathered.shape[0]), MOST_RANKS),
        BLOCK_Q=rows_config.block_m,
        BLOCK_P=rows_config.block_c,
        **common,
    )
    product_config = gram_product_config(p, interpreter=interpreter)
    launch(
        gram_product_kernel,
        (ceil_div(p, product_config.block_n) ** 2,),
        touched=(weight, first_term, aw_terms, share, bound, scales, product),
        flops=2 * q * p * p,
        config=product_config,
        device=device,
        w_ptr=weight,
        aw_ptr=aw,
        aw_terms_ptr=aw_terms,
        s_ptr=share,
        bound_ptr=bound,
        p_ptr=product,
        scales_ptr=scales,
        ALL_Q=all_q if scaled else 1,
        BLOCK_N=product_config.block_n,
        BLOCK_K=product_config.block_k,
        PARTS=2 if weight.dtype == torch.bfloat16 else 0,
        INPUT_PRECISION=product_precision(device),
        **{**common, "ACC": tl.float64 if terms == 1 else tl.float32},  # the one term of P: all that float32 holds
    )
    if moments is None:
        return GramGrads(dw, dgamma, dbeta, aw, aw_terms, product, None, scales, owed)
    bias = torch.empty((p,), dtype=acc_dtype, device=device)
    bias_config = gram_bias_config(p, interpreter=interpreter)
    launch(
        gram_bias_kernel,
        (ceil_div(p, bias_config.block_c),),
        touched=(first_term, aw_terms, product, owed, moments, scales, bias),
        flops=0,
        config=bias_config,
        device=device,
        aw_ptr=aw,
        aw_terms_ptr=aw_terms,
        p_ptr=product,
        dbeta_ptr=owed,
        m_ptr=moments,
        scales_ptr=scales,
        bias_ptr=bias,
        inverse_rows=1.0 / rows,
        BLOCK_K=bias_config.block_m,
        BLOCK_N=bias_config.block_c,
        **common,
    )
    return GramGrads(dw, dgamma, dbeta, aw, aw_terms, product, bias, scales, owed)
