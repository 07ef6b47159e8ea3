"""Launchers of BatchNorm from a Gram matrix: statistics before the convolution runs, gradients without its output."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from ..kernels.gram_bn import gram_backward_kernel, gram_bias_kernel, gram_finalize_kernel, gram_product_kernel
from ..plan.gram import gram_bias_config, gram_finalize_config, gram_product_config, gram_rows_config
from ..plan.passes import ceil_div, next_power_of_2
from .bn_stats import _require_channels
from .check import (
    CUMULATIVE,
    accumulation_dtype,
    require_counter,
    require_device,
    require_dtype,
    require_nhwc,
    require_rows,
    require_shape,
    triton_dtype,
)
from .record import launch

MOST_RANKS = 32
"""Processes whose sums a program adds up at once."""


class GramGrads(NamedTuple):
    """What :func:`gram_backward` computes. ``aw`` and ``p`` are multiplied by ``scales`` where those are not None."""

    dw: torch.Tensor
    dgamma: torch.Tensor
    dbeta: torch.Tensor
    aw: torch.Tensor
    p: torch.Tensor
    bias: torch.Tensor | None
    scales: torch.Tensor | None
    owed: torch.Tensor


class Others(NamedTuple):
    """What statistics over the processes of a group take of them: ``gathered`` [R, 2 q + 1], the rows that
    :func:`gram_sums` makes. ``input_mean`` [p] is that of this process's rows alone."""

    gathered: torch.Tensor
    input_mean: torch.Tensor


def gram_finalize(
    g: torch.Tensor,
    c: torch.Tensor,
    rows: int,
    weight: torch.Tensor,
    *,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
    counter: torch.Tensor | None = None,
    pivot: torch.Tensor | None = None,
    input_affine: torch.Tensor | None = None,
    packs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(stats [4, q], V = W Cov [q, p], its input's mean [p]) of a convolution with ``weight`` [q, p, 1, 1], as rounded.

    ``g`` and ``c`` are :func:`gram`'s, and ``pivot``, ``input_affine`` what it had, if it had a pivot. The BatchNorm
    arguments are those of ``bn_finalize``, which this replaces; with ``packs`` they are not looked at, and in place of
    the stats comes what ``bn_sync_pack`` makes, [2 q + 1].
    """
    q, p = _require_weight(weight)
    require_shape(g, (p, p), "g")
    require_shape(c, (p,), "c")
    require_device(g.device, c=c, weight=weight, counter=counter)
    acc_dtype = accumulation_dtype(weight.dtype)
    require_dtype(g, gram_dtype(weight, pivot), "g")
    if pivot is not None:
        require_pivot(pivot, p, weight, input_affine)
        if input_affine is not None:
            require_rows(input_affine, 2, p, weight, "input_affine")
    if rows < 1:
        raise ValueError(f"statistics of {rows} rows")
    require_counter(counter, g.device)
    stats = torch.empty(2 * q + 1 if packs else (4, q), dtype=acc_dtype, device=g.device)
    if packs:
        gamma = beta = running_mean = running_var = counter = None
    else:
        _require_channels(stats, gamma=gamma, beta=beta, running_mean=running_mean, running_var=running_var)
    v = torch.empty((q, p), dtype=acc_dtype, device=g.device)
    m = torch.empty((p,), dtype=acc_dtype, device=g.device)
    parts = 3 if weight.dtype == torch.bfloat16 else 0
    wide, interpreter = g.dtype == torch.float64, g.device.type == "cpu"
    config = gram_finalize_config(p, parts=parts, wide=wide, interpreter=interpreter)
    running = [t for t in (running_mean, running_var) if t is not None]
    launch(
        gram_finalize_kernel,
        (ceil_div(q, config.block_m),),
        touched=(g, c, pivot, input_affine, weight, gamma, beta, counter, counter, stats, v, m, *running, *running),
        flops=2 * q * p * p,
        config=config,
        device=g.device,
        g_ptr=g,
        c_ptr=c,
        pivot_ptr=pivot,
        affine_ptr=input_affine,
        w_ptr=weight,
        weight_ptr=gamma,
        bias_ptr=beta,
        running_mean_ptr=running_mean,
        running_var_ptr=running_var,
        counter_ptr=counter,
        stats_ptr=stats,
        v_ptr=v,
        m_ptr=m,
        pivot_stride=p if pivot is None else pivot.stride(0),
        P=p,
        Q=q,
        inverse_rows=1.0 / rows,
        unbiased=rows / max(rows - 1, 1),
        rows=float(rows),
        eps=float(eps),
        momentum=float(momentum),
        PACKS=packs,
        HAS_PIVOT=pivot is not None,
        SEEN=1 if pivot is None else len(pivot),
        HAS_AFFINE=input_affine is not None,
        HAS_WEIGHT=gamma is not None,
        HAS_BIAS=beta is not None,
        HAS_RUNNING_MEAN=running_mean is not None,
        HAS_RUNNING_VAR=running_var is not None,
        HAS_COUNTER=counter is not None,
        CUMULATIVE=counter is not None and momentum == CUMULATIVE,
        BLOCK_Q=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PARTS=parts,
        ACC=triton_dtype(g.dtype),
        INPUT_PRECISION=product_precision(g.device),
    )
    return stats, v, m


def gram_backward(
    t: torch.Tensor,
    v: torch.Tensor,
    m: torch.Tensor | None,
    stats: torch.Tensor,
    weight: torch.Tensor,
    sum_dz: torch.Tensor,
    rows: int,
    *,
    out_dtype: torch.dtype,
    others: Others | None = None,
) -> GramGrads:
    """The gradients of BatchNorm and of its 1x1 convolution, and the matrices of the input's gradient.

    ``t`` = dzᵀa ([q, p] or [q, p, 1, 1]) and ``sum_dz`` [q] in the accumulation dtype; ``v``, ``m`` and ``stats`` are
    :func:`gram_finalize`'s; without ``m``, ``t`` is that of a minus its mean.

    Returns dW [q, p, 1, 1] in ``out_dtype``, dgamma, dbeta [q], and AW [q, p], P [terms, p, p]
    (in the weight's dtype; two terms of 16 bits, or one), bias [p] with which da = dz AW + a P[0] (+ a P[1]) + bias;
    for float16 ``scales`` [2], powers of two by which AW and P are multiplied, else None. Without ``m`` there is no
    bias (None): that is the gradient of a minus its mean and dz minus ``owed`` / rows, its mean as well.

    ``others``: ``stats`` are of the rows of several processes. dgamma, dbeta and dW are by this one's alone, as those
    that data parallelism averages; AW, P, the bias and ``owed`` make the gradient through all of them (gram_rows.py).
    """
    q, p = _require_weight(weight)
    if t.dim() == 4:
        t = t.flatten(1)
    acc_dtype = accumulation_dtype(weight.dtype)
    shapes = {"t": (t, (q, p)), "v": (v, (q, p)), "stats": (stats, (4, q)), "sum_dz": (sum_dz, (q,))}
    if m is not None:
        shapes["m"] = (m, (p,))
    if others is not None:
        ranks = others.gathered.shape[0]
        shapes |= {"input_mean": (others.input_mean, (p,)), "gathered": (others.gathered, (ranks, 2 * q + 1))}
    for name, (tensor, shape) in shapes.items():
        require_shape(tensor, shape, name)
        require_dtype(tensor, acc_dtype, name)
        require_device(weight.device, **{name: tensor})
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    device = weight.device
    interpreter = device.type == "cpu"
    scaled = weight.dtype == torch.float16

    dw = torch.empty((q, p, 1, 1), dtype=out_dtype, device=device, memory_format=torch.channels_last)
    dgamma, share = (torch.empty((q,), dtype=acc_dtype, device=device) for _ in range(2))
    aw = torch.empty((q, p), dtype=weight.dtype, device=device)
    terms = 2 if weight.dtype in (torch.bfloat16, torch.float16) else 1
    product = torch.empty((terms, p, p), dtype=weight.dtype, device=device)
    bound = torch.empty((q,), dtype=acc_dtype, device=device) if scaled else None
    scales = torch.empty((2,), dtype=acc_dtype, device=device) if scaled else None
    owed = sum_dz if others is None else torch.empty_like(sum_dz)
    common = {"P": p, "Q": q, "SCALED": scaled, "ACC": triton_dtype(stats.dtype)}
    all_q = next_power_of_2(q) if scaled else 1

    rows_config = gram_rows_config(p, interpreter=interpreter)
    others_touched = () if others is None else (others.gathered, owed)
    launch(
        gram_backward_kernel,
        (ceil_div(q, rows_config.block_m),),
        touched=(t, v, m, stats, weight, sum_dz, dgamma, share, bound, dw, aw, *others_touched),
        flops=0,
        config=rows_config,
        device=device,
        t_ptr=t,
        v_ptr=v,
        m_ptr=m if others is None else others.input_mean,
        stats_ptr=stats,
        w_ptr=weight,
        dbeta_ptr=sum_dz,
        dgamma_ptr=dgamma,
        s_ptr=share,
        bound_ptr=bound,
        dw_ptr=dw,
        aw_ptr=aw,
        scales_ptr=scales,
        gathered_ptr=None if others is None else others.gathered,
        owed_ptr=owed,
        ranks=0 if others is None else others.gathered.shape[0],
        inverse_rows=1.0 / rows,
        rows=float(rows),
        CENTRED=m is None,
        SYNC=others is not None,
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
        touched=(weight, aw, share, bound, scales, product),
        flops=2 * q * p * p,
        config=product_config,
        device=device,
        w_ptr=weight,
        aw_ptr=aw,
        s_ptr=share,
        bound_ptr=bound,
        p_ptr=product,
        scales_ptr=scales,
        ALL_Q=all_q,
        BLOCK_N=product_config.block_n,
        BLOCK_K=product_config.block_k,
        PARTS=2 if weight.dtype == torch.bfloat16 else 0,
        TERMS=terms,
        INPUT_PRECISION=product_precision(device),
        **{**common, "ACC": tl.float64 if terms == 1 else tl.float32},  # the one term of P: all that float32 holds
    )
    if m is None:
        return GramGrads(dw, dgamma, sum_dz, aw, product, None, scales, owed)
    bias = torch.empty((p,), dtype=acc_dtype, device=device)
    bias_config = gram_bias_config(p, interpreter=interpreter)
    launch(
        gram_bias_kernel,
        (ceil_div(p, bias_config.block_c),),
        touched=(aw, product, owed, m, scales, bias),
        flops=0,
        config=bias_config,
        device=device,
        aw_ptr=aw,
        p_ptr=product,
        dbeta_ptr=owed,
        m_ptr=m,
        scales_ptr=scales,
        bias_ptr=bias,
        inverse_rows=1.0 / rows,
        TERMS=terms,
        BLOCK_K=bias_config.block_m,
        BLOCK_N=bias_config.block_c,
        **common,
    )
    return GramGrads(dw, dgamma, sum_dz, aw, product, bias, scales, owed)


def _require_weight(weight: torch.Tensor) -> tuple[int, int]:
    """(q, p) of a 1x1 filter [q, p, 1, 1] whose memory is a dense [q, p]."""
    require_nhwc(weight, "weight")
    q, p = weight.shape[:2]
    require_shape(weight, (q, p, 1, 1), "weight")
    if q * p >= 2**31:
        raise ValueError(f"the kernels count weights in 32 bits, too many for them: {tuple(weight.shape)}")
    return q, p


def require_pivot(pivot: torch.Tensor, channels: int, like: torch.Tensor, input_affine: torch.Tensor | None) -> None:
    """ValueError unless ``pivot`` is [2, channels] beside an affine, or without one what :func:`gram` takes there."""
    wide = like.dtype == accumulation_dtype(like.dtype)
    if input_affine is not None or wide:
        require_rows(pivot, 1 if input_affine is None else 2, channels, like, "pivot")
        return
    seen = len(pivot)
    if seen & (seen - 1) or pivot.shape != (seen, channels) or pivot.stride(1) != 1:
        raise ValueError(
            f"pivot must be a power of two of pixels of {channels} dense channels, got shape {tuple(pivot.shape)} with "
            f"strides {pivot.stride()}"
        )
    require_dtype(pivot, like.dtype, "pivot")
    require_device(like.device, pivot=pivot)


def gram_dtype(like: torch.Tensor, pivot: torch.Tensor | None) -> torch.dtype:
    """Of G and c: a pivot says that the digits count, and then float32 data have too many for float32 sums."""
    acc = accumulation_dtype(like.dtype)
    return torch.float64 if pivot is not None and like.dtype == acc else acc


def product_precision(device: torch.device) -> str:
    """How float32 operands multiply: three tf32 products are as good as float32, and run on tensor cores."""
    return "ieee" if device.type == "cpu" else "tf32x3"
