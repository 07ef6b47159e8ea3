"""Planted bugs of the Gram route: each remedy that its algebra needs taken away, and slips of the kind kernels have."""

from __future__ import annotations

from tests.planted_bugs import Bug

GRAM, FINISH, WGRAD, BITS = "kernels.gram", "kernels.gram_bn", "kernels.gram_wgrad", "kernels.bits"

BUGS = [
    Bug(
        "the bias from C W, not from the matrices as rounded",
        "launch.gram_bn_grad",
        "        aw_ptr=aw,\n        aw_terms_ptr=aw_terms,\n        p_ptr=product,\n        dbeta_ptr",
        "        aw_ptr=(exact := stats[2][:, None] * weight.flatten(1).to(acc_dtype))"
        " * (scales[0] if scaled else 1),\n        aw_terms_ptr=aw_terms,\n"
        "        p_ptr=torch.cat([weight.flatten(1).to(acc_dtype).T @ (share[:, None] * exact), 0 * product[1]])"
        " * (scales[1] if scaled else 1),\n        dbeta_ptr",
        ("a gradient of mean 30, float16",),
    ),
    Bug(
        "sums of the unrounded input",
        "autograd.gram",
        "    kept = _statistics(layer, problem.M, *products, sync=sync, pivot=pivot, input_affine=of_pivot)\n",
        "    pre = y.to(y_stats.dtype) * y_stats[2][:, None, None] + y_stats[3][:, None, None]\n"
        "    products[1] = pre.relu().sum((0, 2, 3))\n"
        "    kept = _statistics(layer, problem.M, *products, sync=sync, pivot=pivot, input_affine=of_pivot)\n",
        ("far from zero, float16",),
    ),
    Bug(
        "a covariance that is not centred",
        FINISH,
        "spread = tl.fma(-c_i[:, None], m_j[None, :], g)",
        "spread = g",
        ("odd sizes, float16",),
    ),
    Bug("no pivot", GRAM, "return pivot.to(DTYPE)", "return (pivot * 0).to(DTYPE)", ("far from zero, float64",)),
    Bug(
        "no pivot in float16",
        GRAM,
        "pivot = tl.where(pivot * rstd > 8 * tl.abs(scale), pivot, 0.0)",
        "pivot *= 0",
        ("far from zero, float16 sums cut off",),
    ),
    Bug(
        "no pivot of a projection in float16",
        GRAM,
        "tl.where(above | below, pivot, 0.0)",
        "0.0 * pivot",
        ("a projection far from zero, float16 sums cut off",),
    ),
    Bug(
        "a projection's pivot as others see it",
        FINISH,
        "P, pivot_stride, HAS_AFFINE, SEEN, dtype)",
        "P, pivot_stride, HAS_AFFINE, SEEN, dtype) * (0.0 if SEEN > 2 else 1.0)",
        ("a projection far from zero, float16 sums cut off",),
    ),
    Bug(
        "a pivot where the difference is rounded",
        GRAM,
        "pivot * rstd > 8 * tl.abs(scale)",
        "pivot * rstd > -1",
        ("correlated channels, float16",),
    ),
    Bug(
        "the Gram matrix of float32 data in float32",
        "launch.gram",
        "partial = torch.empty((split, elements), dtype=dtype,",
        "partial = torch.empty((split, elements), dtype=torch.float32,",
        ("filters orthogonal to the data, float32",),
    ),
    Bug(
        "wide data as narrow: means that cancel in float32 sums",
        "autograd.gram",
        "plan.gram.centres",
        "False",
        ("a pooled gradient, float32",),
    ),
    Bug(
        "a P of float32 data summed in float32",
        "kernels.gram_dgrad",
        "WIDER: tl.constexpr = HAS_MEANS",
        "WIDER: tl.constexpr = False and HAS_MEANS",
        ("draws of nearly equal channels, float32",),
    ),
    Bug(
        "one term of A∘W, whatever the data",
        "launch.gram_bn_grad",
        "LEAST=LEAST",
        "LEAST=0.0",
        ("nearly equal channels, float16", "filters orthogonal to the data, bfloat16"),
    ),
    Bug(
        "a second term of A∘W too late",
        "launch.gram_bn_grad",
        "LEAST=LEAST",
        "LEAST=0.25",
        ("draws of channels just alike enough, bfloat16",),
    ),
    Bug(
        "a second term of A∘W that is nothing",
        "kernels.gram_bn_grad",
        "rest = (aw - widened(rounded, ACC))",
        "rest = (aw - aw)",
        ("nearly equal channels, float16",),
    ),
    Bug(
        "dz multiplied by the first term of A∘W alone",
        "kernels.gram_dgrad",
        "reach *= tl.load(aw_terms_ptr)",
        "reach *= 1",
        ("nearly equal channels, float16",),
    ),
    Bug("one long accumulation", GRAM, "if step % FLUSH == FLUSH - 1:", "if step < 0:", ("truncated sums",)),
    Bug(
        "the bits of a mask reversed",
        BITS,
        "<< tl.arange(0, 8)[None, None, :]",
        "<< (7 - tl.arange(0, 8))[None, None, :]",
        ("odd sizes, float16",),
    ),
    Bug(
        "a lost last step of rows, Gram matrix",
        GRAM,
        "steps = tl.cdiv(rows, BLOCK_K)",
        "steps = tl.maximum(rows // BLOCK_K, 1)",
        ("odd sizes, float16",),
    ),
    Bug(
        "a lost last step of rows, weight gradient",
        WGRAD,
        "range(tl.cdiv(rows, BLOCK_K))",
        "range(tl.maximum(rows // BLOCK_K, 1))",
        ("many rows, float16",),
    ),
    Bug(
        "a lost last tile of rows, gradient of the input",
        "launch.gram_dgrad",
        "ceil_div(M, config.block_m)",
        "max(1, M // config.block_m)",
        ("odd sizes, float16",),
    ),
]
