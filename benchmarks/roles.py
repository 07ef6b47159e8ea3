"""Which cases a layer of a network makes: its passes, as its role in a block has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fused_resnet.plan.gram_plan import MOST_GRAM_WIDTH
from fused_resnet.plan.tables import KINDS

from . import problems
from .cases import ConvCase
from .pairs import pair_cases
from .projections import projection_cases


def cases(layer: problems.Layer, kinds: tuple[str, ...] = KINDS) -> list[ConvCase]:
    """What is measured of a layer, as its role in a block has it. The stem's images need no gradient."""
    p, role = layer.problem, layer.role
    if role == "stem":
        found = (ConvCase(p, "fprop", role, stats=True), ConvCase(p, "wgrad", role))
        return [case for case in found if case.kind in kinds]
    pointwise, first = p.is_pointwise, role in ("conv1", "projection")
    strided = role == "projection" and p.stride != (1, 1)
    make: dict[str, Callable[[], ConvCase]] = {
        "fprop": lambda: ConvCase(p, "fprop", role, affine=role == "conv3", stats=True),
        "dgrad": lambda: ConvCase(
            p, "dgrad", role, coeffs=pointwise, stats=not first, residual=role == "conv1", compact=strided
        ),
        "wgrad": lambda: ConvCase(p, "wgrad", role, coeffs=pointwise, affine=role == "conv3"),
    }
    found = [make[kind]() for kind in kinds if kind in make]
    if pointwise and first:  # both gradients again, from a dy that one pass formed
        found += [replace(case, coeffs=False, formed=True) for case in found if case.coeffs]
    if role == "conv3" and p.Ci <= MOST_GRAM_WIDTH:
        wgrad = ConvCase(p, "wgrad", role, affine=True, gram=True)
        grams = (
            ConvCase(p, "fprop", role, affine=True, gram=True),
            ConvCase(p, "fprop", role, formed=True, gram=True),
            ConvCase(p, "dgrad", role, stats=True, gram=True),
            ConvCase(p, "dgrad", role, stats=True, gram=True, masked=True),
            wgrad,
            replace(wgrad, masked=True),
            ConvCase(p, "gram", role, affine=True, gram=True),
        )
        found += [case for case in grams if case.kind in kinds]
    if role == "projection" and layer.bottleneck and p.Ci <= MOST_GRAM_WIDTH:
        found += [case for case in projection_cases(p) if case.kind in kinds]
    return found + (pair_cases(layer) if "pair" in kinds else [])
