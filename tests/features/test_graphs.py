"""CUDA graphs: nothing in a step waits for the device, and a replayed step is the step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_resnet as fr
from fused_resnet.plan.target import H100
from tests.modules.test_blocks import projection
from tests.no_launches import launches_left_out

WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "allclose", "masked_select", "_unique2", "unique_dim"}
"""Operators whose result the host needs before it can go on."""
MEMORY = {"empty", "empty_like", "empty_strided", "new_empty", "to", "clone"}
VIEWS = {"alias", "flatten", "permute", "select", "slice", "unsqueeze", "view"}
LAUNCHES = {"convolution", "convolution_backward", "_to_copy", "add_", "cat", "zeros_like"}
"""The vendor's convolutions, its results in another dtype, the residual's gradient added to what it wrote, and the
coefficients of a frozen stem."""


class NothingWaits(TorchDispatchMode):
    """Raises at an operator that waits for the device, in our operators' own code too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        assert func._opname not in WAITS, f"{func} waits for the device"
        if func.namespace != "fused_resnet":
            if self.is_inside:
                self.inside.add(func._opname)
            return func(*args, **(kwargs or {}))
        self.operators.add(func._opname)
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        with self:
            self.is_inside = True
            try:
                return func.redispatch(keys, *args, **(kwargs or {}))
            finally:
                self.is_inside = False

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.inside: set[str] = set()
        """What our operators call."""
        self.is_inside = False


def network() -> nn.Module:
    """Each of our modules, NHWC."""
    net = nn.Sequential(
        fr.Stem(3, 16),
        fr.Bottleneck(16, 8, 2, projection(16, 32, 2)),
        fr.Bottleneck(32, 8),
        fr.BasicBlock(32, 32),
        fr.ConvBNReLU(32, 16, 3),
        fr.BNAddReLU(16),
    )
    return net.to(memory_format=torch.channels_last)


EDITS: dict[str, Callable[[nn.Module], object]] = {
    "training": lambda net: None,
    "cumulative": lambda net: [setattr(m, "momentum", None) for m in norms(net)],
    "frozen": lambda net: net.eval(),
    "mixed": lambda net: [m.eval() for m in norms(net)[::2]],
    "untracked": lambda net: [setattr(m, "track_running_stats", False) for m in norms(net)],
    "frozen parameters": lambda net: [p.requires_grad_(i % 3 > 0) for i, p in enumerate(net.parameters())],
}


def norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("route", ["auto", "staged", "gram"])
@pytest.mark.parametrize("edit", EDITS)
def test_nothing_in_a_step_waits_for_the_device(edit: str, route: str, dtype: torch.dtype) -> None:
    net = network()
    EDITS[edit](net)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    with launches_left_out(H100), fr.use_route(route), NothingWaits() as watch:
        with autocast:
            out = net(x)
        out.backward(torch.ones_like(out))
        with torch.no_grad(), autocast:
            net(x)
    assert {"chain_forward", "chain_backward", "stem_forward", "stem_backward", "bn_act_backward"} <= watch.operators
    assert watch.inside <= MEMORY | VIEWS | LAUNCHES, "a kernel of PyTorch's in a step of ours"


@pytest.mark.quick
def test_the_watch_sees_what_waits() -> None:
    with NothingWaits(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(2).sum().item()


# ---------------------------------------------------------------- on a GPU


def images(step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, 64, 64, generator=generator).cuda()
    return x.contiguous(memory_format=torch.channels_last)


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name
        assert p.grad is None or torch.equal(p.grad, q[1].grad), name
    for (name, p), q in zip(a.named_buffers(), b.buffers(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.gpu
@pytest.mark.parametrize("route", ["auto", "staged", "gram"])
def test_a_step_does_not_synchronise(route: str) -> None:
    net, x = network().cuda(), images()

    def step() -> None:
        with fr.use_route(route), torch.autocast("cuda", dtype=torch.bfloat16):
            out = net(x)
        out.backward(torch.ones_like(out))

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_graphed_callables(training: bool) -> None:
    """``make_graphed_callables``: outputs, gradients and statistics of the replay are those of the module."""
    net = network().cuda().train(training)
    twin, start = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    graphed = torch.cuda.make_graphed_callables(twin, (images().requires_grad_(),))
    twin.load_state_dict(start)  # capturing warmed up, and the statistics moved
    for step in range(3):
        outs = []
        for call, model in ((net, net), (graphed, twin)):
            model.zero_grad()
            leaf = images(step).requires_grad_()
            out = call(leaf)
            out.backward(torch.ones_like(out))
            outs.append((out.detach().clone(), leaf.grad))
        assert all(map(torch.equal, *outs))
        same(net, twin)


@pytest.mark.gpu
def test_a_whole_captured_step_of_sgd() -> None:
    net = network().cuda()
    twin = copy.deepcopy(net)
    static = images()

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            out = model(x)
        out.float().square().mean().backward()
        optimizer.step()

    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (net, twin)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(twin, optimizers[1], static)
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3):
        step(net, optimizers[0], static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(twin, optimizers[1], static)
    for number in range(3):
        static.copy_(images(number))
        graph.replay()
        step(net, optimizers[0], images(number))
        same(net, twin)
