"""torch.compile sees opaque calls: one graph, results and running statistics bit for bit those of our own eager."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import fused_resnet as fr
from fused_resnet.autograd import chain as op
from fused_resnet.plan import planner
from tests.conftest import INTERPRETED
from tests.eager import pair

quick = pytest.mark.quick
pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="compiled kernels choose differently by size"),
    pytest.mark.skipif(not torch._dynamo.is_dynamo_supported(), reason="no torch.compile here"),
]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(COMPILER is None, reason="inductor needs a C++ compiler")),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network() -> nn.Module:
    """Stem, a projecting and an identity bottleneck, a basic block, single layers."""

    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = fr.ConvBNReLU(16, 8, 3, relu=False)
            self.norm = fr.BNAddReLU(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y, y * 0.5)

    def projection() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))

    return nn.Sequential(
        fr.Stem(3, 8), fr.Bottleneck(8, 4, 2, projection()), fr.Bottleneck(16, 4), fr.BasicBlock(16, 16), Tail()
    )


def small() -> nn.Module:
    return nn.Sequential(fr.ConvBNReLU(3, 6, 3, stride=2), fr.BasicBlock(6, 6))


Results = list[Tensor]


def step(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Results:
    """Output, gradients and buffers after one forward and backward."""
    x = x.detach().requires_grad_(model.training)
    out = run(x)
    grads: list[Tensor] = []
    if model.training:
        grads = list(torch.autograd.grad(out.square().sum(), [x, *model.parameters()]))
    return [out.detach(), *grads, *(b.clone() for b in model.buffers())]


def same(a: Results, b: Results) -> None:
    assert len(a) == len(b)
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(left, right), i
        assert left.stride() == right.stride(), i


@quick
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_and_the_same_bits(backend: str, memory_format: torch.memory_format, training: bool) -> None:
    ours = network().train(training).to(memory_format=memory_format)
    twin = copy.deepcopy(ours)
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    for batch in (2, 3):
        x = torch.randn(batch, 3, 16, 16).contiguous(memory_format=memory_format)
        same(step(twin, compiled, x), step(ours, ours, x))


@pytest.mark.parametrize("dynamic", [True, False])
def test_batch_sizes_and_image_sizes(dynamic: bool) -> None:
    ours = small()
    twin = copy.deepcopy(ours)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n, h, w in ((2, 8, 8), (5, 8, 8), (2, 9, 7)):
        x = torch.randn(n, 3, h, w)
        same(step(twin, compiled, x), step(ours, ours, x))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_modes_and_momentum_are_read_at_call_time(momentum: float | None) -> None:
    ours = small()
    for m in ours.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
    twin = copy.deepcopy(ours)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 16, 16)
    for training, last in ((True, True), (False, False), (True, False)):
        for model in (ours, twin):
            model.train(training)
            model[1].bn2.train(last)
        same(step(twin, compiled, x), step(ours, ours, x))


def test_a_compiled_step_of_sgd() -> None:
    ours = small()
    twin, x = copy.deepcopy(ours), torch.randn(2, 3, 16, 16)
    for model in (ours, twin):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def train(model: nn.Module = model) -> Tensor:
            return model(x).square().mean()

        run = torch.compile(train, backend="aot_eager", fullgraph=True) if model is twin else train
        for _ in range(2):
            optimizer.zero_grad()
            run().backward()
            optimizer.step()
    for (name, a), b in zip(ours.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_no_grad_and_autocast() -> None:
    ours = small()
    twin, x = copy.deepcopy(ours), torch.randn(2, 3, 16, 16)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), ours(x))
    with torch.autocast("cpu", dtype=torch.float16):
        same(step(twin, compiled, x), step(ours, ours, x))


def test_routes() -> None:
    ours = small()
    twin, x = copy.deepcopy(ours), torch.randn(2, 3, 16, 16)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    with fr.use_route("reference"), fr.record_launches() as launches:
        torch.testing.assert_close(step(twin, compiled, x), step(ours, ours, x))
    assert not launches
    with fr.record_launches() as launches:
        compiled(x)
    assert launches, "the route asked for before must not be baked in"


def test_second_derivatives_raise() -> None:
    block = torch.compile(fr.BasicBlock(4, 4), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()


def test_the_graph_holds_one_call_per_block() -> None:
    calls: list[str] = []

    def collect(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        for node in graph.graph.nodes:
            # An operator that updates statistics in place is wrapped, and is then the first argument.
            calls.extend(str(t) for t in (node.target, *node.args[:1]) if str(t).startswith("fused_resnet."))
        return make_boxed_func(graph.forward)

    block = torch.compile(
        fr.Bottleneck(16, 4), backend=aot_autograd(fw_compiler=collect, bw_compiler=collect), fullgraph=True
    )
    block(torch.randn(2, 16, 5, 5, requires_grad=True)).sum().backward()
    assert calls == ["fused_resnet.chain_forward.default", "fused_resnet.chain_backward.default"]


# ---------------------------------------------------------------- the operators themselves


def slots(pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]], projection: bool, affine: bool) -> list[Tensor | None]:
    result: list[Tensor | None] = [None] * (op.SLOTS * len(op.FIELDS))
    for i, (conv, bn) in enumerate(pairs):
        first = len(op.FIELDS) * (op.SLOTS - 1 if projection and i == len(pairs) - 1 else i)
        gamma, beta = (bn.weight.detach(), bn.bias.detach()) if affine else (None, None)
        counter = torch.tensor(2) if affine else None
        result[first : first + 6] = [
            conv.weight.detach(), gamma, beta, bn.running_mean.clone(), bn.running_var.clone(), counter
        ]  # fmt: skip
    return result


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["none", "identity", "given", "projection", "gram", "single"])
def test_opcheck(kind: str, training: bool, backward: bool) -> None:
    if kind == "gram" and not training:
        pytest.skip("with frozen statistics there is no such route")
    if kind == "single" and (training or backward):
        pytest.skip("one launch has neither batch statistics nor a backward pass")
    route, kind = (kind, "none") if kind in ("gram", "single") else ("staged", kind)
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    pairs = [pair(4, 3, 1), pair(3, 4, 3, padding=1), *([pair(4, 4, 1)] if kind == "projection" else [])]
    if route == "gram":
        pairs[1] = pair(3, 4, 1)
    if route == "single":
        pairs[1:] = [pair(3, 3, 3, padding=1), pair(3, 4, 1)]
    geometry = [(c.out_channels, *c.kernel_size, c.stride, c.padding, c.dilation, 1) for c, _ in pairs]
    projected = geometry.pop() if kind == "projection" else None
    text, planned, _ = planner.chain_plan_text(
        x.device, "float64", tuple(x.shape), tuple(geometry), projected, kind, True, training, backward, route
    )
    assert planned == route
    residual = torch.randn_like(x) if kind == "given" else None
    tensors = slots(pairs, kind == "projection", affine=kind != "identity")
    momenta, epsilons = [0.1] * len(pairs), [1e-5] * len(pairs)
    torch.library.opcheck(
        torch.ops.fused_resnet.chain_forward.default, (text, momenta, epsilons, x, residual, *tensors)
    )
    if not backward:
        return
    out, mask, *rest = op.chain_forward(text, momenta, epsilons, x, residual, *tensors)
    assert (mask.numel() > 0) == (kind != "none" or not training or route == "gram")
    parameters = [[tensors[len(op.FIELDS) * i + field] for i in range(op.SLOTS)] for field in range(3)]
    given = (x, mask, *itertools.chain(*parameters), *rest)
    r = kind == "given"
    for needs in (
        [True, r] + [True] * 12,
        [False, r] + [True] * 12,
        [True, r] + [False] * 12,
        [False, r] + [True, r, r] * 4,
    ):
        torch.library.opcheck(
            torch.ops.fused_resnet.chain_backward.default, (text, needs, torch.randn_like(out), *given)
        )
