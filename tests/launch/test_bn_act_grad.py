"""The backward passes of BatchNorm, residual and ReLU against float64 sums and against autograd."""

import itertools

import pytest
import torch

from fused_resnet.launch.bn_act import bn_act
from fused_resnet.launch.bn_act_grad import bn_act_grad_reduce, bn_grad_apply, bn_grad_finalize
from fused_resnet.launch.bn_stats import bn_finalize, bn_stats
from fused_resnet.launch.record import record_launches
from fused_resnet.plan.config import PassConfig
from fused_resnet.plan.passes import pass_config, reduce_config
from tests.bits import relu_bits

SMALL = PassConfig(24, 16, 1)
CONFIGS = {"small": SMALL, "odd": PassConfig(7, 8, 1), "interpreter": reduce_config(70, 20, 4, interpreter=True)}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}
SHAPES = [(2, 3, 5, 7), (2, 20, 5, 7), (3, 70, 4, 4), (1, 5, 1, 1), (4, 16, 6, 6)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-6}


def images(shape, dtype, device, mean=0.0):
    values = mean + torch.randn(shape, dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=torch.channels_last).to(device)


def statistics(channels, dtype, device):
    return torch.randn(4, channels, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)


def per_channel(row):
    return row.double()[:, None, None]


def tile_sums(image, rows_per_tile):
    """[T, C] sums over consecutive rows, in float64."""
    rows = image.double().permute(0, 2, 3, 1).reshape(-1, image.shape[1])
    return torch.stack([group.sum(0) for group in rows.split(rows_per_tile)])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("has_y", "has_out", "has_residual", "relu", "store_dz"),
    [
        flags
        for flags in itertools.product([True, False], repeat=5)
        if not (flags[3] and not flags[1] and (not flags[0] or flags[2]))  # the mask needs y, or out beside a residual
    ],
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_reduce_every_combination(has_y, has_out, has_residual, relu, store_dz, dtype, device):
    check_reduce((2, 20, 5, 7), dtype, SMALL, device, has_y, has_out, has_residual, relu, store_dz)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reduce_every_size(shape, config, device):
    check_reduce(shape, torch.float32, config, device, True, True, True, True, True)
    check_reduce(shape, torch.float32, config, device, True, False, False, True, True)


def check_reduce(shape, dtype, config, device, has_y, has_out, has_residual, relu, store_dz):
    dout, y, out, residual = (images(shape, dtype, device) for _ in range(4))
    out = out.relu()
    stats, residual_stats = (statistics(shape[1], dtype, device) for _ in range(2))
    dz, tiles = bn_act_grad_reduce(
        dout,
        y if has_y else None,
        stats if has_y else None,
        config,
        out=out if has_out else None,
        residual=residual if has_residual else None,
        residual_stats=residual_stats if has_residual else None,
        relu=relu,
        store_dz=store_dz,
    )
    expected = dout
    if relu:
        pre = out if has_out else y.double() * per_channel(stats[2]) + per_channel(stats[3])
        expected = torch.where(pre <= 0, 0, dout)
    if not store_dz:
        assert dz is None
    elif not relu:
        assert dz is dout
    else:
        assert torch.equal(dz, expected) and dz.permute(0, 2, 3, 1).is_contiguous()
    sums = [expected.double()]
    sums.append(expected.double() * (y.double() - per_channel(stats[0])) if has_y else torch.zeros_like(sums[0]))
    if has_residual:
        sums.append(expected.double() * (residual.double() - per_channel(residual_stats[0])))
    expected_tiles = torch.stack([tile_sums(image, config.block_m) for image in sums])
    assert tiles.dtype == stats.dtype and tiles.shape == expected_tiles.shape
    torch.testing.assert_close(tiles.double(), expected_tiles, rtol=TOLERANCE[dtype], atol=32 * TOLERANCE[dtype])


@pytest.mark.parametrize("residual", [True, False], ids=["projection", "alone"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_in_place_of_the_output(shape, config, residual, device):
    """The same gradient and sums, bit by bit; NaN in the output passes."""
    dout, y, out, shortcut = (images(shape, torch.float32, device) for _ in range(4))
    out = out.relu()
    out[0, -1, 0, 0] = float("nan")
    stats = statistics(shape[1], torch.float32, device)
    more = {"residual": shortcut, "residual_stats": stats} if residual else {}
    expected = bn_act_grad_reduce(dout, y, stats, config, out=out, **more)
    found = bn_act_grad_reduce(dout, y, stats, config, bits=relu_bits(out), **more)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert found[0][0, -1, 0, 0] == dout[0, -1, 0, 0]


@pytest.mark.parametrize("value", [0.0, -0.0, float("nan"), -1.0, 1.0])
def test_the_mask_is_a_selection(value, device):
    """Nothing at 0, -0 and below, even of an infinite gradient; all of it above, and at NaN."""
    out = torch.full((1, 5, 2, 2), value, device=device).contiguous(memory_format=torch.channels_last)
    dout = torch.full_like(out, float("inf"))
    dz, _ = bn_act_grad_reduce(dout, None, None, SMALL, out=out)
    assert torch.equal(dz, dout if not value <= 0 else torch.zeros_like(dout))


def test_nan_poisons_its_own_channel_alone(device):
    dout, y = (images((2, 20, 5, 7), torch.float32, device) for _ in range(2))
    stats = statistics(20, torch.float32, device)
    dout[1, 3, 2, 2] = float("nan")
    stats[3, 3] = 100.0  # the ReLU passes it
    dz, tiles = bn_act_grad_reduce(dout, y, stats, SMALL)
    assert dz.isnan().sum() == 1
    _, _, coeffs = bn_grad_finalize(tiles, stats, None, 70)
    dy = bn_grad_apply(dz, y, coeffs, SMALL)
    assert dy[:, 3].isnan().all() and dy[:, torch.arange(20, device=device) != 3].isfinite().all()


@pytest.mark.parametrize("row", [1, 2])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tiles", [1, 3, 2500])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_finalize(dtype, tiles, affine, row, device):
    data = torch.randn(3, tiles, 20, dtype=dtype, device=device)
    stats = torch.randn(4, 20, dtype=dtype, device=device)
    weight = torch.randn(20, device=device) if affine else None
    dgamma, dbeta, coeffs = bn_grad_finalize(data, stats, weight, 1000, row=row)
    mean, rstd = stats[0].double(), stats[1].double()
    sums = data.double().sum(1)
    a = rstd * (weight.double() if affine else 1.0)
    b = -a * rstd * rstd * sums[row] / 1000
    expected = torch.stack([a, b, -a * sums[0] / 1000 - b * mean])
    close = {"rtol": TOLERANCE[dtype], "atol": 16 * TOLERANCE[dtype]}
    torch.testing.assert_close(dbeta.double(), sums[0], **close)
    torch.testing.assert_close(dgamma.double(), rstd * sums[row], **close)
    torch.testing.assert_close(coeffs.double(), expected, **close)
    assert dgamma.dtype == dbeta.dtype == coeffs.dtype == dtype


@pytest.mark.quick
@pytest.mark.parametrize("has_y", [True, False])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_apply_every_combination(dtype, has_y, device):
    check_apply((2, 20, 5, 7), dtype, SMALL, has_y, device)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_apply_every_size(shape, config, device):
    check_apply(shape, torch.float32, config, True, device)


def check_apply(shape, dtype, config, has_y, device):
    dz, y = (images(shape, dtype, device) for _ in range(2))
    coeffs = statistics(shape[1], dtype, device)[:3].contiguous()
    dy = bn_grad_apply(dz, y if has_y else None, coeffs, config)
    expected = per_channel(coeffs[0]) * dz.double()
    if has_y:
        expected = expected + per_channel(coeffs[1]) * y.double() + per_channel(coeffs[2])
    tolerance = 2**-11 if dtype == torch.float16 else TOLERANCE[dtype]
    assert dy.dtype == dtype and dy.permute(0, 2, 3, 1).is_contiguous()
    torch.testing.assert_close(dy.double(), expected, rtol=tolerance, atol=8 * tolerance)


@pytest.mark.quick
@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_chain_is_the_gradient_of_the_forward(dtype, projection, mean, device):
    """Statistics, forward, reductions and dy together, against autograd in float64 with the candidate's mask."""
    config = pass_config(70, 20, 4, interpreter=True)
    raw = [images((2, 20, 5, 7), dtype, device, mean) for _ in range(1 + projection)]
    gammas, betas = ([torch.randn(20, dtype=dtype, device=device) for _ in raw] for _ in range(2))
    merged = [
        bn_finalize(bn_stats(y, SMALL), weight=g, bias=b, running_mean=None, running_var=None, momentum=0.1, eps=1e-5)
        for y, g, b in zip(raw, gammas, betas, strict=True)
    ]
    shortcut = {"residual": raw[1], "residual_stats": merged[1]} if projection else {}
    out = bn_act(raw[0], merged[0], config, **shortcut)
    dout = images((2, 20, 5, 7), dtype, device)
    dz, tiles = bn_act_grad_reduce(dout, raw[0], merged[0], SMALL, out=out, **shortcut)

    leaves = [[t.double().requires_grad_() for t in group] for group in (raw, gammas, betas)]
    normalised = [
        torch.nn.functional.batch_norm(y, None, None, g, b, training=True) for y, g, b in zip(*leaves, strict=True)
    ]
    pre = sum(normalised)
    torch.where(out <= 0, 0, pre).backward(dout.double())
    tolerance = 1e-10 if dtype == torch.float64 else 3e-6 * (1 + mean)
    for i, (y, stats, gamma) in enumerate(zip(raw, merged, gammas, strict=True)):
        dgamma, dbeta, coeffs = bn_grad_finalize(tiles, stats, gamma, 70, row=1 + i)
        dy = bn_grad_apply(dz, y, coeffs, config)
        for got, leaf in zip((dy, dgamma, dbeta), (group[i] for group in leaves), strict=True):
            error = (got.double() - leaf.grad).norm() / leaf.grad.norm()
            assert error < tolerance, f"relative error {error:.2e}"


def test_meta_tensors_are_recorded_alone():
    y = torch.empty((2, 64, 5, 7), device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    stats = torch.empty((4, 64), device="meta")
    with record_launches() as launches:
        dz, tiles = bn_act_grad_reduce(y, y, stats, SMALL, out=y)
        dgamma, dbeta, coeffs = bn_grad_finalize(tiles, stats, None, 70)
        dy = bn_grad_apply(dz, y, coeffs, SMALL)
    assert dz.shape == dy.shape == y.shape and dgamma.shape == dbeta.shape == (64,)
    assert [launch.kernel for launch in launches] == [
        "bn_act_grad_reduce_kernel",
        "bn_grad_finalize_kernel",
        "bn_grad_apply_kernel",
    ]
    image, tile = 2 * 64 * 35 * 2, 2 * 3 * 64 * 4
    assert [launch.bytes for launch in launches] == [
        4 * image + 4 * 64 * 4 + tile,
        tile + (4 + 1 + 1 + 3) * 64 * 4,
        3 * image + 3 * 64 * 4,
    ]


def test_errors(device):
    y, stats = images((2, 5, 4, 4), torch.float32, device), statistics(5, torch.float32, device)
    with pytest.raises(ValueError, match="needs y, out or bits"):
        bn_act_grad_reduce(y, None, None, SMALL)
    with pytest.raises(ValueError, match="given twice"):
        bn_act_grad_reduce(y, y, stats, SMALL, out=y, bits=relu_bits(y))
    with pytest.raises(ValueError, match="bits must have shape"):
        bn_act_grad_reduce(y, y, stats, SMALL, bits=relu_bits(y)[:-1])
    with pytest.raises(ValueError, match="y needs stats"):
        bn_act_grad_reduce(y, y, None, SMALL)
    with pytest.raises(ValueError, match="come together"):
        bn_act_grad_reduce(y, y, stats, SMALL, out=y, residual=y)
    with pytest.raises(ValueError, match="needs out or bits"):
        bn_act_grad_reduce(y, y, stats, SMALL, residual=y, residual_stats=stats)
    with pytest.raises(ValueError, match="channels_last"):
        bn_act_grad_reduce(y.contiguous(), y, stats, SMALL)
    tiles = torch.zeros(2, 3, 5, device=device)
    with pytest.raises(ValueError, match="row must be"):
        bn_grad_finalize(tiles, stats, None, 32, row=2)
    with pytest.raises(ValueError, match="rows must be positive"):
        bn_grad_finalize(tiles, stats, None, 0)
    with pytest.raises(ValueError, match="coeffs must have shape"):
        bn_grad_apply(y, y, stats, SMALL)
