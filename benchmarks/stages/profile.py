"""One profile of the fused training step: each kernel's time, beside the floor of what it was launched for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import fused_resnet as fr
from fused_resnet.launch.record import record_launches

from .. import networks
from ..harness import Context, Item
from ..networks import Training
from ..timing import floor_us

STEPS = 3
TOP = 22


def items(context: Context) -> Iterator[Item]:
    yield "resnet50 ours", lambda: _profile(context, networks.fused_resnet(50, context.dry), "ours")
    yield "resnet50 eager", lambda: _profile(context, networks.torchvision_resnet(50, context.dry), "eager")


def _profile(context: Context, model: torch.nn.Module, name: str) -> dict[str, Any]:
    if not context.dry:
        fr.warmup(model.to(context.device.name).to(memory_format=torch.channels_last), (256, 3, 224, 224))
    training = Training(model, context.device, 256, 224)
    training.prepare()
    recorded = _record(training)
    floors = _floors(context, recorded)
    activity = ProfilerActivity.CPU if context.dry else ProfilerActivity.CUDA
    with profile(activities=[activity]) as profiler:
        for _ in range(1 if context.dry else STEPS):
            training.step()
        context.device.synchronize()
    steps = 1 if context.dry else STEPS
    times = _launch_times(profiler, recorded, steps)
    rows = []
    for event in profiler.key_averages():
        total = getattr(event, "self_cpu_time_total" if context.dry else "self_device_time_total", 0.0)
        if total > 0:
            floor = floors.get(event.key)
            rows.append({"kernel": event.key, "calls": event.count / steps, "us": total / steps, "floor_us": floor})
    rows.sort(key=lambda row: -row["us"])
    busy = sum(row["us"] for row in rows)
    for row in rows[:TOP]:
        floor = f"floor {row['floor_us']:6.0f} ({row['us'] / row['floor_us']:.2f}x)" if row["floor_us"] else ""
        print(f"[profile] {name} {row['us']:8.0f} us {row['us'] / busy:5.1%} {row['calls']:5.0f} x "
              f"{row['kernel'][:70]} {floor}", flush=True)  # fmt: skip
    launches = [
        {**launch._asdict(), "us": us, "floor_us": floor_us(context.ceilings, launch.bytes, launch.flops)}
        for launch, us in zip(recorded, times, strict=True)
    ]
    _print_gaps(name, launches)
    return {"rows": rows, "busy_us": busy, "launches": launches,
            "line": f"{busy / 1e3:.2f} ms of kernels in a step, {len(launches)} recorded launches"}  # fmt: skip


def _record(training: Training) -> list[Any]:
    with record_launches() as launches:
        training.step()
    return list(launches)


def _floors(context: Context, recorded: list[Any]) -> dict[str, float]:
    """Floors of one step by kernel name."""
    floors: dict[str, float] = defaultdict(float)
    for launch in recorded:
        floors[launch.kernel] += floor_us(context.ceilings, launch.bytes, launch.flops)
    return dict(floors)


def _launch_times(profiler: Any, recorded: list[Any], steps: int) -> list[float | None]:
    """Microseconds of each recorded launch, in the profile's last step; None for what goes by another name there.

    A step launches the same kernels in the same order, so the n-th launch of a name is its n-th event.
    """
    events: dict[str, list[float]] = defaultdict(list)
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        if event.device_type == torch.autograd.DeviceType.CUDA:
            events[event.name].append(event.device_time_total)
    counts: dict[str, int] = defaultdict(int)
    for launch in recorded:
        counts[launch.kernel] += 1
    last = {name: events[name][-count:] for name, count in counts.items() if len(events[name]) == steps * count}
    return [last[launch.kernel].pop(0) if launch.kernel in last else None for launch in recorded]


def _print_gaps(name: str, launches: list[dict[str, Any]]) -> None:
    """The launches that lose most against their floors, those alike together."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in launches:
        if row["us"] is not None:
            groups[f"{row['kernel']} {row['bytes']} {row['flops']}"].append(row)
    gaps = sorted(groups.values(), key=lambda group: -sum(row["us"] - row["floor_us"] for row in group))
    for group in gaps[:TOP]:
        first, us = group[0], sum(row["us"] for row in group) / len(group)
        config = " ".join(f"{key[:9]}={value}" for key, value in first["config"].items() if value not in (None, False))
        print(f"[profile] {name} {len(group):3d} x {us:7.1f} us, floor {first['floor_us']:6.1f} "
              f"({us / max(first['floor_us'], 0.1):4.1f}x) {first['bytes'] / 1e6:7.1f} MB {first['kernel']} "
              f"{config}", flush=True)  # fmt: skip
