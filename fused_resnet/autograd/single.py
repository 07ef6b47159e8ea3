"""The single route: a whole bottleneck with frozen statistics as one launch, where no gradient is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..launch.bottleneck_single import FrozenLayer, bottleneck_single
from ..plan.plans import Plan
from .layer import Layer

Tensor = torch.Tensor


def forward(plan: Plan, x: Tensor, residual: Tensor | None, layers: Sequence[Layer]) -> Tensor:
    """``layers``: the three of the chain, then the projection's if there is one."""
    assert plan.problem is not None and plan.single is not None
    first, second, third, *shortcut = map(_frozen, layers)
    return bottleneck_single(
        x,
        (first, second, third),
        plan.problem,
        plan.single,
        projection=shortcut[0] if shortcut else None,
        residual=x if plan.problem.residual == "identity" else residual,
    )


def _frozen(layer: Layer) -> FrozenLayer:
    assert layer.running_mean is not None and layer.running_var is not None
    return FrozenLayer(layer.weight, layer.gamma, layer.beta, layer.running_mean, layer.running_var, layer.eps)
