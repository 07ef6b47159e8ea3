"""``patch``: torchvision's and timm's builders make fused blocks, for as long as it lasts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..modules import blocks

LIBRARIES = ("torchvision", "timm")


@contextmanager
def patch() -> Iterator[None]:
    """Under it, torchvision's and timm's builders make :class:`fused_resnet.Bottleneck` and ``BasicBlock``.

    Every module of the two libraries that imported the blocks, under a name or in a table of its own, has them
    replaced, process-wide, and put back on leaving. What was built stays fused. Blocks that a library derived from its
    own keep their class.
    """
    replaced: list[tuple[dict[Any, Any], Any, type]] = []
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
            tables = [vars(module), *(value for value in vars(module).values() if type(value) is dict)]
            for table in tables:
                for key, value in list(table.items()):
                    fused = ours.get(value) if isinstance(value, type) else None
                    if fused is not None:
                        replaced.append((table, key, value))
                        table[key] = fused
        yield
    finally:
        for table, key, value in reversed(replaced):
            table[key] = value
