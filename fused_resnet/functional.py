"""The typed public operations: conv + BatchNorm + ReLU (+ residual), alone and as whole residual blocks.

Activations are [N, C, H, W] in float16, bfloat16 or float32 (float64 in Triton's interpreter); convolution weights are
[Co, Ci / groups, R, S] in the same dtype, or float32 under autocast. BatchNorm parameters and running statistics are
[C]. Every operation computes what ``nn.Conv2d``, ``nn.BatchNorm2d`` and ``relu`` compute in a row (Ioffe and Szegedy
2015, arXiv 1502.03167; He et al. 2015, arXiv 1512.03385), in channels_last memory where the input or a weight has it,
and updates the running statistics in place in training. Under torch.func's transforms, forward-mode differentiation and
``torch.jit.trace`` plain PyTorch runs, and ``torch.export`` writes it for sizes that are left open. Bad input raises
``ValueError`` or ``TypeError`` before anything is updated.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import plain
from .alike import Kinds, are_plain
from .arguments import (
    MOST_LAYERS,
    BatchNorm,
    Conv,
    Layer,
    MemoryOptions,
    Pair,
    batch_norm_of,
    check_bn,
    check_chain,
    check_count,
    check_image,
    check_layer,
    check_layers,
    check_residual,
    conv_of,
    memory_options,
    plain_conv_of,
)
from .autograd import bn_act as bn_act_op
from .autograd import chain, preflight
from .autograd import stem as stem_op
from .calls import (
    add_wider,
    bn_tensors,
    compute_dtype,
    count_first,
    dtype_name,
    geometry_of,
    is_taken,
    momentum_of,
    needs_grad,
    pair,
    parameters_of,
    request_for,
    size_of,
    slots_of,
    take_part,
    widens,
)
from .layout import is_channels_last, nhwc
from .plan import planner, tables
from .plan.passes import CUMULATIVE
from .plan.route import RouteRequest
from .plan.target import assumption

__all__ = [
    "BatchNorm",
    "Conv",
    "Layer",
    "MemoryOptions",
    "basic_block",
    "batch_norm_of",
    "bn_add_relu",
    "bottleneck",
    "conv_bn_chain",
    "conv_bn_relu",
    "conv_of",
    "memory_options",
    "plain_conv_of",
    "stem",
]


# ---------------------------------------------------------------- public operations


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bn: BatchNorm,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    relu: bool = True,
    residual: Tensor | None = None,
    route: str | None = None,
) -> Tensor:
    """``relu(bn(conv(x)) + residual)``: [N, Ci, H, W] to [N, Co, P, Q]; ``residual`` has the output's shape."""
    conv = Conv(weight, pair("stride", stride), pair("padding", padding), pair("dilation", dilation), groups)
    return conv_bn_chain(x, ((conv, bn),), residual=residual, relu=relu, route=route)


def basic_block(
    x: Tensor,
    layers: Sequence[Layer],
    projection: Layer | None = None,
    *,
    residual: Tensor | None = None,
    recompute: Sequence[str] = (),
    keep: Sequence[str] = (),
    route: str | None = None,
) -> Tensor:
    """Two conv-BN layers around a ReLU, and the shortcut: ``projection`` of x, a ``residual`` given, or x itself.

    ``recompute`` and ``keep``: as in :func:`bottleneck`.
    """
    check_layers(layers, 2)
    options: dict[str, Any] = {"residual": residual, "recompute": recompute, "keep": keep, "route": route}
    return conv_bn_chain(x, layers, projection, identity=True, **options)


def bottleneck(
    x: Tensor,
    layers: Sequence[Layer],
    projection: Layer | None = None,
    *,
    residual: Tensor | None = None,
    recompute: Sequence[str] = (),
    keep: Sequence[str] = (),
    route: str | None = None,
) -> Tensor:
    """Three conv-BN layers with ReLUs between, and the shortcut: ``projection`` of x, a ``residual``, or x itself.

    ``recompute=("y1",)``: the first convolution's output is not kept for backward, which computes it again: it takes
    less memory. ``keep=("a1",)``: the same behind its BatchNorm and ReLU is kept, which backward forms again otherwise:
    it takes less time. To plain PyTorch, where that is what runs, they mean nothing.
    """
    check_layers(layers, 3)
    options: dict[str, Any] = {"residual": residual, "recompute": recompute, "keep": keep, "route": route}
    return conv_bn_chain(x, layers, projection, identity=True, **options)


def bn_add_relu(
    y: Tensor, bn: BatchNorm, residual: Tensor | None = None, *, relu: bool = True, route: str | None = None
) -> Tensor:
    """``relu(bn(y) + residual)``: all [N, C, H, W]."""
    check_image(y)
    check_bn(bn, y.shape[1], y.device, "bn")
    if residual is not None:
        check_residual(residual, tuple(y.shape), y.device)
        if widens(residual, y.dtype):
            return add_wider(bn_add_relu(y, bn, relu=False, route=route), residual, relu)
    if bn.training and not bn.group:
        check_count(tuple(y.shape))
    request = request_for(route, y)
    elements = prod(size_of(y, request))
    sm_count, interpreter, reason = planner.pass_plan(y.device, dtype_name(y.dtype), elements, request.route)
    if bn.sync and reason == planner.EMPTY_BATCH:
        return take_part(y, tuple(y.shape), [(None, bn)], residual)
    if not is_taken("staged" if sm_count else "reference", reason, request, "bn_add_relu"):
        plain.count_batch(bn)
        return plain.bn_act(y, bn, residual, relu)
    count_first(bn)
    channels_last = is_channels_last(y)
    y, residual = nhwc(y), None if residual is None else nhwc(residual.to(y.dtype))
    keeps_mask = relu and residual is not None and needs_grad(y, residual, bn.weight, bn.bias)
    settings = (bn.training, momentum_of(bn), float(bn.eps), relu, sm_count, interpreter, keeps_mask, bn.sync)
    out = bn_act_op.bn_act(settings, y, residual, *bn_tensors(bn))
    return out if channels_last else out.contiguous()


def stem(
    x: Tensor,
    weight: Tensor,
    bn: BatchNorm,
    *,
    stride: int | Pair = 2,
    padding: int | Pair = 3,
    route: str | None = None,
) -> Tensor:
    """``max_pool(relu(bn(conv(x))))``, 3x3, stride 2, padding 1: [N, Ci, H, W] to [N, Co, ceil(P / 2), ceil(Q / 2)]."""
    check_image(x)
    conv = Conv(weight, pair("stride", stride), pair("padding", padding))
    dtype = compute_dtype(x)
    shape = check_layer(x.shape, dtype, x.device, conv, bn, "conv")
    request = request_for(route, x)
    keep = needs_grad(x, *parameters_of((conv, bn)))
    text, planned, reason = preflight.chain_plan_text(
        x.device,
        dtype_name(dtype),
        size_of(x, request),
        (geometry_of(conv),),
        None,
        "none",
        True,
        bn.training,
        keep,
        request.route,
        sync=bn.sync,
        parameters=dtype_name(weight.dtype),
    )
    if bn.sync and reason == planner.EMPTY_BATCH:
        pooled = (*shape[:2], *((size - 1) // 2 + 1 for size in shape[2:]))
        return take_part(x.to(dtype), pooled, [(weight, bn)])
    if not is_taken(planned, reason, request, "stem") or min(shape[2:]) < 1:
        plain.count_batch(bn)
        return torch.nn.functional.max_pool2d(plain.layer(x, (conv, bn), None, True), 3, 2, 1)
    channels_last = is_channels_last(x) or is_channels_last(weight)
    count_first(bn)
    out = stem_op.stem(text, momentum_of(bn), float(bn.eps), nhwc(x.to(dtype)), weight, *bn_tensors(bn))
    return out if channels_last else out.contiguous()


# ---------------------------------------------------------------- the chain


def conv_bn_chain(
    x: Tensor,
    layers: Sequence[Layer],
    projection: Layer | None = None,
    *,
    residual: Tensor | None = None,
    identity: bool = False,
    relu: bool = True,
    recompute: Sequence[str] = (),
    keep: Sequence[str] = (),
    route: str | None = None,
) -> Tensor:
    """One to three conv-BN layers with ReLUs between, a shortcut, and a last ReLU unless ``relu`` is False.

    The shortcut is ``projection`` of x, a ``residual`` given, x itself with ``identity=True``, or none. ``recompute``
    and ``keep``: as in :func:`bottleneck`.
    """
    memory = memory_options(recompute, keep)
    if not 1 <= len(layers) <= MOST_LAYERS:
        raise ValueError(f"a chain has one to {MOST_LAYERS} layers, got {len(layers)}")
    if projection is not None and residual is not None:
        raise ValueError("a block takes a projection or a residual, not both")
    kind = "projection" if projection else "given" if residual is not None else "identity" if identity else "none"
    everything = (*layers, projection) if projection else tuple(layers)
    if not all(isinstance(conv, Conv) and isinstance(bn, BatchNorm) for conv, bn in everything):
        check_chain(x, layers, projection, residual, kind, compute_dtype(x))  # finds the words
    dtype, request = compute_dtype(x), request_for(route, x)
    settled, key, tensors = None, None, []
    if request.route != "reference" and not torch.compiler.is_compiling():
        given = [x, residual, *[t for conv, bn in everything for t in (conv[0], *bn[:5])]]
        tensors = [t for t in given if t is not None]
        values = [value for conv, bn in everything for value in (conv[1:], bn[5:])]
        absent = None if len(tensors) == len(given) else tuple([t is None for t in given])
        key = (dtype, kind, relu, memory, request, torch.is_grad_enabled(), assumption(), x.shape, *values, absent)
        settled = _settled.find(key, tensors)
    if settled is None:
        found = _settle(x, dtype, layers, projection, residual, kind, relu, memory, request, route)
        if isinstance(found, Tensor):
            return found
        settled = found
        if key is not None and are_plain(tensors):
            _settled.remember(key, tensors, settled)

    if CUMULATIVE in settled.momenta:
        count_first(*[bn for _, bn in everything])
    if settled.converts:
        x, residual = nhwc(x.to(dtype)), None if residual is None else nhwc(residual.to(dtype))
    slots = slots_of(layers, projection)
    out = chain.conv_chain(settled.plan, settled.momenta, settled.epsilons, x, residual, slots)
    return out if settled.channels_last else out.contiguous()


def _settle(
    x: Tensor,
    dtype: torch.dtype,
    layers: Sequence[Layer],
    projection: Layer | None,
    residual: Tensor | None,
    kind: str,
    relu: bool,
    memory: MemoryOptions,
    request: RouteRequest,
    route: str | None,
) -> _Settled | Tensor:
    """How a chain runs on a fused route; or its output, where that does not take it as a whole."""
    shape = check_chain(x, layers, projection, residual, kind, dtype)
    added = x if kind == "identity" else residual
    if widens(added, dtype):
        return add_wider(conv_bn_chain(x, layers, relu=False, **memory._asdict(), route=route), added, relu)
    everything = (*layers, projection) if projection else tuple(layers)
    training, sync = everything[0][1].training, everything[0][1].sync
    for _, bn in everything:
        if bn.training != training or bn.sync != sync:
            return plain.walk(partial(_layer, route=route), x, layers, projection, residual, kind, relu)
    text, planned, reason = preflight.chain_plan_text(
        x.device,
        dtype_name(dtype),
        size_of(x, request),
        tuple([geometry_of(conv) for conv, _ in layers]),
        geometry_of(projection[0]) if projection else None,
        kind,
        relu,
        training,
        needs_grad(x, residual, *parameters_of(*everything)),
        request.route,
        *memory,
        sync=sync,
        parameters=dtype_name(layers[0][0].weight.dtype),
    )
    if sync and reason == planner.EMPTY_BATCH:
        norms = [(conv.weight, bn) for conv, bn in everything]
        return take_part(x.to(dtype), shape, norms, residual, projects=projection is not None)
    if not is_taken(planned, reason, request, "a chain of convolutions"):
        return plain.chain(x, layers, projection, residual, kind, relu)
    images = [t for t in (x, residual) if t is not None]
    return _Settled(
        text,
        tuple([momentum_of(bn) for _, bn in everything]),
        tuple([float(bn.eps) for _, bn in everything]),
        any(t.dtype != dtype or not t.is_contiguous(memory_format=torch.channels_last) for t in images),
        is_channels_last(x) or any(is_channels_last(conv.weight) for conv, _ in everything),
    )


class _Settled(NamedTuple):
    """A chain that was checked and planned, and takes a fused route."""

    plan: str
    momenta: tuple[float, ...]
    epsilons: tuple[float, ...]
    converts: bool
    channels_last: bool


_settled: Kinds[_Settled] = Kinds(aligned=False)
"""By everything that checking and planning read."""
tables.stale.append(_settled.clear)


def _layer(x: Tensor, layer: Layer, residual: Tensor | None, relu: bool, route: str | None) -> Tensor:
    """One fused operation for a layer: of layers whose statistics are of different kinds, or of different processes."""
    return conv_bn_chain(x, (layer,), residual=residual, relu=relu, route=route)
