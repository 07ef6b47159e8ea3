"""Launches the 3x3 convolution of stride 1 that reads boxes of pixels: forward, and the gradient of the input."""

from __future__ import annotations

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ..kernels.box_conv import box_conv_kernel, walk_conv_kernel
from ..plan.box import Box, exact_box, row_box, why_not_boxes, why_not_stored
from ..plan.config import GemmConfig
from ..plan.passes import ceil_div
from ..plan.problem import ConvProblem
from .check import accumulation_dtype, dot_precision, require_image, require_problem, require_rows, triton_dtype
from .record import launch
from .tiles import StatTiles


def aligned(t: torch.Tensor) -> torch.Tensor:
    """``t``, or a copy of it where it begins at no multiple of 16 bytes: a view into a larger buffer may."""
    return t if t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.channels_last)


def image_descriptor(t: torch.Tensor, box: Box, channels: int) -> TensorDescriptor:
    """Of a dense NHWC tensor [N, C, H, W], read by ``box`` and ``channels``."""
    n, c, h, w = t.shape
    return TensorDescriptor(aligned(t), [n, h, w, c], [h * w * c, w * c, c, 1], [*box, channels])


def box_conv_fprop(
    x: torch.Tensor, weight: torch.Tensor, problem: ConvProblem, config: GemmConfig, *, stats: bool = False
) -> tuple[torch.Tensor, StatTiles | None]:
    """y = conv(x, weight) [N, Co, H, W], and with ``stats`` the statistics of y, box by box.

    ``x`` [N, Ci, H, W] and ``weight`` [Co, Ci, 3, 3] are dense NHWC of one dtype. Raises ValueError for a filter or
    geometry other than 3x3, stride 1, padding 1, for input channels that are no multiple of ``config.block_k``, for
    output channels that leave copies of their last tile empty, and where no box of ``config.block_m`` pixels tiles the
    batch. ``config.form`` is "box", or "walk" where one step holds all input channels.
    """
    require_image(x, (problem.N, problem.Ci, problem.H, problem.W), x, "x")
    y, tiles = _launch(x, weight, problem, config, problem.Ci, problem.Co, stats=stats)
    return y, None if tiles is None else StatTiles(tiles, config.block_m, problem.M)


def box_conv_dgrad(
    dy: torch.Tensor,
    weight: torch.Tensor,
    problem: ConvProblem,
    config: GemmConfig,
    *,
    mask_input: torch.Tensor | None = None,
    mask_stats: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx [N, Ci, H, W], and with ``mask_input`` the partial sums [2, T, Ci] of the gradient below its ReLU.

    ``mask_input`` and ``mask_stats`` are those of conv_dgrad. Raises ValueError as :func:`box_conv_fprop` does.
    """
    p = problem
    require_image(dy, (p.N, p.Co, p.H, p.W), dy, "dy")
    if mask_input is not None:
        require_image(mask_input, (p.N, p.Ci, p.H, p.W), dy, "mask_input")
    if mask_stats is not None:
        if mask_input is None:
            raise ValueError("mask_stats goes with mask_input")
        require_rows(mask_stats, 4, p.Ci, dy, "mask_stats")
    return _launch(dy, weight, p, config, p.Co, p.Ci, flip=True, mask_input=mask_input, mask_stats=mask_stats)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    problem: ConvProblem,
    config: GemmConfig,
    reduced: int,
    channels: int,
    *,
    flip: bool = False,
    stats: bool = False,
    mask_input: torch.Tensor | None = None,
    mask_stats: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    p = problem
    require_problem(p, x.dtype)
    require_image(weight, (p.Co, p.Ci, p.R, p.S), x, "weight")
    walks = config.form == "walk"
    reason = why_not_boxes(p, config.block_m, reduced, config.block_k, walks=walks)
    reason = reason or why_not_stored(channels, config.block_n, x.element_size())
    if reason:
        raise ValueError(reason)
    box = row_box(p, config.block_m) if walks else exact_box(p, config.block_m)
    assert box is not None
    acc = accumulation_dtype(x.dtype)
    num_m = p.M // config.block_m
    num_n = ceil_div(channels, config.block_n)
    tiled = stats or mask_input is not None
    tiles = torch.empty((2, num_m, channels), dtype=acc, device=x.device) if tiled else None
    filters = [config.block_k, config.block_n] if flip else [config.block_n, config.block_k]
    own: dict[str, int | bool]
    spare = 0
    if walks:
        per_image = p.H * (p.W // box.w)
        steps = p.N // box.n * (p.W // box.w) * (p.H + 1)
        steps_per_walk = ceil_div(steps, config.split)
        programs = ceil_div(steps, steps_per_walk)
        spare = ceil_div(programs, per_image) * box.n  # see the kernel
        own = {"H": p.H, "steps": steps, "steps_per_walk": steps_per_walk}
    else:
        programs = num_m
        own = {"boxes_h": p.H // box.h, "K": reduced, "TRANSPOSED": config.transposed, "BOX_H": box.h}
    shape = (p.N + spare, channels, p.H, p.W)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    launch(
        walk_conv_kernel if walks else box_conv_kernel,
        (programs * num_n,),
        touched=(x, weight, y[: p.N], mask_input, mask_stats, tiles),
        flops=p.flops,
        config=config,
        device=x.device,
        x_desc=image_descriptor(x, box, config.block_k),
        w_desc=TensorDescriptor(aligned(weight), [p.Co, 9 * p.Ci], [9 * p.Ci, 1], filters),
        y_desc=image_descriptor(y, box, config.block_n),
        mask_desc=None if mask_input is None else image_descriptor(mask_input, box, config.block_n),
        mask_stats_ptr=mask_stats,
        tiles_ptr=tiles,
        boxes_w=p.W // box.w,
        C=channels,
        columns=p.Ci,
        num_m=num_m,
        num_n=num_n,
        FLIP=flip,
        HAS_STATS=stats,
        HAS_MASK=mask_input is not None,
        HAS_MASK_STATS=mask_stats is not None,
        ACC=triton_dtype(acc),
        PRECISION=dot_precision(x.dtype),
        BOX_N=box.n,
        BOX_W=box.w,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        **own,
    )
    return y[: p.N], tiles
