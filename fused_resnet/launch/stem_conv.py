"""Launches the convolution of images of few channels: the padded copy, then forward or the weight gradient."""

from __future__ import annotations

import torch

from ..kernels.stem_conv import stem_conv_fprop_kernel, stem_conv_wgrad_kernel, stem_pad_kernel
from ..plan.config import GemmConfig, PassConfig
from ..plan.passes import ceil_div, next_power_of_2
from ..plan.problem import ConvProblem
from .check import DTYPES, accumulation_dtype, dot_precision, require_image, triton_dtype
from .parts import add_parts
from .record import launch
from .tiles import StatTiles

Pair = tuple[int, int]


def stem_conv_fprop(
    x: torch.Tensor, weight: torch.Tensor, problem: ConvProblem, config: GemmConfig, *, stats: bool = False
) -> tuple[torch.Tensor, StatTiles | None]:
    """y = conv(x, weight) [N, Co, P, Q], and with ``stats`` the statistics of y per M tile.

    ``x`` [N, Ci, H, W] and ``weight`` [Co, Ci, R, S] are dense NHWC of one dtype. ``config.block_k`` is a multiple of
    ``problem.run``. Raises ValueError unless ``problem.is_stem``, and for other shapes, dtypes or layouts.
    """
    p = problem
    _require(p, x)
    require_image(weight, (p.Co, p.Ci, p.R, p.S), x, "weight")
    if config.block_k % p.run:
        raise ValueError(f"a step takes whole rows of the filter, {p.run} elements each; block_k is {config.block_k}")
    padded_x = _padded_image(x, p)
    padded_w = _padded(weight, (p.R, p.run // 4), (0, 0))
    acc = accumulation_dtype(x.dtype)
    num_m, num_n = ceil_div(p.M, config.block_m), ceil_div(p.Co, config.block_n)
    y = torch.empty((p.N, p.Co, p.P, p.Q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    tiles = torch.empty((2, num_m, p.Co), dtype=acc, device=x.device) if stats else None
    launch(
        stem_conv_fprop_kernel,
        (num_m * num_n,),
        touched=(padded_x, padded_w, y, tiles),
        flops=p.flops,
        config=config,
        device=x.device,
        x_ptr=padded_x,
        w_ptr=padded_w,
        y_ptr=y,
        tiles_ptr=tiles,
        M=p.M,
        P=p.P,
        Q=p.Q,
        Co=p.Co,
        padded_h=padded_x.shape[1],
        pairs=padded_x.shape[2] // 2,
        num_m=num_m,
        num_n=num_n,
        R=p.R,
        RUN=p.run,
        STRIDE_H=p.stride[0],
        STRIDE_W=p.stride[1],
        DILATION_H=p.dilation[0],
        HAS_STATS=stats,
        ACC=triton_dtype(acc),
        PRECISION=dot_precision(x.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    return y, None if tiles is None else StatTiles(tiles, config.block_m, p.M)


def stem_conv_wgrad(
    x: torch.Tensor, dy: torch.Tensor, problem: ConvProblem, config: GemmConfig, *, out_dtype: torch.dtype
) -> torch.Tensor:
    """The gradient of the weight, [Co, Ci, R, S] in channels_last memory and ``out_dtype``.

    ``x`` [N, Ci, H, W] and ``dy`` [N, Co, P, Q] share one dtype and are dense NHWC. ``config.block_n`` counts elements
    of the R runs of a filter: from R * ``problem.run`` on, dy is read once. ValueError as for :func:`stem_conv_fprop`.
    """
    p = problem
    _require(p, x)
    require_image(dy, (p.N, p.Co, p.P, p.Q), x, "dy")
    padded_x = _padded_image(x, p)
    acc = accumulation_dtype(x.dtype)
    elements = p.Co * p.taps * p.Ci
    dw = torch.empty((p.Co, p.Ci, p.R, p.S), dtype=out_dtype, device=x.device, memory_format=torch.channels_last)
    partial = dw if config.split == 1 else torch.empty((config.split, elements), dtype=acc, device=x.device)
    tiles = ceil_div(p.Co, config.block_m) * ceil_div(p.R * p.run, config.block_n)
    launch(
        stem_conv_wgrad_kernel,
        (tiles, config.split),
        touched=(padded_x, dy, partial),
        flops=p.flops,
        config=config,
        device=x.device,
        x_ptr=padded_x,
        dy_ptr=dy,
        dw_ptr=partial,
        M=p.M,
        P=p.P,
        Q=p.Q,
        Co=p.Co,
        padded_h=padded_x.shape[1],
        pairs=padded_x.shape[2] // 2,
        rows_per_split=ceil_div(ceil_div(p.M, config.block_k), config.split) * config.block_k,
        stride_w=p.stride[1],
        CHANNELS=p.Ci,
        R=p.R,
        S=p.S,
        RUN=p.run,
        STRIDE_H=p.stride[0],
        DILATION_H=p.dilation[0],
        EVEN_K=p.M % config.block_k == 0,
        ACC=triton_dtype(acc),
        PRECISION=dot_precision(x.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    if config.split > 1:
        add_parts(partial, dw)
    return dw


def _require(p: ConvProblem, x: torch.Tensor) -> None:
    if not p.is_stem:
        raise ValueError(f"stem_conv takes wider filters over images of few channels, got {p}")
    if DTYPES.get(p.dtype) != x.dtype:
        raise ValueError(f"the problem is described in {p.dtype}, the tensors are {x.dtype}")
    if p.P < 1 or p.Q < 1:
        raise ValueError(f"the filter does not fit into the padded input: {p}")
    padded_h, padded_w = _padded_size(p)
    if max(p.M, p.N * max(p.H * p.W, padded_h * padded_w)) >= 2**31:
        raise ValueError(f"the kernels count pixels in 32 bits, too many for them: {p}")
    require_image(x, (p.N, p.Ci, p.H, p.W), x, "x")


def _padded_size(p: ConvProblem) -> Pair:
    """What the windows reach, a row as far as the last run goes: an even number of pixels."""
    height = (p.P - 1) * p.stride[0] + (p.R - 1) * p.dilation[0] + 1
    width = (p.Q - 1) * p.stride[1] + p.run // 4
    return height, width + width % 2


def _padded_image(x: torch.Tensor, p: ConvProblem) -> torch.Tensor:
    return _padded(x, _padded_size(p), p.padding)


def _padded(t: torch.Tensor, size: Pair, padding: Pair) -> torch.Tensor:
    """``t`` [n, c, h, w] as [n, *size, 4], its first pixel at ``padding``; cut off where ``size`` ends."""
    n, c, h, w = t.shape
    height, width = size
    padded = torch.empty((n, height, width, 4), dtype=t.dtype, device=t.device)
    block_c = min(1024, next_power_of_2(width * 4))
    tile = PassConfig(block_m=2048 // block_c, block_c=block_c)  # 16 elements a thread
    launch(
        stem_pad_kernel,
        (ceil_div(n * height, tile.block_m), ceil_div(width * 4, tile.block_c)),
        touched=(t, padded),
        flops=0,
        config=tile,
        device=t.device,
        x_ptr=t,
        padded_ptr=padded,
        rows=n * height,
        H=h,
        W=w,
        padded_h=height,
        pairs=width // 2,
        PADDING_H=padding[0],
        PADDING_W=padding[1],
        CHANNELS=c,
        BLOCK_M=tile.block_m,
        BLOCK_C=tile.block_c,
    )
    return padded
