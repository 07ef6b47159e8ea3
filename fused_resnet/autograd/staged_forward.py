"""The staged route, forward: a chain of conv -> BN -> ReLU as plain functions of tensors.

Batch statistics: every conv writes its raw output y and the tiles of its statistics; the next 1x1 conv normalises y on
load, an RxS conv after one pass. The last layer's BN, residual and ReLU are one pass. Frozen statistics: BN, residual
and ReLU are the conv's epilogue, and the activation is what is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..launch import vendor
from ..launch.conv_fprop import conv_fprop
from ..launch.stem_conv import stem_conv_fprop
from ..launch.tiles import StatTiles
from ..plan.plans import ConvPlan, Plan
from . import gram as gram_route
from . import single as single_route
from .layer import Layer, Passes, empty_mask, frozen_stats

Tensor = torch.Tensor


class Saved(NamedTuple):
    """What forward leaves for backward.

    ``mask`` is the last ReLU's, in bits, where the plan keeps it. ``ys`` are the convs' raw outputs, or with frozen
    statistics their activations (the last one's is the output, and its place is None); ``stats`` are [4, C] rows mean,
    rstd, scale, shift. The projection, if any, comes last in both. On the Gram route the last conv has no output: its
    place in ``ys`` holds W Cov [q, p]; ``moments`` are gram_finalize's. The same holds for a projection on it,
    with ``projection_moments``. What the plan recomputes arrives as None; ``a1`` is the second convolution's input as
    formed, where the plan keeps it.
    """

    mask: Tensor | None
    ys: list[Tensor | None]
    stats: list[Tensor]
    moments: Tensor | None = None
    projection_moments: Tensor | None = None
    a1: Tensor | None = None


def conv_only(conv: ConvPlan, weight: Tensor, x: Tensor) -> Tensor:
    """y = conv(x), without statistics."""
    if conv.fprop.config is None:
        return vendor.conv_fprop(x, weight, conv.problem)
    run = stem_conv_fprop if conv.problem.is_stem else conv_fprop
    return run(x, weight, conv.problem, conv.fprop.config)[0]


def conv_raw(
    passes: Passes, conv: ConvPlan, weight: Tensor, x: Tensor, input_stats: Tensor | None
) -> tuple[Tensor, StatTiles]:
    """y = conv(relu(bn(x))), or conv(x) without ``input_stats``, and the tiles of y's statistics."""
    on_load = conv.fprop.fused and conv.problem.is_pointwise
    if input_stats is not None and not on_load:
        x, input_stats = passes.act(x, input_stats), None
    if conv.fprop.config is None:
        y = vendor.conv_fprop(x, weight, conv.problem)
        return y, passes.stats(y)
    if conv.problem.is_stem:
        y, tiles = stem_conv_fprop(x, weight, conv.problem, conv.fprop.config, stats=True)
    else:
        input_affine = None if input_stats is None else input_stats[2:]
        y, tiles = conv_fprop(x, weight, conv.problem, conv.fprop.config, input_affine=input_affine, stats=True)
    assert tiles is not None
    return y, tiles


def forward(plan: Plan, x: Tensor, residual: Tensor | None, layers: Sequence[Layer]) -> tuple[Tensor, Saved]:
    """The output, and what backward needs. ``layers``: one per conv of the plan, then the projection's if any."""
    assert plan.problem is not None
    if plan.single is not None:
        return single_route.forward(plan, x, residual, layers), Saved(None, [], [])
    run = _forward_batch if plan.problem.batch_statistics else _forward_frozen
    return run(plan, x, residual, layers)


def _forward_batch(plan: Plan, x: Tensor, residual: Tensor | None, layers: Sequence[Layer]) -> tuple[Tensor, Saved]:
    assert plan.problem is not None
    passes = Passes(plan)
    ys: list[Tensor | None] = []
    stats: list[Tensor] = []
    y, pending, last = x, None, len(plan.convs) - 1
    written = plan.convs if plan.gram is None else plan.convs[:-1]
    a1 = None
    for i, (conv, layer) in enumerate(zip(written, layers, strict=False)):
        if i == 1 and plan.keeps_a1:
            assert pending is not None
            y = a1 = passes.act(y, pending)
            pending = None
        y, tiles = conv_raw(passes, conv, layer.weight, y, pending)
        ys.append(y)
        if i < last:
            pending = passes.finalize(layer, tiles)
            stats.append(pending)
    residual_stats = None
    if plan.projection is not None and plan.gram_projection is None:
        residual, of_residual = conv_raw(passes, plan.projection, layers[-1].weight, x, None)
        residual_stats = passes.finalize(layers[-1], of_residual)
    elif plan.problem.residual == "identity":
        residual = x
    if plan.gram is None:  # the projection's come before: processes talk in one order, whatever their routes
        pending = passes.finalize(layers[last], tiles)
        stats.append(pending)
    assert pending is not None
    mask = empty_mask(plan, x)
    moments: list[Tensor | None] = [None, None]
    if plan.gram is not None:
        out, *kept = gram_route.forward(plan, layers[last], y, pending, residual, residual_stats, layers[-1], x, mask)
        for i, each in enumerate(kept):
            if each is not None:
                ys.append(each.covariance)
                stats.append(each.stats)
                moments[i] = each.moments
    else:
        out = passes.act(y, pending, residual, residual_stats, plan.problem.relu, mask)
    if residual_stats is not None:
        ys.append(residual)
        stats.append(residual_stats)
    return out, Saved(mask, ys, stats, moments[0], moments[1], a1)


def _forward_frozen(plan: Plan, x: Tensor, residual: Tensor | None, layers: Sequence[Layer]) -> tuple[Tensor, Saved]:
    assert plan.problem is not None
    passes = Passes(plan)
    stats, mask = frozen_stats(layers, x), empty_mask(plan, x)
    if plan.projection is not None:
        residual = _conv_act(passes, plan.projection, layers[-1].weight, x, stats[-1], None, False)
    elif plan.problem.residual == "identity":
        residual = x
    a, last = x, len(plan.convs) - 1
    ys: list[Tensor | None] = []
    for i in range(last):
        a = _conv_act(passes, plan.convs[i], layers[i].weight, a, stats[i], None, True)
        ys.append(a)
    out = _conv_act(passes, plan.convs[last], layers[last].weight, a, stats[last], residual, plan.problem.relu, mask)
    ys += [None] * (len(layers) - last)
    return out, Saved(mask, ys, stats)


def _conv_act(
    passes: Passes,
    conv: ConvPlan,
    weight: Tensor,
    a: Tensor,
    stats: Tensor,
    residual: Tensor | None,
    relu: bool,
    mask: Tensor | None = None,
) -> Tensor:
    """relu(bn(conv(a)) + residual) with statistics that are known: in the convolution's epilogue, where it is ours."""
    config = conv.fprop.config
    if config is None or conv.problem.is_stem or config.form != "rows":
        return passes.act(conv_only(conv, weight, a), stats, residual, None, relu, mask)
    return conv_fprop(
        a, weight, conv.problem, config, output_affine=stats[2:], residual=residual, relu=relu, bits=mask
    )[0]


def first_again(plan: Plan, weight: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    """What forward left of the first convolution in ``Saved.ys``, computed again."""
    passes = Passes(plan)
    if passes.batch:
        return conv_only(plan.convs[0], weight, x)
    return _conv_act(passes, plan.convs[0], weight, x, stats, None, True)
