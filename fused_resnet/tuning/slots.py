"""The places of a plan that hold a kernel's configuration: under which name it is remembered, what may go there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..plan.candidates import candidates, gram_candidates, projection_candidates
from ..plan.config import GemmConfig, supports
from ..plan.conv_pair import pair_candidates
from ..plan.gram_plan import fprop_name
from ..plan.planner import PAIR, staged_pass
from ..plan.plans import Choice, ConvPlan, Plan
from ..plan.problem import ConvProblem
from ..plan.tables import PASSES
from ..plan.target import Target

FEW = 8
"""Candidates of a place, the likeliest."""
Put = Callable[[Plan, GemmConfig], Plan]


@dataclass(frozen=True)
class Slot:
    """``put`` makes the plan with another configuration there; ``get`` the object that a launch of it would carry."""

    problem: ConvProblem
    kind: str
    pass_: str
    candidates: tuple[GemmConfig, ...]
    get: Callable[[Plan], GemmConfig | None]
    put: Put

    @property
    def name(self) -> str:
        p = self.problem
        return f"{self.pass_} {p.R}x{p.S}/{p.stride[0]} {p.H}px {p.Ci}->{p.Co}"


def convs(plan: Plan) -> list[tuple[str, int, ConvPlan]]:
    """Those that the plan runs as staged ones: the field that holds each, its place there, and its plan."""
    written = plan.convs if plan.gram is None else plan.convs[:-1]
    found = [("convs", i, conv) for i, conv in enumerate(written)]
    if plan.projection is not None and plan.gram_projection is None:
        found.append(("projection", 0, plan.projection))
    return found


def with_conv(plan: Plan, where: str, i: int, conv: ConvPlan) -> Plan:
    if where == "projection":
        return replace(plan, projection=conv)
    return replace(plan, convs=(*plan.convs[:i], conv, *plan.convs[i + 1 :]))


def ours(plan: Plan, target: Target, formed: bool) -> Plan:
    """The plan with our kernel wherever one runs. ``formed``: a pass forms dy for both gradients of a 1x1."""
    for where, i, conv in convs(plan):
        first, pointwise = where == "projection" or i == 0, conv.problem.is_pointwise
        choices: dict[str, Any] = {}
        for kind in PASSES:
            as_formed = formed and pointwise and kind != "fprop"
            found = _candidates(plan, conv.problem, kind, target, as_formed, first)
            fits = found and supports(conv.problem, kind, target, found[0], formed=as_formed)[0]
            choices[kind] = Choice("fused", "to be measured", found[0]) if fits else getattr(conv, kind)
        plan = with_conv(plan, where, i, replace(conv, **choices, forms_dy=formed and pointwise, pair=None))
    return plan


def paired(plan: Plan, target: Target) -> Plan:
    """The plan with both gradients of the chain's first convolution by one kernel, where there is one."""
    first = plan.convs[0]
    found = pair_candidates(first.problem, target)
    return with_conv(plan, "convs", 0, replace(first, pair=found[0])) if found else plan


def by_vendor(plan: Plan, where: str, i: int, kinds: tuple[str, ...]) -> Plan:
    """The plan with the vendor's convolution for these passes."""
    conv = plan.projection if where == "projection" else plan.convs[i]
    assert conv is not None
    choices: dict[str, Any] = {kind: Choice("vendor", "to be measured") for kind in kinds}
    return with_conv(plan, where, i, replace(conv, **choices))


def slots(plan: Plan, target: Target) -> list[Slot]:
    """Every place of the plan that has something to choose from."""
    found = [slot for where, i, conv in convs(plan) for slot in _of_conv(plan, where, i, conv, target)]
    return [slot for slot in (*found, *_of_gram(plan, target)) if slot.candidates]


def _candidates(
    plan: Plan, problem: ConvProblem, kind: str, target: Target, formed: bool, first: bool
) -> tuple[GemmConfig, ...]:
    if problem.is_stem and kind == "dgrad":
        return ()
    found = candidates(problem, kind, target, formed=formed, most=FEW)
    assert plan.problem is not None
    if kind == "dgrad" and first and plan.problem.residual in ("identity", "projection"):
        found = [config for config in found if config.form == "rows"]  # boxes add no other gradient
    return tuple(found)


def _of_conv(plan: Plan, where: str, i: int, conv: ConvPlan, target: Target) -> Iterator[Slot]:
    first = where == "projection" or i == 0
    if conv.pair is not None:
        yield Slot(conv.problem, "pair", PAIR, tuple(pair_candidates(conv.problem, target)[:FEW]), *_PAIR)
    for kind in PASSES:
        if getattr(conv, kind).config is None:
            continue
        formed = conv.forms_dy and kind != "fprop"

        def get(plan: Plan, kind: str = kind) -> GemmConfig | None:
            held = plan.projection if where == "projection" else plan.convs[i]
            return None if held is None else getattr(held, kind).config

        def put(plan: Plan, config: GemmConfig, kind: str = kind) -> Plan:
            held = plan.projection if where == "projection" else plan.convs[i]
            assert held is not None
            chosen: dict[str, Any] = {kind: Choice("fused", "to be measured", config)}
            return with_conv(plan, where, i, replace(held, **chosen))

        pass_ = staged_pass(conv.problem, kind, first, formed)
        yield Slot(conv.problem, kind, pass_, _candidates(plan, conv.problem, kind, target, formed, first), get, put)


def _put_pair(plan: Plan, config: GemmConfig) -> Plan:
    return with_conv(plan, "convs", 0, replace(plan.convs[0], pair=config))


_PAIR: tuple[Callable[[Plan], GemmConfig | None], Put] = (lambda plan: plan.convs[0].pair, _put_pair)


def _of_gram(plan: Plan, target: Target) -> Iterator[Slot]:
    if plan.gram is None:
        return
    last, joined = plan.convs[-1].problem, plan.gram.projection is not None
    tiles = projection_candidates(last, target) if joined else candidates(last, "fprop", target, epilogue="residual")
    masked = plan.gram.masked_wgrad is not None
    if masked:
        wgrad = ("masked_wgrad", "wgrad", "wgrad+in+out+gram", gram_candidates(last, "wgrad", target))
    else:
        wgrad = ("wgrad", "wgrad", "wgrad+in+gram", candidates(last, "wgrad", target, formed=True))
    dgrad = "dgrad+gram" if plan.gram.stores_dz or not masked else "dgrad+in+gram"
    for name, kind, pass_, found in (
        ("gram", "gram", "gram", gram_candidates(last, "gram", target)),
        ("fprop", "fprop", fprop_name(plan.gram.stores_a, joined), tiles),
        wgrad,
        ("dgrad", "dgrad", dgrad, gram_candidates(last, "dgrad", target)),
    ):
        yield Slot(last, kind, pass_, tuple(found[:FEW]), *_in_gram(name))
    if plan.projection is not None and plan.gram.projection is not None:
        p = plan.projection.problem
        for name, kind, pass_, found in (
            ("gram", "gram", "gram", gram_candidates(p, "gram", target)),
            ("wgrad", "wgrad", "wgrad+gram2", candidates(p, "wgrad", target, formed=True)),
            ("dgrad", "dgrad", "dgrad+gram2", gram_candidates(p, "dgrad", target)),
        ):
            yield Slot(p, kind, pass_, tuple(found[:FEW]), *_in_gram_projection(name))


def _in_gram(name: str) -> tuple[Callable[[Plan], GemmConfig | None], Put]:
    def get(plan: Plan) -> GemmConfig | None:
        return getattr(plan.gram, name) if plan.gram else None

    def put(plan: Plan, config: GemmConfig) -> Plan:
        assert plan.gram is not None
        changed: dict[str, Any] = {name: config}
        return replace(plan, gram=replace(plan.gram, **changed))

    return get, put


def _in_gram_projection(name: str) -> tuple[Callable[[Plan], GemmConfig | None], Put]:
    def get(plan: Plan) -> GemmConfig | None:
        return getattr(plan.gram_projection, name) if plan.gram_projection else None

    def put(plan: Plan, config: GemmConfig) -> Plan:
        assert plan.gram is not None and plan.gram.projection is not None
        changed: dict[str, Any] = {name: config}
        return replace(plan, gram=replace(plan.gram, projection=replace(plan.gram.projection, **changed)))

    return get, put
