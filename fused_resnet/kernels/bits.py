"""ReLU masks as bits: bit j of byte b of a row belongs to channel 8b + j. Channels past the last one have zeros."""

import triton
import triton.language as tl


@triton.jit
def pack_bits(mask):
    """[ROWS, C] of booleans as [ROWS, C / 8] bytes."""
    ROWS: tl.constexpr = mask.shape[0]
    BYTES: tl.constexpr = mask.shape[1] // 8
    bits = tl.reshape(mask.to(tl.int32), (ROWS, BYTES, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(bits, axis=2).to(tl.uint8)


@triton.jit
def unpack_bits(packed):
    """[ROWS, C / 8] bytes as [ROWS, C] booleans."""
    ROWS: tl.constexpr = packed.shape[0]
    C: tl.constexpr = packed.shape[1] * 8
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, C)) != 0


@triton.jit
def relu_bits(out, inside):
    """The mask of a ReLU with the output ``out`` [ROWS, C], packed; none of what is not ``inside``. NaN passes."""
    return pack_bits(inside & ~(out <= 0))
