"""Whole training steps, turn by turn in one process: eager, eager in a CUDA graph, ours, ours in a CUDA graph; of
ResNet-50 also a graph of launches that depend on one another (launch/dependent.py).

All start from the same weights and see the same batch, so the losses of the first steps must agree too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

import fused_resnet as fr
from fused_resnet.launch.dependent import dependent_launches

from .. import networks
from ..harness import Context, Item
from ..networks import LOSS_TOLERANCE, Training
from .kernels import target_of

DEPENDENT = "ours graph, dependent launches"


def items(context: Context) -> Iterator[Item]:
    yield "resnet50", lambda: compare(context, 50, dependent=True)
    yield "resnet18", lambda: compare(context, 18)


def compare(
    context: Context, depth: int, batch: int = 256, *, compiled: bool = False, dtype: torch.dtype = torch.bfloat16,
    dependent: bool = False
) -> dict[str, Any]:  # fmt: skip
    """One model at one batch: what the candidates reach, their peak memory, and whether their losses agree."""
    torch.manual_seed(0)
    theirs = networks.torchvision_resnet(depth, context.dry)
    ours = networks.fused_resnet(depth, context.dry)
    ours.load_state_dict(theirs.state_dict())
    plan: dict[str, Any] = {} if context.dry else planned(context, ours, batch, dtype)
    if not context.dry:  # in parallel, before anything holds the device
        ours = ours.to(context.device.name).to(memory_format=torch.channels_last)
        for wanted in (False, True) if dependent else (False,):
            with dependent_launches(wanted):
                fr.warmup(ours, (batch, 3, 224, 224), dtype)
    options = {"backend": "eager"} if context.dry else {}
    makers: dict[str, tuple[torch.nn.Module, bool, dict[str, Any]]] = {
        "eager": (theirs, False, {}),
        "graph": (theirs, True, {}),
        "ours": (ours, False, {}),
        "ours graph": (ours, True, {}),
    }
    if dependent:
        makers[DEPENDENT] = (ours, True, {"dependent": True})
    if compiled:
        makers = {"eager": (theirs, False, {}), "compile": (theirs, False, {"compile_options": options}),
                  "ours compile": (ours, False, {"compile_options": options})}  # fmt: skip
    candidates: dict[str, Training] = {}
    steps, peaks, losses, failed = {}, {}, {}, {}
    for name, (model, graph, how) in makers.items():
        torch.manual_seed(1)
        try:
            one = Training(copy.deepcopy(model), context.device, batch, 224, dtype=dtype, **how)
            steps[name] = one.prepare(graph=graph)
        except Exception as error:  # the others' times still say something
            failed[name] = f"{type(error).__name__}: {error}"[:500]
            print(f"[step] resnet{depth} {name}: FAILED {failed[name][:200]}", flush=True)
            steps.pop(name, None)
            continue
        candidates[name], peaks[name], losses[name] = one, one.peak_bytes(), one.losses
        context.device.release()
    results = networks.compare(context.device, candidates, steps)
    for name, peak in peaks.items():
        results[name]["peak_bytes"] = peak
    line = networks.line(results)
    if plan.get("projected"):
        line += f" | projected {plan['projected'].middle:.0f}/s"
    first = next(iter(losses.values()))
    apart = {name: max(abs(a / b - 1) for a, b in zip(values, first, strict=True)) for name, values in losses.items()}
    worst = max(apart.values())
    line += f" | losses within {worst:.1e}" + (" WRONG" if not worst <= LOSS_TOLERANCE else "")
    return {"batch": batch, "size": 224, "candidates": results, "losses": losses, "failed": failed, "plan": plan,
            "ok": worst <= LOSS_TOLERANCE and not failed, "line": line}  # fmt: skip


def planned(context: Context, model: torch.nn.Module, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """What runs and why, operation by operation, with its floor; and what was projected for it, in images/s."""
    found = fr.explain(model.to(memory_format=torch.channels_last), (batch, 3, 224, 224), dtype=dtype,
                       target=target_of(context))  # fmt: skip
    names = ("name", "source", "route", "reason", "launches", "bytes", "flops", "floor_us", "projected_us")
    rows = [{name: getattr(row, name) for name in names} for row in found.rows if row.source != "eager"]
    return {"projected": found.images_per_second, "rows": rows}
