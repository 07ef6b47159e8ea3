"""The operator behind BNAddReLU: out = relu(bn(y) + residual), and its two-pass backward."""

from __future__ import annotations

from typing import Any

import torch

from ..launch import bn_act as launch_act
from ..launch import bn_act_grad, bn_stats
from ..launch.bits import empty_bits
from ..launch.nhwc import nhwc
from ..plan.passes import pass_config, reduce_config
from .layer import finalize, grad_finalize, unpacked
from .library import define, refuse_second_derivative

Tensor = torch.Tensor
Settings = tuple[bool, float, float, bool, int, bool, bool, str]


def _size(t: Tensor) -> tuple[int, int, int]:
    n, c, h, w = t.shape
    return n * h * w, c, t.element_size()


def _stats_dtype(y: Tensor) -> torch.dtype:
    return torch.float64 if y.dtype == torch.float64 else torch.float32


def _mask(y: Tensor, keeps_mask: bool) -> Tensor:
    """Memory for the ReLU's mask, one bit per element, or none."""
    return empty_bits(y.shape, y.device) if keeps_mask else y.new_empty(0, dtype=torch.uint8)


def _forward(
    y: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    batch_statistics: bool,
    momentum: float,
    eps: float,
    relu: bool,
    sm_count: int,
    interpreter: bool,
    keeps_mask: bool,
    sync: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, channels, itemsize = _size(y)
    if batch_statistics:
        tiles = bn_stats.bn_stats(y, reduce_config(rows, channels, itemsize, sm_count, interpreter=interpreter))
        stats = finalize(
            tiles,
            sync,
            weight=gamma,
            bias=beta,
            running_mean=running_mean,
            running_var=running_var,
            momentum=momentum,
            eps=eps,
            counter=counter,
        )
    else:
        assert running_mean is not None and running_var is not None
        norm = bn_stats.FrozenNorm(gamma, beta, running_mean, running_var, eps)
        (stats,) = bn_stats.bn_frozen([norm], dtype=_stats_dtype(y))
    config = pass_config(rows, channels, itemsize, sm_count, interpreter=interpreter)
    mask = _mask(y, keeps_mask)
    bits = mask if keeps_mask else None
    return launch_act.bn_act(y, stats, config, residual=residual, relu=relu, bits=bits), mask, stats


def _forward_fake(y: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(y, memory_format=torch.channels_last)
    return out, _mask(y, rest[-2]), torch.empty((4, y.shape[1]), dtype=_stats_dtype(y), device=y.device)


def _backward(
    dout: Tensor,
    y: Tensor,
    mask: Tensor,
    stats: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    needs_y: bool,
    needs_residual: bool,
    batch_statistics: bool,
    relu: bool,
    sm_count: int,
    interpreter: bool,
    sync: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout = nhwc(dout)
    rows, channels, itemsize = _size(y)
    bits, store_dz = mask if mask.numel() else None, needs_y or needs_residual
    tensors = 2 + (relu and store_dz)
    reducing = reduce_config(rows, channels, itemsize, sm_count, tensors=tensors, interpreter=interpreter)
    dz, tiles = bn_act_grad.bn_act_grad_reduce(dout, y, stats, reducing, bits=bits, relu=relu, store_dz=store_dz)
    dgamma, dbeta, coeffs = grad_finalize(tiles, stats, gamma, rows, sync, wants_dy=needs_y)
    dy, dresidual = y.new_empty(0), y.new_empty(0)
    if needs_y:
        assert dz is not None
        applying = pass_config(rows, channels, itemsize, sm_count, interpreter=interpreter)
        dy = bn_act_grad.bn_grad_apply(dz, y if batch_statistics else None, coeffs, applying)
    if needs_residual:
        assert dz is not None
        # An operator's output must not be its input: without a ReLU dz is dout itself.
        dresidual = dz if relu else dz.clone(memory_format=torch.preserve_format)
    return (
        dy,
        dresidual,
        y.new_empty(0) if gamma is None else dgamma.to(gamma.dtype),
        y.new_empty(0) if beta is None else dbeta.to(beta.dtype),
    )


def _backward_fake(
    dout: Tensor,
    y: Tensor,
    mask: Tensor,
    stats: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    needs_y: bool,
    needs_residual: bool,
    *_rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameters = [y.new_empty(0) if p is None else torch.empty_like(p) for p in (gamma, beta)]
    images = [
        torch.empty_like(y, memory_format=torch.channels_last) if needed else y.new_empty(0)
        for needed in (needs_y, needs_residual)
    ]
    return images[0], images[1], parameters[0], parameters[1]


bn_act_forward = define(
    "bn_act_forward(Tensor y, Tensor? residual, Tensor? gamma, Tensor? beta, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? counter, bool batch_statistics, float momentum, float eps, bool relu, "
    "int sm_count, bool interpreter, bool keeps_mask, str sync) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
bn_act_backward = define(
    "bn_act_backward(Tensor dout, Tensor y, Tensor mask, Tensor stats, Tensor? gamma, Tensor? beta, "
    "bool needs_y, bool needs_residual, bool batch_statistics, bool relu, int sm_count, bool interpreter, "
    "str sync) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _BNAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        y: Tensor,
        residual: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        counter: Tensor | None,
    ) -> Tensor:
        out, mask, stats = bn_act_forward(y, residual, gamma, beta, running_mean, running_var, counter, *settings)
        ctx.settings = settings
        ctx.save_for_backward(y, mask, stats, gamma, beta)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, mask, stats, gamma, beta = ctx.saved_tensors
        (y,) = unpacked(y)
        batch_statistics, _, _, *rest, _, sync = ctx.settings
        wants = ctx.needs_input_grad[1:5]
        grads = refuse_second_derivative(
            bn_act_backward, dout, y, mask, stats, gamma, beta, *wants[:2], batch_statistics, *rest, sync
        )
        wanted = [g if needed else None for g, needed in zip(grads, wants, strict=True)]
        return None, *wanted, None, None, None


def bn_act(settings: Settings, *tensors: Tensor | None) -> Tensor:
    """``settings``: batch_statistics, momentum, eps, relu, sm_count, interpreter, keeps_mask (without a residual it
    follows from y), sync (as of :func:`finalize`). ``tensors``: y, residual (both channels_last), gamma, beta,
    running_mean, running_var, counter."""
    return _BNAct.apply(settings, *tensors)  # type: ignore[no-any-return]
