"""Whether a module's children may be computed together, or somebody expects each of them to be called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from torch import nn
from torch.fx import Proxy
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from ..plan import store

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
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _is_watched_globally()
    )


def may_fuse(x: object, conv: nn.Module, bn: nn.Module) -> bool:
    """``conv`` and ``bn`` are what a fused layer computes, nobody watches them, and ``x`` is data, not fx's proxy."""
    return (
        not isinstance(x, Proxy)
        and is_untouched(conv, nn.Conv2d)
        and is_untouched(bn, nn.BatchNorm2d)
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def is_stem_pool(module: nn.Module) -> bool:
    """``module`` is the 3x3 max pooling of stride 2 and padding 1 that the stem kernel computes."""
    if not (is_untouched(module, nn.MaxPool2d) and isinstance(module, nn.MaxPool2d)):
        return False
    geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
    return geometry == (3, 2, 1, 1) and not (module.ceil_mode or module.return_indices)
