"""What every operation asks of a call before it runs: dtypes, sizes, who needs a gradient, and the route."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from operator import index
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import has_static_value

from . import plain
from .arguments import BatchNorm, Conv, Layer, Pair, check_tensor, is_autocast
from .autograd import absent, chain
from .plan.passes import CUMULATIVE
from .plan.route import RouteRequest, RouteUnavailableError, check_route, requested


def pair(name: str, value: int | Pair) -> Pair:
    pair: Any = (value, value) if hasattr(value, "__index__") else value
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(hasattr(v, "__index__") for v in pair)):
        raise TypeError(f"{name} must be an int or two of them, got {value!r}")
    first, second = pair
    return index(first), index(second)


def size_of(x: Tensor, request: RouteRequest) -> tuple[int, int, int, int]:
    """The shape as plain numbers: plans belong to a size, so a compiler that traces this specialises on it.

    The reference route has no plan, and its sizes stay symbols to such a compiler.
    """
    if request.route == "reference":
        return 0, 0, 0, 0
    n, c, h, w = x.shape
    return index(n), index(c), index(h), index(w)


def geometry_of(conv: Conv) -> tuple[int, int, int, Pair, Pair, Pair, int]:
    co, _, r, s = conv.weight.shape
    return int(co), int(r), int(s), conv.stride, conv.padding, conv.dilation, conv.groups


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a convolution of ``x`` runs in: autocast's, where it is on."""
    check_tensor(x)
    if is_autocast(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def widens(residual: Tensor | None, dtype: torch.dtype) -> TypeGuard[Tensor]:
    """Whether the sum of data of ``dtype`` and ``residual`` is wider than the data."""
    return residual is not None and residual.dtype != dtype and torch.promote_types(dtype, residual.dtype) != dtype


def add_wider(out: Tensor, residual: Tensor, relu: bool) -> Tensor:
    """What the kernels, which write data of one dtype, leave to do for a residual that is wider."""
    out = out + residual
    return out.relu() if relu else out


def parameters_of(*layers: Layer) -> list[Tensor | None]:
    return [t for conv, bn in layers for t in (conv.weight, bn.weight, bn.bias)]


def needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def bn_tensors(bn: BatchNorm) -> tuple[Tensor | None, ...]:
    counter = bn.num_batches_tracked if bn.training else None
    weight, bias = bn.weight, bn.bias
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    return weight, bias, bn.running_mean, bn.running_var, counter


_NOTHING = (None,) * len(chain.FIELDS)
"""The tensors of a layer that is not there."""


def slots_of(layers: Sequence[Layer], projection: Layer | None) -> list[Tensor | None]:
    """The tensors of a chain in the places where its operator takes them."""
    slots: list[Tensor | None] = []
    for conv, bn in layers:
        slots += (conv.weight, *bn_tensors(bn))
    slots += _NOTHING * (chain.SLOTS - 1 - len(layers))
    slots += (projection[0].weight, *bn_tensors(projection[1])) if projection else _NOTHING
    return slots


def momentum_of(bn: BatchNorm) -> float:
    if bn.momentum is None:
        return 0.0 if bn.num_batches_tracked is None else CUMULATIVE
    return float(bn.momentum)


def count_first(*bns: BatchNorm) -> None:
    """Counts one batch more where the count makes the momentum; all other counters are counted by kernels."""
    plain.count_batch(*[bn for bn in bns if bn.momentum is None])


# ---------------------------------------------------------------- routes


_said: set[str] = set()


def request_for(route: str | None, x: Tensor) -> RouteRequest:
    request = requested() if route is None else RouteRequest(check_route(route), strict=True)
    return RouteRequest("reference") if not request.strict and _needs_plain(x) else request


def _needs_plain(x: Tensor) -> bool:
    """Whether something needs operations that it knows: ours have no rule for vmap and jvp, and plans for one size.

    So has what ``torch.export`` and ``make_fx`` write of an ``x`` with a size that is left open.
    """
    compiling = torch.compiler.is_compiling()
    if torch.compiler.is_exporting() if compiling else torch._C._len_torch_dispatch_stack():
        for size in x.shape:
            if not has_static_value(size):
                return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing()


def is_taken(planned: str, reason: str, request: RouteRequest, operation: str) -> bool:
    """Whether a fused plan runs. Raises where another was asked for strictly; says once why plain PyTorch runs."""
    if request.strict and request.route not in ("auto", planned):
        raise RouteUnavailableError(f"{operation} has no route {request.route!r} here: {reason}")
    if planned != "reference":
        return True
    if request.route != "reference" and not torch.compiler.is_compiling() and reason not in _said:
        _said.add(reason)
        warnings.warn(f"fused_resnet runs plain PyTorch: {reason}", stacklevel=4)
    return False


# ---------------------------------------------------------------- nobody here


def take_part(
    x: Tensor,
    shape: tuple[int, ...],
    norms: Sequence[tuple[Tensor | None, BatchNorm]],
    residual: Tensor | None = None,
    projects: bool = False,
) -> Tensor:
    """The output of ``shape`` of an empty batch, while other processes normalise theirs: they wait for this one.

    ``norms``: each with the convolution's weight before it, a projection's last.
    """
    bns = [bn for _, bn in norms]
    count_first(*bns)
    channels = tuple([shape[1] if weight is None else int(weight.shape[0]) for weight, _ in norms])
    settings = tuple([momentum_of(bn) for bn in bns]), tuple([bn.eps for bn in bns])
    tensors = [t for weight, bn in norms for t in (weight, *bn_tensors(bn))]
    return absent.absent(absent.Absentee(bns[0].sync, channels, *settings, projects), shape, x, residual, tensors)
