"""The staged route, backward.

(dz, y, coeffs) travel from layer to layer, where the gradient of a conv's output is dy = A*dz + B*y + C: formed on load
by a 1x1 conv's kernels, in one pass before an RxS conv's or the vendor's. With frozen statistics dy = A*dz.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..launch import vendor
from ..launch.conv_dgrad import conv_dgrad
from ..launch.conv_pair import conv_pair
from ..launch.conv_wgrad import conv_wgrad
from ..launch.frozen_grad import frozen_grad
from ..launch.record import note
from ..launch.stem_conv import stem_conv_wgrad
from ..plan.plans import ConvPlan, Plan
from . import gram as gram_route
from .layer import Layer, LayerGrad, Needs, Passes, Reduced
from .staged_forward import Saved, first_again

Tensor = torch.Tensor


class Gradient(NamedTuple):
    """The gradient dy = A*dz + B*y + C of one conv's output, not yet formed (``y`` None: dy = A*dz)."""

    dz: Tensor
    y: Tensor | None
    coeffs: Tensor


class Formed(NamedTuple):
    """The gradient of one conv's output, formed. ``dx``: that of its input, where the vendor gave both at once."""

    dz: Tensor
    y: None = None
    coeffs: None = None
    dx: Tensor | None = None


class Shortcut(NamedTuple):
    """What the residual branch adds to dx: at every ``residual_stride``-th pixel; with ``residual_bits`` what these let
    through (the plan sees to it that the kernel can, :attr:`Plan.stores_dz`)."""

    residual: Tensor | None = None
    residual_stride: tuple[int, int] = (1, 1)
    residual_bits: Tensor | None = None


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
        return vendor.conv_wgrad(x, grad.dz, weight, conv.problem).to(out_dtype)
    if conv.problem.is_stem:
        return stem_conv_wgrad(x, grad.dz, conv.problem, conv.wgrad.config, out_dtype=out_dtype)
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


class _Step(NamedTuple):
    """One conv-BN layer of the chain, seen from backward.

    ``input_stats`` None: the conv read its input as it is. ``formed_input``: relu(bn(input)), if forward kept it.
    """

    conv: ConvPlan
    layer: Layer
    input: Tensor
    input_stats: Tensor | None
    y: Tensor | None
    stats: Tensor
    needs: Needs
    wants_dgrad: bool
    formed_input: Tensor | None = None

    @property
    def is_vendors(self) -> bool:
        """Whether both gradients are asked for, and the vendor computes both."""
        wanted = self.wants_dgrad and self.needs.weight
        return wanted and self.conv.dgrad.config is None and self.conv.wgrad.config is None

    @property
    def is_paired(self) -> bool:
        """Whether one kernel computes both gradients: as planned, if both are asked for, of a batch's statistics."""
        return self.conv.pair is not None and self.wants_dgrad and self.needs.weight and self.y is not None

    @property
    def needs_forming(self) -> bool:
        """Whether a kernel that will run wants dy formed before it: any but our 1x1 ones, and these as planned."""
        wanted = ((self.conv.dgrad, self.wants_dgrad), (self.conv.wgrad, self.needs.weight and self.y is not None))
        used = [choice for choice, runs in wanted if runs]
        on_load = self.conv.problem.is_pointwise and all(choice.fused for choice in used)
        return bool(used) and (not on_load or (self.conv.forms_dy and len(used) == 2))


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
    lowest = 0 if needs_x else min((i for i in range(last + 1) if needs[i].any), default=last + 1)
    wants_projection = plan.projection is not None and (needs_x or needs[-1].any)
    projects_staged = plan.projection is not None and plan.gram_projection is None
    gram = plan.gram is not None and (lowest <= last or (wants_projection and not projects_staged))
    if "y1" in problem.recompute and (lowest <= 1 or (gram and last == 1)):
        saved.ys[0] = first_again(plan, layers[0].weight, x, saved.stats[0])
    grads = [LayerGrad()] * len(layers)
    y_projection = saved.ys[-1] if projects_staged and batch else None
    behind = None
    if gram and not projects_staged and plan.gram is not None and plan.gram.masked_wgrad is not None:
        reduced = None  # the Gram route's weight gradient forms dz and its sums itself
    else:
        reduced = Reduced(
            *passes.grad_reduce(
                dout,
                saved.ys[last] if batch and plan.gram is None else None,
                saved.stats[last],
                bits=saved.mask,
                residual=y_projection,
                residual_stats=saved.stats[-1] if y_projection is not None else None,
                relu=problem.relu,
            )
        )
    if gram:
        y, covariance, moments = saved.ys[last - 1], saved.ys[last], saved.moments
        assert y is not None and covariance is not None and moments is not None
        kept = gram_route.Kept(saved.stats[last], covariance, moments)
        y_stats, wants_dgrad = saved.stats[last - 1], lowest < last
        grads[last], behind, pending = gram_route.backward(
            plan, layers[last], kept, y, y_stats, needs[last], dout, saved.mask, reduced, wants_dgrad
        )
        dz_out = behind.dz
    else:
        assert reduced is not None
        dz_out, pending = reduced.dz, reduced
    dresidual = dz_out if needs_residual and problem.residual == "given" else None

    def step_of(i: int) -> _Step:
        below, below_stats = (x, None) if i == 0 else (saved.ys[i - 1], saved.stats[i - 1])
        assert below is not None
        return _Step(
            conv=plan.convs[i],
            layer=layers[i],
            input=below,
            input_stats=below_stats if batch else None,
            y=saved.ys[i] if batch else None,
            stats=saved.stats[i],
            needs=needs[i],
            wants_dgrad=needs_x or lowest < i,
            formed_input=saved.a1 if i == 1 else None,
        )

    of_last = None
    if not gram and lowest <= last:  # before the projection's: processes talk in one order, whatever their routes
        assert reduced is not None
        of_last = _sums(passes, step_of(last), reduced)

    shortcut = Shortcut()
    if problem.residual == "identity":
        shortcut = Shortcut(dz_out, residual_bits=behind.bits if behind is not None else None)
    elif wants_projection and not projects_staged:
        assert plan.projection is not None and behind is not None
        covariance, projection_moments = saved.ys[-1], saved.projection_moments
        assert covariance is not None and projection_moments is not None
        kept = gram_route.Kept(saved.stats[-1], covariance, projection_moments)
        grads[-1], dx_residual = gram_route.projection_backward(
            plan, layers[-1], kept, x, needs[-1], behind, wants_dgrad=needs_x
        )
        shortcut = Shortcut(dx_residual, plan.projection.problem.stride)
    elif wants_projection:
        assert plan.projection is not None and reduced is not None
        step = _Step(plan.projection, layers[-1], x, None, y_projection, saved.stats[-1], needs[-1], needs_x)
        sums = _sums(passes, step, reduced, row=2 if batch else 1)
        grads[-1], gradient = _layer_backward(passes, step, reduced.dz, sums)
        if needs_x:
            shortcut = Shortcut(*_projection_grad(step, gradient))

    dx = None
    for i in range(last - 1 if gram else last, lowest - 1, -1):
        assert pending is not None
        step = step_of(i)
        sums = of_last if i == last and of_last is not None else _sums(passes, step, pending)
        if i == 0 and step.is_paired:
            grads[0], dx = _both_gradients(step, pending.dz, sums, shortcut)
            continue
        grads[i], gradient = _layer_backward(passes, step, pending.dz, sums)
        if step.wants_dgrad and i > 0:
            pending = Reduced(*_masked_dgrad(passes, step, saved.stats[i - 1], gradient))
        elif step.wants_dgrad:
            dx = input_grad(step.conv, step.layer.weight, x, gradient, shortcut)
    return dx, dresidual, grads


def _sums(passes: Passes, step: _Step, reduced: Reduced, row: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """dgamma, dbeta and the coefficients of dy."""
    wants_dy = step.wants_dgrad or step.needs.weight
    rows, gamma = step.conv.problem.M, step.layer.gamma
    return passes.grad_finalize(reduced.tiles, step.stats, gamma, rows, wants_dy=wants_dy, row=row)


def _layer_backward(
    passes: Passes, step: _Step, dz: Tensor, sums: tuple[Tensor, Tensor, Tensor]
) -> tuple[LayerGrad, Gradient | Formed]:
    """dW, dgamma, dbeta of one layer, and the gradient of its conv's output: formed if a kernel wants it formed."""
    conv, layer, stats = step.conv, step.layer, step.stats
    dgamma: Tensor | None
    dgamma, dbeta, coeffs = sums
    gradient: Gradient | Formed = Gradient(dz, step.y, coeffs)  # without y (frozen statistics) dy = A*dz
    if step.needs_forming:
        gradient = Formed(passes.grad_apply(dz, step.y, coeffs))
    dw = None
    if passes.batch and step.needs.weight:
        below, below_stats = step.input, step.input_stats
        if step.formed_input is not None:
            below, below_stats = step.formed_input, None
        if step.is_vendors:
            below = below if below_stats is None else passes.act(below, below_stats)
            dx, dw = vendor.conv_backward(gradient.dz, below, layer.weight, conv.problem)
            gradient, dw = Formed(gradient.dz, dx=dx), dw.to(layer.weight_dtype)
        else:
            dw = wgrad(passes, conv, layer.weight, below, below_stats, gradient, layer.weight_dtype)
    elif not passes.batch and step.needs.any:
        if conv.wgrad.config is None:
            # dgamma is what T and the mean's share of it all but cancel: 16 bits of T would leave it few digits.
            t_dtype = stats.dtype if step.needs.bn else dz.dtype
            t = vendor.conv_wgrad(step.input, dz, layer.weight, conv.problem, out_dtype=t_dtype)
        else:
            t = wgrad(passes, conv, layer.weight, step.input, None, Formed(dz), stats.dtype)
        dw_dtype = layer.weight_dtype if step.needs.weight else None
        dw, dgamma = frozen_grad(t, layer.weight, stats, dbeta, dw_dtype=dw_dtype, wants_dgamma=step.needs.bn)
    return LayerGrad(dw, dgamma, dbeta) if step.needs.bn else LayerGrad(dw), gradient


def _both_gradients(
    step: _Step, dz: Tensor, sums: tuple[Tensor, Tensor, Tensor], shortcut: Shortcut
) -> tuple[LayerGrad, Tensor]:
    """The gradients of the chain's first layer and of its input, by one kernel."""
    assert step.conv.pair is not None and step.y is not None
    dgamma, dbeta, coeffs = sums
    operands = step.input, dz, step.y, coeffs, step.layer.weight
    dx, dw = conv_pair(
        *operands, step.conv.problem, step.conv.pair, out_dtype=step.layer.weight_dtype, **shortcut._asdict()
    )
    return (LayerGrad(dw, dgamma, dbeta) if step.needs.bn else LayerGrad(dw)), dx


def _vendor_dgrad(conv: ConvPlan, weight: Tensor, x: Tensor, grad: Gradient | Formed) -> Tensor:
    """``x`` gives the shape alone."""
    given = grad.dx if isinstance(grad, Formed) else None
    return vendor.conv_dgrad(grad.dz, x, weight, conv.problem) if given is None else given


def _projection_grad(step: _Step, gradient: Gradient | Formed) -> tuple[Tensor, tuple[int, int]]:
    """dx through the projection and its stride: our kernel writes the sampled pixels of a 1x1 conv only."""
    conv, weight = step.conv, step.layer.weight
    if conv.dgrad.config is None:
        return _vendor_dgrad(conv, weight, step.input, gradient), (1, 1)
    compact = conv.problem.sampled() if conv.problem.is_pointwise else conv.problem
    dx, _ = conv_dgrad(gradient.dz, weight, compact, conv.dgrad.config, y=gradient.y, coeffs=gradient.coeffs)
    return dx, conv.problem.stride if conv.problem.is_pointwise else (1, 1)


def input_grad(conv: ConvPlan, weight: Tensor, x: Tensor, grad: Gradient | Formed, shortcut: Shortcut) -> Tensor:
    """dx of the chain's first conv, the residual branch's share added."""
    config, residual = conv.dgrad.config, shortcut.residual
    if config is None or (config.form != "rows" and residual is not None):
        assert shortcut.residual_bits is None
        if config is None:
            dx = _vendor_dgrad(conv, weight, x, grad)
        else:
            dx, _ = conv_dgrad(grad.dz, weight, conv.problem, config)
        if residual is not None:
            down, right = shortcut.residual_stride
            dx[:, :, ::down, ::right].add_(residual)
            note("add_residual_grad", 0, (residual, residual, residual), {})
        return dx
    dx, _ = conv_dgrad(grad.dz, weight, conv.problem, config, y=grad.y, coeffs=grad.coeffs, **shortcut._asdict())
    return dx


def _masked_dgrad(
    passes: Passes, step: _Step, below_stats: Tensor, gradient: Gradient | Formed
) -> tuple[Tensor, Tensor]:
    """dz of the layer below, behind its ReLU's mask, and the tiles of its BN's reductions."""
    conv, below, weight = step.conv, step.input, step.layer.weight
    if conv.dgrad.config is None:
        da = _vendor_dgrad(conv, weight, below, gradient)
        if passes.batch:
            return passes.grad_reduce(da, below, below_stats)
        return passes.grad_reduce(da, None, below_stats, out=below)
    dz, tiles = conv_dgrad(
        gradient.dz,
        weight,
        conv.problem,
        conv.dgrad.config,
        y=gradient.y,
        coeffs=gradient.coeffs,
        mask_input=below,
        mask_stats=below_stats if passes.batch else None,
    )
    assert tiles is not None
    return dz, tiles
