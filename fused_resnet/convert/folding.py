"""``fold``: a plain copy of a model for export, every BatchNorm folded into the convolution before it."""

from __future__ import annotations

import copy
import itertools
from collections import Counter

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .. import functional, reference
from ..families import torchvision
from ..families.children import Obstacle, has_activation, is_untouched, norm_reader, process_groups, why_not_norm
from ..families.fused import FusedStem
from ..families.residual import RELU, Residual, Step, calls
from ..modules import blocks, layers, resnet
from .converting import mixin_of, refuse_scripted, revert

PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    blocks.BasicBlock: reference.BasicBlock,
    blocks.Bottleneck: reference.Bottleneck,
    blocks.SEBasicBlock: reference.SEBasicBlock,
    blocks.SEBottleneck: reference.SEBottleneck,
    layers.BNAddReLU: reference.BNAddReLU,
    layers.ConvBNReLU: reference.ConvBNReLU,
    layers.Stem: reference.Stem,
    resnet.PlainBlock: reference.PlainBlock,
    resnet.PlainBottleneck: reference.PlainBottleneck,
    resnet.ResNet: reference.ResNet,
}
"""Our classes, and those that compute the same of the same children by aten operations alone."""


def fold(model: nn.Module) -> nn.Module:
    """A plain copy of ``model`` for inference and export: a convolution and the BatchNorm behind it are one with bias.

    Converted blocks are of their family's class again and our own modules of :mod:`fused_resnet.reference`'s, so that
    ``torch.export``, ``torch.jit.trace`` and exporters to ONNX see aten operations alone. Which BatchNorm (BatchNorm2d,
    FrozenBatchNorm2d, timm's BatchNormAct2d, whose activation stays) follows which convolution is known of everything
    that is fused here or that :func:`convert` would fuse; its place holds an ``nn.Identity``. What is not known, or
    carries hooks or parametrisations, or is used in several places, stays as it is, as do subclasses of our classes.

    The copy is in eval mode, its parameters require no gradient, and it shares no memory with ``model``, which may be
    in training mode (it is folded as if it were not) and is left untouched. TypeError: a scripted model.
    """
    refuse_scripted(model, "fold")
    folded = copy.deepcopy(model, process_groups(model)).eval().requires_grad_(False)
    revert(folded)
    for module in folded.modules():
        _make_plain(module)
    described = [block for block in map(_described, folded.modules()) if block is not None]
    owners = {id(child): (parent, name) for parent in folded.modules() for name, child in parent._modules.items()}
    places = Counter(id(child) for parent in folded.modules() for child in parent._modules.values())
    for block in described:
        for conv, norm in (*itertools.pairwise(calls(block.branch)), *itertools.pairwise(calls(block.shortcut))):
            if _is_pair(conv, norm, block.conv) and places[id(conv)] == places[id(norm)] == 1:
                parent, name = owners[id(norm)]
                setattr(parent, name, _fold_pair(conv, norm))  # type: ignore[arg-type]
    return folded.eval()  # the new modules, too


def _make_plain(module: nn.Module) -> None:
    plain = PLAIN.get(type(module))
    if plain is not None:
        of_timm = isinstance(module, blocks.BasicBlock | blocks.Bottleneck) and module.is_timm
        module.__class__ = module.timm_block[0] if of_timm else plain  # type: ignore[index, assignment]
        for option in functional.MemoryOptions._fields:
            vars(module).pop(option, None)


def _described(module: nn.Module) -> Residual | None:
    """The order in which ``module`` calls its children, where that is known; a stem is a branch without a shortcut."""
    kind = type(module)
    if "forward" in vars(module):
        return None
    if kind in (reference.BasicBlock, reference.SEBasicBlock):
        return torchvision.basic_block(module)
    if kind in (reference.Bottleneck, reference.SEBottleneck):
        return torchvision.bottleneck(module)
    if kind is reference.ConvBNReLU:
        return Residual((module.conv, module.bn), (), RELU)  # type: ignore[arg-type]
    if kind in (reference.ResNet, reference.Stem):
        return Residual((module.conv1, module.bn1), (), RELU)  # type: ignore[arg-type]
    mixin = mixin_of(module)
    if not isinstance(mixin, type):
        return None
    if issubclass(mixin, FusedStem):
        stem = mixin.stem(module)  # type: ignore[arg-type]
        return None if isinstance(stem, Obstacle) else Residual(tuple(stem), (), RELU)
    block = mixin.residual(module)  # type: ignore[attr-defined]
    return block if isinstance(block, Residual) else None


def _is_pair(conv: Step, norm: Step, kind: type[nn.Conv2d]) -> bool:
    """``norm`` normalises what ``conv`` gives by statistics that are known, and nobody looks in between."""
    if not isinstance(conv, nn.Conv2d) or not is_untouched(conv, kind) or why_not_norm(norm) is not None:
        return False
    return not norm_reader(norm)(norm).training  # type: ignore[arg-type, misc]


@torch.no_grad()
def _fold_pair(conv: nn.Conv2d, norm: nn.Module) -> nn.Module:
    """Folds ``norm`` into ``conv``; what remains of it."""
    bn = norm_reader(norm)(norm)  # type: ignore[misc]
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        bn.running_mean,  # type: ignore[arg-type]
        bn.running_var,  # type: ignore[arg-type]
        bn.eps,
        bn.weight,
        bn.bias,
    )
    rest = calls((norm.drop, norm.act)) if has_activation(norm) else []  # type: ignore[arg-type]
    return nn.Sequential(*rest) if rest else nn.Identity()  # type: ignore[call-overload, no-any-return]
