"""How this package defines its operators, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("fused_resnet", "DEF")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines ``fused_resnet::<name>`` and returns the operator.

    ``run`` serves CPU and CUDA tensors alike (the kernels run in the interpreter on the former); ``fake`` gives shapes,
    dtypes and strides alone.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.needs_exact_strides,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"fused_resnet::{name}", fake, lib=_library)
    return getattr(torch.ops.fused_resnet, name).default  # type: ignore[no-any-return]


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
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return operator(*arguments)
    tensors = [t for argument in arguments for t in (argument if isinstance(argument, (list, tuple)) else [argument])]
    return _Once.apply(operator, arguments, *(t for t in tensors if isinstance(t, torch.Tensor)))
