"""The rules for the passes over memory (``plan/passes.py``) beside every recorded measurement of several tiles."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fused_resnet.plan.config import PassConfig
from fused_resnet.plan.passes import group_config, merge_config, reduce_config

from . import passes, records
from .configs import parsed

BATCH = 256
TENSORS = {"": 1, ", with finalize": 1, " relu(y)": 3, " out": 4}
"""How many tensors pass through, by what a record says of the pass; statistics read one. That of the mask "out", which
backward reads no more, is as wide as one with a projection."""


class MeasuredPass(NamedTuple):
    """One pass at one size: what each tile took, in microseconds, and which of them the rule takes."""

    kind: str
    name: str
    times: dict[str, float]
    choice: str

    @property
    def regret(self) -> float | None:
        """The choice's time over the fastest's; None where the choice itself was not measured."""
        taken = self.times.get(self.choice)
        return None if taken is None else taken / min(self.times.values())


def label(config: PassConfig) -> str:
    return f"{config.block_m}x{config.block_c}w{config.num_warps}"


def _merge(tiles: int, channels: int) -> str:
    """The first of two kernels, or the only one."""
    groups = group_config(tiles, channels)
    final = merge_config(tiles, channels)
    return f"g{label(groups)}" if groups else f"f{final.block_c}w{final.num_warps}"


def _of_statistics(results: dict[str, dict[str, dict[str, float]]]) -> Iterator[MeasuredPass]:
    """Without what was timed on data that the cache held."""
    for name, result in results.items():
        times = result["candidates_us"]
        if found := re.fullmatch(r"(bn_finalize|bn_grad_finalize) (\d+)x(\d+)", name):
            yield MeasuredPass(found[1], name, times, _merge(int(found[2]), int(found[3])))
        elif found := re.fullmatch(r"(bn_stats|bn_act_grad_reduce) (\d+)px (\d+)(.*)", name):
            side, channels, more = int(found[2]), int(found[3]), found[4]
            if more in TENSORS:
                config = reduce_config(BATCH * side**2, channels, 2, tensors=TENSORS[more])
                yield MeasuredPass(found[1] + more, name, times, label(config))


def measured_passes(folder: Path = records.FOLDER) -> list[MeasuredPass]:
    """All of them, beside today's rules."""
    found: list[MeasuredPass] = []
    for _, document in records.documents(folder, "statistics.json"):
        found += _of_statistics(document["results"])
    known = {case.name: case for case in passes.cases(dry=False, batch=BATCH)}
    for _, document in records.documents(folder, "tuned.json"):
        for name, result in document["results"].items():
            heats, wrong = result.get("heats_us", {}), result.get("wrong", {})
            right = [text for text in heats if text not in wrong] if name in known else []
            if len(right) > 1:
                times = {label(parsed(text, PassConfig)): heats[text] for text in right}
                found.append(MeasuredPass(known[name].kind, name, times, label(known[name].config())))
    return found


def mean_regret(found: Sequence[MeasuredPass]) -> float:
    return statistics.geometric_mean(one.regret for one in found if one.regret is not None)


def report(folder: Path = records.FOLDER) -> None:
    """What ``python -m benchmarks.fit`` says of them."""
    everything = measured_passes(folder)
    kinds = dict.fromkeys(one.kind for one in everything)
    for kind in kinds:
        found = [one for one in everything if one.kind == kind]
        known = [one for one in found if one.regret is not None]
        left = f"; the rule's own tile was not measured at {len(found) - len(known)} more" if known != found else ""
        worst = max(one.regret or 0.0 for one in known)
        print(f"{kind}, {len(known)} sizes: the rule's regret {mean_regret(known):.3f} (worst {worst:.2f}){left}")
    measured = {re.split("[ ,]", kind)[0] for kind in kinds}
    unknown = [kind for kind in passes.TILED if kind not in measured]
    print(f"several tiles were never measured of: {', '.join(unknown) or 'none'}")
