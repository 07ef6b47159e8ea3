"""Launches the gradient of a 1x1 convolution's input by its Gram matrix."""

from __future__ import annotations

import torch

from ..kernels.gram_dgrad import gram_dgrad_kernel
from ..plan.config import GemmConfig
from ..plan.passes import ceil_div
from .bits import require_bits
from .check import (
    accumulation_dtype,
    dot_precision,
    require_device,
    require_dtype,
    require_image,
    require_mean,
    require_rows,
    require_shape,
    triton_dtype,
)
from .record import launch

Pair = tuple[int, int]

WHOLE = 128
"""Up to this many channels the whole row of ``a`` is one block of the reduction."""
LEAST_WHOLE_STEP = 64
"""Unless steps are shorter than this: where registers are too few for long ones, they are for a whole row."""


def gram_dgrad(
    dz: torch.Tensor,
    y: torch.Tensor,
    AW: torch.Tensor,
    P: torch.Tensor,
    bias: torch.Tensor | None,
    stats: torch.Tensor | None,
    config: GemmConfig,
    *,
    aw_terms: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    stride: Pair = (1, 1),
    bits: torch.Tensor | None = None,
    means: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dx [N, p, I, J], its sums [2, T, p]): the gradient below the ReLU in front of a 1x1 convolution with BatchNorm.

    With a = relu(y*scale + shift), da = dz·AW + a·P + bias and dx = relu_grad(da, y*scale + shift); the sums, one row
    per M tile, are sum dx and sum dx*(y - mean). ``dz`` [N, q, I, J] and ``y`` [N, p, H, W] are dense NHWC, ``AW``
    [q, p] and ``P`` ([p, p], or [2, p, p]: two terms that add up) contiguous, all of one dtype; with ``aw_terms`` [1]
    int32 AW is [2, q, p], and as many of its terms count as that says on the device; ``bias`` [p] and
    ``stats`` [4, p] (of y) have the accumulation dtype, as ``scales`` [2]: what AW and P come multiplied by. Without
    ``stats`` a = y and dx = da, with no sums (None), and the convolution may have a ``stride``: dx is that of the
    sampled pixels, I = ceil(H / stride).
    ``bits`` is the mask of a ReLU (see bits.py) behind which ``dz`` counts: it is the gradient above it then.
    ``means``, of float32 or float64 data, stands in for the bias: (sum dz [q], the mean of a [p]), by which both are
    centred. Raises ValueError for anything else.
    """
    if dz.dim() != 4 or y.dim() != 4:
        raise ValueError(f"dz and y must have 4 dimensions, got shapes {tuple(dz.shape)} and {tuple(y.shape)}")
    (N, p, H, W), q = y.shape, dz.shape[1]
    I, J = ceil_div(H, stride[0]), ceil_div(W, stride[1])
    M = N * I * J
    if max(N * H * W, AW.numel()) >= 2**31:
        raise ValueError(f"the kernel counts pixels and weights in 32 bits, too many for it: {tuple(y.shape)}, {q}")
    if stats is not None and stride != (1, 1):
        raise ValueError(f"stats goes with stride 1, got {stride}")
    require_image(dz, (N, q, I, J), dz, "dz")
    require_image(y, (N, p, H, W), dz, "y")
    terms = P.shape[0] if P.dim() == 3 else 1
    shape_of_p = (terms, p, p) if P.dim() == 3 and terms in (1, 2) else (p, p)
    shape_of_aw = (q, p) if aw_terms is None else (2, q, p)
    for name, matrix, shape in (("AW", AW, shape_of_aw), ("P", P, shape_of_p)):
        if tuple(matrix.shape) != shape or not matrix.is_contiguous():
            raise ValueError(f"{name} must be contiguous {list(shape)}, got shape {tuple(matrix.shape)}")
        require_dtype(matrix, dz.dtype, name)
        require_device(dz.device, **{name: matrix})
    if aw_terms is not None:
        require_shape(aw_terms, (1,), "aw_terms")
        require_dtype(aw_terms, torch.int32, "aw_terms")
        require_device(dz.device, aw_terms=aw_terms)
    if (bias is None) == (means is None):
        raise ValueError("gram_dgrad takes a bias or the means that it stands for, and not both")
    if bias is not None:
        require_rows(bias[None], 1, p, dz, "bias")
    sum_dz, input_mean = means or (None, None)
    if sum_dz is not None and input_mean is not None:
        require_mean(sum_dz, dz, "sum_dz")
        require_mean(input_mean, y)
    if stats is not None:
        require_rows(stats, 4, p, dz, "stats")
    if scales is not None:
        require_rows(scales[None], 1, 2, dz, "scales")
    if bits is not None:
        require_bits(bits, dz.shape, dz.device)

    acc = accumulation_dtype(dz.dtype)
    num_m, num_n = ceil_div(M, config.block_m), ceil_div(p, config.block_n)
    dx = torch.empty((N, p, I, J), dtype=dz.dtype, device=dz.device, memory_format=torch.channels_last)
    tiles = None if stats is None else torch.empty((2, num_m, p), dtype=acc, device=dz.device)
    first_term = q * p * AW.element_size()  # bytes and FLOPs are those of data that need no more, as most do
    launch(
        gram_dgrad_kernel,
        (num_m * num_n,),
        touched=(
            dz,
            bits,
            M * p * y.element_size(),
            first_term,
            aw_terms,
            P,
            bias,
            sum_dz,
            input_mean,
            stats,
            scales,
            dx,
            tiles,
        ),
        flops=2 * M * p * (q + terms * p),
        config=config,
        device=dz.device,
        dz_ptr=dz,
        bits_ptr=bits,
        y_ptr=y,
        aw_ptr=AW,
        aw_terms_ptr=aw_terms,
        p_ptr=P,
        bias_ptr=bias,
        stats_ptr=stats,
        scales_ptr=scales,
        sum_dz_ptr=sum_dz,
        mean_ptr=input_mean,
        dx_ptr=dx,
        tiles_ptr=tiles,
        M=M,
        P=p,
        Q=q,
        H=H,
        W=W,
        I=I,
        J=J,
        row_bytes=ceil_div(q, 8),
        num_m=num_m,
        num_n=num_n,
        HAS_BITS=bits is not None,
        HAS_RELU=stats is not None,
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        HAS_SCALES=scales is not None,
        HAS_AW_TERMS=aw_terms is not None,
        HAS_MEANS=means is not None,
        TERMS=terms,
        WHOLE=num_n == 1 and config.block_n <= WHOLE and config.block_k >= LEAST_WHOLE_STEP,
        EVEN_Q=q % config.block_k == 0,
        EVEN_P=p % config.block_k == 0,
        EVEN_N=p % config.block_n == 0,
        ACC=triton_dtype(acc),
        PRECISION=dot_precision(dz.dtype),
        WARPS=config.num_warps,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    return dx, tiles
