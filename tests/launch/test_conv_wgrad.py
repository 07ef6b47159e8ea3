"""conv_wgrad against torch's own weight gradient in float64."""

from dataclasses import replace

import pytest
import torch

from fused_resnet.launch.conv_wgrad import conv_wgrad
from fused_resnet.launch.record import record_launches
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.problem import ConvProblem
from fused_resnet.plan.split import wgrad_split

CONFIG = GemmConfig(block_m=16, block_n=16, block_k=16, num_warps=4)
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3}

POINTWISE = [
    ConvProblem(2, 5, 3, 20, 36),
    ConvProblem(1, 1, 1, 3, 5),  # one row
    ConvProblem(2, 7, 6, 5, 3, stride=(2, 2)),
    ConvProblem(1, 7, 8, 3, 70, stride=(3, 2)),
    ConvProblem(4, 4, 4, 16, 16),  # rows fill the blocks exactly
]
SPATIAL = [
    ConvProblem(2, 5, 6, 20, 5, 3, 3, padding=(1, 1)),
    ConvProblem(2, 7, 7, 3, 17, 3, 3, stride=(2, 2), padding=(1, 1)),
    ConvProblem(1, 9, 11, 5, 3, 7, 7, stride=(2, 2), padding=(3, 3)),
    ConvProblem(2, 8, 7, 3, 5, 3, 3, stride=(3, 3)),  # without padding
    ConvProblem(1, 9, 8, 4, 6, 3, 3, padding=(2, 2), dilation=(2, 2)),
    ConvProblem(1, 9, 10, 4, 6, 3, 2, stride=(1, 2), padding=(3, 0), dilation=(3, 1)),
    ConvProblem(5, 1, 1, 3, 4, 3, 3, padding=(1, 1)),  # many images in one block of rows
    ConvProblem(3, 4, 5, 3, 4, padding=(1, 2)),  # a padded 1x1
    ConvProblem(2, 4, 4, 16, 16, 3, 3, padding=(1, 1)),
]


def nhwc(*shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def operands(problem, dtype):
    x = nhwc(problem.N, problem.Ci, problem.H, problem.W, dtype=dtype, seed=1)
    dy = nhwc(problem.N, problem.Co, problem.P, problem.Q, dtype=dtype, seed=2)
    return x, dy


def reference(x, dy, problem):
    shape = (problem.Co, problem.Ci, problem.R, problem.S)
    grad = torch.nn.grad.conv2d_weight
    return grad(x.double(), shape, dy.double(), problem.stride, problem.padding, problem.dilation)


def assert_close(actual, expected, dtype):
    assert actual.shape == expected.shape
    assert actual.is_contiguous(memory_format=torch.channels_last)
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


def per_channel(rows, channels, dtype, seed=3):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((rows, channels), generator=generator, dtype=torch.float64)
    return values.to(torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("problem", POINTWISE + SPATIAL, ids=str)
def test_plain(problem, split):
    x, dy = operands(problem, torch.float64)
    config = GemmConfig(16, 16, 16, num_warps=4, split=split)
    dw = conv_wgrad(x, dy, problem, config, out_dtype=torch.float64)
    assert_close(dw, reference(x, dy, problem), torch.float64)


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("problem", [problem for problem in SPATIAL if problem.S == 3], ids=str)
def test_three_taps_to_a_program(problem, split):
    x, dy = operands(problem, torch.float64)
    config = GemmConfig(16, 16, 16, num_warps=4, split=split)
    dw = conv_wgrad(x, dy, problem, replace(config, row_taps=3), out_dtype=torch.float64)
    assert torch.equal(dw, conv_wgrad(x, dy, problem, config, out_dtype=torch.float64))
    assert_close(dw, reference(x, dy, problem), torch.float64)


@pytest.mark.parametrize("split", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("problem", [POINTWISE[0], SPATIAL[1]], ids=str)
def test_lower_precision(problem, dtype, split, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x, dy = operands(problem, dtype)
    config = GemmConfig(32, 16, 16, num_warps=4, split=split)
    for out_dtype in (dtype, torch.float32):
        dw = conv_wgrad(x, dy, problem, config, out_dtype=out_dtype)
        assert dw.dtype == out_dtype
        assert_close(dw, reference(x, dy, problem), dtype)


@pytest.mark.parametrize("with_y", [False, True])
@pytest.mark.parametrize("with_affine", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("problem", POINTWISE + [SPATIAL[0], SPATIAL[7]], ids=str)
def test_prologues(problem, dtype, with_affine, with_y, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x, dz = operands(problem, dtype)
    y = nhwc(*dz.shape, dtype=dtype, seed=4) if with_y else None
    coeffs = per_channel(3, problem.Co, dtype)
    input_affine = per_channel(4, problem.Ci, dtype, seed=5)[2:4] if with_affine else None
    arguments = {"input_affine": input_affine, "y": y, "coeffs": coeffs, "out_dtype": coeffs.dtype}
    config = GemmConfig(16, 32, 16, num_warps=4, split=2)
    dw = conv_wgrad(x, dz, problem, config, **arguments)

    a, b, c = coeffs[:, None, :, None, None]
    dy = a * dz if y is None else a * dz + (b * y + c)
    if input_affine is not None:
        scale, shift = input_affine[:, None, :, None, None]
        x = (x * scale + shift).relu()
    assert_close(dw, reference(x.to(dtype), dy.to(dtype), problem), dtype)


def test_more_parts_than_rows():
    problem = ConvProblem(1, 4, 5, 3, 4)
    x, dy = operands(problem, torch.float64)
    dw = conv_wgrad(x, dy, problem, GemmConfig(16, 16, 16, num_warps=4, split=40), out_dtype=torch.float64)
    assert_close(dw, reference(x, dy, problem), torch.float64)


def test_two_runs_agree_bit_for_bit():
    problem = ConvProblem(2, 9, 9, 20, 5, 3, 3, padding=(1, 1), dtype="float32")
    x, dy = operands(problem, torch.float32)
    config = GemmConfig(16, 16, 16, num_warps=4, split=7)
    first, second = (conv_wgrad(x, dy, problem, config, out_dtype=torch.float32) for _ in range(2))
    assert torch.equal(first, second)


def test_nan_stays_in_its_channels():
    problem = ConvProblem(1, 4, 5, 4, 6)
    x, dy = operands(problem, torch.float64)
    x[0, 1, 2, 3] = float("nan")
    dy[0, 2, 0, 0] = float("nan")
    dw = conv_wgrad(x, dy, problem, CONFIG, out_dtype=torch.float64)
    expected = torch.zeros(6, 4, dtype=torch.bool)
    expected[2, :] = expected[:, 1] = True
    assert torch.equal(dw[:, :, 0, 0].isnan(), expected)


def test_empty_batch_gives_zeros():
    problem = ConvProblem(0, 4, 4, 3, 4, 3, 3, padding=(1, 1))
    x, dy = operands(problem, torch.float32)
    for split in (1, 2):
        config = GemmConfig(16, 16, 16, num_warps=4, split=split)
        assert torch.equal(conv_wgrad(x, dy, problem, config, out_dtype=torch.float32), torch.zeros(4, 3, 3, 3))


def test_records_on_meta():
    problem = ConvProblem(8, 14, 14, 256, 512, stride=(2, 2))
    x = torch.empty(8, 256, 14, 14, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    dy = torch.empty(8, 512, 7, 7, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    with record_launches() as launches:
        dw = conv_wgrad(x, dy, problem, GemmConfig(128, 128, 64, split=3), out_dtype=torch.float32)
    assert dw.shape == (512, 256, 1, 1)
    main, reduce = launches
    partial = 3 * 512 * 256 * 4
    assert main.kernel == "conv_wgrad_kernel" and main.flops == problem.flops
    assert main.bytes == problem.M * (256 + 512) * 2 + partial  # only the sampled rows of x
    assert reduce.kernel == "conv_wgrad_reduce_kernel" and reduce.bytes == partial + 512 * 256 * 4


def test_refuses_what_it_cannot_do():
    problem = ConvProblem(1, 4, 4, 4, 4, dtype="float32")
    x, dy = operands(problem, torch.float32)
    with pytest.raises(ValueError, match="no use without coeffs"):
        conv_wgrad(x, dy, problem, CONFIG, y=dy, out_dtype=torch.float32)
    with pytest.raises(ValueError, match="channels_last"):
        conv_wgrad(x.contiguous(), dy, problem, CONFIG, out_dtype=torch.float32)
    with pytest.raises(ValueError, match="one group"):
        conv_wgrad(x, dy, ConvProblem(1, 4, 4, 4, 4, groups=2), CONFIG, out_dtype=torch.float32)
    with pytest.raises(ValueError, match="three wide"):
        conv_wgrad(x, dy, problem, replace(CONFIG, row_taps=3), out_dtype=torch.float32)


def test_split_fills_the_device_and_bounds_the_workspace():
    wide = ConvProblem(256, 56, 56, 64, 256)  # 2 tiles of 128 x 64
    assert wgrad_split(wide, 128, 64, 64, 132) == 132
    deep = ConvProblem(256, 7, 7, 512, 2048)  # 64 tiles of 128 x 128
    assert wgrad_split(deep, 128, 128, 64, 132) == 2
    assert wgrad_split(ConvProblem(1, 1, 1, 3, 5), 64, 64, 64, 132) == 1
    rows = ConvProblem(256, 56, 56, 64, 64, 3, 3, padding=(1, 1))  # 9 tiles of 64 x 64, 3 with a filter row each
    assert wgrad_split(rows, 64, 64, 64, 132, row_taps=3) == 88
    for problem in (wide, deep, ConvProblem(256, 14, 14, 256, 256, 3, 3, padding=(1, 1))):
        split = wgrad_split(problem, 128, 128, 64, 108)
        tiles = -(-problem.Co // 128) * -(-problem.Ci // 128) * problem.taps
        assert tiles * split <= 2 * 108
