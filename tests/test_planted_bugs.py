"""Correct kernels pass the numerics rule; every planted bug is refused by the scenario that its entry names."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.launch import bn_act_grad, conv_fprop, conv_wgrad, stem_pool
from fused_resnet.plan.config import GemmConfig, PassConfig
from fused_resnet.plan.problem import ConvProblem
from tests import numerics, test_large_tensors
from tests.conftest import INTERPRETED
from tests.planted_bugs import BUGS, Bug, mutated_source, planted, survives
from tests.staged_case import bottleneck, identity, image, plain

pytestmark = [
    pytest.mark.usefixtures("ieee"),
    pytest.mark.skipif(not INTERPRETED, reason="the scenarios run in the interpreter"),
]


def check_bottleneck() -> None:
    bottleneck(torch.bfloat16).check()
    bottleneck(torch.float32, seed=1).check()


def check_identity() -> None:
    identity(torch.float32).check()
    identity(torch.float16, seed=1).check()


def check_frozen() -> None:
    bottleneck(torch.float16, frozen=True).check()
    bottleneck(torch.float32, frozen=True).check()


def check_vendor() -> None:
    plain(torch.float32, source="vendor").check()
    bottleneck(torch.bfloat16, source="vendor").check()


def check_running() -> None:
    running = {"running_mean0": torch.randn(24), "running_var0": 1 + torch.rand(24)}
    plain(torch.float32, running=running).check()


def check_padded_prologue() -> None:
    """A 3x3 with the normalising prologue: a padded position is zero after it."""
    problem = ConvProblem(2, 5, 6, 20, 18, 3, 3, padding=(1, 1), dtype="float32")
    x = image(2, 20, 5, 6, dtype=torch.float32, seed=0)
    weight = image(18, 20, 3, 3, dtype=torch.float32, seed=1)
    affine = 1 + torch.rand(2, 20)
    y, _ = conv_fprop.conv_fprop(x, weight, problem, GemmConfig(32, 16, 16), input_affine=affine)
    scale, shift = affine[:, None, :, None, None]
    eager = F.conv2d((x * scale + shift).relu(), weight, padding=1)
    oracle = F.conv2d((x.double() * scale + shift).relu(), weight.double(), padding=1)
    numerics.check(y, eager, oracle, "z")


def check_long_wgrad() -> None:
    """Many steps of the loop over rows: an accumulator of 16 bits has time to lose them."""
    problem = ConvProblem(2, 24, 23, 20, 18)
    x = image(2, 20, 24, 23, dtype=torch.bfloat16, seed=0, mean=0.5)
    dy = image(2, 18, 24, 23, dtype=torch.bfloat16, seed=1)
    dw = conv_wgrad.conv_wgrad(x, dy, problem, GemmConfig(32, 32, 16), out_dtype=torch.float32)
    eager, oracle = (torch.nn.grad.conv2d_weight(x.to(t), dw.shape, dy.to(t)) for t in (x.dtype, torch.float64))
    numerics.check(dw, eager, oracle, "dw")


def check_large() -> None:
    with test_large_tensors.reserving_memory():
        test_large_tensors.test_conv_fprop(1)
        test_large_tensors.test_conv_dgrad(1, 1)
        test_large_tensors.test_conv_wgrad_partials()
        test_large_tensors.test_passes()


def check_nan() -> None:
    """A NaN poisons its own channel alone, and ReLU lets it through."""
    case = plain(torch.float32)
    case.layers = case.layers[:1]
    case.__post_init__()
    case.layers[0].weight[3] = math.nan
    out = case.run()[0]["z"]
    poisoned = out.isnan().all(dim=(0, 2, 3))
    assert poisoned[3] and out.isnan().any(dim=(0, 2, 3)).sum() == 1


def stem_case(dtype: torch.dtype, ties: bool) -> None:
    """BN + ReLU + max pool and their backward, against eager's; with ``ties`` on few distinct values."""
    y = image(2, 20, 11, 8, dtype=dtype, seed=3)
    if ties:
        y = (y * 1.5).round()
    gamma, beta, mean, rstd = 1 + torch.rand(20), torch.rand(20) - 0.5, torch.zeros(20), torch.ones(20)
    if not ties:
        mean = y.float().mean((0, 2, 3))
        rstd = (y.float().var((0, 2, 3), unbiased=False) + 1e-5).rsqrt()
    stats = torch.stack([mean, rstd, gamma * rstd, beta - mean * gamma * rstd])
    config = PassConfig(16, 16)
    out, index = stem_pool.stem_pool(y, stats, config)
    dout = image(*out.shape, dtype=dtype, seed=4)
    tiles = stem_pool.stem_pool_grad_reduce(dout, index, out, y, stats, config)
    dgamma, dbeta, coeffs = bn_act_grad.bn_grad_finalize(tiles, stats, gamma, y.numel() // 20)
    dy = stem_pool.stem_pool_grad_apply(dout, index, out, y, coeffs, config)
    candidate = {"z": out, "dx": dy, "dgamma": dgamma, "dbeta": dbeta}

    def plain_stem(wide: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = [t.detach().to(wide).requires_grad_() for t in (y, gamma, beta)]
        if ties:  # the values of ``stats`` exactly, so that equal maxima stay equal
            frozen = F.batch_norm(leaves[0], mean.to(wide), rstd.to(wide), leaves[1], leaves[2], False, 0.0, 0.0)
        else:
            frozen = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True, 0.0, 1e-5)
        z = F.max_pool2d(frozen.relu(), 3, 2, 1)
        z.backward(dout.to(wide))
        return {name: t.detach() for name, t in zip(("z", "dx", "dgamma", "dbeta"), (z, *(t.grad for t in leaves)))}

    if ties:
        # eager's dx is that of frozen statistics: dz * gamma
        dz = stem_pool.stem_pool_grad_apply(dout, index, out, y, torch.stack([gamma, gamma * 0, gamma * 0]), config)
        torch.testing.assert_close(dz, plain_stem(dtype)["dx"])
        return
    numerics.check_all(candidate, plain_stem(dtype), plain_stem(torch.float64))


def check_stem() -> None:
    stem_case(torch.float32, ties=False)


def check_stem_ties() -> None:
    stem_case(torch.float32, ties=True)


SCENARIOS = {
    "bottleneck": check_bottleneck,
    "identity": check_identity,
    "frozen": check_frozen,
    "vendor": check_vendor,
    "running": check_running,
    "padded prologue": check_padded_prologue,
    "long wgrad": check_long_wgrad,
    "large": check_large,
    "nan": check_nan,
    "stem": check_stem,
    "stem ties": check_stem_ties,
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_correct_kernels_pass(name):
    SCENARIOS[name]()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_refused(bug):
    # Refused: by an assertion of the rule, or by a violation that the interpreter saw.
    assert not survives(bug, SCENARIOS, (Exception,)), f"'{bug.name}' survives {', '.join(bug.scenarios)}"


@pytest.mark.quick
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_mutation_still_applies(bug):
    compile(mutated_source(bug), bug.module, "exec")


@pytest.mark.quick
def test_names_are_distinct_and_scenarios_exist():
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 40
    assert {scenario for bug in BUGS for scenario in bug.scenarios} <= set(SCENARIOS)


@pytest.mark.quick
def test_a_bug_is_gone_afterwards():
    bug: Bug = BUGS[0]
    module = __import__(f"fused_resnet.{bug.module}", fromlist=["bn_finalize_kernel"])
    original = module.bn_finalize_kernel
    with planted(bug):
        assert module.bn_finalize_kernel is not original
    assert module.bn_finalize_kernel is original
