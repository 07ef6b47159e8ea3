"""Inputs and parameters that frighten: each function makes a whole block of them, in any dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.whole_block import Block, identity_block, projected_block

Make = Callable[..., Block]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def _image(block: Block, values: Tensor) -> Tensor:
    return values.expand(block.dout.shape).to(block.x.dtype).contiguous(memory_format=torch.channels_last)


def _open(block: Block) -> Block:
    """The last ReLU lets everything through: what the gradient is above it, it is below."""
    block.layers[2].beta.fill_(6.0)
    block.layers[2].gamma.clamp_(0.5, 1.5)
    return block


def _before(block: Block, index: int) -> tuple[Tensor, Tensor]:
    """(input of that convolution, xhat of its BatchNorm), in float64."""
    a = block.x.double()
    for i, part in enumerate(block.layers):
        y = F.conv2d(a, part.weight.double(), None, part.stride, part.padding)
        xhat = F.batch_norm(y, None, None, None, None, True, 0.0, part.eps)
        if i == index:
            break
        a = (xhat * part.gamma.double()[:, None, None] + part.beta.double()[:, None, None]).relu()
    return a, xhat


# ----- gradients -----


def pooled(dtype: torch.dtype, make: Make = identity_block) -> Block:
    """As average pooling makes it: one value per image and channel, its mean over images 30 times its spread."""
    block = _open(make(dtype))
    n, q = block.dout.shape[:2]
    block.dout = _image(block, 30 + _normal(n, q, 1, 1))
    return block


def mean_30(dtype: torch.dtype, make: Make = identity_block) -> Block:
    block = _open(make(dtype))
    block.dout = _image(block, 30 + _normal(*block.dout.shape))
    return block


def along_xhat(dtype: torch.dtype, make: Make = identity_block) -> Block:
    """BatchNorm takes such a gradient away, all but its noise."""
    block = _open(make(dtype))
    block.dout = _image(block, _before(block, 2)[1] + 0.1 * _normal(*block.dout.shape))
    return block


def underflow(dtype: torch.dtype, make: Make = identity_block) -> Block:
    block = make(dtype)
    block.dout = _image(block, 1e-7 * (2 + _normal(*block.dout.shape)))
    return block


def loss_scale(dtype: torch.dtype, make: Make = identity_block) -> Block:
    """A gradient of 5e-3 under a scale of 2^16."""
    block = make(dtype)
    block.dout = _image(block, 5e-3 * 2**16 * _normal(*block.dout.shape))
    return block


# ----- the last convolution's input -----


def far(ratio: float) -> Make:
    """abs(mean) / std of every channel."""

    def block(dtype: torch.dtype, make: Make = identity_block) -> Block:
        block = make(dtype)
        block.layers[1].gamma.fill_(1.0)
        block.layers[1].beta.fill_(ratio)
        return block

    return block


def far_input(ratio: float) -> Make:
    """The same of the block's own input, which a projection reads."""

    def block(dtype: torch.dtype, make: Make = projected_block) -> Block:
        block = make(dtype)
        block.x += ratio * block.x.float().std().to(dtype)
        return block

    return block


def odd_gammas(dtype: torch.dtype, make: Make = identity_block) -> Block:
    """0, negative, tiny: of the last BatchNorm, and of those before it."""
    block = make(dtype)
    for part in block.parts.values():
        part.gamma[0], part.gamma[1], part.gamma[2] = 0.0, -1.5, 1e-5
    block.layers[1].beta[0] = 0.5  # a constant channel of the last convolution's input
    return block


def constant_and_dead(dtype: torch.dtype, make: Make = identity_block) -> Block:
    """Channels of variance 0, before and after a ReLU, and channels that a ReLU zeroes altogether."""
    block = make(dtype)
    block.layers[1].weight[:3] = 0.0
    block.layers[1].beta[:3] = torch.tensor([0.7, -0.7, 0.0])
    block.layers[1].beta[3:5] = -50.0
    block.layers[2].weight[4] = 0.0
    return block


def correlated(dtype: torch.dtype, make: Make = identity_block, own: float = 0.5) -> Block:
    """Channels of the last convolution's input that share most of what they are; ``own``: how much they do not."""
    block = make(dtype)
    weight = block.layers[1].weight
    weight.copy_((weight[:1] + own * weight).to(dtype))
    block.layers[1].gamma.fill_(1.0)
    block.layers[1].beta.fill_(0.1)
    return block


def nearly_equal(dtype: torch.dtype, make: Make = identity_block) -> Block:
    """Channels a hundredth apart."""
    return correlated(dtype, make, own=0.01)


def alike(dtype: torch.dtype, make: Make = identity_block) -> Block:
    """Channels about which one term of A∘W and two are all but as good."""
    return correlated(dtype, make, own=0.3)


def unequal(dtype: torch.dtype, make: Make = identity_block) -> Block:
    """Correlated channels whose sizes lie up to a hundredfold apart."""
    block = correlated(dtype, make, own=0.1)
    gamma = block.layers[1].gamma
    gamma.copy_(10 ** (-2 * torch.linspace(0, 1, len(gamma)))[torch.arange(len(gamma)) * 7 % len(gamma)])
    return block


def orthogonal(dtype: torch.dtype, make: Make = identity_block) -> Block:
    """Filters along the directions in which correlated data vary least: eps outweighs the variance of y."""
    block = correlated(dtype, make)
    a = _before(block, 2)[0].transpose(0, 1).flatten(1)
    least = torch.linalg.eigh(torch.cov(a, correction=0))[1][:, :4]
    mixed = least @ torch.randn(4, len(block.layers[2].weight), generator=torch.Generator().manual_seed(6)).double()
    block.layers[2].weight.copy_(mixed.T.to(dtype)[:, :, None, None])
    return block


# ----- sizes -----


def long(dtype: torch.dtype, make: Make = identity_block) -> Block:
    """More rows than one accumulator takes up."""
    return make(dtype, size=(4, 26, 26), **({"p": 16, "q": 32} if make is identity_block else {}))


def odd_sizes(dtype: torch.dtype, make: Make = identity_block) -> Block:
    """p fills no 16, q no byte of a mask, and neither rows nor channels any tile."""
    return make(dtype, size=(3, 11, 5), p=13, q=35)


def rows(count: int) -> Make:
    def block(dtype: torch.dtype, make: Make = identity_block) -> Block:
        return make(dtype, size=(count, 1, 1))

    return block


def draws(make: Make, dtype: torch.dtype, block: Make, count: int = 12) -> Iterator[Block]:
    """Several of the same kind."""
    return (make(dtype, partial(block, seed=100 * draw)) for draw in range(count))


SCENARIOS: dict[str, Make] = {
    "a pooled gradient": pooled,
    "a gradient of mean 30": mean_30,
    "a gradient along xhat": along_xhat,
    "gammas": odd_gammas,
    "constant and dead channels": constant_and_dead,
    "correlated channels": correlated,
    "nearly equal channels": nearly_equal,
    "filters orthogonal to the data": orthogonal,
    "many rows": long,
    "odd sizes": odd_sizes,
}
BLOCKS: dict[str, Make] = {"identity": identity_block, "projection": projected_block}
