"""The operators as PyTorch sees them: their schemas, fakes beside real runs for every route and option, and export."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import fused_resnet as fr
from fused_resnet import functional
from tests.conftest import INTERPRETED
from tests.eager import editing, formed, masks_on_load, mixing, norm, pair, paired, projects_staged, stores_a

quick = pytest.mark.quick
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter")


class Calls(TorchDispatchMode):
    """Keeps every call of an operator of ours, and what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...], tuple[Tensor, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        ours = func.namespace == "fused_resnet"
        given = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, args) if ours else ()
        out = func(*args, **(kwargs or {}))
        if ours:
            self.seen.append((func, given, out))
        return out


def alike(real: tuple[Tensor, ...], fake: tuple[Tensor, ...], what: str) -> None:
    assert len(real) == len(fake), what
    for i, (a, b) in enumerate(zip(real, fake, strict=True)):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), f"{what}: output {i}"


def check_fakes(calls: Calls, names: set[str]) -> None:
    """Number, shape, strides and dtype of a fake are those of the real run; no output is another or an input."""
    assert {func._opname for func, _, _ in calls.seen} == names
    for func, args, out in calls.seen:
        mode = FakeTensorMode(allow_non_fake_inputs=False)
        with mode:
            fakes = tree_map(lambda t, mode=mode: mode.from_tensor(t) if isinstance(t, Tensor) else t, args)
            alike(out, func(*fakes), func._opname)
        inputs = {t.untyped_storage()._cdata for t in tree_flatten(args)[0] if isinstance(t, Tensor)}
        storages = [t.untyped_storage()._cdata for t in out if t.numel()]
        assert len(set(storages)) == len(storages) and not inputs & set(storages), func._opname


def layers(widths: tuple[int, ...], training: bool, **options: Any) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    kernels = {3: (1, 3, 1), 2: (3, 3)}[len(widths) - 1]
    return [
        pair(ci, co, kernel, padding=kernel // 2, training=training, **options)
        for ci, co, kernel in zip(widths, widths[1:], kernels, strict=False)
    ]


def run(
    widths: tuple[int, ...], shortcut: str, training: bool, backward: bool, route: str, n: int = 2, **options: Any
) -> Calls:
    """One block of the functional interface, forward and perhaps backward, and the operators that it called."""
    memory = {name: options.pop(name) for name in ("recompute", "keep") if name in options}
    pairs = [(functional.conv_of(c), functional.batch_norm_of(b)) for c, b in layers(widths, training, **options)]
    c, b = pair(widths[0], widths[-1], 1, training=training, **options)
    projection = (functional.conv_of(c), functional.batch_norm_of(b)) if shortcut == "projection" else None
    x = torch.randn(n, widths[0], 5, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    residual = torch.randn(n, widths[-1], 5, 4, dtype=torch.float64) if shortcut == "given" else None
    operation = functional.bottleneck if len(pairs) == 3 else functional.basic_block
    with Calls() as calls, torch.set_grad_enabled(backward):
        leaves = [t.requires_grad_(backward) for t in (x, residual) if t is not None]
        out = operation(x, pairs, projection, residual=residual, **memory, route=route)
        if backward:
            torch.autograd.grad(out.square().sum(), leaves)
            out = operation(x, pairs, projection, residual=residual, **memory, route=route)
            out.sum().backward()
    return calls


FORWARD, BOTH = {"chain_forward"}, {"chain_forward", "chain_backward"}
SHORTCUTS = {"identity": (4, 3, 3, 4), "projection": (4, 3, 3, 6), "given": (4, 3, 3, 6)}


@quick
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}], ids=["", "plain", "cumulative"])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("route", ["staged", "gram", "single"])
def test_fakes_of_every_route(route: str, shortcut: str, options: dict[str, Any]) -> None:
    if route == "single":
        calls = run(SHORTCUTS[shortcut], shortcut, False, False, route, **options)
        check_fakes(calls, FORWARD)
        return
    for training in (True, False) if route == "staged" else (True,):
        check_fakes(run(SHORTCUTS[shortcut], shortcut, training, True, route, **options), BOTH)
        check_fakes(run(SHORTCUTS[shortcut], shortcut, training, False, route, **options), FORWARD)


@quick
@pytest.mark.parametrize("memory", [{"recompute": ("y1",)}, {"keep": ("a1",)}, {"recompute": ("y1",), "keep": ("a1",)}])
@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("route", ["staged", "gram"])
def test_fakes_with_memory_options(route: str, training: bool, memory: dict[str, Any]) -> None:
    if route == "gram" and not training:
        pytest.skip("with frozen statistics there is no such route")
    check_fakes(run((4, 3, 3, 6), "given", training, True, route, **memory), BOTH)
    if route == "staged":
        check_fakes(run((4, 3, 4), "identity", training, True, route, **memory), BOTH)


EDITS = {
    "the vendor's": lambda text: text,
    "formed": formed,
    "paired": paired,
    "masks on load": masks_on_load,
    "stores a": stores_a,
    "projection staged": projects_staged,
}


@quick
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("route", ["staged", "gram"])
def test_fakes_of_plans_that_measurements_choose(route: str, edit: str) -> None:
    """The outputs are the same whoever runs a pass."""
    context = mixing(lambda i, kind: (i + len(kind)) % 2 == 0) if edit == "the vendor's" else editing(EDITS[edit])
    with context:
        check_fakes(run((4, 3, 3, 6), "projection", True, True, route), BOTH)


@quick
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_fakes_of_layers_of_mixed_modes_and_of_one_gradient(shortcut: str) -> None:
    """Frozen parts in any combination: an operator's outputs follow from what is asked for."""
    widths = SHORTCUTS[shortcut]
    for wanted in itertools.product((True, False), repeat=2):
        pairs = layers(widths, True)
        modules = [m for p in pairs for m in p]
        for m, flag in zip(modules, itertools.cycle(wanted), strict=False):
            m.requires_grad_(flag)
        records = [(functional.conv_of(c), functional.batch_norm_of(b)) for c, b in pairs]
        c, b = pair(widths[0], widths[-1], 1)
        x = torch.randn(2, widths[0], 5, 4, dtype=torch.float64, requires_grad=not any(wanted))
        given = {
            "residual": torch.randn(2, widths[-1], 5, 4, dtype=torch.float64) if shortcut == "given" else None,
            "projection": (functional.conv_of(c), functional.batch_norm_of(b)) if shortcut == "projection" else None,
        }
        with Calls() as calls:
            functional.bottleneck(x, records, **given).sum().backward()
        check_fakes(calls, BOTH)


@quick
@pytest.mark.parametrize("training", [True, False])
def test_fakes_of_stem_and_bn_act(training: bool) -> None:
    for given, relu in itertools.product((True, False), repeat=2):
        bn = norm(6, training=training)
        y, residual = (torch.randn(2, 6, 4, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
        with Calls() as calls:
            out = functional.bn_add_relu(y, functional.batch_norm_of(bn), residual if given else None, relu=relu)
            out.square().sum().backward()
        check_fakes(calls, {"bn_act_forward", "bn_act_backward"})
    conv, bn = pair(3, 6, 7, stride=2, padding=3, training=training)
    x = torch.randn(2, 3, 13, 16, dtype=torch.float64)
    for wanted in (True, False):
        with Calls() as calls:
            leaf = x.clone().requires_grad_(wanted)
            functional.stem(leaf, conv.weight, functional.batch_norm_of(bn)).square().sum().backward()
        check_fakes(calls, {"stem_forward", "stem_backward"})


@pytest.mark.parametrize(("route", "memory"), [("staged", {"recompute": ("y1",)}), ("gram", {"keep": ("a1",)})])
def test_opcheck_with_memory_options(route: str, memory: dict[str, Any]) -> None:
    """Schema, fakes and ``torch.compile``'s view of the calls that tests/autograd/test_compile.py does not make."""
    for func, args, _ in run((4, 3, 3, 6), "projection", True, True, route, **memory).seen[:2]:
        torch.library.opcheck(func, tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, args))


# ---------------------------------------------------------------- export, and batches of any size


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small() -> nn.Module:
    net = fr.ResNet(fr.Bottleneck, [1], width=4, num_classes=3).double()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return net


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_export(training: bool) -> None:
    """One operator per block in the exported program, which saves, loads and counts batches as the module does."""
    net, x = small().train(training), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    program = torch.export.export(net, (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("chain_forward" in t for t in targets) == 1 and sum("stem_forward" in t for t in targets) == 1
    assert not any("conv2d" in t for t in targets)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    exported = torch.export.load(buffer).module()
    for step in range(2):
        assert torch.equal(exported(x + step), net(x + step))
    for name, b in exported.named_buffers():
        assert torch.equal(b, net.get_buffer(name)), name


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        {0: torch.export.Dim.DYNAMIC},
        {0: torch.export.Dim("batch", min=2, max=8)},
        dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO),
    ],
    ids=["dynamic", "named", "all of them, if it can"],
)
def test_export_of_sizes_left_open(sizes: dict[int, Any], strict: bool, training: bool) -> None:
    """Plans belong to a size: the program holds plain operations, and computes what the module does."""
    net = nn.Sequential(small(), nn.Unflatten(1, (3, 1, 1)), fr.BNAddReLU(3), fr.ConvBNReLU(3, 2, 1)).double()
    net.train(training)
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    program = torch.export.export(net, (x,), dynamic_shapes=(sizes,), strict=strict)
    assert not any("fused_resnet" in str(node.target) for node in program.graph.nodes)
    exported = program.module()
    for n in (5, 2):
        x = torch.randn(n, 3, *((16, 20) if 2 in sizes else (12, 12)), dtype=torch.float64)
        torch.testing.assert_close(exported(x), net(x))
    for name, b in exported.named_buffers():
        torch.testing.assert_close(b, net.get_buffer(name))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str) -> None:
    """A trace of the operators for the size that was given; of plain ones for sizes that are symbols."""
    net = small().eval()
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}

    def run(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, state, (x,))

    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    for _ in range(3):  # whatever is remembered of the first
        traced = make_fx(run, tracing_mode=mode)(state, x)
        torch.testing.assert_close(traced(state, x), net(x))
    ours = any("fused_resnet" in str(node.target) for node in traced.graph.nodes)
    assert ours == (mode != "symbolic")
    if not ours:
        x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
        torch.testing.assert_close(traced(state, x), net(x))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("strict", [True, False])
def test_export_belongs_to_one_size_where_that_is_given(strict: bool) -> None:
    """Another size is refused, and so is an open one where our operators are insisted on."""
    net, x = small().eval(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    with pytest.raises((RuntimeError, AssertionError)):
        torch.export.export(net, (x,), strict=strict).module()(x[:1])
    with fr.use_route("staged", strict=True), pytest.raises(Exception, match=r"(?s)(constant|specializ|Constraints)"):
        torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=strict)


@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(not torch._dynamo.is_dynamo_supported(), reason="no torch.compile here")
@pytest.mark.parametrize("route", ["auto", "reference"])
def test_a_batch_that_is_marked_as_dynamic(route: str) -> None:
    """One graph for all sizes there is of plain PyTorch alone; for our operators the compiler says what it wants."""
    block = fr.BasicBlock(4, 4).double()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    marks = [torch._dynamo.maybe_mark_dynamic, *([torch._dynamo.mark_dynamic] if route == "reference" else [])]
    with fr.use_route(route):
        for mark in marks:
            for n in (2, 5):
                x = torch.randn(n, 4, 5, 4, dtype=torch.float64)
                mark(x, 0)
                assert torch.equal(compiled(x), block(x))
            torch._dynamo.reset()
        if route == "auto":
            torch._dynamo.mark_dynamic(x := torch.randn(2, 4, 5, 4, dtype=torch.float64), 0)
            with pytest.raises(Exception, match="use maybe_mark_dynamic"):
                compiled(x)


@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(not torch._dynamo.is_dynamo_supported(), reason="no torch.compile here")
def test_a_batch_that_changes_recompiles_to_the_same_bits() -> None:
    """Although its size is said to be dynamic; in training, with a frozen part: the fakes of each size are right."""
    block, twin = fr.BasicBlock(4, 4).double(), fr.BasicBlock(4, 4).double()
    twin.load_state_dict(block.state_dict())
    for model in (block, twin):
        model.conv1.requires_grad_(False)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (2, 5):
        x = torch.randn(n, 4, 5, 4, dtype=torch.float64)
        for call in (block, compiled):
            call(x).square().sum().backward()
    for (name, a), b in zip(block.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad)), name
    assert all(map(torch.equal, block.buffers(), twin.buffers()))
