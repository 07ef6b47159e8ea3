"""out = relu(y * scale + shift + r), one pass over [M, C].

r is nothing, a residual as it is, or a projection's raw output that is normalised on load: residual * rscale + rshift.
On request the ReLU's mask is written too, as bits [M, ceil(C / 8)] (see bits.py).
"""

import triton
import triton.language as tl

from .bits import relu_bits
from .common import affine, begin, relu
from .tiling import pass_tile, step_bits, step_offsets


@triton.jit
def load_channels(row_ptr, offs_c, channels):
    """One row of per-channel numbers, as [1, BLOCK_C]."""
    return tl.load(row_ptr + offs_c, mask=offs_c < channels, other=0.0)[None, :]


@triton.jit
def bn_act_kernel(
    y_ptr,
    stats_ptr,
    residual_ptr,
    residual_stats_ptr,
    out_ptr,
    bits_ptr,
    rows,
    channels,
    row_bytes,
    rows_per_tile,
    HAS_RESIDUAL: tl.constexpr,
    NORMALISE_RESIDUAL: tl.constexpr,
    APPLY_RELU: tl.constexpr,
    HAS_BITS: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin(DEPENDENT)
    _, first, count, offs_c = pass_tile(rows, channels, rows_per_tile, BLOCK_C, FROM_THE_END=True)
    y_ptr += first * channels
    out_ptr += first * channels
    if HAS_BITS:
        bits_ptr += first * row_bytes
    scale = load_channels(stats_ptr + 2 * channels, offs_c, channels)
    shift = load_channels(stats_ptr + 3 * channels, offs_c, channels)
    if HAS_RESIDUAL:
        residual_ptr += first * channels
    if NORMALISE_RESIDUAL:
        residual_scale = load_channels(residual_stats_ptr + 2 * channels, offs_c, channels)
        residual_shift = load_channels(residual_stats_ptr + 3 * channels, offs_c, channels)

    for start in range(0, count, VECTORS * BLOCK_M):
        offsets, mask = step_offsets(start, count, offs_c, channels, VECTORS * BLOCK_M)
        y = tl.load(y_ptr + offsets, mask=mask)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + offsets, mask=mask).to(scale.dtype)
        out = affine(y.to(scale.dtype), scale, shift)
        if HAS_RESIDUAL:
            if NORMALISE_RESIDUAL:
                residual = affine(residual, residual_scale, residual_shift)
            out += residual
        if APPLY_RELU:
            out = relu(out)
        out = out.to(y.dtype)
        tl.store(out_ptr + offsets, out, mask=mask)
        if HAS_BITS:
            bits = relu_bits(out.to(scale.dtype), (offs_c < channels)[None, :])
            offsets, mask = step_bits(start, count, channels, row_bytes, VECTORS * BLOCK_M, BLOCK_C)
            tl.store(bits_ptr + offsets, bits, mask=mask)
