"""torchvision's blocks and network, and every block that has their children's names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .children import Obstacle, children
from .fused import FusedBlock, FusedStem
from .residual import Residual, Step, gather_for, run


def basic_block(block: nn.Module, *tail: Step) -> Residual:
    """``block`` as torchvision's BasicBlock calls its children; ``tail``: what is called before the sum."""
    conv1, bn1, relu, conv2, bn2, downsample = children(block, "conv1", "bn1", "relu", "conv2", "bn2", "downsample")
    return Residual((conv1, bn1, relu, conv2, bn2, *tail), (downsample,), relu)


def bottleneck(block: nn.Module, *tail: Step) -> Residual:
    """``block`` as torchvision's Bottleneck calls its children; ``tail``: what is called before the sum."""
    conv1, bn1, relu, conv2, bn2 = children(block, "conv1", "bn1", "relu", "conv2", "bn2")
    conv3, bn3, downsample = children(block, "conv3", "bn3", "downsample")
    return Residual((conv1, bn1, relu, conv2, bn2, relu, conv3, bn3, *tail), (downsample,), relu)


class TorchvisionBasicBlock(FusedBlock):
    def residual(self) -> Residual:
        return basic_block(self)


class TorchvisionBottleneck(FusedBlock):
    def residual(self) -> Residual:
        return bottleneck(self)


class TorchvisionResNet(FusedStem):
    """The network: its stem is one operation, the rest is called as it is."""

    def stem(self) -> Sequence[Step] | Obstacle:
        if "_forward_impl" in vars(self):
            return Obstacle("its _forward_impl was replaced", passing=True)
        return (self.conv1, self.bn1, self.relu, self.maxpool)  # type: ignore[return-value]

    def _forward_impl(self, x: Tensor) -> Tensor:
        stem = gather_for(x, self.stem())
        if isinstance(stem, Obstacle):
            return super()._forward_impl(x)  # type: ignore[misc, no-any-return]
        x = run(stem, x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)  # type: ignore[operator]
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[operator, no-any-return]


MIXINS = {
    "torchvision.models.resnet.BasicBlock": TorchvisionBasicBlock,
    "torchvision.models.resnet.Bottleneck": TorchvisionBottleneck,
    "torchvision.models.resnet.ResNet": TorchvisionResNet,
}
