"""Small kernels that Triton compiles, on the machine that runs PTX: products of every layout, and lies that show."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.conftest import EMULATED

from .memory import Fault

pytestmark = pytest.mark.skipif(not EMULATED, reason="FUSED_RESNET_EMULATE names no compute capability")


@triton.jit
def product_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    K,
    stride_ak,
    stride_bk,
    stride_am,
    stride_bn,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROLOGUE: tl.constexpr,
    STAGES: tl.constexpr,
):
    m, n = tl.arange(0, M), tl.arange(0, N)
    acc = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < K
        a = tl.load(a_ptr + m[:, None] * stride_am + k[None, :] * stride_ak, mask=inside[None, :], other=0.0)
        b = tl.load(b_ptr + k[:, None] * stride_bk + n[None, :] * stride_bn, mask=inside[:, None], other=0.0)
        if PROLOGUE:
            a = (a.to(tl.float32) * 2.0).to(a.dtype)
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc)


@pytest.mark.parametrize("transposed", ["", "a", "b", "ab"])
@pytest.mark.parametrize("block_k", [16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_of_every_layout(dtype, block_k, transposed):
    """Tiles in shared memory by rows or by columns, in patterns of 32, 64 and 128 bytes; K fills no step."""
    M, N, K = 64, 128, 72
    a = torch.randn(M, K).to(dtype) if "a" not in transposed else torch.randn(K, M).to(dtype).T
    b = torch.randn(K, N).to(dtype) if "b" not in transposed else torch.randn(N, K).to(dtype).T
    for prologue in (False, True):
        c = torch.full((M, N), float("nan"))
        strides = {
            "stride_ak": a.stride(1),
            "stride_bk": b.stride(0),
            "stride_am": a.stride(0),
            "stride_bn": b.stride(1),
        }
        constants = {"M": M, "N": N, "BLOCK_K": block_k, "PROLOGUE": prologue, "STAGES": 3}
        compiled = product_kernel[(1,)](a, b, c, K, **strides, **constants, num_warps=4)
        expected = (1 + prologue) * a.double() @ b.double()
        tolerance = 3e-3 if dtype == torch.float32 else 1e-6
        assert (c.double() - expected).norm() <= tolerance * expected.norm()
        if EMULATED == 90 and dtype != torch.float32:
            assert "wgmma.mma_async" in compiled.asm["ptx"]


@triton.jit
def hinted_kernel(x_ptr, out_ptr, offset, HINT: tl.constexpr, BLOCK: tl.constexpr):
    at = offset + tl.arange(0, BLOCK)
    if HINT:
        at = tl.max_contiguous(tl.multiple_of(at, 8), 8)
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + at))


def test_a_hint_that_is_not_true_is_a_misaligned_address():
    x, out = torch.arange(1100, dtype=torch.float32), torch.empty(1024)
    for offset, hint in ((3, False), (8, True)):
        hinted_kernel[(1,)](x, out, offset, HINT=hint, BLOCK=1024)
        assert torch.equal(out, x[offset : offset + 1024])
    with pytest.raises(Fault, match="misaligned"):
        hinted_kernel[(1,)](x, out, 3, HINT=True, BLOCK=1024)
    with pytest.raises(Fault, match="beyond a tensor"):
        hinted_kernel[(1,)](x, out, 77, HINT=False, BLOCK=1024)


@triton.jit
def shifted_kernel(x_desc, out_desc, row, column, BLOCK: tl.constexpr):
    out_desc.store([0, 0], x_desc.load([row, column]))


@pytest.mark.skipif(EMULATED == 80, reason="sm_80 has no tensor descriptors")
@pytest.mark.parametrize("width", [16, 32, 64])
def test_boxes_are_zero_outside(width):
    x, out = torch.randn(20, 72).bfloat16(), torch.empty(16, width, dtype=torch.bfloat16)
    described = [TensorDescriptor.from_tensor(t, [16, width]) for t in (x, out)]
    padded = torch.nn.functional.pad(x, (80, 80, 40, 40))
    for row, column in ((0, 0), (-3, 8), (10, -5), (19, 70), (30, 0)):
        shifted_kernel[(1,)](*described, row, column, BLOCK=16)
        assert torch.equal(out, padded[row + 40 : row + 56, column + 80 : column + 80 + width])


@pytest.mark.skipif(EMULATED == 80, reason="sm_80 has no tensor descriptors")
def test_a_copy_out_that_lies_wholly_outside():
    """A box 128 channels wide is copied in two halves: a tensor of 72 has part of the second one, one of 64 none."""
    x = torch.randn(16, 128).bfloat16()
    for columns, complaint in ((72, nullcontext()), (64, pytest.raises(Fault, match="wholly outside"))):
        out = torch.empty(16, columns, dtype=torch.bfloat16)
        described = [TensorDescriptor.from_tensor(t, [16, 128]) for t in (x, out)]
        with complaint:
            shifted_kernel[(1,)](*described, 0, 0, BLOCK=16)
            assert torch.equal(out, x[:, :columns])
