"""What training code does around a model: averaged weights, accumulated gradients, calls with other parameters."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import fused_resnet as fr
from fused_resnet import reference
from tests.conftest import INTERPRETED
from tests.eager import agree
from tests.modules.test_blocks import projection, twins

pytestmark = [pytest.mark.quick, pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter")]


def networks() -> list[nn.Module]:
    nets = [family.ResNet(family.BasicBlock, [1], width=4, num_classes=3).double() for family in (fr, reference)]
    nets[0].load_state_dict(nets[1].state_dict())
    return nets


def images(step: int = 0, n: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 3, 12, 12, generator=generator, dtype=torch.float64)


def state(net: nn.Module) -> dict[str, Tensor | None]:
    return {**dict(net.state_dict()), **{f"d{n}": p.grad for n, p in net.named_parameters()}}


def same(run: Callable[[nn.Module], Any]) -> list[Any]:
    """``run`` on both networks; whatever is in them afterwards, and what was returned, agrees."""
    nets, results = networks(), []
    for net in nets:
        with fr.record_launches() as launches:
            results.append(run(net))
        assert bool(launches) == (net is nets[0])
    agree(*map(state, nets))
    torch.testing.assert_close(*results)
    return results


def test_gradients_accumulate_over_batches() -> None:
    """Into gradients that are there, in place; the statistics take every batch."""

    def run(net: nn.Module) -> bool:
        kept = None
        for step in range(3):
            (net(images(step)).square().mean() / 3).backward()
            grad = net.layer1[0].conv1.weight.grad
            assert kept is None or grad is kept, "accumulated in place"
            kept = grad
        assert net.bn1.num_batches_tracked == 3
        return True

    same(run)


def test_gradients_of_a_shared_block_accumulate_within_one_backward() -> None:
    """A block called twice: two operations, one set of parameters, two updates of its statistics."""
    ours, theirs = twins(lambda family: family.Bottleneck(12, 3))
    x, found = torch.randn(2, 12, 4, 4, dtype=torch.float64), []
    for block in (ours, theirs):
        leaf = x.clone().requires_grad_()
        block(block(leaf)).square().sum().backward()
        found.append({"dx": leaf.grad, **state(block)})
    agree(*found)
    assert ours.bn1.num_batches_tracked == 2


def test_parameters_shared_between_blocks() -> None:
    blocks = [[family.BasicBlock(4, 4).double() for _ in range(2)] for family in (fr, reference)]
    for mine, theirs in zip(*blocks, strict=True):
        mine.load_state_dict(theirs.state_dict())
    found = []
    for first, second in blocks:
        second.conv1.weight = first.conv1.weight
        second.bn2 = first.bn1
        net = nn.Sequential(first, second)
        net(images()[:, :1].expand(-1, 4, -1, -1)).square().sum().backward()
        found.append(state(net))
    agree(*found)


def test_clipped_gradients_and_hooks_on_parameters() -> None:
    def run(net: nn.Module) -> list[Tensor]:
        seen: list[Tensor] = []
        conv, bn = net.layer1[0].conv2, net.layer1[0].bn2
        conv.weight.register_hook(lambda g: g * 2)
        bn.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        net(images()).square().sum().backward()
        return [*seen, nn.utils.clip_grad_norm_(net.parameters(), 0.1)]

    same(run)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "foreach", "gradient descent in backward"])
def test_optimizers(optimizer: str) -> None:
    """Steps in place, by one launch for all, and inside of backward as soon as a gradient is there."""

    def run(net: nn.Module) -> Tensor:
        kind: Any = torch.optim.AdamW if optimizer == "AdamW" else torch.optim.SGD
        options: dict[str, Any] = {"lr": 0.01, "foreach": optimizer == "foreach"}
        if optimizer.endswith("in backward"):
            for p in net.parameters():
                each = kind([p], **options)

                def step_now(p: Tensor, each: Any = each) -> None:
                    each.step()
                    each.zero_grad()

                p.register_post_accumulate_grad_hook(step_now)
            for step in range(2):
                net(images(step)).square().mean().backward()
        else:
            whole = kind(net.parameters(), **options)
            for step in range(2):
                whole.zero_grad()
                net(images(step)).square().mean().backward()
                whole.step()
        return net(images(9)).detach()

    if optimizer == "AdamW":  # a first step of Adam is a sign: gradients that are nothing but noise give either
        nets = networks()
        outs = [run(net) for net in nets]
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    else:
        same(run)


@pytest.mark.parametrize("buffers", [True, False], ids=["buffers", "parameters only"])
def test_averaged_models(buffers: bool) -> None:
    """EMA by AveragedModel, which deep-copies, and ``update_bn``, which resets statistics and sets momentum None."""

    def run(net: nn.Module) -> list[Tensor]:
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=buffers)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            net(images(step)).square().mean().backward()
            optimizer.step()
            average.update_parameters(net)
        bn = average.module.layer1[0].bn1
        if not buffers:
            bn.running_mean.fill_(99.0)
            update_bn([images(5), images(6)], average)
            assert bn.momentum == 0.1 and bn.num_batches_tracked == 2
        with torch.no_grad():
            evaluated = average.eval()(images(7))
        return [evaluated, *(t.clone() for t in average.state_dict().values())]

    same(run)


def test_updating_bn_alone_is_the_mean_of_the_batches() -> None:
    """``update_bn`` over ours is what the definition says: the average of each batch's own statistics."""
    net = fr.ConvBNReLU(3, 4, 3).double()
    batches = [images(step) for step in range(3)]
    update_bn(batches, net)
    ys = [net.conv(x) for x in batches]
    torch.testing.assert_close(net.bn.running_mean, torch.stack([y.mean((0, 2, 3)) for y in ys]).mean(0))
    torch.testing.assert_close(net.bn.running_var, torch.stack([y.var((0, 2, 3)) for y in ys]).mean(0))


@pytest.mark.parametrize("tied", [True, False])
def test_functional_calls_of_a_network(tied: bool) -> None:
    """With other parameters and buffers, which alone are touched; gradients reach them."""
    found = []
    for net in networks():
        torch.manual_seed(1)
        other = {n: torch.rand_like(p).requires_grad_() for n, p in net.named_parameters()}
        buffers = {n: b.clone() for n, b in net.named_buffers()}
        if tied:
            other["layer1.0.conv2.weight"] = other["layer1.0.conv1.weight"]
        before = copy.deepcopy(net.state_dict())
        with fr.record_launches() as launches:
            out = torch.func.functional_call(net, (other, buffers), (images(),))
        assert bool(launches) == isinstance(net, fr.ResNet)
        out.square().sum().backward()
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert buffers["bn1.num_batches_tracked"] == 1 and all(p.grad is None for p in net.parameters())
        found.append({"out": out, **{n: t.grad for n, t in other.items()}, **buffers})
    agree(*found)


@pytest.mark.parametrize("transform", ["grad of grad", "jvp"])
def test_transforms_that_the_operations_have_no_rule_for_run_plain(transform: str) -> None:
    """Never a wrong number: under torch.func second derivatives and forward mode are plain PyTorch's."""
    results = []
    for block in twins(lambda family: family.BasicBlock(4, 4)):
        block.eval()  # in training PyTorch's own BatchNorm cannot count batches under a transform
        x = torch.linspace(-1, 1, 200, dtype=torch.float64).view(2, 4, 5, 5).sin()

        def loss(x: Tensor, block: nn.Module = block) -> Tensor:
            return block(x).square().sum()

        with fr.record_launches() as launches:
            if transform == "jvp":
                value, tangent = torch.func.jvp(loss, (x,), (x.cos(),))
                results.append({"value": value, "tangent": tangent})
            else:
                results.append({"second": torch.func.grad(lambda x, f=loss: torch.func.grad(f)(x).square().sum())(x)})
        assert not launches
    agree(*results)


def test_batches_of_batches_are_refused_as_eager_refuses_them() -> None:
    """``vmap`` over batch statistics, which each sample would update."""
    for block in twins(lambda family: family.BasicBlock(4, 4)):
        with pytest.raises(RuntimeError):
            torch.func.vmap(block)(torch.randn(2, 2, 4, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize("create_graph", [True, False])
def test_a_second_derivative_through_a_block_raises(create_graph: bool) -> None:
    """By ``autograd.grad`` and by ``backward``, as a gradient penalty does it; a first one with a graph works."""
    block = fr.Bottleneck(8, 2, 1, projection(8, 8)).double()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = block(x).square().sum()
    inputs = [x, block.conv1.weight, block.bn2.weight, block.downsample[1].bias]
    grads = torch.autograd.grad(loss, inputs, create_graph=create_graph)
    for grad in grads if create_graph else ():
        penalty = grad.square().sum()
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(penalty, x, retain_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            penalty.backward(retain_graph=True)
    assert all(grad.requires_grad == create_graph for grad in grads)
    with fr.use_route("reference"):
        (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad is not None and x.grad.any()


@pytest.mark.parametrize("frozen", ["weights", "norms", "modes", "stem"])
def test_explaining_leaves_everything_and_honours_what_is_frozen(frozen: str) -> None:
    """Buffers, modes, versions and gradients as they were; what is frozen costs no gradient."""
    net = fr.ResNet(fr.Bottleneck, [1, 1], width=8, num_classes=3)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    whole = fr.explain(net, (4, 3, 32, 32), target="h100")
    parts: dict[str, Callable[[], object]] = {
        "weights": lambda: [m.requires_grad_(False) for m in net.modules() if isinstance(m, nn.Conv2d)],
        "norms": lambda: [m.requires_grad_(False) for m in net.modules() if isinstance(m, nn.BatchNorm2d)],
        "modes": lambda: [m.eval() for m in net.modules() if isinstance(m, nn.BatchNorm2d)],
        "stem": lambda: [p.requires_grad_(n.startswith(("layer2", "fc"))) for n, p in net.named_parameters()],
    }
    parts[frozen]()

    def picture() -> list[Any]:
        tensors = [*net.parameters(), *net.buffers()]
        grads = [p.grad for p in net.parameters()]
        return [
            [(id(t), t._version, t.requires_grad, t.data_ptr()) for t in tensors],
            [None if g is None else (id(g), g._version, g.sum().item()) for g in grads],
            [(m.training, list(vars(m))) for m in net.modules()],
            torch.get_rng_state().sum().item(),
        ]

    before, values = picture(), copy.deepcopy(net.state_dict())
    explained = fr.explain(net, (4, 3, 32, 32), target="h100")
    assert picture() == before
    assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())
    if frozen == "norms":
        assert explained.launches <= whole.launches
    else:
        assert explained.bytes < whole.bytes and explained.launches < whole.launches
    if frozen in ("weights", "stem"):
        assert explained.flops < whole.flops


@pytest.mark.parametrize("route", ["staged", "gram"])
@pytest.mark.parametrize("sizes", [(12, 12), (1, 1)], ids=str)
def test_hooks_that_give_back_what_was_saved_in_other_memory(sizes: tuple[int, int], route: str) -> None:
    """As ``save_on_cpu`` with pinned memory does: the values, in NCHW."""
    net = nn.Sequential(fr.Bottleneck(8, 2, 1, projection(8, 8)), fr.BasicBlock(8, 8), fr.BNAddReLU(8)).double()
    if sizes[0] > 1:
        net.insert(0, fr.Stem(3, 8).double())
    x, found = torch.randn(9, 3 if sizes[0] > 1 else 8, *sizes, dtype=torch.float64), []
    copies = torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone().contiguous(), lambda t: t)
    for context in (contextlib.nullcontext(), copies):
        net.zero_grad()
        leaf = x.clone().requires_grad_()
        with context, fr.use_route(route):
            net(leaf).square().sum().backward()
        found.append([leaf.grad, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(*found)


def test_a_batch_of_gradients_is_refused_with_the_cure() -> None:
    block = fr.BasicBlock(4, 4).double().eval()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    grads = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"one gradient at a time.*use_route"):
        torch.autograd.grad(block(x), x, grads, is_grads_batched=True)
    with fr.use_route("reference"):
        (found,) = torch.autograd.grad(block(x), x, grads, is_grads_batched=True)
    for grad, expected in zip(found, grads, strict=True):
        torch.testing.assert_close(grad, torch.autograd.grad(block(x), x, expected)[0])
