"""Launches the convolution's gradient with respect to its input."""

from __future__ import annotations

import math

import torch

from ..kernels.conv_dgrad import conv_dgrad_kernel
from ..plan.config import GemmConfig
from ..plan.passes import ceil_div
from ..plan.problem import ConvProblem, Pair
from .bits import require_bits
from .box_conv import box_conv_dgrad
from .check import accumulation_dtype, dot_precision, require_image, require_problem, require_rows, triton_dtype
from .record import launch


def require_residual(
    residual: torch.Tensor | None, stride: Pair, bits: torch.Tensor | None, problem: ConvProblem, like: torch.Tensor
) -> None:
    """What is added to a gradient of the input, as :func:`conv_dgrad` has it. ValueError if it is not."""
    p = problem
    if residual is not None:
        size = (ceil_div(p.H, stride[0]), ceil_div(p.W, stride[1]))
        require_image(residual, (p.N, p.Ci, *size), like, "residual")
    if bits is not None:
        if residual is None or stride != (1, 1) or p.stride != (1, 1):
            raise ValueError("residual_bits goes with a residual of every pixel, at stride 1")
        require_bits(bits, residual.shape, like.device)


def conv_dgrad(
    dy: torch.Tensor,
    weight: torch.Tensor,
    problem: ConvProblem,
    config: GemmConfig,
    *,
    y: torch.Tensor | None = None,
    coeffs: torch.Tensor | None = None,
    mask_input: torch.Tensor | None = None,
    mask_stats: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    residual_stride: Pair = (1, 1),
    residual_bits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx [N, Ci, H, W], and with ``mask_input`` the partial sums [2, T, Ci] of the gradient below its ReLU.

    ``dy`` [N, Co, P, Q] and ``weight`` [Co, Ci, R, S] are dense NHWC of one dtype. ``coeffs`` [3, Co] makes the
    prologue A*dy, with ``y`` [N, Co, P, Q] (1x1 without padding only) A*dy + B*y + C. ``mask_input`` [N, Ci, H,
    W] zeroes the result where mask_input*scale + shift <= 0 (``mask_stats`` [4, Ci]; without, where mask_input
    <= 0); the tiles hold sum dz and sum dz*(mask_input - mean) (without mask_stats: zero). Instead of it,
    ``residual`` is added: [N, Ci, H, W], or [N, Ci, ceil(H/s_h), ceil(W/s_w)] at every ``residual_stride``-th
    pixel; of one of every pixel with ``residual_bits`` (see bits.py) what has its bit set. ``config.form`` "box" and
    "walk": see box_conv. Raises ValueError for anything else.
    """
    p = problem
    if config.form != "rows":
        if not (y is None and coeffs is None and residual is None):
            raise ValueError("in boxes a gradient is masked at most: no prologue, no residual")
        return box_conv_dgrad(dy, weight, p, config, mask_input=mask_input, mask_stats=mask_stats)
    require_problem(p, dy.dtype)
    require_image(dy, (p.N, p.Co, p.P, p.Q), dy, "dy")
    require_image(weight, (p.Co, p.Ci, p.R, p.S), dy, "weight")
    if coeffs is not None:
        require_rows(coeffs, 3, p.Co, dy, "coeffs")
    if y is not None:
        if coeffs is None or not p.is_pointwise:
            raise ValueError("y goes with coeffs, and only a 1x1 convolution without padding takes it")
        require_image(y, (p.N, p.Co, p.P, p.Q), dy, "y")
    if mask_input is not None:
        if residual is not None:
            raise ValueError("mask_input and residual exclude each other")
        require_image(mask_input, (p.N, p.Ci, p.H, p.W), dy, "mask_input")
    if mask_stats is not None:
        if mask_input is None:
            raise ValueError("mask_stats goes with mask_input")
        require_rows(mask_stats, 4, p.Ci, dy, "mask_stats")
    require_residual(residual, residual_stride, residual_bits, p, dy)

    acc = accumulation_dtype(dy.dtype)
    # Every parity class of input pixels has as many tiles as the largest, the first.
    s_h, s_w = p.stride
    largest = p.N * ceil_div(p.H, s_h) * ceil_div(p.W, s_w)
    num_m = s_h * s_w * ceil_div(largest, config.block_m)
    num_n = ceil_div(p.Ci, config.block_n)
    dx = torch.empty((p.N, p.Ci, p.H, p.W), dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    tiles = None if mask_input is None else torch.empty((2, num_m, p.Ci), dtype=acc, device=dy.device)
    launch(
        conv_dgrad_kernel,
        (num_m * num_n,),
        touched=(dy, weight, dx, y, coeffs, mask_input, mask_stats, residual, residual_bits, tiles),
        flops=p.flops,
        config=config,
        device=dy.device,
        dy_ptr=dy,
        y_ptr=y,
        w_ptr=weight,
        dx_ptr=dx,
        coeffs_ptr=coeffs,
        mask_input_ptr=mask_input,
        mask_stats_ptr=mask_stats,
        residual_ptr=residual,
        residual_bits_ptr=residual_bits,
        tiles_ptr=tiles,
        N=p.N,
        H=p.H,
        W=p.W,
        P=p.P,
        Q=p.Q,
        Ci=p.Ci,
        Co=p.Co,
        row_bytes=ceil_div(p.Ci, 8),
        num_m=num_m,
        num_n=num_n,
        R=p.R,
        S=p.S,
        STRIDE_H=p.stride[0],
        STRIDE_W=p.stride[1],
        PADDING_H=p.padding[0],
        PADDING_W=p.padding[1],
        DILATION_H=p.dilation[0],
        DILATION_W=p.dilation[1],
        STEP_R=p.stride[0] // math.gcd(p.stride[0], p.dilation[0]),
        STEP_S=p.stride[1] // math.gcd(p.stride[1], p.dilation[1]),
        RESIDUAL_STRIDE_H=residual_stride[0],
        RESIDUAL_STRIDE_W=residual_stride[1],
        HAS_COEFFS=coeffs is not None,
        HAS_Y=y is not None,
        HAS_MASK=mask_input is not None,
        HAS_MASK_STATS=mask_stats is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_RESIDUAL_BITS=residual_bits is not None,
        PREFETCH=config.prefetch and (mask_input is not None or residual is not None),
        EVEN_K=p.Co % config.block_k == 0,
        EVEN_N=p.Ci % config.block_n == 0,
        TRANSPOSED=config.transposed,
        ACC=triton_dtype(acc),
        PRECISION=dot_precision(dy.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    return dx, tiles
