"""The Gram route against autograd in float64: a 1x1 convolution with BatchNorm whose output never exists."""

import pytest
import torch

from fused_resnet.launch.gram import GramGrads, gram, gram_backward, gram_finalize
from fused_resnet.launch.record import record_launches
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.gram import gram_config, gram_tiles
from fused_resnet.plan.passes import CUMULATIVE
from tests.gram_case import (
    EPS,
    EXACT,
    SMALL,
    accumulation,
    check_gradients,
    check_second_term,
    check_statistics,
    check_terms,
    gradients,
    input_gradient,
    make_case,
    matrix,
    nhwc,
    reference,
    relative,
    shared_case,
    statistics,
)

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
# (N, H, W), p, q
SIZES = [((2, 5, 7), 20, 80), ((2, 4, 4), 16, 64), ((3, 6, 6), 64, 256), ((2, 3, 3), 33, 50), ((1, 2, 5), 5, 3)]


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("size", "p", "q"), SIZES, ids=str)
def test_gram_is_the_product_of_the_rounded_input(size, p, q, dtype, device):
    case = make_case(size, p, q, dtype, device)
    g, c, _ = gram(case.x, case.input_affine, SMALL)
    a = matrix(case.a)
    assert g.dtype == c.dtype == accumulation(dtype)
    assert relative(g, a.T @ a) < EXACT[dtype] and relative(c, a.sum(0)) < EXACT[dtype]
    assert relative(g, g.T.double()) < 1e-6


@pytest.mark.parametrize("config", [GemmConfig(32, 32, 16, split=1), GemmConfig(16, 16, 32, split=64)], ids=str)
def test_gram_without_prologue(config, device):
    x = nhwc(2, 40, 7, 9, device=device)
    g, c, _ = gram(x, None, config)
    a = matrix(x)
    assert relative(g, a.T @ a) < 1e-14 and relative(c, a.sum(0)) < 1e-13


def test_gram_over_several_runs_of_the_accumulator(device):
    case = make_case((3, 20, 21), 20, 8, torch.float32, device)
    g, c, _ = gram(case.x, case.input_affine, GemmConfig(16, 16, 64, split=1))
    a = matrix(case.a)
    assert relative(g, a.T @ a) < 1e-6 and relative(c, a.sum(0)) < 1e-6


def test_gram_is_reproducible(device):
    case = make_case((2, 9, 9), 33, 8, torch.float32, device)
    first = gram(case.x, case.input_affine, SMALL)
    for again in (gram(case.x, case.input_affine, SMALL) for _ in range(2)):
        assert all(torch.equal(one, other) for one, other in zip(first[:2], again[:2], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("p", [33, 48, 16], ids=str)
def test_gram_writes_what_it_formed(p, dtype, device):
    """Several tiles, the last ones partly empty: every element once, and the products as without."""
    case = make_case((2, 9, 9), p, 8, dtype, device)
    g, c, a = gram(case.x, case.input_affine, SMALL, store_a=True)
    without = gram(case.x, case.input_affine, SMALL)
    assert torch.equal(a, case.a) and a.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(g, without[0]) and torch.equal(c, without[1]) and without[2] is None
    with pytest.raises(ValueError, match="store_a goes with stride 1"):
        gram(case.x, None, SMALL, stride=(2, 2), store_a=True)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("size", "p", "q"), SIZES, ids=str)
def test_statistics_and_gradients_are_those_of_autograd(size, p, q, dtype, device):
    case = make_case(size, p, q, dtype, device)
    check_statistics(case)
    check_gradients(case, EXACT[dtype], {torch.float16: 1e-2, torch.bfloat16: 3e-2}.get(dtype))


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, -0.3, None])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_running_statistics_are_those_of_batch_norm(momentum, dtype, device):
    bn = torch.nn.BatchNorm1d(24, momentum=momentum).double()
    kept = accumulation(dtype)
    running_mean, running_var = torch.zeros(24, dtype=kept, device=device), torch.ones(24, dtype=kept, device=device)
    counter = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(2):
        case = make_case((2, 5, 5), 20, 24, dtype, device)
        bn((matrix(case.a) @ case.weight.double().flatten(1).T).cpu())
        counter += momentum is None  # then it has counted already
        statistics(
            case,
            running_mean=running_mean,
            running_var=running_var,
            momentum=CUMULATIVE if momentum is None else momentum,
            counter=counter,
        )
    assert counter == 2
    close = {"rtol": EXACT[dtype], "atol": EXACT[dtype]}
    torch.testing.assert_close(running_mean.double().cpu(), bn.running_mean, **close)
    torch.testing.assert_close(running_var.double().cpu(), bn.running_var, **close)


def test_without_parameters_and_one_row(device):
    case = make_case((1, 1, 1), 20, 24, torch.float32, device)
    g, c, _ = gram(case.x, case.input_affine, SMALL)
    running_var = torch.zeros(24, device=device)
    arguments = {"gamma": None, "beta": None, "running_mean": None, "running_var": running_var}
    stats, v, _ = gram_finalize(g, c, 1, case.weight, momentum=1.0, eps=EPS, **arguments)
    y = matrix(case.a) @ case.weight.double().flatten(1).T
    # One row has no variance; what float32 leaves of it is small, never negative.
    assert relative(stats[0], y[0]) < 1e-6
    assert (running_var >= 0).all() and (running_var < 1e-6).all() and v.abs().max() < 1e-5
    assert torch.equal(stats[1], stats[2]) and stats.isfinite().all()


def test_bfloat16_weights_multiply_as_float32(device):
    """Split products: V to the last bits of float32; P in two terms, the first the exact one rounded."""
    case = make_case((3, 8, 8), 40, 160, torch.bfloat16, device)
    _, v, _ = statistics(case)
    weight, a = case.weight.double().flatten(1), matrix(case.a)
    assert relative(v, weight @ a.T.cov(correction=0)) < 1e-6
    check_terms(case)


# ----- numbers that frighten -----


@pytest.mark.parametrize("dz_mean", [3, 30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_gradient_with_a_mean(dz_mean, dtype, device):
    """As average pooling makes it. The mean cancels in da: the bias must match the matrices as rounded."""
    case = make_case((3, 8, 8), 20, 80, dtype, device, dz_mean=dz_mean)
    plain = make_case((3, 8, 8), 20, 80, dtype, device)
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3}[dtype]
    check_gradients(plain, EXACT[dtype], rounding)
    check_gradients(case, 30 * EXACT[dtype], rounding if dtype == torch.float16 else 30 * rounding)


@pytest.mark.parametrize("offset", [10, 100])
def test_input_far_from_zero(offset, device):
    """abs(mean) / std of the input: G cancels its square, in whatever float32 holds."""
    case = make_case((3, 8, 8), 20, 80, torch.float32, device, offset=offset)
    check_statistics(case, tolerance=2e-6 * offset**2)
    check_gradients(make_case((3, 8, 8), 20, 80, torch.float64, device, offset=offset), 1e-12 * offset**2)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_odd_channels(dtype, device):
    """gamma 0, negative and tiny; dead and constant input channels; a filter of zeros; gradients along xhat."""
    case = make_case((2, 6, 6), 20, 40, dtype, device)
    case.gamma[0], case.gamma[1], case.gamma[2] = 0.0, -1.5, 1e-5
    case.input_affine[:, 3] = 0.0  # dead
    case.input_affine[0, 4], case.input_affine[1, 4] = 0.0, 2.0  # constant
    case.weight[5] = 0.0
    y = matrix(case.a) @ case.weight.double().flatten(1).T
    xhat = (y - y.mean(0)) / (y.var(0, unbiased=False) + EPS).sqrt()
    along = xhat.view(2, 6, 6, 40).permute(0, 3, 1, 2).to(dtype)
    case.dz[:, 7:] = along[:, 7:]
    check_statistics(case)
    check_gradients(case, 10 * EXACT[dtype], {torch.float16: 2e-2, torch.bfloat16: 1e-1}.get(dtype))


@pytest.mark.parametrize("scale", [1e-6, 2.0**16])
@pytest.mark.parametrize("gamma", [1e-4, 1.0])
def test_float16_does_not_lose_its_exponents(scale, gamma, device):
    """P is 1e-7 and A∘W subnormal for a small gamma; a loss scale makes T large."""
    case = make_case((2, 7, 7), 20, 80, torch.float16, device)
    case = case._replace(gamma=case.gamma * gamma, dz=(case.dz.double() * scale / 64).half())
    grads = gradients(case)
    assert grads.scales.shape == (2,) and all(torch.frexp(grads.scales)[0] == 0.5)
    assert grads.aw.isfinite().all() and grads.p.isfinite().all()
    assert (grads.p[0].abs() > 2**-14).float().mean() > 0.9
    assert (grads.aw[0].abs() > 2**-14).float().mean() > 0.9
    da, dw, dgamma, _ = reference(case)
    assert relative(grads.dw.flatten(1), dw) < 1e-5 and relative(grads.dgamma, dgamma) < 1e-5
    assert relative(input_gradient(case, grads), da) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_ordinary_data_need_one_term(dtype, device):
    """Nor do a gamma of 0, a filter of zeros, a dead and a constant channel ask for a second; wide data have none."""
    case = make_case((2, 7, 7), 20, 80, dtype, device, dz_mean=3.0)
    case.gamma[:2] = 0.0
    case.weight[2] = 0.0
    case.input_affine[0, :2] = 0.0
    case.input_affine[1, :2] = torch.tensor([-1.0, 0.7])
    terms = gradients(case).aw_terms
    assert terms is None if dtype == torch.float32 else int(terms) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_second_term_where_filters_cancel_what_channels_share(dtype, device):
    check_second_term(shared_case(dtype, device))
    case = shared_case(dtype, device)
    case.gamma[:] = 0.0  # no da at all
    assert int(gradients(case).aw_terms) == 1


def test_nan_is_seen(device):
    case = make_case((2, 5, 5), 20, 24, torch.float32, device)
    case.x[0, 3, 1, 1] = float("nan")
    stats, _, m = statistics(case)
    assert m[3].isnan() and m[torch.arange(20) != 3].isfinite().all()
    assert stats.isnan().all()  # every filter reads that channel, as in eager
    assert gradients(case).dw.isnan().all()


# ----- plans, records, errors -----


@pytest.mark.parametrize("sm_count", [108, 132])
@pytest.mark.parametrize(("p", "pixels"), [(64, 56), (128, 28), (256, 14), (512, 7)])
def test_plan_has_a_small_workspace_and_no_idle_processors(p, pixels, sm_count):
    rows = 256 * pixels**2
    config = gram_config(rows, p, sm_count)
    tiles = gram_tiles(p, config.block_n)
    workspace = 4 * config.split * tiles * config.block_n**2
    assert 0.9 * sm_count < config.split * tiles
    assert workspace <= 2 * rows * p / 4 or config.split * tiles <= sm_count


def test_plan_of_few_rows():
    assert gram_config(1, 64).split == 1
    assert gram_config(1, 3).block_n == 16
    assert gram_config(100, 64, interpreter=True).split == 1


def test_meta_tensors_are_recorded_alone():
    x = torch.empty((2, 64, 5, 7), device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    weight = torch.empty((256, 64, 1, 1), device="meta", dtype=torch.bfloat16)
    none = dict.fromkeys(("gamma", "beta", "running_mean", "running_var"))
    with record_launches() as launches:
        g, c, _ = gram(x, torch.empty((2, 64), device="meta"), gram_config(70, 64))
        stats, v, m = gram_finalize(g, c, 70, weight, momentum=0.1, eps=EPS, **none)
        t = torch.empty((256, 64, 1, 1), device="meta")
        out = gram_backward(t, v, m, stats, weight, stats[0], 70, out_dtype=torch.bfloat16)
    assert out.dw.dtype == out.aw.dtype == out.p.dtype == torch.bfloat16 and out.scales is None
    assert isinstance(out, GramGrads) and out.bias.shape == (64,)
    names = ["gram", "gram_reduce", "gram_finalize", "gram_backward", "gram_product", "gram_bias"]
    assert [launch.kernel for launch in launches] == [f"{name}_kernel" for name in names]
    assert launches[0].flops == 2 * 70 * 64 * 64
    assert launches[0].bytes == 70 * 64 * 2 + 2 * 64 * 4 + (64 * 64 + 64) * 4


def test_errors(device):
    x = nhwc(2, 20, 3, 3, device=device)
    with pytest.raises(ValueError, match="square tiles"):
        gram(x, None, GemmConfig(16, 32, 16))
    with pytest.raises(ValueError, match="channels_last"):
        gram(x.contiguous(), None, SMALL)
    with pytest.raises(ValueError, match="rows"):
        gram(x[:0], None, SMALL)
    case = make_case((2, 3, 3), 20, 8, torch.float64, device)
    g, c, _ = gram(x, None, SMALL)
    arguments = {"beta": None, "running_mean": None, "running_var": None, "momentum": 0.1, "eps": EPS}
    with pytest.raises(ValueError, match="gamma must have shape"):
        gram_finalize(g, c, 18, case.weight, gamma=torch.ones(7, device=device), **arguments)
    with pytest.raises(ValueError, match="0 rows"):
        gram_finalize(g, c, 0, case.weight, gamma=None, **arguments)
    stats, v, m = statistics(case)
    with pytest.raises(ValueError, match="t must have shape"):
        gram_backward(v[:3], v, m, stats, case.weight, stats[0], 18, out_dtype=torch.float64)
