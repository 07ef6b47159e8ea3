"""What each of two processes does for test_distributed.py: every case in turn, and a report of those that failed.

``python -m tests.features.two_ranks RANK FOLDER``. The process group is gloo's, on the CPU; each rank has a half of its
own of every batch, and the oracle is the reference family, trained alike or on the batches joined.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_resnet as fr
from fused_resnet import reference
from tests.convert.beside import Home
from tests.features.sync_ranks import SYNC_CASES

RANKS = 2


def networks(blocks: int = 2) -> list[nn.Module]:
    """Ours and the reference's, with the same weights on both ranks."""
    nets = []
    for family in (fr, reference):
        torch.manual_seed(0)
        nets.append(family.ResNet(family.Bottleneck, [1] * blocks, width=4, num_classes=3, small_input=True).double())
    nets[0].load_state_dict(nets[1].state_dict())
    return nets


def batch(rank: int, step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)


def whole(t: Tensor | None) -> Tensor | None:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {name.removeprefix("module."): whole(p.grad) for name, p in net.named_parameters()}


def mean_over_ranks(net: nn.Module) -> dict[str, Tensor | None]:
    """What data parallelism computes, by hand: each rank's own gradients, averaged."""
    for p in net.parameters():
        dist.all_reduce(p.grad)
        p.grad /= RANKS
    return gradients(net)


def step(net: nn.Module, x: Tensor) -> None:
    net(x).square().mean().backward()


def close(ours: dict[str, Any], theirs: dict[str, Any], **tolerance: Any) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# ---------------------------------------------------------------- DistributedDataParallel


def ddp(rank: int) -> None:
    """Two steps of SGD, the gradients views of the buckets."""
    ours, theirs = networks(1)
    wrapped = DistributedDataParallel(ours, gradient_as_bucket_view=True, static_graph=True)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (wrapped, theirs)]
    for number in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with fr.record_launches() as launches:
            step(wrapped, batch(rank, number))
        assert launches
        step(theirs, batch(rank, number))
        close(gradients(wrapped), mean_over_ranks(theirs))
        for optimizer in optimizers:
            optimizer.step()
    close(dict(ours.named_parameters()), dict(theirs.named_parameters()))


def ddp_accumulation(rank: int) -> None:
    """Two batches without a reduction between them, and a parameter that nobody uses."""
    ours, theirs = networks(1)
    for net in (ours, theirs):
        net.unused = nn.Parameter(torch.zeros(2).double())
    wrapped = DistributedDataParallel(ours, find_unused_parameters=True)
    with wrapped.no_sync():
        step(wrapped, batch(rank, 0))
    step(wrapped, batch(rank, 1))
    for number in range(2):
        step(theirs, batch(rank, number))
    del theirs.unused
    found = gradients(wrapped)
    assert found.pop("unused") is None or not found.get("unused")
    close(found, mean_over_ranks(theirs))


# ---------------------------------------------------------------- FSDP2


def sharded_blocks(rank: int) -> None:
    """``fully_shard`` per block, and around all: the blocks stay fused, parameters are sharded between steps."""
    ours, theirs = networks()
    names = [type(ours.layer1[0]).__name__]
    for layer in (ours.layer1, ours.layer2):
        fully_shard(layer[0])
    fully_shard(ours)
    assert isinstance(ours.layer1[0], fr.Bottleneck) and type(ours.layer1[0]).__name__ == f"FSDP{names[0]}"
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (ours, theirs)]
    for number in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with fr.record_launches() as launches:
            step(ours, batch(rank, number))
        assert any("dgrad" in launch.kernel for launch in launches)
        step(theirs, batch(rank, number))
        close(gradients(ours), mean_over_ranks(theirs))
        for optimizer in optimizers:
            optimizer.step()
    close(
        {n: whole(p.detach()) for n, p in ours.named_parameters()},
        {n: p.detach() for n, p in theirs.named_parameters()},
    )
    close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def sharded_children(rank: int) -> None:
    """A block whose convolutions are sharded one by one calls them, since each gathers its own weight."""
    ours, theirs = (net.layer1[0] for net in networks(1))
    for conv in (ours.conv1, ours.conv2, ours.conv3):
        fully_shard(conv)
    fully_shard(ours)
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    with fr.record_launches() as launches:
        step(ours, x)
    assert not launches
    step(theirs, x)
    close(gradients(ours), mean_over_ranks(theirs))


def sharded_in_float16(rank: int) -> None:
    """Parameters gathered in float16, statistics in float32, as the policy says."""
    ours, theirs = (net.layer1[0].float() for net in networks(1))
    policy = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
    fully_shard(ours, mp_policy=policy)
    x = torch.randn(2, 4, 4, 4)
    with fr.record_launches() as launches:
        out = ours(x)
    assert launches and out.dtype == torch.float16
    out.float().square().mean().backward()
    assert {p.grad.dtype for p in ours.parameters()} == {torch.float32}
    step(theirs, x)
    close(gradients(ours), mean_over_ranks(theirs), rtol=5e-2, atol=5e-3)
    torch.testing.assert_close(ours.bn1.running_var, theirs.bn1.running_var, rtol=1e-2, atol=1e-2)


def resharded(rank: int) -> None:
    """Two forwards before their backwards, kept gathered and not; and evaluation between."""
    for reshard in (True, False):
        ours, theirs = (net.layer1[0] for net in networks(1))
        fully_shard(ours, reshard_after_forward=reshard)
        x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
        for block in (ours, theirs):
            first = block(x).square().mean()
            with torch.no_grad():
                block.eval()(x)
            (first + block.train()(2 * x).square().mean()).backward()
        close(gradients(ours), mean_over_ranks(theirs))


def norms_without_synchronisation(rank: int) -> None:
    """Plain BatchNorm under data parallelism normalises each rank's own batch; rank 0's statistics are everybody's."""
    ours, theirs = networks(1)
    wrapped, plain = DistributedDataParallel(ours), DistributedDataParallel(copy.deepcopy(theirs))
    for number in range(2):
        torch.testing.assert_close(wrapped(batch(rank, number)), plain(batch(rank, number)))
    close(dict(ours.named_buffers()), dict(plain.module.named_buffers()))


# ---------------------------------------------------------------- conversion


def convert(net: nn.Module) -> fr.Report:
    return fr.convert(net)


def shard(net: nn.Module) -> None:
    fully_shard(net[0])
    fully_shard(net)


CONVERSIONS: dict[tuple[Callable[[nn.Module], Any], ...], tuple[str, bool]] = {
    (convert, shard): ("FSDPFusedHome", False),
    (convert, shard, convert): ("FSDPFusedHome", False),
    (convert, shard, fr.revert): ("FSDPFusedHome", True),  # what FSDP made of the class is FSDP's to undo
    (convert, fr.revert, shard): ("FSDPHome", False),
    (fr.revert, convert, shard): ("FSDPFusedHome", False),
    (fr.revert, shard, convert): ("FSDPHome", True),
    (shard, convert): ("FSDPHome", True),
    (shard, fr.revert, convert): ("FSDPHome", True),
    (shard, convert, fr.revert): ("FSDPHome", False),
}
"""What is done to a network, in order; the class that its block then has, and whether the last report keeps it."""


def conversions(rank: int) -> None:
    """``convert``, ``fully_shard`` and ``revert`` in every order: gradients as of the plain network, true reports."""
    for steps, (name, kept) in CONVERSIONS.items():
        torch.manual_seed(0)
        theirs = nn.Sequential(Home(), nn.Flatten()).double()
        ours = copy.deepcopy(theirs)
        report = [action(ours) for action in steps][-1]
        assert type(ours[0]).__name__ == name, (steps, type(ours[0]))
        fused = "Fused" in name
        if report is not None:
            assert bool(report.kept) == kept, report
            assert bool(report.fused_now) == (fused and steps[-1] is convert), report
        x = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        with fr.record_launches() as launches:
            step(ours, x)
        assert bool(launches) == fused
        step(theirs, x)
        close(gradients(ours), mean_over_ranks(theirs))


def converted_under_ddp(rank: int) -> None:
    """``convert`` and ``revert`` before and after ``DistributedDataParallel`` took the network."""
    for early in (True, False):
        torch.manual_seed(0)
        theirs = nn.Sequential(Home(), nn.Flatten()).double()
        ours = copy.deepcopy(theirs)
        if early:
            fr.convert(ours)
        wrapped = DistributedDataParallel(ours)
        if not early:
            fr.convert(wrapped)
        x = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        for fused in (True, False):
            ours.zero_grad()
            theirs.zero_grad()
            with fr.record_launches() as launches:
                step(wrapped, x)
            assert bool(launches) == fused
            step(theirs, x)
            close(gradients(ours), mean_over_ranks(theirs))
            fr.revert(wrapped)


CASES: dict[str, Callable[[int], None]] = {
    case.__name__: case
    for case in (
        ddp,
        ddp_accumulation,
        sharded_blocks,
        sharded_children,
        sharded_in_float16,
        resharded,
        norms_without_synchronisation,
        conversions,
        converted_under_ddp,
    )
} | SYNC_CASES


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    failures = {}
    for name, case in CASES.items():
        try:
            torch.manual_seed(rank)
            case(rank)
        except Exception:
            failures[name] = traceback.format_exc()
        report = {"done": list(CASES)[: list(CASES).index(name) + 1], "failures": failures}
        (folder / f"rank{rank}.json").write_text(json.dumps(report))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
