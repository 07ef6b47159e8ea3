"""Planted bugs of the Gram route: each remedy that its algebra needs taken away, and slips of the kind kernels have."""

from __future__ import annotations

from tests.planted_bugs import Bug

GRAM, FINISH, WGRAD, BITS = "kernels.gram", "kernels.gram_bn", "kernels.gram_wgrad", "kernels.bits"

BUGS = [
    Bug(
        "the bias from C W, not from the matrices as rounded",
        "launch.gram_bn",
        "        aw_ptr=aw,\n        p_ptr=product,\n        dbeta_ptr",
        "        aw_ptr=(exact := stats[2][:, None] * weight.flatten(1).to(acc_dtype))"
        " * (scales[0] if scaled else 1),\n"
        "        p_ptr=torch.cat([weight.flatten(1).to(acc_dtype).T @ (share[:, None] * exact), 0 * product[1]])"
        " * (scales[1] if scaled else 1),\n        dbeta_ptr",
        ("a gradient of mean 30, float16",),
    ),
    Bug(
        "sums of the unrounded input",
        "autograd.gram",
        "    kept = _statistics(layer, problem.M, *products)\n",
        "    pre = y.to(y_stats.dtype) * y_stats[2][:, None, None] + y_stats[3][:, None, None]\n"
        "    products[1] = pre.relu().sum((0, 2, 3))\n"
        "    kept = _statistics(layer, problem.M, *products)\n",
        ("far from zero, float16",),
    ),
    Bug(
        "a covariance that is not centred",
        FINISH,
        "spread = tl.fma(-c_i[:, None], m_j[None, :], g)",
        "spread = g",
        ("odd sizes, float16",),
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
        "range(tl.cdiv(rows, BLOCK_K))",
        "range(tl.maximum(rows // BLOCK_K, 1))",
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
        "triton.cdiv(M, config.block_m)",
        "max(1, M // config.block_m)",
        ("odd sizes, float16",),
    ),
]
