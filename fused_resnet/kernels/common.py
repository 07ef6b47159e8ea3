"""Small helpers that the kernels share."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(DEPENDENT: tl.constexpr):
    """The first line of every kernel, before it touches memory.

    ``DEPENDENT``: it may have been started while the kernel before it was still at work (programmatic dependent
    launch, sm_90). It lets the next one be started in turn, and waits until that before it is over, which waited too.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def from_the_end(index, count):
    """``index``, counted from the last of ``count``: the order of tiles in kernels whose operand was written just now.

    The kernels before them go up through memory. Of what these touched, the L2 cache holds the end: whoever begins
    there finds some 25 MB, and whoever begins at the front finds nothing, and drives it out.
    """
    return count - 1 - index


@triton.jit
def relu(x):
    """max(x, 0) that lets NaN through, as PyTorch's does (a plain maximum drops it on the GPU)."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def relu_grad(grad, x):
    """The gradient of relu at ``x``: a selection, never a product; zero at 0 and -0, passed through at NaN."""
    return tl.where(x <= 0, 0.0, grad)


@triton.jit
def affine(x, scale, shift):
    """x * scale + shift. One expression for every place that must see the same sign of the result."""
    return x * scale + shift


@triton.jit
def widened(x, ACC: tl.constexpr):
    """``x`` in ``ACC``; bfloat16 by a shift.

    By a cast, the compiler takes an odd element apart in two instructions; and a value that was rounded just before, it
    rounds element by element, at a fraction of the rate, or even compares in bfloat16.
    """
    if x.dtype == tl.bfloat16 and ACC == tl.float32:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(ACC)
