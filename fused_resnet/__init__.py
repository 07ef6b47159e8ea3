"""Triton kernels that make ResNets train faster and in less memory on NVIDIA GPUs.

``fused_resnet.Bottleneck`` and ``fused_resnet.BasicBlock`` stand in for torchvision's; the builders make whole
networks.
"""

from . import functional, reference
from .compiling import warmup
from .convert import Report, convert, fold, patch, revert
from .explain import Explanation, explain
from .launch.record import Launch, record_launches
from .modules.blocks import BasicBlock, Bottleneck, SEBasicBlock, SEBottleneck
from .modules.layers import BNAddReLU, ConvBNReLU, Stem
from .modules.resnet import (
    ResNet,
    cifar_plain,
    cifar_resnet,
    plain,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from .plan.route import RouteUnavailableError, use_route
from .plan.target import Target
from .version import __version__ as __version__

__all__ = [
    "BNAddReLU",
    "BasicBlock",
    "Bottleneck",
    "ConvBNReLU",
    "Explanation",
    "Launch",
    "Report",
    "ResNet",
    "RouteUnavailableError",
    "SEBasicBlock",
    "SEBottleneck",
    "Stem",
    "Target",
    "cifar_plain",
    "cifar_resnet",
    "convert",
    "explain",
    "fold",
    "functional",
    "patch",
    "plain",
    "record_launches",
    "reference",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "revert",
    "use_route",
    "warmup",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
