"""Home-made blocks and edits drawn at random, and what the draws are made of: as many as there is time for."""

from __future__ import annotations

import pytest

from tests.convert import random_blocks
from tests.convert.beside import in_interpreter

pytestmark = in_interpreter
SEEDS = range(48)


@pytest.mark.parametrize("seed", SEEDS)
def test_convert_and_revert_equal_eager(seed: int) -> None:
    random_blocks.attempt(seed)


@pytest.mark.quick
def test_the_draws_are_worth_something() -> None:
    """Whatever the generator does: a good part of its blocks is fused, and every edit is drawn."""
    drawn = [random_blocks.proposal(seed) for seed in SEEDS]
    assert {edit for _, edit in drawn} == set(random_blocks.EDITS)
