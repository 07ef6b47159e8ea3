"""Launchers of the stem's BatchNorm, ReLU and max pool (3x3, stride 2, padding 1), forward and backward."""

from __future__ import annotations

from typing import Any

import torch

from ..kernels.stem_pool import stem_pool_grad_apply_kernel, stem_pool_grad_reduce_kernel, stem_pool_kernel
from ..plan.config import PassConfig
from ..plan.passes import ceil_div, next_power_of_2
from .check import accumulation_dtype, require_device, require_dtype, require_image, require_rows, triton_dtype
from .record import launch

MOST_TILES = 1024
"""The gradient's sums come in about this many tiles: enough programs for any GPU, few enough to merge quickly."""
MOST_STEPS = 8
"""At most so many blocks in one tile, however large the batch."""


def stem_pool(
    y: torch.Tensor, stats: torch.Tensor, config: PassConfig, *, keeps_index: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Max pool of relu(y * scale + shift): (out [N, C, P, Q] in y's dtype, index uint8, the tap r * 3 + s that won).

    Only backward reads the index: without ``keeps_index`` it is not written, and an empty tensor.

    ``y`` [N, C, H, W] is dense NHWC, ``stats`` [4, C] as ``bn_finalize`` gives them. Ties and NaN as in
    ``torch.nn.functional.max_pool2d``: the first maximum wins, NaN wins over numbers. ValueError on another layout.
    """
    require_image(y, y.shape, y, "y")
    _N, C, _H, _W = y.shape
    require_rows(stats, 4, C, y, "stats")
    out = torch.empty(pooled_shape(y), dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    index = torch.empty(0, dtype=torch.uint8, device=y.device)
    if keeps_index:
        index = torch.empty(out.shape, dtype=torch.uint8, device=y.device, memory_format=torch.channels_last)
    launch(
        stem_pool_kernel,
        grid(y, config),
        touched=(y, stats, out, index),
        flops=0,
        config=config,
        device=y.device,
        y_ptr=y,
        stats_ptr=stats,
        out_ptr=out,
        index_ptr=index if keeps_index else None,
        KEEPS_INDEX=keeps_index,
        **shape_arguments(y, config),
    )
    return out, index


def stem_pool_grad_reduce(
    dout: torch.Tensor,
    index: torch.Tensor,
    out: torch.Tensor,
    y: torch.Tensor,
    stats: torch.Tensor,
    config: PassConfig,
) -> torch.Tensor:
    """Partial sums [2, T, C] of dz and dz * (y - mean), dz the gradient at the normalised y, in the order of memory.

    ``dout``, ``index`` and ``out`` are [N, C, P, Q]; dz is formed, never stored. ValueError on another layout.
    """
    require_windows(dout, index, out, y)
    C = y.shape[1]
    require_rows(stats, 4, C, y, "stats")
    blocks, blocks_c = grid(y, config)
    steps = min(MOST_STEPS, next_power_of_2(max(1, ceil_div(blocks, MOST_TILES))))
    T = ceil_div(blocks, steps)
    tiles = torch.empty((2, T, C), dtype=accumulation_dtype(y.dtype), device=y.device)
    launch(
        stem_pool_grad_reduce_kernel,
        (T, blocks_c),
        touched=(dout, index, out, y, stats, tiles),
        flops=0,
        config=config,
        device=y.device,
        dout_ptr=dout,
        index_ptr=index,
        out_ptr=out,
        y_ptr=y,
        stats_ptr=stats,
        tiles_ptr=tiles,
        STEPS=steps,
        **shape_arguments(y, config),
    )
    return tiles


def stem_pool_grad_apply(
    dout: torch.Tensor,
    index: torch.Tensor,
    out: torch.Tensor,
    y: torch.Tensor,
    coeffs: torch.Tensor,
    config: PassConfig,
) -> torch.Tensor:
    """dy = A * dz + B * y + C [N, C, H, W] with dz formed again from the windows. ValueError on another layout."""
    require_windows(dout, index, out, y)
    require_rows(coeffs, 3, y.shape[1], y, "coeffs")
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    launch(
        stem_pool_grad_apply_kernel,
        grid(y, config),
        touched=(dout, index, out, y, coeffs, dy),
        flops=0,
        config=config,
        device=y.device,
        dout_ptr=dout,
        index_ptr=index,
        out_ptr=out,
        y_ptr=y,
        coeffs_ptr=coeffs,
        dy_ptr=dy,
        **shape_arguments(y, config),
    )
    return dy


def pooled_shape(y: torch.Tensor) -> tuple[int, int, int, int]:
    """The shape of the pool's output: [N, C, ceil(H / 2), ceil(W / 2)]."""
    N, C, H, W = y.shape
    return N, C, ceil_div(H, 2), ceil_div(W, 2)


def require_windows(dout: torch.Tensor, index: torch.Tensor, out: torch.Tensor, y: torch.Tensor) -> None:
    """ValueError unless all four are dense NHWC images that belong together."""
    require_image(y, y.shape, y, "y")
    require_image(dout, pooled_shape(y), y, "dout")
    require_image(out, pooled_shape(y), y, "out")
    require_image(index, pooled_shape(y), index, "index")
    require_dtype(index, torch.uint8, "index")
    require_device(y.device, index=index)


def grid(y: torch.Tensor, config: PassConfig) -> tuple[int, int]:
    """Blocks of output pixels, blocks of channels."""
    N, C, P, Q = pooled_shape(y)
    return ceil_div(N * P * Q, config.block_m), ceil_div(C, config.block_c)


def shape_arguments(y: torch.Tensor, config: PassConfig) -> dict[str, Any]:
    """What all three kernels are told of the shape."""
    N, C, P, Q = pooled_shape(y)
    return {
        "M": N * P * Q,
        "H": y.shape[2],
        "W": y.shape[3],
        "C": C,
        "P": P,
        "Q": Q,
        "BLOCK_M": config.block_m,
        "BLOCK_C": config.block_c,
        "ACC": triton_dtype(y.dtype),
    }
