"""The helpers that kernels share, by kernels that do nothing else."""

import pytest
import torch
import triton
import triton.language as tl

from fused_resnet.kernels.common import widened

pytestmark = pytest.mark.quick


@triton.jit
def widen_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, widened(tl.load(x_ptr + offs), out_ptr.dtype.element_ty))


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_widened(narrow, wide, device):
    """All of them, subnormals and both zeros too, bit for bit; NaN stays NaN."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(narrow).to(device)
    out = torch.full((1 << 16,), 7.0, dtype=wide, device=device)
    widen_kernel[(1,)](x, out, BLOCK=1 << 16)
    numbers = ~x.isnan()
    assert torch.equal(out.isnan(), ~numbers)
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}[wide]
    assert torch.equal(out[numbers].view(bits), x.to(wide)[numbers].view(bits))
