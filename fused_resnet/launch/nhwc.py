"""Launcher of the copy that brings a gradient into NHWC memory."""

from __future__ import annotations

import torch

from ..kernels.nhwc import nhwc_kernel
from ..plan.passes import ceil_div, transpose_config
from ..plan.target import interprets
from .record import launch


def nhwc(t: torch.Tensor) -> torch.Tensor:
    """``t`` [N, C, H, W] with dense NHWC memory: itself if it has that, else a copy.

    An average pooling's gradient comes in NCHW memory, that of a sum expanded (strides 0): PyTorch's own copy takes
    several times what the bytes need.
    """
    if t.is_contiguous(memory_format=torch.channels_last):
        return t
    out = torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=torch.channels_last)
    n, channels, height, width = t.shape
    pixels = height * width
    flat = t.flatten(2)  # a view, unless it is of a slice
    config = transpose_config(pixels, channels, interpreter=interprets(t.device))
    launch(
        nhwc_kernel,
        (n * ceil_div(pixels, config.block_m) * ceil_div(channels, config.block_c),),
        touched=(t, out),
        flops=0,
        config=config,
        device=t.device,
        x_ptr=flat,
        out_ptr=out,
        channels=channels,
        pixels=pixels,
        stride_n=flat.stride(0),
        stride_c=flat.stride(1),
        stride_p=flat.stride(2),
        BLOCK_P=config.block_m,
        BLOCK_C=config.block_c,
    )
    return out
