"""The BN + residual + ReLU operator against nn.BatchNorm2d in float64, and in 16 bits by the numerics rule."""

from __future__ import annotations

import copy
import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from fused_resnet.autograd import bn_act as op
from tests import numerics
from tests.conftest import INTERPRETED
from tests.eager import norm

quick = pytest.mark.quick
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter")


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def eager(y: Tensor, bn: torch.nn.BatchNorm2d, residual: Tensor | None, relu: bool) -> Tensor:
    z = bn(y) if residual is None else bn(y) + residual
    return z.relu() if relu else z


def fused(y: Tensor, bn: torch.nn.BatchNorm2d, residual: Tensor | None, relu: bool) -> Tensor:
    return fr.functional.bn_add_relu(y, fr.functional.batch_norm_of(bn), residual, relu=relu, route="staged")


@quick
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_every_combination(relu: bool, with_residual: bool, training: bool, affine: bool) -> None:
    y, residual = image(3, 5, 4, 3), image(3, 5, 4, 3) if with_residual else None
    bns = [norm(5, training=training, affine=affine)]
    bns.append(copy.deepcopy(bns[0]))
    dout, results = torch.randn(3, 5, 4, 3, dtype=torch.float64), []
    for run, bn in zip((fused, eager), bns, strict=True):
        out = run(y, bn, residual, relu)
        wanted = [t for t in (y, residual, bn.weight, bn.bias) if t is not None]
        results.append([out, *torch.autograd.grad(out, wanted, dout), *bn.buffers()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("wanted", [*itertools.product([True, False], repeat=4)][:-1])
def test_needs(wanted: tuple[bool, ...]) -> None:
    y, residual, bn = image(2, 5, 3, 3), image(2, 5, 3, 3), norm(5)
    tensors = [t for t, needed in zip((y, residual, bn.weight, bn.bias), wanted, strict=True) if needed]
    for t in (y, residual, bn.weight, bn.bias):
        t.requires_grad_(any(t is w for w in tensors))
    grads = []
    for run in (fused, eager):
        out = run(y, bn, residual, True)
        with fr.record_launches() as launches:
            grads.append(torch.autograd.grad(out, tensors, torch.ones_like(out)))
        if run is fused:
            ran = Counter(launch.kernel for launch in launches)
            assert ran["bn_grad_apply_kernel"] == wanted[0], ran
    torch.testing.assert_close(*grads)


@quick
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_gradcheck(with_residual: bool, training: bool) -> None:
    y, residual, bn = image(2, 3, 3, 2), image(2, 3, 3, 2), norm(3, training=training)
    inputs = [y, bn.weight, bn.bias, *([residual] if with_residual else [])]
    run = lambda *_: fused(y, bn, residual if with_residual else None, True)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_numerics_rule(dtype: torch.dtype) -> None:
    y, residual, bn = image(4, 24, 9, 8, dtype=dtype), image(4, 24, 9, 8, dtype=dtype), norm(24).float()
    y.data += 2.0
    dout = torch.randn(4, 24, 9, 8).to(dtype)
    layer = numerics.Layer(torch.eye(24)[:, :, None, None].to(dtype), bn.weight, bn.bias)
    out = fused(y, bn, residual, True)
    names = ("dx", "dgamma0", "dbeta0", "dresidual")
    grads = torch.autograd.grad(out, (y, bn.weight, bn.bias, residual), dout)
    candidate = {"z": out.detach(), **dict(zip(names, grads, strict=True))}
    numerics.check_chain(candidate, [numerics.relu_mask(out.detach())], y, [layer], dout, residual=residual.detach())
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32, dtype]


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_opcheck(training: bool, optional: bool) -> None:
    def cl(t: Tensor) -> Tensor:
        return t.detach().contiguous(memory_format=torch.channels_last)

    y, bn = cl(image(2, 3, 4, 3)), norm(3)
    mean, var = (bn.running_mean, bn.running_var) if optional or not training else (None, None)
    gamma, beta = (bn.weight.detach(), bn.bias.detach()) if optional else (None, None)
    residual = cl(image(2, 3, 4, 3)) if optional else None
    counter = torch.tensor(3) if optional and training else None
    settings = (training, 0.1, 1e-5, True, 1, True, optional, "")
    torch.library.opcheck(
        torch.ops.fused_resnet.bn_act_forward.default, (y, residual, gamma, beta, mean, var, counter, *settings)
    )
    out, mask, stats = op.bn_act_forward(y, residual, gamma, beta, mean, var, counter, *settings)
    dout = torch.randn_like(out)
    needs = [[True, True], [True, False], [False, True], [False, False]]
    for relu, (needs_y, needs_residual) in itertools.product((True, False), needs):
        arguments = (dout, y, mask, stats, gamma, beta, needs_y, needs_residual)
        torch.library.opcheck(torch.ops.fused_resnet.bn_act_backward.default, (*arguments, training, relu, 1, True, ""))
