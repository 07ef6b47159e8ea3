"""What has to be beaten: torchvision's ResNets, compiled beside eager; eager in a CUDA graph; without gradients."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from .. import networks
from ..harness import Context, Item
from ..networks import Training
from ..timing import interleave


def items(context: Context) -> Iterator[Item]:
    yield "resnet50 compile", lambda: compiled(context, 50, {})
    yield "resnet18 compile", lambda: compiled(context, 18, {})
    yield "resnet50 eager, graph", lambda: _eager(context, 50)
    yield "resnet18 eager, graph", lambda: _eager(context, 18)
    yield "resnet50 inference", lambda: _inference(context)


def _build(context: Context, depth: int, options: dict[str, Any] | None = None) -> Training:
    torch.manual_seed(0)
    model = networks.torchvision_resnet(depth, context.dry)
    return Training(model, context.device, 256, 224, compile_options=options)


def _eager(context: Context, depth: int) -> dict[str, Any]:
    candidates, steps, peaks = {}, {}, {}
    for name in ("eager", "graph"):
        candidates[name] = _build(context, depth)
        steps[name] = candidates[name].prepare(graph=name == "graph")
        peaks[name] = candidates[name].peak_bytes()
        context.device.release()
    return _finish(context, candidates, steps, peaks)


def _finish(context: Context, candidates: Any, steps: Any, peaks: Any, **more: Any) -> dict[str, Any]:
    results = networks.compare(context.device, candidates, steps)
    for name, peak in peaks.items():
        results[name]["peak_bytes"] = peak
    return {"batch": 256, "size": 224, "candidates": results, **more, "line": networks.line(results)}


def compiled(context: Context, depth: int, options: dict[str, Any]) -> dict[str, Any]:
    """Beside eager once more, so that the ratio is taken in one process, turn by turn."""
    torch._dynamo.reset()
    options = {"backend": "eager"} if context.dry else options
    candidates = {"eager": _build(context, depth)}
    steps = {"eager": candidates["eager"].prepare(warmup=3)}
    peaks = {"eager": candidates["eager"].peak_bytes()}
    context.device.release()
    name = options.get("mode", "compile")
    candidates[name] = _build(context, depth, options)
    start = time.time()
    steps[name] = candidates[name].prepare(warmup=6)
    seconds = time.time() - start
    candidates[name].device.reset_peak()
    held = context.device.allocated()
    steps[name]()
    context.device.synchronize()
    # Compilation and its autotuning allocate too: the peak is that of one more step.
    peaks[name] = context.device.peak() - candidates[name].before
    return _finish(context, candidates, steps, peaks, compile_seconds=seconds, held_bytes=held)


def _inference(context: Context) -> dict[str, Any]:
    batch, size = networks.tiny_or(context.dry, 256, 224)
    model = networks.torchvision_resnet(50, context.dry).to(context.device.name, torch.bfloat16)
    model = model.to(memory_format=torch.channels_last).eval()
    x = torch.randn(batch, 3, size, size, device=context.device.name, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        replay = context.device.capture(lambda: model(x))
        timing = interleave(context.device, {"graph": [replay]})["graph"]
    rate = 256 / (timing.us * 1e-6)
    return {"images_per_s": rate, **timing.to_dict(), "line": f"{rate:.0f}/s in a graph, batch 256"}
