"""bn_stats, bn_finalize, bn_frozen against float64 and nn.BatchNorm2d; planted errors in the merge are caught."""

import importlib.util
from pathlib import Path

import pytest
import torch

import fused_resnet.kernels.bn_stats as kernels
from fused_resnet.launch import bn_stats as launcher
from fused_resnet.launch.bn_stats import FrozenNorm, bn_finalize, bn_frozen, bn_merge, bn_stats
from fused_resnet.launch.record import record_launches
from fused_resnet.launch.tiles import StatTiles
from fused_resnet.plan.config import PassConfig
from fused_resnet.plan.passes import CUMULATIVE, FEW_TILES, reduce_config

SMALL = PassConfig(block_m=24, block_c=16, num_warps=1)  # several tiles, several steps, a last partial one
LONG = PassConfig(block_m=96, block_c=16, num_warps=1)  # several steps of whole vectors in every dtype
CONFIGS = {
    "small": SMALL,
    "odd": PassConfig(7, 8, 1),
    "long": LONG,
    "interpreter": reduce_config(70, 20, 4, interpreter=True),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}
SHAPES = [(2, 3, 5, 7), (2, 20, 5, 7), (3, 70, 4, 4), (1, 5, 1, 1), (4, 16, 6, 6)]


def images(shape, dtype, device, mean=0.5, std=2.0):
    values = mean + std * torch.randn(shape, dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=torch.channels_last).to(device)


def moments(y):
    """(mean, biased variance) per channel, in float64."""
    columns = y.double().transpose(0, 1).flatten(1)
    return columns.mean(1), columns.var(1, unbiased=False)


def finalize(tiles, eps=0.0, **arguments):
    names = ("weight", "bias", "running_mean", "running_var")
    return bn_finalize(tiles, **{**dict.fromkeys(names), "momentum": 0.1, "eps": eps, **arguments})


def variance(stats):
    """What was normalised with, where eps was 0."""
    return stats[1].double() ** -2


def tolerance(dtype):
    return 1e-12 if dtype == torch.float64 else 2e-6


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_tiles_hold_mean_and_m2_of_their_rows(dtype, device):
    check_tiles((2, 20, 5, 7), dtype, SMALL, device)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_of_every_size(shape, config, device):
    check_tiles(shape, torch.float32, config, device)


def check_tiles(shape, dtype, config, device):
    y = images(shape, dtype, device)
    tiles = bn_stats(y, config)
    rows = y.permute(0, 2, 3, 1).reshape(-1, shape[1]).double()
    assert tiles.rows == len(rows) and tiles.rows_per_tile == config.block_m
    assert tiles.data.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    groups = rows.split(config.block_m)
    assert tiles.data.shape == (2, len(groups), shape[1])
    mean = torch.stack([group.mean(0) for group in groups])
    m2 = torch.stack([((group - group.mean(0)) ** 2).sum(0) for group in groups])
    torch.testing.assert_close(tiles.data[0].double(), mean, rtol=tolerance(dtype), atol=tolerance(dtype))
    torch.testing.assert_close(tiles.data[1].double(), m2, rtol=tolerance(dtype), atol=tolerance(dtype))


@pytest.mark.parametrize("parameters", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_stats_rows(dtype, parameters, device):
    y = images((3, 70, 4, 4), dtype, device)
    weight, bias = (torch.randn(70, device=device) if given else None for given in parameters)
    stats = finalize(bn_stats(y, SMALL), eps=1e-3, weight=weight, bias=bias)
    mean, var = moments(y)
    rstd = (var + 1e-3) ** -0.5
    scale = rstd * (1.0 if weight is None else weight.double())
    shift = (0.0 if bias is None else bias.double()) - mean * scale
    expected = torch.stack([mean, rstd, scale, shift])
    torch.testing.assert_close(stats.double(), expected, rtol=tolerance(dtype), atol=tolerance(dtype))


@pytest.mark.parametrize("ratio", [0, 10, 100, 1e3, 1e4])
@pytest.mark.parametrize("config", [PassConfig(256, 4, 2), PassConfig(4096, 4, 4)], ids=["small tiles", "large tiles"])
def test_variance_far_from_zero(ratio, config, device):
    y = images((4, 4, 64, 64), torch.float32, device, mean=ratio, std=1.0)
    mean, var = moments(y)
    tiles = bn_stats(y, config)
    stats = finalize(tiles)
    # A tile's mean is rounded to float32: that error, of ratio * 2^-24 std, averages out over the tiles.
    rounding = ratio * 2.0**-24 * (config.block_m * tiles.data.shape[1]) ** -0.5 + (ratio * 2.0**-24) ** 2
    assert ((variance(stats) - var) / var).abs().max() < 5e-7 + 4 * rounding
    assert ((stats[0].double() - mean).abs() / mean.abs().clamp(min=1)).max() < 2e-7


def test_outlier_in_the_first_row(device):
    """The pivot is taken beside it, and is far from every other value."""
    y = images((4, 5, 16, 16), torch.float32, device)
    y[0, :, 0, 0] = 1e5
    assert torch.allclose(variance(finalize(bn_stats(y, SMALL))), moments(y)[1], rtol=2e-6, atol=0)
    assert torch.allclose(variance(finalize(bn_stats(y, PassConfig(1024, 8, 1)))), moments(y)[1], rtol=2e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, -12345.678])
def test_constant_channel_has_no_variance(value, device):
    y = torch.full((2, 6, 5, 7), value, device=device).contiguous(memory_format=torch.channels_last)
    stats = finalize(bn_stats(y, SMALL), eps=1e-5)
    assert torch.equal(stats[0], torch.full_like(stats[0], value))
    torch.testing.assert_close(stats[1], torch.full_like(stats[1], 1e-5**-0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 5, -1])
def test_nan_poisons_its_own_channel_alone(poison, row, device):
    y = images((2, 20, 5, 7), torch.float32, device)
    clean = finalize(bn_stats(y, SMALL), eps=1e-5)
    y.permute(0, 2, 3, 1).reshape(-1, 20)[row, 3] = poison
    running = torch.zeros(20, device=device), torch.ones(20, device=device)
    stats = finalize(bn_stats(y, SMALL), eps=1e-5, running_mean=running[0], running_var=running[1])
    assert not stats[2:, 3].isfinite().any() and not running[1][3].isfinite()
    others = torch.arange(20, device=device) != 3
    assert torch.equal(stats[:, others], clean[:, others])
    assert running[0][others].isfinite().all() and running[1][others].isfinite().all()


def synthetic_tiles(rows, rows_per_tile, channels, dtype, device, mean=3.0):
    """Tiles by torch alone, with the values that they came from."""
    values = mean + torch.randn(rows, channels, dtype=torch.float64)
    groups = values.split(rows_per_tile)
    mean = torch.stack([group.mean(0) for group in groups])
    m2 = torch.stack([((group - group.mean(0)) ** 2).sum(0) for group in groups])
    return StatTiles(torch.stack([mean, m2]).to(dtype).to(device), rows_per_tile, rows), values.to(device)


@pytest.mark.parametrize("rows", [5 * 2500 - 3, 5 * 1024, 4, 5, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_merge(rows, dtype, device):
    tiles, values = synthetic_tiles(rows, 5, 3, dtype, device)
    stats = finalize(tiles)
    torch.testing.assert_close(variance(stats), values.var(0, unbiased=False), rtol=tolerance(dtype), atol=0)
    torch.testing.assert_close(stats[0].double(), values.mean(0), rtol=tolerance(dtype), atol=0)


GROUPS = {
    "short last group": PassConfig(100, 16, 1),  # several steps, the last one partial
    "one tile in the last": PassConfig(157, 4, 1),
    "all in one": PassConfig(1200, 4, 2),
    "a few each": PassConfig(7, 32, 1),
}


@pytest.mark.parametrize("config", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_merged_tiles_are_tiles_of_longer_runs(dtype, config, device):
    tiles, values = synthetic_tiles(5 * 1100 - 3, 5, 20, dtype, device)
    merged = bn_merge(tiles, config)
    groups = values.split(5 * config.block_m)
    assert merged.rows_per_tile == 5 * config.block_m and merged.rows == tiles.rows
    assert merged.data.shape == (2, len(groups), 20) and merged.data.dtype == dtype
    mean = torch.stack([group.mean(0) for group in groups])
    m2 = torch.stack([((group - group.mean(0)) ** 2).sum(0) for group in groups])
    close = {"rtol": tolerance(dtype), "atol": tolerance(dtype)}
    torch.testing.assert_close(merged.data[0].double(), mean, **close)
    torch.testing.assert_close(merged.data[1].double(), m2, **close)


@pytest.mark.parametrize("ratio", [100, 1e4])
def test_many_tiles_far_from_zero(ratio, device):
    """A first merge of groups, then the merge of what is left."""
    count = 2 * FEW_TILES + 5
    tiles, _ = synthetic_tiles(3 * count - 2, 3, 4, torch.float32, device, mean=ratio)
    with record_launches() as launches:
        stats = finalize(tiles)
    assert [launch.kernel for launch in launches] == ["bn_merge_kernel", "bn_finalize_kernel"]
    mean, m2 = tiles.data.double()
    n = torch.full((count, 1), 3.0, dtype=torch.float64, device=device)
    n[-1] = 1
    expected = (n * mean).sum(0) / tiles.rows
    var = (m2 + n * (mean - expected) ** 2).sum(0) / tiles.rows
    torch.testing.assert_close(stats[0].double(), expected, rtol=1e-7, atol=0)
    rounding = ratio * 2.0**-24 * tiles.rows**-0.5 + (ratio * 2.0**-24) ** 2  # of the groups' means
    torch.testing.assert_close(variance(stats), var, rtol=5e-7 + 4 * rounding, atol=0)


@pytest.mark.parametrize("tile", [0, 700, -1])
def test_nan_in_one_of_many_tiles(tile, device):
    tiles, _ = synthetic_tiles(2 * (FEW_TILES + 9) - 1, 2, 5, torch.float32, device)
    clean = finalize(tiles)
    tiles.data[:, tile, 3] = float("nan")
    stats = finalize(tiles)
    others = torch.arange(5, device=device) != 3
    assert stats[:, 3].isnan().all()
    assert torch.equal(stats[:, others], clean[:, others])


def test_running_statistics_of_many_tiles(device):
    tiles, values = synthetic_tiles(2 * (FEW_TILES + 9) - 1, 2, 5, torch.float32, device)
    running = torch.zeros(5, device=device), torch.zeros(5, device=device)
    counter = torch.full((), 4, dtype=torch.int64, device=device)
    finalize(tiles, running_mean=running[0], running_var=running[1], counter=counter, momentum=CUMULATIVE)
    assert counter == 4
    torch.testing.assert_close(running[0].double(), values.mean(0) / 4, rtol=2e-6, atol=0)
    torch.testing.assert_close(running[1].double(), values.var(0) / 4, rtol=2e-6, atol=0)


def test_merge_is_reproducible(device):
    y = images((4, 70, 9, 9), torch.float32, device)
    first = finalize(bn_stats(y, SMALL), eps=1e-5)
    assert all(torch.equal(first, finalize(bn_stats(y, SMALL), eps=1e-5)) for _ in range(3))


@pytest.mark.quick
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, -0.3, None])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_running_statistics_are_those_of_batch_norm(momentum, dtype, device):
    bn = torch.nn.BatchNorm2d(20, momentum=momentum).double()
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    running_mean, running_var = torch.zeros(20, dtype=statistics), torch.ones(20, dtype=statistics)
    running_mean, running_var = running_mean.to(device), running_var.to(device)
    counter = torch.zeros((), dtype=torch.int64, device=device)
    for step in range(3):
        y = images((2, 20, 5, 7), dtype, device, mean=step)
        bn(y.double().cpu())
        counter += momentum is None  # then it has counted already
        finalize(
            bn_stats(y, SMALL),
            running_mean=running_mean,
            running_var=running_var,
            momentum=CUMULATIVE if momentum is None else momentum,
            counter=counter,
        )
    close = {"rtol": tolerance(dtype), "atol": tolerance(dtype)}
    torch.testing.assert_close(running_mean.double().cpu(), bn.running_mean, **close)
    torch.testing.assert_close(running_var.double().cpu(), bn.running_var, **close)
    assert counter == 3


def test_one_of_the_running_statistics_may_be_missing(device):
    y = images((2, 5, 5, 7), torch.float32, device)
    both = torch.zeros(5, device=device), torch.ones(5, device=device)
    alone = torch.zeros(5, device=device), torch.ones(5, device=device)
    finalize(bn_stats(y, SMALL), running_mean=both[0], running_var=both[1])
    finalize(bn_stats(y, SMALL), running_mean=alone[0])
    finalize(bn_stats(y, SMALL), running_var=alone[1])
    assert torch.equal(both[0], alone[0]) and torch.equal(both[1], alone[1])


@pytest.mark.parametrize("statistics", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_frozen(dtype, affine, statistics, device):
    mean, var = torch.randn(150).to(statistics).to(device), torch.rand(150).to(statistics).to(device)
    weight, bias = (torch.randn(150, device=device) if affine else None for _ in range(2))
    (stats,) = bn_frozen([FrozenNorm(weight, bias, mean, var, 1e-3)], dtype=dtype)
    check_frozen(stats, FrozenNorm(weight, bias, mean, var, 1e-3), dtype)


def check_frozen(stats, norm, dtype):
    mean, rstd = norm.mean.double(), (norm.var.double() + norm.eps) ** -0.5
    scale = rstd if norm.weight is None else rstd * norm.weight.double()
    shift = -mean * scale if norm.bias is None else norm.bias.double() - mean * scale
    assert stats.dtype == dtype
    expected = torch.stack([mean, rstd, scale, shift])
    torch.testing.assert_close(stats.double(), expected, rtol=tolerance(dtype), atol=tolerance(dtype))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_frozen_layers_share_a_launch(dtype, count, device):
    """Of unequal widths, affine or not, each with its own eps and dtypes: as each would be alone, bit for bit."""

    def norm(channels, affine, eps, statistics):
        weight, bias = (torch.randn(channels, device=device) if affine else None for _ in range(2))
        mean, var = torch.randn(channels).to(statistics).to(device), torch.rand(channels).to(statistics).to(device)
        return FrozenNorm(weight, bias, mean, var, eps)

    norms = [
        norm(150, True, 1e-5, torch.float32),
        norm(7, False, 1e-3, torch.float32),
        norm(300, True, 0.1, torch.float16),
        norm(128, False, 1e-5, torch.float32),
    ][:count]
    with record_launches() as launches:
        found = bn_frozen(norms, dtype=dtype)
    assert [launch.kernel for launch in launches] == ["bn_frozen_kernel"]
    vectors = sum(t.numel() * t.element_size() for each in norms for t in each[:4] if t is not None)
    assert launches[0].bytes == vectors + sum(stats.numel() * stats.element_size() for stats in found)
    for stats, each in zip(found, norms, strict=True):
        check_frozen(stats, each, dtype)
        assert torch.equal(stats, bn_frozen([each], dtype=dtype)[0])


def test_frozen_takes_one_to_four_layers(device):
    vector = torch.ones(8, device=device)
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"one to 4 layers, got {count}"):
            bn_frozen([FrozenNorm(None, None, vector, vector, 1e-5)] * count, dtype=torch.float32)
    with pytest.raises(ValueError, match="running_var must have shape"):
        bn_frozen([FrozenNorm(None, None, vector, vector[:4], 1e-5)], dtype=torch.float32)


def test_meta_tensors_are_recorded_alone():
    y = torch.empty((2, 64, 5, 7), device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with record_launches() as launches:
        stats = finalize(bn_stats(y, SMALL), weight=torch.empty(64, device="meta"))
    assert stats.shape == (4, 64)
    assert [launch.kernel for launch in launches] == ["bn_stats_kernel", "bn_finalize_kernel"]
    tiles = 2 * 3 * 64 * 4
    assert [launch.bytes for launch in launches] == [2 * 64 * 35 * 2 + tiles, tiles + 5 * 64 * 4]


def test_groups_are_recorded_too():
    count = 6272
    data = torch.empty((2, count, 64), device="meta")
    with record_launches() as launches:
        finalize(StatTiles(data, 128, 128 * count))
    assert [launch.kernel for launch in launches] == ["bn_merge_kernel", "bn_finalize_kernel"]
    merged = 2 * 98 * 64 * 4
    assert [launch.bytes for launch in launches] == [2 * count * 64 * 4 + merged, merged + 4 * 64 * 4]


def test_errors(device):
    y = images((2, 5, 5, 7), torch.float32, device)
    with pytest.raises(ValueError, match="channels_last"):
        bn_stats(y.contiguous(), SMALL)
    tiles = bn_stats(y, SMALL)
    with pytest.raises(ValueError, match="do not hold"):
        finalize(tiles._replace(rows=200))
    with pytest.raises(ValueError, match="weight must have shape"):
        finalize(tiles, weight=torch.ones(6, device=device))
    with pytest.raises(ValueError, match="counter must be int64"):
        finalize(tiles, counter=torch.ones((), device=device))


PLANTED = {
    "every tile counts the same": ("tl.minimum(rows - first_row, rows_per_tile)", "(rows_per_tile + 0 * first_row)"),
    "no spread between tiles": ("m2 + count * deviation * deviation", "m2"),
    "spread not weighted": ("m2 + count * deviation * deviation", "m2 + deviation * deviation"),
    "a lost last tile": ("step_offsets(0, tiles, offs_c", "step_offsets(0, tiles - 1, offs_c"),
    "a lost last tile of a later step": ("step_offsets(start, tiles, offs_c", "step_offsets(start, tiles - 1, offs_c"),
    "a lost last tile of the last group": ("pass_tile(tiles, channels,", "pass_tile(tiles - 1, channels,"),
    "one step of tiles": ("range(ROWS, tiles, ROWS)", "range(ROWS, ROWS, ROWS)"),
    "every step counts as the first": (
        "= tile_deviations(mean, m2, mask, pivot, start,",
        "= tile_deviations(mean, m2, mask, pivot, 0,",
    ),
    "every group counts the same": ("tl.minimum(rows - first * rows_per_tile, ", "(0 * rows + "),
    "one step of rows": ("range(VECTORS * BLOCK_M, count, ", "range(VECTORS * BLOCK_M, VECTORS, "),
    "unbiased variance": ("m2 / rows, eps", "m2 / (rows - 1), eps"),
    "eps twice": ("tl.sqrt(var + eps)", "tl.sqrt(var + eps + eps)"),
    "no correction of the pivot": ("squared_sum - shifted_sum * offset", "squared_sum"),
    "the pivot as mean": ("return pivot + offset,", "return pivot,"),
    "pivot in masked rows": ("tl.where(mask, y - pivot[None, :], 0.0)", "y - pivot[None, :]"),
    "sums of squares": (
        "    shifted, squared = deviations(",
        "    pivot = pivot * 0.0\n    shifted, squared = deviations(",
    ),
    "biased running variance": ("m2 / tl.maximum(rows - 1, 1)", "m2 / rows"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", PLANTED)
def test_planted_error_is_caught(name, tmp_path, monkeypatch, device):
    old, new = PLANTED[name]
    source = Path(kernels.__file__).read_text()
    assert old in source
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("fused_resnet.kernels.mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    for kernel in ("bn_stats_kernel", "bn_merge_kernel", "bn_finalize_kernel"):
        monkeypatch.setattr(launcher, kernel, getattr(mutant, kernel))
    caught = []
    for check in CHECKS:
        try:
            check(device)
        except AssertionError:
            caught.append(check.__name__)
    assert caught, f"survived: {name}"


def check_far_from_zero(device):
    y = images((2, 5, 25, 25), torch.float32, device, mean=100.0, std=1.0)
    mean, var = moments(y)
    for config in (SMALL, LONG):
        running = torch.ones(5, device=device)
        stats = finalize(bn_stats(y, config), eps=1e-3, running_var=running, momentum=1.0)
        assert torch.allclose(variance(stats), var + 1e-3, rtol=2e-5, atol=0)
        assert torch.allclose(stats[0].double(), mean, rtol=1e-6, atol=0)
        assert torch.allclose(running.double(), var * 1250 / 1249, rtol=2e-5, atol=0)


def check_many_tiles(device):
    tiles, values = synthetic_tiles(5 * 1100 - 3, 5, 3, torch.float32, device)
    stats = finalize(tiles)
    assert torch.allclose(variance(stats), values.var(0, unbiased=False), rtol=1e-5, atol=0)
    assert torch.allclose(stats[0].double(), values.mean(0), rtol=1e-6, atol=0)


def check_groups(device):
    tiles, values = synthetic_tiles(5 * 270 - 3, 5, 3, torch.float32, device)
    stats = finalize(bn_merge(tiles, PassConfig(100, 16, 1)))
    assert torch.allclose(variance(stats), values.var(0, unbiased=False), rtol=1e-5, atol=0)
    assert torch.allclose(stats[0].double(), values.mean(0), rtol=1e-6, atol=0)


CHECKS = (check_far_from_zero, check_many_tiles, check_groups)


@pytest.mark.parametrize("check", CHECKS)
def test_the_checks_pass_without_a_planted_error(check, device):
    check(device)
