"""What the planner decides: frozen, comparable, and small enough to travel through an operator as one string."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

from .config import GemmConfig, SingleConfig
from .problem import ConvProblem


@dataclass(frozen=True)
class Choice:
    """Who runs one pass of one convolution: our kernel with a configuration, or the vendor's."""

    source: str
    reason: str
    config: GemmConfig | None = None

    @property
    def fused(self) -> bool:
        return self.source == "fused"


@dataclass(frozen=True)
class ConvPlan:
    """The three passes of one convolution."""

    problem: ConvProblem
    fprop: Choice
    dgrad: Choice
    wgrad: Choice
    forms_dy: bool = False
    """Of a 1x1: one pass forms dy for both gradients, although our kernels could form it on load."""
    pair: GemmConfig | None = None
    """Of a chain's first 1x1: one kernel computes both gradients where both are asked for."""


@dataclass(frozen=True)
class GramProjection:
    """The configurations of a projection whose output never exists either."""

    gram: GemmConfig
    wgrad: GemmConfig
    dgrad: GemmConfig


@dataclass(frozen=True)
class GramPlan:
    """The configurations of a chain's last 1x1 convolution where its output never exists."""

    gram: GemmConfig
    fprop: GemmConfig
    """With ``projection``, of both products."""
    wgrad: GemmConfig
    """From dz, where a pass formed it for a staged projection too."""
    masked_wgrad: GemmConfig | None
    """From the gradient above the ReLU: forms dz. ``None``: a pass does, and ``wgrad`` reads it."""
    dgrad: GemmConfig
    projection: GramProjection | None = None
    """None where there is none, or where it is staged."""
    stores_a: bool = False
    """The Gram kernel writes the input as it formed it, for fprop to read; else fprop forms it again on load."""
    pivots: bool = False
    """The Gram kernel subtracts a pivot: of all data but bfloat16's, whose digits its sums hold anyway."""
    centres: bool = False
    """Of wide data: backward's kernels subtract the means from what they multiply."""
    stores_dz: bool = True
    """``masked_wgrad`` writes the dz that it forms; else who reads it forms it again, from the mask (if they can:
    :attr:`Plan.stores_dz`)."""


@dataclass(frozen=True)
class ChainProblem:
    """conv -> BN -> ReLU, repeated; the last one with an optional residual before its ReLU.

    ``residual`` is "none", "identity" (the chain's own input), "projection" (a 1x1 conv and BN of that input) or
    "given" (any tensor of the output's shape). ``relu`` is that of the last layer; those between have one always.
    ``batch_statistics`` tells training-mode BN from frozen ones; ``backward`` whether a gradient may be asked for.
    ``recompute`` names what backward computes again rather than keep: "y1", the first convolution's output; ``keep``
    what it keeps rather than form again: "a1", that output behind its BN and ReLU. ``sync`` names the group of
    processes whose batches the statistics are of, all together; empty: this one's alone.
    """

    convs: tuple[ConvProblem, ...]
    projection: ConvProblem | None = None
    residual: str = "none"
    relu: bool = True
    batch_statistics: bool = True
    backward: bool = True
    recompute: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    sync: str = ""


@dataclass(frozen=True)
class Plan:
    """A route with its reason; where the route is not "reference", also who runs each convolution.

    ``gram`` is there on the route "gram" and stands for the last convolution's part of ``convs``; ``single``, on the
    route "single", stands for all. ``sm_count`` and ``interpreter`` describe the target as the bandwidth-bound passes
    need to know it.
    """

    route: str
    reason: str
    problem: ChainProblem | None = None
    convs: tuple[ConvPlan, ...] = ()
    projection: ConvPlan | None = None
    gram: GramPlan | None = None
    single: SingleConfig | None = None
    sm_count: int = 132
    interpreter: bool = False

    @cached_property
    def gram_projection(self) -> GramProjection | None:
        """There where the projection's output does not exist."""
        return self.gram.projection if self.gram else None

    @cached_property
    def keeps_mask(self) -> bool:
        """Whether forward writes the last ReLU's mask for backward: where it does not follow from a raw output y."""
        p = self.problem
        if p is None or not p.relu or not p.backward:
            return False
        follows_from_y = p.batch_statistics and p.residual == "none" and self.gram is None
        return not follows_from_y

    @cached_property
    def keeps_a1(self) -> bool:
        """Whether the second convolution's input, which a pass forms, is kept for its weight gradient."""
        p = self.problem
        if p is None or "a1" not in p.keep or not (p.backward and p.batch_statistics) or len(self.convs) < 2:
            return False
        second = self.convs[1]
        on_load = second.problem.is_pointwise and second.fprop.fused and second.wgrad.fused
        return not on_load and (self.gram is None or len(self.convs) > 2)

    @cached_property
    def stores_dz(self) -> bool:
        """Whether the Gram route writes the gradient behind the last ReLU: where not only its own dgrad reads it, and,
        as the shortcut's gradient, a dgrad of ours."""
        p, first = self.problem, self.convs[0].dgrad.config
        adds = p is not None and p.residual == "identity" and first is not None and first.form == "rows"
        masks = adds or (p is not None and p.residual == "none")
        return not masks or (self.gram is not None and self.gram.stores_dz)

    def encode(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


def _conv_problem(fields: dict[str, Any]) -> ConvProblem:
    pairs = {name: tuple(fields[name]) for name in ("stride", "padding", "dilation")}
    return ConvProblem(**{**fields, **pairs})


def _choice(fields: dict[str, Any]) -> Choice:
    config = fields["config"]
    return Choice(fields["source"], fields["reason"], GemmConfig(**config) if config else None)


def _conv_plan(fields: dict[str, Any]) -> ConvPlan:
    fprop, dgrad, wgrad = (_choice(fields[name]) for name in ("fprop", "dgrad", "wgrad"))
    pair = GemmConfig(**fields["pair"]) if fields["pair"] else None
    return ConvPlan(_conv_problem(fields["problem"]), fprop, dgrad, wgrad, fields["forms_dy"], pair)


def _configs(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: GemmConfig(**value) if isinstance(value, dict) else value for name, value in fields.items()}


@lru_cache(maxsize=4096)
def decode(text: str) -> Plan:
    """The plan that :meth:`Plan.encode` wrote."""
    fields = json.loads(text)
    if fields["problem"] is not None:
        problem = fields["problem"]
        convs = tuple(_conv_problem(conv) for conv in problem["convs"])
        projection = _conv_problem(problem["projection"]) if problem["projection"] else None
        names = {name: tuple(problem[name]) for name in ("recompute", "keep")}
        fields["problem"] = ChainProblem(**{**problem, "convs": convs, "projection": projection, **names})
    fields["convs"] = tuple(_conv_plan(conv) for conv in fields["convs"])
    fields["projection"] = _conv_plan(fields["projection"]) if fields["projection"] else None
    if fields["gram"]:
        projected = fields["gram"].pop("projection")
        fields["gram"] = GramPlan(
            **_configs(fields["gram"]), projection=GramProjection(**_configs(projected)) if projected else None
        )
    if fields["single"]:
        fields["single"] = SingleConfig(**fields["single"])
    return Plan(**fields)
