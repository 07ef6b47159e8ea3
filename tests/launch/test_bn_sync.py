"""BatchNorm over processes, whose rows are parts of one batch: what the parts give together is what the batch gives.

Without processes: what they would gather is stacked. Planted errors in the merge and in the Gram route's are caught.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fused_resnet.launch.bn_sync as launcher
from fused_resnet.launch import gram_bn_grad
from fused_resnet.launch.bn_act_grad import bn_act_grad_reduce, bn_grad_finalize
from fused_resnet.launch.bn_stats import bn_finalize, bn_stats
from fused_resnet.launch.gram import gram, gram_finalize
from fused_resnet.launch.gram_rows import gram_sums
from fused_resnet.launch.record import record_launches
from fused_resnet.plan.config import PassConfig
from fused_resnet.plan.passes import CUMULATIVE, FEW_TILES
from tests import strict_interpreter
from tests.conftest import INTERPRETED
from tests.gram_case import EPS, SMALL, Case, accumulation, input_gradient, make_case, matrix, reference, relative
from tests.planted_bugs import Bug, mutated_source, survives

TILES = PassConfig(block_m=24, block_c=16, num_warps=1)
PARTS = {"one": [70], "two": [35, 70], "many": [3, 1, 70, 14, 2, 7, 35, 8, 64], "an empty one": [35, 0, 70, 0]}
"""Rows of each process."""
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}
CHANNELS = 20


def parts_of(rows: list[int], dtype: torch.dtype, device: torch.device, spread: float = 1.0) -> list[Tensor]:
    """An image for every process, each around another mean."""
    found = []
    for i, count in enumerate(rows):
        values = spread * i + torch.randn(1, CHANNELS, 1, count, dtype=torch.float64)
        found.append(values.to(dtype).contiguous(memory_format=torch.channels_last).to(device))
    return found


def gathered(parts: list[Tensor], pack: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    nothing = torch.zeros(2 * CHANNELS + 1, dtype=dtype, device=parts[0].device)
    return torch.stack([pack(part) if part.numel() else nothing for part in parts])


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    exact = 1e-11 if dtype == torch.float64 else 2e-6
    return {"rtol": exact, "atol": exact}


def parameters(device: torch.device) -> dict[str, Tensor]:
    names = ("weight", "bias", "running_mean", "running_var")
    return {name: torch.rand(CHANNELS, device=device) for name in names}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rows", PARTS.values(), ids=PARTS)
def test_statistics(rows: list[int], dtype: torch.dtype, device: torch.device) -> None:
    check_statistics(rows, dtype, device)


def check_statistics(rows: list[int], dtype: torch.dtype, device: torch.device, spread: float = 1.0) -> None:
    parts = parts_of(rows, dtype, device, spread)
    whole = torch.cat(parts, dim=3).contiguous(memory_format=torch.channels_last)
    ours = parameters(device)
    theirs = {name: t.clone() for name, t in ours.items()}
    every = gathered(parts, lambda y: launcher.bn_sync_pack(bn_stats(y, TILES)), accumulation(dtype))
    assert every[:, -1].tolist() == rows
    stats = launcher.bn_sync_finalize(every, **ours, momentum=0.3, eps=1e-3)
    expected = bn_finalize(bn_stats(whole, TILES), **theirs, momentum=0.3, eps=1e-3)
    torch.testing.assert_close(stats, expected, **tolerance(dtype))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=3e-6, atol=3e-6)


def test_statistics_far_from_zero(device: torch.device) -> None:
    """Means that differ by 1e4 of the spread within a part, in float32."""
    check_statistics([512, 256, 1024], torch.float32, device, spread=1e4)


def test_many_processes_and_many_tiles(device: torch.device) -> None:
    check_statistics([1] * 1100, torch.float32, device, spread=0.01)
    rows = FEW_TILES + 3
    y = parts_of([rows], torch.float32, device)[0]
    tiles = bn_stats(y, PassConfig(block_m=1, block_c=16, num_warps=1))
    packed = launcher.bn_sync_pack(tiles)
    columns = y.double()[0, :, 0]
    torch.testing.assert_close(packed[:CHANNELS].double(), columns.mean(1), **tolerance(y.dtype))
    m2 = columns.var(1, correction=0) * rows
    torch.testing.assert_close(packed[CHANNELS:-1].double(), m2, rtol=2e-6, atol=1e-3)


def test_a_counter_and_no_parameters(device: torch.device) -> None:
    parts = parts_of([35, 70], torch.float32, device)
    every = gathered(parts, lambda y: launcher.bn_sync_pack(bn_stats(y, TILES)), torch.float32)
    mean = torch.zeros(CHANNELS, device=device)
    arguments = {"weight": None, "bias": None, "running_mean": mean, "running_var": None, "eps": 1e-5}
    counter = torch.tensor(4, device=device)
    stats = launcher.bn_sync_finalize(every, **arguments, counter=counter, momentum=CUMULATIVE)
    torch.testing.assert_close(mean, stats[0] / 4)
    assert counter == 4
    launcher.bn_sync_finalize(every, **arguments, counter=counter, momentum=1.0)
    torch.testing.assert_close(mean, stats[0])
    assert counter == 5
    torch.testing.assert_close(stats[2], stats[1])
    torch.testing.assert_close(stats[3], -stats[0] * stats[1])


def test_nobody_has_a_row(device: torch.device) -> None:
    ours = parameters(device)
    before = {name: t.clone() for name, t in ours.items()}
    every = torch.zeros(3, 2 * CHANNELS + 1, device=device)
    launcher.bn_sync_finalize(every, **ours, momentum=0.1, eps=1e-5)
    assert all(torch.equal(ours[name], before[name]) for name in before)


def test_a_nan_poisons_its_own_channel(device: torch.device) -> None:
    parts = parts_of([35, 70], torch.float32, device)
    parts[1][0, 5] = torch.nan
    every = gathered(parts, lambda y: launcher.bn_sync_pack(bn_stats(y, TILES)), torch.float32)
    stats = launcher.bn_sync_finalize(every, **parameters(device), momentum=0.1, eps=1e-5)
    assert stats.isnan().any(0).nonzero().flatten().tolist() == [5] and stats[:, 5].isnan().all()


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("row", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rows", PARTS.values(), ids=PARTS)
def test_gradients(rows: list[int], dtype: torch.dtype, row: int, device: torch.device) -> None:
    """dgamma and dbeta add up over processes to those of the whole; everybody has the coefficients of the whole."""
    check_gradients(rows, dtype, row, device)


def check_gradients(rows: list[int], dtype: torch.dtype, row: int, device: torch.device) -> None:
    ys, grads = (parts_of(rows, dtype, device) for _ in range(2))
    weight = torch.randn(CHANNELS, device=device)
    whole, dout = (torch.cat(parts, dim=3).contiguous(memory_format=torch.channels_last) for parts in (ys, grads))
    none = dict.fromkeys(("weight", "bias", "running_mean", "running_var"))
    stats = bn_finalize(bn_stats(whole, TILES), **none, momentum=0.1, eps=EPS)

    def tiles(dout: Tensor, y: Tensor) -> Tensor:
        shortcut = {"residual": y, "residual_stats": stats} if row == 2 else {}
        other = torch.zeros_like(y) if row == 2 else y  # what must not be read
        return bn_act_grad_reduce(dout, other, stats, TILES, relu=False, **shortcut)[1]

    pairs = dict(zip(map(id, grads), ys, strict=True))
    packs = [
        launcher.bn_sync_grad_pack(tiles(g, pairs[id(g)]), g.shape[3], row=row)
        if g.numel()
        else torch.zeros(2 * CHANNELS + 1, dtype=stats.dtype, device=device)
        for g in grads
    ]
    every = torch.stack(packs)
    results = [launcher.bn_sync_grad_finalize(every, packed, stats, weight) for packed in packs]
    dgamma, dbeta, coeffs = bn_grad_finalize(tiles(dout, whole), stats, weight, whole.shape[3], row=row)
    limits = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-4}
    torch.testing.assert_close(sum(r[0] for r in results), dgamma, **limits)
    torch.testing.assert_close(sum(r[1] for r in results), dbeta, **limits)
    for own in results:
        assert torch.equal(own[2], results[0][2])
        torch.testing.assert_close(own[2], coeffs, **limits)


# ---------------------------------------------------------------- by Gram


def gram_parts(case: Case, images: list[int], centred: bool) -> dict[str, Tensor]:
    """What the processes make of a block's last convolution, each of so many images, joined or summed up."""
    acc = accumulation(case.x.dtype)
    cases = [
        case._replace(**{name: t.contiguous(memory_format=torch.channels_last) for name, t in zip(("x", "dz"), own)})
        for own in zip(case.x.split(images), case.dz.split(images), strict=True)
    ]
    found = []
    for part in cases:
        g, c, _ = gram(part.x, part.input_affine, SMALL)
        rows = len(matrix(part.x))
        none = dict.fromkeys(("gamma", "beta", "running_mean", "running_var"))
        packed, v, m = gram_finalize(g, c, rows, part.weight, momentum=0.1, eps=EPS, packs=True, **none)
        found.append((packed, v, m))
    running = {"running_mean": None, "running_var": None, "momentum": 0.1, "eps": EPS}
    every = torch.stack([packed for packed, *_ in found])
    stats = launcher.bn_sync_finalize(every, weight=case.gamma, bias=case.beta, **running)
    sums = []
    for part, (_, _, m) in zip(cases, found, strict=True):
        dz, a = matrix(part.dz), matrix(part.a)
        t, sum_dz = (dz.T @ (a - m.double() if centred else a)).to(acc), dz.sum(0).to(acc)
        sums.append((t, sum_dz, gram_sums(t, m[: a.shape[1]], stats, part.weight, sum_dz, len(dz), centred=centred)))
    every = torch.stack([packed for *_, packed in sums])
    results, das = [], []
    for part, (_, v, m), (t, sum_dz, _) in zip(cases, found, sums, strict=True):
        rows = len(matrix(part.dz))
        others = gram_bn_grad.Others(every, m)
        kept = None if centred else m
        grads = gram_bn_grad.gram_backward(t, v, kept, stats, part.weight, sum_dz, rows, out_dtype=acc, others=others)
        results.append(grads)
        if centred:
            dz, a = matrix(part.dz) - grads.owed.double() / rows, matrix(part.a) - m.double()
            das.append(dz @ grads.aw.double() + a @ grads.p.double().sum(0))
        else:
            das.append(input_gradient(part, grads))
    names = ("dw", "dgamma", "dbeta")
    joined = {name: sum(getattr(grads, name).double() for grads in results) for name in names}
    return {"da": torch.cat(das), "stats": stats, **joined}


def check_gram(
    dtype: torch.dtype, device: torch.device, images: list[int], centred: bool = False, **options: float
) -> None:
    case = make_case((sum(images), 5, 7), 20, 48, dtype, device, **options)
    shift = torch.arange(sum(images), device=device).view(-1, 1, 1, 1) / sum(images)
    case = case._replace(x=(case.x + shift).to(dtype).contiguous(memory_format=torch.channels_last))
    found = gram_parts(case, images, centred)
    da, dw, dgamma, dbeta = reference(case)
    y = matrix(case.a) @ case.weight.double().flatten(1).T
    exact = 1e-9 if dtype == torch.float64 else 2e-5
    assert relative(found["stats"][0], y.mean(0)) < exact
    assert relative(found["stats"][1], (y.var(0, correction=0) + EPS) ** -0.5) < exact
    assert relative(found["dw"].flatten(1), dw) < exact
    assert relative(found["dgamma"], dgamma) < exact
    assert relative(found["dbeta"], dbeta) < exact
    rounded = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
    assert relative(found["da"], da) < rounded.get(dtype, 10 * exact)


GRAM_DTYPES = {**DTYPES, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("images", [[4], [3, 1], [1, 5, 2]], ids=str)
@pytest.mark.parametrize("dtype", GRAM_DTYPES.values(), ids=GRAM_DTYPES)
def test_gram(dtype: torch.dtype, images: list[int], device: torch.device) -> None:
    check_gram(dtype, device, images)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gram_of_a_centred_input(dtype: torch.dtype, device: torch.device) -> None:
    check_gram(dtype, device, [3, 1], centred=True)


@pytest.mark.parametrize("dtype", GRAM_DTYPES.values(), ids=GRAM_DTYPES)
def test_gram_of_a_gradient_far_from_zero(dtype: torch.dtype, device: torch.device) -> None:
    check_gram(dtype, device, [3, 1], dz_mean=3)


# ---------------------------------------------------------------- the record, errors, planted bugs


def test_meta_tensors_are_recorded_alone() -> None:
    tiles = torch.empty(3, 5, CHANNELS, device="meta")
    stats, row = torch.empty(4, CHANNELS, device="meta"), torch.empty(CHANNELS, device="meta")
    with record_launches() as launches:
        packed = launcher.bn_sync_grad_pack(tiles, 70, row=2)
        launcher.bn_sync_grad_finalize(packed.expand(8, -1).contiguous(), packed, stats, row)
    assert [launch.kernel for launch in launches] == ["bn_sync_grad_pack_kernel", "bn_sync_grad_finalize_kernel"]
    one = 4 * (2 * CHANNELS + 1)
    assert [launch.bytes for launch in launches] == [4 * 10 * CHANNELS + one, 9 * one + 4 * CHANNELS * (4 + 1 + 5)]


def test_errors(device: torch.device) -> None:
    every, stats = torch.zeros(2, 2 * CHANNELS + 1, device=device), torch.zeros(4, CHANNELS, device=device)
    with pytest.raises(ValueError, match=r"gathered must be \[ranks, 2 C \+ 1\]"):
        launcher.bn_sync_grad_finalize(every[:, 1:], every[0], stats, None)
    with pytest.raises(ValueError, match="packed must have shape"):
        launcher.bn_sync_grad_finalize(every, stats[0], stats, None)
    with pytest.raises(ValueError, match="rows must be positive"):
        launcher.bn_sync_grad_pack(torch.zeros(2, 1, 5, device=device), 0)
    with pytest.raises(ValueError, match="row must be"):
        launcher.bn_sync_grad_pack(torch.zeros(2, 1, 5, device=device), 3, row=2)


BUGS = [
    Bug(
        "a count of this process alone",
        "kernels.bn_sync",
        "tl.full((1,), rows, first.dtype)",
        "tl.full((1,), 1, first.dtype)",
        ("statistics",),
    ),
    Bug(
        "no term of the means in the merge",
        "kernels.bn_sync",
        "m2 + count * deviation * deviation",
        "m2",
        ("statistics",),
    ),
    Bug(
        "means without their weights",
        "kernels.bn_sync",
        "shifted += count *",
        "shifted += rows / ranks *",
        ("statistics",),
    ),
    Bug(
        "a lost last block of processes",
        "kernels.bn_sync",
        "    for start in range(0, ranks, BLOCK_R):\n        mean, m2, count = load_ranks",
        "    for start in range(0, ranks - ranks % BLOCK_R, BLOCK_R):\n        mean, m2, count = load_ranks",
        ("many processes",),
    ),
    Bug(
        "an unbiased variance by the local count",
        "kernels.bn_sync",
        "m2 / tl.maximum(rows - 1.0, 1.0)",
        "m2 / tl.maximum(rows / ranks - 1.0, 1.0)",
        ("statistics",),
    ),
    Bug(
        "coefficients by this process's sums",
        "kernels.bn_sync",
        "b = -a * rstd * (rstd * sum_dz_y) / rows",
        "b = -a * rstd * (rstd * tl.load(packed_ptr + channels + offs_c, mask=mask_c, other=0.0)) / rows",
        ("gradients",),
    ),
    Bug(
        "the gradient of gamma summed over processes",
        "kernels.bn_sync",
        "dgamma = rstd * tl.load(packed_ptr + channels + offs_c, mask=mask_c, other=0.0)",
        "dgamma = rstd * sum_dz_y",
        ("gradients",),
    ),
    Bug("the local mean for the global", "kernels.gram_bn_grad", "along + dbeta * off", "along", ("gram",)),
    Bug("no slope in what the mean of dz owes", "kernels.gram_bn_grad", " - slope * off", "", ("gram",)),
    Bug(
        "dW by the mean of this process's dz",
        "kernels.gram_bn_grad",
        "left = owed - dbeta if CENTRED else owed",
        "left = dbeta * 0 if CENTRED else dbeta",
        ("gram", "gram, centred"),
    ),
    Bug(
        "the bias by the sum of this process's dz",
        "launch.gram_bn_grad",
        "dbeta_ptr=owed",
        "dbeta_ptr=sum_dz",
        ("gram",),
    ),
    Bug(
        "sums about the local mean",
        "kernels.gram_rows",
        "along + dbeta * (of_mean - mean)",
        "along",
        ("gram",),
    ),
]
CPU = torch.device("cpu")
SCENARIOS: dict[str, Callable[[], object]] = {
    "statistics": lambda: check_statistics([35, 70], torch.float64, CPU),
    "many processes": lambda: check_statistics([1] * 1100, torch.float32, CPU, spread=0.01),
    "gradients": lambda: check_gradients([35, 70], torch.float64, 1, CPU),
    "gram": lambda: check_gram(torch.float64, CPU, [3, 1], dz_mean=1),
    "gram, centred": lambda: check_gram(torch.float64, CPU, [3, 1], centred=True, dz_mean=1),
}


@pytest.mark.skipif(not INTERPRETED, reason="the scenarios run in the interpreter")
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_refused(bug: Bug) -> None:
    for scenario in bug.scenarios:
        SCENARIOS[scenario]()
    refusals = (AssertionError, strict_interpreter.Violation)
    assert not survives(bug, SCENARIOS, refusals), f"'{bug.name}' survives {', '.join(bug.scenarios)}"


@pytest.mark.quick
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_mutation_still_applies(bug: Bug) -> None:
    compile(mutated_source(bug), bug.module, "exec")
