"""A strided projection by its own Gram matrix: the kernels against float64, and the whole algebra against autograd."""

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.launch.conv_fprop import Projection, conv_fprop
from fused_resnet.launch.conv_wgrad import conv_wgrad
from fused_resnet.launch.gram import gram, gram_backward, gram_finalize
from fused_resnet.launch.gram_dgrad import gram_dgrad
from fused_resnet.launch.record import record_launches
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.problem import ConvProblem
from tests.conftest import INTERPRETED
from tests.gram_case import EPS, EXACT, SMALL, accumulation, matrix, nhwc, relative
from tests.planted_bugs import Bug, planted

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3}
# (N, H, W), p, q, stride
SIZES = [
    ((2, 5, 7), 20, 40, (2, 2)),
    ((3, 6, 6), 33, 70, (1, 1)),
    ((1, 9, 4), 16, 64, (3, 2)),
    ((2, 1, 3), 5, 9, (2, 2)),  # fewer pixels than a step has rows, several images in one
    ((1, 40, 37), 16, 32, (2, 2)),  # many steps in an image
]
TILES = [GemmConfig(32, 128, 16, num_warps=4), GemmConfig(32, 16, 16, num_warps=4)]


@pytest.fixture(autouse=True)
def exactly(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def sampled(x, stride):
    return x[:, :, :: stride[0], :: stride[1]].contiguous(memory_format=torch.channels_last)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("size", "p", "q", "stride"), SIZES, ids=str)
def test_gram_of_the_sampled_pixels(size, p, q, stride, dtype, device):
    n, h, w = size
    x = nhwc(n, p, h, w, dtype=dtype, device=device)
    for config in (SMALL, GemmConfig(64, 64, 32, num_warps=4, split=1)):
        g, c, _ = gram(x, None, config, stride=stride)
        a = matrix(sampled(x, stride))
        assert relative(g, a.T @ a) < EXACT[dtype] and relative(c, a.sum(0)) < EXACT[dtype]


@pytest.mark.quick
@pytest.mark.parametrize("config", TILES, ids=["whole", "tiled"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("size", "p", "q", "stride"), SIZES, ids=str)
def test_dgrad_of_the_sampled_pixels(size, p, q, stride, dtype, config, device):
    n, h, w = size
    x = nhwc(n, p, h, w, dtype=dtype, device=device)
    x_s = sampled(x, stride)
    dz = nhwc(n, q, *x_s.shape[2:], dtype=dtype, device=device)
    aw, products = (torch.randn(rows, p, dtype=torch.float64).to(dtype).to(device) for rows in (q, p))
    bias = torch.randn(p, dtype=accumulation(dtype), device=device)
    dx, tiles = gram_dgrad(dz, x, aw, products, bias, None, config, stride=stride)
    expected = matrix(dz) @ aw.double() + matrix(x_s) @ products.double() + bias.double()
    assert tiles is None and dx.shape == x_s.shape and dx.is_contiguous(memory_format=torch.channels_last)
    assert relative(matrix(dx), expected) < ROUNDING[dtype]


@pytest.mark.quick
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("size", "p", "q", "stride"), SIZES, ids=str)
def test_a_projection_joins_the_last_product(size, p, q, stride, dtype, transposed, device):
    n, h, w = size
    x, of_x = nhwc(n, p, h, w, dtype=dtype, device=device), nhwc(q, p, 1, 1, dtype=dtype, device=device)
    projected = ConvProblem(n, h, w, p, q, stride=stride, dtype=str(dtype).removeprefix("torch."))
    y = nhwc(n, 24, projected.P, projected.Q, dtype=dtype, device=device)
    of_y = nhwc(q, 24, 1, 1, dtype=dtype, device=device)
    problem = ConvProblem(n, projected.P, projected.Q, 24, q, dtype=projected.dtype)
    affine, wide, other = (torch.randn(2, c, dtype=accumulation(dtype), device=device) for c in (24, q, q))
    config = GemmConfig(32, 16, 16, num_warps=4, transposed=transposed)
    joining = Projection(x, of_x, projected, other)
    out, _ = conv_fprop(
        y, of_y, problem, config, input_affine=affine, output_affine=wide, projection=joining, relu=True
    )
    a = (matrix(y).to(affine.dtype) * affine[0] + affine[1]).relu().to(dtype).double()
    first = a @ of_y.double().flatten(1).T * wide[0].double() + wide[1].double()
    second = matrix(sampled(x, stride)) @ of_x.double().flatten(1).T * other[0].double() + other[1].double()
    assert relative(matrix(out), (first + second).relu()) < ROUNDING[dtype]


def reference(x, weight, gamma, beta, dz, stride):
    """(stats, dx of the sampled pixels, dW, dgamma, dbeta) by autograd in float64."""
    x_s = sampled(x, stride).double().requires_grad_()
    leaves = [t.double().requires_grad_() for t in (weight, gamma, beta)]
    y = F.conv2d(x_s, leaves[0])
    z = F.batch_norm(y, None, None, leaves[1], leaves[2], training=True, eps=EPS)
    return y.detach(), torch.autograd.grad(z, (x_s, *leaves), dz.double())


def check_algebra(dtype, device, size=(3, 9, 7), p=20, q=40, stride=(2, 2), dz_mean=0.0, mean=0.0, tolerance=1.0):
    """Statistics and gradients of a projection's BatchNorm without its output."""
    n, h, w = size
    x = (nhwc(n, p, h, w) + mean).to(dtype).contiguous(memory_format=torch.channels_last).to(device)
    weight = (nhwc(q, p, 1, 1) * (2 / q) ** 0.5).to(dtype).contiguous(memory_format=torch.channels_last).to(device)
    problem = ConvProblem(n, h, w, p, q, stride=stride, dtype=str(dtype).removeprefix("torch."))
    dz = (nhwc(n, q, problem.P, problem.Q) + dz_mean).to(dtype).contiguous(memory_format=torch.channels_last).to(device)
    acc = accumulation(dtype)
    gamma, beta = (1 + 0.5 * torch.randn(q)).to(acc).to(device), torch.randn(q).to(acc).to(device)
    gamma[:3] = torch.tensor([0.0, -1.0, 1e-5])

    running = {"running_mean": torch.zeros(q, device=device), "running_var": torch.zeros(q, device=device)}
    g, c, _ = gram(x, None, SMALL, stride=stride)
    stats, v, m = gram_finalize(g, c, problem.M, weight, gamma=gamma, beta=beta, momentum=1.0, eps=EPS, **running)
    y, (dx, dw, dgamma, dbeta) = reference(x, weight, gamma, beta, dz, stride)
    exact = tolerance * max(EXACT[dtype], 1e-12)
    assert relative(stats[0], y.mean((0, 2, 3))) < exact
    assert relative(stats[1], (y.var((0, 2, 3), unbiased=False) + EPS).rsqrt()) < exact
    assert relative(running["running_var"], y.var((0, 2, 3))) < max(exact, 1e-6)

    t = conv_wgrad(x, dz, problem, GemmConfig(16, 16, 32, num_warps=4, split=3), out_dtype=acc)
    sums = matrix(dz).sum(0).to(acc)
    grads = gram_backward(t, v, m, stats, weight, sums, problem.M, out_dtype=acc)
    for ours, theirs in ((grads.dw, dw), (grads.dgamma, dgamma), (grads.dbeta, dbeta)):
        assert relative(ours, theirs) < exact
    small = grads.aw, grads.p, grads.bias
    ours, _ = gram_dgrad(dz, x, *small, None, TILES[1], aw_terms=grads.aw_terms, scales=grads.scales, stride=stride)
    assert relative(ours, dx) < max(ROUNDING[dtype], exact)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("size", "p", "q", "stride"), SIZES[:3], ids=str)
def test_statistics_and_gradients_are_those_of_autograd(size, p, q, stride, dtype, device):
    check_algebra(dtype, device, size, p, q, stride)


@pytest.mark.parametrize("dz_mean", [3, 30])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradient_with_a_mean(dz_mean, dtype, device):
    check_algebra(dtype, device, dz_mean=dz_mean, tolerance=5.0 * dz_mean)


@pytest.mark.parametrize("mean", [8, 30])
def test_input_far_from_zero(mean, device):
    check_algebra(torch.float32, device, mean=mean, tolerance=mean**2)


PLANTED = (
    Bug("a column too far", "kernels.implicit_gemm", "carry = j >= J", "carry = j > J", ()),
    Bug("a row too far", "kernels.implicit_gemm", "carry = i >= I", "carry = i > I", ()),
    Bug("the image stays", "kernels.implicit_gemm", "n += STEP // (I * J) + carry.to(tl.int32)", "n += 0", ()),
    Bug("neighbours, not samples", "kernels.implicit_gemm", "j * STRIDE_W", "j", ()),
    Bug("a lost lower half", "kernels.gram_dgrad", "store_rows(lower", "store_rows(upper", ()),
    Bug("no bias", "kernels.gram_dgrad", "acc += tl.load(bias_ptr", "acc += 0 * tl.load(bias_ptr", ()),
)


@pytest.mark.skipif(not INTERPRETED, reason="mutants run in the interpreter")
@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_planted_error_is_caught(bug, device):
    check_algebra(torch.float64, device, size=(5, 7, 5))
    with planted(bug), pytest.raises((AssertionError, IndexError)):
        check_algebra(torch.float64, device, size=(5, 7, 5))


def test_records_on_meta():
    def image(c, side):
        return torch.empty(8, c, side, side, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)

    x, y, dz = image(256, 56), image(128, 28), image(512, 28)
    weights = [torch.empty(512, c, 1, 1, dtype=torch.bfloat16, device="meta") for c in (128, 256)]
    problem = ConvProblem(8, 28, 28, 128, 512)
    joining = Projection(
        x, weights[1], ConvProblem(8, 56, 56, 256, 512, stride=(2, 2)), torch.empty(2, 512, device="meta")
    )
    M = 8 * 28 * 28
    with record_launches() as launches:
        gram(x, None, GemmConfig(128, 128, 32), stride=(2, 2))
        conv_fprop(y, weights[0], problem, GemmConfig(64, 128, 64), projection=joining)
        aw, products, bias = (torch.empty(*s, dtype=d, device="meta") for s, d in (
            ((512, 256), torch.bfloat16), ((256, 256), torch.bfloat16), ((256,), torch.float32)))  # fmt: skip
        dx, _ = gram_dgrad(dz, x, aw, products, bias, None, GemmConfig(128, 128, 64), stride=(2, 2))
    assert dx.shape == (8, 256, 28, 28)
    ran, reduced, fprop, dgrad = launches
    assert (ran.kernel, reduced.kernel) == ("gram_kernel", "gram_reduce_kernel")
    # A strided input counts the sampled pixels alone.
    assert ran.bytes == 2 * M * 256 + 4 * (3 * 128 * 128 + 256)
    assert fprop.flops == 2 * M * 512 * (128 + 256)
    assert fprop.bytes == 2 * (M * (128 + 256 + 512) + 512 * (128 + 256)) + 4 * 2 * 512
    assert dgrad.bytes == 2 * (M * (512 + 256 + 256) + 512 * 256 + 256 * 256) + 4 * 256


@pytest.mark.parametrize("change", [{"stride": (1, 1)}, {"R": 3, "S": 3, "padding": (1, 1)}, {"Co": 16}], ids=str)
def test_refuses_another_projection(change):
    x, weight = nhwc(2, 20, 6, 6), nhwc(change.get("Co", 24), 20, change.get("R", 1), change.get("S", 1))
    fields = {"Co": 24, "stride": (2, 2), "dtype": "float64"} | change
    joining = Projection(x, weight, ConvProblem(2, 6, 6, 20, **fields), torch.zeros(2, fields["Co"]).double())
    with pytest.raises(ValueError, match="projection"):
        problem = ConvProblem(2, 3, 3, 16, 24, dtype="float64")
        conv_fprop(nhwc(2, 16, 3, 3), nhwc(24, 16, 1, 1), problem, SMALL, projection=joining)


def test_refuses_a_strided_relu():
    dz, x = nhwc(2, 24, 3, 3), nhwc(2, 20, 6, 6)
    small = torch.zeros(24, 20).double(), torch.zeros(20, 20).double(), torch.zeros(20).double()
    with pytest.raises(ValueError, match="stride"):
        gram_dgrad(dz, x, *small, torch.zeros(4, 20).double(), SMALL, stride=(2, 2))
