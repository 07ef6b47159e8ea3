"""stem_pool against relu and max_pool2d: the forward pass exactly, the backward pass in float64."""

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.launch.record import record_launches
from fused_resnet.launch.stem_pool import stem_pool, stem_pool_grad_apply, stem_pool_grad_reduce
from fused_resnet.plan.config import PassConfig
from tests.fused import affine

CONFIG = PassConfig(block_m=16, block_c=16)
SHAPES = [(2, 20, 8, 6), (1, 3, 7, 9), (3, 5, 1, 5), (2, 4, 6, 1), (4, 70, 1, 1), (1, 16, 2, 2), (2, 3, 5, 4)]
DTYPES = [torch.float64, torch.float32, torch.float16]


def nhwc(*shape, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def statistics(channels, dtype, seed=2):
    generator = torch.Generator().manual_seed(seed)
    stats = torch.randn((4, channels), generator=generator, dtype=torch.float64)  # scales of both signs
    return stats.to(torch.float64 if dtype == torch.float64 else torch.float32)


def eager(y, stats):
    """(out, tap) as PyTorch's own operations give them, in y's dtype."""
    a = affine(y, *stats[2:]).to(y.dtype).relu()
    out, position = F.max_pool2d(a, 3, 2, 1, return_indices=True)
    h, w = position // y.shape[3], position % y.shape[3]
    p = torch.arange(out.shape[2])[:, None]
    q = torch.arange(out.shape[3])
    return out, (h - (2 * p - 1)) * 3 + w - (2 * q - 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_equals_eager(shape, dtype):
    y = nhwc(*shape, dtype=dtype)
    stats = statistics(shape[1], dtype)
    out, index = stem_pool(y, stats, CONFIG)
    expected, tap = eager(y, stats)
    assert out.dtype == dtype and index.dtype == torch.uint8
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, expected)
    assert torch.equal(index.long(), tap)
    with record_launches() as launches:
        alone, nothing = stem_pool(y, stats, CONFIG, keeps_index=False)
    assert torch.equal(alone, expected) and nothing.numel() == 0
    (launched,) = launches
    assert launched.bytes == sum(t.numel() * t.element_size() for t in (y, stats, out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_of_equal_values_wins(dtype):
    y = nhwc(2, 8, 9, 8).mul(1.5).round().to(dtype)  # few distinct values
    stats = torch.tensor([[0.0], [1.0], [1.0], [0.5]]).repeat(1, 8)
    stats[2, 4:] = 0  # all values equal
    stats[3, 6:] = -1  # all values zero after ReLU
    stats = stats.to(torch.float64 if dtype == torch.float64 else torch.float32)
    out, index = stem_pool(y, stats, CONFIG)
    expected, tap = eager(y, stats)
    assert torch.equal(out, expected)
    assert torch.equal(index.long(), tap)


def test_values_equal_after_rounding_are_ties():
    y = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float16).view(1, 1, 2, 2)
    stats = torch.tensor([[0.0], [1.0], [1e-5], [1.0]])
    out, index = stem_pool(y, stats, CONFIG)
    assert out.item() == 1 and index.item() == 4


def test_nan_wins_and_infinities_compare():
    y = nhwc(2, 6, 7, 7, dtype=torch.float32)
    y[0, 1, 2, 3] = y[0, 1, 3, 3] = y[1, 2, 6, 6] = float("nan")
    y[0, 3, 2, 2] = float("inf")
    y[:, 4] = -float("inf")
    stats = statistics(6, y.dtype).abs()
    out, index = stem_pool(y, stats, CONFIG)
    expected, tap = eager(y, stats)
    assert torch.equal(out.isnan(), expected.isnan())
    assert out.isnan().any()
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    assert torch.equal(index.long(), tap)


def gradients(y, stats, dout, config):
    out, index = stem_pool(y, stats, config)
    tiles = stem_pool_grad_reduce(dout, index, out, y, stats, config)
    coeffs = statistics(y.shape[1], y.dtype, seed=5)[:3].contiguous()
    return tiles, coeffs, stem_pool_grad_apply(dout, index, out, y, coeffs, config)


@pytest.mark.parametrize("config", [CONFIG, PassConfig(1, 4), PassConfig(64, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_equals_autograd(shape, dtype, config):
    y = nhwc(*shape, dtype=dtype)
    stats = statistics(shape[1], dtype)
    dout = nhwc(shape[0], shape[1], -(-shape[2] // 2), -(-shape[3] // 2), dtype=dtype, seed=3)
    tiles, coeffs, dy = gradients(y, stats, dout, config)

    normalised = affine(y, *stats[2:]).to(dtype).double().requires_grad_()
    F.max_pool2d(normalised.relu(), 3, 2, 1).backward(dout.double())
    dz = normalised.grad
    mean = stats[0][None, :, None, None].double()
    sums = torch.stack([dz.sum((0, 2, 3)), (dz * (y.double() - mean)).sum((0, 2, 3))])
    a, b, c = coeffs[:, None, :, None, None].double()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5}[dtype]
    torch.testing.assert_close(tiles.double().sum(1), sums, rtol=tolerance, atol=10 * tolerance)
    tolerance = 1e-3 if dtype == torch.float16 else tolerance
    assert dy.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(dy.double(), a * dz + b * y.double() + c, rtol=tolerance, atol=tolerance)


def test_many_blocks_share_a_tile(monkeypatch):
    monkeypatch.setattr("fused_resnet.launch.stem_pool.MOST_TILES", 3)
    y = nhwc(3, 4, 9, 9)
    stats = statistics(4, y.dtype)
    dout = nhwc(3, 4, 5, 5, seed=3)
    few, _, _ = gradients(y, stats, dout, PassConfig(4, 4))
    many, _, _ = gradients(y, stats, dout, PassConfig(1, 4))
    assert few.shape[1] == 3 and many.shape[1] == 10
    torch.testing.assert_close(few.sum(1), many.sum(1))


def test_gradient_is_selected_not_multiplied():
    """An infinite gradient at a closed ReLU is zero; a NaN in the output lets the gradient through."""
    y = torch.full((1, 2, 1, 1), -1.0)
    y[0, 1] = float("nan")
    stats = torch.tensor([[0.0], [1.0], [1.0], [0.0]]).repeat(1, 2)
    dout = torch.tensor([float("inf"), 2.0]).view(1, 2, 1, 1)
    tiles, _, _ = gradients(y, stats, dout, CONFIG)
    assert tiles[:, :, 0].tolist() == [[0.0], [0.0]]
    assert tiles[0, 0, 1].item() == 2.0 and tiles[1, 0, 1].isnan()


def test_two_runs_agree_bit_for_bit():
    y = nhwc(2, 5, 9, 8, dtype=torch.float32)
    stats = statistics(5, y.dtype)
    dout = nhwc(2, 5, 5, 4, dtype=torch.float32, seed=3)
    first, second = (gradients(y, stats, dout, CONFIG) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty_batch():
    y = nhwc(0, 4, 6, 6)
    stats = statistics(4, y.dtype)
    tiles, _, dy = gradients(y, stats, nhwc(0, 4, 3, 3), CONFIG)
    assert tiles.shape == (2, 0, 4) and dy.shape == y.shape


def test_records_on_meta():
    y = torch.empty(8, 64, 112, 112, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    stats = torch.empty(4, 64, device="meta")
    with record_launches() as launches:
        out, index = stem_pool(y, stats, PassConfig(32, 64))
        tiles = stem_pool_grad_reduce(out, index, out, y, stats, PassConfig(32, 64))
        stem_pool_grad_apply(out, index, out, y, stats[:3], PassConfig(32, 64))
    assert [entry.kernel for entry in launches] == [
        "stem_pool_kernel",
        "stem_pool_grad_reduce_kernel",
        "stem_pool_grad_apply_kernel",
    ]
    pooled = y.numel() // 4
    assert launches[0].bytes == y.numel() * 2 + pooled * 3 + 4 * 64 * 4
    assert launches[1].bytes == y.numel() * 2 + pooled * 5 + 4 * 64 * 4 + tiles.numel() * 4
    assert launches[2].bytes == y.numel() * 4 + pooled * 5 + 3 * 64 * 4


def test_refuses_what_does_not_belong_together():
    y = nhwc(2, 4, 6, 6, dtype=torch.float32)
    stats = statistics(4, y.dtype)
    with pytest.raises(ValueError, match="channels_last"):
        stem_pool(y.contiguous(), stats, CONFIG)
    out, index = stem_pool(y, stats, CONFIG)
    with pytest.raises(ValueError, match="uint8"):
        stem_pool_grad_reduce(out, index.int(), out, y, stats, CONFIG)
    with pytest.raises(ValueError, match="dout must have shape"):
        stem_pool_grad_apply(y, index, out, y, stats[:3].contiguous(), CONFIG)
