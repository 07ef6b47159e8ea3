"""Dependent launches: who takes part in them, and that each kernel waits before it touches memory."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_resnet as fr
from fused_resnet.launch import dependent, record
from fused_resnet.launch.dependent import dependent_launches
from fused_resnet.launch.record import Rehearsed, rehearse_launches
from fused_resnet.plan.target import A100, H100, INTERPRETER, Assumption, Target, assume
from tests.compile_audit import in_subprocess, waits_first

FOLDER = Path(record.__file__).parent.parent / "kernels"


def kernels() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                yield node.name, node


KERNELS = dict(kernels())


@pytest.mark.quick
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_begins_by_waiting(name: str) -> None:
    """A kernel that is told and does not wait would read what is not yet written."""
    kernel = KERNELS[name]
    body = kernel.body[1:] if ast.get_docstring(kernel) else kernel.body
    assert ast.unparse(body[0]) == "begin(DEPENDENT)"
    assert kernel.args.args[-1].arg == "DEPENDENT" and ast.unparse(kernel.args.defaults[-1]) == "False"


def test_no_kernel_touches_memory_before_it_waits() -> None:
    found = in_subprocess(["--dependent", "--covering", "--dtypes", "bfloat16"])
    assert {compiled.kernel for compiled in found} == KERNELS.keys()
    assert not [(compiled.kernel, compiled.failures) for compiled in found if compiled.failures]


@pytest.mark.quick
def test_the_order_is_read_off_the_listing() -> None:
    begins, waits = "griddepcontrol.launch_dependents;", "griddepcontrol.wait;"
    assert waits_first(f"mov %r1, %ctaid.x;\n{begins}\n{waits}\nld.global.b32 %r2, [%rd1];")
    for early in (
        "ld.global.b32 %r2, [%rd1];",
        "st.volatile.global.u32 [%rd1], 1;",
        "cp.async.cg.shared.global [a], [b];",
    ):
        assert not waits_first(f"{begins}\n{early}\n{waits}")
        assert not waits_first(f"{early}\n{begins}\n{waits}")
    assert not waits_first("ld.global.b32 %r2, [%rd1];")
    assert not waits_first(begins)


def rehearsed(target: Target) -> list[Rehearsed]:
    """What a block's step would launch there."""
    seen: list[Rehearsed] = []
    block = fr.Bottleneck(256, 64).to("meta", torch.bfloat16).to(memory_format=torch.channels_last)
    x = torch.empty(8, 256, 14, 14, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with assume(Assumption(target)), rehearse_launches(seen.append):
        block(x.contiguous(memory_format=torch.channels_last)).sum().backward()
    assert len(seen) > 10
    return seen


def told(launches: list[Rehearsed]) -> set[tuple[Any, Any]]:
    return {(each.arguments["DEPENDENT"], each.options.get("launch_pdl", False)) for each in launches}


@pytest.mark.quick
@pytest.mark.parametrize(("target", "can"), [(H100, True), (A100, False)], ids=["h100", "a100"])
def test_launches_are_dependent_where_that_is_asked_for_and_can_be(target: Target, can: bool) -> None:
    assert told(rehearsed(target)) == {(False, False)}
    with dependent_launches():
        assert told(rehearsed(target)) == {(can, can)}
        with dependent_launches(False):
            assert told(rehearsed(target)) == {(False, False)}
        assert dependent.is_on()
    assert not dependent.is_on()


@pytest.mark.quick
def test_the_interpreter_has_none() -> None:
    device = torch.device("cpu")
    with assume(Assumption(INTERPRETER)), dependent_launches():
        assert not dependent.is_wanted(device)


@pytest.mark.quick
def test_a_kernel_that_does_not_know_is_launched_as_ever() -> None:
    class Kernel:
        arg_names = ("x_ptr", "N")

    assert not dependent.is_known_to(Kernel())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="sm_90")
@pytest.mark.parametrize("graph", [False, True], ids=["launched", "captured"])
def test_dependent_steps_are_bit_for_bit_the_others(graph: bool) -> None:
    torch.manual_seed(0)
    net = fr.resnet50().cuda().to(memory_format=torch.channels_last)
    x = torch.randn(16, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    state = {name: t.clone() for name, t in net.state_dict().items()}

    def step() -> list[torch.Tensor]:
        net.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = net(x).float().square().mean()
        loss.backward()
        return [loss.detach(), *[p.grad for p in net.parameters() if p.grad is not None]]

    results = []
    for wanted in (False, True):
        net.load_state_dict(state)
        with dependent_launches(wanted):
            step()
            if graph:
                captured = torch.cuda.CUDAGraph()
                torch.cuda.synchronize()
                net.zero_grad()
                with torch.cuda.graph(captured):
                    made = step()
                net.load_state_dict(state)
                captured.replay()
            else:
                net.load_state_dict(state)
                made = step()
        results.append([t.clone() for t in made] + [t.clone() for t in net.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
