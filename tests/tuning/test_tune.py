"""Tuning with the device's clock replaced: every line of it runs, on tiny chains in the interpreter."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet import compiling
from fused_resnet.autograd import staged_backward
from fused_resnet.explain import image_like
from fused_resnet.launch import record
from fused_resnet.plan import planner, store, tables
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.plans import ChainProblem
from fused_resnet.plan.problem import ConvProblem
from fused_resnet.plan.target import H100, Assumption, assume
from fused_resnet.tuning import measure, slots, tune
from fused_resnet.tuning.chain import ChainStep, why_wrong
from fused_resnet.tuning.stopwatch import Lap, Step, Stopwatch
from tests.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="stands in for a GPU with the interpreter")

HERE = replace(H100, name="NVIDIA Test GPU", sm_count=4)  # so that no kernel is cut into many programs
CPU = torch.device("cpu")
FIRST = ConvProblem(2, 6, 6, 64, 64, dtype="float16")
CHAIN = ChainProblem((FIRST, replace(FIRST, Co=128)), residual="given")
"""Two 1x1 convolutions, the last one wider: it has a Gram route."""
ONE = ChainProblem((FIRST,))
QUICK = pytest.mark.quick


class Clock(Stopwatch):
    """The host's clock where a device's would be; kernels take what ``cost`` says of their configurations."""

    def __init__(self, cost: Callable[[GemmConfig], float], routes: dict[str, float] | None = None) -> None:
        super().__init__(CPU)
        self.cost, self.routes, self.now = cost, routes or {}, 0.0

    def mark(self) -> float:
        self.now += 1e-6
        return self.now

    def between(self, start: float, end: float) -> float:
        return (end - start) * 1e6

    def synchronize(self) -> None:
        pass

    def hold(self, seconds: float) -> None:
        pass

    def pool(self) -> None:
        pass

    def captured(self, step: Step, pool: Any) -> Step:
        return step

    def kernels(self, step: Step, samples: int = 1) -> list[Lap]:
        laps = super().kernels(step, samples)
        return [lap._replace(us=self.cost(lap.config)) if isinstance(lap.config, GemmConfig) else lap for lap in laps]

    def steps(self, steps: Any, samples: int = 1) -> dict[str, float]:
        return {name: self.routes.get(name, us) for name, us in super().steps(steps, samples).items()}


def by_width(config: GemmConfig) -> float:
    """The narrowest is the fastest: not what the cost model would say."""
    return float(config.block_m + config.block_n + config.num_stages)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    store.forget()
    with assume(Assumption(HERE)):
        yield tmp_path / "tuned"
    store.forget()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two candidates for each place."""
    monkeypatch.setattr(slots, "FEW", 2)


def said() -> tuple[list[str], Callable[[str], None]]:
    lines: list[str] = []
    return lines, lines.append


def run(clock: Clock, chains: dict[ChainProblem, int], minutes: float = 5.0) -> tuple[store.Remembered, list[str]]:
    lines, say = said()
    return tune.tune_chains(Counter(chains), HERE, CPU, minutes, clock, say), lines


def test_the_fastest_of_each_kernel_and_of_the_routes_is_kept(few: None) -> None:
    before = planner.plan_chain(CHAIN, HERE)
    found, lines = run(Clock(by_width, {"staged": 5.0, "gram": 9.0, "reference": 7.0}), {CHAIN: 3})
    last = found.entries[tables.problem_key(CHAIN.convs[-1])]
    assert {"fprop+in+out", "dgrad+in+out", "wgrad+in", "gram", "dgrad+gram"} <= set(last)
    assert any(name.startswith("fprop") and name.endswith(("gram", "gram+formed")) for name in last)
    for slot in slots.slots(slots.ours(planner.plan_chain(CHAIN, HERE, "staged"), HERE, formed=False), HERE):
        entry = found.entries[tables.problem_key(slot.problem)][slot.pass_]
        assert entry["us"] == min(map(by_width, slot.candidates)), slot.name
        assert entry["vendor_us"] is not None and entry["floor_us"] > 0
    assert found.routes[tables.chain_key(CHAIN)]["us"] == {"gram": 9.0, "staged": 5.0, "reference": 7.0}
    plan = planner.plan_chain(CHAIN, HERE)
    assert plan.route == "staged" != before.route and plan.reason.startswith("measured: staged 5 us, reference 7 us")
    assert any("2 tried" in line for line in lines)


def test_it_is_on_disk_for_the_next_process_and_is_not_measured_again(few: None, place: Path) -> None:
    run(Clock(by_width, {"reference": 0.5}), {CHAIN: 1})
    assert len(list(place.iterdir())) == 1
    store.forget()
    store.load()
    assert planner.plan_chain(CHAIN, HERE).route == "reference"

    class Unwanted(Clock):
        def kernels(self, step: Step, samples: int = 1) -> list[Lap]:
            raise AssertionError("measured already")

    found, lines = run(Unwanted(by_width), {CHAIN: 1})
    assert not lines and tables.chain_key(CHAIN) in found.routes


@QUICK
def test_no_time_is_no_measurement(place: Path) -> None:
    found, lines = run(Clock(by_width), {CHAIN: 1}, minutes=0)
    assert not found.routes and "the time is up: 1 of 1" in lines[0] and not place.exists()


@QUICK
def test_the_most_valuable_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[ChainProblem] = []

    class Noted:
        def __init__(self, problem: ChainProblem, *_: Any) -> None:
            order.append(problem)

        def run(self) -> None:
            raise RuntimeError("not today")

    monkeypatch.setattr(tune, "ChainTuner", Noted)
    big = replace(CHAIN, convs=tuple(replace(conv, N=4096) for conv in CHAIN.convs))
    _, lines = run(Clock(by_width), {CHAIN: 1, big: 1})
    assert order == [big, CHAIN] and sum("is left out: RuntimeError: not today" in line for line in lines) == 2
    order.clear()
    run(Clock(by_width), {CHAIN: 10_000, big: 1})
    assert order == [CHAIN, big]


def _broken(monkeypatch: pytest.MonkeyPatch, bad: Callable[[GemmConfig], bool], how: str) -> None:
    """Our fprop of the first convolution goes wrong with the configurations that ``bad`` picks."""
    from fused_resnet.autograd import staged_forward

    real = staged_forward.conv_fprop

    def conv_fprop(x: Any, weight: Any, problem: ConvProblem, config: GemmConfig, **more: Any) -> Any:
        if bad(config) and how == "raises":
            raise RuntimeError("ptxas died\nout of registers")
        y, tiles = real(x, weight, problem, config, **more)
        if bad(config):
            y.zero_()
        return y, tiles

    monkeypatch.setattr(staged_forward, "conv_fprop", conv_fprop)


@pytest.mark.parametrize(("how", "words"), [("raises", "RuntimeError: out of registers"), ("zeros", "is off by")])
def test_a_wrong_or_failing_kernel_is_named_and_left_out(
    few: None, monkeypatch: pytest.MonkeyPatch, how: str, words: str
) -> None:
    plan = slots.ours(planner.plan_chain(CHAIN, HERE, "staged"), HERE, formed=False)
    places = [slot for slot in slots.slots(plan, HERE) if slot.kind == "fprop"]
    fastest = min(places[0].candidates, key=by_width)
    _broken(monkeypatch, lambda config: config == fastest, how)
    found, lines = run(Clock(by_width, {"staged": 1.0}), {CHAIN: 1})
    assert any(line.startswith(places[0].name) and "is left out" in line and words in line for line in lines)
    for slot in places:
        if fastest in slot.candidates:
            entry = found.entries[tables.problem_key(slot.problem)][slot.pass_]
            assert GemmConfig(**entry["config"]) != fastest
    others = [slot for slot in slots.slots(plan, HERE) if slot.kind != "fprop"]
    for slot in others:
        us = found.entries[tables.problem_key(slot.problem)][slot.pass_]["us"]
        assert us == min(map(by_width, slot.candidates)), "the others did not lose a candidate by it"


def test_a_vendor_that_is_faster_is_taken(few: None) -> None:
    found, _ = run(Clock(by_width, {"ours": 100.0, "convs 0 fprop": 10.0, "convs 1 fprop": 400.0}), {CHAIN: 1})
    first, last = (found.entries[tables.problem_key(conv)] for conv in CHAIN.convs)
    assert first["fprop+out"]["vendor_us"] == max(0.0, first["fprop+out"]["us"] - 90.0)
    assert last["fprop+in+out"]["vendor_us"] == last["fprop+in+out"]["us"] + 300.0
    plan = planner.plan_chain(CHAIN, HERE, "staged")
    assert (plan.convs[0].fprop.source, plan.convs[1].fprop.source) == ("vendor", "fused")


def test_dy_is_formed_before_where_the_step_is_faster_by_it(few: None) -> None:
    for formed, expected in ((900.0, False), (1.0, True)):
        for path in store.folder().glob("*"):
            path.unlink()
        run(Clock(by_width, {"on load": 500.0, "formed": formed, "ours": 5.0, "convs 0 dgrad+wgrad": 9e3}), {ONE: 1})
        assert planner.plan_conv(FIRST, HERE, first=True).forms_dy is expected


@pytest.mark.parametrize(("us", "taken"), [(1.0, True), (1e6, False)])
def test_one_kernel_computes_both_gradients_where_that_is_faster(
    few: None, us: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = [GemmConfig(rows, 32, 64, 4, 2) for rows in (16, 32)]  # no other kernel's
    monkeypatch.setattr(slots, "pair_candidates", lambda *_: tiles)
    clock = Clock(lambda config: us if config in tiles else by_width(config), {"ours": 5.0, "convs 0 dgrad+wgrad": 9e3})
    found, lines = run(clock, {ONE: 1})
    entry = found.entries[tables.problem_key(FIRST)][planner.PAIR]
    assert entry["us"] == us and entry["floor_us"] > 0 and any(line.startswith("pair+in") for line in lines)
    plan = planner.plan_conv(FIRST, HERE, first=True)
    assert (plan.pair in tiles) is taken and "in one kernel" in plan.dgrad.reason and not plan.forms_dy
    assert plan.dgrad.config not in tiles and planner.plan_conv(FIRST, HERE, first=False).pair is None
    step = ChainStep(ONE, CPU)
    with fr.record_launches() as launches:
        step.results(step.by_route("staged"))
    ran = [launch.kernel for launch in launches]
    assert ran.count("conv_pair_kernel") == taken and ran.count("conv_dgrad_kernel") == (not taken)


def test_a_wrong_kernel_for_both_gradients_is_left_out(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = staged_backward.conv_pair
    monkeypatch.setattr(staged_backward, "conv_pair", lambda *args, **more: (real(*args, **more)[0].zero_(), None))
    found, lines = run(Clock(by_width), {ONE: 1})
    assert planner.PAIR not in found.entries[tables.problem_key(FIRST)]
    assert sum(line.startswith("pair+in") and "is left out" in line for line in lines) == 2


@QUICK
def test_frozen_statistics_have_routes_alone() -> None:
    frozen = replace(CHAIN, batch_statistics=False, backward=False)
    found, _ = run(Clock(by_width, {"staged": 1.0}), {frozen: 1})
    assert not found.entries and set(found.routes[tables.chain_key(frozen)]["us"]) == {"staged", "reference"}


@QUICK
def test_a_step_by_a_plan_is_the_public_one() -> None:
    step = ChainStep(CHAIN, CPU)
    plan = planner.plan_chain(CHAIN, HERE, "staged")
    by_plan, by_route = (step.results(s) for s in (step.by_plan(plan), step.by_route("staged")))
    assert len(by_plan) == 1 + len(step.leaves) and not why_wrong(by_plan, by_route)
    assert "off by" in why_wrong([2 * t for t in by_plan], by_route)
    assert "not finite" in why_wrong([t * float("nan") for t in by_plan], by_route)


@QUICK
def test_every_launch_is_a_lap_and_carries_its_configuration() -> None:
    plan = slots.ours(planner.plan_chain(CHAIN, HERE, "staged"), HERE, formed=False)
    step = ChainStep(CHAIN, CPU)
    laps = Clock(by_width).kernels(step.by_plan(plan))
    with fr.record_launches() as launches:
        step.by_plan(plan)()
    assert [lap.kernel for lap in laps] == [entry.kernel for entry in launches if entry.kernel.endswith("_kernel")]
    decoded = measure.decode(plan.encode())
    for slot in slots.slots(plan, HERE):
        assert sum(lap.config is slot.get(decoded) for lap in laps) == 1, slot.name
    assert not record._watches


def network() -> nn.Module:
    projection = nn.Sequential(nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64))
    return nn.Sequential(fr.Bottleneck(32, 16, 1, projection), fr.Bottleneck(64, 16), fr.Bottleneck(64, 16))


@QUICK
def test_a_model_s_chains_are_counted() -> None:
    found = tune.chains_of(network(), [image_like((2, 32, 6, 6), torch.float16)], torch.float16, True, HERE)
    assert sorted(found.values()) == [1, 2]
    assert {chain.residual for chain in found} == {"identity", "projection"} and all(c.backward for c in found)


def test_warmup_measures_then_compiles_what_was_chosen(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr(compiling, "compile_all", lambda found, *_: jobs.extend(found))
    monkeypatch.setattr(compiling, "Stopwatch", lambda device: Clock(by_width, {"staged": 0.5}))
    model = nn.Sequential(fr.ConvBNReLU(32, 64, 1), fr.ConvBNReLU(64, 64, 1))
    assert fr.warmup(model, (1, 32, 6, 6), torch.float16, tune=True) == len(jobs) > 0
    (table,) = store.read()[0]
    assert len(table.routes) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fr.warmup(model, (1, 32, 6, 6), torch.float16, tune=True)
    explained = fr.explain(model, (1, 32, 6, 6), dtype=torch.float16)
    assert {row.route for row in explained.rows if row.kind == "ConvBNReLU"} == {"staged"}
    assert json.loads(next(store.folder().iterdir()).read_text())["identity"]["gpu"] == HERE.name


@QUICK
def test_without_a_gpu_it_says_that_it_cannot_measure(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr(compiling, "compile_all", lambda found, *_: jobs.extend(found))
    monkeypatch.setattr(compiling, "Stopwatch", lambda device: pytest.fail("a device was timed"))
    for target, words in (("h100", "not on one that is described"), (None, "the kernels need a GPU")):
        with assume(Assumption(None, "the kernels need a GPU")), pytest.warns(UserWarning, match=words):
            count = fr.warmup(network(), (1, 32, 6, 6), torch.float16, tune=True, target=target)
        assert ((count > 0) == (target is not None) and len(jobs) == count) or target is None
    with fr.use_route("reference"), pytest.warns(UserWarning, match="reference route was asked for"):
        fr.warmup(network(), (1, 32, 6, 6), torch.float16, tune=True)
    assert not place.exists()


def test_candidates_are_compiled_ahead_each_piece_of_code_once(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[Any]] = []

    def compile_all(jobs: list[Any], capability: int) -> None:
        asked.append(jobs)
        assert capability == HERE.sm
        raise RuntimeError("1 kernels do not compile")

    monkeypatch.setattr(measure, "compile_all", compile_all)
    monkeypatch.setattr(measure, "interpreted", lambda: False)
    found, _ = run(Clock(by_width, {"staged": 1.0}), {ONE: 1})
    assert len(asked) == 3, "on load, with dy formed before, and both gradients by one kernel"
    for jobs in asked:
        described = [(job.kernel, str(job.arguments), str(job.options)) for job in jobs]
        assert len(set(described)) == len(described)
    blocks = {job.arguments["BLOCK_M"] for job in asked[0] if job.kernel == "conv_fprop_kernel"}
    plan = slots.ours(planner.plan_chain(ONE, HERE, "staged"), HERE, formed=False)
    (fprop,) = (slot for slot in slots.slots(plan, HERE) if slot.kind == "fprop")
    assert blocks == {config.block_m for config in fprop.candidates}
    assert found.routes, "what does not compile is found out when it is tried"


def _square(ci: int, co: int, size: int = 1, stride: int = 1) -> ConvProblem:
    return ConvProblem(1, 8, 8, ci, co, size, size, (stride, stride), (size // 2, size // 2), dtype="float16")


OTHERS = {
    "stem": ChainProblem((replace(_square(3, 32, 7, 2), H=16, W=16),)),
    "basic block": ChainProblem((_square(64, 64, 3),) * 2, residual="identity"),
    "projection": ChainProblem((_square(32, 16), _square(16, 16, 3), _square(16, 64)), _square(32, 64), "projection"),
    "groups": ChainProblem((_square(64, 32), replace(_square(32, 32, 3), groups=4), _square(32, 64)), None, "identity"),
}


@pytest.mark.slow
@pytest.mark.parametrize("chain", OTHERS.values(), ids=OTHERS)
def test_every_kind_of_chain_can_be_measured(chain: ChainProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "FEW", 2)  # for a 3x3 one by pointers and one in boxes
    found, lines = run(Clock(by_width), {chain: 1})
    assert not any("left out" in line for line in lines), lines
    times = found.routes[tables.chain_key(chain)]["us"]
    assert {"staged", "reference"} <= set(times) and ("gram" in times) == (len(chain.convs) == 3)
    for conv in (*chain.convs, *([chain.projection] if chain.projection else [])):
        passes = found.entries.get(tables.problem_key(conv), {})
        assert bool(passes) == (conv.groups == 1)
    planner.plan_chain(chain, HERE)
