"""A copy of a [N, C, pixels] view, NCHW memory or expanded, into dense [N, pixels, C]: a transposition by tiles."""

import triton
import triton.language as tl

from .common import begin


@triton.jit
def nhwc_kernel(
    x_ptr,
    out_ptr,
    channels,
    pixels,
    stride_n,
    stride_c,
    stride_p,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """One tile of one image. Reads are contiguous along pixels where ``stride_p`` is 1, writes along channels."""
    begin(DEPENDENT)
    tiles_c = tl.cdiv(channels, BLOCK_C)
    tiles_p = tl.cdiv(pixels, BLOCK_P)
    n = (tl.program_id(0) // (tiles_c * tiles_p)).to(tl.int64)
    offs_p = tl.program_id(0) // tiles_c % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_p < pixels)[:, None] & (offs_c < channels)[None, :]

    image = x_ptr + n * stride_n
    x = tl.load(image + offs_p.to(tl.int64)[:, None] * stride_p + offs_c.to(tl.int64)[None, :] * stride_c, mask=mask)
    rows = n * pixels + offs_p
    tl.store(out_ptr + rows[:, None] * channels + offs_c[None, :], x, mask=mask)
