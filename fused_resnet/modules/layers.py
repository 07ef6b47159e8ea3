"""Single layers: parameters and buffers of their own, one fused operation each."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional, reference
from ..families.children import Obstacle, Unscriptable
from ..families.residual import RELU, gather_for, run

POOL = nn.MaxPool2d(3, stride=2, padding=1)


class ConvBNReLU(Unscriptable, reference.ConvBNReLU):
    """``relu(bn(conv(x)))`` as one operation: [N, in_channels, H, W] to [N, out_channels, P, Q].

    Children ``conv`` (without bias) and ``bn``. ``padding=None`` keeps the size at stride 1. The constructor is
    ``(in_channels, out_channels, kernel_size, stride=1, padding=None, dilation=1, groups=1, eps=1e-5, momentum=0.1,
    relu=True)``. Source: Ioffe and Szegedy 2015, arXiv 1502.03167.
    """

    def forward(self, x: Tensor) -> Tensor:
        steps = gather_for(x, (self.conv, self.bn, RELU if self.relu else None))
        return super().forward(x) if isinstance(steps, Obstacle) else run(steps, x)


class BNAddReLU(Unscriptable, reference.BNAddReLU):
    """``relu(bn(y) + residual)`` as one operation; all [N, num_features, H, W]. ``residual`` may be left away.

    An ``nn.BatchNorm2d`` in everything else: constructor, state dict, modes. So ``convert_sync_batchnorm``, which makes
    a new norm of every norm's attributes, loses the ReLU and the residual: convert only models that have none of these,
    or give the new norm's record to ``functional.bn_add_relu``.
    """

    def forward(self, y: Tensor, residual: Tensor | None = None) -> Tensor:
        return functional.bn_add_relu(y, functional.batch_norm_of(self), residual)


class Stem(Unscriptable, reference.Stem):
    """``max_pool(relu(bn(conv(x))))``, the first layers of an ImageNet ResNet (He et al. 2015, Table 1).

    Constructor: ``(in_channels=3, out_channels=64, eps=1e-5, momentum=0.1)``. Children ``conv1`` (7x7, stride 2,
    padding 3, without bias) and ``bn1``; the pooling is 3x3, stride 2, padding 1. [N, in_channels, H, W] to
    [N, out_channels, H / 4, W / 4].
    """

    def forward(self, x: Tensor) -> Tensor:
        steps = gather_for(x, (self.conv1, self.bn1, RELU, POOL))
        return super().forward(x) if isinstance(steps, Obstacle) else run(steps, x)
