"""What runs where no kernel can: the operations in plain PyTorch, from the records that the fused ones take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import BatchNorm, Conv, Layer
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
    a = x
    for conv, bn in layers[:-1]:
        a = layer(a, conv, bn, None, True)
    if projection is not None:
        residual = layer(x, *projection, None, False)
    elif kind == "identity":
        residual = x
    return layer(a, *layers[-1], residual, relu)


def layer(x: Tensor, conv: Conv, bn: BatchNorm, residual: Tensor | None, relu: bool) -> Tensor:
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
