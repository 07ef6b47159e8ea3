"""Which configurations and which route are the fastest for a chain: measured in the chain's own step.

Every place of a plan tries its candidates at the same time as the others, one a run, since each kernel is timed by
itself. What only the whole step shows is told by steps that differ in one thing: the vendor's convolution for one pass
(with the passes over memory that it needs), dy formed before both gradients, another route.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from ..autograd.preflight import rehearse_chain
from ..jobs import Jobs, compile_all
from ..launch.record import rehearse_launches
from ..plan import planner, tables
from ..plan.config import GemmConfig
from ..plan.estimate import floor_us
from ..plan.plans import ChainProblem, Plan, decode
from ..plan.route import RouteUnavailableError
from ..plan.store import Remembered
from ..plan.target import Target, interpreted
from .chain import ChainStep, why_wrong
from .slots import Slot, by_vendor, convs, ours, paired, slots, with_conv
from .stopwatch import Stopwatch

FOLLOWERS = ("conv_wgrad_reduce_kernel", "gram_reduce_kernel")
"""Kernels that belong to the one before them: they add up its parts."""
MEASURED_ROUTES = ("single", "gram", "staged", "reference")
Say = Callable[[str], None]


class ChainTuner:
    """Measures one chain into ``found``; that and what was ``known`` is installed after each part, for the next."""

    def __init__(
        self,
        problem: ChainProblem,
        target: Target,
        device: torch.device,
        stopwatch: Stopwatch,
        known: Remembered,
        found: Remembered,
        say: Say,
    ) -> None:
        self.problem, self.target, self.stopwatch, self.say = problem, target, stopwatch, say
        self.known, self.found = known, found
        self.step = ChainStep(problem, device)
        self.expected = self.step.results(self.step.by_route("reference"))
        self.source = f"on this machine, {time.strftime('%Y-%m-%d')}"

    def run(self) -> None:
        """Kernels, then routes; all of it goes to ``found``."""
        if self.problem.batch_statistics:
            staged = planner.plan_chain(self.problem, self.target, "staged")
            on_load = self._best(ours(staged, self.target, formed=False))
            self._against_vendor(on_load)
            if any(conv.problem.is_pointwise and conv.wgrad.fused for _, _, conv in convs(on_load)):
                self._against_formed(on_load, self._best(ours(staged, self.target, formed=True), "formed"))
            self._best(paired(on_load, self.target), "pair")
            self._install()
            whole = planner.plan_chain(self.problem, self.target, "gram")
            if whole.gram is not None:
                self._best(whole, "gram")
                self._install()
        self.routes()
        self._install()

    def _install(self) -> None:
        everything = Remembered(self.known.identity)
        for table in (self.known, self.found):
            everything.add(table)
        tables.install(self.target.name, self.target.sm, everything.to_dict())

    # Kernels

    def _best(self, plan: Plan, word: str = "") -> Plan:
        """The plan with the fastest right candidate in each place whose name holds ``word``, noted with its time."""
        places = [slot for slot in slots(plan, self.target) if word in slot.pass_]
        times: list[dict[GemmConfig, float]] = [{} for _ in places]
        turns = [
            {i: slot.candidates[turn] for i, slot in enumerate(places) if turn < len(slot.candidates)}
            for turn in range(max((len(slot.candidates) for slot in places), default=0))
        ]
        compile_ahead([_put(plan, places, chosen) for chosen in turns], self.target, self.step.parameter_dtype)
        for chosen in turns:
            self._try(plan, places, chosen, times)
        for slot, found in zip(places, times, strict=True):
            if found:
                best = min(found, key=lambda config: found[config])
                plan = slot.put(plan, best)
                self._note(slot, best, found[best])
                self.say(f"{slot.name}: {found[best]:.1f} us, {_tile(best)}, {len(found)} tried")
        return plan

    def _try(
        self, plan: Plan, places: Sequence[Slot], chosen: Mapping[int, GemmConfig], times: list[dict[GemmConfig, float]]
    ) -> None:
        """Times the chosen candidates together; if that goes wrong each alone, so that the wrong one is named."""
        complaint = self._time(_put(plan, places, chosen), places, chosen, times)
        if complaint and len(chosen) > 1:
            for i, config in chosen.items():
                self._try(plan, places, {i: config}, times)
        elif complaint:
            ((i, config),) = chosen.items()
            self.say(f"{places[i].name}: {_tile(config)} is left out: {complaint}")

    def _time(
        self,
        tried: Plan,
        places: Sequence[Slot],
        chosen: Mapping[int, GemmConfig],
        times: list[dict[GemmConfig, float]],
    ) -> str:
        """What was wrong, or "": then the times are there."""
        step = self.step.by_plan(tried)
        try:
            complaint = why_wrong(self.step.results(step), self.expected)
            if complaint:
                return complaint
            laps = self.stopwatch.kernels(step)
        except Exception as error:  # whatever a compiler or a launch may raise: the candidate is named and left out
            return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:160] if str(error).strip() else ''}"
        launched = decode(tried.encode())
        place_of = {id(places[i].get(launched)): i for i in chosen}
        spent: dict[int, float] = {}
        current: int | None = None
        for lap in laps:
            if lap.kernel not in FOLLOWERS:
                current = place_of.get(id(lap.config))
            if current is not None:
                spent[current] = spent.get(current, 0.0) + lap.us
        for i, us in spent.items():
            times[i][chosen[i]] = us
        return ""

    def _note(self, slot: Slot, config: GemmConfig, us: float) -> None:
        passes = self.found.entries.setdefault(tables.problem_key(slot.problem), {})
        floor = None if slot.kind == "gram" else round(floor_us(slot.problem, slot.kind, self.target), 2)
        passes[slot.pass_] = {
            "config": config.to_dict(),
            "us": round(us, 2),
            "vendor_us": None,
            "passes_us": 0.0,
            "floor_us": floor,
            "before_us": None,
            "source": self.source,
        }

    # What the whole step tells

    def _against_vendor(self, plan: Plan) -> None:
        """The vendor's time for a pass: ours, and what the step takes longer with the vendor's instead."""
        ways: dict[str, Plan] = {"ours": plan}
        passes: dict[str, tuple[Any, list[str]]] = {}
        for where, i, conv in convs(plan):
            first = where == "projection" or i == 0
            # Both gradients of a 1x1 share the pass that forms dy, so they change together.
            gradients = (("dgrad", "wgrad"),) if conv.problem.is_pointwise else (("dgrad",), ("wgrad",))
            for kinds in (("fprop",), *gradients):
                kinds = tuple(kind for kind in kinds if getattr(conv, kind).fused)
                if kinds:
                    name = f"{where} {i} {'+'.join(kinds)}"
                    ways[name] = by_vendor(plan, where, i, kinds)
                    passes[name] = conv.problem, [planner.staged_pass(conv.problem, kind, first) for kind in kinds]
        times = self.stopwatch.steps({name: self.step.by_plan(way) for name, way in ways.items()})
        for name, (problem, names) in passes.items():
            entries = [self.found.entries.get(tables.problem_key(problem), {}).get(pass_) for pass_ in names]
            timed = [entry for entry in entries if entry is not None]
            longer = (times[name] - times["ours"]) / max(1, len(timed))
            for entry in timed:
                entry["vendor_us"] = round(max(0.0, entry["us"] + longer), 2)

    def _against_formed(self, on_load: Plan, formed: Plan) -> None:
        """What forming dy before both gradients costs: so that the sums differ as the steps do."""
        for where, i, conv in convs(on_load):
            p = conv.problem
            entries = self.found.entries.get(tables.problem_key(p), {})
            first = where == "projection" or i == 0
            names = [[planner.staged_pass(p, kind, first, how) for kind in ("dgrad", "wgrad")] for how in (False, True)]
            if not p.is_pointwise or any(name not in entries for both in names for name in both):
                continue
            other = formed.projection if where == "projection" else formed.convs[i]
            assert other is not None
            mixed = with_conv(on_load, where, i, other)
            times = self.stopwatch.steps({"on load": self.step.by_plan(on_load), "formed": self.step.by_plan(mixed)})
            whole = sum(entries[name]["us"] for name in names[0]) + times["formed"] - times["on load"]
            share = (whole - sum(entries[name]["us"] for name in names[1])) / 2
            for name in names[1]:
                entries[name]["before_us"] = round(share, 2)

    def routes(self) -> None:
        """The whole chain by every route that it can take, as plans stand now."""
        steps = {}
        for route in MEASURED_ROUTES:
            step = self.step.by_route(route)
            try:
                complaint = why_wrong(self.step.results(step), self.expected)
            except RouteUnavailableError:
                continue
            except Exception as error:  # a kernel that fails: the route is named and left out
                complaint = f"{type(error).__name__}: {str(error)[:160]}"
            if complaint:
                self.say(f"the route {route!r} is left out: {complaint}")
            else:
                steps[route] = step
        times = {route: round(us, 2) for route, us in self.stopwatch.steps(steps).items()}
        key = tables.chain_key(self.problem)
        self.found.routes[key] = {"us": times, "source": self.source}
        self.say(tables.RouteTimes(times, self.source).reason)


def _put(plan: Plan, places: Sequence[Slot], chosen: Mapping[int, GemmConfig]) -> Plan:
    for i, config in chosen.items():
        plan = places[i].put(plan, config)
    return plan


def compile_ahead(plans: Sequence[Plan], target: Target, parameters: torch.dtype) -> None:
    """Compiles in parallel what steps by these plans launch. What does not compile says so when it is tried."""
    if interpreted():
        return
    jobs = Jobs()
    for plan in plans:
        with rehearse_launches(jobs.collect), torch.no_grad():
            rehearse_chain(plan.encode(), parameters)
    with suppress(RuntimeError):
        compile_all(jobs.distinct, target.sm)


def _tile(config: GemmConfig) -> str:
    text = f"{config.block_m}x{config.block_n}x{config.block_k}, {config.num_warps} warps, {config.num_stages} stages"
    return text + (f", split {config.split}" if config.split > 1 else "")
