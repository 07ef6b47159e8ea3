"""Fits the rates of ``fused_resnet/projection.py`` to the records: ``python -m benchmarks.rates`` prints them.

Of our kernels from a step that was timed launch by launch, of the vendor's convolutions from the layers stage, of eager
PyTorch's other operators from a profiled step.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import fused_resnet as fr
from fused_resnet.explain import assumption_of, image_like
from fused_resnet.plan.cost import Cost
from fused_resnet.plan.route import use_route
from fused_resnet.plan.target import H100, PRESETS, assume
from fused_resnet.projection import FLOPS_OF_A_GEMM, GEMM, PASS, RATES, Projection, Rate
from fused_resnet.rehearsal import rehearse

from . import records

TYPICAL, TRUST = Rate(4.0, 1.05, 1.05), Rate(6.0, 0.4, 0.6)
"""What a kernel is taken for before it was timed, and how far from that its rates may easily be."""
PRIOR = 0.1
"""How many launches the above is worth, each weighed by its relative error."""
EAGER = {
    r"collect_statistics|transform_input": ("native_batch_norm", "cudnn_batch_norm"),
    r"batch_norm_backward": ("native_batch_norm_backward", "cudnn_batch_norm_backward"),
    r"max_pool_forward": ("max_pool2d_with_indices",),
    r"max_pool_backward": ("max_pool2d_with_indices_backward",),
    r"CUDAFunctor_add": ("add", "add_"),
    r"launch_clamp": ("relu", "relu_"),
    r"threshold_kernel": ("threshold_backward",),
}
"""Kernels of a profile, and the operators that launch them."""
QUANTILE = 0.9


class Sample(NamedTuple):
    """One timed launch: microseconds, those of its bytes and of its FLOPs at the target's rates."""

    us: float
    memory: float
    matrix: float


def sample(us: float, nbytes: int, flops: int) -> Sample:
    return Sample(us, 1e6 * nbytes / H100.bandwidth, 1e6 * flops / H100.matrix_rate)


def timed(folder: Path = records.FOLDER) -> dict[str, list[Sample]]:
    """By kernel, what was timed on an H100; every launch of ours also as a product or a pass like any other."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for row in records.launches(folder)[H100.name]:
        one = sample(row["us"], row["bytes"], row["flops"])
        found[row["kernel"]].append(one)
        found[GEMM if row["flops"] > FLOPS_OF_A_GEMM else PASS].append(one)
    for _, document in records.documents(folder, "layers.json"):
        for name, r in document["results"].items():
            narrow = "narrow_" if r["problem"]["Ci"] < 8 else ""
            for kind, one in r["passes"].items() if "stem" not in name else ():
                found[f"vendor_{narrow}conv_{kind}"].append(sample(one["us"], r["bytes"], r["flops"]))
    return found


def eager_costs() -> list[Cost]:
    """The operators of an eager step of ResNet-50, batch 256."""
    with torch.device("meta"):
        model = fr.reference.resnet50().to(memory_format=torch.channels_last)
    inputs = (image_like((256, 3, 224, 224), torch.bfloat16),)
    with assume(assumption_of(model, H100)), use_route("reference"):
        shares = rehearse(model, inputs, torch.bfloat16, True)
    return [cost for share in shares.values() for cost in share.costs]


def eager(folder: Path = records.FOLDER) -> dict[str, Rate]:
    """Of eager PyTorch's operators: one factor over the bytes of each kind."""
    rows = records.profiles(folder)[H100.name, "resnet50 eager"]["rows"]
    costs, found = eager_costs(), {}
    for pattern, names in EAGER.items():
        us = sum(row["us"] for row in rows if re.search(pattern, row["kernel"]))
        moved = sum(cost.bytes for cost in costs if cost.name in names)
        found |= dict.fromkeys(names, Rate(0.0, us / (1e6 * moved / H100.bandwidth), 0.0))
    return found


def fitted(found: Iterable[Sample]) -> Rate:
    """Least squares of the relative error, drawn to TYPICAL; then scaled so that the sum of all times is right."""
    us, memory, matrix = (np.array(column) for column in zip(*found, strict=True))
    columns = np.stack([np.ones_like(us), memory, matrix], 1)
    pull = math.sqrt(PRIOR) / np.array(TRUST)
    left = np.vstack([columns / us[:, None], np.diag(pull)])
    right = np.concatenate([np.ones_like(us), pull * np.array(TYPICAL)])
    rates = np.maximum(np.linalg.lstsq(left, right, rcond=None)[0], 0.0)
    return Rate(*(float(rate) for rate in rates * us.sum() / (columns @ rates).sum()))


def all_rates(folder: Path = records.FOLDER) -> dict[str, Rate]:
    """What RATES should hold, to three digits."""
    found = {name: fitted(launches) for name, launches in sorted(timed(folder).items())} | eager(folder)
    return {name: Rate(*(float(f"{rate:.3g}") for rate in rates)) for name, rates in found.items()}


def launches_off(folder: Path = records.FOLDER) -> float:
    """How far off single launches are, weighed by their time: the 90 % quantile, as a factor less one."""
    apart = []
    for name, launches in timed(folder).items():
        rate = RATES[name]
        for one in launches if name not in (GEMM, PASS) else ():
            model = rate.start + rate.memory * one.memory + rate.matrix * one.matrix
            apart.append((abs(math.log(model / one.us)), one.us))
    apart.sort()
    weights = np.cumsum([us for _, us in apart])
    return math.exp(apart[int(np.searchsorted(weights, QUANTILE * weights[-1]))][0]) - 1


def compared(folder: Path = records.FOLDER) -> Iterator[tuple[records.Step, Projection]]:
    """Every recorded step in a CUDA graph, where the host does not show, beside what is projected for it now."""
    names = {target.name for target in PRESETS}
    for (gpu, model, batch, dtype), by_candidate in records.newest(records.steps(folder)).items():
        build = getattr(fr, model, None)
        if gpu not in names or build is None or not {"graph", "ours graph"} & by_candidate.keys():
            continue
        with torch.device("meta"):
            network = build().to(memory_format=torch.channels_last)
        found = fr.explain(network, (batch, 3, 224, 224), dtype=getattr(torch, dtype), target=gpu)
        for candidate, step in (("graph", found.eager), ("ours graph", found)):
            if candidate in by_candidate and step.projected_us is not None:
                yield by_candidate[candidate], step.projected_us


def main() -> None:
    for name, rate in all_rates().items():
        print(f'    "{name}": Rate({", ".join(f"{value:g}" for value in rate)}),')
    print(f"single launches are within {launches_off():.2f}")
    for step, us in compared():
        low, middle, high = (time / 1e3 for time in us)
        said = f"projected {middle:.2f} ms ({low:.2f} to {high:.2f}), recorded {step.us / 1e3:.2f}"
        print(f"{step.gpu} {step.model}, {step.batch}, {step.candidate}: {said}, ratio {us.middle / step.us:.3f}")


if __name__ == "__main__":
    main()
