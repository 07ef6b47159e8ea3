"""Launches both gradients of a 1x1 convolution in one kernel."""

from __future__ import annotations

import torch

from ..kernels.conv_pair import conv_pair_kernel
from ..plan.config import GemmConfig
from ..plan.passes import ceil_div
from ..plan.problem import ConvProblem, Pair
from .check import accumulation_dtype, dot_precision, require_image, require_problem, require_rows, triton_dtype
from .conv_dgrad import require_residual
from .parts import add_parts
from .record import launch


def conv_pair(
    x: torch.Tensor,
    dz: torch.Tensor,
    y: torch.Tensor,
    coeffs: torch.Tensor,
    weight: torch.Tensor,
    problem: ConvProblem,
    config: GemmConfig,
    *,
    residual: torch.Tensor | None = None,
    residual_stride: Pair = (1, 1),
    residual_bits: torch.Tensor | None = None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx [N, Ci, H, W], dw [Co, Ci, 1, 1] in channels_last memory and ``out_dtype``).

    ``x`` [N, Ci, H, W], ``dz`` and ``y`` [N, Co, H, W] and ``weight`` [Co, Ci, 1, 1] are dense NHWC of one dtype;
    ``coeffs`` [3, Co] makes the output's gradient A*dz + B*y + C. ``residual``, its stride and its bits are those of
    ``conv_dgrad``. ``config.block_m`` pixels by ``block_n`` input channels make a step of one of ``config.split``
    ranges of pixels; ``block_k`` holds all output channels. Raises ValueError for anything else.
    """
    p = problem
    require_problem(p, x.dtype)
    if not p.is_gemm or p.Co > config.block_k:
        raise ValueError(f"conv_pair takes an unstrided 1x1 of up to {config.block_k} output channels, got {p}")
    require_image(x, (p.N, p.Ci, p.H, p.W), x, "x")
    require_image(weight, (p.Co, p.Ci, 1, 1), x, "weight")
    require_image(dz, (p.N, p.Co, p.H, p.W), x, "dz")
    require_image(y, (p.N, p.Co, p.H, p.W), x, "y")
    require_rows(coeffs, 3, p.Co, x, "coeffs")
    require_residual(residual, residual_stride, residual_bits, p, x)

    acc = accumulation_dtype(x.dtype)
    steps = ceil_div(ceil_div(p.M, config.block_m), config.split)
    num_n = ceil_div(p.Ci, config.block_n)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dw = torch.empty_like(weight, dtype=out_dtype, memory_format=torch.channels_last)
    partial = dw if config.split == 1 else torch.empty((config.split, p.Co * p.Ci), dtype=acc, device=x.device)
    launch(
        conv_pair_kernel,
        (num_n * config.split,),
        touched=(x, dz, y, coeffs, weight, residual, residual_bits, dx, partial),
        flops=2 * p.flops,
        config=config,
        device=x.device,
        dz_ptr=dz,
        y_ptr=y,
        x_ptr=x,
        w_ptr=weight,
        coeffs_ptr=coeffs,
        residual_ptr=residual,
        residual_bits_ptr=residual_bits,
        dx_ptr=dx,
        dw_ptr=partial,
        M=p.M,
        H=p.H,
        W=p.W,
        Ci=p.Ci,
        Co=p.Co,
        row_bytes=ceil_div(p.Ci, 8),
        num_n=num_n,
        rows_per_split=steps * config.block_m,
        RESIDUAL_STRIDE_H=residual_stride[0],
        RESIDUAL_STRIDE_W=residual_stride[1],
        HAS_RESIDUAL=residual is not None,
        HAS_RESIDUAL_BITS=residual_bits is not None,
        EVEN_M=p.M % config.block_m == 0,
        EVEN_N=p.Ci % config.block_n == 0,
        EVEN_K=p.Co == config.block_k,
        ACC=triton_dtype(acc),
        PRECISION=dot_precision(x.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
    )
    if config.split > 1:
        add_parts(partial, dw)
    return dx, dw
