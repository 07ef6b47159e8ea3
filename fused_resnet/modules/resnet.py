"""The ResNet family over the fused blocks: the networks of :mod:`fused_resnet.reference`, made of other parts."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..families.children import Obstacle, Unscriptable
from ..families.residual import gather_for, run
from .blocks import BasicBlock, Bottleneck
from .layers import ConvBNReLU


class PlainBlock(reference.PlainBlock):
    """Two fused 3x3 layers without a shortcut: the plain networks (He et al. 2015, section 3.3)."""

    unit = ConvBNReLU


class PlainBottleneck(PlainBlock, reference.PlainBottleneck):
    """Fused 1x1, 3x3 and 1x1 layers without a shortcut."""


class ResNet(Unscriptable, reference.ResNet):
    """:class:`fused_resnet.reference.ResNet` with a fused stem; the blocks bring their own fusion."""

    def stem(self, x: Tensor) -> Tensor:
        steps = gather_for(x, (self.conv1, self.bn1, self.relu, self.maxpool))
        return super().stem(x) if isinstance(steps, Obstacle) else run(steps, x)


family = reference.Family(BasicBlock, Bottleneck, PlainBlock, PlainBottleneck, ResNet)
resnet18 = family.resnet18
resnet34 = family.resnet34
resnet50 = family.resnet50
resnet101 = family.resnet101
resnet152 = family.resnet152
wide_resnet50_2 = family.wide_resnet50_2
wide_resnet101_2 = family.wide_resnet101_2
resnext50_32x4d = family.resnext50_32x4d
resnext101_32x8d = family.resnext101_32x8d
resnext101_64x4d = family.resnext101_64x4d
plain = family.plain
cifar_resnet = family.cifar_resnet
cifar_plain = family.cifar_plain
