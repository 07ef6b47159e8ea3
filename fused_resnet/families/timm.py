"""The blocks and the network of timm's ``resnet.py``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .children import Obstacle, children
from .fused import FusedBlock, FusedStem
from .residual import Residual, Step, gather_for, run


def basic_block(block: nn.Module) -> Residual:
    """``block`` as timm's BasicBlock calls its children."""
    first = children(block, "conv1", "bn1", "drop_block", "act1", "aa")
    second = children(block, "conv2", "bn2", "se", "drop_path")
    downsample, act2 = children(block, "downsample", "act2")
    return Residual((*first, *second), (downsample,), act2)


def bottleneck(block: nn.Module) -> Residual:
    """``block`` as timm's Bottleneck calls its children."""
    first = children(block, "conv1", "bn1", "act1")
    second = children(block, "conv2", "bn2", "drop_block", "act2", "aa")
    third = children(block, "conv3", "bn3", "se", "drop_path")
    downsample, act3 = children(block, "downsample", "act3")
    return Residual((*first, *second, *third), (downsample,), act3)


class TimmBasicBlock(FusedBlock):
    def residual(self) -> Residual:
        return basic_block(self)


class TimmBottleneck(FusedBlock):
    def residual(self) -> Residual:
        return bottleneck(self)


class TimmResNet(FusedStem):
    """The network: its stem, deep ones too, is fused; with gradient checkpointing it runs as timm wrote it."""

    def stem(self) -> Sequence[Step] | Obstacle:
        if self.grad_checkpointing:
            return Obstacle("it checkpoints its activations", passing=True)
        if "forward_features" in vars(self):
            return Obstacle("its forward_features was replaced", passing=True)
        return (self.conv1, self.bn1, self.act1, self.maxpool)  # type: ignore[return-value]

    def forward_features(self, x: Tensor) -> Tensor:
        stem = gather_for(x, self.stem())
        if isinstance(stem, Obstacle):
            return super().forward_features(x)  # type: ignore[misc, no-any-return]
        x = run(stem, x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)  # type: ignore[operator]
        return x


MIXINS = {
    "timm.models.resnet.BasicBlock": TimmBasicBlock,
    "timm.models.resnet.Bottleneck": TimmBottleneck,
    "timm.models.resnet.ResNet": TimmResNet,
}
