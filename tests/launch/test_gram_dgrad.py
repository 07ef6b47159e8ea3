"""gram_dgrad against the same products in float64, and against autograd through conv, BatchNorm and ReLU."""

import pytest
import torch

from fused_resnet.launch.gram_dgrad import gram_dgrad
from fused_resnet.launch.record import record_launches
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.gram_dgrad import gram_dgrad_config
from fused_resnet.plan.target import H100, INTERPRETER
from tests.bits import pack
from tests.conftest import INTERPRETED

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
WHOLE = GemmConfig(block_m=32, block_n=128, block_k=16, num_warps=4)
TILED = GemmConfig(block_m=32, block_n=32, block_k=16, num_warps=4)
SHAPES = [  # N, H, W, p, q
    (2, 5, 7, 16, 64),
    (1, 1, 1, 20, 70),  # one row
    (3, 5, 5, 64, 256),
    (2, 3, 11, 70, 48),
    (1, 8, 8, 32, 128),  # everything fills its block
]


def nhwc(*shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)


def operands(shape, dtype, device):
    N, H, W, p, q = shape
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    dz, y = nhwc(N, q, H, W, dtype=dtype).to(device), nhwc(N, p, H, W, dtype=dtype).to(device)
    y[0, 0, 0, 0] = 0.0
    AW, P = (torch.randn(rows, p, dtype=torch.float64).to(dtype).to(device) for rows in (q, p))
    bias, stats = torch.randn(p, dtype=acc).to(device), torch.randn(4, p, dtype=acc).to(device)
    stats[3, 0] = 0.0  # z is exactly 0 where y is
    return dz, y, AW, P, bias, stats


def expected(dz, y, AW, P, bias, stats):
    scale, shift = stats[2:]
    rows = y.permute(0, 2, 3, 1).to(stats.dtype)
    z = rows * scale + shift
    a = z.relu().to(y.dtype).double()
    da = dz.permute(0, 2, 3, 1).double() @ AW.double() + a @ P.double() + bias.double()
    return torch.where(z <= 0, 0.0, da).permute(0, 3, 1, 2)


def check(shape, config, dtype, device):
    arguments = operands(shape, dtype, device)
    dx, tiles = gram_dgrad(*arguments, config)
    assert_close(dx, expected(*arguments), dtype)
    check_sums(dx, tiles, arguments[1], arguments[-1], config)


def assert_close(dx, reference, dtype):
    assert dx.shape == reference.shape
    assert dx.dtype == dtype
    assert dx.is_contiguous(memory_format=torch.channels_last)
    error, size = (dx.double() - reference).norm(), reference.norm()
    assert error <= TOLERANCE[dtype] * size, f"relative error {error / size:.2e}"


def check_sums(dx, tiles, y, stats, config):
    p = y.shape[1]
    rows = dx.permute(0, 2, 3, 1).reshape(-1, p).double()
    products = rows * (y.permute(0, 2, 3, 1).reshape(-1, p).double() - stats[0].double())
    tolerance = 1e-11 if tiles.dtype == torch.float64 else 1e-4
    sums = [torch.stack([part.sum(0) for part in v.split(config.block_m)]) for v in (rows, products)]
    torch.testing.assert_close(tiles.double(), torch.stack(sums), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("config", [WHOLE, TILED], ids=["whole", "tiled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_products(shape, config, device):
    check(shape, config, torch.float64 if device.type == "cpu" else torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [WHOLE, TILED], ids=["whole", "tiled"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=str)
def test_lower_precision(shape, config, dtype, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check(shape, config, dtype, device)


@pytest.mark.parametrize("config", [WHOLE, TILED], ids=["whole", "tiled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_terms_add_up(shape, config, device):
    """P as two bfloat16 terms is worth 16 bits of it; so is P alone, in one term of three dimensions."""
    dz, y, AW, P, bias, stats = operands(shape, torch.bfloat16, device)
    P = torch.randn(P.shape, dtype=torch.float64, device=device)
    first = P.bfloat16()
    terms = torch.stack([first, (P - first.double()).bfloat16()])
    dx, _ = gram_dgrad(dz, y, torch.zeros_like(AW), terms, bias, stats, config)
    reference = expected(dz, y, torch.zeros_like(AW), P, bias, stats)
    assert (dx.double() - reference).norm() <= 1.01 * (reference.bfloat16().double() - reference).norm() + 1e-4
    one = gram_dgrad(dz, y, AW, first[None], bias, stats, config)
    assert all(map(torch.equal, one, gram_dgrad(dz, y, AW, first, bias, stats, config)))
    with pytest.raises(ValueError, match="P must be contiguous"):
        gram_dgrad(dz, y, AW, torch.stack([first] * 3), bias, stats, config)


@pytest.mark.parametrize("config", [WHOLE, TILED], ids=["whole", "tiled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forms_dz_from_the_mask(shape, config, device):
    """dout and bits give what the dz they stand for gives, to the last bit; an infinity behind the mask is not seen.

    In 16 bits: compiled, the products of float32 are added up in another order where dz is formed.
    """
    dout, *rest = operands(shape, torch.float32 if INTERPRETED else torch.float16, device)
    passes = torch.rand(dout.shape, device=device) < 0.6
    dz = torch.where(passes, dout, 0.0).contiguous(memory_format=torch.channels_last)
    dout = torch.where(passes, dout, torch.inf).contiguous(memory_format=torch.channels_last)
    bits = pack(passes.permute(0, 2, 3, 1).reshape(-1, dout.shape[1]))
    for found, expects in zip(gram_dgrad(dout, *rest, config, bits=bits), gram_dgrad(dz, *rest, config), strict=True):
        assert torch.equal(found, expects)
    wrong = bits.flip(1) if bits.shape[1] > 1 else bits ^ 1
    assert not torch.equal(gram_dgrad(dz, *rest, config, bits=wrong)[0], gram_dgrad(dz, *rest, config)[0])
    with pytest.raises(ValueError, match="bits"):
        gram_dgrad(dz, *rest, config, bits=bits[1:])


@pytest.mark.parametrize("config", [WHOLE, TILED], ids=["whole", "tiled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_as_many_terms_of_aw_as_the_device_says(shape, config, scale, device):
    """Two are worth 22 bits of float16 AW; where one counts the other, here NaN, is not read. dz from a mask alike."""
    dz, y, AW, P, bias, stats = operands(shape, torch.float16, device)
    AW, scales = torch.randn(AW.shape, dtype=torch.float64, device=device), torch.tensor([scale, 1.0], device=device)
    first = (AW * scale).half()
    terms = torch.stack([first, (AW * scale - first.double()).half()])
    bits = torch.full((len(dz.permute(0, 2, 3, 1).flatten(0, 2)), -(-dz.shape[1] // 8)), 255, dtype=torch.uint8)
    options = {"scales": scales if scale > 1 else None, "bits": bits.to(device)}
    one, two = (torch.tensor([n], dtype=torch.int32, device=device) for n in (1, 2))
    P = torch.zeros_like(P)
    dx, tiles = gram_dgrad(dz, y, terms, P, bias, stats, config, aw_terms=two, **options)
    reference = expected(dz, y, AW, P, bias, stats)
    assert (dx.double() - reference).norm() <= 1.01 * (reference.half().double() - reference).norm() + 1e-5
    check_sums(dx, tiles, y, stats, config)
    terms[1] = torch.nan
    found = gram_dgrad(dz, y, terms, P, bias, stats, config, aw_terms=one, **options)
    assert all(map(torch.equal, found, gram_dgrad(dz, y, first, P, bias, stats, config, **options)))
    with pytest.raises(ValueError, match="AW must be contiguous"):
        gram_dgrad(dz, y, first, P, bias, stats, config, aw_terms=one)
    with pytest.raises(ValueError, match="AW must be contiguous"):
        gram_dgrad(dz, y, terms, P, bias, stats, config)
    with pytest.raises(ValueError, match="aw_terms"):
        gram_dgrad(dz, y, terms, P, bias, stats, config, aw_terms=one.long())


def test_scales(device):
    """P of 1e-7 is nothing in float16; multiplied by a power of two, as AW is, it is as good as any."""
    dz, y, AW, P, bias, stats = operands((2, 5, 7, 20, 64), torch.float32, device)
    scales = torch.tensor([2.0**10, 2.0**20], device=device)
    AW, P, bias = AW * 1e-4, P * 1e-7, bias * 1e-4
    dz, y, AW_half, P_half = dz.half(), y.half(), (AW * scales[0]).half(), (P * scales[1]).half()
    dx, tiles = gram_dgrad(dz, y, AW_half, P_half, bias, stats, WHOLE, scales=scales)
    reference = expected(dz, y, AW_half.double() / scales[0], P_half.double() / scales[1], bias, stats)
    # dx itself is near float16's smallest numbers.
    torch.testing.assert_close(dx.double(), reference, rtol=2e-3, atol=6e-8)
    check_sums(dx, tiles, y, stats, WHOLE)


def test_is_the_gradient(device):
    """With AW, P and bias of ALGEBRA.md, autograd's own gradient through conv, BatchNorm and ReLU."""
    N, H, W, p, q = 2, 5, 3, 16, 48
    dtype, M = torch.float64, N * H * W
    y = torch.randn(M, p, dtype=dtype, requires_grad=True)
    weight, gamma, dz = (torch.randn(*s, dtype=dtype) for s in ((q, p), (q,), (M, q)))
    stats = torch.randn(4, p, dtype=dtype)
    a = (y * stats[2] + stats[3]).relu()
    out = torch.nn.functional.batch_norm(a @ weight.T, None, None, gamma, training=True, eps=1e-5)
    out.backward(dz)
    a = a.detach()
    y3 = a @ weight.T
    rstd = (y3.var(0, correction=0) + 1e-5).rsqrt()
    dgamma = rstd * ((weight * (dz.T @ a)).sum(1) - y3.mean(0) * dz.sum(0))
    A = gamma * rstd
    B = -A * rstd * dgamma / M
    AW, P = A[:, None] * weight, weight.T @ (B[:, None] * weight)
    bias = -(dz.sum(0) / M) @ AW - a.mean(0) @ P

    def image(rows):
        return rows.detach().reshape(N, H, W, -1).permute(0, 3, 1, 2).to(device)

    if device.type != "cpu":
        pytest.skip("float64 runs in the interpreter only")
    dx, _ = gram_dgrad(image(dz), image(y), AW, P, bias, stats, TILED)
    torch.testing.assert_close(dx, image(y.grad / stats[2]), rtol=1e-9, atol=1e-9)


def test_two_runs_agree(device):
    arguments = operands(SHAPES[3], torch.float32, device)
    for first, second in zip(gram_dgrad(*arguments, TILED), gram_dgrad(*arguments, TILED), strict=True):
        assert torch.equal(first, second)


def test_records_on_meta():
    N, H, W, p, q = 256, 28, 28, 128, 512
    dz, y = (torch.empty(N, c, H, W, dtype=torch.bfloat16, device="meta") for c in (q, p))
    dz, y = (t.to(memory_format=torch.channels_last) for t in (dz, y))
    AW, P = (torch.empty(c, p, dtype=torch.bfloat16, device="meta") for c in (q, p))
    bias, stats = torch.empty(p, device="meta"), torch.empty(4, p, device="meta")
    with record_launches() as launches:
        dx, tiles = gram_dgrad(dz, y, AW, P, bias, stats, gram_dgrad_config(N * H * W, p, q, H100))
    M = N * H * W
    assert dx.shape == y.shape
    assert tiles.shape == (2, -(-M // 128), p)
    assert [entry.kernel for entry in launches] == ["gram_dgrad_kernel"]
    assert launches[0].flops == 2 * M * p * (q + p)
    assert launches[0].bytes > 2 * M * (q + 2 * p)


@pytest.mark.parametrize("p", [16, 20, 64, 70, 128, 512])
def test_configuration_of_the_interpreter(p):
    config = gram_dgrad_config(1000, p, 4 * p, INTERPRETER)
    assert min(config.block_m, config.block_n, config.block_k) >= 16


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AW", torch.zeros(16, 64)),
        ("P", torch.zeros(16, 16).T[:, :8]),
        ("bias", torch.zeros(8)),
        ("stats", torch.zeros(2, 16)),
        ("y", torch.zeros(2, 16, 5, 7)),
    ],
)
def test_refuses(name, value):
    names = ["dz", "y", "AW", "P", "bias", "stats"]
    arguments = dict(zip(names, operands((2, 5, 7, 16, 64), torch.float32, "cpu"), strict=True))
    arguments[name] = value
    with pytest.raises(ValueError, match=name):
        gram_dgrad(*arguments.values(), WHOLE)
