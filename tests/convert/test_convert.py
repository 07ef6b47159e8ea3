"""``convert`` and ``revert``: what they touch, what they keep and say, and what survives them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

import fused_resnet as fr
from tests.convert.beside import drawn, image, in_interpreter, reasons, results, same

resnet = pytest.importorskip("torchvision.models.resnet")
pytestmark = [pytest.mark.quick, in_interpreter]


def stage(*blocks: nn.Module) -> nn.Sequential:
    """Two blocks and a head."""
    blocks = blocks or (resnet.BasicBlock(6, 6), resnet.Bottleneck(6, 2, downsample=nn.Conv2d(6, 8, 1)))
    return drawn(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def anatomy(model: nn.Module) -> list[tuple[str, object, dict[str, object]]]:
    """Every module with its class and all that it holds; containers by what they hold."""

    def opened(value: object) -> object:
        return dict(value) if isinstance(value, dict) else value

    return [(n, m, {"class": type(m), **{k: opened(v) for k, v in vars(m).items()}}) for n, m in model.named_modules()]


def assert_identical(model: nn.Module, before: list[tuple[str, object, dict[str, object]]]) -> None:
    for (name, module, held), (old_name, old, old_held) in zip(anatomy(model), before, strict=True):
        assert name == old_name and module is old and list(held) == list(old_held)
        for key, value in held.items():
            if isinstance(value, dict):
                assert list(value) == list(old_held[key]), (name, key)
                assert all(v is old_held[key][k] for k, v in value.items()), (name, key)
            else:
                assert value is old_held[key], (name, key)


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
}


class TestThereAndBack:
    def test_every_object_is_the_same(self) -> None:
        model = stage()
        x = image(6, 5)
        model(x).sum().backward()
        model[0].register_forward_hook(lambda module, inputs, out: None)
        before, out = anatomy(model), model.eval()(x)
        assert len(fr.convert(model.train(), recompute=("y1",)).converted) == 2
        fr.revert(model)
        assert_identical(model, before)
        assert torch.equal(model.eval()(x), out)

    def test_converted_the_held_objects_are_the_same(self) -> None:
        model = stage()
        before = anatomy(model)
        fr.convert(model)
        for (_, module, held), (_, old, old_held) in zip(anatomy(model), before, strict=True):
            assert module is old and list(held) == list(old_held)
            assert {k for k in held if held[k] != old_held[k]} <= {"class"}

    def test_the_optimizer_goes_on(self) -> None:
        """Three steps with a conversion and a reversion between them are those of the model as it was."""
        ours = stage()
        theirs = copy.deepcopy(ours)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (ours, theirs)]
        x = image(6, 5)
        for change in (lambda: None, lambda: fr.convert(ours), lambda: fr.revert(ours)):
            change()
            for model, optimizer in zip((ours, theirs), optimizers, strict=True):
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other)
            momenta = [optimizers[i].state[p]["momentum_buffer"] for i, p in ((0, mine), (1, other))]
            torch.testing.assert_close(*momenta)

    def test_edits_between_survive(self) -> None:
        model = stage()
        fr.convert(model)
        model[0].conv1.stride = (2, 2)
        model[0].mark = "mine"
        model[1].conv2 = nn.Conv2d(2, 2, 3, padding=1, groups=2).double()
        edited = model[1].conv2
        handle = model[1].register_forward_hook(lambda module, inputs, out: out * 2)
        report = fr.revert(model)
        assert [name for name, _ in report.converted] == ["0", "1"] and not report.kept
        assert type(model[0]) is resnet.BasicBlock and type(model[1]) is resnet.Bottleneck
        assert model[0].conv1.stride == (2, 2) and model[0].mark == "mine" and model[1].conv2 is edited
        assert handle.id in model[1]._forward_hooks

    def test_a_method_kept_from_the_time_between_goes_on(self) -> None:
        """As wrappers keep it that checkpoint a block, or time it."""
        model = stage()
        theirs = copy.deepcopy(model)
        fr.convert(model)
        for block in model[:2]:
            block.forward = lambda x, kept=block.forward: kept(x)
        fr.revert(model)
        same(model, theirs, image(6, 5), fused=False)

    def test_twice_is_once(self) -> None:
        model = stage()
        first, second = fr.convert(model), fr.convert(model)
        assert first == second
        kinds = [type(block) for block in model]
        assert len(fr.revert(model).converted) == 2 and fr.revert(model) == fr.Report()
        fr.convert(model)
        assert [type(block) for block in model] == kinds

    def test_a_class_that_something_else_changed_is_left_to_it(self) -> None:
        model = stage()
        fr.convert(model)
        block = model[0]
        block.__class__ = type("Wrapped", (type(block),), {})
        report = fr.revert(model)
        assert reasons(report) == {"0": "its class was changed to Wrapped since"}
        assert [name for name, _ in report.converted] == ["1"]

    def test_our_own_blocks_are_nobodys_to_revert(self) -> None:
        model = nn.Sequential(fr.BasicBlock(6, 6))
        assert fr.convert(model) == fr.Report(kept=[("0", "it is fused already")])
        assert fr.revert(model) == fr.Report()
        assert type(model[0]) is fr.BasicBlock


class TestReport:
    def test_its_table(self) -> None:
        class Mine(resnet.BasicBlock):
            pass

        model = stage(resnet.BasicBlock(6, 6), Mine(6, 6), resnet.BasicBlock(6, 6))
        model[2].conv1.register_forward_hook(lambda module, inputs, out: None)
        report = fr.convert(model)
        assert [name for name, _ in report.converted] == ["0", "2"]
        assert report.fused_now == [("0", "one operation")]
        assert str(report).splitlines() == [
            "module",
            "0       fused      one operation",
            "2       converted  Conv2d carries hooks or another forward",
            "1       kept       Mine is a subclass of torchvision.models.resnet.BasicBlock",
            "2 converted, 1 of them fused now, 1 kept",
        ]

    def test_of_a_model_without_blocks(self) -> None:
        assert str(fr.convert(nn.Linear(2, 2))) == "no residual block found"

    def test_an_example_asks_the_planner(self) -> None:
        """float64 on a CPU runs in the interpreter, bfloat16 does not."""
        for dtype, fused in ((torch.float64, True), (torch.bfloat16, False)):
            model = nn.Sequential(resnet.BasicBlock(6, 6)).to(dtype)
            state = copy.deepcopy(model.state_dict())
            report = fr.convert(model, example_input=torch.randn(2, 6, 5, 5, dtype=dtype))
            assert [name for name, _ in report.converted] == ["0"]
            assert [name for name, _ in report.fused_now] == (["0"] if fused else [])
            assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())

    def test_hooks_at_the_time_are_passing(self) -> None:
        """Converted and not fused now: once the hook has gone the block is fused."""
        ours = stage()
        theirs = copy.deepcopy(ours)
        handle = ours[0].bn1.register_forward_hook(lambda module, inputs, out: None)
        prune.l1_unstructured(ours[1].conv2, "weight", amount=0.5)
        report = fr.convert(ours)
        assert len(report.converted) == 2 and not report.fused_now
        handle.remove()
        same(ours[0], theirs[0], image(6, 5))
        prune.remove(ours[1].conv2, "weight")
        with fr.record_launches() as launches:
            ours[1](image(6, 5))
        assert launches

    def test_hooks_afterwards(self) -> None:
        ours = stage(resnet.BasicBlock(6, 6))
        theirs = copy.deepcopy(ours)
        fr.convert(ours)
        for block in (ours[0], theirs[0]):
            block.conv2.register_forward_hook(lambda module, inputs, out: out * 0.5)
        same(ours, theirs, image(6, 5), fused=False)


class TestKept:
    def kept(self, model: nn.Module) -> dict[str, str]:
        kinds = [type(module) for module in model.modules()]
        report = fr.convert(model)
        assert not report.converted and [type(module) for module in model.modules()] == kinds
        return reasons(report)

    def test_shared_blocks(self) -> None:
        block = resnet.BasicBlock(6, 6)
        assert self.kept(nn.Sequential(block, block)) == {"0": "it is used in several places"}

    def test_a_replaced_forward(self) -> None:
        block = resnet.BasicBlock(6, 6)
        block.forward = block.conv1.forward
        assert self.kept(nn.Sequential(block)) == {"0": "its forward was replaced"}

    def test_sharded_blocks(self) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            model = nn.Sequential(fully_shard(resnet.BasicBlock(6, 6)))
            assert self.kept(model) == {"0": "FSDP has wrapped it; convert before"}
        finally:
            dist.destroy_process_group()

    def test_synchronised_norms(self) -> None:
        """Before the conversion and after, where there is no process group: BatchNorm, as PyTorch has it."""
        theirs = stage(resnet.BasicBlock(6, 6))
        before, after = copy.deepcopy(theirs), copy.deepcopy(theirs)
        before = nn.SyncBatchNorm.convert_sync_batchnorm(before)
        blocks = list(before)
        assert len(fr.convert(before).fused_now) == len(fr.convert(after).fused_now) == 1
        after = nn.SyncBatchNorm.convert_sync_batchnorm(after)
        for ours in (before, after):
            beside = copy.deepcopy(theirs)
            same(ours, beside, image(6, 5))
            fr.revert(ours)
            same(ours, beside, image(6, 5), fused=False)
        assert all(a is b for a, b in zip(before, blocks, strict=True))

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script")
    def test_a_scripted_model_is_refused(self) -> None:
        with pytest.raises(TypeError, match="scripted"):
            fr.convert(torch.jit.script(nn.Sequential(nn.ReLU())))

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script")
    def test_scripting_a_converted_one_says_why_not(self) -> None:
        model = stage()
        fr.convert(model)
        with pytest.raises(RuntimeError, match=r"FusedBasicBlock runs Triton kernels.*torch\.export"):
            torch.jit.script(model)


@pytest.mark.parametrize("action", [fr.convert, fr.revert, fr.fold], ids=lambda action: action.__name__)
@pytest.mark.parametrize(
    "wrong", [None, "resnet50", resnet.ResNet, [nn.ReLU()]], ids=lambda wrong: type(wrong).__name__
)
def test_what_is_no_model(wrong: object, action: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match=f"takes a torch.nn.Module, got a {type(wrong).__name__}"):
        action(wrong)


@pytest.mark.parametrize("wrong", ["x", (1, 3, 8, 8), ()], ids=str)
def test_a_wrong_example_leaves_the_model_as_it_was(wrong: object) -> None:
    model = stage()
    with pytest.raises(TypeError, match="example_input must be"):
        fr.convert(model, example_input=wrong)
    assert type(model[0]) is resnet.BasicBlock


class TestCopies:
    @pytest.mark.parametrize("name", COPIES)
    def test_a_copy_is_converted_too(self, name: str) -> None:
        model = stage()
        theirs = copy.deepcopy(model)
        fr.convert(model, recompute=("y1",))
        twin = COPIES[name](model)
        assert [type(block) for block in twin] == [type(block) for block in model]
        assert twin[0].recompute == ("y1",)
        same(twin, theirs, image(6, 5))
        assert len(fr.revert(twin).converted) == 2 and type(twin[0]) is resnet.BasicBlock
        assert type(model[0]) is not resnet.BasicBlock

    def test_state_dicts_both_ways(self) -> None:
        ours, theirs = stage(), stage()
        fr.convert(ours)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        same(ours, theirs, image(6, 5))
        file = io.BytesIO()
        torch.save(ours.state_dict(), file)
        file.seek(0)
        theirs.load_state_dict(torch.load(file, weights_only=True))


class TestOptions:
    def test_they_become_attributes_that_revert_removes(self) -> None:
        model = stage()
        theirs = copy.deepcopy(model)
        fr.convert(model, recompute=("y1",))
        assert all(vars(model[i])["recompute"] == ("y1",) and "keep" not in vars(model[i]) for i in (0, 1))
        same(model, theirs, image(6, 5))
        fr.revert(model)
        assert not {"recompute", "keep"} & {*vars(model[0]), *vars(model[1])}

    def test_unknown_ones_change_nothing(self) -> None:
        model = stage()
        with pytest.raises(ValueError, match="y7"):
            fr.convert(model, recompute=("y7",))
        assert type(model[0]) is resnet.BasicBlock


def test_a_block_alone_is_a_model() -> None:
    block = drawn(resnet.BasicBlock(6, 6))
    theirs = copy.deepcopy(block)
    assert fr.convert(block).fused_now == [("", "one operation")]
    same(block, theirs, image(6, 5))


def test_the_outputs_memory_format_is_the_inputs() -> None:
    block = drawn(resnet.BasicBlock(6, 6))
    fr.convert(block)
    x = image(6, 5)
    assert block(x).is_contiguous()
    assert block(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_results_without_gradients() -> None:
    """A part that is frozen gets none, its input's gradient flows on."""
    ours = stage(resnet.BasicBlock(6, 6), resnet.BasicBlock(6, 6))
    for p in ours[0].parameters():
        p.requires_grad_(False)
    theirs = copy.deepcopy(ours)
    fr.convert(ours)
    same(ours, theirs, image(6, 5))
    found: dict[str, Tensor | None] = results(ours, image(6, 5))
    assert found["0.conv1.weight"] is None and found["1.conv1.weight"] is not None


def test_our_own_blocks_are_named_as_fused_already() -> None:
    report = fr.convert(fr.cifar_resnet(8))
    assert [name for name, _ in report.kept] == ["layer1.0", "layer2.0", "layer3.0"] and not report.converted
    assert {why for _, why in report.kept} == {"it is fused already"}
