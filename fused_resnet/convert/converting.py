"""``convert`` and ``revert``: the class of every block that can be fused, changed in place and changed back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from .. import functional
from ..explain import explain, inputs_of, require_module
from ..families import huggingface, structural, timm, torchvision
from ..families.children import Obstacle
from ..families.fused import Fused, FusedBlock, fused_class, original_class
from ..plan import store
from .report import Report

MIXINS: dict[str, type[Fused]] = {**torchvision.MIXINS, **timm.MIXINS, **huggingface.MIXINS}
"""What a class of a known family becomes, by its qualified name: no library is imported to know its classes."""


def convert(
    model: nn.Module,
    *,
    example_input: Tensor | Sequence[Tensor] | None = None,
    recompute: Sequence[str] = (),
    keep: Sequence[str] = (),
) -> Report:
    """Makes the residual blocks and stems of ``model`` fused, in place; says which, and why not the others.

    torchvision's, timm's and Hugging Face's ResNets are known by their classes, detectron2's, mmdetection's and others
    by their structure, which is then proven on numbers. Only the class of a module changes: parameters, buffers, hooks,
    optimizer state and pickling stay valid, the family's ``isinstance`` holds, and :func:`revert` undoes it. Subclasses
    of a known block, blocks used in several places, those that FSDP has wrapped and our own are kept as they are. What
    a block gives has the dtype of its convolutions, autocast's too; eager's FrozenBatchNorm2d widens that to float32.
    With an ``example_input`` the report says what would run for it, as :func:`fused_resnet.explain` does. ``recompute``
    and ``keep`` become attributes of the blocks: see :func:`fused_resnet.functional.bottleneck`. TypeError: a scripted
    model. ValueError: unknown options.
    """
    memory = functional.memory_options(recompute, keep)
    refuse_scripted(model, "convert")
    example = None if example_input is None else inputs_of(example_input)
    store.load()  # what was measured on this machine; later something may trace
    report = Report()
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for name, module, parent in _with_parents(model):
        mixin = mixin_of(module, parent, places[id(module)])
        part = mixin if isinstance(mixin, Obstacle) or mixin is None else _fuse(module, mixin)
        if part is None:
            if isinstance(module, FusedBlock):
                report.kept.append((name, "it is fused already"))
            continue
        if isinstance(part, Obstacle) and not isinstance(module, Fused):
            report.kept.append((name, part.reason))
            continue
        if isinstance(module, FusedBlock):
            vars(module).update({option: names for option, names in memory._asdict().items() if names})
        report.converted.append((name, part.reason if isinstance(part, Obstacle) else part))
        if not isinstance(part, Obstacle):
            report.fused_now.append((name, part))
    if example is not None:
        report.fused_now[:] = _fused_for(model, example, report)
    return report


def revert(model: nn.Module) -> Report:
    """Undoes :func:`convert` wherever a class is still the one it gave; every edit made since stays.

    ``Report.converted`` are the modules restored, ``Report.kept`` those whose class something else has changed since.
    """
    require_module(model, "revert")
    report = Report()
    for name, module in model.named_modules():
        original = original_class(type(module))
        if original is not None:
            _restore(module, original)
            report.converted.append((name, f"{original.__module__}.{original.__qualname__} again"))
        elif isinstance(module, Fused) and any(original_class(base) for base in type(module).__mro__):
            report.kept.append((name, f"its class was changed to {type(module).__name__} since"))
    return report


def refuse_scripted(model: nn.Module, verb: str) -> None:
    """TypeError where a module of ``model`` is TorchScript's, whose class says nothing. ``verb``: what was asked."""
    require_module(model, verb)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError(f"a scripted model cannot be {verb}ed; {verb} the model that it was made from")


def _with_parents(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module | None]]:
    parents: dict[int, nn.Module] = {id(child): module for module in model.modules() for child in module.children()}
    return [(name, module, parents.get(id(module))) for name, module in model.named_modules()]


def _fuse(module: nn.Module, mixin: type[Fused]) -> str | Obstacle:
    """Changes the class of ``module``, unless what stands against it will last; says what of it is fused."""
    kind = type(module)
    changed = not isinstance(module, Fused)
    if changed:
        if mixin is structural.StructuralBlock:
            vars(module)["proven"] = structural.settings(module)
        module.__class__ = fused_class(mixin, kind)
    part: str | Obstacle = module.fused_part()  # type: ignore[operator]
    if changed and isinstance(part, Obstacle) and not part.passing:
        _restore(module, kind)
    return part


def _restore(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind
    for name in (*functional.MemoryOptions._fields, "proven"):
        vars(module).pop(name, None)


def _fused_for(model: nn.Module, example: Sequence[Tensor], report: Report) -> list[tuple[str, str]]:
    """Of the converted modules those that run kernels for ``example``, with the planner's reasons."""
    first = example[0]
    autocast = torch.get_autocast_dtype(first.device.type) if torch.is_autocast_enabled(first.device.type) else None
    rows = explain(model, example_input=example, dtype=autocast or first.dtype).rows
    found = {row.name: f"{row.route}: {row.reason}" for row in rows if row.source == "fused"}
    return [(name, found[name or "(model)"]) for name, _ in report.converted if (name or "(model)") in found]


def mixin_of(module: nn.Module, parent: nn.Module | None = None, places: int = 1) -> type[Fused] | Obstacle | None:
    """What makes ``module`` fused, why it is kept, or None for what is no residual block or is fused anyhow."""
    kind = type(module)
    if isinstance(module, Fused):
        return next((base.__bases__[0] for base in kind.__mro__ if original_class(base) is not None), None)
    known = MIXINS.get(_qualified(kind))
    ancestor = next((base for base in kind.__mro__[1:] if _qualified(base) in MIXINS), None)
    if known is None and ancestor is None and not structural.is_candidate(module):
        return None
    if isinstance(module, FSDPModule) or isinstance(parent, FullyShardedDataParallel):
        return Obstacle("FSDP has wrapped it; convert before")
    if known is None and ancestor is not None:
        return Obstacle(f"{kind.__name__} is a subclass of {_qualified(ancestor)}")
    if "forward" in vars(module) or (known is not None and _is_patched(kind, known)):
        return Obstacle("its forward was replaced")
    if places > 1:
        return Obstacle("it is used in several places")
    if known is None:
        obstacle = structural.why_not(module)
        return structural.StructuralBlock if obstacle is None else obstacle
    return known


def _is_patched(kind: type[nn.Module], mixin: type[Fused]) -> bool:
    """Whether somebody gave ``kind`` another method in place of one that ``mixin`` speaks for."""
    for name in ("forward", "_forward_impl", "forward_features"):
        method = vars(kind).get(name)
        if method is None or not hasattr(mixin, name):
            continue
        home = getattr(method, "__module__", None), getattr(method, "__qualname__", None)
        if home != (kind.__module__, f"{kind.__qualname__}.{name}") or hasattr(method, "__wrapped__"):
            return True
    return False


def _qualified(kind: type[Any]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
