"""Bugs of the kind that real kernels have had, each a replacement in the source of a kernel or launcher.

``planted(bug)`` loads the mutated source as a module of its own and puts its functions wherever the package uses the
originals. ``tests/test_planted_bugs.py`` shows that the numerics rule refuses every one: a mutation that survives is a
hole in the tests.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "fused_resnet"
_numbers = itertools.count()


@dataclass(frozen=True)
class Bug:
    """``old`` becomes ``new`` in ``module``; one of ``scenarios`` must notice."""

    name: str
    module: str
    old: str
    new: str
    scenarios: tuple[str, ...]


def mutated_source(bug: Bug) -> str:
    spec = importlib.util.find_spec(f"{PACKAGE}.{bug.module}")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text()
    if bug.old not in source:
        raise LookupError(f"'{bug.name}' can no longer be planted: {bug.module} has no\n{bug.old}")
    return source.replace(bug.old, bug.new)


def _load(bug: Bug, folder: str) -> ModuleType:
    name = f"{PACKAGE}.{bug.module}_planted_{next(_numbers)}"
    path = Path(folder) / f"{name}.py"
    path.write_text(mutated_source(bug))  # a file, because Triton reads the source of its kernels
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The package with ``bug`` in it."""
    original = importlib.import_module(f"{PACKAGE}.{bug.module}")
    with tempfile.TemporaryDirectory() as folder:
        mutant = _load(bug, folder)
        own = {
            id(value): getattr(mutant, name)
            for name, value in vars(original).items()
            if _home(value) == original.__name__ and hasattr(mutant, name)
        }
        changed: list[tuple[ModuleType, str, Any]] = []
        for module in [m for n, m in sys.modules.items() if n.startswith(f"{PACKAGE}.") and m is not mutant]:
            for name, value in list(vars(module).items()):
                if id(value) in own:
                    changed.append((module, name, value))
                    setattr(module, name, own[id(value)])
        try:
            yield
        finally:
            for module, name, value in changed:
                setattr(module, name, value)
            del sys.modules[mutant.__name__]


def survives(bug: Bug, scenarios: Mapping[str, Callable[[], object]], refusals: tuple[type[Exception], ...]) -> bool:
    """Whether every scenario that ``bug`` names passes with it planted; ``refusals`` are what counts as not passing."""
    with planted(bug):
        for name in bug.scenarios:
            try:
                scenarios[name]()
            except refusals:
                return False
    return True


def _home(value: Any) -> str | None:
    """The module that a function, a class or a Triton kernel was written in."""
    return getattr(getattr(value, "fn", value), "__module__", None) if callable(value) or hasattr(value, "fn") else None


STATS, FPROP, DGRAD, WGRAD = "kernels.bn_stats", "kernels.conv_fprop", "kernels.conv_dgrad", "kernels.conv_wgrad"
ACT, GRAD, STEM = "kernels.bn_act", "kernels.bn_act_grad", "kernels.stem_pool"
BACKWARD = "autograd.staged_backward"

TRUNCATED = "((({0}).to(tl.int32, bitcast=True) >> 16) << 16).to(tl.float32, bitcast=True)"

BUGS = [
    # statistics
    Bug("unbiased variance", STATS, "mean, m2 / rows, eps", "mean, m2 / (rows - 1), eps", ("bottleneck",)),
    Bug("biased running variance", STATS, "m2 / tl.maximum(rows - 1, 1),", "m2 / rows,", ("running",)),
    Bug("wrong eps", STATS, "tl.sqrt(var + eps)", "tl.sqrt(var + 10 * eps)", ("identity",)),
    Bug("eps outside the root", STATS, "tl.sqrt(var + eps)", "(tl.sqrt(var) + eps)", ("identity",)),
    Bug(
        "a wrong count in the merge",
        STATS,
        "count = tl.minimum(rows - first_row, rows_per_tile).to(mean.dtype)",
        "count = (first_row * 0 + rows_per_tile).to(mean.dtype)",
        ("bottleneck",),
    ),
    Bug(
        "a merge without the means' spread",
        STATS,
        "fold(m2 + count * deviation * deviation, VECTORS)",
        "fold(m2, VECTORS)",
        ("bottleneck",),
    ),
    Bug(
        "momentum the wrong way round",
        STATS,
        "(1.0 - momentum) * running.to(value.dtype) + momentum * value",
        "momentum * running.to(value.dtype) + (1.0 - momentum) * value",
        ("running",),
    ),
    Bug("beta lost", STATS, ".to(dtype) - mean * scale", ".to(dtype)", ("bottleneck",)),
    Bug(
        "rows past the end in the pass over y",
        STATS,
        "tl.where(mask, y - pivot[None, :], 0.0)",
        "y - pivot[None, :]",
        ("vendor",),
    ),
    Bug("frozen variance squared", STATS, "other=1.0).to(ACC)", "other=1.0).to(ACC) * 1.01", ("frozen",)),
    # forward convolution
    Bug(
        "truncating casts",
        FPROP,
        "y = acc.to(y_ptr.dtype.element_ty)",
        f"y = {TRUNCATED.format('acc')}.to(y_ptr.dtype.element_ty)",
        ("bottleneck",),
    ),
    Bug(
        "16-bit accumulation",
        FPROP,
        "input_precision=PRECISION, out_dtype=ACC)",
        "input_precision=PRECISION, out_dtype=ACC).to(x_ptr.dtype.element_ty).to(ACC)",
        ("bottleneck",),
    ),
    Bug("one wrong pixel", FPROP, "tl.minimum(offs_m, M - 1)", "tl.minimum(offs_m, M - 2)", ("bottleneck",)),
    Bug("statistics of the unrounded values", FPROP, "values = y.to(ACC)", "values = acc", ("bottleneck",)),
    Bug(
        "rows past the end in the statistics",
        FPROP,
        "mean = tl.sum(tl.where(mask_m[:, None], values, 0.0), axis=0)",
        "mean = tl.sum(values, axis=0)",
        ("bottleneck",),
    ),
    Bug(
        "a mirrored filter",
        FPROP,
        "tap % S * DILATION_W) * Ci",
        "(S - 1 - tap % S) * DILATION_W) * Ci",
        ("bottleneck",),
    ),
    Bug(
        "a lost last block of channels",
        FPROP,
        "TAPS * tl.cdiv(Ci, BLOCK_K)",
        "TAPS * tl.maximum(Ci // BLOCK_K, 1)",
        ("bottleneck",),
    ),
    Bug(
        "a prologue without ReLU",
        FPROP,
        "relu(affine(a.to(ACC), scale[None, :], shift[None, :]))",
        "(affine(a.to(ACC), scale[None, :], shift[None, :]))",
        ("bottleneck",),
    ),
    Bug(
        "padding that the prologue fills",
        FPROP,
        "a = tl.where(inside[:, None], a, 0.0)",
        "a = a",
        ("padded prologue",),
    ),
    Bug("no ReLU in the frozen epilogue", FPROP, "acc = relu(acc)", "acc = acc", ("frozen",)),
    Bug("a residual not added", FPROP, "acc += residual", "acc += 0 * residual", ("frozen",)),
    Bug(
        "a lost last tile",
        "launch.conv_fprop",
        "ceil_div(p.M, config.block_m)",
        "p.M // config.block_m",
        ("vendor", "bottleneck"),
    ),
    # gradient of the input
    Bug(
        "a missing xhat term",
        DGRAD,
        "scaled += affine(widened(y, ACC), y_scale[None, :], shift[None, :])",
        "scaled += shift[None, :]",
        ("bottleneck",),
    ),
    Bug("a missing mean term", DGRAD, "y_scale[None, :], shift[None, :])", "y_scale[None, :], 0.0)", ("bottleneck",)),
    Bug(
        "the mask of the unnormalised values",
        DGRAD,
        "relu_grad(acc, affine(x, scale[None, :], shift[None, :]))",
        "relu_grad(acc, x)",
        ("bottleneck",),
    ),
    Bug("no mask", DGRAD, "acc = relu_grad(acc, x)", "acc = acc", ("frozen",)),
    Bug(
        "rows past the end in the sums",
        DGRAD,
        "tl.where((offs_m < M)[:, None], dx.to(ACC), 0.0)",
        "dx.to(ACC)",
        ("bottleneck",),
    ),
    Bug("the sum without its mean", DGRAD, "dz * (x - mean[None, :])", "dz * x", ("bottleneck",)),
    Bug("a class one row too high", DGRAD, "h = hc * STRIDE_H + ch", "h = hc * STRIDE_H", ("bottleneck",)),
    Bug(
        "the projection's gradient at the wrong pixels",
        DGRAD,
        "(h % RESIDUAL_STRIDE_H == 0)",
        "(h % RESIDUAL_STRIDE_H == 1)",
        ("bottleneck",),
    ),
    Bug(
        "dx = 0",
        DGRAD,
        "dx = acc.to(dx_ptr.dtype.element_ty)",
        "dx = (acc * 0).to(dx_ptr.dtype.element_ty)",
        ("bottleneck",),
    ),
    # gradient of the weight
    Bug(
        "a lost last part",
        WGRAD,
        "mask_s = offs_s < split - start",
        "mask_s = offs_s < split - 1 - start",
        ("identity",),
    ),
    Bug(
        "C on rows past the end", WGRAD, "value = tl.where(mask_k[None, :], value, 0.0)", "value = value", ("identity",)
    ),
    Bug("a filter shifted by its padding", WGRAD, "s * dilation_w - padding_w", "s * dilation_w", ("identity",)),
    Bug(
        "an unnormalised input",
        WGRAD,
        "relu(affine(a.to(ACC), scale, shift))",
        "relu(a.to(ACC))",
        ("identity",),
    ),
    Bug(
        "16-bit accumulation of the weight's gradient",
        WGRAD,
        "input_precision=INPUT_PRECISION, out_dtype=ACC)",
        "input_precision=INPUT_PRECISION, out_dtype=ACC).to(x_ptr.dtype.element_ty).to(ACC)",
        ("long wgrad",),
    ),
    # the passes
    Bug(
        "a projection without its scale",
        ACT,
        "residual = affine(residual, residual_scale, residual_shift)",
        "residual = residual + residual_shift",
        ("bottleneck",),
    ),
    # the mask in bits
    Bug("bits where the ReLU is zero", "kernels.bits", "~(out <= 0)", "~(out < 0)", ("identity",)),
    Bug(
        "bits in the reverse order",
        "kernels.bn_act",
        "relu_bits(out.to(scale.dtype), ",
        "relu_bits(tl.flip(out.to(scale.dtype), 1), ",
        ("identity",),
    ),
    Bug(
        "a lost last byte",
        "kernels.conv_fprop",
        "(offs_b < row_bytes)[None, :]",
        "(offs_b < row_bytes - 1)[None, :]",
        ("frozen",),
    ),
    Bug("a mask in bits that is not applied", GRAD, "dz = tl.where(passed, dz, 0.0)", "dz = dz", ("identity",)),
    Bug("no ReLU", ACT, "out = relu(out)", "out = out", ("identity",)),
    Bug("the mask of y alone", GRAD, "pre = affine(y, scale, shift)", "pre = y", ("vendor",)),
    Bug("a missing rstd", GRAD, "b = -a * rstd * dgamma / rows", "b = -a * dgamma / rows", ("bottleneck",)),
    Bug("C without the mean", GRAD, "c = -a * dbeta / rows - b * mean", "c = -a * dbeta / rows", ("bottleneck",)),
    Bug(
        "a lost last tile of sums",
        GRAD,
        "step_offsets(start, tiles, ",
        "step_offsets(start, tiles - 1, ",
        ("bottleneck",),
    ),
    Bug("a pass without the xhat term", GRAD, "dy += affine(y, b, c)", "dy += c", ("bottleneck",)),
    Bug(
        "gradients where the ReLU is zero",
        "kernels.common",
        "tl.where(x <= 0, 0.0, grad)",
        "tl.where(x < 0, 0.0, grad)",
        ("frozen",),
    ),
    Bug("a ReLU that drops NaN", "kernels.common", "tl.where(x <= 0, 0.0, x)", "tl.maximum(x, 0.0)", ("nan",)),
    # the stem
    Bug("the last of equal maxima", STEM, "wins = (value > best)", "wins = (value >= best)", ("stem ties",)),
    Bug("a window's gradient one pixel off", STEM, "tl.where(far_tap == 0", "tl.where(far_tap == 1", ("stem",)),
    Bug("the stem's missing mean", STEM, "sum_dz_y += dz * (y - mean)", "sum_dz_y += dz * y", ("stem",)),
    # offsets
    Bug("rows of 32 bits, forward", FPROP, "row.to(tl.int64)[:, None] * Ci", "row[:, None] * Ci", ("large",)),
    Bug("rows of 32 bits, output", FPROP, "offs_m.to(tl.int64)[:, None] * Co", "offs_m[:, None] * Co", ("large",)),
    Bug("rows of 32 bits, gradient", DGRAD, "row.to(tl.int64)[:, None] * Ci", "row[:, None] * Ci", ("large",)),
    Bug(
        "rows of 32 bits, partials",
        WGRAD,
        "(pid_split * Co + offs_co).to(tl.int64)",
        "(pid_split * Co + offs_co)",
        ("large",),
    ),
    Bug(
        "rows of 32 bits, passes",
        "kernels.tiling",
        "tile.to(tl.int64) * rows_per_tile",
        "tile * rows_per_tile",
        ("large",),
    ),
    # what composes them
    Bug(
        "the projection's dgamma from the block's row",
        BACKWARD,
        "row=2 if batch else 1",
        "row=1",
        ("bottleneck",),
    ),
    Bug(
        "the identity's gradient lost",
        BACKWARD,
        'if problem.residual == "identity":\n        shortcut = Shortcut(dz_out',
        'if problem.residual == "identity":\n        shortcut = Shortcut(None',
        ("identity",),
    ),
]
