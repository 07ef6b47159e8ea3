"""BatchNorm over the processes of a group: launchers of what is sent, and of what is made of what all sent."""

from __future__ import annotations

import torch

from ..kernels.bn_sync import (
    bn_sync_finalize_kernel,
    bn_sync_grad_finalize_kernel,
    bn_sync_grad_pack_kernel,
    bn_sync_pack_kernel,
)
from ..plan.passes import CUMULATIVE, ceil_div, merge_config, step
from ..plan.target import interprets
from .bn_act_grad import merged_grads
from .bn_stats import _require_channels, merged
from .check import require_counter, require_device, require_rows, require_shape, triton_dtype
from .record import launch
from .tiles import StatTiles


def bn_sync_pack(tiles: StatTiles) -> torch.Tensor:
    """[2 C + 1]: mean and M2 of each channel and the count of rows, of the tiles' dtype."""
    tiles = merged(tiles)
    data = tiles.data
    _, count, channels = data.shape
    packed = torch.empty(2 * channels + 1, dtype=data.dtype, device=data.device)
    config = merge_config(count, channels, interpreter=interprets(data.device))
    vectors, block_t = step(config, data.element_size(), vectors=16 // data.element_size())
    launch(
        bn_sync_pack_kernel,
        (ceil_div(channels, config.block_c),),
        touched=(data, packed),
        flops=0,
        config=config,
        device=data.device,
        tiles_ptr=data,
        packed_ptr=packed,
        rows=tiles.rows,
        channels=channels,
        rows_per_tile=tiles.rows_per_tile,
        tiles=count,
        plane=count * channels,
        VECTORS=vectors,
        BLOCK_T=block_t,
        BLOCK_C=config.block_c,
    )
    return packed


def bn_sync_finalize(
    gathered: torch.Tensor,
    *,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
    counter: torch.Tensor | None = None,
) -> torch.Tensor:
    """stats [4, C] of the rows of all processes, from what each packed: ``gathered`` [R, 2 C + 1].

    The other arguments are those of :func:`bn_finalize`, which this replaces. Where nobody has any row, the running
    statistics stay as they are.
    """
    ranks, channels = _sizes(gathered)
    require_counter(counter, gathered.device)
    stats = torch.empty((4, channels), dtype=gathered.dtype, device=gathered.device)
    _require_channels(stats, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    config = merge_config(ranks, channels, interpreter=interprets(gathered.device))
    launch(
        bn_sync_finalize_kernel,
        (ceil_div(channels, config.block_c),),
        touched=(gathered, stats, weight, bias, *2 * (running_mean, running_var, counter)),
        flops=0,
        config=config,
        device=gathered.device,
        gathered_ptr=gathered,
        stats_ptr=stats,
        weight_ptr=weight,
        bias_ptr=bias,
        running_mean_ptr=running_mean,
        running_var_ptr=running_var,
        counter_ptr=counter,
        ranks=ranks,
        channels=channels,
        eps=float(eps),
        momentum=float(momentum),
        ACC=triton_dtype(gathered.dtype),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_RUNNING_MEAN=running_mean is not None,
        HAS_RUNNING_VAR=running_var is not None,
        HAS_COUNTER=counter is not None,
        CUMULATIVE=counter is not None and momentum == CUMULATIVE,
        BLOCK_R=config.block_m,
        BLOCK_C=config.block_c,
    )
    return stats


def bn_sync_grad_pack(tiles: torch.Tensor, rows: int, *, row: int = 1) -> torch.Tensor:
    """[2 C + 1]: sum dz and sum dz * (y - mean) of each channel, and ``rows``, their count.

    They are rows 0 and ``row`` of ``tiles`` [K, T, C]. ValueError for no rows.
    """
    tiles, row = merged_grads(tiles, row, rows)
    _, count, channels = tiles.shape
    packed = torch.empty(2 * channels + 1, dtype=tiles.dtype, device=tiles.device)
    config = merge_config(count, channels, interpreter=interprets(tiles.device))
    vectors, block_t = step(config, tiles.element_size(), vectors=16 // tiles.element_size())
    launch(
        bn_sync_grad_pack_kernel,
        (ceil_div(channels, config.block_c),),
        touched=(2 * count * channels * tiles.element_size(), packed),
        flops=0,
        config=config,
        device=tiles.device,
        tiles_ptr=tiles,
        packed_ptr=packed,
        rows=rows,
        channels=channels,
        tiles=count,
        plane=count * channels,
        ROW=row,
        ACC=triton_dtype(tiles.dtype),
        VECTORS=vectors,
        BLOCK_T=block_t,
        BLOCK_C=config.block_c,
    )
    return packed


def bn_sync_grad_finalize(
    gathered: torch.Tensor, packed: torch.Tensor, stats: torch.Tensor, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dgamma [C], dbeta [C], coeffs [3, C]): the first two of this process's ``packed`` [2 C + 1] alone.

    dy = A * dz + B * y + C with the rows of coeffs, by the sums of all: ``gathered`` [R, 2 C + 1]. ``weight`` defaults
    to 1.
    """
    ranks, channels = _sizes(gathered)
    require_shape(packed, (2 * channels + 1,), "packed")
    require_rows(stats, 4, channels, gathered, "stats")
    if weight is not None:
        require_device(gathered.device, weight=weight)
        require_shape(weight, (channels,), "weight")
    dgamma = torch.empty(channels, dtype=gathered.dtype, device=gathered.device)
    dbeta = torch.empty_like(dgamma)
    coeffs = torch.empty((3, channels), dtype=gathered.dtype, device=gathered.device)
    config = merge_config(ranks, channels, interpreter=interprets(gathered.device))
    launch(
        bn_sync_grad_finalize_kernel,
        (ceil_div(channels, config.block_c),),
        touched=(gathered, packed, stats, weight, dgamma, dbeta, coeffs),
        flops=0,
        config=config,
        device=gathered.device,
        gathered_ptr=gathered,
        packed_ptr=packed,
        stats_ptr=stats,
        weight_ptr=weight,
        dgamma_ptr=dgamma,
        dbeta_ptr=dbeta,
        coeffs_ptr=coeffs,
        ranks=ranks,
        channels=channels,
        ACC=triton_dtype(gathered.dtype),
        HAS_WEIGHT=weight is not None,
        BLOCK_R=config.block_m,
        BLOCK_C=config.block_c,
    )
    return dgamma, dbeta, coeffs


def _sizes(gathered: torch.Tensor) -> tuple[int, int]:
    """(R, C) of what was gathered."""
    ranks, width = gathered.shape
    if width % 2 == 0 or not gathered.is_contiguous():
        raise ValueError(f"gathered must be [ranks, 2 C + 1], contiguous, got {tuple(gathered.shape)}")
    return ranks, width // 2
