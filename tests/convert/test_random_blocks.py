"""Home-made blocks and edits drawn at random: each edit once, and many blocks fused before it."""

from __future__ import annotations

from tests.convert import random_blocks
from tests.convert.beside import in_interpreter

pytestmark = in_interpreter
SEEDS = range(len(random_blocks.EDITS))


def test_convert_and_revert_equal_eager() -> None:
    fused, wrong = random_blocks.attempts(SEEDS)
    assert not wrong, "\n".join(wrong)
    assert fused >= len(SEEDS) / 2, "of two blocks each: the draws are worth nothing"
