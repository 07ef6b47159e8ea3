"""The residual blocks, each one operation: torchvision's blocks and timm's by their constructors."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from .. import functional, reference
from ..families import timm, torchvision
from ..families.fused import FusedBlock
from ..families.residual import Residual, Step
from ..reference.blocks import stochastic_depth

TIMM_ONLY = {"cardinality", "reduce_first", "first_dilation", "act_layer", "attn_layer"}
TIMM_ONLY |= {"aa_layer", "drop_block", "drop_path", "device", "dtype"}
"""Keywords that select timm's meaning of the constructor."""

TORCHVISION_ONLY = {"groups"}

POSITIONS = ("inplanes", "planes", "stride", "downsample", "groups", "base_width", "dilation", "norm_layer")


def _installed(library: str, name: str) -> tuple[type[nn.Module], ...]:
    """``library``'s block of that name, where the library is installed and can be imported."""
    try:
        return (getattr(importlib.import_module(f"{library}.models.resnet"), name),)
    except (ImportError, RuntimeError, OSError, AttributeError):  # a build for another PyTorch fails in all these ways
        return ()


def _check_arguments(name: str, positional: Sequence[Any], keywords: dict[str, Any]) -> None:
    """TypeError, by the argument's name, where the meaning is torchvision's."""
    if len(positional) > len(POSITIONS):
        raise TypeError(f"{name} takes at most {len(POSITIONS)} positional arguments, got {len(positional)}")
    for argument, value in [*zip(POSITIONS, positional), *keywords.items()]:
        if argument == "downsample":
            fits = value is None or isinstance(value, nn.Module)
        elif argument == "norm_layer":
            fits = value is None or callable(value)
        else:
            pair = argument == "stride" and isinstance(value, tuple) and len(value) == 2
            fits = all(hasattr(v, "__index__") and not isinstance(v, bool) for v in (value if pair else (value,)))
        if argument in POSITIONS and not fits:
            raise TypeError(f"{name}: {argument} got {value!r}, a {type(value).__name__}")


class _Block(FusedBlock):
    """The two constructors, and which family's forward a block has: its children's names tell."""

    timm_block: tuple[type[nn.Module], ...] = ()
    timm_defaults: ClassVar[dict[str, Any]] = {}
    plain_block: type[nn.Module]

    def __init__(self, *positional: Any, recompute: Sequence[str] = (), keep: Sequence[str] = (), **keywords: Any):
        name = type(self).__name__
        of_timm, of_torchvision = TIMM_ONLY & keywords.keys(), TORCHVISION_ONLY & keywords.keys()
        if of_timm and (of_torchvision or len(positional) > POSITIONS.index("groups")):
            ours = sorted(of_torchvision) or ["a fifth positional argument, groups"]
            raise TypeError(f"{name}: {', '.join(sorted(of_timm))} is timm's and {', '.join(ours)} torchvision's")
        if of_timm:
            if not self.timm_block:
                raise TypeError(f"{name}: {', '.join(sorted(of_timm))} is timm's, which is not installed")
            _check_arguments(name, positional, {k: v for k, v in keywords.items() if k not in TIMM_ONLY})
            nn.Module.__init__(self)
            self.__dict__.update(self.timm_block[0](*positional, **{**self.timm_defaults, **keywords}).__dict__)
        else:
            _check_arguments(name, positional, keywords)
            self.plain_block.__init__(self, *positional, **keywords)
        self.recompute, self.keep = functional.memory_options(recompute, keep)

    @property
    def is_timm(self) -> bool:
        return "act1" in self._modules

    @property
    def widens(self) -> bool:  # type: ignore[override]
        return not self.is_timm

    def plain_forward(self, x: Tensor) -> Tensor:
        family = self.timm_block[0] if self.is_timm else self.plain_block
        return family.forward(self, x)  # type: ignore[no-any-return]

    def tail(self) -> tuple[Step, ...]:
        """What follows the layers before the sum, of a block with torchvision's names: random depth, where it is on."""
        probability: float = self.stochastic_depth_prob  # type: ignore[assignment]
        if not self.training or probability == 0.0:
            return ()
        return (partial(stochastic_depth, probability=probability, training=True),)


_TORCHVISION_BASIC, _TORCHVISION_BOTTLENECK = (_installed("torchvision", n) for n in ("BasicBlock", "Bottleneck"))
_TIMM_BASIC, _TIMM_BOTTLENECK = (_installed("timm", name) for name in ("BasicBlock", "Bottleneck"))


class BasicBlock(_Block, *_TORCHVISION_BASIC, *_TIMM_BASIC, reference.BasicBlock):  # type: ignore[misc]
    """Two 3x3 convolutions and a shortcut as one operation (He et al. 2015, arXiv 1512.03385, Figure 5, left).

    Constructor: torchvision's ``(inplanes, planes, stride=1, downsample=None, groups=1, base_width=64, dilation=1,
    norm_layer=None)``, or timm's where a keyword is only timm's; the children are named as that family names them.
    Where torchvision and timm are installed, it is an instance of their blocks. Input [N, inplanes, H, W], output
    [N, planes, ceil(H / stride), ceil(W / stride)]. What stands between the layers (random depth, squeeze and
    excitation, a blur) is called as it is; children that carry hooks, pruning or parametrisations and other norms than
    BatchNorm2d and SyncBatchNorm make the block run child by child. Keywords ``recompute=("y1",)`` and
    ``keep=("a1",)``, attributes too: see :func:`fused_resnet.functional.bottleneck`. TypeError: both families'
    keywords, or a wrong type, by its name.
    """

    timm_block = _TIMM_BASIC
    plain_block = reference.BasicBlock

    def residual(self) -> Residual:
        return timm.basic_block(self) if self.is_timm else torchvision.basic_block(self, *self.tail())


class Bottleneck(_Block, *_TORCHVISION_BOTTLENECK, *_TIMM_BOTTLENECK, reference.Bottleneck):  # type: ignore[misc]
    """1x1, 3x3 and 1x1 convolutions and a shortcut as one operation (He et al. 2015, 1512.03385, Figure 5, right).

    Output [N, 4 * planes, ceil(H / stride), ceil(W / stride)]; in everything else as :class:`BasicBlock`.
    """

    timm_block = _TIMM_BOTTLENECK
    plain_block = reference.Bottleneck

    def residual(self) -> Residual:
        return timm.bottleneck(self) if self.is_timm else torchvision.bottleneck(self, *self.tail())


class _SEBlock(_Block):
    """A squeeze and excitation, ``se``, behind the layers; with timm's names the family calls it itself."""

    timm_defaults: ClassVar[dict[str, Any]] = {"attn_layer": "se"}

    def tail(self) -> tuple[Step, ...]:
        return (self.se, *super().tail())  # type: ignore[arg-type, return-value]


class SEBasicBlock(_SEBlock, BasicBlock, reference.SEBasicBlock):  # type: ignore[misc]
    """A :class:`BasicBlock` with squeeze and excitation (Hu et al. 2017, arXiv 1709.01507): one operation, then ``se``.

    Keyword ``reduction=16`` of torchvision's constructor; with timm's, ``attn_layer`` is "se" unless given.
    """

    plain_block = reference.SEBasicBlock


class SEBottleneck(_SEBlock, Bottleneck, reference.SEBottleneck):  # type: ignore[misc]
    """A :class:`Bottleneck` with squeeze and excitation; in everything else as :class:`SEBasicBlock`."""

    plain_block = reference.SEBottleneck
