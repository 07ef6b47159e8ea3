"""One profile of the fused training step: each kernel's time, beside the floor of what it was launched for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

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
    training = Training(model, context.device, 256, 224)
    training.prepare()
    floors, launched, count = _floors(context, training)
    activity = ProfilerActivity.CPU if context.dry else ProfilerActivity.CUDA
    with profile(activities=[activity]) as profiler:
        for _ in range(1 if context.dry else STEPS):
            training.step()
        context.device.synchronize()
    steps = 1 if context.dry else STEPS
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
    return {"rows": rows, "busy_us": busy, "launches": launched, "launch_count": count,
            "line": f"{busy / 1e3:.2f} ms of kernels in a step, {count} recorded launches"}  # fmt: skip


def _floors(context: Context, training: Training) -> tuple[dict[str, float], list[dict[str, Any]], int]:
    """Floors of one step by kernel name, and every distinct launch with how often it came."""
    with record_launches() as launches:
        training.step()
    floors: dict[str, float] = defaultdict(float)
    seen: dict[str, dict[str, Any]] = {}
    for launch in launches:
        floor = floor_us(context.ceilings, launch.bytes, launch.flops)
        floors[launch.kernel] += floor
        row = seen.setdefault(repr(launch), {**launch._asdict(), "floor_us": floor, "count": 0})
        row["count"] += 1
    return dict(floors), list(seen.values()), len(launches)
