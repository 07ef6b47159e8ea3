"""The ResNet of Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .children import Obstacle, is_untouched
from .fused import FusedBlock, FusedStem
from .residual import Residual, Step, gather_for, run


class HuggingFaceBlock(FusedBlock):
    """Its ResNetBasicLayer and ResNetBottleNeckLayer: ``layer`` is a Sequential of conv-norm-activation modules."""

    def residual(self) -> Residual | Obstacle:
        if not is_untouched(self.layer, nn.Sequential):  # type: ignore[arg-type]
            return Obstacle("its layers carry hooks or another forward")
        branch: list[Step] = []
        for unit in self.layer:  # type: ignore[union-attr]
            layer = _unit(unit)
            if not layer:
                return Obstacle(f"{type(unit).__name__} is no plain ResNetConvLayer")
            branch += layer
        shortcut: Any = self.shortcut
        steps: tuple[Step, ...] = (shortcut,)
        if type(shortcut).__name__ == "ResNetShortCut" and is_untouched(shortcut, type(shortcut)):
            steps = (shortcut.convolution, shortcut.normalization)
        return Residual(tuple(branch), steps, self.activation)  # type: ignore[arg-type]


class HuggingFaceStem(FusedStem):
    """Its ResNetEmbeddings: a 7x7 convolution and the pooling."""

    def stem(self) -> Sequence[Step] | Obstacle:
        children: dict[str, Any] = self._modules
        layer = _unit(children["embedder"])
        return (*layer, children["pooler"]) if layer else Obstacle("its embedder is no plain ResNetConvLayer")

    def forward(self, pixel_values: Tensor) -> Tensor:
        stem = gather_for(pixel_values, self.stem())
        if isinstance(stem, Obstacle) or pixel_values.shape[1] != self.num_channels:
            return super().forward(pixel_values)  # type: ignore[no-any-return]
        return run(stem, pixel_values)


def _unit(module: nn.Module) -> list[Step]:
    """What a ResNetConvLayer calls; nothing where it is something else."""
    if type(module).__name__ != "ResNetConvLayer" or not is_untouched(module, type(module)):
        return []
    return [module.convolution, module.normalization, module.activation]  # type: ignore[list-item]


_RESNET = "transformers.models.resnet.modeling_resnet"
MIXINS = {
    f"{_RESNET}.ResNetBasicLayer": HuggingFaceBlock,
    f"{_RESNET}.ResNetBottleNeckLayer": HuggingFaceBlock,
    f"{_RESNET}.ResNetEmbeddings": HuggingFaceStem,
}
