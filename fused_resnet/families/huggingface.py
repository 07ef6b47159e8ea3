"""The ResNets of Hugging Face's transformers: its own, RT-DETR's with deep stem and pooled shortcuts, its RegNets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .children import Obstacle, is_untouched
from .fused import FusedBlock, FusedStem
from .residual import Residual, Step, calls, gather_for, run


class HuggingFaceBlock(FusedBlock):
    """Its ResNetBasicLayer and ResNetBottleNeckLayer: ``layer`` is a Sequential of conv-norm-activation modules."""

    def residual(self) -> Residual | Obstacle:
        if not is_untouched(self.layer, nn.Sequential):  # type: ignore[arg-type]
            return Obstacle("its layers carry hooks or another forward")
        branch: list[Step] = []
        for unit in self.layer:  # type: ignore[union-attr]
            layer = _unit(unit)
            if not layer:
                return Obstacle(f"{type(unit).__name__} carries hooks or another forward", passing=True)
            branch += layer
        shortcut = [call for step in calls((self.shortcut,)) for call in _opened(step)]  # type: ignore[arg-type]
        return Residual(tuple(branch), tuple(shortcut), self.activation)  # type: ignore[arg-type]


class HuggingFaceStem(FusedStem):
    """Its ResNetEmbeddings: a 7x7 convolution, or three of 3x3, and the pooling."""

    def stem(self) -> Sequence[Step] | Obstacle:
        children: dict[str, Any] = self._modules
        layers = [_unit(unit) for unit in calls((children["embedder"],))]  # type: ignore[arg-type]
        if not all(layers):
            return Obstacle("its embedder carries hooks or another forward", passing=True)
        return (*itertools.chain(*layers), *calls((children.get("pooler"),)))

    def forward(self, pixel_values: Tensor) -> Tensor:
        stem = gather_for(pixel_values, self.stem())
        if isinstance(stem, Obstacle) or pixel_values.shape[1] != self.num_channels:
            return super().forward(pixel_values)  # type: ignore[no-any-return]
        return run(stem, pixel_values)


def _unit(module: nn.Module) -> list[Step]:
    """What a ResNetConvLayer calls, and anything else is: squeeze and excitation; nothing where a call is expected."""
    if type(module).__name__ not in UNITS:
        return [module]
    if not is_untouched(module, type(module)):
        return []
    return [module.convolution, module.normalization, module.activation]  # type: ignore[list-item]


def _opened(step: Step) -> list[Step]:
    """What a step of the shortcut calls, if that is its projection."""
    if type(step).__name__ not in SHORTCUTS or not is_untouched(step, type(step)):  # type: ignore[arg-type]
        return [step]
    return [step.convolution, step.normalization]  # type: ignore[attr-defined]


UNITS = {"ResNetConvLayer", "RTDetrResNetConvLayer", "RegNetConvLayer"}
SHORTCUTS = {"ResNetShortCut", "RTDetrResNetShortCut", "RegNetShortCut"}
MIXINS = {
    f"transformers.models.{file}{name}": HuggingFaceStem if name == "Embeddings" else HuggingFaceBlock
    for file, names in {
        "resnet.modeling_resnet.ResNet": ("BasicLayer", "BottleNeckLayer", "Embeddings"),
        "rt_detr.modeling_rt_detr_resnet.RTDetrResNet": ("BasicLayer", "BottleNeckLayer", "Embeddings"),
        "regnet.modeling_regnet.RegNet": ("XLayer", "YLayer", "Embeddings"),
    }.items()
    for name in names
}
