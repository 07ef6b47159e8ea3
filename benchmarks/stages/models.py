"""The same comparison as the step stage's, for the rest of the family, other batches, float16, and ours compiled."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..harness import Context, Item
from .step import compare

MODELS = ((50, 32), (50, 128), (34, 256), (101, 256), (18, 32), (18, 128), (101, 128), (34, 128), (34, 32), (101, 32))
"""Depth and batch, in order of value; ResNet-50 and -18 at 256 images are the step stage's."""


def items(context: Context) -> Iterator[Item]:
    for depth, batch in MODELS:
        yield f"resnet{depth}, batch {batch}", lambda d=depth, b=batch: compare(context, d, b)
    if not context.dry:  # the rehearsal's dtype is the interpreter's anyway
        yield "resnet50, float16", lambda: compare(context, 50, dtype=torch.float16)
    yield "resnet50 compiled", lambda: compare(context, 50, compiled=True)
