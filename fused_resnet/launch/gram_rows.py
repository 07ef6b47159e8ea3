"""Launcher of what a process tells others of the gradient of a BatchNorm whose statistics are by a Gram matrix."""

from __future__ import annotations

import torch

from ..kernels.gram_rows import gram_sums_kernel
from ..plan.gram import gram_rows_config
from ..plan.passes import ceil_div
from ..plan.target import interprets
from .check import require_shape, triton_dtype
from .gram_bn import _require_weight
from .record import launch


def gram_sums(
    t: torch.Tensor,
    m: torch.Tensor,
    stats: torch.Tensor,
    weight: torch.Tensor,
    sum_dz: torch.Tensor,
    rows: int,
    *,
    centred: bool,
) -> torch.Tensor:
    """[2 q + 1]: sum dz, sum dz * (y - mean) and ``rows``, of a y = a Wᵀ that is not there.

    ``t``, ``m``, ``sum_dz``: as of ``gram_backward``, of this process's rows; ``centred``: of a minus its mean
    ``m``. ``stats`` [4, q] give the mean of the rows of all processes.
    """
    q, p = _require_weight(weight)
    t = t.flatten(1)
    for name, (tensor, shape) in {"t": (t, (q, p)), "m": (m, (p,)), "stats": (stats, (4, q))}.items():
        require_shape(tensor, shape, name)
    require_shape(sum_dz, (q,), "sum_dz")
    packed = torch.empty(2 * q + 1, dtype=stats.dtype, device=stats.device)
    config = gram_rows_config(p, interpreter=interprets(stats.device))
    launch(
        gram_sums_kernel,
        (ceil_div(q, config.block_m),),
        touched=(t, m, stats, weight, sum_dz, packed),
        flops=0,
        config=config,
        device=stats.device,
        t_ptr=t,
        m_ptr=m,
        stats_ptr=stats,
        w_ptr=weight,
        dbeta_ptr=sum_dz,
        packed_ptr=packed,
        P=p,
        Q=q,
        rows=float(rows),
        CENTRED=centred,
        BLOCK_Q=config.block_m,
        BLOCK_P=config.block_c,
        ACC=triton_dtype(stats.dtype),
    )
    return packed
