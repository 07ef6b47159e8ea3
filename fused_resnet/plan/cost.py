"""What work costs: the floor of a list of launches on a target, and eager PyTorch's FLOPs and bytes, each op alone.

Eager figures come from the operators that PyTorch dispatches. An operator reads its inputs once and writes its outputs
once, with three exceptions: batch norm needs two passes over its input forward and over both operands backward, a
strided 1x1 convolution reads only the pixels that it samples, and an input that is overwritten is not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.flop_counter import flop_registry

from .target import Target


class Work(Protocol):
    """Anything with FLOPs and bytes: a recorded launch, a :class:`Cost`."""

    @property
    def flops(self) -> int: ...

    @property
    def bytes(self) -> int: ...


class Cost(NamedTuple):
    """FLOPs, bytes and kernels of one operator; ``name`` is what it goes by where it has a rate of its own."""

    flops: int
    bytes: int
    launches: int = 1
    name: str = ""


OPTIMIZER_PASSES = {"sgd": 5, "adam": 7, "adamw": 7}
"""Reads and writes of a parameter-sized float32 tensor in one fused step. sgd (with momentum): the parameter, its
gradient and momentum are read, the parameter and momentum written; adam has one tensor of state more."""

_BN_FORWARD = {"native_batch_norm", "cudnn_batch_norm", "_batch_norm_with_update", "_native_batch_norm_legit"}
_BN_BACKWARD = {"native_batch_norm_backward", "cudnn_batch_norm_backward", "batch_norm_backward"}
_OVERWRITES = {"copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_", "bernoulli_", "uniform_", "normal_"}
_FREE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "_reshape_alias"}


def floor_seconds(work: Iterable[Work], target: Target) -> float:
    """The least time for ``work``, one after the other: each is bound by its bytes or by its FLOPs."""
    return sum(max(item.bytes / target.bandwidth, item.flops / target.matrix_rate) for item in work)


def optimizer_cost(parameters: Iterable[torch.Tensor], optimizer: str | None) -> Cost:
    """One step over the parameters that require a gradient, as one fused multi-tensor launch; ``None``: no step."""
    if optimizer is None:
        return Cost(0, 0, 0)
    if optimizer not in OPTIMIZER_PASSES:
        raise ValueError(f"unknown optimizer {optimizer!r}; there are {', '.join(OPTIMIZER_PASSES)}, or None")
    size = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    return Cost(0, OPTIMIZER_PASSES[optimizer] * size, 1 if size else 0)


def eager_costs(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> list[Cost]:
    """What one dispatched ATen operator costs in eager PyTorch; empty where nothing is launched (a view, say).

    ``func`` is the ``OpOverload``; ``args``, ``kwargs`` and ``out`` are the tensors it saw and made, data or none.
    """
    name = func._schema.name.split("::")[-1]
    inputs, outputs = _tensors((*args, *kwargs.values())), _tensors((out,))
    if func.is_view or torch.Tag.inplace_view in func.tags or name in _FREE or not outputs:
        return []
    if name == "convolution_backward":
        return _convolution_backward(func, args, out)
    count = flop_registry.get(func._overloadpacket)
    flops = int(count(*args, **kwargs, out_val=out)) if count is not None else 0
    if name == "convolution":
        moved = _sampled_bytes(args[0], args[1], args[3]) + _bytes(inputs[1:]) + _bytes(outputs)
        name = _conv_name("fprop", args[1])
    elif name in _BN_FORWARD:
        moved = _bytes(inputs) + _bytes(outputs) + (_bytes(inputs[:1]) if _trains(args) else 0)
    elif name in _BN_BACKWARD:
        moved = _bytes(inputs) + _bytes(outputs) + (_bytes(inputs[:2]) if _trains(args) else 0)
    elif name in _OVERWRITES:
        moved = _bytes(inputs[1:]) + _bytes(outputs)
    else:
        moved = _bytes(inputs) + _bytes(outputs)
    return [Cost(flops, moved, name=name)]


def _convolution_backward(func: Any, args: Sequence[Any], out: Any) -> list[Cost]:
    """dgrad, wgrad and the bias's sum, whichever are asked for."""
    dy, x, weight, stride, mask = args[0], args[1], args[2], args[4], args[-1]
    moved = ([dy, weight, out[0]], [dy, out[1]], [dy, out[2]])
    extra = (0, _sampled_bytes(x, weight, stride), 0)
    costs = []
    for i in range(3):
        if mask[i]:
            alone = [j == i for j in range(3)]
            flops = flop_registry[func._overloadpacket](*args[:-1], alone, out_val=out) if i < 2 else 0
            name = "bias" if i == 2 else _conv_name(("dgrad", "wgrad")[i], weight)
            costs.append(Cost(int(flops), _bytes(moved[i]) + extra[i], name=name))
    return costs


def _conv_name(kind: str, weight: torch.Tensor) -> str:
    """A convolution over few channels (a stem's) is another kernel of the vendor's, and far from its floor."""
    return f"vendor_{'narrow_' if weight.shape[1] < 8 else ''}conv_{kind}"


def _sampled_bytes(x: torch.Tensor, weight: torch.Tensor, stride: Sequence[int]) -> int:
    """Bytes that a convolution reads of its input: all, or the sampled pixels of a strided 1x1."""
    if any(size != 1 for size in weight.shape[2:]):
        return _bytes([x])
    pixels = 1
    for size, step in zip(x.shape[2:], stride, strict=False):
        pixels *= -(-size // step)
    return x.shape[0] * x.shape[1] * pixels * x.element_size()


def _trains(args: Sequence[Any]) -> bool:
    """Whether a batch norm operator works with the batch's own statistics: its first flag, or it has none."""
    return bool(next((arg for arg in args if isinstance(arg, bool)), True))


def _bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of tensors, each whole; of an expanded one, only what is there."""
    total = 0
    for t in tensors:
        if t is not None:
            there = 1
            for size, step in zip(t.shape, t.stride()):
                there *= size if step else min(size, 1)
            total += there * t.element_size()
    return total


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found
