"""A residual block in neutral terms, and how its layers are gathered into fused operations.

A family says what its block calls, and in which order; every convolution with the normalisation and the ReLU after it
then becomes a fused layer, layers in a row one operation, and whatever stands between them (a blur, squeeze and
excitation, random depth) is called as it is. All of it is read at call time: geometry, modes, hooks and activations may
be edited at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional
from ..calls import compute_dtype
from .children import Obstacle, has_activation, is_untouched, norm_reader, why_not_conv, why_not_norm

Step = Callable[[Tensor], Tensor]
"""A module, mostly, or another function of one feature map."""

RELU = nn.ReLU()
"""The activation of blocks that call a function in place of a child."""

LONGEST = 3
"""Layers that one operation takes."""


class Residual(NamedTuple):
    """``activation(branch(x) + shortcut(x))``: what a block's forward calls, in the order in which it does.

    Both hold modules, None for a child that is not there, and other functions; a shortcut of nothing is x itself.
    ``conv``: the exact class of the family's convolutions.
    """

    branch: tuple[Step | None, ...]
    shortcut: tuple[Step | None, ...]
    activation: Step
    conv: type[nn.Conv2d] = nn.Conv2d


class Layers(NamedTuple):
    """Convolutions with their normalisations, one operation: a ReLU after each but the last, there if ``relu``.

    ``pool``: the stem's max pooling follows.
    """

    layers: tuple[tuple[nn.Conv2d, nn.Module], ...]
    relu: bool
    pool: bool = False


def calls(steps: Iterable[Step | None]) -> list[Step]:
    """What calling ``steps`` in a row calls: containers opened, identities left away."""
    found: list[Step] = []
    for step in steps:
        if type(step) is nn.Sequential and is_untouched(step, nn.Sequential):
            found += calls(step)
        elif step is not None and not (type(step) is nn.Identity and is_untouched(step, nn.Identity)):
            found.append(step)
    return found


def gather(steps: Sequence[Step | None], conv: type[nn.Conv2d] = nn.Conv2d) -> list[Layers | Step] | Obstacle:
    """``steps`` with convolutions, the normalisations and ReLUs behind them gathered into :class:`Layers`."""
    todo = calls(steps)
    gathered: list[Layers | Step] = []
    while todo:
        first = todo.pop(0)
        if not isinstance(first, nn.Conv2d):
            gathered.append(first)
            continue
        norm = todo.pop(0) if todo else None
        obstacle = why_not_conv(first, conv) or why_not_norm(norm)
        if obstacle is not None:
            return obstacle
        if has_activation(norm):  # type: ignore[arg-type]
            todo[:0] = calls((getattr(norm, "drop", None), getattr(norm, "act", None)))
        relu = bool(todo) and _is_relu(todo[0])
        if relu:
            todo.pop(0)
        before = gathered[-1] if gathered else None
        if isinstance(before, Layers) and before.relu and not before.pool and len(before.layers) < LONGEST:
            gathered[-1] = Layers((*before.layers, (first, norm)), relu)  # type: ignore[arg-type]
        elif relu and todo and _is_stem(first, todo[0]):
            gathered.append(Layers(((first, norm),), relu, pool=True))  # type: ignore[arg-type]
            todo.pop(0)
        else:
            gathered.append(Layers(((first, norm),), relu))  # type: ignore[arg-type]
    return gathered


def gather_for(
    x: object, steps: Sequence[Step | None] | Obstacle, conv: type[nn.Conv2d] = nn.Conv2d
) -> list[Layers | Step] | Obstacle:
    """What :func:`gather` makes of ``steps`` for the data ``x``; a proxy of fx is none: its tracer wants the calls."""
    if isinstance(x, Proxy):
        return Obstacle("traced by fx")
    return steps if isinstance(steps, Obstacle) else gather(steps, conv)


def run(gathered: Sequence[Layers | Step], x: Tensor) -> Tensor:
    """Calls what :func:`gather` made of some steps, one after the other."""
    for step in gathered:
        if not isinstance(step, Layers):
            x = step(x)
        elif step.pool:
            conv, bn = _record(step.layers[0])
            x = functional.stem(x, conv.weight, bn, stride=conv.stride, padding=conv.padding)
        else:
            x = functional.conv_bn_chain(x, _records(step), relu=step.relu)
    return x


def run_residual(block: Residual, x: Tensor, *, widens: bool = False, **options: Any) -> Tensor | Obstacle:
    """The block's output, or why its own forward has to run. ``options``: those of ``functional.conv_bn_chain``.

    The output has the branch's dtype, as that of the families, which add in place; ``widens``: it has the sum's.
    """
    branch = gather_for(x, block.branch, block.conv)
    if isinstance(branch, Obstacle):
        return branch
    last = branch[-1] if branch else None
    shortcut = gather(block.shortcut, block.conv)
    if not isinstance(last, Layers) or last.relu or not _is_relu(block.activation):  # something follows the layers
        out = run(branch, x)
        added = out + _shortcut(block, shortcut, x)
        return block.activation(added if widens else added.to(out.dtype))
    whole = len(branch) == 1
    inner = run(branch[:-1], x)  # before the shortcut, as the families do: both may draw random numbers
    projection = _projection(shortcut) if whole else None
    if whole and not shortcut:
        options["identity"] = True
    elif projection is None:
        options["residual"] = _shortcut(block, shortcut, x)
    out = functional.conv_bn_chain(inner, _records(last), projection, **options)
    return out if widens else out.to(compute_dtype(inner))


def summary(steps: Sequence[Step | None], conv: type[nn.Conv2d] = nn.Conv2d) -> str | Obstacle:
    """What of ``steps`` is fused, in words, or why nothing is."""
    gathered = gather(steps, conv)
    if isinstance(gathered, Obstacle):
        return gathered
    if not any(isinstance(step, Layers) for step in gathered):
        return Obstacle("no convolution of it is a plain one")
    others = [type(step).__name__ for step in gathered if not isinstance(step, Layers)]
    return f"fused around {', '.join(others)}" if others else "one operation"


def _shortcut(block: Residual, gathered: list[Layers | Step] | Obstacle, x: Tensor) -> Tensor:
    if not isinstance(gathered, Obstacle):
        return run(gathered, x)
    for step in block.shortcut:
        x = x if step is None else step(x)
    return x


def _projection(gathered: list[Layers | Step] | Obstacle) -> functional.Layer | None:
    """The shortcut as a layer of the block's own operation: a 1x1 convolution with its normalisation."""
    if isinstance(gathered, Obstacle) or len(gathered) != 1 or not isinstance(gathered[0], Layers):
        return None
    layers, relu, _ = gathered[0]
    conv = layers[0][0]
    plain = (conv.kernel_size, conv.padding, conv.groups) == ((1, 1), (0, 0), 1)
    return _record(layers[0]) if plain and len(layers) == 1 and not relu else None


def _is_relu(step: object) -> bool:
    return isinstance(step, nn.ReLU) and is_untouched(step, nn.ReLU)


def _is_stem(conv: nn.Conv2d, pool: object) -> bool:
    """``pool`` is the 3x3 max pooling of stride 2 and padding 1 that the stem kernel computes behind ``conv``."""
    if not (isinstance(pool, nn.MaxPool2d) and is_untouched(pool, nn.MaxPool2d)):
        return False
    geometry = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    fits = geometry == (3, 2, 1, 1) and not (pool.ceil_mode or pool.return_indices)
    return fits and (conv.dilation, conv.groups) == ((1, 1), 1)


def _record(layer: tuple[nn.Conv2d, nn.Module]) -> functional.Layer:
    conv, norm = layer
    return functional.plain_conv_of(conv), norm_reader(norm)(norm)  # type: ignore[misc]


def _records(layers: Layers) -> list[functional.Layer]:
    return [_record(layer) for layer in layers.layers]
