"""``torch.compile(mode="max-autotune")`` beside eager: minutes of compiling, in a stage of its own that may be cut."""

from __future__ import annotations

from collections.abc import Iterator

from ..harness import Context, Item
from .baselines import compiled


def items(context: Context) -> Iterator[Item]:
    for depth in (50, 18):
        yield f"resnet{depth} max-autotune", lambda d=depth: compiled(context, d, {"mode": "max-autotune"})
