"""Planted errors in the Gram route's kernels: each fails the checks that test_gram.py runs."""

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

from fused_resnet.kernels import gram, gram_bn, gram_bn_grad
from fused_resnet.plan.config import GemmConfig
from tests.gram_case import (
    check_gradients,
    check_second_term,
    check_statistics,
    check_terms,
    gradients,
    make_case,
    matrix,
    relative,
    shared_case,
    statistics,
)

PLANTED = {
    "a masked row contributes relu(shift)": ("a = tl.where(mask_k[:, None], a, 0.0)", "a = a"),
    "a lost last accumulator": ("    total += acc\n\n    partial_ptr", "    partial_ptr"),
    "an accumulator counted twice": (
        "            acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=ACC)\n        if STORE_A",
        "        if STORE_A",
    ),
    "no mirror": ("tl.store(g_ptr + j * C + i, value, mask=inside & (row_tile != column_tile))", "pass"),
    "no covariance": ("spread = tl.fma(-c_i[:, None], m_j[None, :], g)", "spread = g"),
    "biased running variance": ("(var * unbiased).to(ACC)", "var"),
    "T not centred": ("rows_q, mask_q, P, CENTRED, SYNC", "rows_q, mask_q, P, True, SYNC"),
    "no xhat term in dW": ("coeff_a[:, None] * centred + slope[:, None] * v", "coeff_a[:, None] * centred"),
    "the wrong sign of P": ("slope = -rstd", "slope = rstd"),
    "P of another matrix than A∘W": (
        "term_ptr + rows.to(tl.int64)[:, None] * P + offs_j",
        "w_ptr + rows.to(tl.int64)[:, None] * P + offs_j",
    ),
    "no bias of a": ("-sum_dz - sum_a", "-sum_dz"),
    "no bias of dz": ("-sum_dz - sum_a", "-sum_a"),
    "scaled matrices, unscaled bias": ("sum_a /= tl.load(scales_ptr + 1)", "pass"),
    "one part of three": ("for _ in tl.static_range(PARTS):", "for _ in tl.static_range(1):"),
    "parts that do not add up": ("right -= widened(part, ACC)", "right = widened(part, ACC)"),
    "a lost second term of P": ("rest = (acc - widened(rounded, ACC))", "rest = (acc - acc)"),
    "a lost second term of A∘W": ("rest = (aw - widened(rounded, ACC))", "rest = (aw - aw)"),
    "no second term wherever it is needed": ("tl.where(spare < 0.0, 2, 1)", "1"),
    "a second term wherever there is none": ("tl.where(spare < 0.0, 2, 1)", "2"),
    "P of the first term of A∘W alone": ("reach *= tl.load(aw_terms_ptr)", "reach *= 1"),
    "a bias of the first term of A∘W alone": ("rows % Q, mask=mask_k", "rows % Q, mask=rows < Q"),
    "var of correlated channels for that of others": ("alone += tl.sum(w * w *", "alone += tl.sum(w * "),
    "a diagonal that is not centred": ("tl.fma(-c_j, rest_j, tl.fma(-c_j, m_j, own))", "own"),
    "AW not scaled": ("scaled_a = coeff_a * scale", "scaled_a = coeff_a"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_error_is_caught(name, tmp_path, monkeypatch, device):
    old, new = PLANTED[name]
    kernels = next(module for module in (gram, gram_bn, gram_bn_grad) if old in Path(module.__file__).read_text())
    source = Path(kernels.__file__).read_text()
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new))
    launcher = importlib.import_module(kernels.__name__.replace("kernels", "launch"))
    spec = importlib.util.spec_from_file_location("fused_resnet.kernels.mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    for kernel in [name for name in dir(kernels) if name.startswith("gram") and name.endswith("_kernel")]:
        monkeypatch.setattr(launcher, kernel, getattr(mutant, kernel))
    with pytest.raises(AssertionError):
        check_everything(device)


def check_everything(device):
    """The checks that the planted errors run: several tiles and runs, rows that do not fill a step, a mean of dz."""
    case = make_case((3, 15, 13), 20, 40, torch.float32, device, dz_mean=3.0)
    check_statistics(case)
    check_gradients(case, 1e-5, 3e-5, config=GemmConfig(16, 16, 64, split=1))
    case = make_case((3, 3, 3), 20, 40, torch.float16, device, dz_mean=3.0)
    check_gradients(case, 3e-5, 5e-3)
    case = make_case((3, 3, 3), 20, 40, torch.bfloat16, device)
    check_statistics(case)
    check_terms(case)
    case = make_case((3, 3, 3), 20, 40, torch.float16, device, dz_mean=3.0)
    assert int(gradients(case).aw_terms) == 1
    for dtype in (torch.float16, torch.bfloat16):
        check_second_term(shared_case(dtype, device))
    running_var = torch.zeros(40, device=device)
    statistics(case, running_var=running_var, momentum=1.0)
    y = matrix(case.a) @ case.weight.double().flatten(1).T
    assert relative(running_var, y.var(0)) < 1e-5


def test_the_checks_pass_without_a_planted_error(device):
    check_everything(device)
