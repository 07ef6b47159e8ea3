"""The plain networks against torchvision's, and against what the paper says of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from fused_resnet import reference

FAMILY = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
]

CIFAR_PARAMETERS = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962}
"""Table 6 gives 0.27, 0.46, 0.66, 0.85 and 1.7 million."""


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


@pytest.fixture
def models() -> Any:
    return pytest.importorskip("torchvision").models


@pytest.mark.quick
@pytest.mark.parametrize("name", FAMILY)
def test_keys_shapes_and_counts_are_torchvisions(name: str, models: Any) -> None:
    with torch.device("meta"):
        ours, theirs = getattr(reference, name)(), getattr(models, name)()
    assert list(shapes(ours).items()) == list(shapes(theirs).items())
    assert parameters(ours) == models.get_model_weights(name).DEFAULT.meta["num_params"]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("block", "layers", "options"),
    [
        ("BasicBlock", [2, 1, 1, 1], {}),
        ("Bottleneck", [1, 2, 1, 1], {"zero_init_residual": True}),
        ("Bottleneck", [1, 1, 1, 2], {"groups": 4, "width_per_group": 8}),
        ("Bottleneck", [1, 1, 2, 2], {"replace_stride_with_dilation": [False, True, True]}),
        ("Bottleneck", [1, 1, 1, 1], {"norm_layer": partial(nn.GroupNorm, 8)}),
    ],
)
def test_same_seed_same_weights_outputs_and_gradients(
    block: str, layers: list[int], options: dict[str, Any], models: Any
) -> None:
    nets = []
    for network, blocks in ((reference.ResNet, reference), (models.ResNet, models.resnet)):
        torch.manual_seed(0)
        nets.append(network(getattr(blocks, block), layers, num_classes=7, **options))
    ours, theirs = nets
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key

    x = torch.randn(2, 3, 40, 48)
    for train in (True, False):
        ours.train(train)
        theirs.train(train)
        torch.testing.assert_close(ours(x), theirs(x))
    ours(x).square().mean().backward()
    theirs(x).square().mean().backward()
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, key=key: f"{key}: {text}")
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


@pytest.mark.quick
@pytest.mark.parametrize("depth", CIFAR_PARAMETERS)
def test_cifar_counts_are_the_papers(depth: int) -> None:
    with torch.device("meta"):
        model = reference.cifar_resnet(depth)
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    assert parameters(model) == CIFAR_PARAMETERS[depth]
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth


@pytest.mark.quick
def test_cifar_sizes_of_table_6() -> None:
    with torch.device("meta"):
        model = reference.cifar_resnet(20)
        x = model.stem(torch.empty(1, 3, 32, 32))
        assert x.shape == (1, 16, 32, 32)
        for stage, shape in ((model.layer1, (16, 32)), (model.layer2, (32, 16)), (model.layer3, (64, 8))):
            x = stage(x)
            assert x.shape == (1, shape[0], shape[1], shape[1])


@pytest.mark.quick
@pytest.mark.parametrize("depth", [19, 21, 2, 0])
def test_cifar_depth_must_be_6n_plus_2(depth: int) -> None:
    with pytest.raises(ValueError, match=r"6n \+ 2"):
        reference.cifar_resnet(depth)


@pytest.mark.quick
def test_shortcut_a_has_no_parameters_and_pads_with_zeros() -> None:
    shortcut = reference.ZeroPadShortcut(3, 5, 2)
    assert not list(shortcut.parameters()) and not shortcut.state_dict()
    x = torch.randn(2, 3, 5, 6).to(memory_format=torch.channels_last)
    out = shortcut(x)
    assert torch.equal(out[:, :3], x[:, :, ::2, ::2])
    assert out.shape == (2, 5, 3, 3) and not out[:, 3:].any()
    assert out.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="only add channels"):
        reference.ZeroPadShortcut(5, 3, 2)


@pytest.mark.quick
@pytest.mark.parametrize("builder", [reference.resnet18, reference.resnet50])
def test_shortcuts_differ_in_their_projections_alone(builder: Callable[..., reference.ResNet]) -> None:
    with torch.device("meta"):
        nets = {shortcut: builder(shortcut=shortcut) for shortcut in ("A", "B", "C")}
    projections = {
        name: sum(isinstance(m, nn.Conv2d) for key, m in net.named_modules() if "downsample" in key)
        for name, net in nets.items()
    }
    blocks = sum(isinstance(m, reference.BasicBlock | reference.Bottleneck) for m in nets["C"].modules())
    assert projections["A"] == 0 and projections["B"] in (3, 4) and projections["C"] == blocks
    assert parameters(nets["A"]) < parameters(nets["B"]) < parameters(nets["C"])
    body = [key for key in nets["C"].state_dict() if "downsample" not in key]
    assert body == list(nets["A"].state_dict())


@pytest.mark.quick
@pytest.mark.parametrize("depth", [18, 34, 50])
def test_plain_networks_are_the_residual_ones_without_shortcuts(depth: int) -> None:
    with torch.device("meta"):
        plain, residual = reference.plain(depth), getattr(reference, f"resnet{depth}")(shortcut="A")
        assert plain(torch.empty(2, 3, 64, 64)).shape == (2, 1000)
    ours = [(m.in_channels, m.out_channels, m.stride) for m in plain.modules() if isinstance(m, nn.Conv2d)]
    theirs = [(m.in_channels, m.out_channels, m.stride) for m in residual.modules() if isinstance(m, nn.Conv2d)]
    assert ours == theirs
    assert parameters(plain) == parameters(residual)


@pytest.mark.quick
def test_plain_networks_have_no_shortcut() -> None:
    torch.manual_seed(0)
    model = reference.cifar_plain(8)
    x = torch.randn(2, 16, 8, 8)
    block = model.layer1[0]
    for unit in block:
        nn.init.zeros_(unit.bn.weight)
    assert not block(x).any()
    with pytest.raises(ValueError, match="one of"):
        reference.plain(20)
    with pytest.raises(ValueError, match="need a shortcut"):
        reference.plain(18, zero_init_residual=True)


@pytest.mark.quick
def test_v1_strides_in_the_first_convolution() -> None:
    with torch.device("meta"):
        v1, v15 = reference.resnet50(variant="v1"), reference.resnet50()
    assert v1.layer2[0].conv1.stride == (2, 2) and v1.layer2[0].conv2.stride == (1, 1)
    assert v15.layer2[0].conv1.stride == (1, 1) and v15.layer2[0].conv2.stride == (2, 2)
    assert shapes(v1) == shapes(v15)
    assert v1.to_empty(device="cpu").eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


@pytest.mark.quick
def test_zero_init_residual_makes_every_block_the_identity() -> None:
    torch.manual_seed(0)
    model = reference.ResNet(reference.Bottleneck, [2], num_classes=3, width=8, zero_init_residual=True)
    x = torch.rand(2, 32, 5, 5)
    torch.testing.assert_close(model.layer1[1](x), x)


@pytest.mark.quick
def test_stochastic_depth_grows_with_depth_and_keeps_the_mean() -> None:
    model = reference.ResNet(
        reference.BasicBlock, [2, 2], num_classes=3, width=8, small_input=True, stochastic_depth_prob=0.4
    )
    blocks = [*model.layer1, *model.layer2]
    assert [b.stochastic_depth_prob for b in blocks] == pytest.approx([0.1, 0.2, 0.3, 0.4])

    torch.manual_seed(0)
    branch = torch.ones(4000, 1, 1, 1)
    kept = reference.blocks.stochastic_depth(branch, 0.4, training=True)
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert kept.mean().item() == pytest.approx(1.0, abs=0.05)
    assert reference.blocks.stochastic_depth(branch, 0.4, training=False) is branch
    assert not reference.blocks.stochastic_depth(branch, 1.0, training=True).any()


@pytest.mark.quick
def test_options_of_the_network() -> None:
    model = reference.resnet18(small_input=True, in_channels=1, width=8, num_classes=5)
    assert model.conv1.weight.shape == (8, 1, 3, 3) and isinstance(model.maxpool, nn.Identity)
    assert model.stem(torch.zeros(2, 1, 9, 9)).shape == (2, 8, 9, 9)
    assert model(torch.zeros(2, 1, 9, 9)).shape == (2, 5)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortcut": "D"}, "shortcut"),
        ({"variant": "v2"}, "variant"),
        ({"stochastic_depth_prob": 1.5}, "between 0 and 1"),
        ({"replace_stride_with_dilation": [True]}, "3 elements"),
        ({"groups": 2}, "BasicBlock only supports groups=1"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        reference.resnet18(**options)


@pytest.mark.quick
def test_weights_from_a_state_dict_and_from_a_file(tmp_path: Any) -> None:
    source = reference.cifar_resnet(8, num_classes=4)
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    torch.save({"model": source.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pth")
    for weights in (source.state_dict(), tmp_path / "bare.pth", str(tmp_path / "checkpoint.pth")):
        model = reference.cifar_resnet(8, weights=weights)
        for key, value in source.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key
    with pytest.raises(RuntimeError, match="size mismatch"):
        reference.cifar_resnet(8, weights=source.state_dict(), num_classes=10)


@pytest.mark.quick
def test_weights_by_torchvisions_name(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = models.ResNet18_Weights.IMAGENET1K_V1
    state = models.resnet18(num_classes=1000).state_dict()
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **_: state)
    for given in (weights, "IMAGENET1K_V1", "DEFAULT", "ResNet18_Weights.IMAGENET1K_V1"):
        model = reference.resnet18(weights=given)
        assert torch.equal(model.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    for given in ("IMAGENET1K_V9", "no/such/file.pth"):
        with pytest.raises(ValueError, match="neither a file nor a name"):
            reference.resnet18(weights=given)
    with pytest.raises(ValueError, match="state dict, a path"):
        reference.resnet18(weights=3)


@pytest.mark.quick
def test_builders_are_documented_and_named() -> None:
    for name in [*FAMILY, "plain", "cifar_resnet", "cifar_plain"]:
        builder = getattr(reference, name)
        assert builder.__name__ == name and inspect.getdoc(builder)
