"""One kernel under pytest-benchmark: checked first, then timed, with what its time should be judged by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fused_resnet.launch.record import record_launches
from fused_resnet.plan import planner
from fused_resnet.plan.target import Target, current

from . import problems
from .cases import ConvCase
from .device import Device
from .harness import DEFAULT_CEILINGS
from .passes import PassCase
from .passes import cases as pass_cases
from .roles import cases
from .timing import floor_us, interleave, rotation

ROUNDS = 20


def target() -> Target:
    """What the kernels run on here."""
    found = current(torch.device("cuda", 0))
    assert found is not None
    return found


def conv_cases(kind: str) -> list[ConvCase]:
    """ResNet-50's, batch 256, bfloat16."""
    found = [case for layer in problems.layers(50) for case in cases(layer, (kind,))]
    return list({case.name: case for case in found}.values())


def passes_named(*launchers: str) -> list[PassCase]:
    """The cases of these launchers, whatever their options."""
    return [case for case in pass_cases(dry=False) if case.kind.partition("+")[0] in launchers]


def identify(case: Any) -> str:
    return case.name if isinstance(case, (ConvCase, PassCase)) else str(case)


def bench_conv(benchmark: Any, gpu: Device, case: ConvCase, who: str) -> None:
    """Ours or the vendor's; the group is the shape, so that a table shows them together."""
    benchmark.group = case.name
    sets = [case.inputs(gpu.name) for _ in range(rotation(gpu, case.bytes, limit=8))]
    if who == "vendor":
        floor = floor_us(DEFAULT_CEILINGS, problems.conv_bytes(case.problem), case.problem.flops)
        benchmark.extra_info |= {"bytes": problems.conv_bytes(case.problem), "flops": case.problem.flops}
        _time(benchmark, gpu, [lambda t=t: case.vendor(t) for t in sets], floor)
        return
    config = case.candidates(target())[0]
    if not case.gram and not case.formed:
        choice = getattr(planner.plan_conv(case.problem, target(), first=case.first), case.kind)
        config, benchmark.extra_info["plan"] = choice.config or config, choice.reason
    _ours(benchmark, gpu, case, config, sets)


def bench_pass(benchmark: Any, gpu: Device, case: PassCase) -> None:
    benchmark.group = case.name
    config = case.config(target().sm_count)
    sets = [case.inputs(gpu.name) for _ in range(rotation(gpu, 2 * case.rows * case.C, limit=8))]
    _ours(benchmark, gpu, case, config, sets)


def _ours(benchmark: Any, gpu: Device, case: Any, config: Any, sets: list[Any]) -> None:
    verdicts = case.check(sets[0], config)
    assert all(v["ok"] for v in verdicts.values()), verdicts
    with record_launches() as launches:
        case.ours(sets[0], config)
    nbytes, flops = sum(entry.bytes for entry in launches), sum(entry.flops for entry in launches)
    errors = {name: v["rms"] for name, v in verdicts.items()}
    benchmark.extra_info |= {"bytes": nbytes, "flops": flops, "error": errors, "config": config.to_dict()}
    _time(benchmark, gpu, [lambda t=t: case.ours(t, config) for t in sets], floor_us(DEFAULT_CEILINGS, nbytes, flops))


def _time(benchmark: Any, gpu: Device, calls: list[Callable[[], object]], floor: float) -> None:
    """Rounds on the host's clock, each over every input set; the device's own time stands in ``extra_info``."""

    def round_of_calls() -> None:
        for call in calls:
            call()
        gpu.synchronize()

    timing = interleave(gpu, {"it": calls}, samples=ROUNDS)["it"]
    benchmark.extra_info |= {"device_us": timing.us, "floor_us": floor, "ratio": timing.us / floor, "calls": len(calls)}
    benchmark.pedantic(round_of_calls, rounds=ROUNDS, iterations=1, warmup_rounds=2)
