"""Launcher of the weight gradient."""

from __future__ import annotations

import torch

from ..kernels.conv_wgrad import conv_wgrad_kernel
from ..plan.config import GemmConfig
from ..plan.passes import ceil_div
from ..plan.problem import ConvProblem
from .box_wgrad import box_wgrad
from .check import accumulation_dtype, dot_precision, require_image, require_mean, require_rows, triton_dtype
from .parts import add_parts
from .record import launch


def conv_wgrad(
    x: torch.Tensor,
    dy: torch.Tensor,
    problem: ConvProblem,
    config: GemmConfig,
    *,
    input_affine: torch.Tensor | None = None,
    input_mean: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
    coeffs: torch.Tensor | None = None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The gradient of a convolution's weight, [Co, Ci, R, S] in channels_last memory and ``out_dtype``.

    ``x`` [N, Ci, H, W] and ``dy`` [N, Co, P, Q] (``y`` too) share one dtype and are dense NHWC. ``input_affine``
    [2, Ci] makes relu(x * scale + shift) the input; ``coeffs`` [3, Co] makes A * dy + B * y + C the gradient, A * dy
    without ``y``. ``input_mean`` [Ci], of a 1x1 filter and float32 or float64 data, is subtracted from that input. They
    are float32 (float64 for float64 data). Meant for 1x1 filters, where no value is formed twice
    per tile. ``config.row_taps`` = 3 gives one program the three taps of a row of a filter three wide: a third of the
    loads of dy for three times the accumulators. ``config.form`` "box": see box_wgrad. Raises ValueError on groups, on
    another layout, on ``y`` without ``coeffs``.
    """
    if config.form != "rows":
        if not (input_affine is None and input_mean is None and y is None and coeffs is None):
            raise ValueError("in boxes both operands are read as they are: nothing is formed on load")
        return box_wgrad(x, dy, problem, config, out_dtype=out_dtype)
    if problem.groups != 1:
        raise ValueError(f"conv_wgrad takes one group, not {problem.groups}")
    row_taps = config.row_taps
    if row_taps not in (1, 3) or (row_taps == 3 and problem.S != 3):
        raise ValueError(f"conv_wgrad: row_taps is 1, or 3 for a filter three wide; got {row_taps} for {problem.S}")
    if y is not None and coeffs is None:
        raise ValueError("conv_wgrad: y has no use without coeffs")
    require_image(x, (problem.N, problem.Ci, problem.H, problem.W), x, "x")
    grad_shape = (problem.N, problem.Co, problem.P, problem.Q)
    require_image(dy, grad_shape, x, "dy")
    if y is not None:
        require_image(y, grad_shape, x, "y")
    if input_affine is not None:
        require_rows(input_affine, 2, problem.Ci, x, "input_affine")
    if coeffs is not None:
        require_rows(coeffs, 3, problem.Co, x, "coeffs")

    if input_mean is not None:
        require_mean(input_mean, x)
        if not problem.is_pointwise:
            raise ValueError("conv_wgrad: input_mean goes with a 1x1 filter, whose input is never padded")

    elements = problem.Co * problem.taps * problem.Ci
    steps = ceil_div(ceil_div(problem.M, config.block_k), config.split)
    dw = torch.empty(
        (problem.Co, problem.Ci, problem.R, problem.S),
        dtype=out_dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    partial_dtype = accumulation_dtype(x.dtype)
    acc = triton_dtype(x.dtype)
    partial = dw if config.split == 1 else torch.empty((config.split, elements), dtype=partial_dtype, device=x.device)

    tiles_co, tiles_ci = ceil_div(problem.Co, config.block_m), ceil_div(problem.Ci, config.block_n)
    tiles = tiles_co * tiles_ci * (problem.taps // row_taps)
    sampled = problem.M * problem.Ci * x.element_size() if problem.is_pointwise else x
    launch(
        conv_wgrad_kernel,
        (tiles, config.split),
        touched=(sampled, dy, y, input_affine, input_mean, coeffs, partial),
        flops=problem.flops,
        config=config,
        device=x.device,
        x_ptr=x,
        dy_ptr=dy,
        y_ptr=dy if y is None else y,
        affine_ptr=input_affine,
        mean_ptr=input_mean,
        coeffs_ptr=coeffs,
        dw_ptr=partial,
        M=problem.M,
        H=problem.H,
        W=problem.W,
        Ci=problem.Ci,
        P=problem.P,
        Q=problem.Q,
        Co=problem.Co,
        S=problem.S,
        stride_h=problem.stride[0],
        stride_w=problem.stride[1],
        padding_h=problem.padding[0],
        padding_w=problem.padding[1],
        dilation_h=problem.dilation[0],
        dilation_w=problem.dilation[1],
        rows_per_split=steps * config.block_k,
        TAPS=problem.taps,
        ROW_TAPS=row_taps,
        SAME_GRID=problem.stride == (1, 1) and (problem.P, problem.Q) == (problem.H, problem.W),
        HAS_PADDING=problem.padding != (0, 0),
        HAS_AFFINE=input_affine is not None,
        HAS_MEAN=input_mean is not None,
        HAS_COEFFS=coeffs is not None,
        HAS_Y=y is not None,
        EVEN_K=problem.M % config.block_k == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        ACC=acc,
        INPUT_PRECISION=dot_precision(),
    )
    if config.split > 1:
        add_parts(partial, dw)
    return dw
