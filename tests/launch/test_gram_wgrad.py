"""gram_wgrad against the same sums in float64; bits against their definition."""

import pytest
import torch
import triton
import triton.language as tl

from fused_resnet.kernels.bits import pack_bits, unpack_bits
from fused_resnet.launch.bits import empty_bits
from fused_resnet.launch.gram_wgrad import gram_wgrad
from fused_resnet.launch.record import record_launches
from fused_resnet.plan.config import GemmConfig
from tests.bits import pack
from tests.conftest import INTERPRETED

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
CONFIG = GemmConfig(block_m=32, block_n=32, block_k=16, num_warps=4, split=3)
SHAPES = [  # N, H, W, p, q
    (2, 5, 7, 16, 64),
    (1, 1, 1, 20, 70),  # one row: parts without any
    (3, 5, 5, 64, 256),
    (2, 3, 11, 70, 44),
    (1, 8, 8, 32, 128),  # everything fills its block
]


@triton.jit
def bits_kernel(mask_ptr, packed_ptr, unpacked_ptr, ROWS: tl.constexpr, C: tl.constexpr):
    offs = tl.arange(0, ROWS)[:, None] * C + tl.arange(0, C)[None, :]
    packed = pack_bits(tl.load(mask_ptr + offs) != 0)
    tl.store(packed_ptr + tl.arange(0, ROWS)[:, None] * (C // 8) + tl.arange(0, C // 8)[None, :], packed)
    tl.store(unpacked_ptr + offs, unpack_bits(packed).to(tl.int8))


def nhwc(*shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)


def rows(image):
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def check(shape, dtype, device, config=CONFIG, *, store_dz=True):
    N, H, W, p, q = shape
    dout, out, y = (nhwc(N, c, H, W, dtype=dtype).to(device) for c in (q, q, p))
    out = out.relu()
    affine = torch.randn(2, p, dtype=torch.float64).to(torch.float64 if dtype == torch.float64 else torch.float32)
    affine = affine.to(device)
    T, sum_dz, dz = gram_wgrad(dout, pack(rows(out) > 0), y, affine, config, store_dz=store_dz)

    expected_dz = torch.where(out > 0, dout, 0.0)
    a = (rows(y).to(affine.dtype) * affine[0] + affine[1]).relu().to(dtype).double()
    expected = rows(expected_dz).double().T @ a
    assert T.dtype == sum_dz.dtype == affine.dtype
    assert (T.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    torch.testing.assert_close(sum_dz.double(), rows(expected_dz).double().sum(0), rtol=1e-5, atol=1e-5)
    if store_dz:
        assert torch.equal(dz, expected_dz)
        assert dz.is_contiguous(memory_format=torch.channels_last)
    else:
        assert dz is None


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_sums(shape, device):
    check(shape, torch.float64 if INTERPRETED else torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precision(dtype, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check(SHAPES[3], dtype, device)


@pytest.mark.parametrize("split", [1, 2, 40])
def test_parts(split, device):
    config = GemmConfig(block_m=64, block_n=32, block_k=32, num_warps=4, split=split)
    check(SHAPES[0], torch.float16, device, config, store_dz=False)


@pytest.mark.parametrize("channels", [16, 64])
def test_bits(channels, device):
    mask = (torch.randn(8, channels) > 0).to(torch.int8).to(device)
    packed = torch.empty(8, channels // 8, dtype=torch.uint8, device=device)
    unpacked = torch.empty_like(mask)
    bits_kernel[(1,)](mask, packed, unpacked, ROWS=8, C=channels)
    assert torch.equal(packed, pack(mask != 0))
    assert torch.equal(unpacked, mask)


def test_records_on_meta():
    dout, y = (
        torch.empty(4, c, 28, 28, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
        for c in (512, 128)
    )
    with record_launches() as launches:
        T, sum_dz, dz = gram_wgrad(
            dout, empty_bits(dout.shape, dout.device), y, torch.empty(2, 128, device="meta"), CONFIG, store_dz=True
        )
    assert (T.shape, sum_dz.shape, dz.shape) == ((512, 128), (512,), dout.shape)
    assert [entry.kernel for entry in launches] == ["gram_wgrad_kernel", "conv_wgrad_reduce_kernel"]
    assert launches[0].flops == 2 * 4 * 784 * 512 * 128


@pytest.mark.parametrize(
    "bits",
    [
        torch.zeros(70, 7, dtype=torch.uint8),
        torch.zeros(70, 8),
        torch.zeros(70, 8, dtype=torch.uint8, device="meta"),
        torch.zeros(8, 70, dtype=torch.uint8).t(),
    ],
)
def test_refuses(bits):
    dout, y = nhwc(2, 64, 5, 7, dtype=torch.float32), nhwc(2, 16, 5, 7, dtype=torch.float32)
    with pytest.raises(ValueError, match="bits"):
        gram_wgrad(dout, bits, y, torch.zeros(2, 16), CONFIG, store_dz=False)
