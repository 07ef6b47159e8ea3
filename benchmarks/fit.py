"""Compares the cost model with every recorded measurement of several candidates, and fits its rates to them.

    python -m benchmarks.fit

prints, per kind of pass: how much slower than the fastest candidate the model's choice is (regret), how well it orders
them, how far its microseconds are off; and the same for rates that were fitted without the layer they are asked about.
Then what tensor descriptors are worth, and the regret of the rules for the passes over memory.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.defaults import choices
from fused_resnet.plan.estimate import RATES, Rates, Terms, terms, together_us
from fused_resnet.plan.tables import gpu_slug
from fused_resnet.plan.target import PRESETS, Target

from . import fit_passes, problems, records
from .cases import ConvCase
from .configs import parsed
from .roles import cases

FOLDS = 5


@dataclass(frozen=True)
class Measured:
    """One pass of one layer, and what each candidate took on ``target``, in microseconds.

    ``boxes``: those that read by tensor descriptors, of which the cost model says nothing: no record could tell.
    """

    case: ConvCase
    target: Target
    times: dict[GemmConfig, float]
    boxes: dict[GemmConfig, float] = field(default_factory=dict)

    @property
    def rows(self) -> Terms:
        """The terms of all candidates, as arrays."""
        formed = self.case.formed or self.case.gram
        found = [terms(self.case.problem, self.case.kind, self.target, c, formed=formed) for c in self.times]
        return Terms(*(np.array(column, dtype=float) for column in zip(*found, strict=True)))

    @property
    def shortlist(self) -> list[GemmConfig]:
        """What the planner chooses from, of what was measured; all of that, where the pass has rules of its own."""
        case = self.case
        if case.gram and case.kind == "dgrad":
            return list(self.times)
        few = choices(case.problem, case.kind, self.target, epilogue="residual" if case.gram else "")
        return [config for config in few if config in self.times]


class Judgement(NamedTuple):
    """Of a choice: its time over the fastest's, from the shortlist; ``free``: where it may take any candidate.
    ``rank``: Spearman's, over all candidates. ``off``: log(model / time)."""

    regret: float
    free: float
    rank: float
    off: float


def measured(folder: Path = records.FOLDER) -> list[Measured]:
    """Every recorded pass with several candidates, the stem's apart, whose kernel is another."""
    known: dict[str, ConvCase] = {}
    for depth in (50, 18):
        for layer in problems.layers(depth):
            known |= {case.name: case for case in cases(layer) if not case.problem.is_stem}
    found = []
    presets = {target.name: target for target in PRESETS}
    for _, document in records.documents(folder, "tuned.json"):
        target = presets.get(gpu_slug(document["gpu"]))
        if target is None:  # nothing says what it could do
            continue
        for name, result in document["results"].items():
            if name in known and len(result.get("heats_us", {})) > 1:
                times = {parsed(text, GemmConfig): us for text, us in result["heats_us"].items()}
                boxes = {config: us for config, us in times.items() if config.form != "rows"}
                rows = {config: us for config, us in times.items() if config not in boxes}
                found.append(Measured(known[name], target, rows, boxes))
    return found


def judge(one: Measured, rates: Rates) -> Judgement:
    """The model's choice from the shortlist, against everything that was measured."""
    model = np.asarray(together_us(one.rows, rates), dtype=float)
    times = np.array(list(one.times.values()))
    few = [i for i, config in enumerate(one.times) if config in one.shortlist] or list(range(len(times)))
    taken = min(few, key=lambda i: model[i])
    regret, free = (float(times[i] / times.min()) for i in (taken, int(model.argmin())))
    return Judgement(regret, free, _spearman(model, times), math.log(model[taken] / times[taken]))


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def fit(sample: Sequence[Measured], start: Rates) -> Rates:
    """Rates that order candidates best, those near the fastest most: a descent by coordinates of their logarithms."""
    rows = [(one.rows, np.log(list(one.times.values()))) for one in sample]

    def loss(logs: np.ndarray) -> float:
        rates, total = Rates(*np.exp(logs)), 0.0
        for row, times in rows:
            off = np.log(together_us(row, rates)) - times  # type: ignore[call-overload]
            weight = np.exp(-2 * (times - times.min()))
            mean = float((weight * off).sum() / weight.sum())
            total += float((weight * (off - mean) ** 2).sum() / weight.sum()) + 0.05 * mean**2
        return total / len(rows) + 1e-3 * float(((logs - origin) ** 2).mean())

    origin = np.log(np.array(start))
    free = [i for i, value in enumerate(start) if i < 4 or value != 1.0]
    logs, best, size = origin.copy(), loss(origin), 0.4
    while size > 0.02:
        improved = False
        for i in free:
            for sign in (1, -1):
                trial = logs.copy()
                trial[i] += sign * size
                if (value := loss(trial)) < best:
                    logs, best, improved = trial, value, True
        size *= 1.0 if improved else 0.5
    return Rates(*np.exp(logs))


def held_out(sample: Sequence[Measured], start: Rates) -> list[Judgement]:
    """Each judged by rates that were fitted without it and its neighbours in the list."""
    found = []
    for fold in range(FOLDS):
        others = [one for i, one in enumerate(sample) if i % FOLDS != fold]
        rates = fit(others, start)
        found += [judge(one, rates) for i, one in enumerate(sample) if i % FOLDS == fold]
    return found


def mean_regret(found: Iterable[Judgement], field: str = "regret") -> float:
    return statistics.geometric_mean(getattr(judgement, field) for judgement in found)


def line(found: Sequence[Judgement]) -> str:
    worst, rank = max(j.regret for j in found), statistics.mean(j.rank for j in found)
    off = math.exp(statistics.mean(abs(j.off) for j in found))
    regret = f"regret {mean_regret(found):.3f} (worst {worst:.2f}), {mean_regret(found, 'free'):.3f} among all"
    return f"{regret}, rank correlation {rank:.2f}, off by {off:.2f}x"


def of_boxes(found: Sequence[Measured]) -> str:
    """What descriptors are worth beside pointers, and what their list's order loses to the fastest of them."""
    if not found:
        return "a 3x3 by tensor descriptors: no record, so nothing chooses one that was not measured"
    ratios = [min(one.boxes.values()) / min(one.times.values()) for one in found]
    first = statistics.geometric_mean(next(iter(one.boxes.values())) / min(one.boxes.values()) for one in found)
    return (
        f"a 3x3 by tensor descriptors, {len(found)} passes: {statistics.geometric_mean(ratios):.2f} of what pointers "
        f"take, {min(ratios):.2f} to {max(ratios):.2f}; the list's first, regret {first:.3f}"
    )


def main() -> None:
    everything = measured()
    for kind, rates in RATES.items():
        sample = [one for one in everything if one.case.kind == kind]
        print(f"{kind}, {len(sample)} passes: {line([judge(one, rates) for one in sample])}")
        print(f"  held out:     {line(held_out(sample, rates))}")
        best = fit(sample, rates)
        print("  fitted:       " + ", ".join(f"{name}={value:.3g}" for name, value in best._asdict().items()))
    print(of_boxes([one for one in everything if one.boxes]))
    fit_passes.report()


if __name__ == "__main__":
    main()
