"""Whether a module's children may be computed together, or somebody expects each of them to be called."""

from __future__ import annotations

from torch import nn
from torch.fx import Proxy


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
