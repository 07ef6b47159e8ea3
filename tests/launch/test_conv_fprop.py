"""conv_fprop against torch's own convolution in float64."""

from dataclasses import replace

import pytest
import torch

from fused_resnet.launch.bits import empty_bits
from fused_resnet.launch.conv_fprop import conv_fprop
from fused_resnet.launch.record import record_launches
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.problem import ConvProblem
from tests.bits import relu_bits

CONFIG = GemmConfig(block_m=32, block_n=16, block_k=16, num_warps=4)
TRANSPOSED = replace(CONFIG, transposed=True)
CONFIGS = pytest.mark.parametrize("config", [CONFIG, TRANSPOSED], ids=["rows", "transposed"])
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

POINTWISE = [
    ConvProblem(2, 5, 6, 20, 5, dtype="float64"),
    ConvProblem(1, 1, 1, 3, 5, dtype="float64"),  # one row
    ConvProblem(4, 4, 4, 16, 16, dtype="float64"),  # everything fills its block
    ConvProblem(2, 5, 7, 20, 70, stride=(2, 2), dtype="float64"),
    ConvProblem(1, 7, 8, 32, 3, stride=(3, 2), dtype="float64"),
]
SPATIAL = [
    ConvProblem(1, 8, 7, 16, 32, 3, 3, padding=(1, 1), dtype="float64"),
    ConvProblem(2, 7, 9, 5, 20, 3, 3, stride=(2, 2), padding=(1, 1), dtype="float64"),
    ConvProblem(1, 9, 9, 3, 6, 7, 7, stride=(2, 2), padding=(3, 3), dtype="float64"),  # more taps than 31
    ConvProblem(1, 9, 8, 32, 6, 3, 3, padding=(2, 2), dilation=(2, 2), dtype="float64"),
    ConvProblem(1, 9, 8, 4, 6, 3, 3, stride=(2, 2), padding=(2, 2), dilation=(2, 2), dtype="float64"),
    ConvProblem(1, 11, 8, 4, 6, 3, 3, stride=(3, 3), padding=(1, 1), dtype="float64"),
    ConvProblem(1, 7, 7, 4, 6, 3, 3, dtype="float64"),  # without padding
    ConvProblem(1, 9, 10, 20, 6, 3, 2, stride=(1, 2), padding=(3, 0), dilation=(3, 1), dtype="float64"),
    ConvProblem(3, 4, 5, 3, 4, padding=(1, 2), dtype="float64"),  # a padded 1x1
    ConvProblem(5, 1, 1, 3, 4, 3, 3, padding=(1, 1), dtype="float64"),  # only the middle tap exists
    ConvProblem(1, 10, 9, 2, 3, 9, 7, padding=(4, 3), dtype="float64"),  # 63 taps, the most there may be
]
EPILOGUES = [
    {"stats": True},
    {"output_affine": True},
    {"output_affine": True, "residual": True, "relu": True},
    {"output_affine": True, "residual": True, "residual_affine": True, "relu": True},
    {"residual": True, "residual_affine": True},
    {"residual": True, "stats": True},
    {"relu": True},
]


def nhwc(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)


def operands(problem):
    dtype = DTYPES[problem.dtype]
    x = nhwc(problem.N, problem.Ci, problem.H, problem.W, dtype=dtype)
    weight = nhwc(problem.Co, problem.Ci, problem.R, problem.S, dtype=dtype)
    return x, weight


def rows(count, channels, dtype):
    return torch.randn(count, channels, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def per_channel(row):
    return row.double()[None, :, None, None]


def reference(
    x, weight, problem, *, input_affine=None, output_affine=None, residual=None, residual_affine=None, relu=False
):
    a = x.double()
    if input_affine is not None:
        a = torch.relu(a * per_channel(input_affine[0]) + per_channel(input_affine[1])).to(x.dtype).double()
    y = torch.nn.functional.conv2d(a, weight.double(), None, problem.stride, problem.padding, problem.dilation)
    if output_affine is not None:
        y = y * per_channel(output_affine[0]) + per_channel(output_affine[1])
    if residual is not None:
        residual = residual.double()
        if residual_affine is not None:
            residual = residual * per_channel(residual_affine[0]) + per_channel(residual_affine[1])
        y = y + residual
    return torch.relu(y) if relu else y


def assert_close(actual, expected, dtype):
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    error, size = (actual.double() - expected).norm(), expected.norm()
    assert error <= TOLERANCE[dtype] * size, f"relative error {error / size:.2e}"


def assert_stats(tiles, y):
    """The tiles are the statistics of consecutive groups of rows of y as it was stored."""
    values = y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]).double()
    assert tiles.rows == len(values)
    groups = values.split(tiles.rows_per_tile)
    mean = torch.stack([group.mean(0) for group in groups])
    m2 = torch.stack([((group - group.mean(0)) ** 2).sum(0) for group in groups])
    tolerance = 1e-12 if tiles.data.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(tiles.data.double(), torch.stack([mean, m2]), rtol=tolerance, atol=tolerance)


@CONFIGS
@pytest.mark.parametrize("problem", POINTWISE + SPATIAL, ids=str)
def test_plain(problem, config):
    x, weight = operands(problem)
    y, tiles = conv_fprop(x, weight, problem, config, stats=True)
    assert_close(y, reference(x, weight, problem), x.dtype)
    assert_stats(tiles, y)


@CONFIGS
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
@pytest.mark.parametrize("prologue", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("problem", [POINTWISE[0], POINTWISE[2], POINTWISE[3], SPATIAL[0], SPATIAL[1]], ids=str)
def test_prologue_and_epilogue(problem, prologue, epilogue, config):
    x, weight = operands(problem)
    arguments = dict(epilogue)
    stats = arguments.pop("stats", False)
    if prologue:
        arguments["input_affine"] = rows(2, problem.Ci, x.dtype)
    if "output_affine" in arguments:
        arguments["output_affine"] = rows(2, problem.Co, x.dtype)
    if "residual_affine" in arguments:
        arguments["residual_affine"] = rows(2, problem.Co, x.dtype)
    if "residual" in arguments:
        arguments["residual"] = nhwc(problem.N, problem.Co, problem.P, problem.Q, dtype=x.dtype)
    y, tiles = conv_fprop(x, weight, problem, config, stats=stats, **arguments)
    assert_close(y, reference(x, weight, problem, **arguments), x.dtype)
    if stats:
        assert_stats(tiles, y)
    else:
        assert tiles is None


@CONFIGS
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 5, 7, 20, 24, 1, 1), (2, 6, 5, 20, 5, 3, 3)], ids=str)
def test_lower_precision(shape, dtype, config, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    problem = ConvProblem(*shape, padding=(shape[-1] // 2,) * 2, dtype=dtype)
    x, weight = operands(problem)
    stats = rows(4, problem.Ci, x.dtype)
    y, tiles = conv_fprop(x, weight, problem, config, stats=True, input_affine=stats[2:4])
    assert_close(y, reference(x, weight, problem, input_affine=stats[2:4]), x.dtype)
    assert tiles.data.dtype == torch.float32
    assert_stats(tiles, y)


def test_statistics_of_a_large_mean():
    """Tiles are centred: a mean of a thousand standard deviations costs no digits of the variance."""
    problem = ConvProblem(1, 16, 16, 16, 4, dtype="float32")
    x, weight = operands(problem)
    x = (x + 4096).contiguous(memory_format=torch.channels_last)
    y, tiles = conv_fprop(x, weight, problem, CONFIG, stats=True)
    values = y.permute(0, 2, 3, 1).reshape(-1, 32, 4).double()
    m2 = ((values - values.mean(1, keepdim=True)) ** 2).sum(1)
    torch.testing.assert_close(tiles.data[1].double(), m2, rtol=1e-4, atol=0)


def test_padding_is_zero_after_the_prologue():
    problem = ConvProblem(1, 1, 1, 4, 4, 3, 3, padding=(1, 1), dtype="float64")
    x, weight = operands(problem)
    affine = torch.stack([torch.zeros(4), torch.ones(4)]).double()
    y, _ = conv_fprop(x, weight, problem, CONFIG, input_affine=affine)
    assert_close(y, weight[:, :, 1, 1].sum(1).reshape(1, 4, 1, 1), torch.float64)


def test_nan_poisons_its_own_pixel_alone():
    problem = ConvProblem(1, 4, 4, 4, 4, dtype="float64")
    x, weight = operands(problem)
    x[0, 0, 1, 1] = float("nan")
    y, _ = conv_fprop(x, weight, problem, CONFIG, input_affine=torch.ones(2, 4).double(), relu=True)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1, 1] = True
    assert torch.equal(y.isnan(), expected.expand(1, 4, 4, 4))


@CONFIGS
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("problem", [*POINTWISE, SPATIAL[0]], ids=str)
def test_bits(problem, residual, config):
    """The mask of y as stored, NaN and the two zeros included; bits past the last channel are zero."""
    x, weight = operands(problem)
    shortcut = nhwc(problem.N, problem.Co, problem.P, problem.Q, dtype=x.dtype)
    if residual:
        weight[problem.Co // 2] = 0
        values = torch.tensor([float("nan"), 0.0, -0.0, 1.0, float("inf")]).double()
        shortcut[:, problem.Co // 2] = values.repeat(problem.M)[: problem.M].view(problem.N, problem.P, problem.Q)
    bits = empty_bits(shortcut.shape, x.device).fill_(0b10101010)
    y, _ = conv_fprop(x, weight, problem, config, residual=shortcut if residual else None, relu=True, bits=bits)
    assert torch.equal(bits, relu_bits(y))


def test_bits_are_of_the_stored_value():
    """What float16 rounds to zero lets no gradient through."""
    problem = ConvProblem(1, 1, 1, 16, 8, dtype="float16")
    x, weight = (torch.zeros_like(t) for t in operands(problem))
    affine = torch.tensor([[1.0], [1e-9]]).repeat(1, 8)
    bits = empty_bits((1, 8, 1, 1), x.device)
    y, _ = conv_fprop(x, weight, problem, CONFIG, output_affine=affine, relu=True, bits=bits)
    assert not y.any() and not bits.any()


def test_empty_batch():
    problem = ConvProblem(0, 4, 4, 4, 6, 3, 3, padding=(1, 1), dtype="float64")
    y, tiles = conv_fprop(*operands(problem), problem, CONFIG, stats=True)
    assert y.shape == (0, 6, 4, 4)
    assert tiles.data.shape == (2, 0, 6)


def test_meta_tensors_are_only_recorded():
    problem = ConvProblem(8, 56, 56, 64, 256, stride=(2, 2), dtype="bfloat16")
    x = torch.empty(8, 64, 56, 56, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    weight = torch.empty(256, 64, 1, 1, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    with record_launches() as launches:
        y, tiles = conv_fprop(x, weight, problem, GemmConfig(128, 128, 64), stats=True)
    (entry,) = launches
    assert entry.kernel == "conv_fprop_kernel"
    assert entry.flops == 2 * 8 * 28 * 28 * 64 * 256
    assert entry.bytes == 2 * (8 * 28 * 28 * (64 + 256) + 64 * 256) + tiles.data.numel() * 4
    assert y.shape == (8, 256, 28, 28)
    assert tiles.data.shape == (2, 49, 256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 6, 20).double()}, "x must have shape"),
        ({"x": torch.zeros(2, 20, 5, 6).double()}, "channels_last"),
        ({"weight": torch.zeros(5, 20, 1, 1)}, "weight must be torch.float64"),
        ({"weight": torch.zeros(5, 20, 1, 1, dtype=torch.float64, device="meta")}, "weight must be on cpu"),
        ({"input_affine": torch.zeros(2, 20)}, "input_affine must be torch.float64"),
        ({"output_affine": torch.zeros(2, 20).double()}, "output_affine must have shape"),
        ({"residual": torch.zeros(2, 5, 4, 6).double()}, "residual must have shape"),
        ({"residual_affine": torch.zeros(2, 5).double()}, "goes with residual"),
        ({"bits": torch.zeros(60, 1, dtype=torch.uint8)}, "of a ReLU"),
        ({"bits": torch.zeros(60, 2, dtype=torch.uint8), "relu": True}, "bits must have shape"),
        ({"bits": torch.zeros(60, 1), "relu": True}, "bits must be torch.uint8"),
        ({"problem": ConvProblem(2, 5, 6, 20, 5, groups=5, dtype="float64")}, "groups"),
        ({"problem": ConvProblem(2, 5, 6, 20, 5, 8, 8, padding=(4, 4), dtype="float64")}, "63 taps"),
        ({"problem": ConvProblem(2, 5, 6, 20, 5, 7, 7, dtype="float64")}, "does not fit"),
        ({"problem": ConvProblem(2, 5, 6, 20, 5, dtype="float32")}, "described in float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(change, message):
    problem = POINTWISE[0]
    x, weight = operands(problem)
    arguments = {"x": x, "weight": weight, "problem": problem, "config": CONFIG} | change
    with pytest.raises(ValueError, match=message):
        conv_fprop(**arguments)
