"""SyncBatchNorm in two processes: ours beside its oracle, BatchNorm on the batches of both, joined."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import functional, reference
from fused_resnet.launch.record import Launch
from tests.whole_block import Block

RANKS = 2
SIZES = (3, 1)
"""Images of each rank."""

Make = Callable[[], nn.Module]


def block(kind: type[nn.Module] = reference.Bottleneck) -> nn.Module:
    return kind(16, 16 // kind.expansion)


def projected(kind: type[nn.Module] = reference.Bottleneck, channels: int = 8) -> nn.Module:
    """16 channels of half the size. From 8 the Gram route takes the projection as well, from 32 it is staged."""
    downsample = nn.Sequential(nn.Conv2d(channels, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    return kind(channels, 16 // kind.expansion, 2, downsample)


def pair(make: Make, make_ours: Make | None = None) -> tuple[nn.Module, nn.Module]:
    """Ours with SyncBatchNorm, and the oracle with BatchNorm: the same values on both ranks. Ours is converted from
    what ``make`` makes, or loads its state into what ``make_ours`` does."""
    torch.manual_seed(0)
    theirs = make().double()
    for t in (*theirs.parameters(), *theirs.buffers()):
        if t.is_floating_point() and t.dim() == 1:
            t.data += 0.3 * torch.rand(t.shape, dtype=t.dtype)
    ours = make_ours().double() if make_ours else copy.deepcopy(theirs)
    ours.load_state_dict(theirs.state_dict())
    fr.convert(ours)
    return nn.SyncBatchNorm.convert_sync_batchnorm(ours), theirs


def layer(name: str, *arguments: int) -> tuple[nn.Module, nn.Module]:
    """The same of a layer of this package."""
    return pair(lambda: getattr(reference, name)(*arguments), lambda: getattr(fr, name)(*arguments))


class Add(nn.Module):
    """``functional.bn_add_relu``: the layer itself is a BatchNorm2d, of which conversion leaves a bare norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(5)

    def forward(self, y: Tensor) -> Tensor:
        return functional.bn_add_relu(y, functional.batch_norm_of(self.bn), y)


def images(channels: int, sizes: Sequence[int] = SIZES, size: int = 6) -> list[Tensor]:
    """A batch for every rank, each around another mean."""
    generator = torch.Generator().manual_seed(1)
    shape = channels, size, size
    return [torch.randn(n, *shape, generator=generator, dtype=torch.float64) + rank for rank, n in enumerate(sizes)]


def gathers(launches: Sequence[Launch]) -> int:
    return sum(launch.kernel == "all_gather" for launch in launches)


def check(
    rank: int,
    ours: nn.Module,
    theirs: nn.Module,
    batches: Sequence[Tensor],
    *,
    needs_x: bool = True,
    route: str = "auto",
    collectives: tuple[int, int] | None = None,
) -> list[str]:
    """One step of each: outputs, every gradient, buffers, and how many collectives each way; the kernels of ours.

    What ranks have to tell each other is told before anything may fail: else one would wait for the other.
    """
    joined = torch.cat(list(batches)).requires_grad_(needs_x)
    expected = theirs(joined)
    generator = torch.Generator().manual_seed(2)
    dout = torch.randn(expected.shape, generator=generator, dtype=torch.float64) + 0.5
    if expected.requires_grad:
        expected.backward(dout)

    x = batches[rank].clone().requires_grad_(needs_x)
    begin = sum(map(len, batches[:rank]))
    mine = slice(begin, begin + len(x))
    with fr.record_launches() as forward, fr.use_route(route):
        out = ours(x)
    with fr.record_launches() as backward:
        if out.requires_grad:
            out.backward(dout[mine])
    totals = [None if p.grad is None else p.grad.clone() for p in ours.parameters()]
    for total in totals:
        if total is not None:
            dist.all_reduce(total)
    buffers = [[torch.empty_like(b) for _ in range(RANKS)] for b in ours.buffers()]
    for both, b in zip(buffers, ours.buffers(), strict=True):
        dist.all_gather(both, b)

    norms = sum(isinstance(module, nn.SyncBatchNorm) for module in ours.modules())
    assert (gathers(forward), gathers(backward)) == (collectives or (norms, norms)), (forward, backward)
    torch.testing.assert_close(out, expected[mine])
    if needs_x:
        torch.testing.assert_close(x.grad, joined.grad[mine])
    for (name, p), total in zip(theirs.named_parameters(), totals, strict=True):
        assert (p.grad is None) == (total is None), name
        if total is not None:
            torch.testing.assert_close(total, p.grad, msg=lambda text, name=name: f"{name}: {text}")
    for (name, b), both in zip(theirs.named_buffers(), buffers, strict=True):
        assert torch.equal(*both), f"{name} differs between ranks"
        torch.testing.assert_close(both[0], b, msg=lambda text, name=name: f"{name}: {text}")
    return [launch.kernel for launch in (*forward, *backward)]


@dataclass
class Shared(Block):
    """A block of which each rank computes its images: ``run`` gives what they have together."""

    rank: int = 0
    images: int = 2
    """Of rank 0."""

    def run(self, route: str = "gram", strict: bool = True) -> tuple[dict[str, Any], list[Tensor]]:
        mine = slice(None, self.images) if self.rank == 0 else slice(self.images, None)
        group = dist.group.WORLD.group_name
        part = Block(self.x[mine], self.layers, self.projection, self.dout[mine], self.running, group)
        both: list[Any] = [None] * RANKS
        dist.all_gather_object(both, part.run(route, strict))
        found: dict[str, Any] = {}
        for name in both[0][0]:
            parts = [results[name] for results, _ in both]
            if name in ("z", "dx"):
                found[name] = torch.cat(parts).contiguous(memory_format=torch.channels_last)
            elif name.startswith("running"):
                assert torch.equal(*parts), f"{name} differs between ranks"
                found[name] = parts[0]
            else:
                found[name] = (parts[0].double() + parts[1].double()).to(parts[0].dtype)
        return found, [torch.cat(masks) for masks in zip(*(masks for _, masks in both), strict=True)]


def shared(rank: int, whole: Block) -> Shared:
    return Shared(whole.x, whole.layers, whole.projection, whole.dout, whole.running, rank=rank)
