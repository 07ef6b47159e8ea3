"""What was checked and planned once is found again for the same kind of call, and for no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import functional
from fused_resnet.alike import LIMIT, Kinds
from fused_resnet.plan import tables

pytestmark = pytest.mark.quick

Block = fr.Bottleneck
Edit = Callable[[Block, Tensor], Tensor]


def made() -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    block, x = Block(16, 4), torch.randn(2, 16, 4, 3)
    for _ in range(3):
        block(x).sum().backward()
    return block, x


def attribute(name: str, value: object) -> Edit:
    def edit(block: Block, x: Tensor) -> Tensor:
        owner, _, last = name.rpartition(".")
        setattr(block.get_submodule(owner), last, value)
        return x

    return edit


def frozen(block: Block, x: Tensor) -> Tensor:
    block.requires_grad_(False)
    return x


def in_double(block: Block, x: Tensor) -> Tensor:
    block.double()
    return x.double()


def in_nhwc(block: Block, x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def strided_weight(block: Block, x: Tensor) -> Tensor:
    block.bn2.weight.data = torch.rand(8)[::2]
    return x


EDITS: dict[str, Edit] = {
    "nothing": lambda block, x: x,
    "eps": attribute("bn1.eps", 0.1),
    "momentum": attribute("bn3.momentum", 0.9),
    "no running statistics": attribute("bn2.track_running_stats", False),
    "one layer frozen": attribute("bn2.training", False),
    "stride": attribute("conv2.stride", (1, 1)),
    "padding and dilation": lambda block, x: attribute("conv2.padding", (2, 2))(
        block, attribute("conv2.dilation", (2, 2))(block, x)
    ),
    "all frozen": lambda block, x: (block.eval(), x)[1],
    "nothing trains": frozen,
    "double": in_double,
    "another size": lambda block, x: x[:, :, :3],
    "strided": lambda block, x: torch.randn(2, 16, 4, 6)[..., ::2],
    "channels last": in_nhwc,
    "strided gamma": strided_weight,
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_between_two_calls(name: str) -> None:
    results: list[list[Tensor]] = []
    for forgets in (True, False):
        block, x = made()
        x = EDITS[name](block, x).detach().requires_grad_(name != "nothing trains")
        if forgets:
            tables.forget_plans()
            fr.launch.replay.forget()
        out = block(x)
        if out.requires_grad:
            out.square().sum().backward()
        state = [*block.state_dict().values(), *(p.grad for p in block.parameters() if p.grad is not None)]
        results.append([out, *state, *([] if x.grad is None else [x.grad])])
        assert out.requires_grad == (name != "nothing trains")
    for found_again, anew in zip(*reversed(results), strict=True):
        assert torch.equal(found_again, anew) and found_again.stride() == anew.stride()


@pytest.mark.parametrize(
    ("module", "data", "error"),
    [
        ("conv1", lambda t: t.half(), TypeError),
        ("conv2", lambda t: torch.randn(4, 5, 3, 3), ValueError),
        ("bn1", lambda t: torch.randn(5), ValueError),
        ("bn3", lambda t: t.long(), TypeError),
    ],
)
def test_data_that_do_not_fit_any_more(module: str, data: Callable[[Tensor], Tensor], error: type[Exception]) -> None:
    block, x = made()
    before = [t.clone() for t in block.buffers()]
    weight = block.get_submodule(module).weight
    assert isinstance(weight, nn.Parameter)
    if error is TypeError and module == "bn3":
        weight.requires_grad_(False)
    weight.data = data(weight.data)
    with pytest.raises(error, match=module.replace("bn", "conv")):
        block(x)
    assert all(torch.equal(t, old) for t, old in zip(block.buffers(), before, strict=True))


def test_a_route_and_a_context_are_part_of_the_call() -> None:
    block, x = made()
    for route, kernel in (("staged", "bn_act_kernel"), ("gram", "gram_kernel"), ("reference", None)):
        with fr.use_route(route), fr.record_launches() as launches:
            block(x)
        names = {launch.kernel for launch in launches}
        assert kernel in names if kernel else not names
    with torch.no_grad():
        assert block(x).grad_fn is None
    assert block(x).grad_fn is not None
    with torch.autocast("cpu", dtype=torch.float16), fr.use_route("staged"):
        assert block(x.half()).dtype == torch.float16
    with pytest.raises(TypeError, match="use autocast"):
        block(x.half())
    assert block(x).dtype == torch.float32


def test_checking_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = made()
    monkeypatch.setattr(functional, "check_chain", lambda *_: pytest.fail("checked again"))
    block(x)


def test_one_weight_in_two_places_is_looked_at_each_time() -> None:
    block, x = made()
    block.bn1.weight = block.bn2.weight
    kept = sum(len(each) for each in functional._settled._found.values())
    for _ in range(3):
        block(x)
    assert sum(len(each) for each in functional._settled._found.values()) == kept


def test_kinds_without_end_are_forgotten() -> None:
    kinds: Kinds[int] = Kinds(aligned=True)
    t = torch.zeros(1)
    for key in range(LIMIT):
        kinds.remember(key, [t], key)
    assert kinds.find(0, [t]) == 0
    kinds.remember(LIMIT, [t], LIMIT)
    assert kinds.find(0, [t]) is None and kinds.find(LIMIT, [t]) == LIMIT


@pytest.mark.parametrize("name", ["momentum", "eps"])
@pytest.mark.parametrize("kind", [lambda: Block(16, 4), lambda: fr.Stem(16, 8), lambda: fr.BNAddReLU(16)])
def test_a_number_in_a_tensor_that_is_edited(name: str, kind: Callable[[], nn.Module]) -> None:
    """PyTorch's BatchNorm takes its momentum and eps as tensors, too."""
    results = []
    for route in ("auto", "reference"):
        torch.manual_seed(0)
        block, x = kind().double(), torch.randn(2, 16, 4, 3, dtype=torch.float64)
        norm = next(module for module in block.modules() if isinstance(module, nn.BatchNorm2d))
        number = torch.tensor(0.1)
        setattr(norm, name, number)
        with fr.use_route(route):
            for value in (0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.2):
                number.fill_(value)
                out = block(x)
        results.append([out, norm.running_mean, norm.running_var])
    torch.testing.assert_close(*results)
