"""What was tried against ``convert``, and broke it once."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fused_resnet as fr
from fused_resnet.families import structural
from tests.convert.beside import Home, converted, drawn, image, in_interpreter, reasons, same

pytestmark = [pytest.mark.quick, in_interpreter]


# ---------------------------------------------------------------- blocks of torchvision


def tv_block(**options: Any) -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return drawn(torchvision.models.resnet.Bottleneck(8, 2, **options))


def test_frozen_norms_whose_eps_is_zero() -> None:
    """torchvision's pretrained detectors set it so."""
    frozen = pytest.importorskip("torchvision").ops.FrozenBatchNorm2d
    converted(tv_block(norm_layer=functools.partial(frozen, eps=0.0)), image(8, 5), evaluation=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_wider_shortcut_does_not_widen_the_output(dtype: torch.dtype) -> None:
    """The families add to the branch in place, and so in its dtype: float32 into a block under autocast."""
    theirs, x = tv_block().float(), image(8, 5).float()
    ours = copy.deepcopy(theirs)
    fr.convert(ours)
    with torch.autocast("cpu", dtype):
        out, expected = ours(x), theirs(x)
    assert out.dtype == expected.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_frozen_norms_under_autocast_keep_its_dtype() -> None:
    """What we decided: eager's widen to float32, and with them every map that is kept."""
    frozen = pytest.importorskip("torchvision").ops.FrozenBatchNorm2d
    block = tv_block(norm_layer=frozen).float()
    fr.convert(block)
    with torch.autocast("cpu", torch.float16):
        assert block(image(8, 5).float()).dtype == torch.float16


def transforms() -> dict[str, Any]:
    def gradient(block: nn.Module, x: Tensor) -> Any:
        loss = lambda p: torch.func.functional_call(block, p, (x,)).square().sum()  # noqa: E731
        return torch.func.grad(loss)(dict(block.named_parameters()))

    def dual(block: nn.Module, x: Tensor) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(block(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    return {
        "vmap": lambda block, x: torch.vmap(block)(x[None]),
        "grad": gradient,
        "jvp": lambda block, x: torch.func.jvp(block, (x,), (torch.ones_like(x),)),
        "forward AD": dual,
    }


@pytest.mark.parametrize("name", transforms())
def test_functional_transforms_give_eagers_result(name: str) -> None:
    theirs, x = tv_block().eval(), image(8, 5)
    ours = copy.deepcopy(theirs)
    fr.convert(ours)
    torch.testing.assert_close(transforms()[name](ours, x), transforms()[name](theirs, x))


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_trace_of_torchscript_takes_other_sizes() -> None:
    """It holds plain operations, since the kernels' plans are made for one size."""
    theirs = tv_block().eval()
    ours = copy.deepcopy(theirs)
    fr.convert(ours)
    traced = torch.jit.trace(ours, image(8, 6))
    for x in (image(8, 5, batch=3), image(8, 9, batch=1)):
        torch.testing.assert_close(traced(x), theirs(x))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_class_whose_forward_was_replaced(wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    block = tv_block()
    forward = type(block).forward

    def twice(self: nn.Module, x: Tensor) -> Tensor:
        return 2 * forward(self, x)

    monkeypatch.setattr(type(block), "forward", functools.wraps(forward)(twice) if wrapped else twice)
    assert "forward was replaced" in reasons(fr.convert(block))[""]


@pytest.mark.parametrize("stride", [(2, 1), (1, 2)])
def test_a_stride_of_its_own_in_each_direction(stride: tuple[int, int]) -> None:
    """torchvision's blocks take it, and so do ours."""
    theirs = tv_block(
        stride=stride, downsample=nn.Sequential(nn.Conv2d(8, 8, 1, stride, bias=False), nn.BatchNorm2d(8))
    )
    ours = fr.Bottleneck(8, 2, stride, copy.deepcopy(theirs.downsample)).double()
    ours.load_state_dict(theirs.state_dict())
    same(ours, theirs, image(8, 6))
    converted(theirs, image(8, 6), evaluation=False)


def test_random_numbers_are_drawn_in_eagers_order() -> None:
    block = tv_block()
    block.relu = nn.Sequential(nn.ReLU(), nn.Dropout(0.3))
    block.downsample = nn.Dropout(0.3)
    converted(block, image(8, 5))


# ---------------------------------------------------------------- the trial of a block of unknown origin


@pytest.mark.parametrize("attribute, value", [("factor", 0.5), ("with_cp", True), ("bn2", nn.Identity())])
def test_a_setting_changed_after_the_conversion(attribute: str, value: object) -> None:
    block, theirs = drawn(Home()), drawn(Home())
    theirs.load_state_dict(block.state_dict())
    assert len(fr.convert(block).fused_now) == 1
    for module in (block, theirs):
        setattr(module, attribute, copy.deepcopy(value))
    same(block, theirs, image(4, 6), fused=False)
    report = fr.convert(block)
    assert report.converted and not report.fused_now
    fr.revert(block)
    assert vars(block).keys() == vars(theirs).keys()


def test_an_activation_emptied_after_the_conversion() -> None:
    block, theirs = drawn(Home()), drawn(Home())
    theirs.load_state_dict(block.state_dict())
    fr.convert(block)
    for module in (block, theirs):
        module.act = nn.Sequential()
    same(block, theirs, image(4, 6))


class Bounded(Home):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.branch(x) + x)


class BoundedInside(Home):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn2(self.conv2(F.relu6(self.bn1(self.conv1(x))))) + x)


class Wide(Home):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.branch(x) + x * (2 if x.shape[-1] > 32 else 1))


class Asserting(Home):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] % 32 == 0, "multiples of 32"
        return self.act(self.branch(x) + x)


REASONS = {Bounded: "not that of", BoundedInside: "not that of", Wide: "not that of"}
REASONS |= {Asserting: "multiples of 32"}


class Leaving(Home):
    """Of its last output, or of how many there were."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.count, self.outputs = name, 0, []

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.name == "outputs":
            self.outputs.append(out)
        elif self.name == "count":
            self.count += 1
        elif self.name == "conv1.seen":
            self.conv1.seen = out
        else:
            self.last = out
        return out


@pytest.mark.parametrize("name", ["outputs", "count", "last", "conv1.seen"])
def test_what_a_forward_leaves_for_others(name: str) -> None:
    block = Leaving(name)
    assert reasons(fr.convert(block))[""] == f"its forward changes its {name}"
    assert type(block) is Leaving and not block.outputs and block.count == 0


class Checkpointing(Home):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return self.act(checkpoint(self.branch, x, use_reentrant=self.reentrant) + x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_that_checkpoints_under_no_known_name(reentrant: bool) -> None:
    block = Checkpointing()
    block.reentrant = reentrant
    assert reasons(fr.convert(block))[""] == "it checkpoints its activations itself"


@pytest.mark.parametrize("kind", REASONS)
def test_kept(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind().double())
    report = fr.convert(model)
    assert REASONS[kind] in reasons(report)["0"] and type(model[0]) is kind


def test_a_third_convolution_that_is_none() -> None:
    block = drawn(Home())
    block.conv3 = None
    converted(block, image(4, 6))


def test_a_block_that_checkpoints_keeps_doing_so() -> None:
    block = Home()
    block.with_cp = True
    assert "checkpoints its activations" in reasons(fr.convert(block))[""]


class Owner:
    """Not to be copied: what a hook's method may belong to."""

    def __init__(self) -> None:
        self.calls = 0

    def hook(self, *_: object) -> None:
        self.calls += 1

    def __deepcopy__(self, memo: object) -> None:
        raise AssertionError("copied")


def test_the_trial_calls_no_hook_and_seeds_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    owner, block = Owner(), Home()
    block.register_forward_hook(owner.hook)
    block.register_full_backward_hook(owner.hook)
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    assert fr.convert(block).fused_now
    assert owner.calls == 0 and not seeded and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, functools.partial(torch.device, "meta")])
def test_the_trial_under_any_mode(mode: Any) -> None:
    block = Home()
    with mode():
        assert fr.convert(block).fused_now


def test_the_trial_leaves_the_dtypes_and_the_memory_of_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values are drawn anyway: none is copied, from a GPU for instance."""
    block = Home().half()
    pointers = [t.data_ptr() for t in block.parameters()]
    monkeypatch.setattr(Tensor, "__deepcopy__", lambda *_: pytest.fail("copied"))
    assert structural.why_not(block) is None
    assert [t.data_ptr() for t in block.parameters()] == pointers


# ---------------------------------------------------------------- what the report says


def test_converted_again_after_something_else_changed_the_class() -> None:
    """As ``fully_shard`` does: the blocks run fused, and so they are in the report, but cannot be restored."""
    block = Home()
    fr.convert(block)
    block.__class__ = kind = type("FSDPHome", (type(block),), {})
    report = fr.convert(block)
    assert [name for name, _ in report.fused_now] == [""] and type(block) is kind
    assert fr.revert(block).kept and type(block) is kind


def test_converted_again_with_a_lasting_obstacle() -> None:
    """A bias: the block runs child by child, and what was proven of it is not forgotten."""
    block, theirs = drawn(Home()), drawn(Home())
    theirs.load_state_dict(block.state_dict())
    fr.convert(block)
    bias, block.conv1.bias = block.conv1.bias, nn.Parameter(torch.zeros(4))
    report = fr.convert(block)
    assert "bias" in dict(report.converted)[""] and not report.fused_now
    block.conv1.bias = bias
    for module in (block, theirs):
        module.factor = 3.0
    same(block, theirs, image(4, 6), fused=False)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_stem_that_is_not_reached_is_not_reported_as_fused(library: str) -> None:
    pytest.importorskip(library)
    model, method = networks()[library]
    for change in ([lambda: model.set_grad_checkpointing()] if library == "timm" else []) + [
        lambda: setattr(model, method, lambda x: x)
    ]:
        change()
        report = fr.convert(model)
        assert "" in dict(report.converted) and "" not in dict(report.fused_now)
        fr.revert(model)


def networks() -> dict[str, tuple[nn.Module, str]]:
    import timm
    import torchvision

    return {
        "torchvision": (torchvision.models.resnet18(), "_forward_impl"),
        "timm": (timm.create_model("resnet18"), "forward_features"),
    }


# ---------------------------------------------------------------- PyTorch around a converted block


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("kind", ["torchvision", "timm SE", "structure"])
def test_compiled_in_one_graph(kind: str, training: bool) -> None:
    if kind == "timm SE":
        timm = pytest.importorskip("timm")
        theirs = drawn(timm.models.resnet.Bottleneck(8, 2, attn_layer="se", drop_path=timm.layers.DropPath(0.5)))
    else:
        theirs = drawn(Home(8)) if kind == "structure" else tv_block()
    ours = copy.deepcopy(theirs)
    fr.convert(ours)
    torch._dynamo.reset()
    ours.compile(fullgraph=True, backend="aot_eager")
    same(ours.train(training), theirs.train(training), image(8, 6))


def test_edits_after_compilation() -> None:
    theirs, x = drawn(Home()), image(4, 6)
    ours = copy.deepcopy(theirs)
    fr.convert(ours)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for name, value in (("act", nn.SiLU()), ("factor", 0.5), ("factor", 1.0), ("bn2", nn.Identity())):
        for block in (ours, theirs):
            setattr(block, name, copy.deepcopy(value))
        torch.testing.assert_close(compiled(x), theirs(x))


def test_feature_extraction_and_checkpointing() -> None:
    torchvision = pytest.importorskip("torchvision")
    resnet = torchvision.models.resnet
    theirs = drawn(resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=3, width_per_group=4))
    ours, x = copy.deepcopy(theirs), image(3, 32)
    fr.convert(ours)
    extract = torchvision.models.feature_extraction.create_feature_extractor
    torch.testing.assert_close(*(extract(net, {"layer2": "out"})(x)["out"] for net in (ours, theirs)))
    for net in (ours, theirs):
        net.layer1.forward = functools.partial(checkpoint, net.layer1.forward, use_reentrant=False)
    same(ours, theirs, x)
