"""The convolution kernels as the staged route calls them: inputs, ours, eager's way, the vendor's, what is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fused_resnet.launch import vendor
from fused_resnet.launch.bits import empty_bits
from fused_resnet.launch.bn_act_grad import bn_act_grad_reduce, bn_grad_apply, bn_grad_finalize
from fused_resnet.launch.conv_dgrad import conv_dgrad
from fused_resnet.launch.conv_fprop import conv_fprop
from fused_resnet.launch.conv_wgrad import conv_wgrad
from fused_resnet.launch.gram import gram
from fused_resnet.launch.gram_wgrad import gram_wgrad
from fused_resnet.launch.stem_conv import stem_conv_fprop, stem_conv_wgrad
from fused_resnet.plan.candidates import candidates, gram_candidates
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.gram import has_pivot
from fused_resnet.plan.passes import pass_config, reduce_config
from fused_resnet.plan.problem import ConvProblem
from fused_resnet.plan.tables import pass_name
from fused_resnet.plan.target import Target

from . import centring, errors, problems, tensors

Tensors = dict[str, Any]
SAMPLE = 4
"""Images at each end of the batch whose every output is compared."""


@dataclass(frozen=True)
class ConvCase:
    """One pass of one convolution with the prologue and epilogue of its role in a block."""

    problem: ConvProblem
    kind: str
    role: str
    affine: bool = False
    """The input is relu(x * scale + shift), formed on load."""
    coeffs: bool = False
    """dy is A * dz + B * y + C, formed on load."""
    stats: bool = False
    """fprop's statistics, dgrad's mask and sums: in the epilogue."""
    residual: bool = False
    """dgrad adds another gradient of its input."""
    compact: bool = False
    """dgrad of a strided 1x1: on the pixels that it sampled alone. Whoever adds it elsewhere knows the stride."""

    gram: bool = False
    """The Gram route's: fprop ends in BN, residual and ReLU, dgrad is one product over [dz | a]; or the Gram matrix."""
    masked: bool = False
    """The Gram route's: dz is formed from the gradient above the ReLU, which wgrad writes and sums, too."""
    formed: bool = False
    """dy was formed by a pass before; of the Gram route's fprop, its input by the Gram kernel."""

    def candidates(self, target: Target) -> list[GemmConfig]:
        """Configurations worth measuring, the planner's default first."""
        if self.gram and (self.kind in ("dgrad", "gram") or self.masked):
            return gram_candidates(self.problem, self.kind, target)
        formed = self.formed or (self.gram and self.kind == "wgrad")
        found = candidates(self.problem, self.kind, target, formed=formed, epilogue="residual" if self.gram else "")
        return [config for config in found if config.form == "rows" or not self.residual]  # boxes take none

    @property
    def writes_dz(self) -> bool:
        return self.masked and self.kind == "wgrad"

    @property
    def bytes(self) -> int:
        """Of the tensors, each once."""
        p, itemsize = self.problem, self.dtype.itemsize
        if self.kind == "gram":
            return p.M * p.Ci * itemsize
        return problems.conv_bytes(p, itemsize) + p.M * p.Co * itemsize * self.writes_dz

    @property
    def first(self) -> bool:
        """Whether it reads the block's input, as the planner asks."""
        return self.role in ("conv1", "projection")

    @property
    def computed(self) -> ConvProblem:
        """What our kernel computes of ``problem``."""
        return self.problem.sampled() if self.compact else self.problem

    @property
    def variant(self) -> str:
        if self.kind == "gram":
            return pass_name("gram")
        epilogue = self.writes_dz or (self.stats and not self.gram)
        prologue = self.affine or self.coeffs or (self.masked and self.kind == "dgrad")
        return pass_name(self.kind, prologue=prologue, epilogue=epilogue, gram=self.gram, formed=self.formed)

    @property
    def name(self) -> str:
        return f"{self.variant}{'+res' * self.residual} {problems.Layer(self.problem, self.role, 1).name}"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.problem.dtype)

    def inputs(self, device: str, *, empty: bool = False) -> Tensors:
        """Random inputs; with ``empty`` uninitialised ones, for a compilation that reads nothing."""
        p = self.computed

        def image(c: int, h: int, w: int) -> torch.Tensor:
            if empty:
                return torch.empty((p.N, h, w, c), dtype=self.dtype, device=device).permute(0, 3, 1, 2)
            return tensors.image(p.N, c, h, w, self.dtype, device)

        def gradient(c: int, h: int, w: int) -> torch.Tensor:
            # Small, so that the sums over 10^6 pixels stay in float16's range.
            return image(c, h, w) if empty else image(c, h, w).mul_(0.01)

        acc = torch.float64 if self.dtype == torch.float64 else torch.float32
        t: Tensors = {"w": tensors.weight(p, device)}
        if self.kind != "dgrad":
            t["x"] = image(p.Ci, p.H, p.W)
        if self.kind in ("dgrad", "wgrad", "pair"):
            t["dy"] = gradient(p.Co, p.P, p.Q)
        if self.affine:
            t["affine"] = tensors.channels(2, p.Ci, device, acc) - torch.tensor(
                [[0.0], [1.0]], device=device, dtype=acc
            )
        if self.coeffs or (self.formed and not self.gram):
            t["y"] = image(p.Co, p.P, p.Q)
            t["coeffs"] = tensors.channels(3, p.Co, device, acc)
            t["coeffs"][1:] = torch.randn_like(t["coeffs"][1:]) * torch.tensor(
                [[1e-2], [1e-3]], device=device, dtype=acc
            )
        if self.kind == "dgrad" and self.stats:
            t["mask_input"] = image(p.Ci, p.H, p.W)
            offset = torch.tensor([[1.0], [0.0], [0.0], [1.0]], device=device, dtype=acc)
            t["mask_stats"] = tensors.channels(4, p.Ci, device, acc) - offset
        if self.residual:
            t["residual"] = gradient(p.Ci, p.H, p.W)
        if self.masked or (self.gram and self.kind == "wgrad"):
            out = image(p.Co, p.P, p.Q)
            t["out"] = out if empty else out.relu_()
            t["bits"] = tensors.relu_bits(t["out"])
        if self.gram and self.kind == "fprop":
            t["output_affine"] = tensors.channels(2, p.Co, device, acc)
            t["shortcut"] = image(p.Co, p.P, p.Q)
            t["bits"] = empty_bits(t["shortcut"].shape, t["shortcut"].device)
        if self.gram and self.kind in ("dgrad", "wgrad"):
            t |= centring.of_gradients(p, self.kind, t["w"], acc)
        if self.kind == "gram" and has_pivot(p.dtype):
            t["pivot"] = self.pivot(t)
        return t

    def pivot(self, t: Tensors) -> torch.Tensor:
        return centring.pivot_of_norm(t["x"], t["affine"])

    def ours(self, t: Tensors, config: GemmConfig) -> tuple[torch.Tensor, Any]:
        """The kernel: (output, tiles or None)."""
        if self.problem.is_stem:
            if self.kind == "fprop":
                return stem_conv_fprop(t["x"], t["w"], self.problem, config, stats=self.stats)
            return stem_conv_wgrad(t["x"], t["dy"], self.problem, config, out_dtype=self.dtype), None
        if self.kind == "gram":
            return gram(t["x"], t["affine"], config, pivot=t.get("pivot"))[:2]
        if self.writes_dz:
            more = {"store_dz": True, "input_mean": t.get("mean")}
            found, *tiles = gram_wgrad(t["dy"], t["bits"], t["x"], t["affine"], config, **more)
            return found.view(t["w"].shape), tiles
        if self.kind == "dgrad" and self.gram:
            return centring.dgrad(t, t["mask_input"], t["mask_stats"], config, bits=t["bits"] if self.masked else None)
        if self.kind == "fprop":
            more = {"input_affine": t.get("affine"), "stats": self.stats}
            if self.gram:
                more |= {
                    "output_affine": t["output_affine"],
                    "bits": t["bits"],
                    "residual": t["shortcut"],
                    "relu": True,
                }
            return conv_fprop(t["x"], t["w"], self.problem, config, **more)
        if self.kind == "dgrad":
            extra = {name: t.get(name) for name in ("mask_input", "mask_stats", "residual")}
            return conv_dgrad(t["dy"], t["w"], self.computed, config, **self._on_load(t), **extra)
        extra = {**self._on_load(t), "input_affine": t.get("affine"), "input_mean": t.get("mean")}
        return conv_wgrad(t["x"], t["dy"], self.problem, config, out_dtype=self.dtype, **extra), None

    def _on_load(self, t: Tensors) -> Tensors:
        return {"y": t["y"], "coeffs": t["coeffs"]} if self.coeffs else {}

    @property
    def before_share(self) -> float:
        """Which part of the pass before it is its own: both gradients read the same dy."""
        if self.formed:
            return 0.0 if self.gram else 0.5
        return float(self.gram and self.kind == "wgrad" and not self.masked)

    def written_before(self) -> int:
        """Bytes that a kernel before it writes for it alone: fprop's input as formed, or the dz that dgrad reads."""
        p, itemsize = self.problem, self.dtype.itemsize
        if self.gram and self.formed and self.kind == "fprop":
            return p.M * p.Ci * itemsize
        return p.M * p.Co * itemsize if self.gram and self.stats and self.kind == "dgrad" and not self.masked else 0

    def before(self, t: Tensors, sm_count: int) -> None:
        """The pass that ours needs before it, where ``before_share`` is not 0: dy, or dz and its sums."""
        size = (self.problem.M, self.problem.Co, self.dtype.itemsize, sm_count)
        if self.formed:
            bn_grad_apply(t["dy"], t["y"], t["coeffs"], pass_config(*size))
        else:
            _, sums = bn_act_grad_reduce(t["dy"], None, None, reduce_config(*size, tensors=2), bits=t["bits"])
            bn_grad_finalize(sums, sums.new_ones(4, self.problem.Co), None, self.problem.M)

    def vendor(self, t: Tensors) -> torch.Tensor:
        """The vendor's convolution alone, or its product of a matrix with itself."""
        p = self.problem
        if self.kind == "gram":
            rows = t["x"].permute(0, 2, 3, 1).flatten(0, 2)
            return rows.T @ rows
        if self.kind == "fprop":
            return vendor.conv_fprop(t["x"], t["w"], p)
        if self.kind == "dgrad":
            like = t.get("like")
            if like is None:
                like = torch.empty_strided((p.N, p.Ci, p.H, p.W), _nhwc(p), dtype=self.dtype, device=t["dy"].device)
                t["like"] = like
            return vendor.conv_dgrad(t["dy"], like, t["w"], p)
        return vendor.conv_wgrad(t["x"], t["dy"], t["w"], p)

    def passes_bytes(self) -> int:
        """Bytes of the passes that the vendor's way needs besides. dgrad and wgrad share the one that forms dy."""
        p, itemsize = self.problem, self.dtype.itemsize
        x, y = p.N * p.H * p.W * p.Ci * itemsize, p.M * p.Co * itemsize
        total = 0
        if self.gram:
            return 0  # the vendor has no such way
        if self.kind == "fprop":
            total += 2 * x * self.affine + y * self.stats
        else:
            total += 3 * y // 2 * (self.coeffs or self.formed)
        if self.kind == "dgrad":
            total += 3 * x * (self.stats or self.residual)
        return total

    def mathematics(self, t: Tensors, dtype: torch.dtype) -> torch.Tensor:
        """What eager PyTorch computes, each result rounded to ``dtype``: eager in the inputs' own, an oracle above."""
        acc = torch.promote_types(dtype, torch.float32)

        def row(name: str, index: int) -> torch.Tensor:
            return t[name][index].to(acc)[None, :, None, None]

        p, w = self.computed, t["w"].to(dtype)
        x, dy = (t[name].to(dtype) if name in t else None for name in ("x", "dy"))
        if self.affine:
            x = torch.relu(x.to(acc) * row("affine", 0) + row("affine", 1)).to(dtype)
        if self.masked:
            dy = torch.where(t["out"] <= 0, torch.zeros((), dtype=dtype, device=dy.device), dy)
        if self.coeffs:
            dy = row("coeffs", 0) * dy.to(acc) + row("coeffs", 1) * t["y"].to(acc) + row("coeffs", 2)
            dy = dy.to(dtype)
        if self.kind == "fprop":
            y = vendor.conv_fprop(x, w, p)
            if self.gram:
                z = y.to(acc) * row("output_affine", 0) + row("output_affine", 1) + t["shortcut"].to(acc)
                y = torch.relu(z).to(dtype)
            return y
        if self.kind == "wgrad":
            return vendor.conv_wgrad(centring.centred(x, t), dy, w, p)
        like = torch.empty_strided((dy.shape[0], p.Ci, p.H, p.W), _nhwc(p), dtype=dtype, device=dy.device)
        dx = vendor.conv_dgrad(centring.centred_gradient(dy, t, self.problem.M), like, w, p)
        if self.residual:
            dx = dx + t["residual"].to(dtype)
        if self.gram:
            dx = centring.with_products(dx, torch.relu(self._normalised(t)).to(self.dtype).to(dtype), p, t)
        if self.stats:
            dx = torch.where(self._normalised(t) <= 0, torch.zeros((), dtype=dtype, device=dx.device), dx)
        return dx

    @staticmethod
    def _normalised(t: Tensors) -> torch.Tensor:
        stats = t["mask_stats"]
        return t["mask_input"].to(stats.dtype) * stats[2][None, :, None, None] + stats[3][None, :, None, None]

    def _rows(self, t: Tensors) -> torch.Tensor:
        """relu(x * scale + shift) as the products see it, [M, Ci]."""
        scale, shift = (row[None, :, None, None] for row in t["affine"])
        a = torch.relu(t["x"].to(scale.dtype) * scale + shift).to(self.dtype)
        return a.permute(0, 2, 3, 1).flatten(0, 2)

    def references(self, t: Tensors) -> errors.Reference:
        """Eager's result and the oracle's: of the weight gradient all, of the others the first and last images."""
        high = torch.float32 if self.dtype in (torch.bfloat16, torch.float16) else torch.float64
        if self.kind == "gram":
            rows = self._rows(t).double()
            if "pivot" in t:
                rows -= centring.taken_off(t["pivot"], t.get("affine"), self.dtype).double()
            return errors.Reference(slice(None), rows, rows.T @ rows, None)
        sample, part = (t, slice(None)) if self.kind == "wgrad" else self._ends(t)
        with errors.exact_float32():
            oracle = self.mathematics(sample, high)
        eager, clear = self.mathematics(sample, self.dtype), None
        if self.kind == "dgrad" and self.stats:
            # Whether a value this near to zero passes depends on whether a multiply and an add were fused.
            clear = self._normalised(sample).abs() > 1e-5
            eager, oracle = eager * clear, oracle * clear
        return errors.Reference(part, eager, oracle, clear)

    def check(
        self, t: Tensors, config: GemmConfig, reference: errors.Reference | None = None
    ) -> dict[str, dict[str, Any]]:
        """Runs the kernel on poisoned memory and judges everything that it returns."""
        with errors.poisoned():
            out, tiles = self.ours(t, config)
        reference = reference or self.references(t)
        if self.kind == "gram":
            sums = errors.judge_sums(tiles[None], reference.eager)
            return {"products": errors.judge_exact(out, reference.oracle), "sums": sums}
        name = {"fprop": "y", "dgrad": "dx", "wgrad": "dw", "pair": "dx"}[self.kind]
        found = {name: errors.judge_part(out, reference)}
        if not bool(torch.isfinite(out).all()):
            found["whole output"] = {"rms": float("inf"), "failed": "N", "ok": False}
        if tiles is not None:
            found.update(self._check_tiles(t, out, tiles))
        return found

    def _check_tiles(self, t: Tensors, out: torch.Tensor, tiles: Any) -> dict[str, dict[str, Any]]:
        if self.writes_dz:
            (sums, dz), expected = tiles, torch.where(t["out"] <= 0, torch.zeros_like(t["dy"]), t["dy"])
            rows = expected.permute(0, 2, 3, 1).flatten(0, 2).to(sums.dtype)
            return {"sum dz": errors.judge_sums(sums[None], rows), "dz": errors.judge_exact(dz, expected)}
        rows = out.permute(0, 2, 3, 1).flatten(0, 2)
        if self.kind == "fprop":
            return {"statistics": errors.judge_moments(tiles.data, tiles.rows_per_tile, rows)}
        centred = t["mask_input"].permute(0, 2, 3, 1).flatten(0, 2).to(t["mask_stats"].dtype) - t["mask_stats"][0]
        dz = rows.to(centred.dtype)
        return {"sum dz": errors.judge_sums(tiles[0], dz), "sum dz*(y-mean)": errors.judge_sums(tiles[1], dz * centred)}

    def _ends(self, t: Tensors) -> tuple[Tensors, Any]:
        n = self.problem.N
        part = list(range(n)) if n <= 2 * SAMPLE else [*range(SAMPLE), *range(n - SAMPLE, n)]
        per_image = ("x", "dy", "y", "mask_input", "residual", "shortcut", "block_input", "out")
        return {name: v[part].contiguous(memory_format=torch.channels_last) if name in per_image else v
                for name, v in t.items()}, part  # fmt: skip


def _nhwc(p: ConvProblem) -> tuple[int, int, int, int]:
    return p.H * p.W * p.Ci, 1, p.W * p.Ci, p.Ci
