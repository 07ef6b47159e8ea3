"""The copy into NHWC memory: every layout a gradient comes in, bit for bit."""

import pytest
import torch

import fused_resnet as fr
from fused_resnet.launch.nhwc import nhwc
from fused_resnet.launch.record import record_launches

pytestmark = pytest.mark.quick
SHAPES = [(2, 5, 3, 7), (3, 70, 7, 7), (1, 130, 9, 8), (2, 1, 5, 5), (4, 33, 1, 1), (2, 16, 1, 40)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def layouts(shape, dtype, device):
    """NCHW; expanded over pixels, over images, over everything; a slice; a transposition."""
    n, c, h, w = shape

    def values(*size):
        return torch.randn(size).to(dtype).to(device)

    yield values(*shape)
    yield values(n, c, 1, 1).expand(shape)
    yield values(1, c, h, w).expand(shape)
    yield values(1, 1, 1, 1).expand(shape)
    yield values(n, c + 2, h + 3, 2 * w)[:, 1 : c + 1, 2 : h + 2, ::2]
    yield values(n, c, w, h).transpose(2, 3)
    yield values(c, n, h, w).transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nhwc_is_contiguous(shape, dtype, device):
    for t in layouts(shape, dtype, device):
        out = nhwc(t)
        assert torch.equal(out, t)
        assert out.permute(0, 2, 3, 1).is_contiguous() and out.is_contiguous(memory_format=torch.channels_last)


def test_what_is_nhwc_already_is_returned(device):
    t = torch.randn(2, 5, 3, 7, device=device).contiguous(memory_format=torch.channels_last)
    with record_launches() as launches:
        assert nhwc(t) is t
    assert launches == []


def test_nan_and_an_empty_batch(device):
    assert nhwc(torch.full((2, 5, 3, 3), float("nan"), device=device)).isnan().all()
    assert nhwc(torch.empty(0, 5, 3, 3, device=device)).shape == (0, 5, 3, 3)


def test_one_launch_counts_its_bytes(device):
    with record_launches() as launches:
        nhwc(torch.randn(2, 5, 3, 7, device=device))
        nhwc(torch.empty(256, 64, 7, 7, device="meta", dtype=torch.bfloat16))
    assert [(entry.kernel, entry.bytes) for entry in launches] == [
        ("nhwc_kernel", 2 * 4 * 210),
        ("nhwc_kernel", 2 * 2 * 256 * 64 * 49),
    ]


@pytest.mark.parametrize("head", ["pool", "sum", "mean"])
def test_gradients_that_arrive_in_other_layouts(head, device):
    """A block's gradients do not depend on the memory that its output's gradient came in."""

    def gradients(dense):
        torch.manual_seed(1)
        block = fr.Bottleneck(32, 8).to(device).to(memory_format=torch.channels_last)
        x = torch.randn(2, 32, 5, 7, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
        out = block(x)
        if dense:
            out.register_hook(lambda g: g.contiguous(memory_format=torch.channels_last))
        summed = {"pool": torch.nn.AdaptiveAvgPool2d(1), "sum": torch.sum, "mean": torch.mean}[head](out)
        with record_launches() as launches:
            (summed * summed.detach()).sum().backward()
        assert [entry.kernel for entry in launches].count("nhwc_kernel") == (0 if dense else 1)
        return [x.grad, *(p.grad for p in block.parameters())]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)
