"""What runs on the host, and so everywhere: the planner, a launch's Python, a block with the launches left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fused_resnet as fr
from benchmarks import problems
from benchmarks.cases import ConvCase
from benchmarks.host import BLOCKS, host_times
from benchmarks.roles import cases
from fused_resnet.explain import explain
from fused_resnet.launch.record import record_launches
from fused_resnet.plan import planner, tables
from fused_resnet.plan.candidates import candidates
from fused_resnet.plan.defaults import default_config
from fused_resnet.plan.target import H100, Assumption, assume

LAYERS = [layer for layer in problems.layers(50) if layer.role != "stem"]
CASES = {case.kind: case for case in cases(LAYERS[2]) if not case.gram}


def bench_plan_conv(benchmark: Any) -> None:
    """Every convolution of ResNet-50, nothing remembered."""
    benchmark.group = "planner, ResNet-50"
    benchmark(lambda: [planner.plan_conv.__wrapped__(layer.problem, H100, first=False) for layer in LAYERS])


def bench_plan_conv_again(benchmark: Any) -> None:
    """The same, remembered, as every step but the first has it."""
    benchmark.group = "planner, ResNet-50"
    benchmark(lambda: [planner.plan_conv(layer.problem, H100, first=False) for layer in LAYERS])


def bench_lookup(benchmark: Any) -> None:
    benchmark.group = "planner, ResNet-50"
    benchmark(lambda: [tables.lookup(layer.problem, "fprop", H100) for layer in LAYERS])


def bench_candidates(benchmark: Any) -> None:
    benchmark.group = "planner, ResNet-50"
    found = benchmark(lambda: [candidates(layer.problem, "fprop", H100) for layer in LAYERS])
    benchmark.extra_info["configurations"] = sum(map(len, found))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def bench_launcher(benchmark: Any, case: ConvCase) -> None:
    """Checks, allocation and record of one launch on ``meta`` tensors: all of it but Triton's own."""
    benchmark.group = "host time of a launch"
    t = {name: v.to("meta") for name, v in case.inputs("cpu", empty=True).items()}
    config = default_config(case.problem, case.kind, H100)
    benchmark(lambda: case.ours(t, config))
    with record_launches() as launches:
        case.ours(t, config)
    benchmark.extra_info |= {"bytes": launches[0].bytes, "flops": launches[0].flops}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def bench_block(benchmark: Any, backward: bool) -> None:
    """A Bottleneck on ``meta`` tensors, planned for an H100: every line of Python of a step, no kernel."""
    benchmark.group = "host time of a block"
    block = fr.Bottleneck(256, 64).to("meta", torch.bfloat16).to(memory_format=torch.channels_last)
    x = torch.empty(256, 256, 56, 56, dtype=torch.bfloat16, device="meta", requires_grad=backward)
    x = x.contiguous(memory_format=torch.channels_last)
    dout = torch.empty_like(x)

    def step() -> None:
        with assume(Assumption(H100)):
            out = block(x)
        if backward:
            out.backward(dout)

    with record_launches() as launches:
        step()
    kernels = [launch.kernel for launch in launches]
    benchmark.extra_info |= {"launches": len(kernels), "kernels": sorted(set(kernels))}
    benchmark(step)


def bench_plain_block(benchmark: Any) -> None:
    """torchvision's, likewise: what the dispatcher and autograd cost without us."""
    benchmark.group = "host time of a block"
    resnet = pytest.importorskip("torchvision.models.resnet")
    block: nn.Module = resnet.Bottleneck(256, 64).to("meta")
    x = torch.empty(256, 256, 56, 56, device="meta", requires_grad=True)
    dout = torch.empty_like(x)
    benchmark(lambda: block(x).backward(dout))


@pytest.mark.parametrize("vendors", [False, True], ids=["ours left out", "all left out"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", BLOCKS)
def bench_host_time(benchmark: Any, kind: str, autocast: bool, vendors: bool) -> None:
    """A block with its launches left out beside eager's dispatch of it, in turns, on one-pixel tensors."""
    benchmark.group = "host time, in turns with eager"
    taken = benchmark.pedantic(host_times, (kind,), {"autocast": autocast, "vendors": vendors}, rounds=1, iterations=1)
    ours, eager = taken
    names = {"ours": ours, "eager": eager}
    benchmark.extra_info |= {f"{who}_{way}_us": value for who, t in names.items() for way, value in t._asdict().items()}


def bench_explain(benchmark: Any) -> None:
    """A whole ResNet-50, planned and counted without a GPU."""
    benchmark.group = "explain"
    model = fr.resnet50().to("meta")
    found = benchmark.pedantic(lambda: explain(model, (256, 3, 224, 224), target="h100"), rounds=2, iterations=1)
    benchmark.extra_info |= {"launches": found.launches, "bytes": found.bytes, "floor_us": found.floor_us}
