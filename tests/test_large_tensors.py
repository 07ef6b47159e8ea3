"""Tensors of more than 2^31 elements: no offset overflows, and the last rows come out right.

The memory is reserved and never filled; only the first and the last programs of a launch run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.launch import bn_act, bn_act_grad, bn_stats, stem_pool
from fused_resnet.launch.bottleneck_single import FrozenLayer, bottleneck_single
from fused_resnet.launch.conv_dgrad import conv_dgrad
from fused_resnet.launch.conv_fprop import conv_fprop
from fused_resnet.launch.conv_pair import conv_pair
from fused_resnet.launch.conv_wgrad import conv_wgrad
from fused_resnet.plan.config import GemmConfig, PassConfig, SingleConfig
from fused_resnet.plan.plans import ChainProblem
from fused_resnet.plan.problem import ConvProblem
from tests.conftest import INTERPRETED

if INTERPRETED:
    from tests import strict_interpreter

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="samples programs of the interpreter")

C = 64
N, H, W = 8193, 64, 64  # 2^31 elements, and one image more
CONFIG = GemmConfig(64, 64, 64)
PASS = PassConfig(64, 64)


@contextmanager
def reserving_memory() -> Iterator[None]:
    """Fresh tensors are not filled, and two programs from either end of a launch run."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with strict_interpreter.sampling(2):
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def unfilled() -> Iterator[None]:
    with reserving_memory():
        yield


def reserved(h: int = H, w: int = W) -> torch.Tensor:
    """Zeros that take no memory; the last image is random."""
    t = torch.empty((N, C, h, w), dtype=torch.float16, memory_format=torch.channels_last)
    t[-1] = torch.randn(C, h, w).half()
    return t


def weight(kernel: int) -> torch.Tensor:
    w = torch.randn(C, C, kernel, kernel) / (C * kernel**2) ** 0.5
    return w.half().contiguous(memory_format=torch.channels_last)


def problem(kernel: int, stride: int = 1) -> ConvProblem:
    return ConvProblem(N, H, W, C, C, kernel, kernel, (stride, stride), (kernel // 2,) * 2, dtype="float16")


def assert_last_row(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Of the last image: the only row that a sampled program is sure to have computed."""
    row = actual[-1, :, -1, -16:].float()
    torch.testing.assert_close(row, expected[0, :, -1, -16:].float(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kernel", [1, 3])
def test_conv_fprop(kernel):
    x, w = reserved(), weight(kernel)
    y, tiles = conv_fprop(x, w, problem(kernel), CONFIG, stats=True)
    assert y.numel() > 2**31 and tiles is not None
    assert_last_row(y, F.conv2d(x[-1:].float(), w.float(), padding=kernel // 2))


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1)])
def test_conv_dgrad(kernel, stride):
    p = problem(kernel, stride)
    dy, w, below = reserved(p.P, p.Q), weight(kernel), reserved()
    stats = torch.ones(4, C)
    dx, _ = conv_dgrad(dy, w, p, CONFIG, mask_input=below, mask_stats=stats)
    plain = torch.nn.grad.conv2d_input((1, C, H, W), w.float(), dy[-1:].float(), p.stride, p.padding)
    assert_last_row(dx, torch.where(below[-1:] + 1 > 0, plain, 0.0))


def test_conv_dgrad_of_stride_2():
    """A class is a quarter of the pixels: what overflows is the row in dx and its offset."""
    p = problem(3, 2)
    dx, _ = conv_dgrad(reserved(p.P, p.Q), weight(3), p, CONFIG, residual=reserved())
    assert dx.numel() > 2**31


@pytest.mark.parametrize("kernel", [1, 3])
def test_conv_wgrad(kernel):
    config = GemmConfig(64, 64, 512, split=4096)
    dw = conv_wgrad(reserved(), reserved(), problem(kernel), config, out_dtype=torch.float32)
    assert dw.shape == (C, C, kernel, kernel)


def test_conv_pair():
    x, dz, y, residual, w = reserved(), reserved(), reserved(), reserved(), weight(1)
    config = GemmConfig(512, 64, 64, split=N)
    coeffs = torch.randn(3, C)
    dx, _ = conv_pair(x, dz, y, coeffs, w, problem(1), config, residual=residual, out_dtype=torch.float32)
    a, b, c = coeffs[:, None, :, None, None]
    dy = (a * dz[-1:] + b * y[-1:] + c).half()
    plain = torch.nn.grad.conv2d_input((1, C, H, W), w.float(), dy.float())
    assert_last_row(dx, plain + residual[-1:])


def test_conv_wgrad_partials():
    """Few pixels, but 1024 parts of a wide filter's gradient."""
    wide = ConvProblem(1, 32, 32, 512, 512, 3, 3, padding=(1, 1), dtype="float16")
    x = torch.zeros(1, 512, 32, 32, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    assert 1024 * wide.Co * wide.Ci * wide.taps > 2**31
    conv_wgrad(x, x, wide, GemmConfig(64, 64, 16, split=1024), out_dtype=torch.float32)


def test_bottleneck_single():
    """One tile an image; the scratches of all programs together have more than 2^31 elements too."""
    config = SingleConfig(4096, 64, 64, block_halo=1024, tile_p=H, tile_q=W, programs=N)
    convs = problem(1), problem(3), problem(1)
    x, rows = reserved(), [torch.rand(C) for _ in range(4)]
    layers = [FrozenLayer(weight(conv.R), *rows, 1e-5) for conv in convs]
    block = ChainProblem(convs, None, "identity", batch_statistics=False, backward=False)
    out = bottleneck_single(x, tuple(layers), block, config, residual=x)
    gamma, beta, mean, var = rows
    z = x[-1:].float()
    for layer, conv in zip(layers, convs, strict=True):
        y = F.conv2d(z.half().float(), layer.weight.float(), padding=conv.padding)
        z = F.batch_norm(y, mean, var, gamma, beta, False, 0.0, 1e-5)
        z = (z + x[-1:] if layer is layers[-1] else z).relu()
    assert_last_row(out, z)


def test_passes():
    y, residual, dout = reserved(), reserved(), reserved()
    stats = torch.rand(4, C)
    scale, shift = stats[2:, None, :, None, None]
    out = bn_act.bn_act(y, stats, PASS, residual=residual)
    expected = (y[-1:].float() * scale + shift + residual[-1:].float()).relu()
    assert_last_row(out, expected)
    bn_stats.bn_stats(y, PASS)
    dz, _ = bn_act_grad.bn_act_grad_reduce(dout, y, stats, PASS, out=out)
    assert_last_row(dz, torch.where(expected > 0, dout[-1:].float(), 0.0))
    coeffs = torch.rand(3, C)
    a, b, c = coeffs[:, None, :, None, None]
    assert_last_row(bn_act_grad.bn_grad_apply(dout, y, coeffs, PASS), a * dout[-1:] + b * y[-1:] + c)


def test_stem():
    y, stats = reserved(), torch.rand(4, C)
    out, index = stem_pool.stem_pool(y, stats, PASS)
    scale, shift = stats[2:, None, :, None, None]
    assert_last_row(out, F.max_pool2d((y[-1:] * scale + shift).relu(), 3, 2, 1))
    stem_pool.stem_pool_grad_reduce(out, index, out, y, stats, PASS)
    stem_pool.stem_pool_grad_apply(out, index, out, y, torch.rand(3, C), PASS)
