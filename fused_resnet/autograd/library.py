"""How this package defines its operators, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import profiler as _profiler

from ..launch.replay import replaying

_library = torch.library.Library("fused_resnet", "DEF")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines ``fused_resnet::<name>`` and returns what calls it.

    ``run`` serves CPU and CUDA tensors alike (the kernels run in the interpreter on the former); ``fake`` gives shapes,
    dtypes and strides alone. Where nobody looks at operators (no compiler, no dispatch mode, no profiler, no subclass
    of tensors), PyTorch's dispatcher is passed by: with tens of arguments it costs the host as much as some launches.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.needs_exact_strides,))
    replayed = replaying(run)
    for key in ("CPU", "CUDA"):
        _library.impl(name, replayed, key)
    torch.library.register_fake(f"fused_resnet::{name}", fake, lib=_library)
    operator = getattr(torch.ops.fused_resnet, name).default

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _profiler._is_profiler_enabled or torch._C._len_torch_dispatch_stack():
            return operator(*arguments)
        return replayed(*arguments, otherwise=operator)

    return call


class _Once(torch.autograd.Function):
    """Runs an operator whose own gradient does not exist, and says so if it is asked for."""

    @staticmethod
    def forward(ctx: Any, operator: Callable[..., Any], arguments: tuple[Any, ...], *_tensors: Any) -> Any:
        return operator(*arguments)

    @staticmethod
    def backward(ctx: Any, *_grads: Any) -> Any:
        raise RuntimeError(
            "fused_resnet's operations have first derivatives only; take the plain path for second ones: "
            "with fused_resnet.use_route('reference')"
        )


def refuse_second_derivative(operator: Callable[..., Any], *arguments: Any) -> Any:
    """The operator's result, through which a second derivative raises instead of being silently wrong."""
    if torch.compiler.is_compiling():
        return operator(*arguments)
    try:
        if not torch.is_grad_enabled():
            return operator(*arguments)
        return _Once.apply(operator, arguments, *_tensors(arguments))
    except RuntimeError as error:
        if any(torch._C._functorch.is_legacy_batchedtensor(t) for t in _tensors(arguments)):
            raise RuntimeError(
                "fused_resnet's operations take one gradient at a time; take the plain path for batches of them "
                "(is_grads_batched, vectorize): with fused_resnet.use_route('reference')"
            ) from error
        raise


def _tensors(arguments: Sequence[Any]) -> list[torch.Tensor]:
    return [argument for argument in arguments if isinstance(argument, torch.Tensor)]
