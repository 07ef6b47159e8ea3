"""Dependent launches: a kernel is started while the one before it is still at work, and waits for its results itself.

What starting costs is then hidden, and the last programs of one kernel leave room that the first of the next take up.
It takes compute capability 9.0 (NVIDIA's programmatic dependent launch). Off unless asked for: nobody has timed it yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..plan.target import current

LEAST_SM = 90


class _Switch:
    """Of the process, because backward runs in threads of its own."""

    is_on = False


_switch = _Switch()


@contextmanager
def dependent_launches(wanted: bool = True) -> Iterator[None]:
    """What is launched inside, by whichever thread, depends on what was launched before; captured graphs keep that."""
    before, _switch.is_on = _switch.is_on, wanted
    try:
        yield
    finally:
        _switch.is_on = before


def is_on() -> bool:
    """Whether launches are asked to be dependent."""
    return _switch.is_on


def is_known_to(kernel: Any) -> bool:
    """Whether ``kernel`` can be told that its launch is a dependent one, and then waits: none else may be."""
    return "DEPENDENT" in kernel.arg_names


def is_wanted(device: torch.device) -> bool:
    """Whether launches on ``device`` are to be dependent ones."""
    if not _switch.is_on:
        return False
    target = current(device)
    return target is not None and target.sm >= LEAST_SM
