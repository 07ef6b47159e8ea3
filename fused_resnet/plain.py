"""What runs where no kernel can: the operations in plain PyTorch, from the records that the fused ones take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .arguments import BatchNorm, Layer
from .reference import ops


def chain(
    x: Tensor,
    layers: Sequence[Layer],
    projection: Layer | None,
    residual: Tensor | None,
    kind: str,
    relu: bool,
) -> Tensor:
    count_batch(*(bn for _, bn in (*layers, *([projection] if projection else []))))
    return walk(layer, x, layers, projection, residual, kind, relu)


def walk(
    step: Callable[[Tensor, Layer, Tensor | None, bool], Tensor],
    x: Tensor,
    layers: Sequence[Layer],
    projection: Layer | None,
    residual: Tensor | None,
    kind: str,
    relu: bool,
) -> Tensor:
    """A chain by ``step(x, layer, residual, relu)``, layer after layer."""
    if projection is not None:
        residual = step(x, projection, None, False)
    elif kind == "identity":
        residual = x
    for each in layers[:-1]:
        x = step(x, each, None, True)
    return step(x, layers[-1], residual, relu)


def layer(x: Tensor, layer: Layer, residual: Tensor | None, relu: bool) -> Tensor:
    conv, bn = layer
    y = torch.nn.functional.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return bn_act(y, bn, residual, relu)


def bn_act(y: Tensor, bn: BatchNorm, residual: Tensor | None, relu: bool) -> Tensor:
    momentum = bn.momentum
    if momentum is None:
        momentum = 1.0 / float(bn.num_batches_tracked) if bn.num_batches_tracked is not None else 0.0
    return ops.bn_act(
        y,
        bn.weight,
        bn.bias,
        bn.running_mean,
        bn.running_var,
        training=bn.training,
        momentum=momentum,
        eps=bn.eps,
        residual=residual,
        relu=relu,
    )


def count_batch(*bns: BatchNorm) -> None:
    """Counts one batch more, in one launch; the caller has checked everything that could still go wrong."""
    counters = [bn.num_batches_tracked for bn in bns if bn.num_batches_tracked is not None and bn.training]
    if len({id(counter) for counter in counters}) < len(counters):  # one BatchNorm in two places counts twice
        for counter in counters:
            counter.add_(1)
    elif counters:
        torch._foreach_add_(counters, 1)
