"""Whether a module's children may be computed together, or somebody expects each of them to be called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.nn.utils.parametrize import is_parametrized

from ..arguments import member
from ..functional import BatchNorm, batch_norm_of
from ..plan import store


class Obstacle(NamedTuple):
    """Why layers have to be called one by one. ``passing``: whoever caused it may take it away again."""

    reason: str
    passing: bool = False


ReadNorm = Callable[[nn.Module], BatchNorm]
VECTORS = BatchNorm._fields[:4]


Hook = TypeVar("Hook", bound=Callable[..., Any])


class Unscriptable(nn.Module):
    """A module that TorchScript cannot compile, and that says so itself rather than by whatever it stumbles over.

    Making one, copies and unpickled ones too, reads what was measured on this machine: later something may trace.
    """

    def __new__(cls, *_arguments: Any, **_keywords: Any) -> Any:
        store.load()
        return super().__new__(cls)

    def __prepare_scriptable__(self) -> NoReturn:  # asked by torch.jit.script, of every module below as well
        raise RuntimeError(
            f"{type(self).__name__} runs Triton kernels, which TorchScript cannot hold: take torch.compile or "
            "torch.export, or script the same network of fused_resnet.reference, which takes the same state dict"
        )


def children(module: nn.Module, *names: str) -> list[Any]:
    """Attributes of ``module`` that are mostly modules."""
    return [member(module, module._modules, name) for name in names]


def passive(hook: Hook) -> Hook:
    """Marks a global hook that need not be called for the children of a fused block."""
    hook.is_passive = True  # type: ignore[attr-defined]
    return hook


def _is_watched_globally() -> bool:
    """Whether somebody registered a hook for every module there is (``register_module_forward_hook`` and others)."""
    if not (_global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks):
        return False
    kinds = (_global_forward_hooks, _global_forward_pre_hooks, _global_backward_hooks, _global_backward_pre_hooks)
    return any(not getattr(hook, "is_passive", False) for kind in kinds for hook in kind.values())


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """``module`` is exactly a ``kind`` and calling it runs nothing but its class's forward.

    Hooks (pruning is one), a parametrisation or sharding (they change the class) and a forward replaced on the instance
    all expect the call itself; a subclass may compute something else.
    """
    own = module.__dict__
    return type(module) is kind and not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or _is_watched_globally()
    )


def why_not_conv(conv: nn.Module, kind: type[nn.Conv2d] = nn.Conv2d) -> Obstacle | None:
    """Why ``conv`` is not what a fused layer computes. ``kind``: the exact class its family uses."""
    if type(conv) is not kind:
        return Obstacle(f"{_name(conv)} is not {kind.__name__}", passing=is_parametrized(conv))
    if not is_untouched(conv, kind):
        return Obstacle(f"{_name(conv)} carries hooks or another forward", passing=True)
    if member(conv, conv._parameters, "bias") is not None:
        return Obstacle("a convolution has a bias")
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return Obstacle("a convolution pads otherwise than by a number of zeros")
    if not (_is_pair(conv.stride) and _is_pair(conv.padding) and _is_pair(conv.dilation)):
        return Obstacle("a convolution's stride, padding or dilation was set to something else than two numbers")
    return None


def _is_pair(value: object) -> bool:
    """As the constructor makes it; PyTorch's function takes one number and lists, too."""
    return isinstance(value, tuple) and len(value) == 2


def why_not_norm(norm: object) -> Obstacle | None:
    """Why ``norm`` is not the batch normalisation of a fused layer."""
    if not isinstance(norm, nn.Module):
        return Obstacle("a convolution without a normalisation behind it")
    if norm_reader(norm) is None:
        return Obstacle(f"{_name(norm)} is no normalisation that is fused", passing=is_parametrized(norm))
    if not is_untouched(norm, type(norm)):
        return Obstacle(f"{_name(norm)} carries hooks or another forward", passing=True)
    return None


def norm_reader(norm: nn.Module) -> ReadNorm | None:
    """What reads ``norm`` as a record; None for a kind of normalisation that is not fused."""
    kind = type(norm)
    if kind in (nn.BatchNorm2d, nn.SyncBatchNorm) or has_activation(norm):
        return batch_norm_of  # type: ignore[return-value]
    # torchvision's and detectron2's, and transformers' DetrFrozenBatchNorm2d and its kin: four buffers and an eps
    if kind.__name__.endswith("FrozenBatchNorm2d") and {*VECTORS} <= norm._buffers.keys():
        return _frozen if isinstance(_frozen_eps(norm), float) else None
    return None


def _frozen_eps(norm: nn.Module) -> object:
    """The eps of a frozen norm; those of transformers hold none: it stands in their forward."""
    return 1e-5 if type(norm).__module__.startswith("transformers.") else getattr(norm, "eps", None)


def has_activation(norm: nn.Module) -> bool:
    """Whether ``norm`` is one of timm's BatchNorms that go on to their children ``drop`` and ``act``."""
    kind = type(norm)
    return kind.__name__ in ("BatchNormAct2d", "SyncBatchNormAct") and kind.__module__.startswith("timm.")


def process_groups(module: nn.Module) -> dict[int, Any]:
    """A memo for ``copy.deepcopy``: norms share the groups of processes that they ask, since no copy can be made."""
    groups = [getattr(norm, "process_group", None) for norm in module.modules()]
    return {id(group): group for group in groups if group is not None}


TINY = torch.finfo(torch.float32).tiny
"""In place of an eps of 0, which torchvision gives its pretrained detectors: no variance is changed by adding it."""


def _frozen(norm: nn.Module) -> BatchNorm:
    weight, bias, mean, var = (norm._buffers[name] for name in VECTORS)
    return BatchNorm(weight, bias, mean, var, eps=_frozen_eps(norm) or TINY, training=False)  # type: ignore[arg-type]


def _name(module: nn.Module) -> str:
    return type(module).__name__
