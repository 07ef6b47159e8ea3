"""Wide data on the Gram route: a pivot before the products, means subtracted from the operands of the gradients."""

import pytest
import torch

from fused_resnet.launch.bits import empty_bits
from fused_resnet.launch.conv_wgrad import conv_wgrad
from fused_resnet.launch.gram import gram, gram_backward, gram_finalize
from fused_resnet.launch.gram_dgrad import gram_dgrad
from fused_resnet.launch.gram_wgrad import gram_wgrad
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.problem import ConvProblem
from tests.bits import pack
from tests.gram_case import EPS, SMALL, accumulation, make_case, matrix, nhwc, reference, relative

WIDE = {"float32": torch.float32, "float64": torch.float64}
TILED = GemmConfig(block_m=16, block_n=16, block_k=16, num_warps=4, split=3)
WHOLE = GemmConfig(block_m=32, block_n=64, block_k=64, num_warps=4)
PRODUCTS = {torch.float32: 2e-6, torch.float64: 1e-13}
FAR = 1e4
"""abs(mean) / std of what is multiplied, about."""


@pytest.fixture(autouse=True)
def exactly(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def far_case(dtype, device, dz_mean=0.0, offset=FAR):
    """Channels fill no tile, rows no step."""
    return make_case((3, 7, 6), 20, 40, dtype, device, dz_mean=dz_mean, offset=offset)


def centre(case):
    """x's mean and rstd, and what the prologue makes of the mean."""
    x = case.x.to(case.input_affine.dtype)
    mean = x.mean((0, 2, 3))
    scale, shift = case.input_affine
    return torch.stack([mean, x.var((0, 2, 3)) ** -0.5]), torch.relu(mean * scale + shift)


@pytest.mark.quick
@pytest.mark.parametrize("config", [SMALL, GemmConfig(32, 32, 128), GemmConfig(16, 16, 64, split=2)], ids=str)
@pytest.mark.parametrize("dtype", WIDE.values(), ids=WIDE)
def test_gram_of_what_is_left_of_the_pivot(dtype, config, device):
    case = far_case(dtype, device)
    pivot, k = centre(case)
    g, c, a = gram(case.x, case.input_affine, config, pivot=pivot, store_a=True)
    left = matrix(case.a) - k.double()
    assert g.dtype == c.dtype == torch.float64 and torch.equal(a, case.a)
    assert relative(g, left.T @ left) < 1e-14 and relative(c, left.sum(0)) < 1e-11


@pytest.mark.quick
def test_gram_in_float16(device):
    """A pivot where a channel is more than 8 std from zero, and there exactly; nothing is rounded anywhere else."""
    case = make_case((3, 7, 6), 20, 40, torch.float16, device)
    case.input_affine[1, :10] = 30.0  # 30 std, about; the others 0 to 2
    pivot, k = centre(case)
    far = k * pivot[1] > 8 * case.input_affine[0].abs()
    assert far[:10].all() and not far[10:].any()
    g, c, a = gram(case.x, case.input_affine, SMALL, pivot=pivot, store_a=True)
    left = matrix(case.a) - torch.where(far, k, 0.0).half().double()
    assert g.dtype == c.dtype == torch.float32 and torch.equal(a, case.a)
    assert relative(g, left.T @ left) < 1e-6 and relative(c, left.sum(0)) < 1e-6


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=str)
def test_gram_of_an_input_as_it_is(stride, device):
    x = (nhwc(2, 20, 7, 5) + FAR).float().contiguous(memory_format=torch.channels_last).to(device)
    g, c, _ = gram(x, None, SMALL, stride=stride, pivot=x[:1, :, 2, 2])
    left = matrix(x[:, :, :: stride[0], :: stride[1]]) - x[0, :, 2, 2].double()
    assert relative(g, left.T @ left) < 1e-14 and relative(c, left.sum(0)) < 1e-13


@pytest.mark.quick
@pytest.mark.parametrize("seen", [1, 8])
def test_gram_of_half_precision_as_it_is(seen, device):
    """The first pixel where all that are seen are within a factor of two of it; nothing is rounded."""
    x = (0.1 * nhwc(2, 20, 4, 8) + 1).half().to(device)  # within a factor of two
    x[:, :5] = 0.0
    x[:, 5:8] *= -1
    x[:, 8:10] *= 1000
    x[:, 10:15] -= 1.0  # around zero
    x[1, 15, 2, 2] = 4.0  # not among the pixels, but of the same exponents as the difference
    x = x.contiguous(memory_format=torch.channels_last)
    rows = matrix(x)
    pixels = x.permute(0, 2, 3, 1).flatten(0, 2)[3 :: 64 // 8][:seen]
    near = torch.ones(20, dtype=torch.bool, device=device)
    near[:5] = False
    if seen > 1:
        near[10:15] = False
    k = torch.where(near, pixels[0].double(), 0.0)
    g, c, _ = gram(x, None, SMALL, pivot=pixels)
    left = (rows - k).half().double()
    assert seen == 1 or torch.equal(left, rows - k)
    assert relative(g, left.T @ left) < 1e-6 and relative(c, left.sum(0)) < 1e-5
    weight = nhwc(24, 20, 1, 1).half().to(device)
    none = dict.fromkeys(("gamma", "beta", "running_mean", "running_var"))
    stats, _, mean = gram_finalize(g, c, 64, weight, momentum=0.1, eps=1e-5, pivot=pixels, **none)
    y = rows @ weight.flatten(1).double().T
    mean, spread = mean[:20], mean[20:].view(2, 24)
    assert relative(mean, rows.mean(0)) < 1e-6
    alone = weight.flatten(1).double().square() @ rows.var(0, correction=0)
    assert relative(spread, torch.stack([y.var(0, correction=0), alone])) < (1e-6 if seen > 1 else 1e-3)
    assert relative(stats[1], 1 / (y.var(0, correction=0) + 1e-5).sqrt()) < (1e-6 if seen > 1 else 1e-3)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", WIDE.values(), ids=WIDE)
def test_statistics_far_from_zero(dtype, device):
    """To the last digits that the data hold: the covariance is that of the centred data."""
    case = far_case(dtype, device)
    pivot, _ = centre(case)
    g, c, _ = gram(case.x, case.input_affine, SMALL, pivot=pivot)
    rows, q = len(matrix(case.x)), case.weight.shape[0]
    running = {name: torch.zeros(q, dtype=accumulation(dtype), device=device) for name in ("mean", "var")}
    stats, v, m = gram_finalize(
        g,
        c,
        rows,
        case.weight,
        gamma=case.gamma,
        beta=case.beta,
        running_mean=running["mean"],
        running_var=running["var"],
        momentum=1.0,
        eps=EPS,
        pivot=pivot,
        input_affine=case.input_affine,
    )
    a, weight = matrix(case.a), case.weight.double().flatten(1)
    covariance = (a - a.mean(0)).T.cov(correction=0)
    var = ((weight @ covariance) * weight).sum(1)
    exact = 3e-7 if dtype == torch.float32 else 1e-11
    assert relative(m, a.mean(0)) < exact and relative(stats[0], weight @ a.mean(0)) < exact
    assert relative(v, weight @ covariance) < exact and relative(stats[1], (var + EPS) ** -0.5) < exact
    assert relative(running["mean"], stats[0].double()) == 0
    assert relative(running["var"], var * rows / (rows - 1)) < exact


@pytest.mark.parametrize("dtype", WIDE.values(), ids=WIDE)
def test_gradients_far_from_zero(dtype, device):
    """The kernels of backward in a row, of data and of a gradient whose means outweigh their spread."""
    case = far_case(dtype, device, dz_mean=3, offset=1e3)
    pivot, _ = centre(case)
    g, c, _ = gram(case.x, case.input_affine, SMALL, pivot=pivot)
    rows = len(matrix(case.x))
    none = dict.fromkeys(("running_mean", "running_var"))
    stats, v, m = gram_finalize(
        g,
        c,
        rows,
        case.weight,
        gamma=case.gamma,
        beta=case.beta,
        momentum=0.1,
        eps=EPS,
        pivot=pivot,
        input_affine=case.input_affine,
        **none,
    )
    bits = torch.full_like(empty_bits(case.dz.shape, device), 255)
    t, sum_dz, _ = gram_wgrad(case.dz, bits, case.x, case.input_affine, TILED, store_dz=False, input_mean=m)
    grads = gram_backward(t, v, None, stats, case.weight, sum_dz, rows, out_dtype=stats.dtype)
    assert grads.bias is None
    below = torch.stack([torch.zeros_like(case.input_affine[0])] * 2 + list(case.input_affine))
    dx, _ = gram_dgrad(case.dz, case.x, grads.aw, grads.p, None, below, TILED, means=(sum_dz, m))
    da, dw, dgamma, dbeta = reference(case)
    # A rounding of a's mean, times dz's, against the spread of both.
    exact = 3e-3 if dtype == torch.float32 else 5e-12
    assert relative(matrix(dx), da) < exact and relative(grads.dw.flatten(1), dw) < exact
    assert relative(grads.dgamma, dgamma) < exact and relative(grads.dbeta, dbeta) < 1e-6


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", WIDE.values(), ids=WIDE)
def test_weight_gradients_of_the_centred_input(dtype, masked, device):
    case = far_case(dtype, device)
    mean = case.a.double().mean((0, 2, 3)).to(dtype)
    n, p, h, w = case.x.shape
    q = case.dz.shape[1]
    passes = torch.rand(case.dz.shape, device=device) < 0.6
    bits = pack(passes.permute(0, 2, 3, 1).reshape(-1, q))
    dz = torch.where(passes, case.dz, 0.0).contiguous(memory_format=torch.channels_last)
    expected = matrix(dz).T @ (matrix(case.a) - mean.double())
    if masked:
        t, _, _ = gram_wgrad(case.dz, bits, case.x, case.input_affine, TILED, store_dz=False, input_mean=mean)
    else:
        problem = ConvProblem(n, h, w, p, q, dtype=str(dtype).removeprefix("torch."))
        t = conv_wgrad(
            case.x, dz, problem, TILED, input_affine=case.input_affine, input_mean=mean, out_dtype=dtype
        ).flatten(1)
    assert relative(t, expected) < PRODUCTS[dtype]


@pytest.mark.parametrize("config", [WHOLE, TILED], ids=["whole", "tiled"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", WIDE.values(), ids=WIDE)
def test_input_gradient_of_centred_operands(dtype, relu, config, device):
    case = far_case(dtype, device, dz_mean=30)
    dz, p, q = case.dz, case.x.shape[1], case.dz.shape[1]
    a = case.a if relu else case.x
    aw, product = (torch.randn(rows, p, dtype=torch.float64).to(dtype).to(device) for rows in (q, p))
    sums, mean = matrix(dz).sum(0).to(dtype), a.double().mean((0, 2, 3)).to(dtype)
    stats = torch.cat([torch.zeros_like(case.input_affine), case.input_affine]) if relu else None
    dx, _ = gram_dgrad(dz, case.x, aw, product, None, stats, config, means=(sums, mean))
    centred = matrix(dz) - (sums / len(matrix(dz))).double()
    expected = centred @ aw.double() + (matrix(a) - mean.double()) @ product.double()
    if relu:
        expected = torch.where(matrix(a) <= 0, 0.0, expected)
    assert relative(matrix(dx), expected) < PRODUCTS[dtype]


def test_errors(device):
    case = far_case(torch.float16, device)
    n, p, h, w = case.x.shape
    q, mean = case.dz.shape[1], torch.zeros(p, device=device)
    with pytest.raises(ValueError, match="pivot must have shape"):
        gram(case.x, case.input_affine, SMALL, pivot=mean[None])
    for wrong in (mean[None], mean.half()[None, :-1], mean.half().expand(3, p)):
        with pytest.raises(ValueError, match="pivot must be"):
            gram(case.x, None, SMALL, pivot=wrong)
    bits = empty_bits(case.dz.shape, device)
    with pytest.raises(ValueError, match="what input_mean is subtracted from"):
        gram_wgrad(case.dz, bits, case.x, case.input_affine, TILED, store_dz=False, input_mean=mean)
    case = far_case(torch.float32, device)
    with pytest.raises(ValueError, match="1x1 filter"):
        padded = ConvProblem(n, h, w, p, q, padding=(1, 1), dtype="float32")
        dz = torch.zeros(n, q, h + 2, w + 2, device=device).contiguous(memory_format=torch.channels_last)
        conv_wgrad(case.x, dz, padded, TILED, input_mean=mean, out_dtype=torch.float32)
    matrices = torch.zeros(q, p, device=device), torch.zeros(p, p, device=device)
    for bias, means in ((None, None), (mean, (torch.zeros(q, device=device), mean))):
        with pytest.raises(ValueError, match="a bias or the means"):
            gram_dgrad(case.dz, case.x, *matrices, bias, None, TILED, means=means)
