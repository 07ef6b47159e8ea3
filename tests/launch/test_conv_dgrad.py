"""conv_dgrad against torch's own input gradient in float64."""

from dataclasses import replace

import pytest
import torch

from fused_resnet.launch.conv_dgrad import conv_dgrad
from fused_resnet.launch.record import record_launches
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.problem import ConvProblem
from tests.bits import pack

CONFIG = GemmConfig(block_m=32, block_n=16, block_k=16, num_warps=4)
TRANSPOSED = replace(CONFIG, transposed=True)
CONFIGS = pytest.mark.parametrize("config", [CONFIG, TRANSPOSED], ids=["rows", "transposed"])
EPILOGUES = pytest.mark.parametrize(
    "config", [CONFIG, TRANSPOSED, replace(CONFIG, prefetch=True)], ids=["rows", "transposed", "prefetched"]
)
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

POINTWISE = [
    ConvProblem(2, 5, 6, 20, 5, dtype="float64"),
    ConvProblem(1, 1, 1, 3, 5, dtype="float64"),  # one row
    ConvProblem(4, 4, 4, 16, 16, dtype="float64"),  # everything fills its block
    ConvProblem(2, 5, 7, 20, 70, stride=(2, 2), dtype="float64"),  # three classes of four without taps
    ConvProblem(1, 7, 8, 5, 3, stride=(3, 2), dtype="float64"),
    ConvProblem(1, 5, 1, 5, 3, stride=(2, 2), dtype="float64"),  # classes without pixels
]
SPATIAL = [
    ConvProblem(1, 8, 7, 16, 32, 3, 3, padding=(1, 1), dtype="float64"),
    ConvProblem(2, 7, 9, 5, 20, 3, 3, stride=(2, 2), padding=(1, 1), dtype="float64"),
    ConvProblem(2, 8, 8, 20, 5, 3, 3, stride=(2, 2), padding=(1, 1), dtype="float64"),  # the last row meets no tap
    ConvProblem(1, 9, 9, 3, 6, 7, 7, stride=(2, 2), padding=(3, 3), dtype="float64"),  # more taps than 31
    ConvProblem(1, 9, 8, 4, 32, 3, 3, padding=(2, 2), dilation=(2, 2), dtype="float64"),
    ConvProblem(1, 9, 8, 4, 6, 3, 3, stride=(2, 2), padding=(2, 2), dilation=(2, 2), dtype="float64"),
    ConvProblem(1, 11, 8, 4, 6, 3, 3, stride=(3, 3), padding=(1, 1), dtype="float64"),
    ConvProblem(1, 13, 8, 4, 6, 3, 3, stride=(3, 2), padding=(2, 0), dilation=(2, 3), dtype="float64"),
    ConvProblem(1, 14, 14, 4, 6, 3, 3, stride=(4, 4), padding=(4, 4), dilation=(6, 2), dtype="float64"),
    ConvProblem(1, 7, 7, 4, 6, 3, 3, stride=(2, 2), dtype="float64"),  # without padding
    ConvProblem(1, 9, 10, 4, 6, 3, 2, stride=(1, 2), padding=(3, 0), dilation=(3, 1), dtype="float64"),
    ConvProblem(3, 4, 5, 3, 4, stride=(2, 1), padding=(1, 2), dtype="float64"),  # a padded 1x1
    ConvProblem(5, 1, 1, 3, 4, 3, 3, padding=(1, 1), dtype="float64"),  # only the middle tap exists
]


def nhwc(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)


def operands(problem):
    dtype = DTYPES[problem.dtype]
    dy = nhwc(problem.N, problem.Co, problem.P, problem.Q, dtype=dtype)
    weight = nhwc(problem.Co, problem.Ci, problem.R, problem.S, dtype=dtype)
    return dy, weight


def pixels(problem, dtype):
    return nhwc(problem.N, problem.Ci, problem.H, problem.W, dtype=dtype)


def rows(count, channels, dtype):
    return torch.randn(count, channels, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def per_channel(row):
    return row.double()[None, :, None, None]


def reference(dy, weight, problem, *, y=None, coeffs=None):
    grad = dy.double()
    if coeffs is not None:
        grad = grad * per_channel(coeffs[0])
        if y is not None:
            grad = grad + y.double() * per_channel(coeffs[1]) + per_channel(coeffs[2])
        grad = grad.to(dy.dtype).double()
    shape = (problem.N, problem.Ci, problem.H, problem.W)
    conv2d_input = torch.nn.grad.conv2d_input
    return conv2d_input(shape, weight.double(), grad, problem.stride, problem.padding, problem.dilation)


def assert_close(actual, expected, dtype):
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    error, size = (actual.double() - expected).norm(), expected.norm()
    assert error <= TOLERANCE[dtype] * size, f"relative error {error / size:.2e}"


def assert_sums(tiles, row, expected):
    tolerance = 1e-11 if tiles.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(tiles[row].double().sum(0), expected, rtol=tolerance, atol=tolerance)


@CONFIGS
@pytest.mark.parametrize("problem", POINTWISE + SPATIAL, ids=str)
def test_plain(problem, config):
    dy, weight = operands(problem)
    dx, tiles = conv_dgrad(dy, weight, problem, config)
    assert tiles is None
    assert_close(dx, reference(dy, weight, problem), dy.dtype)


@CONFIGS
@pytest.mark.parametrize("with_y", [False, True], ids=["frozen", "batch"])
@pytest.mark.parametrize("problem", POINTWISE, ids=str)
def test_prologue(problem, with_y, config):
    dy, weight = operands(problem)
    y = nhwc(*dy.shape) if with_y else None
    coeffs = rows(3, problem.Co, dy.dtype)
    dx, _ = conv_dgrad(dy, weight, problem, config, y=y, coeffs=coeffs)
    assert_close(dx, reference(dy, weight, problem, y=y, coeffs=coeffs), dy.dtype)


def test_frozen_prologue_of_a_3x3():
    problem = SPATIAL[1]
    dy, weight = operands(problem)
    coeffs = rows(3, problem.Co, dy.dtype)
    dx, _ = conv_dgrad(dy, weight, problem, CONFIG, coeffs=coeffs)
    assert_close(dx, reference(dy, weight, problem, coeffs=coeffs), dy.dtype)


@EPILOGUES
@pytest.mark.parametrize("with_stats", [False, True], ids=["post_relu", "normalised"])
@pytest.mark.parametrize("problem", POINTWISE + SPATIAL[:7], ids=str)
def test_mask_and_sums(problem, with_stats, config):
    dy, weight = operands(problem)
    x = pixels(problem, dy.dtype)
    x[0, 0, 0, 0] = 0.0
    stats = rows(4, problem.Ci, dy.dtype) if with_stats else None
    dx, tiles = conv_dgrad(dy, weight, problem, config, mask_input=x, mask_stats=stats)
    z = x * per_channel(stats[2]) + per_channel(stats[3]) if with_stats else x
    assert_close(dx, torch.where(z <= 0, 0.0, reference(dy, weight, problem)), dy.dtype)
    assert_sums(tiles, 0, dx.sum((0, 2, 3)))
    if with_stats:
        assert_sums(tiles, 1, (dx * (x - per_channel(stats[0]))).sum((0, 2, 3)))
    else:
        assert torch.equal(tiles[1], torch.zeros_like(tiles[1]))


@EPILOGUES
@pytest.mark.parametrize("residual_stride", [(1, 1), (2, 2), (3, 2)], ids=str)
@pytest.mark.parametrize("problem", POINTWISE[:4] + SPATIAL[:3], ids=str)
def test_residual(problem, residual_stride, config):
    s_h, s_w = residual_stride
    dy, weight = operands(problem)
    expected = reference(dy, weight, problem)
    residual = nhwc(*expected[:, :, ::s_h, ::s_w].shape)
    expected[:, :, ::s_h, ::s_w] += residual
    dx, _ = conv_dgrad(dy, weight, problem, config, residual=residual, residual_stride=residual_stride)
    assert_close(dx, expected, dy.dtype)


@EPILOGUES
@pytest.mark.parametrize("problem", [p for p in POINTWISE + SPATIAL if p.stride == (1, 1)], ids=str)
def test_masked_residual(problem, config):
    """Of the residual what has its bit set, whatever the rest holds."""
    dy, weight = operands(problem)
    expected = reference(dy, weight, problem)
    residual = nhwc(*expected.shape)
    passes = torch.rand(expected.shape) < 0.6
    bits = pack(passes.permute(0, 2, 3, 1).reshape(-1, problem.Ci))
    above = torch.where(passes, residual, torch.inf).contiguous(memory_format=torch.channels_last)
    dx, _ = conv_dgrad(dy, weight, problem, config, residual=above, residual_bits=bits)
    assert_close(dx, expected + torch.where(passes, residual, 0.0), dy.dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 5, 7, 20, 24, 1, 1), (2, 6, 5, 20, 5, 3, 3)], ids=str)
def test_lower_precision(shape, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    problem = ConvProblem(*shape, padding=(shape[-1] // 2,) * 2, dtype=dtype)
    dy, weight = operands(problem)
    prologue = {"coeffs": rows(3, problem.Co, dy.dtype), "y": nhwc(*dy.shape, dtype=dy.dtype)} if shape[-1] == 1 else {}
    x = pixels(problem, dy.dtype)
    stats = rows(4, problem.Ci, dy.dtype)
    dx, tiles = conv_dgrad(dy, weight, problem, CONFIG, mask_input=x, mask_stats=stats, **prologue)
    z = x.float() * per_channel(stats[2]).float() + per_channel(stats[3]).float()
    assert_close(dx, torch.where(z <= 0, 0.0, reference(dy, weight, problem, **prologue)), dy.dtype)
    # The sums are of dx as it was stored.
    assert tiles.dtype == torch.float32
    assert_sums(tiles, 0, dx.double().sum((0, 2, 3)))
    assert_sums(tiles, 1, (dx.double() * (x.double() - per_channel(stats[0]))).sum((0, 2, 3)))


def test_nan_in_the_mask_lets_the_gradient_through():
    problem = ConvProblem(1, 2, 2, 4, 4, dtype="float64")
    dy, weight = operands(problem)
    x = torch.full_like(pixels(problem, torch.float64), float("nan"))
    dx, _ = conv_dgrad(dy, weight, problem, CONFIG, mask_input=x)
    assert_close(dx, reference(dy, weight, problem), torch.float64)


def test_a_masked_nan_gradient_is_zero():
    problem = ConvProblem(1, 2, 2, 4, 4, dtype="float64")
    dy, weight = operands(problem)
    x = -torch.ones_like(pixels(problem, torch.float64))
    dx, tiles = conv_dgrad(torch.full_like(dy, float("nan")), weight, problem, CONFIG, mask_input=x)
    assert torch.equal(dx, torch.zeros_like(dx))
    assert torch.equal(tiles, torch.zeros_like(tiles))


def test_empty_batch():
    problem = ConvProblem(0, 4, 4, 4, 6, 3, 3, stride=(2, 2), padding=(1, 1), dtype="float64")
    dy, weight = operands(problem)
    dx, tiles = conv_dgrad(dy, weight, problem, CONFIG, mask_input=pixels(problem, torch.float64))
    assert dx.shape == (0, 4, 4, 4)
    assert tiles.shape == (2, 0, 4)


def test_meta_tensors_are_only_recorded():
    problem = ConvProblem(8, 56, 56, 64, 64, 3, 3, stride=(2, 2), padding=(1, 1), dtype="bfloat16")

    def empty(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)

    with record_launches() as launches:
        dx, tiles = conv_dgrad(
            empty(8, 64, 28, 28),
            empty(64, 64, 3, 3),
            problem,
            GemmConfig(128, 64, 64),
            mask_input=empty(8, 64, 56, 56),
            mask_stats=torch.empty(4, 64, device="meta"),
        )
    (entry,) = launches
    assert entry.kernel == "conv_dgrad_kernel"
    assert entry.flops == problem.flops
    assert entry.bytes == 2 * (8 * 28 * 28 * 64 + 9 * 64 * 64 + 2 * 8 * 56 * 56 * 64) + 4 * (4 * 64 + tiles.numel())
    assert dx.shape == (8, 64, 56, 56)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dy": torch.zeros(2, 5, 6, 5).double()}, "dy must have shape"),
        ({"weight": torch.zeros(5, 20, 1, 1)}, "weight must be torch.float64"),
        ({"y": nhwc(2, 5, 5, 6)}, "y goes with coeffs"),
        ({"coeffs": torch.zeros(2, 5).double()}, "coeffs must have shape"),
        ({"mask_stats": torch.zeros(4, 20).double()}, "mask_stats goes with mask_input"),
        ({"mask_input": nhwc(2, 20, 5, 6), "residual": nhwc(2, 20, 5, 6)}, "exclude each other"),
        ({"residual": nhwc(2, 20, 5, 6), "residual_stride": (2, 2)}, "residual must have shape"),
        ({"residual_bits": torch.zeros(60, 3, dtype=torch.uint8)}, "residual_bits goes with a residual"),
        ({"residual": nhwc(2, 20, 5, 6), "residual_bits": torch.zeros(60, 2, dtype=torch.uint8)}, "bits must have"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(change, message):
    problem = POINTWISE[0]
    dy, weight = operands(problem)
    arguments = {"dy": dy, "weight": weight, "problem": problem, "config": CONFIG} | change
    with pytest.raises(ValueError, match=message):
        conv_dgrad(**arguments)


def test_a_3x3_refuses_y():
    problem = SPATIAL[0]
    dy, weight = operands(problem)
    with pytest.raises(ValueError, match="1x1"):
        conv_dgrad(dy, weight, problem, CONFIG, y=dy, coeffs=torch.zeros(3, problem.Co).double())
