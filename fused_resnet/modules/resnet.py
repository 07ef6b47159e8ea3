"""The ResNet family over the fused blocks: the networks of :mod:`fused_resnet.reference`, made of other parts."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional, reference
from .blocks import BasicBlock, Bottleneck
from .children import Unscriptable, is_stem_pool, is_untouched, may_fuse
from .layers import ConvBNReLU


class PlainBlock(reference.PlainBlock):
    """Two fused 3x3 layers without a shortcut: the plain networks (He et al. 2015, section 3.3)."""

    unit = ConvBNReLU


class PlainBottleneck(PlainBlock, reference.PlainBottleneck):
    """Fused 1x1, 3x3 and 1x1 layers without a shortcut."""


class ResNet(Unscriptable, reference.ResNet):
    """:class:`fused_resnet.reference.ResNet` with a fused stem; the blocks bring their own fusion."""

    def stem(self, x: Tensor) -> Tensor:
        if not (may_fuse(x, self.conv1, self.bn1) and is_untouched(self.relu, nn.ReLU)):
            return super().stem(x)
        conv, bn = functional.conv_of(self.conv1), functional.batch_norm_of(self.bn1)  # type: ignore[arg-type]
        if is_stem_pool(self.maxpool) and conv.dilation == (1, 1) and conv.groups == 1:
            return functional.stem(x, conv.weight, bn, stride=conv.stride, padding=conv.padding)
        return self.maxpool(functional.conv_bn_relu(x, bn=bn, **conv._asdict()))


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
