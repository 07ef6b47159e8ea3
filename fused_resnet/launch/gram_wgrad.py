"""Launches the weight gradient of a 1x1 convolution whose output was never written, from above its ReLU."""

from __future__ import annotations

import torch

from ..kernels.gram_wgrad import gram_wgrad_kernel
from ..plan.config import GemmConfig
from ..plan.passes import ceil_div
from .bits import require_bits
from .check import accumulation_dtype, dot_precision, require_image, require_mean, require_rows, triton_dtype
from .parts import add_parts
from .record import launch


def gram_wgrad(
    dout: torch.Tensor,
    bits: torch.Tensor,
    y: torch.Tensor,
    input_affine: torch.Tensor,
    config: GemmConfig,
    *,
    store_dz: bool,
    input_mean: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(T [q, p], sum dz [q], dz [N, q, H, W] if ``store_dz``): dzᵀ·a with dz = dout below its ReLU, a = relu(bn(y)).

    ``dout`` [N, q, H, W] and ``y`` [N, p, H, W] are dense NHWC of one dtype. ``bits`` (see
    :func:`empty_bits`) say where the ReLU let dout through. ``input_affine`` [2, p] is y's scale and shift. T and the
    sums are float32 (float64 for float64 data), the same from run to run. ``input_mean`` [p], of float32 or float64
    data: T is that of a minus this. Raises ValueError for other shapes and
    dtypes.
    """
    if dout.dim() != 4 or y.dim() != 4:
        raise ValueError(f"dout and y must have 4 dimensions, got shapes {tuple(dout.shape)} and {tuple(y.shape)}")
    (N, q, height, width), p = dout.shape, y.shape[1]
    M = N * height * width
    require_image(dout, (N, q, height, width), dout, "dout")
    require_image(y, (N, p, height, width), dout, "y")
    require_rows(input_affine, 2, p, dout, "input_affine")
    if input_mean is not None:
        require_mean(input_mean, y)
    require_bits(bits, dout.shape, dout.device)

    acc, ACC = accumulation_dtype(dout.dtype), triton_dtype(dout.dtype)
    elements = q * p + q
    steps = ceil_div(ceil_div(M, config.block_k), config.split)
    result = torch.empty(elements, dtype=acc, device=dout.device)
    partial = result if config.split == 1 else torch.empty((config.split, elements), dtype=acc, device=dout.device)
    dz = torch.empty_like(dout, memory_format=torch.channels_last) if store_dz else None
    num_m, num_n = ceil_div(q, config.block_m), ceil_div(p, config.block_n)
    launch(
        gram_wgrad_kernel,
        (num_m * num_n, config.split),
        touched=(dout, bits, y, input_affine, input_mean, dz, partial),
        flops=2 * M * q * p,
        config=config,
        device=dout.device,
        dout_ptr=dout,
        bits_ptr=bits,
        y_ptr=y,
        affine_ptr=input_affine,
        mean_ptr=input_mean,
        dz_ptr=dz,
        partial_ptr=partial,
        M=M,
        P=p,
        Q=q,
        row_bytes=bits.shape[1],
        num_n=num_n,
        rows_per_split=steps * config.block_k,
        HAS_MEAN=input_mean is not None,
        STORE_DZ=store_dz,
        EVEN_M=M % config.block_k == 0,
        EVEN_P=p % config.block_n == 0,
        EVEN_Q=q % config.block_m == 0,
        ACC=ACC,
        PRECISION=dot_precision(dout.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    if config.split > 1:
        add_parts(partial, result)
    return result[: q * p].view(q, p), result[q * p :], dz
