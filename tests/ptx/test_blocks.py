"""Whole bottlenecks with the tiles that were measured for ResNet-50 on an H100, compiled for it and run on the CPU.

Run where ``FUSED_RESNET_EMULATE`` names a compute capability (tests/test_compiled.py does): real widths, few pixels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

import fused_resnet as fr
from benchmarks.problems import layers
from fused_resnet.plan import tables
from fused_resnet.plan.problem import ConvProblem
from fused_resnet.plan.target import assume
from tests.conftest import EMULATED
from tests.staged_case import image
from tests.whole_block import PLANNED_FOR, Block, bottleneck

pytestmark = pytest.mark.skipif(not EMULATED, reason="FUSED_RESNET_EMULATE names no compute capability")

# input channels, width, stride, images, pixels
BLOCKS = {
    "layer1.0": (64, 64, 1, 2, 9),
    "layer1.1": (256, 64, 1, 2, 9),
    "layer2.0": (256, 128, 2, 2, 10),
    "layer2.1": (512, 128, 1, 2, 7),
    "layer3.0": (512, 256, 2, 2, 8),
    "layer3.1": (1024, 256, 1, 3, 6),
    "layer4.0": (1024, 512, 2, 2, 8),
    "layer4.1": (2048, 512, 1, 4, 5),
}


@pytest.fixture(autouse=True)
def measured_tiles(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A layer takes what was measured for the layer of ResNet-50 with its channels, whatever its pixels.

    Whether there was anything, of each question.
    """
    known = {_kind(found.problem): found.problem for found in layers(50)}
    lookup, answers = tables.lookup, []

    def measured(problem: ConvProblem, *rest: Any) -> tables.Entry | None:
        real = known.get(_kind(problem))
        entry = lookup(problem if real is None else replace(real, dtype=problem.dtype), *rest)
        answers.append(entry is not None)
        return entry

    monkeypatch.setattr(tables, "lookup", measured)
    return answers


def _kind(p: ConvProblem) -> tuple[Any, ...]:
    return p.Ci, p.Co, p.R, p.S, p.stride


def block(name: str, dtype: torch.dtype) -> Block:
    ci, p, stride, n, pixels = BLOCKS[name]
    return bottleneck(dtype, ci, p, 4 * p, stride, (n, pixels, pixels))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in BLOCKS), ("layer1.0", torch.float16), ("layer3.1", torch.float16)],
    ids=str,
)
def test_what_auto_chooses(name: str, dtype: torch.dtype, measured_tiles: list[bool]) -> None:
    """The rule, on every block of ResNet-50 as it would be launched."""
    with fr.record_launches() as launches:
        block(name, dtype).check("auto", strict=False)
    assert any(measured_tiles) == (EMULATED == 90)
    assert sum(not launch.kernel.startswith("vendor") for launch in launches) > 10


@pytest.mark.parametrize("name", ["layer4.0", "layer4.1"])
def test_the_widest_gram_matrix(name: str) -> None:
    block(name, torch.bfloat16).check("gram")


@pytest.mark.parametrize("name", ["layer1.1", "layer2.0"])
def test_the_staged_route(name: str) -> None:
    block(name, torch.bfloat16).check("staged")


def test_a_network_and_its_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stem, a block of each width and head under autocast: the third step is replayed, to the last bit."""
    run, through_triton = JITFunction.run, []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        through_triton.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    torch.manual_seed(1)
    models = [
        fr.ResNet(fr.Bottleneck, [1, 1, 1, 1], num_classes=10),
        fr.reference.ResNet(fr.reference.Bottleneck, [1, 1, 1, 1], num_classes=10),
    ]
    models[1].load_state_dict(models[0].state_dict())
    x, losses, grads, counts = image(2, 3, 48, 48, dtype=torch.float32, seed=1), [], [], []
    for model in (*[models[0]] * 3, models[1]):
        model.to(memory_format=torch.channels_last).zero_grad()
        with torch.autocast("cpu", torch.bfloat16), assume(PLANNED_FOR):
            loss = model(x).float().square().mean()
        with assume(PLANNED_FOR):
            loss.backward()
        losses.append(loss.item())
        counts.append(len(through_triton))
        grads.append([p.grad.clone() for p in model.parameters()])
    assert 0 < counts[0] < counts[1] == counts[2]
    assert losses[0] == losses[1] == losses[2] and all(map(torch.equal, grads[0], grads[2]))
    assert losses[0] == pytest.approx(losses[3], rel=0.05)
