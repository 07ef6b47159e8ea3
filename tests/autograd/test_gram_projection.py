"""Whole blocks whose projection has a Gram matrix of its own, by the numerics rule; and what the rule must notice."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_resnet as fr
from fused_resnet.autograd import gram as gram_route
from fused_resnet.launch.gram import GramGrads
from tests import frightening, strict_interpreter
from tests.conftest import INTERPRETED
from tests.staged_case import image, layer
from tests.whole_block import Block, projected_block

pytestmark = [
    pytest.mark.usefixtures("ieee"),
    pytest.mark.skipif(not INTERPRETED, reason="the interpreter's own configurations"),
]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HALF = {name: dtype for name, dtype in DTYPES.items() if name != "float32"}


def unstrided_block(dtype: torch.dtype, seed: int = 0, size: tuple[int, int, int] = (3, 6, 7)) -> Block:
    """The first of a network: as wide at its input as in the middle."""
    n, h, w = size
    layers = [layer(24, 24, 1, dtype, seed), layer(24, 24, 3, dtype, seed + 1), layer(24, 72, 1, dtype, seed + 2)]
    return Block(
        image(n, 24, h, w, dtype=dtype, seed=seed, mean=0.5).relu(),
        layers,
        layer(24, 72, 1, dtype, seed + 3),
        image(n, 72, h, w, dtype=dtype, seed=seed + 77, mean=0.1),
    )


def check(block: Block, **options: Any) -> None:
    """The rule, and that the projection's output did not exist."""
    with fr.record_launches() as launches:
        block.run()
    assert [launch.kernel for launch in launches].count("gram_kernel") == 2
    block.check(**options)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("make", [projected_block, unstrided_block])
def test_the_rule(make: frightening.Make, dtype: torch.dtype) -> None:
    check(make(dtype))


@pytest.mark.parametrize("name", ["pooled", "mean_30", "odd_gammas"])
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
def test_numbers_that_frighten_without_a_stride(name: str, dtype: torch.dtype) -> None:
    check(getattr(frightening, name)(dtype, unstrided_block))


@pytest.mark.parametrize("name", ["underflow", "loss_scale"])
@pytest.mark.parametrize("make", [projected_block, unstrided_block])
def test_gradients_at_the_ends_of_float16(make: frightening.Make, name: str) -> None:
    check(getattr(frightening, name)(torch.float16, make))


@pytest.mark.parametrize("ratio", [8, 64])
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("make", [projected_block, unstrided_block])
def test_an_input_far_from_zero(make: frightening.Make, dtype: torch.dtype, ratio: float) -> None:
    """abs(mean) / std of the block's input, which conv1 and the projection share."""
    check(frightening.far_input(ratio)(dtype, make))


@pytest.mark.parametrize(("ratio", "size"), [(256, (3, 6, 7)), (64, (4, 22, 22))])
@pytest.mark.parametrize("make", [projected_block, unstrided_block])
def test_an_input_far_from_zero_where_sums_are_cut_off(
    make: frightening.Make, ratio: float, size: tuple[int, int, int]
) -> None:
    """As tensor cores may: the pixels seen give float16 a pivot, which leaves nothing of the mean's size to cut."""
    with strict_interpreter.truncating():
        check(frightening.far_input(ratio)(torch.float16, partial(make, size=size)))


@pytest.mark.parametrize(("size", "rows"), [((2, 3, 4), 8), ((3, 5, 2), 9), ((1, 5, 5), 9)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_few_rows(size: tuple[int, int, int], rows: int, dtype: torch.dtype) -> None:
    block = projected_block(dtype, size=size)
    assert block.dout.numel() // block.dout.shape[1] == rows
    check(block)


def test_fewer_than_eight_rows_write_every_output() -> None:
    block = projected_block(torch.float32, size=(7, 2, 2))
    with fr.record_launches() as launches:
        block.run(strict=False)
    assert not any("gram" in launch.kernel for launch in launches)
    block.check(strict=False, float32_factor=10.0)


# ----- planted errors -----


def unrounded_bias(grads: GramGrads, weight: Tensor, stats: Tensor, rows: int) -> GramGrads:
    """C·W of the parameters in place of what A∘W and P, as rounded, owe the means."""
    mean, rstd, scale = stats[0].double(), stats[1].double(), stats[2].double()
    along = -scale * rstd * grads.dgamma.double() / rows
    constant = -scale * grads.dbeta.double() / rows - along * mean
    return grads._replace(bias=(constant @ weight.double().flatten(1)).to(grads.bias.dtype))


def wrong_sign(grads: GramGrads, *_: Any) -> GramGrads:
    return grads._replace(p=-grads.p)


def no_xhat(grads: GramGrads, *_: Any) -> GramGrads:
    return grads._replace(p=torch.zeros_like(grads.p))


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("plant", [unrounded_bias, wrong_sign, no_xhat])
def test_the_rule_refuses_a_planted_error(plant: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the projection alone: its weight takes 40 channels, the last convolution's 24."""
    whole = gram_route.gram_backward

    def planted(*arguments: Any, **options: Any) -> GramGrads:
        grads = whole(*arguments, **options)
        _, _, _, stats, weight, _, rows = arguments
        return plant(grads, weight, stats, rows) if weight.shape[1] == 40 else grads

    make = frightening.mean_30 if plant is unrounded_bias else frightening.along_xhat
    block = make(dtype, projected_block)
    if plant is not unrounded_bias:
        block.dout = along_projection(block)
    clean = {score.name: score for score in block.scores()}
    assert clean["dx"].ok, clean["dx"].row()
    monkeypatch.setattr(gram_route, "gram_backward", planted)
    found = {score.name: score for score in block.scores()}
    assert not found["dx"].ok, found["dx"].row()
    assert all(found[name].ok or not clean[name].ok for name in found if name != "dx")


def along_projection(block: Block) -> Tensor:
    """A gradient with a share of the projection's xhat, which BatchNorm takes away."""
    part = block.projection
    assert part is not None
    y = F.conv2d(block.x.double(), part.weight.double(), None, part.stride)
    xhat = F.batch_norm(y, None, None, None, None, True, 0.0, part.eps)
    values = xhat + torch.randn(xhat.shape, generator=torch.Generator().manual_seed(6))
    return values.to(block.x.dtype).contiguous(memory_format=torch.channels_last)
