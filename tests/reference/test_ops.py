"""The plain mathematics of the fused operations is what the modules compute in a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fused_resnet.reference import ops

pytestmark = pytest.mark.quick


def arguments(bn: nn.BatchNorm2d) -> tuple[Any, ...]:
    return bn.weight, bn.bias, bn.running_mean, bn.running_var


def twins(channels: int) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    torch.manual_seed(1)
    first, second = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3), nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3)
    nn.init.uniform_(first.weight, -1, 1)
    nn.init.uniform_(first.bias, -1, 1)
    first.running_var.uniform_(0.5, 2)
    second.load_state_dict(first.state_dict())
    return first.double(), second.double()


def same(ours: torch.Tensor, theirs: torch.Tensor, bns: tuple[nn.BatchNorm2d, nn.BatchNorm2d], x: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    grads = [torch.autograd.grad(out.square().sum(), [x, *bn.parameters()]) for out, bn in zip((ours, theirs), bns)]
    for ours_grad, theirs_grad in zip(*grads):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=0, atol=0)
    torch.testing.assert_close(bns[0].running_mean, bns[1].running_mean, rtol=0, atol=0)
    torch.testing.assert_close(bns[0].running_var, bns[1].running_var, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_conv_bn_act(training: bool, relu: bool, with_residual: bool) -> None:
    bns = twins(6)
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, bias=False).double()
    theirs = bns[1].train(training)(conv(x))
    residual = torch.randn_like(theirs) if with_residual else None
    theirs = theirs if residual is None else theirs + residual
    theirs = theirs.relu() if relu else theirs
    geometry = {"stride": 2, "padding": 2, "dilation": 2, "groups": 2}
    statistics = {"training": training, "momentum": 0.3, "eps": 1e-3}
    ours = ops.conv_bn_act(x, conv.weight, *arguments(bns[0]), **statistics, **geometry, residual=residual, relu=relu)
    same(ours, theirs, bns, x)


@pytest.mark.parametrize("training", [True, False])
def test_stem(training: bool) -> None:
    bns = twins(5)
    x = torch.randn(2, 3, 17, 20, dtype=torch.float64, requires_grad=True)
    conv = nn.Conv2d(3, 5, 7, stride=2, padding=3, bias=False).double()
    theirs = nn.MaxPool2d(3, 2, 1)(bns[1].train(training)(conv(x)).relu())
    ours = ops.stem(x, conv.weight, *arguments(bns[0]), training=training, momentum=0.3, eps=1e-3)
    same(ours, theirs, bns, x)


def test_bn_act_takes_the_batch_statistics_alone() -> None:
    y = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    ours = ops.bn_act(y, None, None, None, None, training=True, relu=False)
    theirs = nn.BatchNorm2d(4, affine=False, track_running_stats=False).double()(y)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
