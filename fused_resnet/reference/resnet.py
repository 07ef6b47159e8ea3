"""The networks of He et al. 2015 (Tables 1 and 6), whatever their blocks are made of.

:class:`ResNet` is the network and :class:`Family` its named builders; both take the block classes as arguments, so that
the fused family is the same code over other blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .blocks import BasicBlock, Bottleneck, Norm, PlainBlock, PlainBottleneck, ZeroPadShortcut, projection
from .weights import Weights, read_weights

Block = Callable[..., nn.Module]
Shortcut = Literal["A", "B", "C"]

IMAGENET_LAYERS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class ResNet(nn.Module):
    """A stem, stages of blocks that halve the image and double the channels, average pooling and a classifier.

    The positional arguments, the state-dict keys and the initial weights under a seed are torchvision's. Beyond those:

    - ``in_channels``: of the image; ``width``: channels of the stem and of the first stage's blocks.
    - ``small_input``: a 3x3 stem of stride 1 without pooling, as for CIFAR (section 4.2).
    - ``shortcut``: "A" pads with zeros, "B" projects where the shape changes, "C" projects always (section 4.1);
      ``None`` leaves the shortcuts away (of blocks that have none: the plain networks).
    - ``variant``: "v1.5" strides in a bottleneck's 3x3 convolution, "v1" in its first 1x1 (the paper's).
    - ``stochastic_depth_prob``: with which the last block's branch is dropped; linear in depth (Huang et al. 2016).

    Input [N, in_channels, H, W], output [N, num_classes].
    """

    def __init__(
        self,
        block: Block,
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Norm | None = None,
        *,
        in_channels: int = 3,
        width: int = 64,
        small_input: bool = False,
        shortcut: Shortcut | None = "B",
        variant: Literal["v1.5", "v1"] = "v1.5",
        stochastic_depth_prob: float = 0.0,
    ) -> None:
        super().__init__()
        if not layers or min(layers) < 1:
            raise ValueError(f"layers must give at least one block for each stage, got {list(layers)}")
        if shortcut not in ("A", "B", "C", None):
            raise ValueError(f'shortcut must be "A", "B", "C" or None, got {shortcut!r}')
        if variant not in ("v1.5", "v1"):
            raise ValueError(f'variant must be "v1.5" or "v1", got {variant!r}')
        if not 0.0 <= stochastic_depth_prob <= 1.0:
            raise ValueError(f"stochastic_depth_prob must lie between 0 and 1, got {stochastic_depth_prob}")
        if shortcut is None and (zero_init_residual or stochastic_depth_prob):
            raise ValueError("zero_init_residual and stochastic_depth_prob need a shortcut")
        dilate = list(replace_stride_with_dilation or [False] * (len(layers) - 1))
        if len(dilate) != len(layers) - 1:
            raise ValueError(f"replace_stride_with_dilation must have {len(layers) - 1} elements, got {dilate}")

        self.inplanes = width
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.shortcut = shortcut
        self._norm_layer = norm_layer = norm_layer or nn.BatchNorm2d
        if small_input:
            self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_input else nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = [f"layer{i}" for i in range(1, len(layers) + 1)]
        for i, (name, blocks) in enumerate(zip(self.stages, layers)):
            stride = 1 if i == 0 else 2
            setattr(self, name, self._make_stage(block, width << i, blocks, stride, dilate=i > 0 and dilate[i - 1]))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)

        self._init_weights(zero_init_residual)
        blocks_in_order = [b for name in self.stages for b in getattr(self, name)]
        for i, b in enumerate(blocks_in_order, 1):
            if variant == "v1" and hasattr(b, "conv3"):
                b.conv1.stride, b.conv2.stride = b.conv2.stride, b.conv1.stride
            if stochastic_depth_prob:
                b.stochastic_depth_prob = stochastic_depth_prob * i / len(blocks_in_order)

    def _make_stage(self, block: Block, planes: int, blocks: int, stride: int, dilate: bool) -> nn.Sequential:
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        stage = []
        for i in range(blocks):
            downsample = self._make_shortcut(planes * block.expansion, stride)  # type: ignore[attr-defined]
            dilation = first_dilation if i == 0 else self.dilation
            stage.append(
                block(
                    self.inplanes, planes, stride, downsample, self.groups, self.base_width, dilation, self._norm_layer
                )
            )
            self.inplanes = planes * block.expansion  # type: ignore[attr-defined]
            stride = 1
        return nn.Sequential(*stage)

    def _make_shortcut(self, outplanes: int, stride: int) -> nn.Module | None:
        same_shape = stride == 1 and self.inplanes == outplanes
        if self.shortcut is None or (same_shape and self.shortcut != "C"):
            return None
        if self.shortcut == "A":
            return ZeroPadShortcut(self.inplanes, outplanes, stride)
        return projection(self.inplanes, outplanes, stride, self._norm_layer)

    def _init_weights(self, zero_init_residual: bool) -> None:
        """He et al. 2015b (1502.01852) over the fan-out; normalisations start as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and module.weight is not None:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        if zero_init_residual:
            for module in self.modules():
                zero_init_last = getattr(module, "zero_init_last", None)
                if callable(zero_init_last):
                    zero_init_last()

    def stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Family:
    """The builders of the networks over one set of block classes.

    Every builder takes :class:`ResNet`'s keywords and ``weights``: a state dict, the path of a checkpoint, or, where
    torchvision is installed, one of its weights enums or the name of one ("IMAGENET1K_V2", "DEFAULT").
    """

    def __init__(
        self,
        basic: Block = BasicBlock,
        bottleneck: Block = Bottleneck,
        plain_basic: Block = PlainBlock,
        plain_bottleneck: Block = PlainBottleneck,
        network: Callable[..., ResNet] = ResNet,
    ) -> None:
        self.basic = basic
        self.bottleneck = bottleneck
        self.plain_basic = plain_basic
        self.plain_bottleneck = plain_bottleneck
        self.network = network

    def _build(
        self, name: str, block: Block, layers: Sequence[int], weights: Weights | None = None, **options: Any
    ) -> ResNet:
        if weights is None:
            return self.network(block, layers, **options)
        state = read_weights(weights, name)
        if "fc.weight" in state:
            options.setdefault("num_classes", len(state["fc.weight"]))
        model = self.network(block, layers, **options)
        model.load_state_dict(state)
        return model

    def resnet18(self, **options: Any) -> ResNet:
        """ResNet-18 (Table 1): 11.7 million parameters. Keywords: see :class:`ResNet` and :class:`Family`."""
        return self._build("resnet18", self.basic, IMAGENET_LAYERS[18], **options)

    def resnet34(self, **options: Any) -> ResNet:
        """ResNet-34 (Table 1): 21.8 million parameters. Keywords: see :class:`ResNet` and :class:`Family`."""
        return self._build("resnet34", self.basic, IMAGENET_LAYERS[34], **options)

    def resnet50(self, **options: Any) -> ResNet:
        """ResNet-50 (Table 1): 25.6 million parameters. Keywords: see :class:`ResNet` and :class:`Family`."""
        return self._build("resnet50", self.bottleneck, IMAGENET_LAYERS[50], **options)

    def resnet101(self, **options: Any) -> ResNet:
        """ResNet-101 (Table 1): 44.5 million parameters. Keywords: see :class:`ResNet` and :class:`Family`."""
        return self._build("resnet101", self.bottleneck, IMAGENET_LAYERS[101], **options)

    def resnet152(self, **options: Any) -> ResNet:
        """ResNet-152 (Table 1): 60.2 million parameters. Keywords: see :class:`ResNet` and :class:`Family`."""
        return self._build("resnet152", self.bottleneck, IMAGENET_LAYERS[152], **options)

    def wide_resnet50_2(self, **options: Any) -> ResNet:
        """Bottlenecks twice as wide (Zagoruyko and Komodakis 2016, 1605.07146): 68.9 million parameters."""
        return self._build("wide_resnet50_2", self.bottleneck, IMAGENET_LAYERS[50], width_per_group=128, **options)

    def wide_resnet101_2(self, **options: Any) -> ResNet:
        """Bottlenecks twice as wide (Zagoruyko and Komodakis 2016, 1605.07146): 126.9 million parameters."""
        return self._build("wide_resnet101_2", self.bottleneck, IMAGENET_LAYERS[101], width_per_group=128, **options)

    def resnext50_32x4d(self, **options: Any) -> ResNet:
        """32 groups of 4 channels (Xie et al. 2016, 1611.05431): 25.0 million parameters."""
        return self._grouped("resnext50_32x4d", 50, 32, 4, options)

    def resnext101_32x8d(self, **options: Any) -> ResNet:
        """32 groups of 8 channels (Xie et al. 2016, 1611.05431): 88.8 million parameters."""
        return self._grouped("resnext101_32x8d", 101, 32, 8, options)

    def resnext101_64x4d(self, **options: Any) -> ResNet:
        """64 groups of 4 channels (Xie et al. 2016, 1611.05431): 83.5 million parameters."""
        return self._grouped("resnext101_64x4d", 101, 64, 4, options)

    def _grouped(self, name: str, depth: int, groups: int, width_per_group: int, options: dict[str, Any]) -> ResNet:
        layers = IMAGENET_LAYERS[depth]
        return self._build(name, self.bottleneck, layers, groups=groups, width_per_group=width_per_group, **options)

    def plain(self, depth: int, **options: Any) -> ResNet:
        """The ImageNet network of ``depth`` 18, 34, 50, 101 or 152 without its shortcuts (section 3.3)."""
        if depth not in IMAGENET_LAYERS:
            raise ValueError(f"depth must be one of {list(IMAGENET_LAYERS)}, got {depth}")
        block = self.plain_basic if depth < 50 else self.plain_bottleneck
        return self._build(f"plain{depth}", block, IMAGENET_LAYERS[depth], shortcut=None, **options)

    def cifar_resnet(self, depth: int, **options: Any) -> ResNet:
        """The network of 6n + 2 layers for 32x32 images and 10 classes (section 4.2), with shortcut A by default."""
        return self._cifar("cifar_resnet", self.basic, depth, {"shortcut": "A", **options})

    def cifar_plain(self, depth: int, **options: Any) -> ResNet:
        """The network of 6n + 2 layers for 32x32 images and 10 classes without its shortcuts (section 4.2)."""
        return self._cifar("cifar_plain", self.plain_basic, depth, {"shortcut": None, **options})

    def _cifar(self, name: str, block: Block, depth: int, options: dict[str, Any]) -> ResNet:
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2 (20, 32, 44, 56, 110, ...), got {depth}")
        defaults = {"small_input": True, "width": 16, "num_classes": 10}
        if options.get("weights") is not None:
            del defaults["num_classes"]  # the checkpoint's own
        return self._build(f"{name}{depth}", block, [(depth - 2) // 6] * 3, **{**defaults, **options})
