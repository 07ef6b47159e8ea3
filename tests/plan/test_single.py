"""The tile of a whole bottleneck: it holds its pixels, wastes little, and does not depend on the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fused_resnet.plan import planner, single
from fused_resnet.plan.plans import ChainProblem, decode
from fused_resnet.plan.target import A100, H100, INTERPRETER

pytestmark = pytest.mark.quick


def block(
    size: tuple[int, int] = (56, 56), width: int = 64, stride: int = 1, projects: bool = False, **options: Any
) -> ChainProblem:
    def conv(co: int, kernel: int, step: int = 1) -> planner.Geometry:
        return (co, kernel, kernel, (step, step), (kernel // 2, kernel // 2), (1, 1), 1)

    fields = {"dtype": "bfloat16", "batch": 32, "backward": False, "batch_statistics": False, **options}
    return planner.chain_problem(
        fields["dtype"],
        (fields["batch"], 4 * width, *size),
        (conv(width, 1), conv(width, 3, stride), conv(4 * width, 1)),
        conv(4 * width, 1, stride) if projects else None,
        "projection" if projects else "identity",
        True,
        fields["batch_statistics"],
        fields["backward"],
    )


@pytest.mark.parametrize("target", [H100, A100, INTERPRETER], ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [(56, 56), (1, 1), (7, 9), (3, 200), (200, 3), (64, 48), (33, 31)])
@pytest.mark.parametrize("projects", [False, True])
def test_a_tile_holds_its_pixels(size: tuple[int, int], projects: bool, dtype: str, target: Any) -> None:
    for stride in (1, 2):
        problem = block(size, 16, stride, projects, dtype=dtype)
        config = single.single_config(problem, target)
        last = problem.convs[-1]
        assert 1 <= config.tile_p <= last.P and 1 <= config.tile_q <= last.Q
        assert config.tile_p * config.tile_q <= config.block_m
        for block_size in (config.block_m, config.block_n, config.block_k, config.block_halo):
            assert block_size >= 16 and block_size & (block_size - 1) == 0
        bigger = replace(problem, convs=tuple(replace(conv, N=4 * conv.N) for conv in problem.convs))
        assert single.single_config(bigger, target) == config


def test_the_halo_costs_half_as_much_again_at_most() -> None:
    config = single.single_config(block(), H100)
    assert (config.tile_p, config.tile_q, config.block_m) == (8, 14, 128)
    assert single.halo(config, (1, 1)) == 160 and 160 / (8 * 14) < 1.5
    assert single.halo(config, (2, 2)) == 17 * 29


def test_a_plan_survives_the_string() -> None:
    plan = planner.plan_chain(block(projects=True), H100, "single")
    assert plan.route == "single" and plan.single is not None and plan.gram is None
    assert decode(plan.encode()) == plan


def test_why_it_is_taken_and_why_not() -> None:
    assert planner.plan_chain(block(), H100, "single").reason == "with frozen statistics the whole block is one launch"
    for problem, asked, taken, word in (
        (block(), "auto", "staged", "not measured"),
        (block(), "staged", "staged", "asked for"),
        (block(), "gram", "staged", "frozen"),
        (block(width=65), "single", "staged", "65"),
        (block(size=(2, 1 << 16)), "single", "staged", "32 bits"),
        (block(backward=True), "single", "staged", "backward"),
        (block(batch_statistics=True), "single", "gram", "batch statistics"),
    ):
        plan = planner.plan_chain(problem, H100, asked)
        assert plan.route == taken and word in plan.reason
        assert plan.single is None
