"""The blocks and the network of timm's ``resnet.py``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .children import Obstacle
from .fused import FusedBlock, FusedStem
from .residual import Residual, Step, gather_for, run


def basic_block(block: nn.Module) -> Residual:
    """``block`` as timm's BasicBlock calls its children."""
    first = (block.conv1, block.bn1, block.drop_block, block.act1, block.aa)
    tail = (block.se, block.drop_path)
    return Residual((*first, block.conv2, block.bn2, *tail), (block.downsample,), block.act2)  # type: ignore[arg-type]


def bottleneck(block: nn.Module) -> Residual:
    """``block`` as timm's Bottleneck calls its children."""
    first = (block.conv1, block.bn1, block.act1)
    second = (block.conv2, block.bn2, block.drop_block, block.act2, block.aa)
    tail = (block.se, block.drop_path)
    branch = (*first, *second, block.conv3, block.bn3, *tail)
    return Residual(branch, (block.downsample,), block.act3)  # type: ignore[arg-type]


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
