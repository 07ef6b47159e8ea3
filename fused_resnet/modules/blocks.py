"""The residual blocks, each one operation, with the children and the state dict of torchvision's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from .. import functional, reference
from ..functional import BatchNorm, Conv
from .children import Unscriptable, is_untouched, may_fuse

Layer = tuple[Conv, BatchNorm]
Pair = tuple[nn.Conv2d, nn.BatchNorm2d]


def _layer(pair: Pair) -> Layer:
    conv, bn = pair
    return functional.conv_of(conv), functional.batch_norm_of(bn)


def _shortcut(downsample: nn.Module | None, x: Tensor) -> tuple[Layer | None, Tensor | None]:
    """(projection, residual): a 1x1 conv and its BatchNorm join the operation; any other shortcut runs by itself."""
    if downsample is None:
        return None, None
    children = tuple(downsample.children())
    if is_untouched(downsample, nn.Sequential) and len(children) == 2 and may_fuse(x, *children):
        pair = cast(Pair, children)
        if (pair[0].kernel_size, pair[0].padding, pair[0].groups) == ((1, 1), (0, 0), 1):
            return _layer(pair), None
    return None, downsample(x)


def _fusable(
    block: reference.BasicBlock | reference.Bottleneck, x: Tensor, *pairs: tuple[nn.Module, nn.Module]
) -> list[Pair] | None:
    """The block's (conv, bn) children, unless something expects them to be called: hooks, other norms, random depth."""
    drops = block.training and block.stochastic_depth_prob > 0.0
    fits = not drops and is_untouched(block.relu, nn.ReLU) and all(may_fuse(x, conv, bn) for conv, bn in pairs)
    return cast("list[Pair]", list(pairs)) if fits else None  # a compiler that traces this evaluates no type


class _MemoryOptions(Unscriptable):
    """The blocks' keywords beyond torchvision's, which are attributes and read at call time."""

    recompute: Sequence[str] = ()
    keep: Sequence[str] = ()

    def __init__(
        self, *arguments: Any, recompute: Sequence[str] = (), keep: Sequence[str] = (), **keywords: Any
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.recompute, self.keep = functional.memory_options(recompute, keep)


class BasicBlock(_MemoryOptions, reference.BasicBlock):
    """Two 3x3 convolutions and a shortcut as one operation (He et al. 2015, arXiv 1512.03385, Figure 5, left).

    Constructor: torchvision's ``(inplanes, planes, stride=1, downsample=None, groups=1, base_width=64, dilation=1,
    norm_layer=None)``. Input [N, inplanes, H, W], output [N, planes, ceil(H / stride), ceil(W / stride)]. Children that
    carry hooks, pruning or parametrisations, other norms than BatchNorm2d and stochastic depth run child by child.
    Keywords ``recompute=("y1",)`` and ``keep=("a1",)``, attributes too: see :func:`fused_resnet.functional.bottleneck`.
    """

    def forward(self, x: Tensor) -> Tensor:
        pairs = _fusable(self, x, (self.conv1, self.bn1), (self.conv2, self.bn2))
        if pairs is None:
            return super().forward(x)
        projection, residual = _shortcut(self.downsample, x)
        layers = [_layer(pair) for pair in pairs]
        options: dict[str, Any] = {"residual": residual, "recompute": self.recompute, "keep": self.keep}
        return functional.basic_block(x, layers, projection, **options)


class Bottleneck(_MemoryOptions, reference.Bottleneck):
    """1x1, 3x3 and 1x1 convolutions and a shortcut as one operation (He et al. 2015, 1512.03385, Figure 5, right).

    Constructor: torchvision's ``(inplanes, planes, stride=1, downsample=None, groups=1, base_width=64, dilation=1,
    norm_layer=None)``. Input [N, inplanes, H, W], output [N, 4 * planes, ceil(H / stride), ceil(W / stride)]. Children
    that carry hooks, pruning or parametrisations, other norms than BatchNorm2d and stochastic depth run child by child.
    Keywords ``recompute=("y1",)`` and ``keep=("a1",)``, attributes too: see :func:`fused_resnet.functional.bottleneck`.
    """

    def forward(self, x: Tensor) -> Tensor:
        pairs = _fusable(self, x, (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))
        if pairs is None:
            return super().forward(x)
        projection, residual = _shortcut(self.downsample, x)
        layers = [_layer(pair) for pair in pairs]
        options: dict[str, Any] = {"residual": residual, "recompute": self.recompute, "keep": self.keep}
        return functional.bottleneck(x, layers, projection, **options)
