"""Row geometry of the implicit GEMMs: which source pixel a row starts from, and which of its taps exist.

A row of the GEMM is one pixel of the result. Its taps read the source plane [I, J] at (i0 + r*STEP_I, j0 + s*STEP_J),
r < R, s < S. The source offset of a tap is the row's base offset plus a scalar that is the same for every row, so the
loop adds one number per tap; whether the tap lies inside the plane is one bit per row, computed before the loop.
"""

import triton
import triton.language as tl


@triton.jit
def tap_bits(i0, j0, I, J, STEP_I: tl.constexpr, STEP_J: tl.constexpr, R: tl.constexpr, S: tl.constexpr):  # noqa: E741
    """Bit r*S + s of each row: does tap (r, s) lie inside the plane? int32 up to 31 taps, int64 up to 63."""
    BITS: tl.constexpr = tl.int32 if R * S <= 31 else tl.int64
    columns = tl.zeros(j0.shape, BITS)
    for s in tl.static_range(S):
        j = j0 + s * STEP_J
        columns |= ((j >= 0) & (j < J)).to(BITS) << s
    bits = tl.zeros(i0.shape, BITS)
    for r in tl.static_range(R):
        i = i0 + r * STEP_I
        bits |= tl.where((i >= 0) & (i < I), columns << (r * S), 0)
    return bits


@triton.jit
def split_rows(offs_m, I, J):  # noqa: E741
    """Row numbers of a dense [N, I, J] tensor as (n, i, j)."""
    row = offs_m // J
    n = row // I
    return n, row - n * I, offs_m - row * J


@triton.jit
def next_rows(n, i, j, STEP: tl.constexpr, I, J):  # noqa: E741
    """:func:`split_rows` of the rows that lie STEP further on, without a division per row."""
    j += STEP % J
    carry = j >= J
    j -= tl.where(carry, J, 0)
    i += STEP // J % I + carry.to(tl.int32)
    carry = i >= I
    i -= tl.where(carry, I, 0)
    n += STEP // (I * J) + carry.to(tl.int32)
    return n, i, j


@triton.jit
def sampled_rows(n, i, j, H, W, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr):
    """Rows of a dense [N, H, W] tensor that a strided 1x1 filter reads for its results (n, i, j), as int64."""
    return (n * H + i * STRIDE_H).to(tl.int64) * W + j * STRIDE_W


@triton.jit
def as_stored(ptrs, value, never):
    """``value`` in the layout of a store to ``ptrs``, where a column lies in few threads and its sums are cheap.

    ``never`` is a condition that only the run can tell to be false: nothing is loaded, but the compiler converts the
    default to a load's layout, which is a store's.
    """
    return tl.load(ptrs, mask=never, other=value)


@triton.jit
def load_rows(ptrs, inside, mask_k, MASK_ROWS: tl.constexpr, MASK_K: tl.constexpr):
    """A [rows, BLOCK_K] tile, zero where a masked row is not ``inside`` or a masked column not in ``mask_k``."""
    if MASK_ROWS and MASK_K:
        return tl.load(ptrs, mask=inside[:, None] & mask_k[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=inside[:, None], other=0.0)
    elif MASK_K:
        return tl.load(ptrs, mask=mask_k[None, :], other=0.0)
    else:
        return tl.load(ptrs)
