"""The chain operator against nn.Conv2d and nn.BatchNorm2d in float64: every combination of what a chain can be."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from tests.conftest import INTERPRETED
from tests.eager import Chain, compare, editing, formed, masks_on_load, mixed, mixing, pair, projects_staged, stores_a

quick = pytest.mark.quick
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter")

PASSES = ("fprop", "dgrad", "wgrad")


def image(*shape: int, requires_grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_(requires_grad)


def chain(
    count: int = 3,
    kind: str = "none",
    training: bool = True,
    relu: bool = True,
    stride: int = 2,
    requires_grad: bool = True,
    **options: Any,
) -> Chain:
    """1x1, 3x3 and 1x1 with odd channels; a projection samples as the 3x3 does. Only those that ``count`` leaves."""
    if kind == "identity":
        stride = 1
    last = 7 if kind == "identity" else 10
    widths = {1: [last], 2: [5, last], 3: [5, 6, last]}[count]
    kernels = {1: [3], 2: [1, 3], 3: [1, 3, 1]}[count]
    pairs, ci = [], 7
    for co, kernel in zip(widths, kernels, strict=True):
        geometry = {"stride": stride, "padding": 1} if kernel == 3 else {}
        pairs.append(pair(ci, co, kernel, training=training, **geometry, **options))
        ci = co
    x = image(2, 7, 6, 5, requires_grad=requires_grad)
    size = tuple(-(-s // stride) for s in (6, 5))
    projection = pair(7, last, 1, stride=stride, training=training, **options) if kind == "projection" else None
    residual = image(2, last, *size) if kind == "given" else None
    return Chain(x, pairs, kind, projection, residual, relu)


@quick
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("kind", ["none", "identity", "given", "projection"])
@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_combination(count: int, training: bool, kind: str, relu: bool) -> None:
    compare(chain(count, kind, training, relu))


GEOMETRY: dict[str, tuple[list[tuple[int, int, Any, dict[str, Any]]], dict[str, Any] | None]] = {
    "groups": ([(8, 8, 1, {}), (8, 12, 3, {"groups": 4, "padding": 1}), (12, 9, 1, {})], None),
    "grouped first": ([(8, 6, 3, {"groups": 2, "stride": 2}), (6, 5, 1, {})], None),
    "depthwise last": ([(8, 6, 1, {}), (6, 6, 3, {"groups": 6, "padding": 1})], None),
    "dilation": ([(8, 5, 3, {"dilation": 2, "padding": 2}), (5, 9, 3, {"dilation": (1, 2), "stride": (2, 1)})], None),
    "padded 1x1": ([(8, 5, 1, {"padding": 1}), (5, 3, 1, {"padding": (0, 2), "stride": 2}), (3, 3, 2, {})], None),
    "strided 1x1": ([(8, 5, 1, {"stride": 2}), (5, 5, 1, {"stride": (1, 2)}), (5, 3, 1, {})], None),
    "rectangular": ([(8, 5, (1, 3), {"padding": (0, 1)}), (5, 4, (3, 1), {}), (4, 3, (2, 3), {})], None),
    "one channel": ([(8, 1, 1, {}), (1, 1, 3, {"padding": 1}), (1, 2, 1, {})], None),
    "many taps": ([(8, 4, 9, {"padding": 4}), (4, 3, 8, {"padding": 4})], None),
    "3x3 projection": (
        [(8, 5, 1, {}), (5, 6, 3, {"stride": 2, "padding": 1})],
        {"kernel": 3, "stride": 2, "padding": 1},
    ),
    "grouped projection": ([(8, 6, 3, {"stride": 2, "padding": 1})], {"kernel": 1, "stride": 2, "groups": 2}),
    "padded projection": ([(8, 6, 3, {"padding": 2})], {"kernel": 1, "padding": 1}),
    "uneven projection": ([(8, 6, 3, {"stride": (3, 2), "padding": 1})], {"kernel": 1, "stride": (3, 2)}),
}


@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(name: str, training: bool) -> None:
    layers, shortcut = GEOMETRY[name]
    pairs = [pair(ci, co, kernel, training=training, **options) for ci, co, kernel, options in layers]
    projection = None
    if shortcut is not None:
        shortcut = dict(shortcut)
        projection = pair(8, layers[-1][1], shortcut.pop("kernel"), training=training, **shortcut)
    compare(Chain(image(2, 8, 7, 6), pairs, "projection" if projection else "none", projection))


# ---------------------------------------------------------------- the vendor's passes among ours


def subsets() -> list[frozenset[tuple[int, str]]]:
    """All, each alone, each left out, and some at random, of the twelve passes of a bottleneck with a projection."""
    everything = frozenset(itertools.product((0, 1, 2, -1), PASSES))
    drawn = random.Random(0)
    some = [frozenset(p for p in sorted(everything) if drawn.random() < 0.5) for _ in range(8)]
    return [everything, *({p} for p in sorted(everything)), *(everything - {p} for p in sorted(everything)), *some]


@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("vendor", subsets(), ids=lambda s: "+".join(f"{i}{k[0]}" for i, k in sorted(s)))
def test_vendor_and_fused_mix(vendor: frozenset[tuple[int, str]], training: bool) -> None:
    with mixing(lambda i, kind: (i, kind) in vendor):
        compare(chain(3, "projection", training))


@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("kind", ["none", "identity", "given"])
@pytest.mark.parametrize("taps", [1, 9])
def test_the_vendor_runs_only_filters_wider_than_1x1_or_only_1x1(taps: int, kind: str, training: bool) -> None:
    case = chain(3, kind, training)
    wide = [conv.weight[0, 0].numel() == taps for conv, _ in case.pairs]
    with mixing(lambda i, _: wide[i]):
        compare(case)


# ---------------------------------------------------------------- the Gram route


@quick
@pytest.mark.parametrize("kind", ["none", "identity", "given", "projection"])
@pytest.mark.parametrize("vendor", ["", "0", "1", "01", "01-1"], ids=lambda v: f"vendor {v}")
def test_gram(kind: str, vendor: str) -> None:
    """The last conv widens and its output does not exist: the same results, with any of the others the vendor's."""
    case = chain(3, kind)
    case.route = "gram"
    with mixing(lambda i, _: str(i) in vendor):
        compare(case)


@pytest.mark.parametrize("momentum", [0.0, 1.0, None])
@pytest.mark.parametrize("affine", [True, False])
def test_gram_batch_norm_variants(affine: bool, momentum: float | None) -> None:
    case = chain(3, "projection", affine=affine, momentum=momentum)
    case.route = "gram"
    compare(case)


@pytest.mark.parametrize("wanted", range(9))
def test_gram_one_gradient_alone(wanted: int) -> None:
    case = chain(3, "given")
    case.route = "gram"
    tensors = [case.x, case.residual, *(p for m in case.modules for p in m.parameters())]
    for i, t in enumerate(tensors):
        t.requires_grad_(i == wanted)
    compare(case)


def test_gram_trains_its_last_layer_without_the_gradient_of_those_below() -> None:
    case = chain(3, "given")
    case.route = "gram"
    last = {p for module in case.pairs[2] for p in module.parameters()}
    for t in (case.x, case.residual, *(p for m in case.modules for p in m.parameters())):
        t.requires_grad_(t in last)
    with fr.record_launches() as launches:
        compare(case)
    ran = {launch.kernel for launch in launches}
    assert "gram_wgrad_kernel" in ran and "gram_dgrad_kernel" not in ran


@quick
@pytest.mark.parametrize("route", ["staged", "gram"])
@pytest.mark.parametrize("kind", ["none", "identity", "given", "projection"])
def test_passes_form_dy_and_dz(kind: str, route: str) -> None:
    """As where measurements found that faster than forming them on load."""
    case = chain(3, kind)
    case.route = route
    with fr.record_launches() as launches, editing(formed):
        compare(case)
    ran = [launch.kernel for launch in launches]
    assert "gram_wgrad_kernel" not in ran and "bn_act_grad_reduce_kernel" in ran
    layers = 4 if kind == "projection" else 3
    of_gram = 0 if route == "staged" else layers - 2
    assert ran.count("bn_grad_apply_kernel") == layers - of_gram
    assert ("gram_dgrad_kernel" in ran) == (route == "gram")


@quick
@pytest.mark.parametrize("first", ["ours", "the vendor's"])
@pytest.mark.parametrize("kind", ["none", "identity", "given", "projection"])
def test_gram_forms_dz_on_load(kind: str, first: str) -> None:
    """Where nobody but the route's own dgrad reads dz, or our first layer's, it is not written."""
    case = chain(3, kind)
    case.route = "gram"

    def edit(text: str) -> str:
        return mixed(masks_on_load(text), lambda i, kind: i == 0 and kind == "dgrad" and first != "ours")

    with editing(edit), fr.record_launches() as launches:
        compare(case)
    written = {launch.bytes for launch in launches if launch.kernel == "gram_wgrad_kernel"}
    with fr.record_launches() as usual:
        compare(case)
    fewer = {launch.bytes for launch in usual if launch.kernel == "gram_wgrad_kernel"}.pop() - written.pop()
    expects = kind == "none" or (kind == "identity" and first == "ours")
    assert (fewer > 0) == expects


@quick
@pytest.mark.parametrize("kind", ["none", "identity", "given", "projection"])
def test_gram_writes_its_input_for_fprop(kind: str) -> None:
    """As where measurements found that faster than forming it on load twice: the same numbers."""
    case = chain(3, kind)
    case.route = "gram"
    with editing(stores_a):
        compare(case)
        formed_once = case.copied().fused()
    assert torch.equal(formed_once, case.copied().fused())


@quick
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("vendor", [(), ("fprop",), ("dgrad",), ("wgrad",), PASSES], ids="+".join)
def test_gram_beside_a_staged_projection(vendor: tuple[str, ...], stride: int) -> None:
    case = chain(3, "projection", stride=stride)
    case.route = "gram"

    def edit(text: str) -> str:
        return mixed(projects_staged(text), lambda i, kind: i == -1 and kind in vendor)

    with editing(edit):
        compare(case)


def projection_gradients() -> list[frozenset[int]]:
    """Each tensor alone, the projection's without any other, all but x, and some at random; x is 0, the projection's
    weight, gamma and beta the last three."""
    drawn = random.Random(1)
    some = [frozenset(i for i in range(13) if drawn.random() < 0.5) for _ in range(4)]
    return [*(frozenset({i}) for i in range(13)), frozenset({10, 11, 12}), frozenset(range(1, 13)), *some]


@pytest.mark.parametrize("wanted", projection_gradients(), ids=lambda s: "+".join(map(str, sorted(s))))
def test_gram_projection_gradients(wanted: frozenset[int]) -> None:
    case = chain(3, "projection")
    case.route = "gram"
    for i, t in enumerate([case.x, *(p for m in case.modules for p in m.parameters())]):
        t.requires_grad_(i in wanted)
    with fr.record_launches() as launches:
        compare(case)
    ran = [launch.kernel for launch in launches]
    of_x, of_projection, below = 0 in wanted, wanted & {10, 11, 12}, wanted & {0, 1, 2, 3, 4, 5, 6}
    assert ran.count("gram_dgrad_kernel") == bool(below) + of_x
    assert ran.count("gram_backward_kernel") == bool(wanted - {10, 11, 12}) + bool(of_projection or of_x)


def test_gram_projection_writes_neither_its_output_nor_the_gradient_of_it() -> None:
    case = chain(3, "projection")
    case.route = "gram"
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with fr.record_launches() as launches, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = case.copied().fused()
    wide = [t for t in saved if t.shape == out.shape]
    assert len(wide) <= 1  # the output itself, for its mask
    ran = [launch.kernel for launch in launches]
    assert ran.count("gram_kernel") == 2 and ran.count("conv_fprop_kernel") == 3


def test_gram_auto_takes_it_and_strict_says_why_not() -> None:
    case = chain(3, "none")
    case.route = "auto"
    ours, _ = compare(case)
    with fr.record_launches() as launches:
        ours.fused()
    assert any("gram" in launch.kernel for launch in launches)
    for other in (chain(1), chain(3, training=False), chain(3, relu=False), chain(3, "identity").copied()):
        other.route = "gram"
        if other.kind == "identity":
            other.pairs[0][1].eval()  # two modes: layer by layer
        before = other.state()
        with pytest.raises(fr.RouteUnavailableError, match="gram"):
            other.fused()
        torch.testing.assert_close(other.state(), before)


# ---------------------------------------------------------------- what BN may be


@pytest.mark.parametrize("momentum", [0.0, 1.0, -0.3, None])
def test_momentum(momentum: float | None) -> None:
    case = chain(2, momentum=momentum)
    case.pairs[0][1].num_batches_tracked += 4
    ours, theirs = compare(case)
    for step in (ours, theirs):
        step.x = step.x.detach() * 2
    torch.testing.assert_close(ours.fused(), theirs.eager())
    torch.testing.assert_close(ours.state(), theirs.state())


def without(name: str) -> Any:
    return lambda bn: setattr(bn, name, None)


def untracked(bn: torch.nn.BatchNorm2d) -> None:
    bn.track_running_stats = False


BN_EDITS = {
    "affine False": {"affine": False},
    "no statistics": {"track_running_stats": False},
    "weight without bias": without("bias"),
    "bias without weight": without("weight"),
    "statistics switched off": untracked,
    "no counter": without("num_batches_tracked"),
    "no counter, cumulative": [{"momentum": None}, without("num_batches_tracked")],
    "large eps": {"eps": 0.5},
}


@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("edit", BN_EDITS)
def test_batch_norm_variants(edit: str, training: bool) -> None:
    edits = BN_EDITS[edit]
    edits = edits if isinstance(edits, list) else [edits]
    options = {k: v for e in edits if isinstance(e, dict) for k, v in e.items()}
    case = chain(2, "projection", training, **options)
    for bn in (m for m in case.modules if isinstance(m, torch.nn.BatchNorm2d)):
        for e in edits:
            if callable(e):
                e(bn)
    compare(case)


@pytest.mark.parametrize("modes", [*itertools.product([True, False], repeat=4)][1:-1])
def test_layers_in_different_modes(modes: tuple[bool, ...]) -> None:
    case = chain(3, "projection")
    for mode, (_, bn) in zip(modes, [*case.pairs, case.projection], strict=True):
        bn.train(mode)
    compare(case)


@pytest.mark.parametrize("kind", ["none", "identity", "given"])
@pytest.mark.parametrize("relu", [True, False])
def test_a_frozen_layer_in_a_chain_that_trains(kind: str, relu: bool) -> None:
    case = chain(2, kind, relu=relu)
    case.pairs[0][1].eval()
    compare(case)


def test_parameters_in_another_dtype_than_statistics() -> None:
    case = chain(2).copied()
    for _, bn in case.pairs:
        bn.float()
    other = case.copied()
    for _, bn in other.pairs:
        bn.double()
    (a, b), dout = (case.fused(), other.eager()), torch.randn(2, 10, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(a, b)
    a.backward(dout)
    b.backward(dout)
    for name, value in other.state().items():
        if value is not None:
            got = case.state()[name]
            if got.is_floating_point():
                assert got.dtype == (torch.float64 if name == "dx" or got.dim() == 4 else torch.float32), name
            torch.testing.assert_close(got.to(value.dtype), value, rtol=1e-5, atol=1e-5)
