"""Residual blocks of any origin, by the names of their children; :func:`why_not` proves on numbers what they compute.

detectron2's blocks own a normalisation in every convolution; mmdetection's and most home-made ones are built as
torchvision's. None of the libraries is imported. The names only propose what a block calls: the proposal's outputs,
gradients and running statistics have to agree with those of the block's own forward, in training and in evaluation.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..plan.route import use_route
from .children import Obstacle, process_groups
from .fused import FusedBlock, fused_class
from .residual import RELU, Residual, Step, gather

NORMS = ("bn{}", "norm{}")
ACTIVATIONS = ("relu{}", "act{}", "relu", "act", "activation")
SHORTCUTS = ("downsample", "shortcut")
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
GEOMETRY = {*nn.Conv2d.__constants__, "transposed"}
IMAGES = {True: (2, 13, 14), False: (1, 14, 34)}
"""Batch, height and width of the trials in training and in evaluation: odd and even, small and wide."""
PLAIN = (bool, int, float, str, tuple, type(None), FunctionType, BuiltinFunctionType)
"""What a flag or a factor of a block is."""
TOLERANCE = 1e-9
"""Of float64 results that only differ in the order of their sums."""


class StructuralBlock(FusedBlock):
    """``conv1`` to ``conv2`` or ``conv3``, each with a normalisation, an optional activation and a shortcut.

    The attribute ``proven`` are the :func:`settings` for which its forward was tried.
    """

    def residual(self) -> Residual | Obstacle:
        for name, value in getattr(self, "proven", ()):
            if _read(self, name) != value:
                return Obstacle(f"its {name} is another than when it was converted", passing=True)
        children: dict[str, Any] = self._modules
        explained = set()

        def child(names: tuple[str, ...], i: int = 0) -> Any:
            for name in (name.format(i) for name in names):
                if name in children:
                    explained.add(name)
                    return children[name]
            return None

        count = 3 if children.get("conv3") is not None else 2
        branch: list[Step | None] = []
        for i in range(1, count + 1):
            conv = child(("conv{}",), i)
            if others := _unexplained(conv):
                return Obstacle(f"its conv{i} has {others} besides a normalisation", passing=True)
            owned = conv._modules.get("norm")
            branch += [conv, owned if owned is not None else child(NORMS, i)]
            activation = child(ACTIVATIONS, i)
            activation = RELU if activation is None else activation  # an empty Sequential is false
            if i < count:
                branch.append(activation)
        shortcut = child(SHORTCUTS)
        steps: tuple[Step | None, ...] = (shortcut,)
        if isinstance(shortcut, nn.Conv2d):
            if others := _unexplained(shortcut):
                return Obstacle(f"its shortcut has {others} besides a normalisation", passing=True)
            steps = (shortcut, shortcut._modules.get("norm"))
            obstacle = gather(steps, type(shortcut))
            if isinstance(obstacle, Obstacle):
                return obstacle
        unknown = [name for name, module in children.items() if name not in explained and module is not None]
        if unknown:
            return Obstacle(f"its structure does not tell what {', '.join(unknown)} does")
        return Residual(tuple(branch), steps, activation, type(children["conv1"]))

    def forward(self, *image: Tensor, **named: Tensor) -> Tensor:  # by the name that the block's own forward gives it
        return FusedBlock.forward(self, *image, *named.values())


def _unexplained(conv: nn.Module) -> str:
    """The children that ``conv`` has besides the normalisation it may own: an activation, for one."""
    return ", ".join(name for name, child in conv._modules.items() if name != "norm" and child is not None)


def is_candidate(module: nn.Module) -> bool:
    """``module`` looks like a residual block: the names of a ResNet's, or convolutions beside a place for a shortcut.

    What holds such blocks, or one part with convolutions beside that place, is a stage.
    """
    if _has_names(module):
        return True
    places = [{**vars(module), **module._modules}.get(name, False) for name in SHORTCUTS]
    if not any(p is None or isinstance(p, nn.Module) for p in places):
        return False
    parts = _parts(module).values()
    return len(parts) > 1 and not any(is_candidate(inner) for part in parts for inner in part.modules())


def _has_names(module: nn.Module) -> bool:
    return all(isinstance(module._modules.get(name), nn.Conv2d) for name in ("conv1", "conv2"))


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    """The children, the shortcut left away, that are or hold convolutions."""
    children = {name: child for name, child in module.named_children() if name not in SHORTCUTS}
    return {name: child for name, child in children.items() if any(isinstance(m, CONVS) for m in child.modules())}


def _strange_part(block: nn.Module) -> Obstacle | None:
    """What of ``block`` is no convolution that a ResNet's block has."""
    if _has_names(block):
        return None
    for name, part in _parts(block).items():
        if not isinstance(part, nn.Conv2d):
            return Obstacle(f"its {name} is a {type(part).__name__} and no plain convolution")
    return Obstacle("its convolutions are not named conv1, conv2")


def settings(block: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The plain attributes of ``block`` and of its class: what else its forward may read.

    Those of convolutions with a forward of their own, too, their geometry left away: dotted names.
    """
    found = _settings(block)
    for name, conv in block._modules.items():
        if isinstance(conv, nn.Conv2d) and type(conv) is not nn.Conv2d:
            own = {"activation": None} | _settings(conv)
            found |= {f"{name}.{key}": value for key, value in own.items() if key not in GEOMETRY}
    return tuple(found.items())


def _settings(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in reversed(type(module).__mro__):
        if not issubclass(nn.Module, kind):
            found |= {name: value for name, value in vars(kind).items() if not callable(value)}
    found |= vars(module)
    state = vars(nn.Module()).keys()
    names = [name for name in found if name not in state and not name.startswith("__")]
    return {name: found[name] for name in names if _is_plain(found[name])}


def _read(module: nn.Module, name: str) -> Any:
    """The attribute of that name, dotted for a child's; None where it is not."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _is_plain(value: object) -> bool:
    return isinstance(value, PLAIN) and (not isinstance(value, tuple) or all(map(_is_plain, value)))


def why_not(block: nn.Module) -> Obstacle | None:
    """Why ``block`` may not be taken for a residual block of its children, tried on small random images."""
    try:
        with torch.inference_mode(False), torch.device("cpu"):
            return _why_not(block)
    except Exception as error:  # whatever a foreign forward raises is why it cannot be told what it computes
        return Obstacle(f"it could not be tried: {error or type(error).__name__}")


def _why_not(block: nn.Module) -> Obstacle | None:
    strange = _strange_part(block)
    if strange is not None:
        return strange
    described = StructuralBlock.residual(block)  # type: ignore[arg-type]
    if isinstance(described, Obstacle):
        return described
    if len(inspect.signature(type(block).forward).parameters) != 2:
        return Obstacle("its forward takes more than one argument")
    gathered = gather(described.branch, described.conv)
    if isinstance(gathered, Obstacle):
        return gathered
    if any(t.is_meta for t in (*block.parameters(), *block.buffers())):
        return Obstacle("on the meta device nothing can be tried; convert it when it has its weights")
    for training in (True, False):
        theirs, ours = (_copy(block).train(training) for _ in range(2))
        ours.__class__ = fused_class(StructuralBlock, type(block))
        before = _state(theirs)
        expected, saved = _results(theirs)
        if saved.isdisjoint(t.data_ptr() for t in _of_branch(theirs)):
            return Obstacle("it checkpoints its activations itself")
        for mine, other in zip(_results(ours)[0], expected, strict=True):
            if not torch.allclose(mine, other, rtol=TOLERANCE, atol=TOLERANCE):
                return Obstacle("its forward is not that of a residual block of its children")
        if changed := _changed(before, _state(theirs)):
            return Obstacle(f"its forward changes its {changed}")
    return None


def _of_branch(block: nn.Module) -> Iterator[Tensor]:
    described = StructuralBlock.residual(block)  # type: ignore[arg-type]
    assert isinstance(described, Residual)
    for step in described.branch:
        if isinstance(step, nn.Module):
            yield from (*step.parameters(), *step.buffers())


def _state(block: nn.Module) -> dict[str, Any]:
    """What the modules of ``block`` hold besides parameters, buffers and modules; of containers how much."""
    usual, found = vars(nn.Module()).keys(), {}
    for path, module in block.named_modules():
        for name, value in vars(module).items():
            if name not in usual:
                size = len(value) if isinstance(value, (list, dict, set)) else None
                found[f"{path}.{name}".lstrip(".")] = value, size
    return found


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The names of what is another."""
    names = []
    for name in {**before, **after}:
        (old, old_size), (new, new_size) = before.get(name, (_state, 0)), after.get(name, (_state, 0))
        if old_size != new_size or (old is not new and not (_is_plain(old) and _is_plain(new) and old == new)):
            names.append(name)
    return ", ".join(names)


def _copy(block: nn.Module) -> nn.Module:
    """``block`` in float64 on the CPU, its values to be filled in; without hooks, which are somebody else's.

    What other processes would be asked for is normalised alone.
    """
    memo = process_groups(block)
    for module in block.modules():
        hooks = (value for name, value in vars(module).items() if name.endswith("_hooks"))
        memo |= {id(value): OrderedDict() for value in hooks if isinstance(value, OrderedDict)}
    for t in (*block.parameters(), *block.buffers()):
        dtype = torch.float64 if t.is_floating_point() else t.dtype
        made = torch.zeros(t.shape, dtype=dtype, device="cpu")
        memo[id(t)] = nn.Parameter(made) if isinstance(t, nn.Parameter) else made
    copied = copy.deepcopy(block, memo)
    for module in copied.modules():
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    return copied


def _results(block: nn.Module) -> tuple[list[Tensor], set[int]]:
    """Output, gradients and buffers of ``block`` on an image and with parameters that are the same at every call.

    And where what its forward saved in plain sight lies: what is checkpointed is not among it.
    """
    random = torch.Generator().manual_seed(0)
    for t in (*block.parameters(), *block.buffers()):
        if t.is_floating_point():  # away from zero, so that no branch hides
            t.data.copy_(torch.rand(t.shape, generator=random, dtype=t.dtype) + 0.5)
    for t in block.parameters():
        t.requires_grad_()
        if t.dim() > 1:
            t.data.copy_(torch.randn(t.shape, generator=random, dtype=t.dtype) / t[0].numel() ** 0.5)
    saved: set[int] = set()

    def seen(t: Tensor) -> Tensor:
        saved.add(t.data_ptr())
        return t

    conv: Any = block.conv1
    batch, height, width = IMAGES[block.training]
    shape = batch, conv.in_channels, height, width
    image = 8 * torch.randn(shape, generator=random, dtype=torch.float64)  # wide enough to meet a bound, as ReLU6's
    image.requires_grad_()
    with torch.random.fork_rng(devices=()), torch.enable_grad(), use_route("reference"):
        torch.default_generator.manual_seed(0)  # of the CPU alone: manual_seed would seed every GPU, too
        with saved_tensors_hooks(seen, lambda t: t):
            out = block(image)
        if not isinstance(out, Tensor):
            raise TypeError("it returns no tensor")
        out.backward(torch.randn(out.shape, generator=random, dtype=out.dtype))
    gradients = [image.grad, *(t.grad for t in block.parameters())]
    found = [out.detach(), *(torch.zeros(()) if t is None else t for t in gradients), *block.buffers()]
    return found, saved
