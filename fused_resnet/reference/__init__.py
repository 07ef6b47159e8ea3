"""The networks of "Deep Residual Learning for Image Recognition" (He et al. 2015, arXiv 1512.03385) in plain PyTorch.

The same builders as the fused family, the same keywords, the same state-dict keys: to read beside the paper, and to
compare with. Imports nothing else of the package.
"""

from . import ops
from .blocks import (
    BasicBlock,
    BNAddReLU,
    Bottleneck,
    ConvBNReLU,
    PlainBlock,
    PlainBottleneck,
    SEBasicBlock,
    SEBottleneck,
    SqueezeExcitation,
    Stem,
    ZeroPadShortcut,
)
from .resnet import Family, ResNet

_family = Family()
resnet18 = _family.resnet18
resnet34 = _family.resnet34
resnet50 = _family.resnet50
resnet101 = _family.resnet101
resnet152 = _family.resnet152
wide_resnet50_2 = _family.wide_resnet50_2
wide_resnet101_2 = _family.wide_resnet101_2
resnext50_32x4d = _family.resnext50_32x4d
resnext101_32x8d = _family.resnext101_32x8d
resnext101_64x4d = _family.resnext101_64x4d
plain = _family.plain
cifar_resnet = _family.cifar_resnet
cifar_plain = _family.cifar_plain

__all__ = [
    "BNAddReLU",
    "BasicBlock",
    "Bottleneck",
    "ConvBNReLU",
    "Family",
    "PlainBlock",
    "PlainBottleneck",
    "ResNet",
    "SEBasicBlock",
    "SEBottleneck",
    "SqueezeExcitation",
    "Stem",
    "ZeroPadShortcut",
    "cifar_plain",
    "cifar_resnet",
    "ops",
    "plain",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
