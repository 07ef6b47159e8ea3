"""The BatchNorm contract that a drop-in keeps: ConvBNReLU and BNAddReLU beside nn.Conv2d and nn.BatchNorm2d.

Every test drives modules, ours and PyTorch's, through the same life and compares all that can be seen from outside.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fused_resnet as fr
from tests.conftest import INTERPRETED

quick = pytest.mark.quick
pytestmark = [quick, pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter")]

C = 5


class PlainConv(nn.Module):
    """What ConvBNReLU must equal."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, C, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class PlainNorm(nn.BatchNorm2d):
    """What BNAddReLU must equal, without a residual."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "conv": (lambda: fr.ConvBNReLU(3, C, 3), PlainConv),
    "norm": (lambda: fr.BNAddReLU(3), lambda: PlainNorm(3)),
}


def norm_of(module: nn.Module) -> nn.BatchNorm2d:
    return module if isinstance(module, nn.BatchNorm2d) else module.bn


class Life:
    """Ours and PyTorch's module with the same state, and the same inputs for both."""

    def __init__(self, kind: str, edit: Callable[[nn.BatchNorm2d], object] = lambda bn: None) -> None:
        self.ours, self.theirs = (make().double() for make in KINDS[kind])
        for t in (*self.theirs.parameters(), *(b for b in self.theirs.buffers() if b.is_floating_point())):
            t.data += 0.2 * torch.rand_like(t)
        self.ours.load_state_dict(self.theirs.state_dict())
        for module in (self.ours, self.theirs):
            edit(norm_of(module))

    def both(self, action: Callable[[nn.Module], Any]) -> tuple[Any, Any]:
        return action(self.ours), action(self.theirs)

    def step(self, *shape: int, fused: bool = True) -> None:
        """A forward and, where something wants a gradient, a backward; then everything is compared."""
        x = torch.randn(shape or (3, 3, 4, 5), dtype=torch.float64)
        seen = []
        for module in (self.ours, self.theirs):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            with fr.record_launches() as launches:
                out = module(leaf)
            assert bool(launches) == (fused and module is self.ours)
            out.backward(torch.ones_like(out) + out.detach())
            seen.append({"out": out, "dx": leaf.grad, **{n: p.grad for n, p in module.named_parameters()}})
        for name, value in seen[1].items():
            assert (seen[0][name] is None) == (value is None), name
            if value is not None:
                torch.testing.assert_close(seen[0][name], value, msg=lambda m, n=name: f"{n}: {m}")
        assert self.ours.state_dict().keys() == self.theirs.state_dict().keys()
        torch.testing.assert_close(dict(self.ours.state_dict()), dict(self.theirs.state_dict()))


both_kinds = pytest.mark.parametrize("kind", KINDS)


@both_kinds
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, -0.5, None])
def test_momentum_over_several_batches(kind: str, momentum: float | None) -> None:
    life = Life(kind, lambda bn: setattr(bn, "momentum", momentum))
    for n in (3, 2, 4):
        life.step(n, 3, 4, 5)
    life.both(lambda m: m.eval())
    life.step()


@both_kinds
def test_unbiased_variance_is_stored_and_the_biased_one_normalises(kind: str) -> None:
    life = Life(kind, lambda bn: setattr(bn, "momentum", 1.0))
    life.step(1, 3, 1, 2)  # two values per channel: the factor is 2
    life.step(2, 3, 1, 1)


@both_kinds
def test_momentum_and_eps_are_read_at_call_time(kind: str) -> None:
    life = Life(kind)
    for momentum, eps in ((0.1, 1e-5), (0.7, 1e-1), (None, 1e-3)):
        life.both(lambda m, momentum=momentum, eps=eps: norm_of(m).__dict__.update(momentum=momentum, eps=eps))
        life.step()


def freeze(name: str) -> Callable[[nn.BatchNorm2d], object]:
    return lambda bn: getattr(bn, name).requires_grad_(False)


def untracked(bn: nn.BatchNorm2d) -> None:
    bn.__init__(bn.num_features, track_running_stats=False, dtype=torch.float64)  # type: ignore[misc]


def plain(bn: nn.BatchNorm2d) -> None:
    bn.__init__(bn.num_features, affine=False, dtype=torch.float64)  # type: ignore[misc]


EDITS: dict[str, Callable[[nn.BatchNorm2d], object]] = {
    "track_running_stats False": untracked,
    "tracking switched off later": lambda bn: setattr(bn, "track_running_stats", False),
    "affine False": plain,
    "weight without bias": lambda bn: setattr(bn, "bias", None),
    "frozen weight": freeze("weight"),
    "frozen bias": freeze("bias"),
    "frozen parameters": lambda bn: bn.requires_grad_(False),
    "no counter": lambda bn: setattr(bn, "num_batches_tracked", None),
}


@both_kinds
@pytest.mark.parametrize("edit", EDITS)
def test_variants_in_both_modes(kind: str, edit: str) -> None:
    life = Life(kind, EDITS[edit])
    life.step()
    life.both(lambda m: m.eval())
    life.step()
    life.both(lambda m: m.train())
    life.step()


@both_kinds
@pytest.mark.parametrize("wanted", ["nothing", "x", "everything"])
def test_gradients_on_subsets(kind: str, wanted: str) -> None:
    life = Life(kind)
    life.both(lambda m: m.requires_grad_(wanted == "everything"))
    if wanted != "nothing":
        life.step()
        return
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    outs = life.both(lambda m: m(x))
    torch.testing.assert_close(*outs)
    assert not outs[0].requires_grad and outs[0].is_leaf
    torch.testing.assert_close(*life.both(lambda m: dict(m.state_dict())))


@both_kinds
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode(kind: str, context: Any) -> None:
    life, x = Life(kind), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for training in (True, False):
        life.both(lambda m, training=training: m.train(training))
        with context():
            outs = life.both(lambda m: m(x))
        torch.testing.assert_close(*outs)
        assert outs[0].is_inference() == outs[1].is_inference() and not outs[0].requires_grad
    torch.testing.assert_close(*life.both(lambda m: dict(m.state_dict())))
    life.step()


@both_kinds
def test_one_value_per_channel(kind: str) -> None:
    life = Life(kind)
    before = copy.deepcopy(life.ours.state_dict())
    messages = []
    for module in (life.ours, life.theirs):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as error:
            module(torch.randn(1, 3, 1, 1, dtype=torch.float64))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert all(torch.equal(v, before[k]) for k, v in life.ours.state_dict().items())
    norm_of(life.theirs).num_batches_tracked.zero_()  # PyTorch counts the batch that it then refuses
    life.both(lambda m: m.eval())
    life.step(1, 3, 1, 1)


@both_kinds
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (2, 3, 4, 4, 4)])
def test_rank(kind: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"expected 4D input \\(got {len(shape)}D input\\)"):
        Life(kind).ours(torch.zeros(shape, dtype=torch.float64))


@both_kinds
def test_integer_input(kind: str) -> None:
    life = Life(kind)
    with pytest.raises(TypeError, match="int64"):
        life.ours(torch.ones(2, 3, 4, 4, dtype=torch.int64))
    assert norm_of(life.ours).num_batches_tracked == 0


@both_kinds
@pytest.mark.filterwarnings("ignore:fused_resnet runs plain")
def test_empty_batch(kind: str) -> None:
    life = Life(kind)
    life.step(0, 3, 4, 5, fused=False)
    assert norm_of(life.ours).num_batches_tracked == 1
    assert all(not p.grad.any() for p in life.ours.parameters())
    life.both(lambda m: m.eval())
    life.step(0, 3, 4, 5, fused=False)


@both_kinds
def test_half_precision_keeps_float32_parameters(kind: str) -> None:
    life = Life(kind)
    life.both(lambda m: m.half())
    for module in (life.ours, life.theirs):
        norm_of(module).float()
        x = torch.randn(2, 3, 4, 4).half().requires_grad_()
        out = module(x)
        out.float().square().sum().backward()
        assert out.dtype == x.grad.dtype == torch.float16
        assert norm_of(module).weight.grad.dtype == norm_of(module).running_mean.dtype == torch.float32


@both_kinds
def test_autocast_updates_the_statistics(kind: str) -> None:
    life, x = Life(kind), torch.randn(4, 3, 5, 5)
    life.both(lambda m: m.float())
    states = []
    for module in (life.ours, life.theirs):
        before = norm_of(module).running_mean.clone()
        with torch.autocast("cpu", dtype=torch.float16):
            out = module(x)
        out.float().square().sum().backward()
        assert not torch.equal(norm_of(module).running_mean, before)
        assert {p.grad.dtype for p in module.parameters()} == {p.dtype for p in module.parameters()} == {torch.float32}
        states.append(dict(module.state_dict()))
    torch.testing.assert_close(*states, rtol=1e-2, atol=1e-2)


@both_kinds
@pytest.mark.parametrize("hook", ["forward", "pruning", "parametrisation"])
def test_watched_children(kind: str, hook: str) -> None:
    """A child that is watched is called; BNAddReLU is its own child, and keeps its own hooks' meaning."""
    life = Life(kind)

    def watch(module: nn.Module) -> None:
        target = norm_of(module) if kind == "norm" else module.conv
        torch.manual_seed(1)
        if hook == "forward":
            target.register_forward_hook(lambda m, i, out: out * 2)
        elif hook == "pruning":
            prune.random_unstructured(target, "weight", amount=0.4)
        else:
            parametrize.register_parametrization(target, "weight", nn.Tanh())

    life.both(watch)
    life.step(fused=kind == "norm")
    life.both(lambda m: m.eval())
    life.step(fused=kind == "norm")


@both_kinds
def test_deepcopy_pickle_and_checkpoints(kind: str) -> None:
    life = Life(kind)
    life.step()
    life.ours = copy.deepcopy(life.ours)
    life.step()
    life.ours = pickle.loads(pickle.dumps(life.ours))
    life.step()
    buffer = io.BytesIO()
    torch.save(life.theirs.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fresh = KINDS[kind][0]().double()
    fresh.load_state_dict(state)
    life.ours = fresh
    life.step()
    old = life.theirs.state_dict()
    for key in [k for k in old if k.endswith("num_batches_tracked")]:
        del old[key]
    for metadata in old._metadata.values():
        metadata["version"] = 1
    life.ours.load_state_dict(old)


def test_sync_batch_norm_conversion() -> None:
    module = nn.SyncBatchNorm.convert_sync_batchnorm(fr.ConvBNReLU(3, C, 3).double())
    assert type(module.bn) is nn.SyncBatchNorm
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(module.eval()(x), F.relu(module.bn(module.conv(x))))


@both_kinds
def test_a_step_changes_weights_between_forward_and_backward(kind: str) -> None:
    life = Life(kind)
    for module in (life.ours, life.theirs):
        loss = module(torch.randn(2, 3, 4, 4, dtype=torch.float64)).square().sum()
        with torch.no_grad():
            norm_of(module).weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@both_kinds
def test_zero_variance_and_large_means(kind: str) -> None:
    life = Life(kind)
    x = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    x[:, 1] = 1e8 + torch.arange(32).view(2, 4, 4) / 64
    outs = life.both(lambda m: m(x))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*life.both(lambda m: dict(m.state_dict())))
