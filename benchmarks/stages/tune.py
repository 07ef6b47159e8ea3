"""Measures the candidate configurations of every pass of every layer of the ResNet family, and each block's routes.

ResNet-50 at batch 256 goes first, then what should gain most (``family``). ``tuned.json`` is a table of
``fused_resnet/plan/tables.py`` as it stands: each entry holds the fastest configuration whose results are right, its
time, and the vendor's beside it. The planner takes whichever was faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fused_resnet.launch.record import record_launches
from fused_resnet.plan import store, tables
from fused_resnet.plan.config import GemmConfig, supports
from fused_resnet.plan.plans import ChainProblem
from fused_resnet.plan.store import Remembered
from fused_resnet.plan.target import Target
from fused_resnet.tuning.measure import ChainTuner
from fused_resnet.tuning.stopwatch import Step, Stopwatch

from .. import family
from ..cases import ConvCase
from ..harness import Context, Item, failure
from ..passes import PassCase
from ..precompile import Ahead
from ..timing import Call, floor_us, interleave, rotation
from .kernels import CORRECT_BATCH, conv_cases, target_of

FINALISTS = 3
BOX = {
    "fprop": GemmConfig(16, 16, 16, form="box"),
    "dgrad": GemmConfig(16, 16, 16, form="box"),
    "wgrad": GemmConfig(16, 16, 64, row_taps=9, form="box"),
}
"""A rehearsal's of the form that a GPU measures beside pointers."""
AHEAD = 24
"""So many cases begin to be compiled before the first of them is measured."""
PATIENCE = 50
"""Seconds that a case waits for the compilations of its candidates; the rest is left out."""


def items(context: Context) -> Iterator[Item]:
    target = target_of(context)
    facts = context.document["facts"]
    context.document |= {"version": tables.VERSION, "gpu": facts.get("gpu"), "facts": facts}
    context.document.setdefault("entries", {})
    context.document.setdefault("routes", {})
    networks = family.TINY if context.dry else family.FAMILY
    todo = [work for work in family.work(networks, target) if work.name not in context.results]
    ahead = None if context.dry else Ahead((), target.sm)
    try:
        for i, work in enumerate(todo):
            if ahead is not None:
                soon = [later.case or later.over_memory for later in todo[i : i + AHEAD]]
                ahead.add((case, config) for case in soon if case for config in _candidates(context, case, target))
            if work.case is not None:
                yield work.name, lambda c=work.case: _tune(context, c, target, ahead)
            elif work.over_memory is not None:
                yield work.name, lambda c=work.over_memory: _tune_pass(context, c, target, ahead)
            elif work.chain is not None:
                yield work.name, lambda c=work.chain: _routes(context, c, target)
    finally:
        if ahead is not None:
            ahead.stop()


class _Clock(Stopwatch):
    """The stage's device, as the package's tuner asks for one."""

    def __init__(self, context: Context) -> None:
        super().__init__(torch.device(context.device.name))
        self.of = context.device

    def mark(self) -> Any:
        event = self.of.event()
        event.record()
        return event

    def synchronize(self) -> None:
        self.of.synchronize()

    def hold(self, seconds: float) -> None:
        self.of.hold(min(seconds, 0.2))

    def pool(self) -> Any:
        return None

    def captured(self, step: Step, pool: Any) -> Step:
        return self.of.capture(step)


def _routes(context: Context, chain: ChainProblem, target: Target) -> dict[str, Any]:
    """A block forward and backward by every route that it has, with the configurations found so far."""
    tables.install(target.name, target.sm, context.document)
    lines: list[str] = []
    found = Remembered(store.identity(target))
    tuner = ChainTuner(chain, target, torch.device(context.device.name), _Clock(context), found, found, lines.append)
    tuner.routes()
    context.document["routes"] |= found.routes
    return {"routes": next(iter(found.routes.values())), "said": lines, "line": "; ".join(lines)}


def _candidates(context: Context, case: ConvCase | PassCase, target: Target) -> list[Any]:
    if isinstance(case, PassCase):
        return case.candidates(target.sm_count)
    if not context.dry:
        return case.candidates(target)
    # The interpreter's own, and more so that there is something to choose from.
    box = BOX.get(case.kind)
    boxes = [box] if box and not case.residual and supports(case.problem, case.kind, target, box)[0] else []
    return [*case.candidates(target)[:1], GemmConfig(64, 64, 64), *boxes]


class _Heat(NamedTuple):
    """Candidates that ran: what each took, the quickest first; those that are right; what became of the others."""

    us: dict[str, float]
    calls: dict[Any, list[Call]]
    right: list[Any]
    refused: dict[str, str]
    wrong: dict[str, Any]

    @property
    def results(self) -> dict[str, Any]:
        return {"heats_us": self.us, "refused": self.refused, "wrong": self.wrong}

    @property
    def line(self) -> str:
        bad = f", {len(self.refused)} refused, {len(self.wrong)} WRONG" if self.refused or self.wrong else ""
        return f"{len(self.calls)} tried{bad}"


def _heat(
    context: Context,
    case: ConvCase | PassCase,
    target: Target,
    ahead: Ahead | None,
    sets: list[Any],
    check: Callable[[Any], dict[str, Any]],
) -> _Heat:
    """All candidates, turn by turn; of those that ran the FINALISTS quickest right ones by ``check``."""
    calls: dict[Any, list[Call]] = {}
    refused = {}
    patient_until = time.time() + PATIENCE
    for config in _candidates(context, case, target):
        complaint = ahead.wait(case, config, max(0.1, patient_until - time.time())) if ahead is not None else ""
        if not complaint:
            try:
                case.ours(sets[0], config)
            except Exception as error:
                complaint = failure(error)["error"][:200]
        if complaint:
            refused[str(config)] = complaint
        else:
            calls[config] = [lambda t=t, c=config: case.ours(t, c) for t in sets]  # type: ignore[misc]
    context.device.synchronize()
    heats = interleave(context.device, {str(config): call for config, call in calls.items()}, samples=4)
    right, wrong = [], {}
    for config in sorted(calls, key=lambda config: heats[str(config)].us):
        if len(right) == FINALISTS:
            break
        failed = {name: v for name, v in check(config).items() if not v["ok"]}
        if failed:
            wrong[str(config)] = failed
        else:
            right.append(config)
    return _Heat({name: round(timing.us, 1) for name, timing in heats.items()}, calls, right, refused, wrong)


def _tune(context: Context, case: ConvCase, target: Target, ahead: Ahead | None) -> dict[str, Any]:
    device = context.device
    sets = [case.inputs(device.name) for _ in range(rotation(device, case.bytes, limit=8))]
    reference = case.references(sets[0])
    heat = _heat(context, case, target, ahead, sets, lambda config: case.check(sets[0], config, reference))
    final = {"vendor": [lambda t=t: case.vendor(t) for t in sets]} | {str(c): heat.calls[c] for c in heat.right}
    if case.before_share:
        final["before"] = [lambda t=t: case.before(t, target.sm_count) for t in sets]
    timings = interleave(device, final, samples=16)
    best = min(heat.right, key=lambda config: timings[str(config)].us, default=None)
    entry = _entry(context, case, sets[0], best, timings)
    context.document["entries"].setdefault(tables.problem_key(case.problem), {})[case.variant] = entry
    ours = "none right" if best is None else f"{entry['us']:.0f} us ({entry['us'] / max(entry['floor_us'], 0.01):.2f}x)"
    tile = "" if best is None else f" {best.block_m}x{best.block_n}x{best.block_k} w{best.num_warps} s{best.num_stages}"
    split = f" split {best.split}" if best is not None and best.split > 1 else ""
    ours += "" if entry["before_us"] is None else f" + {entry['before_us']:.0f} before"
    line = f"{ours}, vendor {timings['vendor'].us:.0f} + {entry['passes_us']:.0f}{tile}{split}, {heat.line}"
    return {"entry": entry, **heat.results, "line": line}


def _tune_pass(context: Context, case: PassCase, target: Target, ahead: Ahead | None) -> dict[str, Any]:
    """Of a pass over memory, whose tile is a rule's: what that loses to the quickest right one. ``benchmarks.fit``
    reads it; the planner does not, so that every rank's sums are those of one tile."""
    device = context.device
    sets = [case.inputs(device.name) for _ in range(rotation(device, 2 * case.rows * case.C, limit=8))]
    judged = replace(case, N=min(case.N, CORRECT_BATCH))
    t = judged.inputs(device.name)
    heat = _heat(context, case, target, ahead, sets, lambda config: judged.check(t, config))
    rule, best = case.config(target.sm_count), next(iter(heat.right), None)
    if best is None or str(rule) not in heat.us:
        return {**heat.results, "line": f"the rule's or all others are not right, {heat.line}"}
    loss = heat.us[str(rule)] / heat.us[str(best)]
    tile = f"{best.block_m}x{best.block_c} w{best.num_warps}"
    line = f"the rule's {heat.us[str(rule)]:.0f} us, {loss:.2f}x that of {tile}, {heat.line}"
    return {**heat.results, "rule": str(rule), "line": line}


def _entry(context: Context, case: ConvCase, t: Any, best: GemmConfig | None, timings: Any) -> dict[str, Any]:
    with record_launches() as launches:
        if best is not None:
            case.ours(t, best)
    nbytes = sum(entry.bytes for entry in launches) or case.bytes
    flops = sum(entry.flops for entry in launches) or case.problem.flops
    facts = context.document["facts"]
    before = round(case.before_share * timings["before"].us, 2) if case.before_share else None
    written = case.written_before()
    if written:  # what writing it adds to the kernel before, which is bound by memory
        before = round(written / context.ceilings["bytes_per_s"] * 1e6, 2)
    return {
        "config": None if best is None else best.to_dict(),
        "us": None if best is None else round(timings[str(best)].us, 2),
        # On the Gram route the vendor's convolution is a comparison, not a choice.
        "vendor_us": None if case.gram else round(timings["vendor"].us, 2),
        "passes_us": round(case.passes_bytes() / (0.9 * context.ceilings["bytes_per_s"]) * 1e6, 2),
        "floor_us": round(floor_us(context.ceilings, nbytes, flops), 2),
        "before_us": before,
        "source": ", ".join(filter(None, (str(facts["date"])[:10], facts["commit"], f"triton {facts['triton']}"))),
    }


def finish(context: Context) -> None:
    """How often ours won, and what the choice is worth over a ResNet-50."""
    table = tables.parse(context.document)
    ours = vendor = chosen = 0.0
    wins = count = 0
    for case, times in conv_cases(context):
        entry = table.get(tables.problem_key(case.problem), {}).get(case.variant)
        if entry is None or entry.us is None or case.formed or case.masked or case.kind in ("gram", "pair"):
            continue
        other = entry.us if entry.vendor_us is None else entry.vendor_us + entry.passes_us
        count, wins = count + 1, wins + (not entry.vendor_wins)
        ours, vendor = ours + times * entry.us, vendor + times * other
        chosen += times * min(entry.us, other)
    print(
        f"[tune] ours won {wins} of {count}; a ResNet-50's convolutions, ms: ours {ours / 1e3:.2f}, the vendor's "
        f"with its passes {vendor / 1e3:.2f}, the choice {chosen / 1e3:.2f}",
        flush=True,
    )
