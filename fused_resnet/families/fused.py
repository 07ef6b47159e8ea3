"""What a class becomes when its forward is fused: a class of its own name's, whose objects still are the family's.

The class is made once, of the family's class and one of the mixins of this package; nothing in an object changes but
its class. Pickling and copying name the two, so that a checkpoint of a whole model loads wherever both can be imported.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .children import Obstacle, Unscriptable
from .residual import Residual, Step, run_residual, summary


class Fused(Unscriptable):
    """A module whose class was changed; the family's own forward runs where the fused one cannot."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = type(self)
        reduced = super().__reduce_ex__(protocol)
        if original_class(kind) is None:
            return reduced
        return _new, (kind.__bases__[0], kind.__bases__[1]), *reduced[2:]

    def fused_part(self) -> str | Obstacle:
        """What runs fused as the module stands, in words, or why nothing does."""
        raise NotImplementedError


class FusedStem(Fused):
    """A module that begins with a stem."""

    def stem(self) -> Sequence[Step] | Obstacle:
        """What the stem calls, in order."""
        raise NotImplementedError

    def fused_part(self) -> str | Obstacle:
        steps = self.stem()
        return steps if isinstance(steps, Obstacle) else summary(steps)


class FusedBlock(Fused):
    """A residual block. ``recompute`` and ``keep``, read at call time: see ``functional.bottleneck``."""

    recompute: Sequence[str] = ()
    keep: Sequence[str] = ()
    widens = False
    """Whether a shortcut of a wider dtype widens the output: see :func:`run_residual`."""

    def residual(self) -> Residual | Obstacle:
        """What this block's forward calls, or why it cannot be told."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self, FusedBlock):  # called by whoever kept the method when the class was still ours
            return type(self).forward(self, x)
        described = self.residual()
        if isinstance(described, Residual):
            out = run_residual(described, x, widens=self.widens, recompute=self.recompute, keep=self.keep)
            if isinstance(out, Tensor):
                return out
        return self.plain_forward(x)

    def plain_forward(self, x: Tensor) -> Tensor:
        """The family's own forward, child by child."""
        return super().forward(x)  # type: ignore[no-any-return]

    def fused_part(self) -> str | Obstacle:
        block = self.residual()
        return block if isinstance(block, Obstacle) else summary((*block.branch, block.activation), block.conv)


def fused_class(mixin: type[Fused], kind: type[nn.Module]) -> type[nn.Module]:
    """``kind`` with ``mixin``'s forward: the same class at every call."""
    return _make_class(mixin, kind)  # type: ignore[arg-type]


@functools.cache
def _make_class(mixin: Any, kind: Any) -> type[nn.Module]:
    return type(f"Fused{kind.__name__}", (mixin, kind), {"__doc__": kind.__doc__, "__module__": __name__})


def original_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The family's class that ``kind`` was made of by :func:`fused_class`; None for any other class."""
    bases = kind.__bases__
    if len(bases) == 2 and issubclass(bases[0], Fused) and fused_class(*bases) is kind:
        return bases[1]
    return None


def _new(mixin: type[Fused], kind: type[nn.Module]) -> nn.Module:
    made = fused_class(mixin, kind)
    return made.__new__(made)
