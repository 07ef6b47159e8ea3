"""A kernel that does not compile: the chain takes a route that does, with one sentence, and its results are right."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fused_resnet as fr
from fused_resnet.autograd import preflight
from fused_resnet.functional import BatchNorm, Conv, bottleneck, conv_bn_chain
from fused_resnet.launch.record import rehearse_launches
from fused_resnet.plan import planner
from fused_resnet.plan.target import H100, Assumption, assume
from tests.conftest import INTERPRETED

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not INTERPRETED, reason="stands in for a GPU with the interpreter"),
]
HERE = replace(H100, name="NVIDIA Test GPU")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter as a GPU that compiles what ``broken`` does not name."""
    monkeypatch.setattr(
        preflight, "_why_not", lambda text, device, parameters: text and preflight._compile(text, 0, parameters)
    )
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    preflight._compile.cache_clear()
    preflight._say.cache_clear()
    with assume(Assumption(HERE)):
        yield
    preflight._compile.cache_clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], set[str]]:
    """The kernels that were compiled, and the names of those that fail."""
    seen: list[str] = []
    broken: set[str] = set()

    def compile_kernel(kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> Any:
        seen.append(kernel.fn.__name__)
        if kernel.fn.__name__ in broken:
            raise RuntimeError("ptxas fatal\nError: out of patience\n    ^")
        return asking_for(HERE.shared_memory)

    monkeypatch.setattr(preflight, "compile_kernel", compile_kernel)
    return seen, broken


def asking_for(shared: int) -> Any:
    """A compiled kernel that needs so much shared memory."""
    return SimpleNamespace(metadata=SimpleNamespace(shared=shared))


def layers() -> list[tuple[Conv, BatchNorm]]:
    torch.manual_seed(0)
    made = []
    for ci, co, size in ((64, 16, 1), (16, 16, 3), (16, 64, 1)):
        weight = (torch.randn(co, ci, size, size) / (ci * size * size) ** 0.5).half()
        weight = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
        gamma, beta, mean, var = (torch.rand(4, co) + 0.5).unbind(0)
        bn = BatchNorm(gamma.clone().requires_grad_(), beta.clone().requires_grad_(), mean.clone(), var.clone())
        made.append((Conv(weight, padding=(size // 2, size // 2)), bn))
    return made


def image() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 64, 6, 6).half().contiguous(memory_format=torch.channels_last).requires_grad_()


def test_what_compiles_is_asked_once_and_runs(compiled: tuple[list[str], set[str]]) -> None:
    seen, _ = compiled
    with warnings.catch_warnings(), fr.record_launches() as launches:
        warnings.simplefilter("error")
        out = bottleneck(image(), layers())
        out.backward(torch.ones_like(out))
    launched = {entry.kernel for entry in launches if entry.kernel.endswith("_kernel")}
    assert launched <= set(seen), "everything that runs was compiled before"
    before = len(seen)
    bottleneck(image(), layers())
    assert len(seen) == before


@pytest.mark.parametrize(
    ("broken", "route"),
    [("gram_kernel", "staged"), ("gram_wgrad_kernel", "staged"), ("conv_fprop_kernel", "reference")],
)
def test_a_kernel_that_fails_costs_speed_alone(
    compiled: tuple[list[str], set[str]], broken: str, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled[1].add(broken)
    monkeypatch.setattr(fr.calls, "_said", set())
    assert planner.plan_chain(chain_problem(), HERE).route == "gram"
    with pytest.warns(
        UserWarning, match=f"{broken} does not compile here .RuntimeError: Error: out of patience"
    ) as said:
        out = bottleneck(image(), layers())
        bottleneck(image(), layers())
    assert len(said) == 1, [str(warning.message) for warning in said]
    with fr.use_route(route):
        assert torch.equal(out, bottleneck(image(), layers()))
    with fr.record_launches() as launches:
        bottleneck(image(), layers()).sum().backward()
    assert broken not in {entry.kernel for entry in launches} and bool(launches) == (route == "staged")


def test_a_kernel_that_compiles_but_does_not_fit(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton would say so when it is launched, in the middle of a step."""

    def compile_kernel(kernel: Any, *_: Any) -> Any:
        return asking_for(HERE.shared_memory + (kernel.fn.__name__ == "gram_kernel"))

    monkeypatch.setattr(preflight, "compile_kernel", compile_kernel)
    with pytest.warns(UserWarning, match="gram_kernel does not .* shared memory, Required: 232449, Hardware limit"):
        out = bottleneck(image(), layers())
    with fr.use_route("staged"):
        assert torch.equal(out, bottleneck(image(), layers()))


def test_what_was_asked_for_strictly_raises_the_reason(compiled: tuple[list[str], set[str]]) -> None:
    compiled[1].add("gram_kernel")
    with pytest.raises(fr.RouteUnavailableError, match="gram_kernel does not compile here"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        conv_bn_chain(image(), layers(), identity=True, route="gram")


def chain_problem(**changes: Any) -> Any:
    geometry = tuple((co, size, size, (1, 1), (size // 2,) * 2, (1, 1), 1) for co, size in ((16, 1), (16, 3), (64, 1)))
    wanted = {"relu": True, "batch_statistics": True, "backward": True} | changes
    return planner.chain_problem("float16", (2, 64, 6, 6), geometry, None, "identity", **wanted)


@pytest.mark.parametrize("route", ["gram", "staged"])
@pytest.mark.parametrize("residual", ["identity", "given"])
def test_the_rehearsal_launches_what_a_step_does(route: str, residual: str, compiled: Any) -> None:
    problem = replace(chain_problem(), residual=residual)
    text = planner.plan_chain(problem, HERE, route).encode()
    with rehearse_launches() as rehearsed, torch.no_grad():
        preflight.rehearse_chain(text, torch.float16)
    x, given = image(), image() if residual == "given" else None
    with fr.record_launches() as launches:
        out = conv_bn_chain(x, layers(), residual=given, identity=given is None, route=route)
        out.backward(torch.ones_like(out))
    ours, theirs = (
        [(entry.kernel, entry.bytes) for entry in found if entry.kernel != "cast_weight"]
        for found in (rehearsed, launches)
    )
    assert ours == theirs


@pytest.mark.skipif(not torch._dynamo.is_dynamo_supported(), reason="no torch.compile here")
def test_a_compiler_that_traces_sees_a_constant(compiled: tuple[list[str], set[str]]) -> None:
    torch._dynamo.reset()
    compiled[1].add("gram_kernel")
    stack = layers()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = torch.compile(lambda x: conv_bn_chain(x, stack, identity=True), fullgraph=True, backend="eager")(image())
    with fr.use_route("staged"):
        assert torch.equal(out, conv_bn_chain(image(), layers(), identity=True))


def every_chain() -> Iterator[tuple[str, Any]]:
    base = chain_problem()
    wider = replace(base.convs[0], Ci=32)
    projected = replace(base, convs=(wider, *base.convs[1:]), residual="projection", projection=replace(wider, Co=64))
    stem = replace(base.convs[0], H=16, W=16, Ci=3, R=7, S=7, stride=(2, 2), padding=(3, 3))
    yield "identity", base
    yield "projection", projected
    yield "basic", replace(base, convs=(replace(base.convs[1], Ci=16), base.convs[1]))
    yield "one layer", replace(base, convs=base.convs[:1], residual="none")
    yield "grouped", replace(base, convs=(base.convs[0], replace(base.convs[1], groups=4), base.convs[2]))
    yield "stem", replace(base, convs=(stem,), residual="none")
    yield "without ReLU", replace(base, relu=False)
    yield "y1 again", replace(base, recompute=("y1",))
    yield "a1 kept", replace(base, keep=("a1",))
    for name, problem in (("frozen", base), ("frozen projection", projected)):
        yield name, replace(problem, batch_statistics=False)
        yield f"{name}, forward", replace(problem, batch_statistics=False, backward=False)


@pytest.mark.parametrize(("name", "problem"), list(every_chain()), ids=[name for name, _ in every_chain()])
@pytest.mark.parametrize("route", ["auto", "gram", "staged", "single"])
def test_every_kind_of_plan_can_be_rehearsed(name: str, problem: Any, route: str) -> None:
    for parameters in (torch.float16, torch.float32):
        with rehearse_launches() as rehearsed, torch.no_grad():
            preflight.rehearse_chain(planner.plan_chain(problem, HERE, route).encode(), parameters)
        assert rehearsed
