"""The Gram route: a chain's last 1x1 conv, its BN, residual and ReLU, without the conv's output existing at any time.

Forward, the statistics follow from the Gram matrix of the conv's input before the conv runs, and conv, BN, residual and
ReLU are one GEMM. Backward needs T = dz^T a, the matrices kept from forward, and one GEMM over [dz | a]. The identities
are in kernels/gram.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..launch.bn_act_grad import bn_grad_finalize
from ..launch.conv_fprop import conv_fprop
from ..launch.conv_wgrad import conv_wgrad
from ..launch.gram import gram, gram_backward, gram_finalize
from ..launch.gram_dgrad import gram_dgrad
from ..launch.gram_wgrad import gram_wgrad
from ..plan.plans import Plan
from .layer import Layer, LayerGrad, Needs, Reduced

Tensor = torch.Tensor


class Output(NamedTuple):
    """``covariance``: W Cov [q, p]; ``input_mean`` [p]; ``stats`` [4, q] of the conv output that was never written."""

    out: Tensor
    stats: Tensor
    covariance: Tensor
    input_mean: Tensor


def forward(
    plan: Plan, layer: Layer, y: Tensor, y_stats: Tensor, residual: Tensor | None, residual_stats: Tensor | None
) -> Output:
    """out = relu(bn(conv(a)) + residual), a = relu(bn(y)); a residual with ``residual_stats`` is a raw projection."""
    assert plan.gram is not None and plan.problem is not None
    problem, weight = plan.convs[-1].problem, layer.weight
    products, sums = gram(y, y_stats[2:], plan.gram.gram)
    stats, covariance, input_mean = gram_finalize(
        products,
        sums,
        problem.M,
        weight,
        gamma=layer.gamma,
        beta=layer.beta,
        running_mean=layer.running_mean,
        running_var=layer.running_var,
        momentum=layer.momentum,
        eps=layer.eps,
        counter=layer.counter,
    )
    out, _ = conv_fprop(
        y,
        weight,
        problem,
        plan.gram.fprop,
        input_affine=y_stats[2:],
        output_affine=stats[2:],
        residual=residual,
        residual_affine=None if residual_stats is None else residual_stats[2:],
        relu=plan.problem.relu,
    )
    return Output(out, stats, covariance, input_mean)


def backward(
    plan: Plan,
    layer: Layer,
    kept: Output,
    y: Tensor,
    y_stats: Tensor,
    needs: Needs,
    dout: Tensor,
    reduced: Reduced | None,
    wants_dgrad: bool,
) -> tuple[LayerGrad, Tensor, Reduced | None]:
    """The layer's gradients; dz behind its ReLU; and, if wanted, the same behind the ReLU of the layer below.

    ``y`` and ``y_stats`` are the layer's below. ``reduced`` is what a pass over ``dout`` found already (a projection
    shares it, or the plan has no ``masked_wgrad``); without it the weight gradient forms dz and its sums on the way.
    """
    assert plan.gram is not None
    problem, weight = plan.convs[-1].problem, layer.weight
    if reduced is None:
        assert plan.gram.masked_wgrad is not None
        products, sum_dz, dz = gram_wgrad(dout, kept.out, y, y_stats[2:], plan.gram.masked_wgrad, store_dz=True)
        assert dz is not None
        sum_dz = sum_dz.clone()  # it becomes the gradient of beta, which must not keep the products' memory
    else:
        dz = reduced.dz
        _, sum_dz, _ = bn_grad_finalize(reduced.tiles, kept.stats, layer.gamma, problem.M)
        products = conv_wgrad(y, dz, problem, plan.gram.wgrad, input_affine=y_stats[2:], out_dtype=kept.stats.dtype)
        products = products.flatten(1)
    small = gram_backward(
        products,
        kept.covariance,
        kept.input_mean,
        kept.stats,
        weight,
        sum_dz,
        problem.M,
        out_dtype=layer.weight_dtype,
    )
    below = None
    if wants_dgrad:
        below = Reduced(
            *gram_dgrad(dz, y, small.aw, small.p, small.bias, y_stats, plan.gram.dgrad, scales=small.scales)
        )
    wanted = (needs.weight, needs.bn, needs.bn)
    dw, dgamma, dbeta = (t if is_wanted else None for t, is_wanted in zip(small[:3], wanted, strict=True))
    return LayerGrad(dw, dgamma, dbeta), dz, below
