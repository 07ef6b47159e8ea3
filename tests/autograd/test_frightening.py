"""Numbers that frighten: whole blocks by the Gram route under the numerics rule, where eager gives it a baseline."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fused_resnet import use_route
from tests import frightening, strict_interpreter
from tests.conftest import INTERPRETED
from tests.frightening import BLOCKS, SCENARIOS, far
from tests.whole_block import Block, check_draws, identity_block

pytestmark = [
    pytest.mark.usefixtures("ieee"),
    pytest.mark.skipif(not INTERPRETED, reason="the interpreter's own configurations"),
]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

DRAWS = {("filters orthogonal to the data", "float32"): 3}
"""Where sums nearly cancel, of how many draws."""


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_rule(name: str, dtype: str, block: str) -> None:
    draws = range(DRAWS.get((name, dtype), 1))
    blocks = [SCENARIOS[name](DTYPES[dtype], partial(BLOCKS[block], seed=100 * draw)) for draw in draws]
    check_draws(blocks) if len(blocks) > 1 else blocks[0].check()


RATIOS = {"float32": (8, 100, 1_000, 10_000), "float16": (8, 64, 256), "bfloat16": (8, 64)}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("dtype", "ratio"), [(dtype, ratio) for dtype, ratios in RATIOS.items() for ratio in ratios])
def test_an_input_far_from_zero(dtype: str, ratio: float, block: str) -> None:
    """abs(mean) / std of the last convolution's input. Its own rounding leaves 16 bits no digit at last."""
    far(ratio)(DTYPES[dtype], BLOCKS[block]).check()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("dtype", "ratio"), [("float16", 64), ("float16", 256), ("bfloat16", 64)])
def test_an_input_far_from_zero_where_sums_are_cut_off(dtype: str, ratio: float, block: str) -> None:
    """As tensor cores may: a pivot leaves float16 nothing of the mean's size to cut."""
    with strict_interpreter.truncating():
        far(ratio)(DTYPES[dtype], BLOCKS[block]).check()


@pytest.mark.parametrize("ratio", [8, 100, 10_000])
def test_a_projection_far_from_zero(ratio: float) -> None:
    """The mean of the block's own input, over its spread."""
    frightening.far_input(ratio)(torch.float32).check()


@pytest.mark.parametrize("name", ["underflow", "loss_scale"])
def test_gradients_at_the_ends_of_float16(name: str) -> None:
    getattr(frightening, name)(torch.float16).check()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("count", range(2, 10))
def test_few_rows(count: int, dtype: str) -> None:
    """Below 8 rows a covariance is all noise, and the block takes the staged route.

    Of two or four rows some channels hold values so close together that y's last digits are all that BatchNorm leaves:
    then any two correct float32 results differ by several times their error.
    """
    factor = {2: 10.0, 4: 5.0}.get(count, 2.0)
    frightening.rows(count)(DTYPES[dtype]).check(strict=count >= 8, float32_factor=factor)


@pytest.mark.parametrize("route", ["gram", "staged", "reference"])
def test_one_row_has_no_statistics(route: str) -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        frightening.rows(1)(torch.float32).run(route, strict=False)


# ----- NaN and infinity -----


def _bad(t: Tensor) -> Tensor:
    return ~t.isfinite()


def _poisoned(block: Block, where: str, value: float) -> Block:
    if where == "x":
        block.x[1, 3, 2, 2] = value
    else:
        block.dout[1, 3, 2, 2] = value
        # the last ReLU lets this element through, or does not
        block.layers[2].beta[3] = 50.0 if where == "dout" else -50.0
    return block


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "dout", "dout where the ReLU is zero"])
@pytest.mark.parametrize(("dtype", "block"), [("float32", "identity"), ("float16", "projection")])
def test_what_is_not_finite_is_so_where_eager_shows_it(dtype: str, block: str, where: str, value: float) -> None:
    case = _poisoned(BLOCKS[block](DTYPES[dtype]), where, value)
    results, _ = case.run()
    eager = case.plain(DTYPES[dtype])
    shows = {name: _bad(t) for name, t in eager.items() if isinstance(t, Tensor)}
    assert any(bad.any() for bad in shows.values()) == (where != "dout where the ReLU is zero")
    for name, bad in shows.items():
        assert torch.equal(_bad(results[name]), bad), name
        if value != value:
            assert torch.equal(results[name].isnan(), eager[name].isnan()), name


def test_without_strictness_fewer_than_eight_rows_run_staged() -> None:
    case = identity_block(torch.float32, size=(7, 1, 1))
    with pytest.raises(RuntimeError, match="7 rows are too few"), use_route("gram", strict=True):
        case.run()
