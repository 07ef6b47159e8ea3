"""One entry of the registry under pytest-benchmark: judged first, then timed, beside what its time is judged by.

The baseline takes turns with the candidate (``device_us``, ``speedup``); pytest-benchmark's own rounds, on the GPU's
clock, are what ``--benchmark-compare`` and ``--benchmark-compare-fail`` look at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from fused_resnet.plan import planner
from fused_resnet.plan.route import RouteUnavailableError
from fused_resnet.plan.target import Target, current

from . import modules, vendor_graph
from .cases import ConvCase
from .device import Device
from .modules import HOW, BlockCase, ModelCase
from .passes import PassCase
from .registry import Entry
from .stages import facts
from .timing import Timing, interleave, rotation
from .vendor_graph import Unavailable

ROUNDS = 20
FACTS = ("gpu", "driver", "torch", "triton", "cudnn", "commit", "date")
Call = Callable[[], object]


@dataclass(frozen=True)
class Machine:
    """What the benchmarks run on: the device, the target with its rates as measured here, the versions."""

    device: Device
    target: Target
    facts: dict[str, Any] = field(default_factory=dict)


def machine() -> Machine:
    """This machine's GPU; its ceilings are measured now, on random data."""
    device, target = Device(), current(torch.device("cuda", 0))
    assert target is not None
    bandwidth, matrix_rate = facts.copy_timing(device)[0], facts.matmul_timing(device, torch.bfloat16)[0]
    device.release()
    known = device.facts()
    return Machine(
        device, replace(target, bandwidth=bandwidth, matrix_rate=matrix_rate), {key: known.get(key) for key in FACTS}
    )


def bench(benchmark: Any, gpu: Machine, entry: Entry, candidate: str) -> None:
    """Times ``candidate`` of ``entry``. A wrong one fails by name and has no time; one that cannot run is skipped."""
    benchmark.group = entry.group
    _describe(benchmark, gpu, entry, candidate)
    try:
        if isinstance(entry.subject, (BlockCase, ModelCase)):
            _bench_module(benchmark, gpu, entry.subject, candidate)
        else:
            _bench_kernel(benchmark, gpu, entry.subject, candidate)
    except (Unavailable, RouteUnavailableError) as error:
        pytest.skip(f"{candidate}: {error}")
    finally:
        gpu.device.release()


def _describe(benchmark: Any, gpu: Machine, entry: Entry, candidate: str) -> None:
    """What every figure of the entry is read beside."""
    cost = entry.cost(gpu.target)
    benchmark.extra_info |= {
        "candidate": candidate,
        "operation": entry.operation,
        "shape": entry.name,
        "test": entry.test,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "floor_us": cost.floor_us,
        "eager_bytes": cost.eager_bytes,
        **gpu.facts,
    }


def _refuse(name: str, candidate: str, complaints: Sequence[str]) -> None:
    if complaints:
        pytest.fail(f"{name}, {candidate}: WRONG, not timed: {' | '.join(complaints)[:500]}", pytrace=False)


def _beside(benchmark: Any, timing: Timing, baseline: tuple[str, Timing] | None = None) -> None:
    floor = benchmark.extra_info["floor_us"]
    benchmark.extra_info |= {"device_us": timing.us, "spread": timing.spread, "fraction_of_floor": floor / timing.us,
                             "samples": timing.to_dict()["samples"]}  # fmt: skip
    if baseline is not None:
        name, theirs = baseline
        benchmark.extra_info |= {"baseline": name, "baseline_us": theirs.us, "speedup": theirs.us / timing.us}


# ---------------------------------------------------------------- kernels


def _bench_kernel(benchmark: Any, gpu: Machine, case: ConvCase | PassCase, candidate: str) -> None:
    nbytes = case.bytes if isinstance(case, ConvCase) else 2 * case.rows * case.C
    sets = [case.inputs(gpu.device.name) for _ in range(rotation(gpu.device, nbytes, limit=8))]
    vendor = [lambda t=t: case.vendor(t) for t in sets] if isinstance(case, ConvCase) else None
    calls: list[Call]
    if candidate == "vendor":
        assert vendor is not None
        calls, vendor = vendor, None
    elif candidate == "vendor graph":
        assert isinstance(case, ConvCase)
        graphs = [vendor_graph.conv_graph(case, t) for t in sets]
        _refuse(case.name, candidate, _complaints(vendor_graph.verdicts(case, sets[0], graphs[0]())))
        calls = [*graphs]
    else:
        config = _configuration(benchmark, gpu, case)
        verdicts = case.check(sets[0], config)
        benchmark.extra_info |= {"error": {name: v["rms"] for name, v in verdicts.items()}, "config": config.to_dict()}
        _refuse(case.name, candidate, _complaints(verdicts))
        calls = [lambda t=t: case.ours(t, config) for t in sets]
    timings = interleave(gpu.device, {candidate: calls} | ({"vendor": vendor} if vendor else {}), samples=ROUNDS)
    _beside(benchmark, timings[candidate], ("vendor", timings["vendor"]) if vendor else None)
    # Captured, so that a round is not a measurement of how fast the host launches.
    turns = itertools.cycle([gpu.device.capture(call, warmup=1) for call in calls])
    benchmark.pedantic(lambda: next(turns)(), rounds=ROUNDS, iterations=len(calls), warmup_rounds=2)


def _complaints(verdicts: dict[str, dict[str, Any]]) -> list[str]:
    return [f"{name}: {v['failed']}, {v['rms']:.1e}" for name, v in verdicts.items() if not v["ok"]]


def _configuration(benchmark: Any, gpu: Machine, case: ConvCase | PassCase) -> Any:
    """What the planner would launch."""
    if isinstance(case, PassCase):
        return case.config(gpu.target.sm_count)
    config = case.candidates(gpu.target)[0]
    if case.gram or case.formed or case.kind == "pair":
        return config
    choice = getattr(planner.plan_conv(case.problem, gpu.target, first=case.first), case.kind)
    benchmark.extra_info["plan"] = choice.reason
    return choice.config or config


# ---------------------------------------------------------------- modules


def _bench_module(benchmark: Any, gpu: Machine, case: BlockCase | ModelCase, candidate: str) -> None:
    device, how = gpu.device, HOW[candidate]
    if how.ours:
        if how.route == "auto":
            benchmark.extra_info["plan"] = modules.cost(case, gpu.target).plan
        _refuse(case.name, candidate, case.check(how, device))
        device.release()
    running = case.run(how, device)
    benchmark.extra_info["peak_bytes"] = running.peak_bytes
    calls, baseline = {candidate: [running.call]}, None
    if candidate != modules.BASELINE:
        eager = case.run(HOW[modules.BASELINE], device)
        if how.ours:
            _refuse(case.name, candidate, modules.losses_apart(running, eager))
        calls["eager"] = [eager.call]
        benchmark.extra_info["baseline_peak_bytes"] = eager.peak_bytes
    timings = interleave(device, calls, samples=ROUNDS, hold=False)
    if candidate != modules.BASELINE:
        baseline = ("eager", timings["eager"])
    _beside(benchmark, timings[candidate], baseline)
    benchmark.extra_info["images_per_s"] = case.batch / timings[candidate].us * 1e6
    benchmark.pedantic(running.call, rounds=ROUNDS, iterations=1, warmup_rounds=1)


def bench_memory(benchmark: Any, gpu: Machine, entry: Entry, candidate: str) -> None:
    """The peak of one warm step, GiB in place of seconds, the model and its optimizer's state included."""
    case, how = entry.subject, HOW[candidate]
    assert isinstance(case, ModelCase)
    benchmark.group = f"{entry.group}, GiB in place of seconds"
    _describe(benchmark, gpu, entry, candidate)
    running = case.run(how, gpu.device)
    benchmark.extra_info["peak_bytes"] = running.peak_bytes
    benchmark.pedantic(running.call, rounds=3, iterations=1)
    gpu.device.release()
