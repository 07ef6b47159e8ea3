"""The residual blocks, each one operation: drop-in for torchvision's, with the same children and the same state dict."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional, reference
from ..functional import BatchNorm, Conv
from .children import is_untouched, may_fuse

Layer = tuple[Conv, BatchNorm]


def _layer(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Layer:
    return functional.conv_of(conv), functional.batch_norm_of(bn)


def _shortcut(downsample: nn.Module | None, x: Tensor) -> tuple[Layer | None, Tensor | None]:
    """(projection, residual): a 1x1 convolution and its BatchNorm join the operation; any other shortcut runs by itself."""
    if downsample is None:
        return None, None
    if is_untouched(downsample, nn.Sequential) and len(downsample) == 2:  # type: ignore[arg-type]
        conv, bn = downsample  # type: ignore[misc]
        if may_fuse(x, conv, bn) and (conv.kernel_size, conv.padding, conv.groups) == ((1, 1), (0, 0), 1):
            return _layer(conv, bn), None
    return None, downsample(x)


def _runs_as_one(
    block: reference.BasicBlock | reference.Bottleneck, x: Tensor, *layers: tuple[nn.Module, nn.Module]
) -> bool:
    """Whether nothing expects the block's children to be called one by one: hooks, other norms, stochastic depth."""
    drops = block.training and block.stochastic_depth_prob > 0.0
    return not drops and is_untouched(block.relu, nn.ReLU) and all(may_fuse(x, conv, bn) for conv, bn in layers)


class BasicBlock(reference.BasicBlock):
    """Two 3x3 convolutions and a shortcut as one operation (He et al. 2015, arXiv 1512.03385, Figure 5, left).

    Constructor: torchvision's ``(inplanes, planes, stride=1, downsample=None, groups=1, base_width=64, dilation=1,
    norm_layer=None)``. Input [N, inplanes, H, W], output [N, planes, ceil(H / stride), ceil(W / stride)]. Children that carry
    hooks, pruning or parametrisations, other norms than BatchNorm2d and stochastic depth run child by child.
    """

    def forward(self, x: Tensor) -> Tensor:
        children = ((self.conv1, self.bn1), (self.conv2, self.bn2))
        if not _runs_as_one(self, x, *children):
            return super().forward(x)
        projection, residual = _shortcut(self.downsample, x)
        return functional.basic_block(x, [_layer(*pair) for pair in children], projection, residual=residual)


class Bottleneck(reference.Bottleneck):
    """1x1, 3x3 and 1x1 convolutions and a shortcut as one operation (He et al. 2015, arXiv 1512.03385, Figure 5, right).

    Constructor: torchvision's ``(inplanes, planes, stride=1, downsample=None, groups=1, base_width=64, dilation=1,
    norm_layer=None)``. Input [N, inplanes, H, W], output [N, 4 * planes, ceil(H / stride), ceil(W / stride)]. Children that
    carry hooks, pruning or parametrisations, other norms than BatchNorm2d and stochastic depth run child by child.
    """

    def forward(self, x: Tensor) -> Tensor:
        children = ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))
        if not _runs_as_one(self, x, *children):
            return super().forward(x)
        projection, residual = _shortcut(self.downsample, x)
        return functional.bottleneck(x, [_layer(*pair) for pair in children], projection, residual=residual)
