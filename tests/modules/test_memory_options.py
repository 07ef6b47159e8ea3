"""recompute=("y1",) and keep=("a1",): the same results from less memory, or in less time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr

CASES = {
    "identity": (fr.Bottleneck, 32, 8, 1),
    "projection": (fr.Bottleneck, 16, 8, 2),
    "basic": (fr.BasicBlock, 16, 16, 1),
}


def build(kind: str, recompute: tuple[str, ...], keep: tuple[str, ...] = ()) -> nn.Module:
    cls, inplanes, planes, stride = CASES[kind]
    width = planes * cls.expansion
    torch.manual_seed(0)
    downsample = None
    if stride != 1 or inplanes != width:
        downsample = nn.Sequential(nn.Conv2d(inplanes, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    block = cls(inplanes, planes, stride, downsample, recompute=recompute, keep=keep)
    return block.to(memory_format=torch.channels_last)


def run(block: nn.Module, route: str, inplanes: int) -> tuple[list[Tensor], int, list[str]]:
    """(output and gradients, bytes saved for backward besides input and parameters, kernels of backward)."""
    torch.manual_seed(1)
    x = torch.randn(3, inplanes, 9, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (x, *block.parameters(), *block.buffers())}
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), fr.use_route(route, strict=True):
        out = block(x)
    assert x.grad is None
    with fr.record_launches() as launches:
        out.backward(torch.randn_like(out))
    gradients = [t.grad for t in (x, *block.parameters())]
    assert all(g is not None for g in gradients)
    return [out.detach(), *gradients], sum(saved.values()), [launch.kernel for launch in launches]  # type: ignore[list-item]


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("route", ["gram", "staged"])
def test_same_results_from_less_memory(route: str, kind: str, training: bool) -> None:
    if route == "gram" and (kind == "basic" or not training):
        pytest.skip("a block of that kind has no such route")
    inplanes = CASES[kind][1]
    plain, bytes_plain, kernels_plain = run(build(kind, ()).train(training), route, inplanes)
    again, bytes_again, kernels_again = run(build(kind, ("y1",)).train(training), route, inplanes)
    for expected, found in zip(plain, again, strict=True):
        assert torch.equal(expected, found)
    y1 = 3 * 9 * 8 * CASES[kind][2] * 4
    assert bytes_plain - bytes_again == y1
    assert kernels_again.count("conv_fprop_kernel") == kernels_plain.count("conv_fprop_kernel") + 1


@pytest.mark.parametrize("recompute", [(), ("y1",)], ids=["", "recompute y1"])
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("route", ["gram", "staged"])
def test_a_formed_input_is_kept(route: str, kind: str, recompute: tuple[str, ...]) -> None:
    if route == "gram" and kind == "basic":
        pytest.skip("a block of that kind has no such route")
    inplanes = CASES[kind][1]
    plain, bytes_plain, kernels_plain = run(build(kind, recompute), route, inplanes)
    kept, bytes_kept, kernels_kept = run(build(kind, recompute, ("a1",)), route, inplanes)
    for expected, found in zip(plain, kept, strict=True):
        assert torch.equal(expected, found)
    assert bytes_kept - bytes_plain == 3 * 9 * 8 * CASES[kind][2] * 4
    assert kernels_kept.count("bn_act_kernel") == kernels_plain.count("bn_act_kernel") - 1


def test_with_frozen_statistics_the_formed_input_is_what_there_is() -> None:
    plain, bytes_plain, _ = run(build("identity", ()).eval(), "staged", 32)
    kept, bytes_kept, _ = run(build("identity", (), ("a1",)).eval(), "staged", 32)
    assert bytes_kept == bytes_plain and all(map(torch.equal, plain, kept))


def test_nothing_is_recomputed_where_nothing_below_trains() -> None:
    block = build("identity", ("y1",))
    for module in (block.conv1, block.bn1, block.conv2, block.bn2):
        module.requires_grad_(False)
    x = torch.randn(3, 32, 9, 8).contiguous(memory_format=torch.channels_last)
    out = block(x)
    with fr.record_launches() as launches:
        out.sum().backward()
    assert "conv_fprop_kernel" not in [launch.kernel for launch in launches]


def test_the_attribute_is_read_at_call_time_and_explained() -> None:
    block = build("identity", ())
    kept = fr.explain(block, (8, 32, 14, 14), target="h100").saved_bytes
    block.recompute = ("y1",)  # type: ignore[assignment]
    assert fr.explain(block, (8, 32, 14, 14), target="h100").saved_bytes == kept - 8 * 14 * 14 * 8 * 2


@pytest.mark.quick
@pytest.mark.parametrize("option", ["recompute", "keep"])
@pytest.mark.parametrize("names", ["y1", ("y2",), ("y1", "a1")])
def test_unknown_names_are_refused(option: str, names: object) -> None:
    with pytest.raises(ValueError, match=f"{option} takes a sequence of '"):
        fr.Bottleneck(32, 8, **{option: names})  # type: ignore[arg-type]
    block = build("identity", ())
    setattr(block, option, names)
    with pytest.raises(ValueError, match=f"{option} takes"):
        block(torch.randn(2, 32, 5, 5))
