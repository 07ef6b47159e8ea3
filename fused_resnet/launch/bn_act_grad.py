"""Backward of BatchNorm, residual and ReLU: the reductions with dz, their merge, and dy."""

from __future__ import annotations

import torch

from ..kernels.bn_act_grad import (
    bn_act_grad_reduce_kernel,
    bn_grad_apply_kernel,
    bn_grad_finalize_kernel,
    bn_grad_merge_kernel,
)
from ..plan.config import PassConfig
from ..plan.passes import ceil_div, group_config, merge_config, step
from ..plan.target import interprets
from .bits import require_bits
from .check import (
    accumulation_dtype,
    require_device,
    require_image,
    require_nhwc,
    require_rows,
    require_shape,
    triton_dtype,
)
from .record import launch


def bn_act_grad_reduce(
    dout: torch.Tensor,
    y: torch.Tensor | None,
    stats: torch.Tensor | None,
    config: PassConfig,
    *,
    out: torch.Tensor | None = None,
    bits: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    residual_stats: torch.Tensor | None = None,
    relu: bool = True,
    store_dz: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """dz = dout where the ReLU let it pass, and tiles [2, T, C] of sum dz and sum dz * (y - mean).

    The mask is ``bits``, or that of the ReLU's output ``out``, or without either of y * scale + shift. ``residual``, a
    projection's raw output, and ``residual_stats`` add a third row, sum dz * (residual - its mean). Without ``y``
    (frozen statistics) row 1 is zero and ``stats`` is not read. Without a ReLU dz is ``dout`` itself; without
    ``store_dz`` it is ``None``. Images [N, C, H, W] of one dtype, NHWC memory. ValueError where
    an operand is missing or does not fit.
    """
    require_nhwc(dout, "dout")
    channels = dout.shape[1]
    rows = dout.numel() // channels
    if out is not None and bits is not None:
        raise ValueError("the mask of the ReLU is given twice, as out and as bits")
    has_mask = out is not None or bits is not None
    if y is None and relu and not has_mask:
        raise ValueError("the mask of the ReLU needs y, out or bits")
    if (residual is None) != (residual_stats is None):
        raise ValueError("residual and residual_stats come together")
    if residual is not None and relu and not has_mask:
        raise ValueError("with a residual the mask of the ReLU needs out or bits")
    if bits is not None:
        require_bits(bits, dout.shape, dout.device)
    for name, image in (("y", y), ("out", out), ("residual", residual)):
        if image is not None:
            require_image(image, dout.shape, dout, name)
    if y is not None:
        if stats is None:
            raise ValueError("y needs stats")
        require_rows(stats, 4, channels, dout, "stats")
    if residual_stats is not None:
        require_rows(residual_stats, 4, channels, dout, "residual_stats")

    out, bits = (out, bits) if relu else (None, None)
    tiles = ceil_div(rows, config.block_m)
    acc = accumulation_dtype(dout.dtype)
    data = torch.empty((2 if residual is None else 3, tiles, channels), dtype=acc, device=dout.device)
    stored = torch.empty_like(dout, memory_format=torch.channels_last) if relu and store_dz else None
    vectors, block_m = step(config, dout.element_size(), vectors=2)
    launch(
        bn_act_grad_reduce_kernel,
        (tiles * ceil_div(channels, config.block_c),),
        touched=(dout, y, out, residual, stored, bits, stats if y is not None else None, residual_stats, data),
        flops=0,
        config=config,
        device=dout.device,
        dout_ptr=dout,
        y_ptr=y,
        out_ptr=out,
        bits_ptr=bits,
        residual_ptr=residual,
        stats_ptr=stats,
        residual_stats_ptr=residual_stats,
        dz_ptr=stored,
        tiles_ptr=data,
        rows=rows,
        channels=channels,
        row_bytes=ceil_div(channels, 8),
        rows_per_tile=config.block_m,
        plane=tiles * channels,
        ACC=triton_dtype(acc),
        HAS_Y=y is not None,
        HAS_OUT=out is not None,
        HAS_BITS=bits is not None,
        HAS_RESIDUAL=residual is not None,
        APPLY_RELU=relu,
        STORE_DZ=stored is not None,
        VECTORS=vectors,
        BLOCK_M=block_m,
        BLOCK_C=config.block_c,
    )
    if not store_dz:
        return None, data
    return (stored if relu else dout), data


def bn_grad_merge(tiles: torch.Tensor, row: int, config: PassConfig) -> torch.Tensor:
    """Rows 0 and ``row`` of ``tiles`` [K, T, C], every ``config.block_m`` neighbours added up: [2, G, C]."""
    _, count, channels = tiles.shape
    groups = ceil_div(count, config.block_m)
    vectors, block_t = step(config, tiles.element_size(), vectors=16 // tiles.element_size())
    merged = torch.empty((2, groups, channels), dtype=tiles.dtype, device=tiles.device)
    launch(
        bn_grad_merge_kernel,
        (groups * ceil_div(channels, config.block_c),),
        touched=(2 * count * channels * tiles.element_size(), merged),
        flops=0,
        config=config,
        device=tiles.device,
        tiles_ptr=tiles,
        merged_ptr=merged,
        channels=channels,
        tiles=count,
        tiles_per_group=config.block_m,
        plane=count * channels,
        merged_plane=groups * channels,
        ROW=row,
        ACC=triton_dtype(tiles.dtype),
        VECTORS=vectors,
        BLOCK_T=block_t,
        BLOCK_C=config.block_c,
    )
    return merged


def merged_grads(tiles: torch.Tensor, row: int, rows: int) -> tuple[torch.Tensor, int]:
    """``tiles`` and ``row``, where they are many merged by groups. ValueError for no ``rows``, or no such ``row``."""
    kinds, count, channels = tiles.shape
    if rows < 1:
        raise ValueError(f"rows must be positive, got {rows}")
    if not 0 < row < kinds:
        raise ValueError(f"row must be one of 1 to {kinds - 1}, got {row}")
    groups = group_config(count, channels, interpreter=interprets(tiles.device))
    return (bn_grad_merge(tiles, row, groups), 1) if groups else (tiles, row)


def bn_grad_finalize(
    tiles: torch.Tensor, stats: torch.Tensor, weight: torch.Tensor | None, rows: int, *, row: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dgamma [C], dbeta [C], coeffs [3, C]) from partial sums [2 or 3, T, C], all in the tiles' dtype.

    Row 0 of ``tiles`` holds sum dz, ``row`` holds sum dz * (y - mean); ``rows`` is how many pixels each channel has.
    dy = A * dz + B * y + C with the rows of coeffs. ``weight`` defaults to 1. ValueError for no rows.
    """
    _, _, channels = tiles.shape
    require_rows(stats, 4, channels, tiles, "stats")
    if weight is not None:
        require_device(tiles.device, weight=weight)
        require_shape(weight, (channels,), "weight")
    dgamma = torch.empty(channels, dtype=tiles.dtype, device=tiles.device)
    dbeta = torch.empty_like(dgamma)
    coeffs = torch.empty((3, channels), dtype=tiles.dtype, device=tiles.device)
    tiles, row = merged_grads(tiles, row, rows)
    count = tiles.shape[1]
    config = merge_config(count, channels, interpreter=interprets(tiles.device))
    vectors, block_t = step(config, tiles.element_size(), vectors=16 // tiles.element_size())
    launch(
        bn_grad_finalize_kernel,
        (ceil_div(channels, config.block_c),),
        touched=(2 * count * channels * tiles.element_size(), stats, weight, dgamma, dbeta, coeffs),
        flops=0,
        config=config,
        device=tiles.device,
        tiles_ptr=tiles,
        stats_ptr=stats,
        weight_ptr=weight,
        dgamma_ptr=dgamma,
        dbeta_ptr=dbeta,
        coeffs_ptr=coeffs,
        rows=rows,
        channels=channels,
        tiles=count,
        plane=count * channels,
        ROW=row,
        ACC=triton_dtype(tiles.dtype),
        HAS_WEIGHT=weight is not None,
        VECTORS=vectors,
        BLOCK_T=block_t,
        BLOCK_C=config.block_c,
    )
    return dgamma, dbeta, coeffs


def bn_grad_apply(dz: torch.Tensor, y: torch.Tensor | None, coeffs: torch.Tensor, config: PassConfig) -> torch.Tensor:
    """dy = A * dz + B * y + C with the rows of ``coeffs`` [3, C]; A * dz without ``y`` (frozen statistics).

    ``dz`` and ``y`` [N, C, H, W], NHWC memory, one dtype, which is the result's.
    """
    require_nhwc(dz, "dz")
    channels = dz.shape[1]
    rows = dz.numel() // channels
    if y is not None:
        require_image(y, dz.shape, dz, "y")
    require_rows(coeffs, 3, channels, dz, "coeffs")
    dy = torch.empty_like(dz, memory_format=torch.channels_last)
    vectors, block_m = step(config, dz.element_size(), vectors=4 if y is None else 2)
    launch(
        bn_grad_apply_kernel,
        (ceil_div(rows, config.block_m) * ceil_div(channels, config.block_c),),
        touched=(dz, y, coeffs, dy),
        flops=0,
        config=config,
        device=dz.device,
        dz_ptr=dz,
        y_ptr=y,
        coeffs_ptr=coeffs,
        dy_ptr=dy,
        rows=rows,
        channels=channels,
        rows_per_tile=config.block_m,
        HAS_Y=y is not None,
        VECTORS=vectors,
        BLOCK_M=block_m,
        BLOCK_C=config.block_c,
    )
    return dy
