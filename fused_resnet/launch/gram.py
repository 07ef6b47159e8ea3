"""Launcher of the Gram matrix; its route's others, of gram_bn.py and gram_bn_grad.py, are imported from here too."""

from __future__ import annotations

import torch

from ..kernels.gram import gram_kernel, gram_reduce_kernel
from ..plan.config import GemmConfig
from ..plan.gram import FLUSH_ROWS, gram_reduce_config, gram_tiles
from ..plan.passes import VECTOR_BYTES, WARP, ceil_div
from .check import require_nhwc, require_rows, triton_dtype
from .gram_bn import gram_dtype, gram_finalize, product_precision, require_pivot
from .gram_bn_grad import GramGrads, gram_backward
from .record import launch

__all__ = ["GramGrads", "gram", "gram_backward", "gram_finalize"]


def gram(
    x: torch.Tensor,
    input_affine: torch.Tensor | None,
    config: GemmConfig,
    *,
    stride: tuple[int, int] = (1, 1),
    store_a: bool = False,
    pivot: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(G = aᵀa [p, p], c = the column sums of a [p], a if ``store_a``): a = relu(x * scale + shift), in x's dtype.

    ``x`` [N, p, H, W], NHWC memory; ``input_affine`` [2, p] float32 (float64 for float64 data), None for a = x.
    ``stride``: of the pixels, those alone that a 1x1 convolution with it samples (none of them is stored). G and c have
    the accumulation dtype and do not depend on the run. ``config``: square tiles, ``split`` parts of the rows.
    ``pivot``: mean and rstd of x's BatchNorm [2, p], or without a prologue any pixel of wide data [1, p], or of 16-bit
    data some pixels [s, p], s a power of two: the first, where the others say that it is near the mean. G and c are
    those of a minus a row near its mean, and ``gram_finalize`` takes it again. Of float32 data they are float64 then.
    """
    require_nhwc(x, "x")
    N, channels, H, W = x.shape
    I, J = ceil_div(H, stride[0]), ceil_div(W, stride[1])
    rows = N * I * J
    if input_affine is not None:
        require_rows(input_affine, 2, channels, x, "input_affine")
    if pivot is not None:
        require_pivot(pivot, channels, x, input_affine)
    if config.block_m != config.block_n:
        raise ValueError(f"gram takes square tiles, got {config.block_m} x {config.block_n}")
    if rows * channels == 0 or N * H * W >= 2**31:
        raise ValueError(f"gram takes between 1 and 2^31 - 1 rows, got shape {tuple(x.shape)}")
    if store_a and stride != (1, 1):
        raise ValueError(f"store_a goes with stride 1, got {stride}")
    a = torch.empty_like(x, memory_format=torch.channels_last) if store_a else None
    dtype = gram_dtype(x, pivot)
    steps = ceil_div(ceil_div(rows, config.block_k), config.split)
    split = ceil_div(rows, steps * config.block_k)
    tiles = gram_tiles(channels, config.block_n)
    elements = tiles * config.block_n**2 + channels
    partial = torch.empty((split, elements), dtype=dtype, device=x.device)
    acc, precision = triton_dtype(partial.dtype), product_precision(x.device)
    lanes = config.num_warps * WARP * VECTOR_BYTES // x.element_size() // config.block_n
    launch(
        gram_kernel,
        (tiles, split),
        touched=(rows * channels * x.element_size(), input_affine, pivot, partial, a),
        flops=2 * rows * tiles * config.block_n**2,
        config=config,
        device=x.device,
        x_ptr=x,
        affine_ptr=input_affine,
        pivot_ptr=pivot,
        partial_ptr=partial,
        a_ptr=a,
        pivot_stride=channels if pivot is None else pivot.stride(0),
        M=rows,
        C=channels,
        H=H,
        W=W,
        I=I,
        J=J,
        rows_per_split=steps * config.block_k,
        elements=elements,
        TILES=ceil_div(channels, config.block_n),
        FLUSH=max(1, FLUSH_ROWS // config.block_k),
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        HAS_AFFINE=input_affine is not None,
        HAS_PIVOT=pivot is not None,
        SEEN=1 if pivot is None else len(pivot),
        STORE_A=store_a,
        EVEN_K=rows % config.block_k == 0,
        LANES=min(config.block_k, max(1, lanes)),
        STAGES=config.num_stages,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        ACC=acc,
        INPUT_PRECISION=precision,
    )
    g = torch.empty((channels, channels), dtype=dtype, device=x.device)
    c = torch.empty((channels,), dtype=dtype, device=x.device)
    reduce = gram_reduce_config(split)
    launch(
        gram_reduce_kernel,
        (ceil_div(elements, reduce.block_c),),
        touched=(partial, g, c),
        flops=0,
        config=reduce,
        device=x.device,
        partial_ptr=partial,
        g_ptr=g,
        c_ptr=c,
        split=split,
        C=channels,
        elements=elements,
        TILES=ceil_div(channels, config.block_n),
        BLOCK_N=config.block_n,
        BLOCK_S=reduce.block_m,
        BLOCK_E=reduce.block_c,
        ACC=acc,
    )
    return g, c, a
