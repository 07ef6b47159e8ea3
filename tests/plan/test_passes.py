"""Tiles of the bandwidth-bound passes: steps of whole vectors, every row covered, enough programs and few tiles."""

import pytest

from fused_resnet.plan.passes import (
    FEW_TILES,
    MERGED_TILES,
    ceil_div,
    group_config,
    merge_config,
    next_power_of_2,
    pass_config,
    reduce_config,
    step,
)

pytestmark = pytest.mark.quick

SIZES = [(rows, channels) for rows in (1, 49, 12544, 200704, 802816) for channels in (1, 3, 20, 64, 70, 256, 2048)]


def is_power_of_2(n):
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("interpreter", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("build", [pass_config, reduce_config])
def test_tiles_are_whole_steps(build, itemsize, interpreter):
    for rows, channels in SIZES:
        config = build(rows, channels, itemsize, interpreter=interpreter)
        for vectors in (2, 4):
            groups, group = step(config, itemsize, vectors)
            assert is_power_of_2(groups) and is_power_of_2(group) and is_power_of_2(config.block_c)
            assert config.block_m % (groups * group) == 0
            assert config.block_m * channels < 2**31  # offsets inside a tile are int32


@pytest.mark.parametrize("channels", [64, 256, 2048])
@pytest.mark.parametrize("rows", [12544, 200704, 802816])
def test_number_of_programs(rows, channels):
    reduce = reduce_config(rows, channels, 2, sm_count=132)
    blocks_c = ceil_div(channels, reduce.block_c)
    programs = ceil_div(rows, reduce.block_m) * blocks_c
    assert min(3 * 132, ceil_div(rows, 64) * blocks_c) <= programs <= max(8 * 132, rows * channels // 64**3 + 1)
    for tensors, most in ((1, 8), (2, 8), (3, 4), (4, 4)):
        config = reduce_config(rows, channels, 2, sm_count=132, tensors=tensors)
        assert config.block_c == min(channels, 128 if tensors == 4 else 64)
        wave = ceil_div(rows, config.block_m) * ceil_div(channels, config.block_c)
        assert wave <= most * 132 or config.block_m * config.block_c == 64 * 64 * 64
    elementwise = pass_config(rows, channels, 2, sm_count=132)
    steps = elementwise.block_m * elementwise.block_c // (4 * 128 * 8)
    assert steps == 8 or ceil_div(rows, elementwise.block_m) * ceil_div(channels, elementwise.block_c) <= 32 * 132


def test_a_step_gives_every_thread_whole_vectors():
    config = pass_config(802816, 256, 2)
    groups, group = step(config, 2, 4)
    assert groups * group * config.block_c * 2 == 4 * 16 * 32 * config.num_warps


@pytest.mark.parametrize("tiles", [1, 2, 98, 1024, 6272])
def test_merge(tiles):
    config = merge_config(tiles, 64)
    groups, group = step(config, 4, 4)
    assert config.block_c == 8 and groups * group <= max(config.block_m, 1) and 1 <= config.num_warps <= 16


@pytest.mark.parametrize("channels", [3, 64, 512])
def test_groups_of_tiles(channels):
    assert group_config(FEW_TILES, channels) is None
    for tiles in (FEW_TILES + 1, 3136, 6272, 12544, 1 << 20):
        config = group_config(tiles, channels)
        assert is_power_of_2(config.block_m) and MERGED_TILES // 2 <= ceil_div(tiles, config.block_m) <= MERGED_TILES
        assert config.block_c == min(next_power_of_2(channels), 64) and 1 <= config.num_warps <= 8


def test_a_group_is_read_in_few_steps():
    for tiles in (3136, 6272, 12544):
        config = group_config(tiles, 64)
        groups, group = step(config, 4, 4)
        assert config.block_m % (groups * group) == 0 and config.block_m <= 4 * groups * group
