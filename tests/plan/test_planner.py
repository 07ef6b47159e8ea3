"""The planner: pure, with a reason for everything, and small enough to travel as a string."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from fused_resnet.plan import planner, tables, target
from fused_resnet.plan.config import GemmConfig, supports
from fused_resnet.plan.gram_plan import gram_plan
from fused_resnet.plan.plans import ChainProblem, Choice, ConvPlan, Plan, decode
from fused_resnet.plan.problem import ConvProblem
from fused_resnet.plan.target import A100, H100, INTERPRETER, Target

quick = pytest.mark.quick
pytestmark = quick

TARGETS = [H100, A100, INTERPRETER]
GEOMETRIES = ((16, 1, 1, (1, 1), (0, 0), (1, 1), 1), (16, 3, 3, (2, 2), (1, 1), (1, 1), 1))
PROJECTION = (16, 1, 1, (2, 2), (0, 0), (1, 1), 1)


@pytest.fixture(autouse=True)
def fresh_caches() -> Any:
    for cached in (planner.plan_conv, planner._chain_text):
        cached.cache_clear()
    yield
    for cached in (planner.plan_conv, planner._chain_text):
        cached.cache_clear()


def problem(dtype: str = "float16", residual: str = "projection", **options: Any) -> ChainProblem:
    flags = {"relu": True, "batch_statistics": True, "backward": True, **options}
    shortcut = PROJECTION if residual == "projection" else None
    return planner.chain_problem(dtype, (4, 32, 15, 14), GEOMETRIES, shortcut, residual, **flags)


def test_shapes_follow_each_other() -> None:
    found = problem()
    first, second = found.convs
    assert (first.N, first.H, first.W, first.Ci, first.Co) == (4, 15, 14, 32, 16)
    assert (second.H, second.W, second.Ci, second.P, second.Q) == (15, 14, 16, 8, 7)
    assert found.projection is not None and (found.projection.P, found.projection.Q) == (8, 7)


@pytest.mark.parametrize("on", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("residual", ["none", "identity", "given", "projection"])
def test_a_plan_survives_the_string(on: Target, residual: str) -> None:
    for flags in itertools.product([True, False], repeat=3):
        wanted = dict(zip(("relu", "batch_statistics", "backward"), flags, strict=True))
        plan = planner.plan_chain(problem(residual=residual, **wanted), on)
        again = decode(plan.encode())
        assert again == plan and hash(again) == hash(plan)
        assert again.encode() == plan.encode()
        assert decode(plan.encode()) is again  # decoding costs nothing in a step
    empty = Plan("reference", "no reason")
    assert decode(empty.encode()) == empty


@pytest.mark.parametrize("on", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_choice_has_a_reason_and_a_configuration_that_fits(on: Target, dtype: str) -> None:
    plan = planner.plan_chain(problem(dtype), on)
    assert plan.route in ("staged", "gram") and plan.reason
    for conv in (*plan.convs, plan.projection):
        assert conv is not None
        for kind in tables.PASSES:
            choice: Choice = getattr(conv, kind)
            assert choice.reason and choice.source in ("fused", "vendor")
            assert choice.fused == (choice.config is not None)
            if choice.config is not None:
                assert supports(conv.problem, kind, on, choice.config) == (True, "supported")


@pytest.mark.parametrize(
    ("on", "dtype", "word"),
    [
        (INTERPRETER, "bfloat16", "bfloat16"),
        (H100, "float64", "interpreter"),
        (H100, "int64", "int64"),
        (A100, "complex64", "complex64"),
    ],
)
def test_dtypes_that_take_the_reference_route(on: Target, dtype: str, word: str) -> None:
    plan = planner.plan_chain(problem(dtype), on)
    assert plan.route == "reference" and word in plan.reason and not plan.convs
    sm_count, _, reason = planner.pass_plan(torch.device("cpu"), "bfloat16", 4, "auto")
    if target.interpreted():
        assert sm_count == 0 and "bfloat16" in reason


def test_the_reference_when_asked_for_and_for_an_empty_batch() -> None:
    assert planner.plan_chain(problem(), H100, "reference") == Plan("reference", "asked for")
    empty = replace(problem(), convs=tuple(replace(c, N=0) for c in problem().convs))
    assert planner.plan_chain(empty, H100).reason == "the batch is empty"
    assert planner.plan_chain(problem(), H100, "staged").reason.endswith("asked for")
    assert planner.pass_plan(torch.device("cpu"), "float32", 4, "reference") == (0, False, "asked for")
    if target.interpreted():
        assert planner.pass_plan(torch.device("cpu"), "float32", 0, "auto") == (0, False, "the batch is empty")
        assert planner.pass_plan(torch.device("cpu"), "float32", 4, "auto")[0] > 0


@pytest.mark.parametrize(
    ("change", "kinds", "word"),
    [
        ({"groups": 4}, tables.PASSES, "grouped"),
        ({"R": 8, "S": 8, "padding": (4, 4)}, ("fprop", "dgrad"), "taps"),
        ({"Ci": 8, "R": 3, "S": 3}, tables.PASSES, "input channels"),
    ],
)
def test_what_the_kernels_do_not_take_goes_to_the_vendor(change: dict, kinds: tuple[str, ...], word: str) -> None:
    conv = replace(ConvProblem(4, 16, 16, 64, 64, dtype="float16"), **change)
    plan = planner.plan_conv(conv, H100, first=False)
    for kind in kinds:
        choice = getattr(plan, kind)
        assert choice.source == "vendor" and word in choice.reason


def test_an_unmeasured_1x1_is_ours_and_a_wider_filter_the_vendors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "lookup", lambda *_: None)
    point, wide = ConvProblem(4, 16, 16, 64, 64), ConvProblem(4, 16, 16, 64, 64, 3, 3, padding=(1, 1))
    for kind in tables.PASSES:
        assert getattr(planner.plan_conv(point, H100, first=True), kind).fused
        assert not getattr(planner.plan_conv(wide, H100, first=True), kind).fused
        assert getattr(planner.plan_conv(wide, INTERPRETER, first=True), kind).fused


OURS = GemmConfig(64, 64, 32, num_warps=4)


@pytest.mark.parametrize(
    ("entry", "source"),
    [
        (tables.Entry(OURS, 10.0, 8.0, 5.0, 1.0, "test"), "fused"),
        (tables.Entry(OURS, 10.0, 4.0, 5.0, 1.0, "test"), "vendor"),
        (tables.Entry(OURS, 10.0, None, 0.0, None, "test"), "fused"),
        (tables.Entry(OURS, None, 4.0, 0.0, None, "test"), "vendor"),
        (tables.Entry(None, None, 4.0, 0.0, None, "test"), "vendor"),
    ],
)
@pytest.mark.parametrize("taps", [1, 3])
def test_measurements_decide(entry: tables.Entry, source: str, taps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "lookup", lambda *_: entry)
    conv = ConvProblem(4, 16, 16, 64, 64, taps, taps, padding=(taps // 2, taps // 2))
    plan = planner.plan_conv(conv, H100, first=False)
    for kind in tables.PASSES:
        choice = getattr(plan, kind)
        assert choice.source == source and "measured" in choice.reason
        assert choice.config == (OURS if source == "fused" else None)
    ours = planner.plan_conv(conv, INTERPRETER, first=False)
    assert all(getattr(ours, kind).fused for kind in tables.PASSES)  # nothing was measured there


def test_both_gradients_of_a_1x1_are_weighed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass that forms dy is shared: it is ours, ours from a formed dy, or the vendor's for both."""
    conv, plain = ConvProblem(4, 16, 16, 64, 64), GemmConfig(128, 64, 64)

    def planned(on_load: float, formed: float | None, vendor: float) -> ConvPlan:
        found = {
            "+in": tables.Entry(OURS, on_load, vendor, 1.0, None, "test"),
            "+formed": tables.Entry(plain, formed, vendor, 1.0, None, "test", before_us=2.0),
        }
        monkeypatch.setattr(tables, "lookup", lambda _, name, __: found.get("+" + name.rpartition("+")[2]))
        return planner.plan_conv.__wrapped__(conv, H100, first=True)

    for times, config, forms_dy in (
        ((10.0, 7.0, 20.0), plain, True),
        ((10.0, 9.0, 20.0), OURS, False),
        ((10.0, 7.0, 2.0), None, False),
        ((10.0, None, 20.0), OURS, False),
    ):
        plan = planned(*times)
        assert plan.forms_dy == forms_dy
        for choice in (plan.dgrad, plan.wgrad):
            assert choice.config == config and choice.fused == (config is not None) and "measured" in choice.reason


def test_one_kernel_for_both_gradients_is_never_chosen_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where a table says that it beats every other way to both, of the very problem, in a tile that fits."""
    conv, tile = ConvProblem(4, 16, 16, 64, 64), GemmConfig(32, 64, 64, 4, 4, split=4)

    def planned(pair: tables.Entry | None, *, first: bool = True, on: Target = H100, vendor: float = 50.0) -> ConvPlan:
        found = {name: tables.Entry(OURS, 10.0, vendor, 1.0, None, "test") for name in ("dgrad+in", "wgrad+in")}
        found |= {planner.PAIR: pair} if pair else {}
        monkeypatch.setattr(tables, "lookup", lambda _, name, __: found.get(name))
        return planner.plan_conv.__wrapped__(conv, on, first=first)

    faster, slower = (tables.Entry(tile, us, None, 0.0, None, "test") for us in (19.0, 21.0))
    plan = planned(faster)
    assert plan.pair == tile and plan.dgrad.config == plan.wgrad.config == OURS and not plan.forms_dy
    assert "in one kernel 19 us" in plan.dgrad.reason
    whole = Plan("staged", "a test", problem(), (plan,))
    assert decode(whole.encode()) == whole
    for other in (None, slower, replace(faster, ours=None), replace(faster, us=None), replace(faster, ours=OURS)):
        assert planned(other).pair is None
    assert planned(faster, first=False).pair is None and planned(faster, on=INTERPRETER).pair is None
    assert planned(faster, vendor=5.0).pair is None and not planned(faster, vendor=5.0).dgrad.fused


@pytest.mark.parametrize(("whole", "before", "masked"), [(20.0, 5.0, False), (14.0, 5.0, True), (20.0, None, False)])
def test_the_gram_route_s_configurations_are_the_measured_ones(
    whole: float, before: float | None, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = ConvProblem(64, 14, 14, 256, 1024)
    square, wide = GemmConfig(64, 64, 64, split=7), GemmConfig(64, 256, 32, split=3)
    found = {
        "gram": tables.Entry(square, 9.0, None, 0.0, None, "test"),
        "wgrad+in+gram": tables.Entry(OURS, 10.0, None, 0.0, None, "test", before_us=before),
        "wgrad+in+out+gram": tables.Entry(wide, whole, None, 0.0, None, "test"),
    }
    monkeypatch.setattr(tables, "lookup", lambda _, name, __: found.get(name))
    gram = gram_plan(conv, H100)
    assert gram.gram == square and gram.wgrad == OURS
    assert gram.masked_wgrad == (wide if masked else None)
    monkeypatch.setattr(tables, "lookup", lambda *_: None)
    assert gram_plan(conv, H100).masked_wgrad is None
    assert gram_plan(replace(conv, Ci=128), H100).masked_wgrad is not None


def projected(ci: int, co: int, stride: int = 2, kernel: int = 1, groups: int = 1) -> ChainProblem:
    """A block of bottleneck width ``co`` / 4 whose projection takes ``ci`` channels to ``co``."""
    size, width = (64, 14, 14), co // 4
    pairs = (stride, stride), (kernel // 2, kernel // 2)
    convs = (
        ConvProblem(*size, ci, width),
        ConvProblem(*size, width, width, 3, 3, (stride, stride), (1, 1)),
        ConvProblem(size[0], -(-14 // stride), -(-14 // stride), width, co),
    )
    return ChainProblem(convs, ConvProblem(*size, ci, co, kernel, kernel, *pairs, groups=groups), "projection")


@pytest.mark.parametrize(
    ("problem", "route", "why"),
    [
        (projected(64, 256, 1), "auto", ""),
        (projected(256, 512), "auto", ""),
        (projected(512, 1024), "auto", "512 wide costs more than it saves"),
        (projected(512, 1024), "gram", ""),
        (projected(1024, 2048), "gram", "1024 wide costs more than it saves"),
        (projected(256, 256), "auto", "not a 1x1 that widens"),
        (projected(64, 256, kernel=3), "auto", "not a 1x1 that widens"),
        (projected(64, 256, groups=2), "auto", "not a 1x1 that widens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_projection_goes_the_gram_route_or_the_plan_says_why_not(problem: ChainProblem, route: str, why: str) -> None:
    plan = planner.plan_chain(problem, H100, route)
    assert plan.gram is not None and decode(plan.encode()) == plan
    assert (plan.gram_projection is None) == bool(why)
    said = "; the projection's does: " if why else ", nor the projection's"
    assert said in plan.reason and why in plan.reason


def test_the_gram_route_of_a_projection_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("gram", "fprop+in+gram2", "wgrad+gram2", "dgrad+gram2")
    found = {name: GemmConfig(64, 64, 64, split=i + 2) for i, name in enumerate(names)}
    entries = {name: tables.Entry(config, 9.0, None, 0.0, None, "test") for name, config in found.items()}
    monkeypatch.setattr(tables, "lookup", lambda _, name, __: entries.get(name))
    gram = planner.plan_chain(projected(256, 512), H100).gram
    assert gram is not None and gram.projection is not None
    of_projection = (gram.projection.gram, gram.fprop, gram.projection.wgrad, gram.projection.dgrad)
    assert of_projection == tuple(found.values())


def test_a_measured_configuration_that_does_not_fit_is_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = tables.Entry(GemmConfig(256, 256, 256, num_stages=4), 1.0, 9.0, 0.0, None, "test")
    monkeypatch.setattr(tables, "lookup", lambda *_: huge)
    for taps, source in ((1, "fused"), (3, "vendor")):
        plan = planner.plan_conv(ConvProblem(4, 16, 16, 64, 64, taps, taps), H100, first=False)
        assert plan.fprop.source == source and plan.fprop.config != huge.ours


def test_the_pass_that_is_looked_up_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(tables, "lookup", lambda _problem, name, _target: asked.append(name))
    point, wide = ConvProblem(4, 16, 16, 64, 64), ConvProblem(4, 16, 16, 64, 64, 3, 3, padding=(1, 1))
    for conv, first in itertools.product((point, wide), (True, False)):
        planner.plan_conv(conv, H100, first=first)
    assert asked == [
        *("fprop+out", "dgrad+in", "wgrad+in"),
        *("dgrad+in", "wgrad+in", "dgrad+formed", "wgrad+formed"),  # both gradients, weighed together
        *("fprop+in+out", "dgrad+in+out", "wgrad+in"),
        *("dgrad+in+out", "wgrad+in", "dgrad+out+formed", "wgrad+in+formed"),
        *("fprop+out", "dgrad", "wgrad"),
        *("fprop+out", "dgrad+out", "wgrad"),
    ]


def test_planning_is_pure() -> None:
    """The same question has the same answer, and asking touches no random number, no device and no setting."""
    state = torch.get_rng_state()
    arguments = (torch.device("cpu"), "float32", (2, 32, 9, 9), GEOMETRIES, None, "none", True, True, True, "auto")
    first = planner.chain_plan_text(*arguments)
    for cached in (planner.plan_conv, planner._chain_text):
        cached.cache_clear()
    assert planner.chain_plan_text(*arguments) == first
    assert planner.plan_chain(problem(), H100) == planner.plan_chain(problem(), H100)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(AttributeError):
        planner.plan_chain(problem(), H100).route = "reference"  # type: ignore[misc]


def test_the_question_as_constants_has_the_chains_answer() -> None:
    arguments = ("float32", (2, 32, 9, 9), GEOMETRIES, PROJECTION, "projection", True, False, True)
    text, route, reason = planner.chain_plan_text(torch.device("cpu"), *arguments, "auto")
    if not target.interpreted():
        assert (text, route) == ("", "reference") and "GPU" in reason
        return
    plan = planner.plan_chain(planner.chain_problem(*arguments), INTERPRETER)
    assert decode(text) == plan and (route, reason) == (plan.route, plan.reason)
    asked = planner.chain_plan_text(torch.device("cpu"), *arguments, "reference")
    assert asked == ("", "reference", "asked for")
    text, route, reason = planner.chain_plan_text(torch.device("meta"), *arguments, "auto")
    assert (text, route) == ("", "reference") and "meta" in reason


def test_the_gram_route_has_a_reason_either_way() -> None:
    def chain(co: int = 64, **flags: Any) -> ChainProblem:
        geometries = (GEOMETRIES[0], (co, 1, 1, (1, 1), (0, 0), (1, 1), 1))
        wanted = {"relu": True, "batch_statistics": True, "backward": True, **flags}
        return planner.chain_problem("float16", (4, 32, 15, 14), geometries, None, "none", **wanted)

    plan = planner.plan_chain(chain(), H100)
    assert plan.route == "gram" and plan.gram is not None and plan.reason
    assert decode(plan.encode()) == plan
    for other, word in (
        (chain(co=8), "widens"),
        (chain(relu=False), "ReLU"),
        (chain(batch_statistics=False), "frozen"),
    ):
        for route in ("auto", "gram"):
            staged = planner.plan_chain(other, H100, route)
            assert staged.route == "staged" and word in staged.reason and staged.gram is None
    assert planner.plan_chain(chain(), H100, "staged").gram is None
