"""Launches BatchNorm's statistics from a Gram matrix, before the convolution runs."""

from __future__ import annotations

import torch

from ..kernels.gram_bn import gram_finalize_kernel
from ..plan.gram import gram_finalize_config
from ..plan.passes import CUMULATIVE, ceil_div
from ..plan.target import interprets
from .bn_stats import _require_channels
from .check import (
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
    """(stats [4, q], V = W Cov [q, p], moments) of a convolution with ``weight`` [q, p, 1, 1], as rounded.

    ``moments`` are its input's mean [p], and of 16-bit data, behind it, y's variance [q] and what that would be if the
    input's channels shared nothing [q]: [p + 2 q] in all.

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
    moments = torch.empty((moments_size(q, p, weight.dtype),), dtype=acc_dtype, device=g.device)
    parts = 3 if weight.dtype == torch.bfloat16 else 0
    wide, interpreter = g.dtype == torch.float64, interprets(g.device)
    config = gram_finalize_config(p, parts=parts, wide=wide, interpreter=interpreter)
    launch(
        gram_finalize_kernel,
        (ceil_div(q, config.block_m),),
        touched=(
            *(g, c, pivot, input_affine, weight, gamma, beta, stats, v, moments),
            *2 * (running_mean, running_var, counter),
        ),
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
        m_ptr=moments,
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
        COMPARES=len(moments) > p,
        BLOCK_Q=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PARTS=parts,
        ACC=triton_dtype(g.dtype),
        INPUT_PRECISION=product_precision(g.device),
    )
    return stats, v, moments


def moments_size(q: int, p: int, dtype: torch.dtype) -> int:
    """How many numbers :func:`gram_finalize` tells backward of a convolution's input and output."""
    return p + 2 * q if dtype.itemsize == 2 else p


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
    return "ieee" if interprets(device) else "tf32x3"
