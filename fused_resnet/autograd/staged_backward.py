"""The staged route, backward.

(dz, y, coeffs) travel from layer to layer, where the gradient of a conv's output is dy = A*dz + B*y + C: formed on load
by a 1x1 conv's kernels, in one pass before an RxS conv's or the vendor's. With frozen statistics dy = A*dz.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..launch import vendor
from ..launch.bn_act_grad import bn_grad_finalize
from ..launch.conv_dgrad import conv_dgrad
from ..launch.conv_wgrad import conv_wgrad
from ..launch.record import note
from ..plan.plans import ConvPlan, Plan
from .staged_forward import Layer, Passes, Saved, operand

Tensor = torch.Tensor


class Needs(NamedTuple):
    """Which gradients of one layer are asked for."""

    weight: bool
    bn: bool

    @property
    def any(self) -> bool:
        return self.weight or self.bn


class LayerGrad(NamedTuple):
    weight: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None


class Gradient(NamedTuple):
    """The gradient dy = A*dz + B*y + C of one conv's output, not yet formed (``y`` None: dy = A*dz)."""

    dz: Tensor
    y: Tensor | None
    coeffs: Tensor

    def formed(self, passes: Passes) -> Formed:
        return Formed(passes.grad_apply(self.dz, self.y, self.coeffs))


class Formed(NamedTuple):
    """The gradient of one conv's output, formed."""

    dz: Tensor
    y: None = None
    coeffs: None = None


def wgrad(
    passes: Passes,
    conv: ConvPlan,
    weight: Tensor,
    x: Tensor,
    input_stats: Tensor | None,
    grad: Gradient | Formed,
    out_dtype: torch.dtype,
) -> Tensor:
    """dW = sum over pixels of dy (x) relu(bn(x)), or of dy (x) x without ``input_stats``."""
    on_load = conv.wgrad.fused and conv.problem.is_pointwise
    if input_stats is not None and not on_load:
        x, input_stats = passes.act(x, input_stats), None
    if conv.wgrad.config is None:
        return vendor.conv_wgrad(x, grad.dz, operand(weight, x.dtype), conv.problem).to(out_dtype)
    return conv_wgrad(
        x,
        grad.dz,
        conv.problem,
        conv.wgrad.config,
        input_affine=None if input_stats is None else input_stats[2:],
        y=grad.y,
        coeffs=grad.coeffs,
        out_dtype=out_dtype,
    )


def _needs_forming(conv: ConvPlan, dgrad: bool, wgrad: bool) -> bool:
    used = [choice for choice, wanted in ((conv.dgrad, dgrad), (conv.wgrad, wgrad)) if wanted]
    return bool(used) and (not conv.problem.is_pointwise or not all(choice.fused for choice in used))


def backward(
    plan: Plan,
    dout: Tensor,
    x: Tensor,
    layers: Sequence[Layer],
    saved: Saved,
    needs: Sequence[Needs],
    needs_x: bool,
    needs_residual: bool,
) -> tuple[Tensor | None, Tensor | None, list[LayerGrad]]:
    """(dx, dresidual, gradients of each layer); what is not asked for is None and costs nothing."""
    assert plan.problem is not None
    problem, passes = plan.problem, Passes(plan)
    batch, last = passes.batch, len(plan.convs) - 1
    grads = [LayerGrad()] * len(layers)
    y_projection = saved.ys[-1] if plan.projection is not None and batch else None
    # Without a residual the ReLU's mask follows from y, and out need not be read (nor kept).
    dz, tiles = passes.grad_reduce(
        dout,
        saved.ys[last] if batch else None,
        saved.stats[last],
        out=saved.out if problem.relu and not (batch and problem.residual == "none") else None,
        residual=y_projection,
        residual_stats=saved.stats[-1] if y_projection is not None else None,
        relu=problem.relu,
    )
    dresidual = dz if needs_residual and problem.residual == "given" else None

    dx_residual, residual_stride = None, (1, 1)
    if problem.residual == "identity":
        dx_residual = dz
    elif plan.projection is not None and (needs_x or needs[-1].any):
        projected = _layer_grad(passes, plan.projection, layers[-1], saved.stats[-1], tiles, 2, dz, y_projection)
        grads[-1], dx_residual = _projection_backward(
            passes, plan.projection, layers[-1], x, saved.stats[-1], projected, needs[-1], needs_x
        )
        residual_stride = plan.projection.problem.stride if plan.projection.dgrad.fused else (1, 1)

    dx = None
    lowest = 0 if needs_x else min((i for i in range(last + 1) if needs[i].any), default=last + 1)
    row = 1
    for i in range(last, lowest - 1, -1):
        conv, layer = plan.convs[i], layers[i]
        layer_input, input_stats = (x, None) if i == 0 else (saved.ys[i - 1], saved.stats[i - 1])
        assert layer_input is not None
        bn_grad, grad = _layer_grad(passes, conv, layer, saved.stats[i], tiles, row, dz, saved.ys[i] if batch else None)
        wants_dgrad = needs_x if i == 0 else lowest < i
        grads[i], grad = _parameter_grads(
            passes,
            conv,
            layer,
            layer_input,
            input_stats if batch else None,
            saved.stats[i],
            bn_grad,
            grad,
            needs[i],
            wants_dgrad,
        )
        if not wants_dgrad:
            break
        weight = operand(layer.weight, x.dtype)
        if i == 0:
            dx = input_grad(conv, weight, x, grad, dx_residual, residual_stride)
        else:
            dz, tiles = _masked_dgrad(passes, conv, weight, layer_input, input_stats, grad)
    return dx, dresidual, grads


def _layer_grad(
    passes: Passes,
    conv: ConvPlan,
    layer: Layer,
    stats: Tensor,
    tiles: Tensor,
    row: int,
    dz: Tensor,
    y: Tensor | None,
) -> tuple[LayerGrad, Gradient]:
    """The BN's parameter gradients and the gradient of its conv's output, from the merged partial sums."""
    dgamma, dbeta, coeffs = bn_grad_finalize(tiles, stats, layer.gamma, conv.problem.M, row=row if passes.batch else 1)
    # With frozen statistics dy = A*dz: B and C are not read.
    return LayerGrad(None, dgamma, dbeta), Gradient(dz, y, coeffs)


def _parameter_grads(
    passes: Passes,
    conv: ConvPlan,
    layer: Layer,
    layer_input: Tensor,
    input_stats: Tensor | None,
    stats: Tensor,
    bn_grad: LayerGrad,
    grad: Gradient,
    needs: Needs,
    wants_dgrad: bool,
) -> tuple[LayerGrad, Gradient | Formed]:
    """dW, dgamma, dbeta of one layer; and the gradient, formed if a kernel that follows wants it formed."""
    out_dtype = layer.weight.dtype
    if passes.batch:
        formed: Gradient | Formed = grad
        if _needs_forming(conv, wants_dgrad, needs.weight):
            formed = grad.formed(passes)
        dw = None
        if needs.weight:
            dw = wgrad(passes, conv, layer.weight, layer_input, input_stats, formed, out_dtype)
        return bn_grad._replace(weight=dw) if needs.bn else LayerGrad(dw), formed
    # Frozen statistics: y was never written. With T = sum dz (x) a, dW = scale*T and sum dz*y = rowsum(W*T).
    dw, dgamma = None, None
    if needs.any:
        t = wgrad(passes, conv, layer.weight, layer_input, None, Formed(grad.dz), stats.dtype)
        mean, rstd, scale = stats[0], stats[1], stats[2]
        if needs.bn:
            product = operand(layer.weight, layer_input.dtype).to(stats.dtype) * t
            dgamma = rstd * (product.sum((1, 2, 3)) - mean * bn_grad.beta)
        if needs.weight:
            dw = (t * scale[:, None, None, None]).to(out_dtype)
    formed = grad.formed(passes) if _needs_forming(conv, wants_dgrad, False) else grad
    return LayerGrad(dw, dgamma, bn_grad.beta if needs.bn else None), formed


def _projection_backward(
    passes: Passes,
    conv: ConvPlan,
    layer: Layer,
    x: Tensor,
    stats: Tensor,
    projected: tuple[LayerGrad, Gradient],
    needs: Needs,
    needs_x: bool,
) -> tuple[LayerGrad, Tensor | None]:
    """The projection's parameter gradients, and dx through it: compact (sampled pixels only) where our kernel runs."""
    grads, grad = _parameter_grads(passes, conv, layer, x, None, stats, *projected, needs, needs_x)
    if not needs_x:
        return grads, None
    weight = operand(layer.weight, x.dtype)
    if conv.dgrad.config is None:
        return grads, vendor.conv_dgrad(grad.dz, x, weight, conv.problem)
    compact = conv.problem.sampled()
    dx, _ = conv_dgrad(grad.dz, weight, compact, conv.dgrad.config, y=grad.y, coeffs=grad.coeffs)
    return grads, dx


def input_grad(
    conv: ConvPlan,
    weight: Tensor,
    x: Tensor,
    grad: Gradient | Formed,
    residual: Tensor | None,
    residual_stride: tuple[int, int],
) -> Tensor:
    """dx of the chain's first conv, the residual branch's share added."""
    if conv.dgrad.config is None:
        dx = vendor.conv_dgrad(grad.dz, x, weight, conv.problem)
        if residual is not None:
            dx[:, :, :: residual_stride[0], :: residual_stride[1]] += residual
            note("add_residual_grad", 0, (residual, residual, residual), {})
        return dx
    dx, _ = conv_dgrad(
        grad.dz,
        weight,
        conv.problem,
        conv.dgrad.config,
        y=grad.y,
        coeffs=grad.coeffs,
        residual=residual,
        residual_stride=residual_stride,
    )
    return dx


def _masked_dgrad(
    passes: Passes,
    conv: ConvPlan,
    weight: Tensor,
    layer_input: Tensor,
    input_stats: Tensor | None,
    grad: Gradient | Formed,
) -> tuple[Tensor, Tensor]:
    """dz of the layer below, behind its ReLU's mask, and the tiles of its BN's reductions."""
    assert input_stats is not None
    if conv.dgrad.config is None:
        da = vendor.conv_dgrad(grad.dz, layer_input, weight, conv.problem)
        if passes.batch:
            return passes.grad_reduce(da, layer_input, input_stats)
        return passes.grad_reduce(da, None, input_stats, out=layer_input)
    dz, tiles = conv_dgrad(
        grad.dz,
        weight,
        conv.problem,
        conv.dgrad.config,
        y=grad.y,
        coeffs=grad.coeffs,
        mask_input=layer_input,
        mask_stats=input_stats if passes.batch else None,
    )
    assert tiles is not None
    return dz, tiles
