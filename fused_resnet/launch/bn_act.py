"""Normalise, add the residual, ReLU: one pass."""

from __future__ import annotations

import torch

from ..kernels.bn_act import bn_act_kernel
from ..plan.config import PassConfig
from ..plan.passes import ceil_div, step
from .bits import require_bits
from .check import require_image, require_nhwc, require_rows
from .record import launch


def bn_act(
    y: torch.Tensor,
    stats: torch.Tensor,
    config: PassConfig,
    *,
    residual: torch.Tensor | None = None,
    residual_stats: torch.Tensor | None = None,
    relu: bool = True,
    bits: torch.Tensor | None = None,
) -> torch.Tensor:
    """relu(y * scale + shift + residual), the residual normalised by its own ``residual_stats`` where they are given.

    ``y`` and ``residual`` [N, C, H, W], NHWC memory, one dtype, which is the result's; stats [4, C] in float32 (float64
    for float64). ``bits`` (see :func:`empty_bits`) takes up the ReLU's mask. ValueError for anything else.
    """
    require_nhwc(y, "y")
    channels = y.shape[1]
    rows = y.numel() // channels
    require_rows(stats, 4, channels, y, "stats")
    if residual is not None:
        require_image(residual, y.shape, y, "residual")
    if residual_stats is not None:
        if residual is None:
            raise ValueError("residual_stats without a residual")
        require_rows(residual_stats, 4, channels, y, "residual_stats")
    if bits is not None:
        if not relu:
            raise ValueError("bits are the mask of a ReLU")
        require_bits(bits, y.shape, y.device)
    out = torch.empty_like(y, memory_format=torch.channels_last)
    vectors, block_m = step(config, y.element_size(), vectors=4 if residual is None else 2)
    launch(
        bn_act_kernel,
        (ceil_div(rows, config.block_m) * ceil_div(channels, config.block_c),),
        touched=(y, stats, residual, residual_stats, out, bits),
        flops=0,
        config=config,
        device=y.device,
        y_ptr=y,
        stats_ptr=stats,
        residual_ptr=residual,
        residual_stats_ptr=residual_stats,
        out_ptr=out,
        bits_ptr=bits,
        rows=rows,
        channels=channels,
        row_bytes=ceil_div(channels, 8),
        rows_per_tile=config.block_m,
        HAS_RESIDUAL=residual is not None,
        NORMALISE_RESIDUAL=residual_stats is not None,
        APPLY_RELU=relu,
        HAS_BITS=bits is not None,
        VECTORS=vectors,
        BLOCK_M=block_m,
        BLOCK_C=config.block_c,
    )
    return out
