"""The numerics rule on whole blocks at the shapes of ResNet-50 and ResNet-18: output and every gradient.

Eager PyTorch in the same dtype and the block are both scored against float64 with the ReLU masks of whoever is scored
(tests/numerics.py). A stem is scored without forced masks: both sides choose their maxima as they round.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet as fr
from fused_resnet.autograd.chain import SLOTS
from fused_resnet.launch.record import record_launches
from tests import numerics

from ..device import Device
from ..errors import exact_float32
from ..harness import Context, Item

BATCH = 16
STEM_SLACK = 1.25
DRY_DRAWS = 4
"""Of a rehearsal, whose gradients of four channels are few sums that nearly cancel: one block in a hundred draws such
numbers that eager is right to its last digit, or ours is not."""

BLOCKS: tuple[tuple[str, int, int, int, int], ...] = (
    ("Bottleneck", 256, 64, 1, 56),
    ("Bottleneck", 64, 64, 1, 56),
    ("Bottleneck", 256, 128, 2, 56),
    ("Bottleneck", 512, 128, 1, 28),
    ("Bottleneck", 512, 256, 2, 28),
    ("Bottleneck", 1024, 256, 1, 14),
    ("Bottleneck", 1024, 512, 2, 14),
    ("Bottleneck", 2048, 512, 1, 7),
    ("BasicBlock", 64, 64, 1, 56),
    ("BasicBlock", 64, 128, 2, 56),
    ("BasicBlock", 512, 512, 1, 7),
    ("ConvBNReLU", 64, 64, 1, 56),
)
"""Class, input channels, planes, stride, side of the input."""


def items(context: Context) -> Iterator[Item]:
    for kind, inplanes, planes, stride, side in BLOCKS:
        for dtype in (torch.float32,) if context.dry else (torch.bfloat16, torch.float16):
            if context.dry:
                inplanes, planes, side = max(4, inplanes // 32), max(4, planes // 32), 6
            name = f"{kind} {inplanes}, {planes}, /{stride} {side}px {str(dtype).removeprefix('torch.')}"
            yield name, lambda a=(kind, inplanes, planes, stride, side), d=dtype: judge(context.device, *a, d)
    for dtype in (torch.float32,) if context.dry else (torch.bfloat16, torch.float16):
        shape = (8, 6) if context.dry else (256, 56)
        said = f"{shape[0]}, {shape[1]}px {str(dtype).removeprefix('torch.')}"
        yield f"BNAddReLU {said}", lambda s=shape, d=dtype: judge_bn_add(context.device, *s, d)
        yield f"Stem {str(dtype).removeprefix('torch.')}", lambda d=dtype: judge_stem(context.device, d)


class PlainStem(fr.Stem):
    """The stem's layers one by one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)


PLAIN: dict[str, Any] = {
    "Bottleneck": fr.reference.Bottleneck,
    "BasicBlock": fr.reference.BasicBlock,
    "ConvBNReLU": fr.reference.ConvBNReLU,
    "BNAddReLU": fr.reference.BNAddReLU,
    "Stem": PlainStem,
}


def make(kind: str, inplanes: int, planes: int, stride: int, *, plain: bool = False) -> nn.Module:
    """A layer or block, ours or plain PyTorch's; with a projection where the shapes ask for one."""
    cls = PLAIN[kind] if plain else getattr(fr, kind)
    if kind == "ConvBNReLU":
        return cls(inplanes, planes, 3, stride)
    if kind == "Stem":
        return cls(inplanes, planes)
    if kind == "BNAddReLU":
        return cls(planes)
    width = planes * cls.expansion
    downsample = None
    if stride != 1 or inplanes != width:
        downsample = nn.Sequential(nn.Conv2d(inplanes, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    return cls(inplanes, planes, stride, downsample)


def prepare(device: Device, module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights that ``dtype`` holds exactly, gamma and beta that are not 1 and 0."""
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.Conv2d):
                child.weight.copy_(child.weight.to(dtype))
            elif isinstance(child, nn.BatchNorm2d):
                child.weight.uniform_(0.5, 1.5)
                child.bias.normal_(0, 0.3)
    return module.to(device.name).to(memory_format=torch.channels_last).train()


def _layer(conv: nn.Conv2d, bn: nn.BatchNorm2d, relu: bool = True) -> numerics.Layer:
    geometry: dict[str, Any] = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
    return numerics.Layer(conv.weight.detach(), bn.weight.detach(), bn.bias.detach(), eps=bn.eps, relu=relu, **geometry)


def _pairs(block: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    if isinstance(block, fr.ConvBNReLU):
        return [(block.conv, block.bn)]
    count = 3 if isinstance(block, fr.Bottleneck) else 2
    return [(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in range(1, count + 1)]


def _run(
    device: Device, module: nn.Module, x: torch.Tensor, dout: torch.Tensor, route: str = "auto"
) -> tuple[torch.Tensor, Any, list[str]]:
    """Forward and backward; the output, what the fused operation kept for backward, and the kernels that ran."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    with record_launches() as launches:
        autocast = torch.autocast(device.name, dtype=x.dtype) if half else nullcontext()
        with fr.use_route(route, strict=route != "auto"), autocast:
            out = module(x)
        kept = _saved(out.grad_fn)
        out.backward(dout)
    ran = sorted({launch.kernel for launch in launches})
    if all(kernel.startswith("vendor_") for kernel in ran):
        raise RuntimeError(f"the fused route did not run; launches: {ran}")
    return out.detach(), kept, ran


def _image(device: Device, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    t = torch.randn(shape, device=device.name, dtype=dtype)
    return t.contiguous(memory_format=torch.channels_last)


def _saved(node: Any) -> list[Any]:
    """What the fused operation kept for backward."""
    while node is not None and not hasattr(node, "plan"):
        node = node.next_functions[0][0]
    if node is None:
        raise RuntimeError("the module's own plain path ran, not the fused operation")
    return list(node.saved_tensors)


def judge(
    device: Device,
    kind: str,
    inplanes: int,
    planes: int,
    stride: int,
    side: int,
    dtype: torch.dtype,
    *,
    route: str = "auto",
) -> dict[str, Any]:
    """The rule on a layer or block: ``ok``, each result's ``scores``, the ``kernels`` that ran."""
    shape = kind, inplanes, planes, stride, side, dtype, route
    draws = [_draw(device, seed, *shape) for seed in range(1, 1 + (DRY_DRAWS if device.dry else 1))]
    results = (numerics.pooled(found) for found in zip(*(draw for draw, _ in draws), strict=True))
    return _verdict(numerics.score_all(*results), draws[0][1])


def _draw(
    device: Device,
    seed: int,
    kind: str,
    inplanes: int,
    planes: int,
    stride: int,
    side: int,
    dtype: torch.dtype,
    route: str,
) -> tuple[list[dict[str, Any]], list[str]]:
    """What the block of random weights makes of random data, with what :func:`_chains` says; the kernels that ran."""
    torch.manual_seed(seed)
    block = prepare(device, make(kind, inplanes, planes, stride), dtype)
    batch = 2 if device.dry else BATCH
    x = _image(device, (batch, inplanes, side, side), dtype).requires_grad_()
    pairs = _pairs(block)
    width = pairs[-1][0].out_channels
    out_side = -(-side // stride)
    dout = _image(device, (batch, width, out_side, out_side), dtype)

    out, kept, ran = _run(device, block, x, dout, route)
    # x, out, then SLOTS each of weight, gamma, beta, raw output and statistics.
    ys, stats = (kept[2 + SLOTS * i : 2 + SLOTS * (i + 1)] for i in (3, 4))
    masks = [
        numerics.relu_mask(y.to(s.dtype) * s[2][None, :, None, None] + s[3][None, :, None, None])
        for y, s in list(zip(ys, stats, strict=True))[: len(pairs) - 1]
    ]
    masks.append(numerics.relu_mask(out))
    candidate = {"z": out, "dx": x.grad}
    parts: dict[str, Any] = {}
    downsample = getattr(block, "downsample", None)
    named = [(str(i), pair) for i, pair in enumerate(pairs)]
    if downsample is not None:
        named.append(("_p", (downsample[0], downsample[1])))
        parts["projection"] = _layer(downsample[0], downsample[1], relu=False)
    elif kind != "ConvBNReLU":
        parts["residual"] = x.detach()
    for suffix, (conv, bn) in named:
        candidate |= {
            f"dw{suffix}": conv.weight.grad,
            f"dgamma{suffix}": bn.weight.grad,
            f"dbeta{suffix}": bn.bias.grad,
        }
    layers = [_layer(conv, bn) for conv, bn in pairs]
    device.synchronize()
    with exact_float32():
        runs = _chains(x.detach(), layers, dout, masks, dtype, parts)
    return [candidate, *runs], ran


def _chains(
    x: Any, layers: Any, dout: Any, masks: Any, dtype: torch.dtype, parts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Eager, the oracle with the candidate's masks, the oracle with eager's. A shortcut's gradient joins dx."""
    eager = numerics.chain(x, layers, dout, dtype=dtype, **parts)
    runs = [
        eager,
        numerics.oracle_chain(x, layers, dout, masks, **parts),
        numerics.oracle_chain(x, layers, dout, eager["masks"], **parts),
    ]
    for run in runs:
        if "dresidual" in run:
            run["dx"] = run["dx"] + run.pop("dresidual")
    return runs


def _verdict(scores: list[numerics.Score], ran: list[str]) -> dict[str, Any]:
    rows = {s.name: {"error": s.error, "eager_error": s.eager_error, "ratio": s.ratio, "failures": s.failures}
            for s in scores}  # fmt: skip
    wrong = [f"{s.name} {'; '.join(s.failures)}" for s in scores if not s.ok]
    worst = max(scores, key=lambda s: s.ratio)
    kernels = f"{sum(not k.startswith('vendor') for k in ran)} of our kernels"
    line = (
        f"WRONG {' | '.join(wrong)[:300]}"
        if wrong
        else f"right; worst {worst.name} {worst.ratio:.2f}x eager's, {kernels}"
    )
    return {"ok": not wrong, "scores": rows, "kernels": ran, "line": line}


def judge_bn_add(device: Device, channels: int, side: int, dtype: torch.dtype) -> dict[str, Any]:
    """A norm's that adds a residual: a chain whose convolution by the identity changes no number."""
    torch.manual_seed(1)
    bn = prepare(device, fr.BNAddReLU(channels), dtype)
    shape = (2 if device.dry else BATCH, channels, side, side)
    y, residual, dout = (_image(device, shape, dtype) for _ in range(3))
    with record_launches() as launches:
        out = bn(y.requires_grad_(), residual.requires_grad_())
        out.backward(dout)
    if not launches:
        raise RuntimeError("the fused operation did not run")
    candidate = {"z": out.detach(), "dx": y.grad, "dresidual": residual.grad}
    candidate |= {"dgamma0": bn.weight.grad, "dbeta0": bn.bias.grad}
    identity = torch.eye(channels, dtype=dtype, device=device.name)[:, :, None, None]
    layers = [numerics.Layer(identity, bn.weight.detach(), bn.bias.detach(), eps=bn.eps)]
    arguments, residual = (y.detach(), layers, dout), residual.detach()
    with exact_float32():
        eager = numerics.chain(*arguments, dtype=dtype, residual=residual)
        masks = ([numerics.relu_mask(out.detach())], eager["masks"])
        oracles = [numerics.oracle_chain(*arguments, mask, residual=residual) for mask in masks]
    return _verdict(numerics.score_all(candidate, eager, *oracles), sorted({launch.kernel for launch in launches}))


def judge_stem(device: Device, dtype: torch.dtype) -> dict[str, Any]:
    """A stem's, likewise."""
    torch.manual_seed(1)
    stem = prepare(device, fr.Stem(3, 16 if device.dry else 64), dtype)
    batch, side = (2, 16) if device.dry else (BATCH, 224)
    x = _image(device, (batch, 3, side, side), dtype)
    with torch.no_grad():
        shape = F.max_pool2d(stem.conv1(x.float()), 3, 2, 1).shape
    dout = _image(device, tuple(shape), dtype)
    out, _, ran = _run(device, stem, x, dout)
    ours = [out, stem.conv1.weight.grad, stem.bn1.weight.grad, stem.bn1.bias.grad]
    with exact_float32():
        eager, oracle = (_plain_stem(stem, x, dout, to) for to in (dtype, torch.float64))
    scores = []
    for name, result, theirs, true in zip(("z", "dw0", "dgamma0", "dbeta0"), ours, eager, oracle, strict=True):
        score = numerics.score(result, theirs, true, name)
        allowed = score.error <= STEM_SLACK * score.eager_error + 1e-6
        score.failures = [] if allowed else [f"R: {score.error:.2e} against eager's {score.eager_error:.2e}"]
        scores.append(score)
    return _verdict(scores, ran)


def _plain_stem(stem: Any, x: torch.Tensor, dout: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    weight = stem.conv1.weight.detach().to(dtype, copy=True).requires_grad_()
    gamma, beta = (p.detach().to(wide, copy=True).requires_grad_() for p in (stem.bn1.weight, stem.bn1.bias))
    y = F.conv2d(x.to(dtype), weight, None, 2, 3)
    out = F.max_pool2d(F.relu(F.batch_norm(y, None, None, gamma, beta, True, 0.0, stem.bn1.eps)), 3, 2, 1)
    out.backward(dout.to(dtype))
    return [out.detach(), *(p.grad for p in (weight, gamma, beta))]  # type: ignore[list-item]


def finish(context: Context) -> None:
    wrong = [name for name, r in context.results.items() if "error" in r or r.get("ok") is False]
    context.document["wrong"] = wrong
    print(f"[blocks] wrong or failed: {', '.join(wrong) or 'none'}", flush=True)
