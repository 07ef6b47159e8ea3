"""The networks that the scripts train, by name."""

from __future__ import annotations

import re
from typing import Any

NAMES = (
    "small",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
)
SMALL_LAYERS = (2, 1, 1)  # bottlenecks per stage: both kinds of shortcut, stride 1 and 2
SMALL_IMAGE = 64  # up to so many pixels a side the stem is 3x3 without pooling
_BY_DEPTH = re.compile(r"(cifar_resnet|cifar_plain|plain)(\d+)")


def name_of_network(text: str) -> str:
    """``text`` if it names a network, for argparse. ValueError: there is none of that name."""
    if text not in NAMES and not _BY_DEPTH.fullmatch(text):
        raise ValueError(text)
    return text


def build(family: Any, name: str, num_classes: int, size: tuple[int, int], **keywords: Any) -> Any:
    """The network ``name`` of ``family`` (fused_resnet, or fused_resnet.reference) for images of ``size``.

    Besides :data:`NAMES` there are ``cifar_resnet20``, ``cifar_plain20``, ``plain18`` and so on, with their depths.
    ValueError: no such network, or no such depth.
    """
    keywords = {"num_classes": num_classes, "small_input": max(size) <= SMALL_IMAGE, **keywords}
    if name == "small":
        return family.ResNet(family.Bottleneck, SMALL_LAYERS, **keywords)
    if name in NAMES:
        return getattr(family, name)(**keywords)
    match = _BY_DEPTH.fullmatch(name_of_network(name))
    assert match is not None
    return getattr(family, match[1])(int(match[2]), **keywords)
