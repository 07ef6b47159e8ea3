"""The Gram route: a chain's last 1x1 conv, its BN, residual and ReLU, without the conv's output existing at any time.

Forward, the statistics follow from the Gram matrix of the conv's input before the conv runs, and conv, BN, residual and
ReLU are one GEMM. A projection may join it as a second product, by a Gram matrix of its own. Backward needs T = dz^T a,
the matrices kept from forward, and one GEMM over [dz | a]. The identities are in kernels/gram_bn.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..launch.bn_act_grad import bn_grad_finalize
from ..launch.collective import all_gather
from ..launch.conv_fprop import Projection, conv_fprop
from ..launch.conv_wgrad import conv_wgrad
from ..launch.gram import GramGrads, gram, gram_backward, gram_finalize
from ..launch.gram_bn_grad import Others
from ..launch.gram_dgrad import gram_dgrad
from ..launch.gram_rows import gram_sums
from ..launch.gram_wgrad import gram_wgrad
from ..plan.plans import Plan
from .layer import Layer, LayerGrad, Needs, Reduced, finalize_packed

Tensor = torch.Tensor


class Kept(NamedTuple):
    """Of a conv output that was never written: ``stats`` [4, q], ``covariance`` W Cov [q, p], and ``moments``.

    The latter are those of ``gram_finalize``; of wide data, the mean of its input alone.
    """

    stats: Tensor
    covariance: Tensor
    moments: Tensor


class Behind(NamedTuple):
    """The gradient behind the chain's last ReLU, and its sum over the pixels.

    With ``bits`` it was not written: ``dz`` is the gradient above the ReLU, whose mask they are.
    """

    dz: Tensor
    sum_dz: Tensor
    bits: Tensor | None = None


def forward(
    plan: Plan,
    layer: Layer,
    y: Tensor,
    y_stats: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    projection_layer: Layer,
    x: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Kept, Kept | None]:
    """out = relu(bn(conv(a)) + residual), a = relu(bn(y)), and what backward needs of both convs.

    A residual with ``residual_stats`` is a raw projection. Where the plan has a projection of the Gram route, that of
    ``x`` by ``projection_layer`` takes the residual's place. ``mask``, if given, takes up the ReLU's mask.
    """
    assert plan.gram is not None and plan.problem is not None
    problem, weight = plan.convs[-1].problem, layer.weight
    sync, projection, kept_projection = plan.problem.sync, None, None
    if plan.gram.projection is not None:
        assert plan.projection is not None
        projected = plan.projection.problem
        pivot = pixels(x) if plan.gram.pivots else None
        *products, _ = gram(x, None, plan.gram.projection.gram, stride=projected.stride, pivot=pivot)
        kept_projection = _statistics(projection_layer, projected.M, *products, sync=sync, pivot=pivot)
        projection = Projection(x, projection_layer.weight, projected, kept_projection.stats[2:])
    pivot, of_pivot = (y_stats[:2], y_stats[2:]) if plan.gram.pivots else (None, None)
    *products, a = gram(y, y_stats[2:], plan.gram.gram, store_a=plan.gram.stores_a, pivot=pivot)
    kept = _statistics(layer, problem.M, *products, sync=sync, pivot=pivot, input_affine=of_pivot)
    out, _ = conv_fprop(
        y if a is None else a,
        weight,
        problem,
        plan.gram.fprop,
        input_affine=y_stats[2:] if a is None else None,
        output_affine=kept.stats[2:],
        residual=residual,
        residual_affine=None if residual_stats is None else residual_stats[2:],
        projection=projection,
        relu=plan.problem.relu,
        bits=mask,
    )
    return out, kept, kept_projection


SEEN = 32
"""Pixels that tell whether an input of 16 bits is far from zero."""


def pixels(x: Tensor) -> Tensor:
    """A pivot for an input without statistics: one in the middle; of 16-bit data some from all over."""
    if x.element_size() > 2:
        return x[x.shape[0] // 2, :, x.shape[2] // 2, x.shape[3] // 2][None]
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    seen = min(SEEN, 1 << (len(rows).bit_length() - 1))
    step = len(rows) // seen
    return rows[step // 2 :: step][:seen]


def _statistics(
    layer: Layer,
    rows: int,
    products: Tensor,
    sums: Tensor,
    *,
    sync: str,
    pivot: Tensor | None,
    input_affine: Tensor | None = None,
) -> Kept:
    found, *rest = gram_finalize(
        products,
        sums,
        rows,
        layer.weight,
        gamma=layer.gamma,
        beta=layer.beta,
        running_mean=layer.running_mean,
        running_var=layer.running_var,
        momentum=layer.momentum,
        eps=layer.eps,
        counter=layer.counter,
        pivot=pivot,
        input_affine=input_affine,
        packs=bool(sync),
    )
    return Kept(finalize_packed(found, sync, **layer.bn) if sync else found, *rest)


def backward(
    plan: Plan,
    layer: Layer,
    kept: Kept,
    y: Tensor,
    y_stats: Tensor,
    needs: Needs,
    dout: Tensor,
    mask: Tensor | None,
    reduced: Reduced | None,
    wants_dgrad: bool,
) -> tuple[LayerGrad, Behind, Reduced | None]:
    """The layer's gradients; dz behind its ReLU; and, if wanted, the same behind the ReLU of the layer below.

    ``y`` and ``y_stats`` are the layer's below. ``reduced`` is what a pass over ``dout`` found already (a staged
    projection shares it, or the plan has no ``masked_wgrad``); without it the weight gradient forms dz and its sums on
    the way, from ``dout`` and the ReLU's ``mask``.
    """
    assert plan.gram is not None
    problem = plan.convs[-1].problem
    input_mean = kept.moments if plan.gram.centres else None
    if reduced is None:
        assert mask is not None and plan.gram.masked_wgrad is not None
        products, sum_dz, written = gram_wgrad(
            dout, mask, y, y_stats[2:], plan.gram.masked_wgrad, store_dz=plan.stores_dz, input_mean=input_mean
        )
        dz, bits = (dout, mask) if written is None else (written, None)
    else:
        dz, bits = reduced.dz, None
        _, sum_dz, _ = bn_grad_finalize(reduced.tiles, kept.stats, layer.gamma, problem.M)
        products = conv_wgrad(
            y,
            dz,
            problem,
            plan.gram.wgrad,
            input_affine=y_stats[2:],
            input_mean=input_mean,
            out_dtype=kept.stats.dtype,
        )
    grads, below = LayerGrad(), None
    if needs.any or wants_dgrad:
        small = _small(plan, layer, kept, products, sum_dz, problem.M, wants_dy=needs.weight or wants_dgrad)
        grads = _wanted(small, needs)
        if wants_dgrad:
            matrices, config = (small.aw, small.p, small.bias), plan.gram.dgrad
            means = None if input_mean is None else (small.owed, input_mean)
            dx, tiles = gram_dgrad(
                dz, y, *matrices, y_stats, config, aw_terms=small.aw_terms, scales=small.scales, bits=bits, means=means
            )
            assert tiles is not None
            below = Reduced(dx, tiles)
    return grads, Behind(dz, sum_dz, bits), below


def projection_backward(
    plan: Plan, layer: Layer, kept: Kept, x: Tensor, needs: Needs, behind: Behind, wants_dgrad: bool
) -> tuple[LayerGrad, Tensor | None]:
    """The projection's gradients, and, if wanted, that of the pixels of ``x`` which it samples."""
    assert plan.gram_projection is not None and plan.projection is not None
    configs, problem, dz = plan.gram_projection, plan.projection.problem, behind.dz
    assert plan.gram is not None
    input_mean = kept.moments if plan.gram.centres else None
    products = conv_wgrad(x, dz, problem, configs.wgrad, input_mean=input_mean, out_dtype=kept.stats.dtype)
    wants_dy = needs.weight or wants_dgrad
    small = _small(plan, layer, kept, products, behind.sum_dz, problem.M, wants_dy=wants_dy)
    dx = None
    if wants_dgrad:
        matrices = small.aw, small.p, small.bias
        means = None if input_mean is None else (small.owed, input_mean)
        dx, _ = gram_dgrad(
            dz,
            x,
            *matrices,
            None,
            configs.dgrad,
            aw_terms=small.aw_terms,
            scales=small.scales,
            stride=problem.stride,
            means=means,
        )
    return _wanted(small, needs), dx


def _small(
    plan: Plan, layer: Layer, kept: Kept, products: Tensor, sum_dz: Tensor, rows: int, *, wants_dy: bool
) -> GramGrads:
    """The gradients of a layer's parameters, and the small matrices of its input's."""
    assert plan.gram is not None and plan.problem is not None
    centred, sync, others = plan.gram.centres, plan.problem.sync, None
    if sync:
        packed = gram_sums(
            products, kept.moments[: layer.weight.shape[1]], kept.stats, layer.weight, sum_dz, rows, centred=centred
        )
        # Without anybody who wants dy nobody else is asked: gradients of parameters are by this process's rows alone.
        others = Others(all_gather(packed, sync) if wants_dy else packed[None], kept.moments)
    return gram_backward(
        products,
        kept.covariance,
        None if centred else kept.moments,
        kept.stats,
        layer.weight,
        sum_dz,
        rows,
        out_dtype=layer.weight_dtype,
        others=others,
    )


def _wanted(small: GramGrads, needs: Needs) -> LayerGrad:
    wanted = (needs.weight, needs.bn, needs.bn)
    return LayerGrad(*(t if is_wanted else None for t, is_wanted in zip(small[:3], wanted, strict=True)))
