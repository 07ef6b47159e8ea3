"""What backward costs, keeps and refuses: skipped work, saved tensors, edits in place, second derivatives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_resnet as fr
from tests.autograd.test_chain import chain, image
from tests.conftest import INTERPRETED
from tests.eager import Chain, agree, compare, mixing, norm, pair

quick = pytest.mark.quick
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter")


def freeze(case: Chain, weights: bool = False, norms: bool = False, x: bool = False) -> Chain:
    for m in case.modules:
        if isinstance(m, torch.nn.Conv2d):
            m.weight.requires_grad_(not weights)
        else:
            m.requires_grad_(not norms)
    case.x.requires_grad_(not x)
    return case


def kernels(run: Callable[[], Any]) -> Counter[str]:
    with fr.record_launches() as launches:
        run()
    return Counter(launch.kernel.removesuffix("_kernel") for launch in launches)


def backward_kernels(case: Chain) -> Counter[str]:
    out = case.fused()
    return kernels(lambda: out.backward(torch.randn_like(out)))


# ---------------------------------------------------------------- only what is asked for


@quick
@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("vendor", [False, True], ids=["ours", "vendor"])
@pytest.mark.parametrize(
    ("frozen", "dgrads", "wgrads"),
    [
        ({}, 4, 4),
        ({"x": True}, 2, 4),
        ({"norms": True}, 4, 4),
        ({"norms": True, "x": True}, 2, 4),
        ({"weights": True, "norms": True}, 4, 0),
        ({"weights": True}, 4, 0),
        ({"weights": True, "x": True}, 2, 0),
    ],
)
def test_work_that_nobody_asked_for_is_skipped(
    frozen: dict[str, bool], dgrads: int, wgrads: int, vendor: bool, training: bool
) -> None:
    case = freeze(chain(3, "projection", training), **frozen)
    with mixing(lambda *_: vendor):
        compare(case)
        ran = backward_kernels(case)
    if not training and not frozen.get("norms"):
        wgrads = 4  # y was never written: the scale's gradient comes from the weight's
    prefix = "vendor_" if vendor else ""
    assert ran[f"{prefix}conv_dgrad"] == dgrads and ran[f"{prefix}conv_wgrad"] == wgrads, ran


@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("only", ["conv0", "conv1", "conv2", "bn0", "bn1", "bn2", "gamma1", "beta2", "x", "residual"])
def test_one_gradient_alone(only: str, training: bool) -> None:
    case = freeze(chain(3, "given", training), weights=True, norms=True, x=only != "x")
    case.residual.requires_grad_(only == "residual")
    depth = int(only[-1]) if only[-1].isdigit() else 0
    parameters = {
        "conv": [case.pairs[depth][0].weight],
        "bn": list(case.pairs[depth][1].parameters()),
        "gamma": [case.pairs[depth][1].weight],
        "beta": [case.pairs[depth][1].bias],
    }
    for p in parameters.get(only.rstrip("012"), []):
        p.requires_grad_(True)
    compare(case)
    ran = backward_kernels(case)
    assert ran["conv_dgrad"] == {"x": 3, "residual": 0}.get(only, 2 - depth), ran
    if training:
        assert ran["conv_wgrad"] == (1 if only.startswith("conv") else 0), ran


def test_frozen_projection_and_frozen_branch() -> None:
    for part in (0, 1):
        case = chain(2, "projection")
        frozen = case.modules[:4] if part == 0 else case.modules[4:]
        for m in frozen:
            m.requires_grad_(False)
        case.x.requires_grad_(False)
        compare(case)


@quick
def test_without_a_gradient_nothing_is_saved_and_a_frozen_conv_is_one_kernel() -> None:
    for context in (torch.no_grad, torch.inference_mode):
        for count, kind in ((1, "none"), (3, "identity"), (3, "projection")):
            case = chain(count, kind, training=False)
            for m in case.modules:
                m.to(memory_format=torch.channels_last)
            with context():
                ran = kernels(case.fused)
                torch.testing.assert_close(case.fused(), case.eager())
                assert not case.fused().requires_grad
            convs = count + (kind == "projection")
            assert ran == Counter(conv_fprop=convs, bn_frozen=1)


def test_statistics_update_without_a_gradient() -> None:
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            compare(chain(3, "projection", requires_grad=False), backward=False)


def test_given_residual_that_needs_no_gradient_costs_no_copy() -> None:
    case = chain(1, "given")
    case.residual.requires_grad_(False)
    ours, _ = compare(case)
    assert ours.residual.grad is None


# ---------------------------------------------------------------- what is kept


def saved_sizes(run: Callable[[], Tensor]) -> list[int]:
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sorted(n for n in sizes if n)


@quick
@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("kind", ["none", "identity", "given", "projection"])
@pytest.mark.parametrize("relu", [True, False])
def test_saved_tensors(kind: str, relu: bool, training: bool) -> None:
    """x, each raw output (frozen: each activation but the last), the last mask in bits, statistics, parameters."""
    case = chain(3, kind, training, relu)
    case.x = case.x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    if case.residual is not None:
        case.residual = case.residual.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.no_grad():
        pairs = [*case.pairs, *([case.projection] if case.projection else [])]
        sizes, a = [case.x.numel()], case.x
        for conv, bn in case.pairs:
            a = bn(conv(a)).relu()
            sizes.append(a.numel())
        out = sizes.pop()
        if training:
            sizes += [out] * (2 if kind == "projection" else 1)
        if relu and (kind != "none" or not training):
            channels = a.shape[1]
            sizes.append(out // channels * -(-channels // 8))
        for conv, bn in pairs:
            sizes += [conv.weight.numel(), bn.num_features, bn.num_features, 4 * bn.num_features]
    assert saved_sizes(case.fused) == sorted(sizes)


@quick
@pytest.mark.parametrize("kind", ["none", "projection"])
def test_saved_tensors_of_the_gram_route(kind: str) -> None:
    """The widest images, the raw outputs of the last conv and the projection, are not there: W Cov and means are."""
    case = chain(3, kind)
    case.route = "gram"
    case.x = case.x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    first, middle, mask = (2 * 30 * 5, 2 * 9 * 6, 2 * 9 * 2)
    sizes = [case.x.numel(), first, middle, mask, 10 * 6, 6, *([10 * 7, 7] if kind == "projection" else [])]
    for conv, bn in [*case.pairs, *([case.projection] if case.projection else [])]:
        sizes += [conv.weight.numel(), bn.num_features, bn.num_features, 4 * bn.num_features]
    assert saved_sizes(case.fused) == sorted(sizes)


@quick
@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("name", ["x", "weight", "gamma"])
def test_editing_a_saved_tensor_in_place_raises(name: str, training: bool) -> None:
    case = chain(2, "identity", training)
    x = case.x = case.x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    case.x = x * 1
    out = case.fused()
    with torch.no_grad():
        {"x": case.x, "weight": case.pairs[1][0].weight, "gamma": case.pairs[0][1].weight}[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@quick
@pytest.mark.parametrize("route", ["staged", "gram"])
@pytest.mark.parametrize("kind", ["none", "identity", "projection"])
def test_editing_the_output_is_allowed(kind: str, route: str) -> None:
    """The mask follows from y, or was written beside the output: the output itself is free."""
    if route == "gram" and kind == "identity":
        pytest.skip("that chain does not widen")
    case = chain(3, kind)
    case.route = route
    ours, theirs = case.copied(), case.copied()
    a, b = ours.fused(), theirs.eager()
    a.add_(1), b.add(1)
    dout = torch.randn_like(a)
    a.backward(dout), b.backward(dout)
    agree(ours.state(), theirs.state())


def test_two_forwards_before_a_backward() -> None:
    case = chain(3, "projection")
    ours, theirs = case.copied(), case.copied()
    for each, run in ((ours, ours.fused), (theirs, theirs.eager)):
        first = run()
        each.x = (2 * each.x).detach().requires_grad_()
        second = run()
        second.square().sum().backward()
        first.square().sum().backward()
    agree(ours.state(), theirs.state())


def test_backward_twice_over_a_kept_graph() -> None:
    case = chain(2, "projection")
    ours, theirs = case.copied(), case.copied()
    for run in (ours.fused, theirs.eager):
        loss = run().square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    agree(ours.state(), theirs.state())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    """The recomputation updates the running statistics again, as eager's does."""
    case = chain(3, "projection")
    ours, theirs = case.copied(), case.copied()
    for run, x in ((ours.fused, ours.x), (theirs.eager, theirs.x)):
        checkpoint(lambda _, run=run: run(), x, use_reentrant=reentrant).square().sum().backward()
    agree(ours.state(), theirs.state())


# ---------------------------------------------------------------- second derivatives


def chain_and_inputs() -> tuple[Tensor, list[Tensor]]:
    case = chain(2, "projection")
    return case.fused(), [case.x, *(p for m in case.modules for p in m.parameters())]


def bn_act_and_inputs() -> tuple[Tensor, list[Tensor]]:
    y, residual, bn = image(2, 3, 4, 4), image(2, 3, 4, 4), norm(3)
    out = fr.functional.bn_add_relu(y, fr.functional.batch_norm_of(bn), residual)
    return out, [y, residual, *bn.parameters()]


def stem_and_inputs() -> tuple[Tensor, list[Tensor]]:
    x, (conv, bn) = image(2, 3, 8, 8), pair(3, 4, 7)
    out = fr.functional.stem(x, conv.weight, fr.functional.batch_norm_of(bn))
    return out, [x, conv.weight, *bn.parameters()]


OPERATIONS = {"chain": chain_and_inputs, "bn_act": bn_act_and_inputs, "stem": stem_and_inputs}


@quick
@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives_raise_for_every_input(name: str) -> None:
    _, inputs = OPERATIONS[name]()
    for i in range(len(inputs)):
        out, inputs = OPERATIONS[name]()
        (grad,) = torch.autograd.grad(out.square().sum(), inputs[i], create_graph=True)
        assert grad.requires_grad
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(grad.square().sum(), inputs[0])


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives_raise_with_respect_to_the_gradient(name: str) -> None:
    out, inputs = OPERATIONS[name]()
    dout = torch.randn_like(out).requires_grad_()
    grads = torch.autograd.grad(out, inputs, dout, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(sum(g.sum() for g in grads), dout)


def test_second_derivatives_work_on_the_reference_route() -> None:
    case = chain(2, "projection")
    case.route = "reference"
    (grad,) = torch.autograd.grad(case.fused().square().sum(), case.x, create_graph=True)
    grad.square().sum().backward()
    assert case.x.grad is not None and case.pairs[0][0].weight.grad is not None


@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("kind", ["identity", "projection"])
def test_gradcheck(kind: str, training: bool) -> None:
    case = chain(2, kind, training)
    case.x = image(1, 7, 3, 2)
    tensors = [case.x, *(p for m in case.modules for p in m.parameters())]

    def run(*_: Tensor) -> Tensor:
        return case.fused()

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
