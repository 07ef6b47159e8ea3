"""``patch``: torchvision's and timm's builders make fused blocks, for as long as it lasts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from ..modules import blocks

LIBRARIES = ("torchvision", "timm")


@contextmanager
def patch() -> Iterator[None]:
    """Under it, torchvision's and timm's builders make :class:`fused_resnet.Bottleneck` and ``BasicBlock``.

    Every module of the two libraries that imported the blocks' names has them replaced, process-wide, and put back on
    leaving. What was built stays fused. Blocks that a library derived from its own keep their class.
    """
    replaced: list[tuple[ModuleType, str, object]] = []
    ours = {
        original: fused
        for fused in (blocks.BasicBlock, blocks.Bottleneck)
        for original in fused.__mro__
        if original.__module__ in {f"{library}.models.resnet" for library in LIBRARIES}
    }
    try:
        for name, module in list(sys.modules.items()):
            if module is None or name.partition(".")[0] not in LIBRARIES:
                continue
            for attribute, value in list(vars(module).items()):
                fused = ours.get(value) if isinstance(value, type) else None
                if fused is not None:
                    replaced.append((module, attribute, value))
                    setattr(module, attribute, fused)
        yield
    finally:
        for module, attribute, value in reversed(replaced):
            setattr(module, attribute, value)
