"""The operator behind Stem: conv, then BN + ReLU + 3x3/2 max pooling in one pass; two passes backward."""

from __future__ import annotations

from typing import Any

import torch

from ..launch import stem_pool
from ..launch.nhwc import nhwc
from ..plan.passes import window_config
from ..plan.plans import Plan, decode
from .layer import Layer, Passes, frozen_stats, operands, unpacked
from .library import define, refuse_second_derivative
from .staged_backward import Formed, Shortcut, input_grad, wgrad
from .staged_forward import conv_only, conv_raw

Tensor = torch.Tensor


def _stats_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _images(plan: Plan, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty y, out and index."""
    conv = plan.convs[0].problem
    pooled = (x.shape[0], conv.Co, (conv.P - 1) // 2 + 1, (conv.Q - 1) // 2 + 1)
    shapes = (((x.shape[0], conv.Co, conv.P, conv.Q), x.dtype), (pooled, x.dtype), (pooled, torch.uint8))
    y, out, index = (
        torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last) for shape, dtype in shapes
    )
    return y, out, index


def _outputs(plan: Plan, out: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
    """What backward alone reads is empty where there is none."""
    assert plan.problem is not None
    return (out, *kept) if plan.problem.backward else (out, *(t.new_empty(0) for t in kept))


def _forward(
    plan: str,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, ...]:
    decoded = decode(plan)
    assert decoded.problem is not None
    passes, conv = Passes(decoded), decoded.convs[0]
    (w,) = operands([weight], x.dtype)
    layer = Layer(w, gamma, beta, running_mean, running_var, counter, momentum, eps, weight.dtype)
    if decoded.problem.batch_statistics:
        y, tiles = conv_raw(passes, conv, w, x, None)
        stats = passes.finalize(layer, tiles)
    else:
        y = conv_only(conv, w, x)
        (stats,) = frozen_stats([layer], x)
    config = window_config(y.shape[1], interpreter=decoded.interpreter)
    out, index = stem_pool.stem_pool(y, stats, config, keeps_index=decoded.problem.backward)
    return _outputs(decoded, out, y, index, stats)


def _forward_fake(plan: str, x: Tensor, weight: Tensor, *_rest: Any) -> tuple[Tensor, ...]:
    decoded = decode(plan)
    y, out, index = _images(decoded, x)
    stats = torch.empty((4, weight.shape[0]), dtype=_stats_dtype(x), device=x.device)
    return _outputs(decoded, out, y, index, stats)


def _backward(
    plan: str,
    needs_x: bool,
    needs_weight: bool,
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    y: Tensor,
    out: Tensor,
    index: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    decoded = decode(plan)
    assert decoded.problem is not None
    passes, conv, dout = Passes(decoded), decoded.convs[0], nhwc(dout)
    config = window_config(y.shape[1], interpreter=decoded.interpreter)
    tiles = stem_pool.stem_pool_grad_reduce(dout, index, out, y, stats, config)
    wants_dy = needs_x or needs_weight
    dgamma, dbeta, coeffs = passes.grad_finalize(tiles, stats, gamma, conv.problem.M, wants_dy=wants_dy)
    empty = x.new_empty(0)
    dx, dw = empty, empty.clone()
    if wants_dy:
        if not decoded.problem.batch_statistics:
            coeffs = torch.cat([stats[2:3], torch.zeros_like(stats[:2])])
        dy = stem_pool.stem_pool_grad_apply(dout, index, out, y, coeffs, config)
        w = weight
        if needs_x or conv.wgrad.config is None:  # our weight gradient reads no weight
            (w,) = operands([weight], x.dtype)
        if needs_weight:
            dw = wgrad(passes, conv, w, x, None, Formed(dy), weight.dtype)
        if needs_x:
            dx = input_grad(conv, w, x, Formed(dy), Shortcut())
    return (
        dx,
        dw,
        empty.clone() if gamma is None else dgamma.to(gamma.dtype),
        empty.clone() if beta is None else dbeta.to(beta.dtype),
    )


def _backward_fake(
    plan: str,
    needs_x: bool,
    needs_weight: bool,
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    *_rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = x.new_empty(0)
    return (
        torch.empty_like(x, memory_format=torch.channels_last) if needs_x else empty,
        torch.empty_like(weight, memory_format=torch.channels_last) if needs_weight else empty.clone(),
        empty.clone() if gamma is None else torch.empty_like(gamma),
        empty.clone() if beta is None else torch.empty_like(beta),
    )


stem_forward = define(
    "stem_forward(str plan, Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? counter, float momentum, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
stem_backward = define(
    "stem_backward(str plan, bool needs_x, bool needs_weight, Tensor dout, Tensor x, Tensor weight, Tensor? gamma, "
    "Tensor? beta, Tensor y, Tensor out, Tensor index, Tensor stats) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: str,
        momentum: float,
        eps: float,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        counter: Tensor | None,
    ) -> Tensor:
        out, y, index, stats = stem_forward(
            plan, x, weight, gamma, beta, running_mean, running_var, counter, momentum, eps
        )
        ctx.plan = plan
        ctx.save_for_backward(x, weight, gamma, beta, y, out, index, stats)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wants = ctx.needs_input_grad[3:7]
        x, weight, gamma, beta, y, out, index, stats = ctx.saved_tensors
        x, y, out, index = unpacked(x, y, out, index)
        saved = (x, weight, gamma, beta, y, out, index, stats)
        grads = refuse_second_derivative(stem_backward, ctx.plan, wants[0], wants[1], dout, *saved)
        wanted = [g if needed else None for g, needed in zip(grads, wants, strict=True)]
        return None, None, None, *wanted, None, None, None


def stem(plan: str, momentum: float, eps: float, *tensors: Tensor | None) -> Tensor:
    """Runs an encoded plan of one convolution. ``tensors``: x (channels_last), weight, gamma, beta, running_mean,
    running_var, counter."""
    return _Stem.apply(plan, momentum, eps, *tensors)  # type: ignore[no-any-return]
