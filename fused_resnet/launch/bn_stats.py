"""Batch statistics: the pass over a convolution's output, the merge of tiles, and frozen statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..kernels.bn_stats import bn_finalize_kernel, bn_frozen_kernel, bn_merge_kernel, bn_stats_kernel
from ..plan.config import PassConfig
from ..plan.passes import CUMULATIVE, ceil_div, group_config, merge_config, step
from ..plan.target import interprets
from .check import (
    ACCUMULATION,
    DTYPES,
    accumulation_dtype,
    require_counter,
    require_device,
    require_nhwc,
    require_shape,
    triton_dtype,
)
from .record import launch
from .tiles import StatTiles

FROZEN_CONFIG = PassConfig(block_m=1, block_c=128)
MOST_NORMS = 4


class FrozenNorm(NamedTuple):
    """A BatchNorm that normalises with its running statistics: vectors [C], ``weight``, ``bias`` None for 1, 0."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    mean: torch.Tensor
    var: torch.Tensor
    eps: float


class _Norm(NamedTuple):
    """The same as the kernel takes it, which wants ``eps`` by itself: in a tuple it would be a float32."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    mean: torch.Tensor
    var: torch.Tensor
    stats: torch.Tensor
    channels: int


def bn_stats(y: torch.Tensor, config: PassConfig) -> StatTiles:
    """Tiles (mean, M2) of ``y`` [N, C, H, W], NHWC memory, one per ``config.block_m`` rows."""
    require_nhwc(y, "y")
    channels = y.shape[1]
    rows = y.numel() // channels
    tiles = ceil_div(rows, config.block_m)
    acc = accumulation_dtype(y.dtype)
    vectors, block_m = step(config, y.element_size(), vectors=4)
    data = torch.empty((2, tiles, channels), dtype=acc, device=y.device)
    launch(
        bn_stats_kernel,
        (tiles * ceil_div(channels, config.block_c),),
        touched=(y, data),
        flops=0,
        config=config,
        device=y.device,
        y_ptr=y,
        tiles_ptr=data,
        rows=rows,
        channels=channels,
        rows_per_tile=config.block_m,
        plane=tiles * channels,
        ACC=triton_dtype(acc),
        VECTORS=vectors,
        BLOCK_M=block_m,
        BLOCK_C=config.block_c,
    )
    return StatTiles(data, config.block_m, rows)


def bn_merge(tiles: StatTiles, config: PassConfig) -> StatTiles:
    """One tile for every ``config.block_m`` neighbours of ``tiles``: the same statistics in fewer tiles."""
    data = tiles.data
    _, count, channels = data.shape
    groups = ceil_div(count, config.block_m)
    vectors, block_t = step(config, data.element_size(), vectors=16 // data.element_size())
    merged = torch.empty((2, groups, channels), dtype=data.dtype, device=data.device)
    launch(
        bn_merge_kernel,
        (groups * ceil_div(channels, config.block_c),),
        touched=(data, merged),
        flops=0,
        config=config,
        device=data.device,
        tiles_ptr=data,
        merged_ptr=merged,
        rows=tiles.rows,
        channels=channels,
        rows_per_tile=tiles.rows_per_tile,
        tiles=count,
        tiles_per_group=config.block_m,
        plane=count * channels,
        merged_plane=groups * channels,
        VECTORS=vectors,
        BLOCK_T=block_t,
        BLOCK_C=config.block_c,
    )
    return StatTiles(merged, tiles.rows_per_tile * config.block_m, tiles.rows)


def merged(tiles: StatTiles) -> StatTiles:
    """``tiles``, where they are many merged by groups. ValueError if they do not hold their rows."""
    _, count, channels = tiles.data.shape
    if tiles.rows < 1 or count != ceil_div(tiles.rows, tiles.rows_per_tile):
        raise ValueError(f"{count} tiles of {tiles.rows_per_tile} rows do not hold {tiles.rows} rows")
    groups = group_config(count, channels, interpreter=interprets(tiles.data.device))
    return bn_merge(tiles, groups) if groups else tiles


def bn_finalize(
    tiles: StatTiles,
    *,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
    counter: torch.Tensor | None = None,
) -> torch.Tensor:
    """Merges ``tiles`` into stats [4, C]: mean, rstd, scale, shift, of the tiles' dtype; nothing waits for the host.

    ``weight`` and ``bias`` [C] default to 1 and 0. The running statistics [C] are updated in place, with the unbiased
    variance, and ``counter`` (one int64) counts up. With the momentum ``CUMULATIVE`` it counts this batch already, and
    the running statistics become the average of so many batches. ValueError for no rows.
    """
    data = tiles.data
    require_counter(counter, data.device)
    _require_channels(data, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    tiles = merged(tiles)
    data = tiles.data
    _, count, channels = data.shape
    stats = torch.empty((4, channels), dtype=data.dtype, device=data.device)
    config = merge_config(count, channels, interpreter=interprets(data.device))
    vectors, block_t = step(config, data.element_size(), vectors=16 // data.element_size())
    launch(
        bn_finalize_kernel,
        (ceil_div(channels, config.block_c),),
        touched=(data, stats, weight, bias, *2 * (running_mean, running_var, counter)),
        flops=0,
        config=config,
        device=data.device,
        tiles_ptr=data,
        stats_ptr=stats,
        weight_ptr=weight,
        bias_ptr=bias,
        running_mean_ptr=running_mean,
        running_var_ptr=running_var,
        counter_ptr=counter,
        rows=tiles.rows,
        channels=channels,
        rows_per_tile=tiles.rows_per_tile,
        tiles=count,
        plane=count * channels,
        eps=float(eps),
        momentum=float(momentum),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_RUNNING_MEAN=running_mean is not None,
        HAS_RUNNING_VAR=running_var is not None,
        HAS_COUNTER=counter is not None,
        CUMULATIVE=counter is not None and momentum == CUMULATIVE,
        VECTORS=vectors,
        BLOCK_T=block_t,
        BLOCK_C=config.block_c,
    )
    return stats


def bn_frozen(norms: Sequence[FrozenNorm], *, dtype: torch.dtype) -> list[torch.Tensor]:
    """stats [4, C] of each of up to four layers with frozen statistics, by one launch.

    In float32, or in float64 for activations of that ``dtype``.
    """
    if not 1 <= len(norms) <= MOST_NORMS:
        raise ValueError(f"bn_frozen takes one to {MOST_NORMS} layers, got {len(norms)}")
    acc = accumulation_dtype(dtype)
    device = norms[0].mean.device
    outs = [torch.empty((4, norm.mean.numel()), dtype=acc, device=device) for norm in norms]
    for stats, norm in zip(outs, norms, strict=True):
        _require_channels(stats, weight=norm.weight, bias=norm.bias, running_mean=norm.mean, running_var=norm.var)
    given = [
        _Norm(norm.weight, norm.bias, norm.mean, norm.var, stats, stats.shape[1])
        for stats, norm in zip(outs, norms, strict=True)
    ]
    absent = MOST_NORMS - len(norms)
    launch(
        bn_frozen_kernel,
        (ceil_div(max(norm.channels for norm in given), FROZEN_CONFIG.block_c), len(norms)),
        touched=[t for norm in given for t in norm[:-1]],
        flops=0,
        config=FROZEN_CONFIG,
        device=device,
        **{f"norm{i}": norm for i, norm in enumerate([*given, *[None] * absent])},
        **{f"eps{i}": eps for i, eps in enumerate([*(float(norm.eps) for norm in norms), *[0.0] * absent])},
        COUNT=len(norms),
        ACC=triton_dtype(acc),
        BLOCK_C=FROZEN_CONFIG.block_c,
    )
    return outs


def _require_channels(like: torch.Tensor, **vectors: torch.Tensor | None) -> None:
    """ValueError unless each vector that is given has one float per channel of ``like``, adjacent, on its device."""
    shape, device = like.shape[-1:], like.device
    for name, t in vectors.items():
        if t is None or (t.shape == shape and t.device == device and t.dtype in ACCUMULATION and t.is_contiguous()):
            continue
        require_device(device, **{name: t})
        require_shape(t, shape, name)
        if t.dtype not in ACCUMULATION:
            raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {t.dtype}")
        raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")
