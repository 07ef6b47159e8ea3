"""Routes and records across threads, recomputation and compilation; the interpreter asked for too late."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fused_resnet as fr
from fused_resnet import reference
from tests.conftest import INTERPRETED
from tests.eager import agree
from tests.modules.test_blocks import results, twins

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter")
quick = pytest.mark.quick

ROUTES = ("auto", "staged", "gram", "reference")
both_ways = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


def image(channels: int = 12, n: int = 2) -> Tensor:
    return torch.randn(n, channels, 6, 6, dtype=torch.float64)


def kernels(run: Callable[[], object]) -> list[str]:
    with fr.record_launches() as launches:
        run()
    return [launch.kernel for launch in launches]


def route_of(names: list[str]) -> str:
    """The route that launched these kernels."""
    if not names:
        return "reference"
    return "gram" if "gram_kernel" in names else "staged"


# ---------------------------------------------------------------- checkpointing


@quick
@both_ways
@pytest.mark.parametrize("route", ROUTES)
def test_a_route_around_checkpointing(route: str, reentrant: bool) -> None:
    """Forward takes the route; statistics are eager's, whose recomputation updates them again too."""
    ours, theirs = twins(lambda family: family.Bottleneck(12, 3))
    x, found = image(), []
    for block in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with fr.use_route(route):
            with fr.record_launches() as launches:
                out = checkpoint(block, leaf, use_reentrant=reentrant)
            out.square().sum().backward()
        if block is ours and route != "auto":
            assert route_of([launch.kernel for launch in launches]) == route
        found.append({"out": out, "dx": leaf.grad, **{n: p.grad for n, p in block.named_parameters()}})
        found[-1] |= dict(block.named_buffers())
    agree(*found)
    assert ours.bn1.num_batches_tracked == 2


@quick
def test_a_recomputation_takes_the_route_that_holds_where_backward_is_called() -> None:
    """Nothing but the thread's own request decides: the recomputed forward is a forward like any other."""
    block, x = fr.Bottleneck(12, 3).double(), image().requires_grad_()
    with fr.use_route("staged"):
        out = checkpoint(block, x, use_reentrant=True)

    def backward() -> None:
        with fr.use_route("gram"):
            out.sum().backward()

    assert route_of(kernels(backward)) == "gram"
    context = lambda: (fr.use_route("staged"), fr.use_route("staged"))  # noqa: E731
    out = checkpoint(block, x, use_reentrant=False, context_fn=context)
    assert route_of(kernels(backward)) == "staged", "context_fn carries a route to the recomputation"


def test_checkpointed_segments() -> None:
    nets = [nn.Sequential(*(family.BasicBlock(6, 6) for _ in range(3))).double() for family in (fr, reference)]
    nets[0].load_state_dict(nets[1].state_dict())
    x, found = image(6), []
    for net in nets:
        leaf = x.clone().requires_grad_()
        checkpoint_sequential(net, 2, leaf, use_reentrant=False).square().sum().backward()
        found.append({"dx": leaf.grad, **{n: p.grad for n, p in net.named_parameters()}, **dict(net.named_buffers())})
    agree(*found)


@quick
def test_checkpointing_with_statistics_kept_still() -> None:
    """The usual cure for the double update, momentum 0 in one of the two forwards, is honoured at call time."""
    block = fr.BasicBlock(6, 6).double()
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    out = checkpoint(block, image(6).requires_grad_(), use_reentrant=False)
    once = [m.running_mean.clone() for m in norms]
    for m in norms:
        m.momentum = 0.0
    out.sum().backward()
    assert all(torch.equal(m.running_mean, mean) for m, mean in zip(norms, once, strict=True))


# ---------------------------------------------------------------- threads


@quick
def test_records_see_a_backward_pass_in_another_thread() -> None:
    block, x = fr.Bottleneck(12, 3).double(), image().requires_grad_()

    def step(elsewhere: bool) -> list[str]:
        def run() -> None:
            loss = block(x).sum()
            if elsewhere:
                thread = threading.Thread(target=loss.backward)
                thread.start()
                thread.join()
            else:
                loss.backward()

        return kernels(run)

    here, there = step(False), step(True)
    assert here == there and any("dgrad" in name for name in there)


@quick
def test_a_backward_pass_in_another_thread_gives_the_same_bits() -> None:
    ours = fr.Bottleneck(12, 3).double()
    twin, x = copy.deepcopy(ours), image()
    loss = twin(x).square().sum()
    ours(x).square().sum().backward()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@quick
def test_a_route_stays_in_the_thread_that_asked_for_it() -> None:
    """As under DataParallel: a thread of the caller's starts with "auto"."""
    block, x, seen = fr.Bottleneck(12, 3).double(), image(), {}

    def other() -> None:
        seen["other"] = route_of(kernels(lambda: block(x)))

    usual = route_of(kernels(lambda: block(x)))
    with fr.use_route("reference"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        seen["here"] = route_of(kernels(lambda: block(x)))
    assert seen == {"other": usual, "here": "reference"}


# ---------------------------------------------------------------- compilation


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


needs_dynamo = pytest.mark.skipif(not torch._dynamo.is_dynamo_supported(), reason="no torch.compile here")


@needs_dynamo
@pytest.mark.usefixtures("fresh")
def test_a_compiled_block_honours_every_change_of_route() -> None:
    block, x = fr.Bottleneck(12, 3).double(), image()
    twin = copy.deepcopy(block)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for route in ("auto", "reference", "gram", "staged", "auto", "gram", "reference"):
        with fr.use_route(route):
            assert kernels(lambda: compiled(x)) == kernels(lambda: block(x)), route
    assert all(torch.equal(a, b) for a, b in zip(block.state_dict().values(), twin.state_dict().values(), strict=True))
    here = kernels(lambda: compiled(x))
    with ThreadPoolExecutor(1) as pool, fr.use_route("reference"):
        assert pool.submit(kernels, lambda: compiled(x)).result() == here, "a thread has its own route, compiled too"


@needs_dynamo
@pytest.mark.usefixtures("fresh")
def test_a_route_inside_what_is_compiled() -> None:
    block, x = fr.Bottleneck(12, 3).double(), image()

    def run(x: Tensor) -> Tensor:
        with fr.use_route("gram"):
            out = block(x)
        with fr.use_route("reference"):
            return block(out)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert kernels(lambda: compiled(x)) == kernels(lambda: run(x))
    assert route_of(kernels(lambda: compiled(x))) == "gram"


@needs_dynamo
@pytest.mark.usefixtures("fresh")
def test_checkpointing_inside_what_is_compiled() -> None:
    """One graph, the recomputation in it, and the numbers of an eager step without checkpointing."""
    block = fr.BasicBlock(6, 6).double()
    twin, x = copy.deepcopy(block), image(6)

    def run(x: Tensor) -> Tensor:
        return checkpoint(twin, x, use_reentrant=False)

    expected = results(block, x)
    leaf = x.clone().requires_grad_()
    out = torch.compile(run, backend="aot_eager", fullgraph=True)(leaf)
    torch.manual_seed(4)
    out.backward(torch.randn_like(out))
    torch.testing.assert_close(out, expected["out"])
    torch.testing.assert_close(leaf.grad, expected["dx"])
    for name, p in twin.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


# ---------------------------------------------------------------- the interpreter, too late


def test_an_interpreter_asked_for_too_late_is_one_clear_error() -> None:
    program = """
        import torch
        import fused_resnet as fr, os
        x = torch.randn(2, 12, 4, 4)
        os.environ["TRITON_INTERPRET"] = "1"
        block = fr.Bottleneck(12, 3)
        for call in (lambda: block(x), lambda: fr.explain(block, (2, 12, 4, 4)), lambda: fr.BNAddReLU(12)(x)):
            try:
                call()
            except RuntimeError as error:
                print(error)
        assert block.bn1.num_batches_tracked == 0
        with fr.use_route("reference"):
            assert block(x).shape == x.shape
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("TRITON_INTERPRET=1 was set after Triton had been imported") == 3
    assert done.stdout.count("Set it before Python starts") == 3
