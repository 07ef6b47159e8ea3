"""SyncBatchNorm, of what two_ranks.py does in two processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fused_resnet as fr
from fused_resnet import functional, reference
from fused_resnet.autograd import gram as gram_route
from fused_resnet.autograd import layer as layers_of
from fused_resnet.launch import collective
from tests import frightening
from tests.features.sync_case import RANKS, Add, block, check, gathers, images, layer, pair, projected, shared
from tests.whole_block import identity_block, projected_block

# ---------------------------------------------------------------- whole blocks


def staged(rank: int) -> None:
    for make, channels in ((block, 16), (projected, 8)):
        check(rank, *pair(make), images(channels), route="staged")


def gram(rank: int) -> None:
    """The last convolution's output exists nowhere; a projection's neither, or one does."""
    for make, channels in ((block, 16), (projected, 8), (lambda: projected(channels=32), 32)):
        kernels = check(rank, *pair(make), images(channels), route="gram")
        assert kernels.count("gram_finalize_kernel") == (2 if channels == 8 else 1)


def basic_blocks(rank: int) -> None:
    for make, channels in ((block, 16), (projected, 8)):
        check(rank, *pair(lambda make=make: make(reference.BasicBlock)), images(channels))


def routes_that_differ(rank: int) -> None:
    """Plans follow the batch: a rank may take another route than the next one, and still they talk in one order."""
    for channels in (8, 32):
        ours, theirs = pair(lambda channels=channels: projected(channels=channels))
        check(rank, ours, theirs, images(channels), route=("staged", "gram")[rank])


def plain_pytorch(rank: int) -> None:
    """Where no kernel can run the same is composed of PyTorch's own functions."""
    check(rank, *pair(projected), images(8), route="reference", collectives=(0, 0))
    check(rank, *pair(Add), images(5), route="reference", collectives=(0, 0))
    batches = images(8)
    found = []
    for net, x in zip(pair(projected), (batches[rank], torch.cat(batches)), strict=True):
        x.requires_grad_()
        with fr.use_route("reference"):
            (first,) = torch.autograd.grad(net(x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(found[0], found[1].split([3, 1])[rank])


def memory_options(rank: int) -> None:
    for route in ("staged", "gram"):
        ours, theirs = pair(projected)
        ours.recompute, ours.keep = ("y1",), ("a1",)
        check(rank, ours, theirs, images(8), route=route)


# ---------------------------------------------------------------- what a norm may be set to


def settings(rank: int) -> None:
    """A cumulative average, no running statistics, no parameters, a single value per rank and channel."""
    for step in range(2):
        ours, theirs = pair(block)
        for net in (ours, theirs):
            for name in ("bn1", "bn2", "bn3"):
                norm = getattr(net, name)
                norm.momentum = None
                norm.num_batches_tracked += 3 * step
        check(rank, ours, theirs, images(16), route=("staged", "gram")[step])

    for net in (nets := layer("ConvBNReLU", 6, 9, 3)):
        net.bn = type(net.bn)(9, affine=False, track_running_stats=False)
    check(rank, *nets, images(6))
    check(rank, *layer("ConvBNReLU", 6, 9, 1), images(6, (1, 1), size=1))


def evaluation(rank: int) -> None:
    """Nobody is asked; and where one norm of a block is frozen, the others still ask."""
    for make in (block, projected):
        ours, theirs = pair(make)
        check(rank, ours.eval(), theirs.eval(), images(16 if make is block else 8), collectives=(0, 0))
    ours, theirs = pair(projected)
    for net in (ours, theirs):
        net.bn2.eval()
    check(rank, ours, theirs, images(8), collectives=(3, 3))


def frozen_parts(rank: int) -> None:
    """Nobody asks for sums of which no gradient is made, as PyTorch does."""
    for route in ("staged", "gram"):
        expected = {"conv": (3, 2), "bn": (3, 3), "conv1": (3, 2), "bn1": (3, 3), "": (3, 0)}
        for frozen, collectives in expected.items():
            ours, theirs = pair(block)
            for net in (ours, theirs):
                for name, p in net.named_parameters():
                    p.requires_grad_(not name.startswith(frozen))
            if frozen == "":
                for net in (ours, theirs):
                    net.bn3.requires_grad_(True)
            check(rank, ours, theirs, images(16), needs_x=False, route=route, collectives=collectives)
        ours, theirs = pair(projected)
        for net in (ours, theirs):
            net.requires_grad_(False)
        check(rank, ours, theirs, images(8), route=route)


def groups(rank: int) -> None:
    """A group of its own for the norms, or none but oneself: then it is BatchNorm."""
    everybody = dist.new_group([0, 1])
    alone = [dist.new_group([r]) for r in range(RANKS)][rank]
    ours, theirs = pair(block)
    assert functional.batch_norm_of(ours.bn1).group == dist.group.WORLD.group_name
    for norm in (ours.bn1, ours.bn2, ours.bn3):
        norm.process_group = everybody
    assert functional.batch_norm_of(ours.bn1).group == everybody.group_name
    check(rank, ours, theirs, images(16))
    ours, theirs = pair(block)
    ours.bn1.process_group = ours.bn3.process_group = everybody  # bn2 stays with the world: layers of two groups
    check(rank, ours, theirs, images(16))
    assert fr.revert(ours).converted and fr.convert(ours).fused_now, "tried on a copy, which the group is not part of"
    assert fr.fold(ours).bn1.__class__ is nn.Identity
    ours, theirs = pair(block)
    for norm in (ours.bn1, ours.bn2, ours.bn3):
        norm.process_group = alone
    x = images(16)[rank]
    with fr.record_launches() as launches:
        out = ours(x)
    assert launches and not gathers(launches)
    torch.testing.assert_close(out, theirs(x))


def single_layers(rank: int) -> None:
    check(rank, *layer("ConvBNReLU", 6, 9, 3), images(6))
    check(rank, *layer("Stem", 3, 8), images(3, size=18))
    check(rank, *pair(Add), images(5))


# ---------------------------------------------------------------- the rule, in dtypes that round


def numerics_rule(rank: int) -> None:
    for dtype in (torch.float16, torch.float32):
        for make in (identity_block, projected_block):
            for route in ("staged", "gram"):
                shared(rank, make(dtype)).check(route)


def means_that_differ(rank: int) -> None:
    """Gradients and activations far from zero, each rank's on another side."""
    for dtype in (torch.float16, torch.float32):
        for make in (frightening.mean_30, frightening.far(64)):
            whole = make(dtype)
            whole.dout[:2] *= -1
            shared(rank, whole).check("gram")


# ---------------------------------------------------------------- planted bugs


@contextmanager
def nobody_asked(backward: bool) -> Iterator[None]:
    """Each rank's own sums stand for those of all, in one direction."""

    def gather(packed: Tensor, group: str) -> Tensor:
        gathered = collective.all_gather(packed, group)
        is_backward = torch._C._current_autograd_node() is not None
        return packed.expand(RANKS, -1).contiguous() if is_backward == backward else gathered

    for module in (layers_of, gram_route):
        module.all_gather = gather
    try:
        yield
    finally:
        for module in (layers_of, gram_route):
            module.all_gather = collective.all_gather


def planted_bugs(rank: int) -> None:
    for backward in (False, True):
        for route in ("staged", "gram"):
            with nobody_asked(backward):
                try:
                    check(rank, *pair(projected), images(8), route=route)
                except AssertionError:
                    continue
            raise AssertionError(f"local statistics survive: backward={backward}, {route}")


# ---------------------------------------------------------------- PyTorch's tools around


def under_ddp(rank: int) -> None:
    """Gradients are averaged. The norms are converted inside, since DDP lets none in that runs on a CPU."""
    for early in (True, False):
        torch.manual_seed(0)
        theirs = nn.Sequential(projected(), nn.Flatten()).double()
        ours = copy.deepcopy(theirs)
        wrapped = DistributedDataParallel(ours)
        if early:
            fr.convert(ours)
        nn.SyncBatchNorm.convert_sync_batchnorm(ours)
        modules = dict(ours.named_modules())
        if not early:
            fr.convert(ours)
        batches = images(8, (2, 2))
        for _ in range(2):
            ours.zero_grad()
            theirs.zero_grad()
            with fr.record_launches() as launches:
                wrapped(batches[rank]).square().mean().backward()
            assert gathers(launches) == 8
            theirs(torch.cat(batches)).square().mean().backward()
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
        for b, c in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(b, c)
        fr.revert(ours)
        assert all(module is modules[name] for name, module in ours.named_modules())
        assert type(ours[0]) is reference.Bottleneck and type(ours[0].bn1) is nn.SyncBatchNorm


def nothing_on_one_rank(rank: int) -> None:
    """A rank without images takes part in what the others ask, in their order, whichever layers are frozen."""
    sizes = (0, 2)
    for make, channels in ((block, 16), (projected, 8)):
        for frozen, needs_x in ((), True), ((), False), (("conv1", "bn1", "conv2"), False), (("downsample",), False):
            ours, theirs = pair(make)
            for net in (ours, theirs):
                for name, p in net.named_parameters():
                    p.requires_grad_(not name.startswith(frozen))
            below = 1 if "conv1" in frozen else 3
            norms = len([m for m in ours.modules() if isinstance(m, nn.SyncBatchNorm)])
            count = norms - 3 + below - ("downsample" in frozen and make is projected)
            check(rank, ours, theirs, images(channels, sizes), needs_x=needs_x, collectives=(norms, count))
    check(rank, *layer("ConvBNReLU", 6, 9, 3), images(6, sizes))
    check(rank, *layer("Stem", 3, 8), images(3, sizes, size=18))
    check(rank, *pair(Add), images(5, sizes))
    check(rank, *pair(projected), images(8, sizes), route="reference", collectives=(0, 0))


def compiled(rank: int) -> None:
    """One graph: the operators are opaque, and the group is a name in their plan. Plain PyTorch is traced, as it is."""
    for route, collectives in (("auto", None), ("reference", (0, 0))):
        torch.compiler.reset()
        ours, theirs = pair(projected)
        network = torch.compile(ours, fullgraph=route == "auto", backend="aot_eager")
        check(rank, network, theirs, images(8), route=route, collectives=collectives)


def explained(rank: int) -> None:
    """``explain`` counts what a step launches, collectives too, and asks nobody, nor does a norm called alone."""
    ours, _ = pair(lambda: nn.Sequential(projected(), nn.BatchNorm2d(16), nn.Flatten()))
    with fr.record_launches() as told:
        explanation = fr.explain(ours, example_input=images(8)[rank], dtype=torch.float64, optimizer=None)
    assert not told
    with fr.record_launches() as launches:
        ours[0](images(8)[rank]).sum().backward()
    row = next(row for row in explanation.rows if row.source == "fused")
    assert (row.launches, gathers(launches)) == (len(launches), 8)
    assert row.bytes == sum(launch.bytes for launch in launches)


SYNC_CASES: dict[str, Callable[[int], None]] = {
    f"synchronised: {case.__name__}": case
    for case in (
        staged,
        gram,
        basic_blocks,
        routes_that_differ,
        plain_pytorch,
        memory_options,
        settings,
        evaluation,
        frozen_parts,
        groups,
        single_layers,
        numerics_rule,
        means_that_differ,
        planted_bugs,
        under_ddp,
        nothing_on_one_rank,
        compiled,
        explained,
    )
}
