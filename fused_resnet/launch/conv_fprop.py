"""Launches the forward convolution."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.conv_fprop import conv_fprop_kernel
from ..plan.config import GemmConfig
from ..plan.passes import ceil_div
from ..plan.problem import ConvProblem
from .bits import require_bits
from .box_conv import box_conv_fprop
from .check import accumulation_dtype, dot_precision, require_image, require_problem, require_rows, triton_dtype
from .record import launch
from .tiles import StatTiles


class Projection(NamedTuple):
    """A second 1x1 convolution: conv(x, weight)*scale + shift, with ``affine`` [2, Co], joins before the ReLU."""

    x: torch.Tensor
    weight: torch.Tensor
    problem: ConvProblem
    affine: torch.Tensor

    @property
    def sampled_bytes(self) -> int:
        return self.problem.M * self.problem.Ci * self.x.element_size()


def conv_fprop(
    x: torch.Tensor,
    weight: torch.Tensor,
    problem: ConvProblem,
    config: GemmConfig,
    *,
    input_affine: torch.Tensor | None = None,
    stats: bool = False,
    output_affine: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    residual_affine: torch.Tensor | None = None,
    projection: Projection | None = None,
    relu: bool = False,
    bits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, StatTiles | None]:
    """y = epilogue(conv(prologue(x), weight)) [N, Co, P, Q], and with ``stats`` the statistics of y per M tile.

    ``x`` [N, Ci, H, W] and ``weight`` [Co, Ci, R, S] are dense NHWC of one dtype. ``input_affine`` [2, Ci] (scale,
    shift) makes the prologue relu(x*scale + shift); ``output_affine`` [2, Co], ``residual`` [N, Co, P, Q] (with
    ``residual_affine`` [2, Co] residual*scale + shift), ``projection`` and ``relu`` make the epilogue, in this order.
    ``bits`` (see :func:`empty_bits`) takes up the ReLU's mask. ``config.form`` "box" and "walk": see box_conv. Raises
    ValueError for other shapes, dtypes, layouts, groups, or more than 63 taps.
    """
    p = problem
    if config.form != "rows":
        others = (input_affine, output_affine, residual, residual_affine, projection, bits)
        if relu or any(other is not None for other in others):
            raise ValueError("in boxes a convolution takes statistics at most: no prologue, no other epilogue")
        return box_conv_fprop(x, weight, p, config, stats=stats)
    require_problem(p, x.dtype)
    require_image(x, (p.N, p.Ci, p.H, p.W), x, "x")
    require_image(weight, (p.Co, p.Ci, p.R, p.S), x, "weight")
    if input_affine is not None:
        require_rows(input_affine, 2, p.Ci, x, "input_affine")
    if output_affine is not None:
        require_rows(output_affine, 2, p.Co, x, "output_affine")
    if residual is not None:
        require_image(residual, (p.N, p.Co, p.P, p.Q), x, "residual")
    if residual_affine is not None:
        if residual is None:
            raise ValueError("residual_affine goes with residual")
        require_rows(residual_affine, 2, p.Co, x, "residual_affine")
    if projection is not None:
        _require_projection(projection, p, x)
    if bits is not None:
        if not relu:
            raise ValueError("bits are the mask of a ReLU")
        require_bits(bits, (p.N, p.Co, p.P, p.Q), x.device)

    acc = accumulation_dtype(x.dtype)
    num_m = ceil_div(p.M, config.block_m)
    num_n = ceil_div(p.Co, config.block_n)
    y = torch.empty((p.N, p.Co, p.P, p.Q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    tiles = torch.empty((2, num_m, p.Co), dtype=acc, device=x.device) if stats else None
    launch(
        conv_fprop_kernel,
        (num_m * num_n,),
        touched=(
            # A strided 1x1 convolution reads only the pixels that it samples.
            p.M * p.Ci * x.element_size() if p.is_pointwise else x,
            weight,
            y,
            input_affine,
            output_affine,
            residual,
            residual_affine,
            *((projection.sampled_bytes, projection.weight, projection.affine) if projection else ()),
            tiles,
            bits,
        ),
        flops=p.flops + (projection.problem.flops if projection else 0),
        config=config,
        device=x.device,
        x_ptr=x,
        w_ptr=weight,
        y_ptr=y,
        input_affine_ptr=input_affine,
        output_affine_ptr=output_affine,
        residual_ptr=residual,
        residual_affine_ptr=residual_affine,
        projection_x_ptr=projection.x if projection else None,
        projection_w_ptr=projection.weight if projection else None,
        projection_affine_ptr=projection.affine if projection else None,
        tiles_ptr=tiles,
        bits_ptr=bits,
        M=p.M,
        H=p.H,
        W=p.W,
        P=p.P,
        Q=p.Q,
        Ci=p.Ci,
        Co=p.Co,
        num_m=num_m,
        num_n=num_n,
        projection_H=projection.problem.H if projection else 1,
        projection_W=projection.problem.W if projection else 1,
        projection_Ci=projection.problem.Ci if projection else 1,
        R=p.R,
        S=p.S,
        STRIDE_H=p.stride[0],
        STRIDE_W=p.stride[1],
        PADDING_H=p.padding[0],
        PADDING_W=p.padding[1],
        DILATION_H=p.dilation[0],
        DILATION_W=p.dilation[1],
        HAS_INPUT_AFFINE=input_affine is not None,
        HAS_OUTPUT_AFFINE=output_affine is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_RESIDUAL_AFFINE=residual_affine is not None,
        HAS_PROJECTION=projection is not None,
        PROJECTION_STRIDE_H=projection.problem.stride[0] if projection else 1,
        PROJECTION_STRIDE_W=projection.problem.stride[1] if projection else 1,
        PROJECTION_EVEN_K=projection is not None and projection.problem.Ci % config.block_k == 0,
        APPLY_RELU=relu,
        HAS_STATS=stats,
        HAS_BITS=bits is not None,
        EVEN_K=p.Ci % config.block_k == 0,
        TRANSPOSED=config.transposed,
        ACC=triton_dtype(acc),
        PRECISION=dot_precision(x.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    return y, None if tiles is None else StatTiles(tiles, config.block_m, p.M)


def _require_projection(projection: Projection, problem: ConvProblem, x: torch.Tensor) -> None:
    p = projection.problem
    require_problem(p, x.dtype)
    if not p.is_pointwise or (p.N, p.P, p.Q, p.Co) != (problem.N, problem.P, problem.Q, problem.Co):
        raise ValueError(f"a projection is a 1x1 convolution with the outputs of the other, {problem}; got {p}")
    require_image(projection.x, (p.N, p.Ci, p.H, p.W), x, "projection.x")
    require_image(projection.weight, (p.Co, p.Ci, 1, 1), x, "projection.weight")
    require_rows(projection.affine, 2, p.Co, x, "projection.affine")
