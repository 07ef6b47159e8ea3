"""Launches the weight gradient of a 3x3 convolution of stride 1 that reads boxes of pixels."""

from __future__ import annotations

import torch

from ..kernels.box_wgrad import box_wgrad_kernel
from ..plan.box import any_box
from ..plan.config import GemmConfig
from ..plan.passes import ceil_div
from ..plan.problem import ConvProblem
from .box_conv import image_descriptor
from .check import accumulation_dtype, dot_precision, require_image, require_problem, triton_dtype
from .parts import add_parts
from .record import launch


def box_wgrad(
    x: torch.Tensor, dy: torch.Tensor, problem: ConvProblem, config: GemmConfig, *, out_dtype: torch.dtype
) -> torch.Tensor:
    """The gradient of a 3x3 convolution's weight, [Co, Ci, 3, 3] in channels_last memory and ``out_dtype``.

    ``x`` [N, Ci, H, W] and ``dy`` [N, Co, H, W] are dense NHWC of one dtype. ``config.row_taps`` as in conv_wgrad.
    Raises ValueError for another geometry or layout.
    """
    p = problem
    require_problem(p, x.dtype)
    if not p.is_same_3x3:
        raise ValueError(f"the box kernels take 3x3 filters of stride 1 and padding 1, not {p}")
    if config.row_taps not in (1, 3, 9):
        raise ValueError(f"box_wgrad: row_taps is 1, 3 or 9, not {config.row_taps}")
    require_image(x, (p.N, p.Ci, p.H, p.W), x, "x")
    require_image(dy, (p.N, p.Co, p.H, p.W), x, "dy")

    dw = torch.empty((p.Co, p.Ci, 3, 3), dtype=out_dtype, device=x.device, memory_format=torch.channels_last)
    acc = accumulation_dtype(x.dtype)
    elements = 9 * p.Co * p.Ci
    partial = dw if config.split == 1 else torch.empty((config.split, elements), dtype=acc, device=x.device)
    box = any_box(p, config.block_k)
    boxes = box.count(p)
    tiles = ceil_div(p.Co, config.block_m) * ceil_div(p.Ci, config.block_n) * (9 // config.row_taps)
    launch(
        box_wgrad_kernel,
        (tiles, config.split),
        touched=(x, dy, partial),
        flops=p.flops,
        config=config,
        device=x.device,
        x_desc=image_descriptor(x, box, config.block_n),
        dy_desc=image_descriptor(dy, box, config.block_m),
        dw_ptr=partial,
        boxes=boxes,
        boxes_h=ceil_div(p.H, box.h),
        boxes_w=ceil_div(p.W, box.w),
        Ci=p.Ci,
        Co=p.Co,
        boxes_per_split=ceil_div(boxes, config.split),
        TAPS=config.row_taps,
        BOX_N=box.n,
        BOX_H=box.h,
        BOX_W=box.w,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        ACC=triton_dtype(acc),
        PRECISION=dot_precision(x.dtype),
    )
    if config.split > 1:
        add_parts(partial, dw)
    return dw
