"""What runs where no kernel can: the operations in plain PyTorch, from the records that the fused ones take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules._functions import SyncBatchNorm

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
    if bn.sync and not isinstance(y, FakeTensor):  # a rehearsal asks nobody
        z = _synchronised(y, bn, momentum)
        z = z if residual is None else z + residual
        return z.relu() if relu else z
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


class _Gather(torch.autograd.Function):
    """[R, n]: ``packed`` [n] of every process of the group, in their order."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, group: str, ranks: int, rank: int) -> Tensor:
        ctx.others = group, ranks, rank
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(packed.contiguous(), ranks, group)
        return torch.ops._c10d_functional.wait_tensor(gathered).view(ranks, -1)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _OwnSum.apply(grads, *ctx.others), None, None, None


class _OwnSum(torch.autograd.Function):
    """[n]: of the sum of all processes' ``parts`` [R, n] the row of this one: the gradient of :class:`_Gather`."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: str, ranks: int, rank: int) -> Tensor:
        ctx.others = group, ranks, rank
        total = torch.ops._c10d_functional.all_reduce(parts.contiguous(), "sum", group)
        return torch.ops._c10d_functional.wait_tensor(total)[rank]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Gather.apply(grad, *ctx.others), None, None, None


def _synchronised(y: Tensor, bn: BatchNorm, momentum: float) -> Tensor:
    """``nn.SyncBatchNorm``'s function; on the CPU, where PyTorch has none, composed of functions that are there."""
    group = dist.distributed_c10d._resolve_process_group(bn.sync)  # type: ignore[arg-type]
    running = bn.running_mean, bn.running_var
    if y.is_cuda:
        return SyncBatchNorm.apply(y, bn.weight, bn.bias, *running, bn.eps, momentum, group, group.size())  # type: ignore[no-any-return]
    rows = y.to(torch.promote_types(y.dtype, torch.float32)).transpose(0, 1).flatten(1)
    count = rows.new_full((1,), rows.shape[1])
    mean = rows.sum(1) / count.clamp(min=1)
    packed = torch.cat([mean, (rows - mean[:, None]).square().sum(1), count])
    gathered = _Gather.apply(packed, bn.sync, group.size(), group.rank())
    means, m2s, counts = gathered.split([len(mean), len(mean), 1], dim=1)
    total = counts.sum().clamp(min=1)
    mean = (counts * means).sum(0) / total
    m2 = (m2s + counts * (means - mean).square()).sum(0)
    with torch.no_grad():
        for moving, value in zip(running, (mean, m2 / (total - 1).clamp(min=1)), strict=True):
            if moving is not None:
                moving.lerp_(value.to(moving.dtype), momentum)
    scale = (m2 / total + bn.eps).rsqrt()
    shape = (1, -1, 1, 1)
    z = (rows - mean[:, None]).unflatten(1, (y.shape[0], *y.shape[2:])).transpose(0, 1) * scale.view(shape)
    z = z if bn.weight is None else z * bn.weight.view(shape)
    z = z if bn.bias is None else z + bn.bias.view(shape)
    return z.to(y.dtype)


def count_batch(*bns: BatchNorm) -> None:
    """Counts one batch more, in one launch; the caller has checked everything that could still go wrong."""
    counters = [bn.num_batches_tracked for bn in bns if bn.num_batches_tracked is not None and bn.training]
    if len({id(counter) for counter in counters}) < len(counters):  # one BatchNorm in two places counts twice
        for counter in counters:
            counter.add_(1)
    elif counters:
        torch._foreach_add_(counters, 1)
