"""The last convolution of a block with its BatchNorm, by the Gram route and by autograd in float64."""

from typing import NamedTuple

import torch

from fused_resnet.launch.gram import gram, gram_backward, gram_finalize
from fused_resnet.plan.config import GemmConfig
from tests.fused import affine

SMALL = GemmConfig(16, 16, 16, num_warps=4, split=3)
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
EPS = 1e-5


def accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def nhwc(*shape, dtype=torch.float64, device="cpu"):
    return torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last).to(device)


def matrix(image):
    """Logical NCHW as float64 [M, C]."""
    return image.permute(0, 2, 3, 1).flatten(0, 2).double()


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


class Case(NamedTuple):
    """The operands of a block's last convolution: everything rounded to the activations' dtype."""

    x: torch.Tensor
    input_affine: torch.Tensor
    weight: torch.Tensor
    gamma: torch.Tensor
    beta: torch.Tensor
    dz: torch.Tensor

    @property
    def a(self):
        return torch.relu(affine(self.x, *self.input_affine)).to(self.x.dtype)


def make_case(size, p, q, dtype, device, dz_mean=0.0, offset=0.0):
    n, h, w = size
    acc = accumulation(dtype)
    weight = (nhwc(q, p, 1, 1) * (2 / q) ** 0.5).to(dtype).contiguous(memory_format=torch.channels_last).to(device)
    dz = (nhwc(n, q, h, w) + dz_mean).to(dtype).contiguous(memory_format=torch.channels_last).to(device)
    input_affine = torch.stack([1 + 0.3 * torch.randn(p), 0.5 * torch.randn(p) + offset]).to(acc).to(device)
    gamma, beta = (1 + 0.5 * torch.randn(q)).to(acc).to(device), torch.randn(q).to(acc).to(device)
    return Case(nhwc(n, p, h, w, dtype=dtype, device=device), input_affine, weight, gamma, beta, dz)


def statistics(case, config=SMALL, **running):
    g, c, _ = gram(case.x, case.input_affine, config)
    arguments = {"running_mean": None, "running_var": None, "momentum": 0.1, **running}
    rows = case.x.numel() // case.x.shape[1]
    return gram_finalize(g, c, rows, case.weight, gamma=case.gamma, beta=case.beta, eps=EPS, **arguments)


def gradients(case, config=SMALL, out_dtype=None):
    stats, v, moments = statistics(case, config)
    acc = accumulation(case.x.dtype)
    dz, a = matrix(case.dz), matrix(case.a)
    t, sum_dz = (dz.T @ a).to(acc), dz.sum(0).to(acc)
    return gram_backward(t, v, moments, stats, case.weight, sum_dz, len(dz), out_dtype=out_dtype or acc)


def whole_aw(grads):
    """A∘W as its terms that count add up, in float64, times its scale."""
    return grads.aw.double() if grads.aw_terms is None else grads.aw.double()[: int(grads.aw_terms)].sum(0)


def input_gradient(case, grads):
    """da as gram_dgrad forms it, in float64."""
    aw, p = whole_aw(grads), grads.p.double().sum(0)
    if grads.scales is not None:
        aw, p = aw / grads.scales[0].double(), p / grads.scales[1].double()
    return matrix(case.dz) @ aw + matrix(case.a) @ p + grads.bias.double()


def reference(case):
    """(da [M, p], dW [q, p], dgamma, dbeta) by autograd in float64, from the same rounded operands.

    Of the input minus its mean, which changes no gradient and costs the reference no digits.
    """
    a = matrix(case.a)
    a = (a - a.mean(0)).requires_grad_()
    weight = case.weight.double().flatten(1).requires_grad_()
    gamma, beta = (t.double().requires_grad_() for t in (case.gamma, case.beta))
    z = torch.nn.functional.batch_norm(a @ weight.T, None, None, gamma, beta, training=True, eps=EPS)
    return torch.autograd.grad(z, (a, weight, gamma, beta), matrix(case.dz))


def check_gradients(case, tolerance, operand_tolerance=None, config=SMALL):
    """``operand_tolerance``: of da, whose matrices are rounded to the activations' dtype."""
    grads = gradients(case, config)
    da, dw, dgamma, dbeta = reference(case)
    assert grads.dw.shape == case.weight.shape and grads.dw.is_contiguous(memory_format=torch.channels_last)
    assert relative(grads.dw.flatten(1), dw) < tolerance
    assert relative(grads.dgamma, dgamma) < tolerance
    assert relative(grads.dbeta, dbeta) < tolerance
    assert relative(input_gradient(case, grads), da) < (operand_tolerance or tolerance)


def check_statistics(case, tolerance=None):
    stats, v, moments = statistics(case)
    tolerance = tolerance or EXACT[case.x.dtype]
    a, weight = matrix(case.a), case.weight.double().flatten(1)
    y = a @ weight.T
    var = y.var(0, unbiased=False)
    rstd = (var + EPS) ** -0.5
    mean, *spread = moments.split([len(weight.T), *[len(weight)] * (moments.numel() > len(weight.T)) * 2])
    assert relative(mean, a.mean(0)) < tolerance
    assert len(spread) == (2 if case.x.element_size() == 2 else 0)
    for found, expected in zip(spread, (var, weight.square() @ a.var(0, unbiased=False)), strict=False):
        assert relative(found, expected) < tolerance
    assert relative(v, weight @ a.T.cov(correction=0)) < tolerance
    mean = y.mean(0)
    scale = case.gamma.double() * rstd
    for row, expected in zip(stats, (mean, rstd, scale, case.beta.double() - mean * scale), strict=True):
        assert relative(row, expected) < tolerance


def shared_case(dtype, device):
    """Channels that share most of what they are, and filters that cancel it: one term of A∘W would turn them."""
    case = make_case((3, 5, 5), 20, 40, dtype, device, dz_mean=3.0)
    x = (case.x[:, :1].double() + 0.05 * case.x.double()).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (case.weight.double() - case.weight.double().mean(1, keepdim=True)).to(dtype)
    affine = torch.ones_like(case.input_affine)
    return case._replace(x=x, weight=weight.contiguous(memory_format=torch.channels_last), input_affine=affine)


def check_second_term(case):
    """Both terms count, are worth an exact A∘W, and P and the bias are of their sum."""
    grads, weight = gradients(case), case.weight.double().flatten(1)
    assert int(grads.aw_terms) == 2
    scale = 1.0 if grads.scales is None else grads.scales[0].double()
    exact = statistics(case)[0][2].double()[:, None] * weight * scale
    assert torch.equal(grads.aw[0], exact.to(case.x.dtype))
    assert relative(whole_aw(grads), exact) < 2e-5
    assert relative(input_gradient(case, grads), reference(case)[0]) < 2e-4
    check_terms(case)


def check_terms(case):
    """P of A∘W as rounded, in two 16-bit terms: the first rounds the exact one, both together are worth float32."""
    stats, _, _ = statistics(case)
    grads, weight = gradients(case), case.weight.double().flatten(1)
    share = -stats[1].double() * grads.dgamma.double() / len(matrix(case.x))
    scale = 1.0 if grads.scales is None else (grads.scales[1] / grads.scales[0]).double()
    exact, p = weight.T @ (share[:, None] * whole_aw(grads)) * scale, case.x.shape[1]
    assert grads.p.shape == (2, p, p) and grads.p.dtype == case.x.dtype
    assert relative(grads.p[0], exact) < 1.01 * relative(exact.to(case.x.dtype), exact)
    assert relative(grads.p.double().sum(0), exact) < 2e-5
