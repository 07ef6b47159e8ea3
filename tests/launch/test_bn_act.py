"""bn_act against float64: every combination of residual and ReLU, odd sizes, NaN, what it records."""

import pytest
import torch

from fused_resnet.launch.bits import empty_bits
from fused_resnet.launch.bn_act import bn_act
from fused_resnet.launch.record import record_launches
from fused_resnet.plan.config import PassConfig
from fused_resnet.plan.passes import pass_config
from tests.bits import relu_bits

CONFIGS = {
    "small": PassConfig(24, 16, 1),
    "odd": PassConfig(7, 8, 1),
    "interpreter": pass_config(70, 20, 4, interpreter=True),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}
SHAPES = [(2, 3, 5, 7), (2, 20, 5, 7), (3, 70, 4, 4), (1, 5, 1, 1), (4, 16, 6, 6)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2**-11}


def images(shape, dtype, device):
    return torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last).to(device)


def statistics(channels, dtype, device):
    return torch.randn(4, channels, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)


def normalise(y, stats):
    scale, shift = (stats[row].double()[:, None, None] for row in (2, 3))
    return y.double() * scale + shift


@pytest.mark.quick
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("residual", ["none", "identity", "projection"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_combination(dtype, residual, relu, device):
    check((2, 20, 5, 7), dtype, CONFIGS["small"], residual, relu, device)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_size(shape, config, device):
    check(shape, torch.float32, config, "projection", True, device)
    check(shape, torch.float32, config, "none", True, device)


def check(shape, dtype, config, residual, relu, device):
    y, stats = images(shape, dtype, device), statistics(shape[1], dtype, device)
    shortcut = None if residual == "none" else images(shape, dtype, device)
    shortcut_stats = statistics(shape[1], dtype, device) if residual == "projection" else None
    out = bn_act(y, stats, config, residual=shortcut, residual_stats=shortcut_stats, relu=relu)
    expected = normalise(y, stats)
    if shortcut is not None:
        expected = expected + (shortcut.double() if shortcut_stats is None else normalise(shortcut, shortcut_stats))
    if relu:
        expected = expected.relu()
    assert out.dtype == dtype and out.permute(0, 2, 3, 1).is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits(shape, config, device):
    """The mask of the output as stored, NaN and the two zeros included; bits past the last channel are zero."""
    y, residual = images(shape, torch.float16, device), images(shape, torch.float16, device)
    stats = statistics(shape[1], torch.float16, device)
    stats[2:, 0] = 0
    values = torch.tensor([float("nan"), 0.0, -0.0, 1.0], dtype=torch.float16, device=device)
    residual[:, 0] = values.repeat(residual[:, 0].numel())[: residual[:, 0].numel()].view_as(residual[:, 0])
    bits = empty_bits(shape, y.device).fill_(0b10101010)
    out = bn_act(y, stats, config, residual=residual, bits=bits)
    assert torch.equal(bits, relu_bits(out))


def test_nan_passes_the_relu_and_stays_where_it_is(device):
    y, stats = images((2, 20, 5, 7), torch.float32, device), statistics(20, torch.float32, device)
    clean = bn_act(y, stats, CONFIGS["small"])
    y[1, 3, 2, 2] = float("nan")
    out = bn_act(y, stats, CONFIGS["small"])
    assert out[1, 3, 2, 2].isnan()
    out[1, 3, 2, 2] = clean[1, 3, 2, 2]
    assert torch.equal(out, clean)


def test_empty_batch(device):
    y = images((0, 5, 4, 4), torch.float32, device)
    assert bn_act(y, statistics(5, torch.float32, device), CONFIGS["small"]).shape == y.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_meta_tensors_are_recorded_alone(dtype):
    y = torch.empty((2, 64, 5, 7), device="meta", dtype=dtype).to(memory_format=torch.channels_last)
    stats = torch.empty((4, 64), device="meta")
    with record_launches() as launches:
        out = bn_act(y, stats, CONFIGS["small"], residual=y, residual_stats=stats)
    assert out.shape == y.shape and out.is_contiguous(memory_format=torch.channels_last)
    (launch,) = launches
    assert launch.kernel == "bn_act_kernel" and launch.config == CONFIGS["small"].to_dict()
    assert launch.bytes == 3 * y.numel() * y.element_size() + 2 * 4 * 64 * 4


def test_errors(device):
    y, stats = images((2, 5, 4, 4), torch.float32, device), statistics(5, torch.float32, device)
    with pytest.raises(ValueError, match="channels_last"):
        bn_act(y.contiguous(), stats, CONFIGS["small"])
    with pytest.raises(ValueError, match="residual must have shape"):
        bn_act(y, stats, CONFIGS["small"], residual=y[:1])
    with pytest.raises(ValueError, match="stats must have shape"):
        bn_act(y, stats[:, :4], CONFIGS["small"])
    with pytest.raises(ValueError, match=r"stats must be torch\.float32"):
        bn_act(y, stats.double(), CONFIGS["small"])
    with pytest.raises(ValueError, match="of a ReLU"):
        bn_act(y, stats, CONFIGS["small"], relu=False, bits=empty_bits(y.shape, y.device))
    with pytest.raises(ValueError, match="without a residual"):
        bn_act(y, stats, CONFIGS["small"], residual_stats=stats)
