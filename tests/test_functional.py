"""The public operations: what they refuse and leave untouched, layouts, dtypes, routes, records."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import calls, functional
from fused_resnet.functional import BatchNorm, batch_norm_of, bn_add_relu, bottleneck, conv_bn_relu, conv_of, stem
from tests.conftest import INTERPRETED
from tests.eager import norm, pair

quick = pytest.mark.quick
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter")

ROUTES = ("staged", "reference")


def image(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# ---------------------------------------------------------------- bad input

Edit = Callable[[dict[str, Any]], Any]


def bn_edit(**fields: Any) -> Edit:
    return lambda a: a.update(bn=a["bn"]._replace(**fields))


def on_meta(name: str) -> Edit:
    return lambda a: a.update(bn=a["bn"]._replace(**{name: getattr(a["bn"], name).to("meta")}))


BAD_NORMS: dict[str, tuple[Edit, str]] = {
    "eps": (bn_edit(eps=0.0), "eps must be positive"),
    "eps nan": (bn_edit(eps=float("nan")), "eps must be positive"),
    "weight length": (bn_edit(weight=torch.ones(5)), "weight must have shape"),
    "bias length": (bn_edit(bias=torch.ones(1)), "bias must have shape"),
    "running_mean length": (bn_edit(running_mean=torch.ones(7)), "running_mean must have shape"),
    "running_var rank": (bn_edit(running_var=torch.ones(6, 1)), "running_var must have shape"),
    "integer statistics": (bn_edit(running_var=torch.ones(6, dtype=torch.int64)), "floating-point"),
    "sliced statistics": (bn_edit(running_var=torch.ones(12)[::2]), "contiguous"),
    "integer weight": (bn_edit(weight=torch.ones(6, dtype=torch.int32)), "floating-point"),
    "float counter": (bn_edit(num_batches_tracked=torch.tensor(0.0), momentum=None), "num_batches_tracked"),
    "meta weight": (on_meta("weight"), "on meta"),
    "meta running_mean": (on_meta("running_mean"), "on meta"),
    "meta counter": (on_meta("num_batches_tracked"), "on meta"),
    "frozen without mean": (bn_edit(training=False, running_mean=None), "running_mean"),
    "frozen without var": (bn_edit(training=False, running_var=None), "running_var"),
}
BAD_CONVS: dict[str, tuple[Edit, str]] = {
    "rank": (lambda a: a.update(x=a["x"][0]), "expected 4D input"),
    "rank 2": (lambda a: a.update(x=torch.zeros(2, 3)), "expected 4D input"),
    "integer": (lambda a: a.update(x=a["x"].long()), "int64"),
    "array": (lambda a: a.update(x=a["x"].numpy()), "expected a tensor, got a ndarray"),
    "nothing": (lambda a: a.update(x=None), "expected a tensor, got a NoneType"),
    "sparse": (lambda a: a.update(x=a["x"].to_sparse()), "expected a dense tensor, got a torch.sparse_coo one"),
    "channels": (lambda a: a.update(x=a["x"][:, :3]), "input channels"),
    "dtype": (lambda a: a.update(x=a["x"].float()), "float32.*float64"),
    "device": (lambda a: a.update(x=a["x"].to("meta")), "on meta"),
    "weight device": (lambda a: a.update(weight=a["weight"].to("meta")), "on meta"),
    "weight rank": (lambda a: a.update(weight=a["weight"][0]), "weight must be"),
    "too small": (lambda a: a.update(x=a["x"][:, :, :2, :2], padding=0), "does not fit"),
    "padding": (lambda a: a.update(padding=-1), "padding at least 0"),
    "three strides": (lambda a: a.update(stride=(1, 1, 1)), "stride must be an int or two"),
    "a stride that is none": (lambda a: a.update(stride=1.0), "stride must be an int or two"),
    "padding by name": (lambda a: a.update(padding="same"), "padding must be an int or two"),
    "a module for its record": (
        lambda a: a.update(bn=nn.BatchNorm2d(6).double()),
        "expected a BatchNorm, got a BatchNorm2d",
    ),
    "one value": (
        lambda a: a.update(x=a["x"][:1, :, :3, :3], padding=0, stride=1),
        r"Expected more than 1 value per channel when training, got input size torch.Size\(\[1, 6, 1, 1\]\)",
    ),
}
BAD_RESIDUALS: dict[str, tuple[Edit, str]] = {
    "shape": (lambda a: a.update(residual=image(2, 6, 1, 1)), "residual"),
    "device": (lambda a: a.update(residual=image(2, 6, 5, 4).to("meta")), "on meta"),
    "dtype": (lambda a: a.update(residual=torch.ones(2, 6, 5, 4, dtype=torch.int64)), "floating-point"),
}


def refuses(operation: Callable[..., Tensor], bn: BatchNorm, edit: Edit, text: str, arguments: dict[str, Any]) -> None:
    """An error with ``text``, and the statistics and counters of the BN as they were, on every route."""
    arguments = dict(arguments, bn=bn)
    edit(arguments)
    kept = [t for t in (bn.running_mean, bn.running_var, bn.num_batches_tracked) if t is not None]
    before = copy.deepcopy(kept)
    for route in ROUTES:
        with pytest.raises((ValueError, TypeError), match=text), fr.record_launches() as launches:
            operation(**arguments, route=route)
        assert not launches
        assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


@quick
@pytest.mark.parametrize("name", [*BAD_NORMS, *BAD_CONVS, *(f"residual {n}" for n in BAD_RESIDUALS)])
def test_conv_bn_relu_refuses(name: str) -> None:
    known = {**BAD_NORMS, **BAD_CONVS, **{f"residual {n}": v for n, v in BAD_RESIDUALS.items()}}
    conv, bn = pair(4, 6, 3)
    arguments = {"x": image(2, 4, 5, 4), "weight": conv.weight, "padding": 1}
    refuses(conv_bn_relu, batch_norm_of(bn), *known[name], arguments)


@quick
@pytest.mark.parametrize("name", [*BAD_NORMS, *BAD_CONVS])
def test_stem_refuses(name: str) -> None:
    conv, bn = pair(4, 6, 3)
    arguments = {"x": image(2, 4, 5, 4), "weight": conv.weight, "padding": 1, "stride": 1}
    refuses(stem, batch_norm_of(bn), *{**BAD_NORMS, **BAD_CONVS}[name], arguments)


@quick
@pytest.mark.parametrize("name", [*BAD_NORMS, *(f"residual {n}" for n in BAD_RESIDUALS)])
def test_bn_add_relu_refuses(name: str) -> None:
    known = {**BAD_NORMS, **{f"residual {n}": v for n, v in BAD_RESIDUALS.items()}}
    refuses(bn_add_relu, batch_norm_of(norm(6)), *known[name], {"y": image(2, 6, 5, 4)})


@quick
@pytest.mark.parametrize("y", [[[1.0]], image(2, 6, 5, 4).to_sparse()], ids=["list", "sparse"])
def test_bn_add_relu_takes_dense_tensors(y: object) -> None:
    refuses(bn_add_relu, batch_norm_of(norm(6)), lambda a: a.update(y=y), "expected a (dense )?tensor", {})


@quick
def test_a_late_layer_that_is_wrong_leaves_the_early_ones_untouched() -> None:
    pairs = [pair(4, 6, 1), pair(6, 6, 3, padding=1), pair(6, 4, 1)]
    projection = pair(4, 4, 1)
    good = [(conv_of(c), batch_norm_of(b)) for c, b in [*pairs, projection]]
    x = image(2, 4, 5, 5)
    before = copy.deepcopy([b.state_dict() for _, b in [*pairs, projection]])
    for i in range(4):
        for wrong in (
            (good[i][0], good[i][1]._replace(running_mean=torch.zeros(99))),
            (good[i][0]._replace(weight=good[i][0].weight.float()), good[i][1]),
            (good[i][0]._replace(weight=image(6, 5, 1, 1)), good[i][1]),
        ):
            layers = [*good]
            layers[i] = wrong
            for route in ROUTES:
                with pytest.raises((ValueError, TypeError), match="projection" if i == 3 else f"conv{i + 1}"):
                    bottleneck(x, layers[:3], layers[3], route=route)
    for (_, bn), state in zip([*pairs, projection], before, strict=True):
        assert all(torch.equal(bn.state_dict()[k], v) for k, v in state.items())


@quick
def test_a_chain_has_one_to_three_layers_of_records() -> None:
    x, (conv, bn) = image(2, 4, 5, 5), pair(4, 4, 1)
    layer = (conv_of(conv), batch_norm_of(bn))
    for layers in ((), (layer,) * 4):
        with pytest.raises(ValueError, match="one to 3 layers"):
            functional.conv_bn_chain(x, layers)
    with pytest.raises(TypeError, match="expected a Conv, got a Conv2d"):
        functional.conv_bn_chain(x, ((conv, layer[1]),))
    assert bn.num_batches_tracked == 0


@quick
def test_records_of_convolutions_that_the_operations_do_not_compute() -> None:
    for options, said in (({}, "bias"), ({"bias": False, "padding": "same"}, "number of zeros")):
        with pytest.raises(ValueError, match=said):
            conv_of(nn.Conv2d(3, 3, 3, **options))
    with pytest.raises(ValueError, match="number of zeros"):
        conv_of(nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular", bias=False))
    with pytest.raises(TypeError, match="got a BatchNorm2d"):
        conv_of(nn.BatchNorm2d(3))


@quick
def test_blocks_refuse_shapes_that_do_not_meet_and_two_shortcuts() -> None:
    layers = [(conv_of(c), batch_norm_of(b)) for c, b in (pair(4, 6, 1), pair(6, 5, 1))]
    x = image(2, 4, 5, 5)
    with pytest.raises(ValueError, match="shortcut"):
        functional.basic_block(x, layers)
    with pytest.raises(ValueError, match="not both"):
        functional.basic_block(x, layers, layers[0], residual=x)
    with pytest.raises(ValueError, match="expected 3"):
        bottleneck(x, layers)


# ---------------------------------------------------------------- layouts


def nchw(t: Tensor) -> Tensor:
    return t.contiguous()


def nhwc(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": nchw,
    "nhwc": nhwc,
    "sliced nchw": lambda t: nchw(torch.cat([t, t], 3))[:, :, :, : t.shape[3]],
    "sliced nhwc": lambda t: nhwc(torch.cat([t, t], 3))[:, :, :, : t.shape[3]],
    "sliced channels": lambda t: nhwc(torch.cat([t, t], 1))[:, : t.shape[1]],
    "strided": lambda t: nchw(t.repeat_interleave(2, 2))[:, :, ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
    "transposed": lambda t: nchw(t.transpose(2, 3)).transpose(2, 3),
}


def formats(t: Tensor) -> tuple[bool, bool]:
    return t.is_contiguous(), t.is_contiguous(memory_format=torch.channels_last)


@quick
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", ["conv", "bn", "stem"])
def test_layout_in_is_layout_out(operation: str, channels: int, layout: str) -> None:
    (conv, bn), results = pair(channels, 4, 3, padding=1), []
    if operation == "bn":
        bn = norm(channels)
    x = LAYOUTS[layout](image(2, channels, 6, 5)).detach()
    dout = None
    for route in ROUTES:
        leaf = x.detach().requires_grad_()  # the same strides
        record = batch_norm_of(copy.deepcopy(bn))
        if operation == "conv":
            out = conv_bn_relu(leaf, conv.weight, record, padding=1, route=route)
        elif operation == "stem":
            out = stem(leaf, conv.weight, record, stride=1, padding=1, route=route)
        else:
            out = bn_add_relu(leaf, record, route=route)
        dout = torch.randn_like(out) if dout is None else dout
        results.append((out, *torch.autograd.grad(out, [leaf], dout)))
    torch.testing.assert_close(*results)
    for ours, theirs in zip(*results, strict=True):
        assert formats(ours) == formats(theirs), (ours.stride(), theirs.stride())


@quick
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_gradient_residual_weight_and_parameters(layout: str) -> None:
    conv, bn = pair(3, 4, 3, padding=1)
    edit = LAYOUTS[layout]
    x, results = nhwc(image(2, 3, 6, 5)), []
    residual, dout = edit(image(2, 4, 6, 5)), edit(image(2, 4, 6, 5))
    weight = edit(conv.weight.detach())
    gamma = torch.stack([bn.weight.detach()] * 2, 1)[:, 0]  # strided
    for route in ROUTES:
        given = (x, residual, weight, gamma, dout)
        if route == "reference":  # eager on the CPU misreads some strided weights and sliced gradients
            given = tuple(t.contiguous() for t in given)
        leaves = [t.detach().requires_grad_() for t in given[:4]]
        record = batch_norm_of(copy.deepcopy(bn))._replace(weight=leaves[3])
        out = conv_bn_relu(leaves[0], leaves[2], record, padding=1, residual=leaves[1], route=route)
        results.append((out, *torch.autograd.grad(out, leaves, given[4])))
    torch.testing.assert_close(*results)


@quick
def test_gradients_of_stride_zero() -> None:
    """``.sum()`` really delivers them."""
    results = []
    conv, bn = pair(3, 4, 3, padding=1)
    for route in ROUTES:
        x = image(2, 3, 6, 5).fill_(0.5).copy_(torch.arange(180).view(2, 3, 6, 5) / 100).requires_grad_()
        first = conv_bn_relu(x, conv.weight, batch_norm_of(copy.deepcopy(bn)), route=route).sum()
        second = bn_add_relu(x, batch_norm_of(nn.BatchNorm2d(3).double()), route=route).sum()
        third = stem(x, conv.weight, batch_norm_of(copy.deepcopy(bn)), route=route).sum()
        results.append(torch.autograd.grad(first + second + third, x))
    torch.testing.assert_close(*results)


# ---------------------------------------------------------------- dtypes, empty batches, NaN


@quick
def test_half_precision_with_float32_parameters() -> None:
    conv, bn = pair(3, 4, 3, padding=1)
    bn.float()
    x, residual = image(2, 3, 6, 5).half().requires_grad_(), image(2, 4, 6, 5).half().requires_grad_()
    weight = conv.weight.detach().half().requires_grad_()
    out = conv_bn_relu(x, weight, batch_norm_of(bn), padding=1, residual=residual, route="staged")
    out.sum().backward()
    assert {t.dtype for t in (out, x.grad, weight.grad, residual.grad)} == {torch.float16}
    assert {t.dtype for t in (bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var)} == {torch.float32}


@quick
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("training", [True, False])
def test_autocast(dtype: torch.dtype, training: bool) -> None:
    """float32 parameters and gradients, 16-bit activations; the running statistics still update."""
    pairs = [pair(4, 6, 1, training=training), pair(6, 6, 3, padding=1, training=training), pair(6, 4, 1)]
    pairs[2][1].train(training)
    model = nn.ModuleList(m for p in pairs for m in p).float()
    x = image(2, 4, 6, 5).to(dtype).requires_grad_()
    results = []
    for route in ROUTES:
        twin = copy.deepcopy(model)
        layers = [(conv_of(c), batch_norm_of(b)) for c, b in zip(twin[::2], twin[1::2], strict=True)]
        with torch.autocast("cpu", dtype=torch.float16):
            out = bottleneck(x, layers, residual=None, route=route)
            second = bn_add_relu(out, layers[2][1], route=route)
            third = stem(x, layers[0][0].weight, layers[0][1], stride=1, padding=0, route=route)
        if route == "staged":
            assert third.dtype == torch.float16
            assert out.dtype == second.dtype == dtype, "the shortcut is the input, and as wide as that"
        dx, *grads = torch.autograd.grad(out.float().square().sum(), [x, *twin.parameters()])
        assert dx.dtype == dtype and {g.dtype for g in grads} == {torch.float32}
        results.append([out.float(), *(b.float() for b in twin.buffers())])
        assert training != torch.equal(twin[1].running_mean, model[1].running_mean)
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


@quick
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("operation", ["conv", "bn", "block"])
def test_empty_batch(operation: str, training: bool) -> None:
    """Empty output, zero parameter gradients, statistics as they were, and one batch more counted."""
    conv, bn = pair(4, 4, 3, padding=1, training=training)
    before, x = copy.deepcopy(bn.state_dict()), image(0, 4, 6, 5).requires_grad_()
    layer, inputs = (conv_of(conv), batch_norm_of(bn)), [x, *conv.parameters(), *bn.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if operation == "bn":
            inputs.pop(1)
            out = bn_add_relu(x, layer[1])
        elif operation == "conv":
            out = conv_bn_relu(x, conv.weight, layer[1], padding=1)
        else:
            out = functional.basic_block(x, [layer, layer])
    assert out.shape == (0, 4, 6, 5)
    for grad in torch.autograd.grad(out.sum(), inputs):
        assert not grad.any()
    batches = (2 if operation == "block" else 1) if training else 0
    assert bn.num_batches_tracked == batches
    assert torch.equal(bn.running_mean, before["running_mean"]) and torch.equal(bn.running_var, before["running_var"])


@quick
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("operation", ["bn", "depthwise", "stem"])
def test_nan_and_inf_poison_what_they_poison_in_eager(operation: str, training: bool, value: float) -> None:
    conv, bn = pair(4, 4, 1, groups=4, training=training)
    if operation == "stem":
        conv, _ = pair(4, 4, 1)
        conv.weight.data.copy_(torch.eye(4)[:, :, None, None])
    x, results = image(2, 4, 6, 5), []
    x[1, 2, 3, 3] = value
    for route in ROUTES:
        leaf, record = x.clone().requires_grad_(), batch_norm_of(copy.deepcopy(bn))
        if operation == "bn":
            out = bn_add_relu(leaf, record, route=route)
        elif operation == "stem":
            if value != value:
                pytest.skip("0 * NaN in a full convolution poisons every channel")
            leaf.data[1, 2, 3, 3] = 1e300 if value > 0 else -1e300
            out = stem(leaf, conv.weight, record, stride=1, padding=0, route=route)
        else:
            out = conv_bn_relu(leaf, conv.weight, record, groups=4, route=route)
        (dx,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        results.append([out, dx, record.running_mean, record.running_var])
    others = [0, 1, 3]
    for ours, theirs in zip(*results, strict=True):
        axis = 0 if ours.dim() == 1 else 1
        a, b = (t.index_select(axis, torch.tensor(others)) for t in (ours, theirs))
        torch.testing.assert_close(a, b)
        assert a.isfinite().all()
        # The mean of an infinite channel is inf or NaN: eager itself says one on the CPU and the other on the GPU.
        poisoned = [~t.select(axis, 2).isfinite() for t in (ours, theirs)]
        assert torch.equal(*poisoned)


@quick
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_the_gradient_at_zero_is_zero(zero: float) -> None:
    bn = nn.BatchNorm2d(2).double().eval()
    x = torch.full((1, 2, 3, 3), zero, dtype=torch.float64).requires_grad_()
    identity = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    for residual in (None, identity):
        out = bn_add_relu(x, batch_norm_of(bn), residual, route="staged")
        (dx,) = torch.autograd.grad(out.sum(), x)
        assert not dx.any()


# ---------------------------------------------------------------- routes and records


@quick
def test_route_reference_launches_nothing_of_ours() -> None:
    conv, bn = pair(3, 4, 3)
    x = image(2, 3, 6, 5)
    with fr.record_launches() as launches:
        conv_bn_relu(x, conv.weight, batch_norm_of(bn), route="reference")
        with fr.use_route("reference"):
            conv_bn_relu(x, conv.weight, batch_norm_of(bn))
            stem(x, conv.weight, batch_norm_of(bn))
            bn_add_relu(x, batch_norm_of(norm(3)))
    assert not launches
    with fr.use_route("reference"), fr.use_route("staged"), fr.record_launches() as launches:
        conv_bn_relu(x, conv.weight, batch_norm_of(bn))
    assert launches


@quick
def test_a_route_that_cannot_run() -> None:
    conv, bn = pair(3, 4, 3)
    layer, x = batch_norm_of(bn.float()), image(2, 3, 6, 5).bfloat16()
    weight = conv.weight.detach().bfloat16()
    for run in (
        lambda **o: conv_bn_relu(x, weight, layer, **o),
        lambda **o: stem(x, weight, layer, **o),
        lambda **o: bn_add_relu(x, batch_norm_of(norm(3).float()), **o),
    ):
        with pytest.raises(fr.RouteUnavailableError, match="no bfloat16 arithmetic"):
            run(route="staged")
        with fr.use_route("staged", strict=True), pytest.raises(fr.RouteUnavailableError, match="staged"):
            run()
        with fr.use_route("staged"), fr.record_launches() as launches:
            run()
        assert not launches
        assert run(route="reference").dtype == torch.bfloat16
    assert layer.num_batches_tracked == 4  # refusals did not count


@quick
def test_unknown_routes_are_named() -> None:
    conv, bn = pair(3, 4, 3)
    with pytest.raises(ValueError, match="unknown route 'fast'"):
        conv_bn_relu(image(2, 3, 6, 5), conv.weight, batch_norm_of(bn), route="fast")
    with pytest.raises(ValueError, match="unknown route"), fr.use_route("fast"):
        pass
    assert bn.num_batches_tracked == 0


@quick
def test_the_reason_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_said", set())
    bn, x = norm(3).float(), image(2, 3, 6, 5).bfloat16()
    with pytest.warns(UserWarning, match="bfloat16"):
        bn_add_relu(x, batch_norm_of(bn))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bn_add_relu(x, batch_norm_of(bn))
        bn_add_relu(x, batch_norm_of(bn), route="reference")


@quick
def test_routes_belong_to_a_thread() -> None:
    bn, x = norm(3), image(2, 3, 6, 5)
    ran: dict[str, int] = {}
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with fr.use_route("reference"):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with fr.record_launches() as launches:
        bn_add_relu(x, batch_norm_of(bn))
    ran["here"] = len(launches)
    leave.set()
    thread.join()
    assert ran["here"] > 0


@quick
def test_a_route_is_read_in_forward_only() -> None:
    bn, x = norm(3), image(2, 3, 6, 5).requires_grad_()
    with fr.use_route("reference"):
        plain = bn_add_relu(x, batch_norm_of(bn))
    fused = bn_add_relu(x, batch_norm_of(bn))
    with fr.record_launches() as launches:
        plain.sum().backward()
        assert not launches
        with fr.use_route("reference"):
            fused.sum().backward()
    assert launches


@quick
def test_records_hold_forward_and_backward_and_nest() -> None:
    conv, bn = pair(3, 4, 3, padding=1)
    x = image(2, 3, 6, 5).requires_grad_()
    with fr.record_launches() as everything:
        with fr.record_launches() as forward:
            out = conv_bn_relu(x, conv.weight, batch_norm_of(bn), padding=1)
        with fr.record_launches() as backward:
            out.sum().backward()
    conv_bn_relu(x, conv.weight, batch_norm_of(bn), padding=1)
    assert everything == forward + backward
    flops = [launch.flops for launch in everything if launch.flops]
    assert flops == [2 * 2 * 6 * 5 * 4 * 3 * 9] * 3
    assert all(launch.bytes > 0 for launch in everything)


@quick
def test_the_meta_device_infers_shapes() -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fr.resnet18(width=8, num_classes=7)
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 7)
