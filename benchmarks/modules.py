"""Layers, blocks and networks as the benchmarks run them: by whom and how, what they cost, when they are right."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.explain import GLUE, image_like
from fused_resnet.plan.target import H100, Target

from . import errors, networks
from .device import Device
from .stages import blocks
from .tensors import image

BASELINE = "eager"
LOGITS_SLACK = 1.5
"""A network's scores against eager's own error: what fifty layers make of roundings in different places."""


@dataclass(frozen=True)
class How:
    """How a candidate runs a module: whose code, captured, compiled (``mode``), by which route of ours."""

    ours: bool = False
    graph: bool = False
    mode: str | None = None
    route: str = "auto"

    def options(self, dry: bool) -> dict[str, Any] | None:
        """For torch.compile, which forgets what it compiled for others; None where nothing is compiled."""
        if self.mode is None:
            return None
        torch._dynamo.reset()
        return {"backend": "eager"} if dry else {"mode": self.mode}


HOW = {
    "eager": How(),
    "graph": How(graph=True),
    "compile": How(mode="default"),
    "max-autotune": How(mode="max-autotune"),
    "ours": How(ours=True),
    "ours graph": How(ours=True, graph=True),
    "ours compile": How(ours=True, mode="default"),
    "ours graph, staged": How(ours=True, graph=True, route="staged"),
    "ours graph, gram": How(ours=True, graph=True, route="gram"),
    "ours graph, single": How(ours=True, graph=True, route="single"),
}


@dataclass(frozen=True)
class Running:
    """A candidate that is warm: what one call of it is, the peak of its memory, the losses of its first steps."""

    call: Callable[[], object]
    peak_bytes: int
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Cost:
    """What the fused way moves and computes, its floor (0 where the target has no rates), eager's bytes; ``plan``: the
    routes that run and why."""

    flops: int
    bytes: int
    floor_us: float
    eager_bytes: int
    plan: tuple[str, ...] = ()


class _Inside(nn.Module):
    """A block as it stands in a network: its input is of 16 bits already, and needs a gradient."""

    def __init__(self, block: nn.Module, gradient: bool) -> None:
        super().__init__()
        self.block = block
        self.scale = nn.Parameter(torch.ones(1), requires_grad=gradient)

    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        return self.block(*((x * self.scale).to(torch.bfloat16) for x in xs))


@cache
def cost(case: BlockCase | ModelCase, target: Target = H100) -> Cost:
    """Counted without data, as planned for ``target``, whatever this machine has. Of a block without what is around."""
    whole = isinstance(case, ModelCase)
    with torch.device("meta"):
        model = case.build(ours=True)
        model = model if isinstance(case, ModelCase) else _Inside(model, case.needs_input_gradient)
    model.to(memory_format=torch.channels_last).train(case.training)
    inputs = [image_like(case.input_shape, torch.bfloat16)] * case.operands
    found = fr.explain(model, example_input=inputs, target=target, training=case.training, optimizer=case.optimizer)
    rows, eager = ([row for row in step.rows if whole or row.name.startswith(("block", GLUE))]
                   for step in (found, found.eager))  # fmt: skip
    plan = dict.fromkeys(f"{row.route}: {row.reason}" for row in rows if row.source != "eager")
    flops, nbytes = sum(row.flops for row in rows), sum(row.bytes for row in rows)
    return Cost(flops, nbytes, sum(row.floor_us or 0 for row in rows), sum(row.bytes for row in eager), tuple(plan))


@dataclass(frozen=True)
class BlockCase:
    """A layer or block, forward and backward; with ``training`` off forward alone, with frozen statistics."""

    kind: str
    inplanes: int
    planes: int
    stride: int
    side: int
    training: bool = True
    batch: int = 256
    optimizer: None = None

    @property
    def name(self) -> str:
        shape = f"{self.inplanes}, {self.planes}, /{self.stride} {self.side}px, batch {self.batch}"
        return f"{self.kind} {shape}{'' if self.training else ', frozen'}"

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.inplanes, self.side, self.side

    @property
    def operands(self) -> int:
        """Inputs of that shape: a norm that adds takes a residual."""
        return 2 if self.kind == "BNAddReLU" else 1

    @property
    def needs_input_gradient(self) -> bool:
        """Images need none."""
        return self.training and self.kind != "Stem"

    def tiny(self) -> BlockCase:
        """What a rehearsal runs."""
        inplanes, planes = (max(4, c // 32) for c in (self.inplanes, self.planes))
        return replace(self, inplanes=inplanes, planes=planes, side=6, batch=2)

    def build(self, ours: bool) -> nn.Module:
        return blocks.make(self.kind, self.inplanes, self.planes, self.stride, plain=not ours)

    def run(self, how: How, device: Device) -> Running:
        if device.dry and self.batch > 2:
            return self.tiny().run(how, device)
        half = not device.dry
        module = self.build(how.ours).to(device.name).to(memory_format=torch.channels_last).train(self.training)
        before = device.allocated()
        dtype = torch.bfloat16 if half else torch.float32
        xs = [image(*self.input_shape, dtype, device.name) for _ in range(self.operands)]
        for x in xs:
            x.requires_grad_(self.needs_input_gradient)
        forward = module if (options := how.options(device.dry)) is None else torch.compile(module, **options)

        def step(dout: torch.Tensor | None = None) -> torch.Tensor:
            module.zero_grad(set_to_none=True)
            for x in xs:
                x.grad = None
            autocast = torch.autocast(device.name, dtype=dtype) if half else nullcontext()
            with torch.set_grad_enabled(self.training), fr.use_route(how.route, strict=how.route != "auto"), autocast:
                out = forward(*xs)
            if self.training and dout is not None:
                out.backward(dout)
            return out

        dout = torch.randn_like(step()) if self.training else None
        for _ in range(1 if device.dry else 3):  # compiles what backward needs, too
            step(dout)
        device.synchronize()
        device.reset_peak()
        call: Callable[[], object] = lambda: step(dout)  # noqa: E731
        call()
        device.synchronize()
        peak = device.peak() - before
        return Running(device.capture(call) if how.graph else call, peak)

    def check(self, how: How, device: Device) -> list[str]:
        """What is wrong with ours by the numerics rule, at a batch of 16; nothing, where nothing is."""
        dtype = torch.float32 if device.dry else torch.bfloat16
        case = self.tiny() if device.dry else self
        if not self.training:
            return case._check_frozen(how, device, dtype)
        if self.kind == "Stem":
            verdict = blocks.judge_stem(device, dtype)
        elif self.kind == "BNAddReLU":
            verdict = blocks.judge_bn_add(device, case.planes, case.side, dtype)
        else:
            shape = case.inplanes, case.planes, case.stride, case.side
            verdict = blocks.judge(device, case.kind, *shape, dtype, route=how.route)
        return [f"{name}: {'; '.join(row['failures'])}" for name, row in verdict["scores"].items() if row["failures"]]

    def _check_frozen(self, how: How, device: Device, dtype: torch.dtype) -> list[str]:
        module = blocks.prepare(device, self.build(ours=True), dtype).eval()
        plain = blocks.prepare(device, self.build(ours=False), dtype).eval()
        plain.load_state_dict(module.state_dict())
        x = image(min(self.batch, blocks.BATCH), *self.input_shape[1:], dtype, device.name)
        autocast = torch.autocast(device.name, dtype=dtype) if dtype == torch.bfloat16 else nullcontext()
        with torch.no_grad(), errors.exact_float32():
            with autocast, fr.use_route(how.route, strict=how.route != "auto"):
                result, eager = module(x), plain(x)
            oracle = plain.double()(x.double())
        verdict = errors.judge(result, eager, oracle)
        return (
            []
            if verdict["ok"]
            else [f"z: {verdict['failed']}, {verdict['rms']:.1e} (eager {verdict['eager_rms']:.1e})"]
        )


@dataclass(frozen=True)
class ModelCase:
    """A ResNet: one training step, or with ``training`` off one forward pass with frozen statistics."""

    depth: int
    batch: int = 256
    training: bool = True
    operands: ClassVar[int] = 1

    @property
    def name(self) -> str:
        return f"resnet{self.depth}, batch {self.batch}"

    @property
    def optimizer(self) -> str | None:
        return "sgd" if self.training else None

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.batch, 3, 224, 224

    def build(self, ours: bool, dry: bool = False) -> nn.Module:
        torch.manual_seed(0)
        return (networks.fused_resnet if ours else networks.torchvision_resnet)(self.depth, dry)

    def run(self, how: How, device: Device) -> Running:
        model = self.build(how.ours, device.dry)
        if self.training:
            options = how.options(device.dry)
            one = networks.Training(model, device, self.batch, 224, compile_options=options, route=how.route)
            call = one.prepare(graph=how.graph)
            if options is not None:  # compiling and its autotuning allocate, too: the peak is that of one more step
                device.reset_peak()
                call()
                device.synchronize()
            return Running(call, one.peak_bytes(), tuple(one.losses))
        before = device.allocated()
        model = model.to(device.name).to(memory_format=torch.channels_last).eval()
        x = self._images(device)
        forward = model if (options := how.options(device.dry)) is None else torch.compile(model, **options)

        def call_it() -> object:
            with torch.inference_mode(), _autocast(device), fr.use_route(how.route):
                return forward(x)

        for _ in range(1 if device.dry else 3):
            call_it()
        device.synchronize()
        device.reset_peak()
        call_it()
        device.synchronize()
        peak = device.peak() - before
        return Running(device.capture(call_it) if how.graph else call_it, peak)

    def _images(self, device: Device, most: int | None = None) -> torch.Tensor:
        batch, size = networks.tiny_or(device.dry, min(self.batch, most or self.batch), 224)
        return image(batch, 3, size, size, torch.float32 if device.dry else torch.bfloat16, device.name)

    def check(self, how: How, device: Device) -> list[str]:
        """Of a forward pass: the scores beside eager's, both against float32. A step's losses are judged as it runs."""
        if self.training:
            return []
        plain, ours = (self.build(who, device.dry).to(device.name) for who in (False, True))
        ours.load_state_dict(plain.state_dict())
        x = self._images(device, most=32)
        with torch.no_grad(), errors.exact_float32():
            for model in (plain, ours):
                model.to(memory_format=torch.channels_last).eval()
            oracle = plain(x.float())
            with _autocast(device), fr.use_route(how.route):
                found = [errors.distance(model(x).float(), oracle)[0] for model in (ours, plain)]
        right = found[0] <= LOGITS_SLACK * found[1] + 1e-5
        return [] if right else [f"scores: {found[0]:.1e} from float32's, eager {found[1]:.1e}"]


def _autocast(device: Device) -> Any:
    return nullcontext() if device.dry else torch.autocast(device.name, dtype=torch.bfloat16)


def losses_apart(ours: Running, theirs: Running) -> list[str]:
    """What is wrong with the losses of the first steps, from the same weights and images."""
    apart = max((abs(a / b - 1) for a, b in zip(ours.losses, theirs.losses)), default=0.0)
    return [] if apart <= networks.LOSS_TOLERANCE else [f"losses: {apart:.1e} apart from eager's"]


BLOCKS = tuple(
    BlockCase(kind, *shape)
    for kind, *shape in (
        ("Bottleneck", 256, 64, 1, 56),
        ("Bottleneck", 512, 128, 1, 28),
        ("Bottleneck", 1024, 256, 1, 14),
        ("Bottleneck", 2048, 512, 1, 7),
        ("Bottleneck", 64, 64, 1, 56),
        ("Bottleneck", 256, 128, 2, 56),
        ("Bottleneck", 512, 256, 2, 28),
        ("Bottleneck", 1024, 512, 2, 14),
        ("BasicBlock", 64, 64, 1, 56),
        ("BasicBlock", 128, 128, 1, 28),
        ("BasicBlock", 256, 256, 1, 14),
        ("BasicBlock", 512, 512, 1, 7),
        ("BasicBlock", 64, 128, 2, 56),
        ("BasicBlock", 128, 256, 2, 28),
        ("BasicBlock", 256, 512, 2, 14),
    )
)
"""Of every stage of a ResNet-50 and a ResNet-18: the block that repeats, and the one that begins the stage."""
LAYERS = (
    BlockCase("Stem", 3, 64, 2, 224),
    *(BlockCase("ConvBNReLU", 64 << stage, 64 << stage, 1, 56 >> stage) for stage in range(4)),
    *(BlockCase("BNAddReLU", 256 << stage, 256 << stage, 1, 56 >> stage) for stage in range(4)),
)
FROZEN = tuple(replace(case, training=False) for case in BLOCKS[:5])
"""With frozen statistics and without gradients."""
FORWARDS = tuple(ModelCase(depth, batch, training=False) for depth in (18, 34, 50, 101) for batch in (256, 32))
STEPS = tuple(ModelCase(depth, batch) for depth in (50, 18, 34, 101) for batch in (256, 128, 32))
