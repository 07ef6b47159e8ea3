"""Launcher of the parameters' gradients where statistics are frozen."""

from __future__ import annotations

import torch

from ..kernels.frozen_grad import frozen_grad_kernel
from ..plan.passes import ceil_div, frozen_grad_config
from ..plan.target import interprets
from .check import require_device, require_dtype, require_nhwc, require_rows, require_shape, triton_dtype
from .record import launch


def frozen_grad(
    t: torch.Tensor,
    weight: torch.Tensor,
    stats: torch.Tensor,
    sum_dz: torch.Tensor,
    *,
    dw_dtype: torch.dtype | None,
    wants_dgamma: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dW [Co, Ci, R, S] in ``dw_dtype``, None without one; dgamma [Co], if wanted) of a convolution and its BatchNorm.

    ``t`` and ``weight`` [Co, Ci, R, S] are dense NHWC, each of any float dtype: T = sum over pixels of dz (x) x, of
    the gradient dz behind the BatchNorm, and the weight as the convolution read it. ``stats`` [4, Co] and ``sum_dz``
    [Co] have the accumulation dtype. Raises ValueError for anything else.
    """
    channels = weight.shape[0]
    for name, image in (("t", t), ("weight", weight)):
        require_nhwc(image, name)
    require_shape(t, tuple(weight.shape), "t")
    require_device(stats.device, t=t, weight=weight)
    require_rows(stats, 4, channels, stats, "stats")
    require_shape(sum_dz, (channels,), "sum_dz")
    require_dtype(sum_dz, stats.dtype, "sum_dz")
    dw = None if dw_dtype is None else torch.empty_like(weight, dtype=dw_dtype, memory_format=torch.channels_last)
    dgamma = torch.empty_like(sum_dz) if wants_dgamma else None
    if dw is None and dgamma is None:
        return None, None
    length = weight.numel() // max(channels, 1)
    config = frozen_grad_config(channels, length, interpreter=interprets(stats.device))
    launch(
        frozen_grad_kernel,
        (ceil_div(channels, config.block_m),),
        touched=(t, stats, dw, *((weight, sum_dz, dgamma) if wants_dgamma else ())),
        flops=0,
        config=config,
        device=stats.device,
        t_ptr=t,
        w_ptr=weight,
        stats_ptr=stats,
        dbeta_ptr=sum_dz,
        dw_ptr=dw,
        dgamma_ptr=dgamma,
        channels=channels,
        K=length,
        HAS_DW=dw is not None,
        HAS_DGAMMA=wants_dgamma,
        ACC=triton_dtype(stats.dtype),
        BLOCK_C=config.block_m,
        BLOCK_K=config.block_c,
    )
    return dw, dgamma
