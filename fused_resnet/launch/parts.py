"""The last step of a reduction that was split into parts."""

from __future__ import annotations

import torch

from ..kernels.conv_wgrad import conv_wgrad_reduce_kernel
from ..plan.config import PassConfig
from ..plan.passes import ceil_div, next_power_of_2
from .check import triton_dtype
from .record import launch


def add_parts(partial: torch.Tensor, total: torch.Tensor) -> None:
    """``total`` [elements] = the sum of ``partial`` [split, elements] over its parts, always in the same order."""
    split, elements = partial.shape
    # Few elements with many parts, or the reverse: 2048 partials a program either way.
    block_s = min(32, next_power_of_2(split))
    config = PassConfig(block_m=block_s, block_c=2048 // block_s)
    launch(
        conv_wgrad_reduce_kernel,
        (ceil_div(elements, config.block_c),),
        touched=(partial, total),
        flops=0,
        config=config,
        device=partial.device,
        partial_ptr=partial,
        dw_ptr=total,
        split=split,
        elements=elements,
        BLOCK_S=config.block_m,
        BLOCK_N=config.block_c,
        ACC=triton_dtype(partial.dtype),
    )
