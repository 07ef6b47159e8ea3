"""The building blocks of He et al. 2015 (Figure 5), in plain PyTorch.

Constructor arguments, child names and the order in which weights are drawn are torchvision's, so that state dicts and
seeds mean the same in both. Each ``forward`` reads its children alone; it serves any block that has the same children.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


def conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 1, stride, bias=False)


def stochastic_depth(branch: Tensor, probability: float, training: bool) -> Tensor:
    """Drops the residual branch of whole samples (Huang et al. 2016); survivors are scaled up to keep the mean."""
    if not training or probability == 0.0:
        return branch
    survival = 1.0 - probability
    keep = branch.new_empty((branch.shape[0], 1, 1, 1)).bernoulli_(survival)
    return branch * (keep / survival if survival > 0.0 else keep)


class ZeroPadShortcut(nn.Module):
    """Shortcut A: every ``stride``-th pixel, the added channels zero. Has no parameters."""

    def __init__(self, inplanes: int, outplanes: int, stride: int) -> None:
        super().__init__()
        if outplanes < inplanes:
            raise ValueError(f"shortcut A can only add channels, not go from {inplanes} to {outplanes}")
        self.added = outplanes - inplanes
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        # Pooling over single pixels samples them as slicing would, and keeps the memory format.
        sampled = F.avg_pool2d(x, 1, self.stride) if self.stride > 1 else x
        return F.pad(sampled, (0, 0, 0, 0, 0, self.added))


def projection(inplanes: int, outplanes: int, stride: int, norm_layer: Norm) -> nn.Sequential:
    """Shortcuts B and C: a 1x1 convolution and its normalisation."""
    return nn.Sequential(conv1x1(inplanes, outplanes, stride), norm_layer(outplanes))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (Figure 5, left)."""

    expansion: int = 1
    stochastic_depth_prob: float = 0.0

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError("BasicBlock only supports groups=1 and base_width=64")
        if dilation > 1:
            raise NotImplementedError("Dilation > 1 not supported in BasicBlock")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, planes, ceil(H / stride), ceil(W / stride)]."""
        out = stochastic_depth(self.branch(x), self.stochastic_depth_prob, self.training)
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))

    def branch(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(out))

    def zero_init_last(self) -> None:
        """Makes the block the identity at first: the last normalisation's weight is 0 (Goyal et al. 2017)."""
        if isinstance(self.bn2.weight, Tensor):
            nn.init.zeros_(self.bn2.weight)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (Figure 5, right).

    The 3x3 carries the stride ("v1.5"); the paper's own placement is ``ResNet(..., variant="v1")``.
    """

    expansion: int = 4
    stochastic_depth_prob: float = 0.0

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, 4 * planes, ceil(H / stride), ceil(W / stride)]."""
        out = stochastic_depth(self.branch(x), self.stochastic_depth_prob, self.training)
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))

    def branch(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.bn3(self.conv3(out))

    def zero_init_last(self) -> None:
        """Makes the block the identity at first: the last normalisation's weight is 0 (Goyal et al. 2017)."""
        if isinstance(self.bn3.weight, Tensor):
            nn.init.zeros_(self.bn3.weight)


class SqueezeExcitation(nn.Module):
    """Scales each channel by what all of them are on average (Hu et al. 2017, arXiv 1709.01507, Figure 2).

    Two 1x1 convolutions with bias, over ``channels / reduction`` channels: timm's names, and as there the nearest
    multiple of 8, at least 8. [N, channels, H, W] to the same.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(8, int(channels / reduction + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(mean))))


class SEBasicBlock(BasicBlock):
    """A :class:`BasicBlock` with squeeze and excitation, ``se``, at the end of its branch (Hu et al. 2017)."""

    def __init__(self, *arguments: Any, reduction: int = 16, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.se = SqueezeExcitation(self.conv2.out_channels, reduction)

    def branch(self, x: Tensor) -> Tensor:
        return self.se(super().branch(x))


class SEBottleneck(Bottleneck):
    """A :class:`Bottleneck` with squeeze and excitation, ``se``, at the end of its branch (Hu et al. 2017)."""

    def __init__(self, *arguments: Any, reduction: int = 16, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.se = SqueezeExcitation(self.conv3.out_channels, reduction)

    def branch(self, x: Tensor) -> Tensor:
        return self.se(super().branch(x))


class ConvBNReLU(nn.Module):
    """Convolution without bias, batch normalisation, ReLU. ``padding=None`` keeps the size at stride 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        relu: bool = True,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size - 1) // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        return torch.relu(out) if self.relu else out


class BNAddReLU(nn.BatchNorm2d):
    """Batch normalisation, the sum with ``residual`` if there is one, ReLU: all [N, num_features, H, W]."""

    def forward(self, y: Tensor, residual: Tensor | None = None) -> Tensor:  # type: ignore[override]
        out = super().forward(y)
        return torch.relu(out if residual is None else out + residual)


class Stem(nn.Module):
    """A 7x7 convolution of stride 2, batch normalisation, ReLU, and 3x3 max pooling of stride 2 (Table 1)."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels, eps, momentum)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, out_channels, H / 4, W / 4]."""
        return F.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)


class PlainBlock(nn.Sequential):
    """What is left of a :class:`BasicBlock` without its shortcut: the plain networks of section 3.3."""

    expansion: int = 1
    kernel_sizes: tuple[int, ...] = (3, 3)
    unit: Callable[..., nn.Module] = ConvBNReLU

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
    ) -> None:
        if downsample is not None or norm_layer not in (None, nn.BatchNorm2d):
            raise ValueError("a plain block has no shortcut, and BatchNorm2d is its normalisation")
        if (groups, base_width, dilation) != (1, 64, 1):
            raise ValueError("a plain block takes neither groups nor another width nor dilation")
        widths = [inplanes, *[planes] * (len(self.kernel_sizes) - 1), planes * self.expansion]
        strided = self.kernel_sizes.index(3)
        super().__init__(
            *(
                self.unit(widths[i], widths[i + 1], size, stride if i == strided else 1)
                for i, size in enumerate(self.kernel_sizes)
            )
        )


class PlainBottleneck(PlainBlock):
    """What is left of a :class:`Bottleneck` without its shortcut."""

    expansion = 4
    kernel_sizes = (1, 3, 1)
