"""Correct kernels pass the scenarios; every planted bug of the Gram route is refused by the one that it names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from fused_resnet.launch.gram import gram
from fused_resnet.plan.config import GemmConfig
from tests import frightening, numerics, strict_interpreter
from tests.conftest import INTERPRETED
from tests.gram_bugs import BUGS
from tests.gram_case import matrix, nhwc, relative
from tests.planted_bugs import Bug, mutated_source, survives
from tests.whole_block import check_typical, identity_block, projected_block

pytestmark = [
    pytest.mark.usefixtures("ieee"),
    pytest.mark.skipif(not INTERPRETED, reason="the scenarios run in the interpreter"),
]


def check_truncated_sums() -> None:
    """A Gram matrix of many rows, where sums of 16-bit products are cut off and not rounded."""
    x = nhwc(4, 16, 96, 96, dtype=torch.float16) + 2
    g, c, _ = gram(x, None, GemmConfig(16, 16, 128))
    a = matrix(x)
    assert relative(g, a.T @ a) < 4e-6 and relative(c, a.sum(0)) < 1e-6


def truncated() -> None:
    with strict_interpreter.truncating():
        check_truncated_sums()


def far_in_float64() -> None:
    """What eager is a baseline for there: its own sums of gradients are the oracle's."""
    scores = [score for score in frightening.far(1_000)(torch.float64).scores() if score.name in ("z", "dx")]
    assert all(score.ok for score in scores), numerics.table(scores)


def far_with_sums_cut_off() -> None:
    with strict_interpreter.truncating():
        frightening.far(256)(torch.float16).check()


def far_projection_with_sums_cut_off() -> None:
    with strict_interpreter.truncating():
        frightening.far_input(256)(torch.float16, partial(projected_block, size=(4, 16, 16))).check()


def alike_on_the_average() -> None:
    check_typical(frightening.draws(frightening.alike, torch.bfloat16, identity_block), most=1.0)


def nearly_equal_on_the_average() -> None:
    check_typical(frightening.draws(frightening.nearly_equal, torch.float32, projected_block), most=1.25)


def scenario(
    make: frightening.Make, dtype: torch.dtype, block: frightening.Make = identity_block
) -> Callable[[], object]:
    return lambda: make(dtype, block).check()


SCENARIOS: dict[str, Callable[[], object]] = {
    "truncated sums": truncated,
    "a gradient of mean 30, float16": scenario(frightening.mean_30, torch.float16),
    "far from zero, float16": scenario(frightening.far(64), torch.float16),
    "far from zero, float64": far_in_float64,
    "a pooled gradient, float32": scenario(frightening.pooled, torch.float32),
    "filters orthogonal to the data, float32": scenario(frightening.orthogonal, torch.float32, projected_block),
    "far from zero, float16 sums cut off": far_with_sums_cut_off,
    "a projection far from zero, float16 sums cut off": far_projection_with_sums_cut_off,
    "nearly equal channels, float16": scenario(frightening.nearly_equal, torch.float16),
    "filters orthogonal to the data, bfloat16": scenario(frightening.orthogonal, torch.bfloat16, projected_block),
    "draws of nearly equal channels, float32": nearly_equal_on_the_average,
    "draws of channels just alike enough, bfloat16": alike_on_the_average,
    "correlated channels, float16": scenario(frightening.correlated, torch.float16),
    "odd sizes, float16": scenario(frightening.odd_sizes, torch.float16),
    "many rows, float16": scenario(frightening.long, torch.float16),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_correct_kernels_pass(name: str) -> None:
    SCENARIOS[name]()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_refused(bug: Bug) -> None:
    refusals = (AssertionError, strict_interpreter.Violation)
    assert not survives(bug, SCENARIOS, refusals), f"'{bug.name}' survives {', '.join(bug.scenarios)}"


@pytest.mark.quick
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_mutation_still_applies(bug: Bug) -> None:
    compile(mutated_source(bug), bug.module, "exec")


@pytest.mark.quick
def test_names_are_distinct_and_scenarios_exist() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert {scenario for bug in BUGS for scenario in bug.scenarios} <= set(SCENARIOS)
