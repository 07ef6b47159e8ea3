"""Casts of several tensors in one launch, against PyTorch's own, bit for bit."""

import pytest
import torch

from fused_resnet.autograd.layer import operands
from fused_resnet.launch.cast import cast, is_castable
from fused_resnet.launch.record import record_launches

pytestmark = pytest.mark.quick
SHAPES = [(7, 3, 3, 3), (40, 5, 1, 1), (33, 64, 1, 1), (1, 1, 1, 1)]
HALVES = [torch.bfloat16, torch.float16]


def weight(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape).to(dtype=dtype, device=device, memory_format=torch.channels_last)


def same(actual, expected):
    """Equal bits, NaN included, and NHWC strides, even where a size of 1 leaves them open."""
    integers = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    nhwc = torch.empty(expected.shape, memory_format=torch.channels_last).stride()
    return torch.equal(actual.view(integers), expected.view(integers)) and actual.stride() == nhwc


@pytest.mark.parametrize("count", range(1, 5))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cast_is_to(count, dtype, device):
    tensors = [weight(*shape, device=device) for shape in SHAPES[:count]]
    with record_launches() as launches:
        outs = cast(tensors, dtype)
    assert all(same(out, t.to(dtype)) for out, t in zip(outs, tensors, strict=True))
    assert [launch.kernel for launch in launches] == ["cast_kernel"]
    assert launches[0].bytes == sum(6 * t.numel() for t in tensors)


def test_mixed_dtypes_and_back(device):
    tensors = [weight(9, 4, 3, 3, dtype=dtype, device=device) for dtype in (torch.float32, *HALVES)]
    for dtype in (torch.float32, *HALVES):
        assert all(same(out, t.to(dtype)) for out, t in zip(cast(tensors, dtype), tensors, strict=True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_ties_infinities_and_nan(dtype, device):
    """Halfway cases go to even, what is too large to infinity, tiny ones to subnormals; NaN stays NaN."""
    step = torch.finfo(dtype).eps
    values = [1 + step / 2, 1 + 3 * step / 2, -(1 + step / 2), 65520.0, 3.4e38, 1e-7, 1e-40, -0.0, float("inf")]
    t = torch.tensor(values, device=device).view(-1, 1, 1, 1)
    assert same(cast([t], dtype)[0], t.to(dtype))
    (out,) = cast([torch.full((3, 2, 1, 1), float("nan"), device=device)], dtype)
    assert out.isnan().all()


def test_many_blocks_of_unequal_tensors(device):
    tensors = [weight(*shape, device=device) for shape in ((64, 300, 3, 3), (5, 5, 3, 3), (128, 130, 1, 1))]
    assert all(same(out, t.bfloat16()) for out, t in zip(cast(tensors, torch.bfloat16), tensors, strict=True))


def test_operands_take_one_launch_where_they_can(device):
    """Dense ones are cast together; a slice, another layout and float64 alone; what is right already not at all."""
    dense, right = weight(8, 6, 3, 3, device=device), weight(4, 6, 1, 1, dtype=torch.bfloat16, device=device)
    other, double = torch.randn(8, 6, 3, 3, device=device), weight(8, 6, 1, 1, dtype=torch.float64, device=device)
    weights = [dense, right, weight(8, 6, 1, 1, device=device), other]
    with record_launches() as launches:
        read = operands(weights, torch.bfloat16)
    assert [launch.kernel for launch in launches] == ["cast_kernel", "cast_weight"]
    assert read[1] is right
    for operand, parameter in zip(read, weights, strict=True):
        assert torch.equal(operand, parameter.bfloat16())
        assert operand.permute(0, 2, 3, 1).is_contiguous()
    assert not is_castable(double, torch.bfloat16) and not is_castable(dense[:, :4], torch.bfloat16)
    for alone in (double, dense[:, :4]):
        (read,) = operands([alone], torch.bfloat16)
        assert torch.equal(read, alone.bfloat16()) and read.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_is_cast_without_autocast(dtype, device):
    weights = [weight(8, 6, 3, 3, dtype=dtype, device=device), weight(4, 6, 1, 1, dtype=dtype, device=device)]
    with record_launches() as launches:
        read = operands(weights, dtype)
    assert launches == [] and all(a is b for a, b in zip(read, weights, strict=True))


def test_errors_and_nothing(device):
    assert cast([], torch.bfloat16) == []
    with pytest.raises(ValueError, match="up to 4"):
        cast([weight(2, 2, 1, 1, device=device)] * 5, torch.bfloat16)
    with pytest.raises(ValueError, match="channels_last"):
        cast([torch.randn(2, 3, 3, 3, device=device)], torch.bfloat16)
    with pytest.raises(ValueError, match="float64"):
        cast([weight(2, 2, 1, 1, dtype=torch.float64, device=device)], torch.bfloat16)
