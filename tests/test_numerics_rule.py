"""The rule itself: it lets every correct way of computing conv-BN-ReLU pass, and refuses each planted bug.

The candidate here is an emulation of the fused path in plain PyTorch: 16-bit operands, float32 accumulators, values
rounded where the kernels store them. ``tests/test_planted_bugs.py`` plants the same kind of bug in the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import numerics

pytestmark = pytest.mark.quick

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """A conv-BN-ReLU to emulate. Few rows, so that what is lost per row or per tile weighs something."""

    rows: tuple[int, int, int] = (4, 8, 8)
    kernel: int = 3
    dtype: torch.dtype = torch.bfloat16
    ci: int = 32
    co: int = 48
    mean: float = 0.5
    seed: int = 0

    def tensors(self) -> tuple[Tensor, numerics.Layer, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        n, h, w = self.rows
        fan_in = self.ci * self.kernel**2
        layer = numerics.Layer(
            weight=(randn(self.co, self.ci, self.kernel, self.kernel) * fan_in**-0.5).to(self.dtype),
            gamma=1 + 0.3 * randn(self.co),
            beta=0.3 * randn(self.co),
            padding=(self.kernel // 2, self.kernel // 2),
            eps=EPS,
        )
        return (randn(n, self.ci, h, w) + self.mean).to(self.dtype), layer, randn(n, self.co, h, w).to(self.dtype)


def truncated(t: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 to 16 bits towards zero."""
    drop = 16 if dtype == torch.bfloat16 else 13
    return (t.float().view(torch.int32) >> drop << drop).view(torch.float32).to(dtype)


def fused(x: Tensor, layer: numerics.Layer, dout: Tensor, bug: str = "", order: str = "") -> dict[str, Any]:
    """The staged path, forward and backward. ``order`` changes what may be changed, ``bug`` what may not."""
    dtype = x.dtype
    cast = truncated if bug == "truncating casts" else Tensor.to
    wide = torch.float64 if order == "wide" else torch.float32
    weight, gamma, beta = layer.weight.to(wide), layer.gamma.to(wide), layer.beta.to(wide)
    eps = 1e-3 if bug == "wrong eps" else layer.eps

    y = cast(F.conv2d(x.to(wide), weight, padding=layer.padding), dtype)
    if bug == "one wrong pixel":
        y[-1, 3, 2, 2] += y.abs().max()
    if bug == "a lost last tile":
        y[-1, :, -1, -2:] = 0
    values = y.to(wide)
    rows = y.numel() // y.shape[1]
    tiles = list(values.permute(0, 2, 3, 1).reshape(rows, -1).split(48 if order != "one tile" else rows))
    count = torch.tensor([float(len(t)) for t in tiles], dtype=wide)[:, None]
    if bug == "a wrong count in the merge":
        count[-1] = count[0]
    means = torch.stack([t.mean(0) for t in tiles])
    mean = (means * count).sum(0) / count.sum()
    m2 = torch.stack([(t - t.mean(0)).square().sum(0) for t in tiles])
    if bug != "a merge without the means' spread":
        m2 = m2 + count * (means - mean).square()
    var = m2.sum(0) / (rows - 1 if bug == "unbiased variance" else rows)
    rstd = (var + eps).rsqrt()
    scale, shift = gamma * rstd, beta - mean * gamma * rstd
    if bug == "bfloat16 scale":
        scale, shift = scale.to(dtype).to(wide), shift.to(dtype).to(wide)

    def rows_of(v: Tensor) -> Tensor:
        return v[None, :, None, None]

    pre = values * rows_of(scale) + rows_of(shift)
    z = cast(pre.relu(), dtype)
    mask = numerics.relu_mask(pre)
    if bug == "the mask of the unnormalised values":
        mask = values > 0
    if bug == "no mask":
        mask = torch.ones_like(mask)

    dz = torch.where(mask, dout.to(wide), 0.0)
    dbeta = dz.sum((0, 2, 3))
    centred = (dz * (values - rows_of(mean))).sum((0, 2, 3))
    if bug == "bfloat16 accumulation":
        dbeta = dz.to(dtype).flatten(2).permute(0, 2, 1).flatten(0, 1).cumsum(0, dtype=dtype)[-1].to(wide)
    dgamma = rstd * centred
    a = gamma * rstd
    b = -a * rstd * dgamma / rows
    if bug == "a missing xhat term":
        b = torch.zeros_like(b)
    c = -a * dbeta / rows - b * mean
    if bug == "a missing mean term":
        c = -b * mean
    dy = cast(rows_of(a) * dz + rows_of(b) * values + rows_of(c), dtype)
    if bug == "a shifted tap":
        weight = weight.roll(1, dims=3)
    dx = cast(torch.nn.grad.conv2d_input(x.shape, weight, dy.to(wide), padding=layer.padding), dtype)
    dw = torch.nn.grad.conv2d_weight(x.to(wide), weight.shape, dy.to(wide), padding=layer.padding)
    if bug == "dx = 0":
        dx = torch.zeros_like(dx)
    results = {"z": z, "dx": dx, "dw0": dw, "dgamma0": dgamma, "dbeta0": dbeta}
    return {k: v.to(torch.float32 if v.dtype == torch.float64 else v.dtype) for k, v in results.items()} | {
        "masks": [numerics.relu_mask(pre)]
    }


def verdict(case: Case, bug: str = "", order: str = "") -> list[numerics.Score]:
    x, layer, dout = case.tensors()
    candidate = fused(x, layer, dout, bug, order)
    return numerics.check_chain(candidate, candidate["masks"], x, [layer], dout)


BASE = Case()
CASES = {
    "3x3": BASE,
    "1x1": replace(BASE, kernel=1, rows=(3, 7, 9)),
    "float16": replace(BASE, dtype=torch.float16),
    "float32": replace(BASE, dtype=torch.float32),
    "one image, large mean": replace(BASE, rows=(1, 6, 5), mean=5.0),
}

BUGS = [
    "unbiased variance",
    "wrong eps",
    "truncating casts",
    "no mask",
    "the mask of the unnormalised values",
    "a missing xhat term",
    "a missing mean term",
    "bfloat16 accumulation",
    "bfloat16 scale",
    "one wrong pixel",
    "a lost last tile",
    "a wrong count in the merge",
    "a merge without the means' spread",
    "a shifted tap",
    "dx = 0",
]


@pytest.mark.parametrize("order", ["", "one tile", "wide"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_correct_variants_pass(case, seed, order):
    verdict(replace(case, seed=seed), order=order)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_refused(bug, seed):
    """By one of the cases at least; the tests of the kernels run all of them."""
    refusals = []
    for name, case in CASES.items():
        if case.dtype == torch.float32 and bug == "truncating casts":
            continue
        try:
            verdict(replace(case, seed=seed), bug)
        except AssertionError as error:
            refusals.append((name, str(error).splitlines()[0]))
    assert refusals, f"the rule lets '{bug}' pass"


def test_each_part_of_the_rule_refuses_what_it_is_for():
    generator = torch.Generator().manual_seed(0)
    oracle = torch.randn(4, 64, 16, 16, generator=generator).double()
    eager = oracle.bfloat16()
    noise = (eager.double() - oracle).abs()

    def failures(candidate: Tensor, baseline: Tensor = eager, **options: Any) -> set[str]:
        result = numerics.score(candidate.bfloat16(), baseline, oracle, "z", **options)
        return {failure.split(":")[0] for failure in result.failures}

    assert failures(eager) == set()
    assert "R" in failures(oracle + 1.2 * noise)
    assert failures(oracle * 1.02, (oracle * 1.02).bfloat16(), signed=False) == {"A"}, "a poor baseline excuses nothing"
    one = oracle.clone()
    one[1, 2, 3, 4] += 4.0
    assert "M" in failures(one)
    channel = oracle.clone()
    channel[:, 5] *= 1 + 2**-8
    assert failures(channel) == {"C"}
    assert "B" in failures(oracle + 2**-11)
    assert failures(oracle + 2**-11, signed=False) == set()
    poisoned = oracle.clone()
    poisoned[0, 0, 0, 0] = torch.nan
    assert any("not finite" in f for f in failures(poisoned))


def test_shapes_must_agree_and_empty_results_pass():
    empty = torch.empty(0, 3, 4, 4)
    assert numerics.check(empty, empty, empty.double(), "z").ok
    with pytest.raises(AssertionError, match="shapes"):
        numerics.check(torch.ones(3), torch.ones(3), torch.ones(1).double(), "dbeta")


def test_the_message_is_a_table():
    oracle = torch.randn(64, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"rel\. RMS(.|\n)*dgamma0.*R: "):
        numerics.check(torch.zeros(64), oracle.float(), oracle, "dgamma0")


def test_the_mask_is_teacher_forced():
    """Flipping a mask near zero is not an error; ignoring it is."""
    x, layer, dout = replace(BASE, dtype=torch.float32).tensors()
    own = numerics.chain(x, [layer], dout, dtype=torch.float64)
    flipped = [own["masks"][0] ^ (torch.rand(dout.shape) < 0.01)]
    forced = numerics.oracle_chain(x, [layer], dout, flipped)
    assert torch.equal(forced["z"], own["z"])
    assert not torch.allclose(forced["dx"], own["dx"])
    again = numerics.oracle_chain(x, [layer], dout, own["masks"])
    assert torch.equal(again["dx"], own["dx"])


@pytest.mark.parametrize("with_projection", [False, True])
def test_chain_is_what_modules_compute(with_projection):
    """Two layers and a shortcut against nn.Conv2d and nn.BatchNorm2d."""
    torch.manual_seed(0)
    convs = [torch.nn.Conv2d(6, 8, 3, 2, 1, bias=False), torch.nn.Conv2d(8, 10, 1, bias=False)]
    convs += [torch.nn.Conv2d(6, 10, 1, 2, bias=False)] if with_projection else []
    norms = [torch.nn.BatchNorm2d(conv.out_channels) for conv in convs]
    for module in [*convs, *norms]:
        torch.nn.init.normal_(module.weight)
        module.double()
    layers = [
        numerics.Layer(c.weight, n.weight, n.bias, c.stride, c.padding) for c, n in zip(convs, norms, strict=True)
    ]
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 10, 5, 4, dtype=torch.float64, requires_grad=True)
    dout = torch.randn(2, 10, 5, 4, dtype=torch.float64)
    shortcut = norms[2](convs[2](x)) if with_projection else residual
    (norms[1](convs[1](norms[0](convs[0](x)).relu())) + shortcut).relu().backward(dout)

    parts = {"projection": layers[2]} if with_projection else {"residual": residual}
    results = numerics.chain(x, layers[:2], dout, dtype=torch.float64, **parts)
    torch.testing.assert_close(results["dx"], x.grad)
    for suffix, conv, norm in zip(("0", "1", "_p"), convs, norms, strict=False):
        torch.testing.assert_close(results["dw" + suffix], conv.weight.grad)
        torch.testing.assert_close(results["dgamma" + suffix], norm.weight.grad)
        torch.testing.assert_close(results["dbeta" + suffix], norm.bias.grad)
    if not with_projection:
        torch.testing.assert_close(results["dresidual"], residual.grad)


def test_of_few_values_several_draws_are_judged_together() -> None:
    """Four sums whose errors happen to be large once are right; errors that are large every time are not."""
    true = torch.tensor([1.0, 1.3, 1.7, 2.0], dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)

    def ok(errors: tuple[float, ...]) -> bool:
        ours = numerics.pooled([{"dgamma0": (true + error * signs).float()} for error in errors])
        eager = numerics.pooled([{"dgamma0": (true + 4e-7 * signs).float()} for _ in errors])
        oracle = numerics.pooled([{"dgamma0": true} for _ in errors])
        return numerics.score_all(ours, eager, oracle)[0].ok

    assert not ok((3e-6,))
    assert ok((2e-6, 2e-7, 2e-7, 2e-7))
    assert not ok((3e-6,) * 4)
