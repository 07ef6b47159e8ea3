"""The mathematics of the fused operations in plain PyTorch: what they must equal, and what runs where they cannot.

Each is what ``nn.Conv2d``, ``nn.BatchNorm2d`` and ``relu`` compute in a row, gradients included. ``training`` says
whether the batch's own statistics normalise; ``running_mean`` and ``running_var``, if given, are then updated in place.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def bn_act(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """``relu(batch_norm(y) + residual)``, each part where asked for. ``y`` and ``residual``: [N, C, H, W]."""
    z = F.batch_norm(y, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        z = z + residual
    return F.relu(z) if relu else z


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """``relu(batch_norm(conv(x)) + residual)``; ``x``: [N, Ci, H, W], ``conv_weight``: [Co, Ci / groups, R, S]."""
    y = F.conv2d(x, conv_weight, None, stride, padding, dilation, groups)
    return bn_act(
        y,
        weight,
        bias,
        running_mean,
        running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        residual=residual,
        relu=relu,
    )


def stem(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int | Pair = 2,
    padding: int | Pair = 3,
) -> Tensor:
    """``max_pool(relu(batch_norm(conv(x))))`` with the network's 3x3 pooling of stride 2 and padding 1."""
    out = conv_bn_act(
        x,
        conv_weight,
        weight,
        bias,
        running_mean,
        running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        stride=stride,
        padding=padding,
    )
    return F.max_pool2d(out, 3, stride=2, padding=1)
