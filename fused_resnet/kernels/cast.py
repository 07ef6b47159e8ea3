"""out_i = x_i in another dtype, of up to four dense tensors in one launch: the weights of a chain."""

import triton
import triton.language as tl

from .common import begin


@triton.jit
def cast_block(x_ptr, out_ptr, elements, BLOCK: tl.constexpr):
    """One block of one tensor; nothing past its end."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    x = tl.load(x_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def cast_kernel(
    x0_ptr,
    x1_ptr,
    x2_ptr,
    x3_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    out3_ptr,
    elements0,
    elements1,
    elements2,
    elements3,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """Tensor ``program_id(1)`` of the ``COUNT`` that there are; the others' pointers are None."""
    begin(DEPENDENT)
    tensor = tl.program_id(1)
    if tensor == 0:
        cast_block(x0_ptr, out0_ptr, elements0, BLOCK)
    if COUNT > 1:
        if tensor == 1:
            cast_block(x1_ptr, out1_ptr, elements1, BLOCK)
    if COUNT > 2:
        if tensor == 2:
            cast_block(x2_ptr, out2_ptr, elements2, BLOCK)
    if COUNT > 3:
        if tensor == 3:
            cast_block(x3_ptr, out3_ptr, elements3, BLOCK)
