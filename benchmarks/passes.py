"""The passes over memory as the staged route calls them: inputs, ours, eager's way and what is right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from fused_resnet.launch import bn_act, bn_act_grad, bn_stats, stem_pool
from fused_resnet.launch.bits import empty_bits
from fused_resnet.launch.tiles import StatTiles
from fused_resnet.plan.config import PassConfig
from fused_resnet.plan.passes import pass_config, reduce_config, step, window_config

from . import errors, tensors

Tensors = dict[str, Any]
KINDS = (
    "bn_stats",
    "bn_finalize",
    "bn_act",
    "bn_act+res",
    "bn_act+proj",
    "bn_act_grad_reduce",
    "bn_act_grad_reduce+bits",
    "bn_act_grad_reduce+bits+proj",
    "bn_grad_finalize",
    "bn_grad_apply",
    "stem_pool",
    "stem_pool_grad_reduce",
    "stem_pool_grad_apply",
)
TILED = tuple(kind for kind in KINDS if "finalize" not in kind)
"""Those whose tile is an argument; merges choose theirs by how many tiles there are."""


@dataclass(frozen=True)
class PassCase:
    """One pass over an [N, C, H, W] tensor."""

    kind: str
    N: int
    C: int
    H: int
    W: int
    dtype_name: str = "bfloat16"
    interpreter: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind} {self.H}px {self.C}"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype_name)

    @property
    def rows(self) -> int:
        return self.N * self.H * self.W

    def config(self, sm_count: int = 132) -> PassConfig:
        """The planner's. The interpreter's cost here is per element: a rehearsal takes small ones."""
        if self.interpreter:
            return PassConfig(64, 16, 1)
        if self.kind.startswith("stem"):
            return window_config(self.C)
        size = (self.rows, self.C, self.dtype.itemsize, sm_count)
        if self.kind == "bn_stats":
            return reduce_config(*size)
        if "reduce" in self.kind:
            return reduce_config(*size, tensors=3 + ("+proj" in self.kind))
        return pass_config(*size)

    def candidates(self, sm_count: int = 132) -> list[PassConfig]:
        """Tiles worth measuring, the rule's first: shorter, longer, wider and narrower ones, and twice the warps."""
        rule = self.config(sm_count)
        if self.interpreter:
            return [rule, replace(rule, block_m=rule.block_m // 2)]
        m, c = rule.block_m, rule.block_c
        tiles = [(m // 2, c, 4), (2 * m, c, 4), (m // 4, c, 4), (m // 2, 2 * c, 4), (m, 2 * c, 4), (2 * m, c // 2, 4),
                 (m, c, 8), (2 * m, c, 8)]  # fmt: skip
        found = dict.fromkeys([rule, *(PassConfig(*tile) for tile in tiles)])
        return [config for config in found if config == rule or self._fits(config)]

    def _fits(self, config: PassConfig) -> bool:
        """Whether a program's tile is whole steps of channels that are there."""
        if not 16 <= config.block_c <= max(16, self.C) or config.block_m < 8:
            return False
        groups, group = step(config, self.dtype.itemsize, vectors=4)
        return self.kind.startswith("stem") or config.block_m % (groups * group) == 0

    def inputs(self, device: str, *, empty: bool = False) -> Tensors:
        """Random inputs of the kind; with ``empty`` uninitialised ones, for a compilation that reads nothing."""
        acc = torch.float64 if self.dtype == torch.float64 else torch.float32

        def image(h: int = self.H, w: int = self.W) -> torch.Tensor:
            if empty:
                return torch.empty((self.N, h, w, self.C), dtype=self.dtype, device=device).permute(0, 3, 1, 2)
            return tensors.image(self.N, self.C, h, w, self.dtype, device)

        def stats() -> torch.Tensor:
            offset = torch.tensor([[1.0], [0.0], [0.0], [1.0]], device=device, dtype=acc)
            return tensors.channels(4, self.C, device, acc) - offset

        t: Tensors = {"y": image(), "stats": stats(), "coeffs": tensors.channels(3, self.C, device, acc)}
        if "+res" in self.kind or "+proj" in self.kind:
            t["residual"] = image()
        if "+proj" in self.kind:
            t["residual_stats"] = stats()
        if "+bits" in self.kind:
            t["out"] = image() if empty else torch.relu(image())
            t["bits"] = tensors.relu_bits(t["out"])
        elif self.kind.startswith("bn_act+"):
            t["bits"] = empty_bits(t["y"].shape, t["y"].device)
        if "grad" in self.kind and "stem" not in self.kind:
            t["dout"] = image()
        if self.kind == "bn_finalize":
            t["tiles"] = bn_stats.bn_stats(t["y"], PassCase("bn_stats", *self._shape()).config())
            t["gamma"], t["beta"] = tensors.channels(2, self.C, device)
            t["running"] = torch.zeros(self.C, device=device), torch.ones(self.C, device=device)
        if self.kind == "bn_grad_finalize":
            t["tiles"] = torch.randn(2, 2048, self.C, device=device, dtype=acc)
        if "stem_pool_grad" in self.kind:
            t["out"], t["index"] = stem_pool.stem_pool(
                t["y"], t["stats"], PassCase("stem_pool", *self._shape()).config()
            )
            t["dout"] = image((self.H + 1) // 2, (self.W + 1) // 2)
        return t

    def _shape(self) -> tuple[Any, ...]:
        return self.N, self.C, self.H, self.W, self.dtype_name, self.interpreter

    def ours(self, t: Tensors, config: PassConfig) -> Any:
        """The kernel: an image, or (image or None, tiles), or statistics."""
        kind, y, stats = self.kind, t["y"], t["stats"]
        residual = {"residual": t.get("residual"), "residual_stats": t.get("residual_stats")}
        if kind == "bn_stats":
            return bn_stats.bn_stats(y, config)
        if kind == "bn_finalize":
            mean, var = t["running"]
            affine = {"weight": t["gamma"], "bias": t["beta"], "eps": 1e-5}
            return bn_stats.bn_finalize(t["tiles"], running_mean=mean, running_var=var, momentum=0.1, **affine)
        if kind.startswith("bn_act_grad_reduce"):
            return bn_act_grad.bn_act_grad_reduce(t["dout"], y, stats, config, bits=t.get("bits"), **residual)
        if kind.startswith("bn_act"):
            return bn_act.bn_act(y, stats, config, bits=t.get("bits"), **residual)
        if kind == "bn_grad_finalize":
            return bn_act_grad.bn_grad_finalize(t["tiles"], stats, None, self.rows)
        if kind == "bn_grad_apply":
            return bn_act_grad.bn_grad_apply(t["dout"], y, t["coeffs"], config)
        if kind == "stem_pool":
            return stem_pool.stem_pool(y, stats, config)
        if kind == "stem_pool_grad_reduce":
            return stem_pool.stem_pool_grad_reduce(t["dout"], t["index"], t["out"], y, stats, config)
        return stem_pool.stem_pool_grad_apply(t["dout"], t["index"], t["out"], y, t["coeffs"], config)

    def check(self, t: Tensors, config: PassConfig) -> dict[str, dict[str, Any]]:
        """Runs the kernel on poisoned memory and judges everything that it returns."""
        with errors.poisoned():
            result = self.ours(t, config)
        high = torch.promote_types(self.dtype, torch.float32)
        y = t["y"].to(high)
        if self.kind == "bn_stats":
            return {"statistics": errors.judge_moments(result.data, result.rows_per_tile, _rows(t["y"]))}
        if self.kind == "bn_finalize":
            return self._check_finalize(t, result)
        if self.kind == "bn_grad_finalize":
            dgamma, dbeta, _ = result
            sums = t["tiles"].double()
            return {"dbeta": errors.judge_sums(dbeta[None], sums[0]),
                    "dgamma": errors.judge_sums(dgamma[None], sums[1] * t["stats"][1])}  # fmt: skip
        if self.kind.startswith("bn_act_grad_reduce"):
            return self._check_reduce(t, y, *result)
        if self.kind.startswith("bn_act"):
            oracle = self._normalised(y, t["stats"], fused=True)
            if "residual" in t:
                residual = t["residual"].to(high)
                oracle = oracle + (
                    self._normalised(residual, t["residual_stats"]) if "+proj" in self.kind else residual
                )
            oracle = torch.relu(oracle)
            found = {"out": errors.judge(result, oracle.to(self.dtype), oracle)}
            if "bits" in t:
                wrong = float((t["bits"] != tensors.relu_bits(result)).sum())
                found["bits"] = {"rms": wrong, "failed": "E" if wrong else "", "ok": not wrong}
            return found
        if self.kind == "bn_grad_apply":
            oracle = self._applied(t["dout"].to(high), y, t["coeffs"])
            return {"dy": errors.judge(result, oracle.to(self.dtype), oracle)}
        return self._check_stem(t, y, result)

    @staticmethod
    def _normalised(y: torch.Tensor, stats: torch.Tensor, fused: bool = False) -> torch.Tensor:
        return torch.addcmul(_row(stats[3]), y, _row(stats[2])) if fused else y * _row(stats[2]) + _row(stats[3])

    @staticmethod
    def _applied(dz: torch.Tensor, y: torch.Tensor, coeffs: torch.Tensor) -> torch.Tensor:
        return _row(coeffs[0]) * dz + _row(coeffs[1]) * y + _row(coeffs[2])

    def _check_finalize(self, t: Tensors, stats: torch.Tensor) -> dict[str, dict[str, Any]]:
        assert isinstance(t["tiles"], StatTiles)
        rows = _rows(t["y"]).double() if self.rows < 1 << 22 else _rows(t["y"]).float()
        var, mean = torch.var_mean(rows, 0, correction=0)
        scale = t["gamma"] / torch.sqrt(var + 1e-5)
        true = torch.stack([mean, 1 / torch.sqrt(var + 1e-5), scale, t["beta"] - mean * scale])
        error = float((stats - true).abs().max() / true.abs().max())
        return {"stats": {"rms": error, "failed": "" if error < 1e-5 else "S", "ok": error < 1e-5}}

    def _check_reduce(
        self, t: Tensors, y: torch.Tensor, dz: torch.Tensor, tiles: torch.Tensor
    ) -> dict[str, dict[str, Any]]:
        gate = t["out"].to(y.dtype) if "out" in t else self._normalised(y, t["stats"])
        clear = (gate == 0) | (gate.abs() > 1e-5)
        expected = torch.where(gate <= 0, torch.zeros((), dtype=dz.dtype, device=dz.device), t["dout"])
        wrong = float(((dz != expected) & clear).sum())
        found = {"dz": {"rms": wrong, "failed": "E" if wrong else "", "ok": not wrong}}
        rows = _rows(dz).to(y.dtype)
        found["sum dz"] = errors.judge_sums(tiles[0], rows)
        found["sum dz*(y-mean)"] = errors.judge_sums(tiles[1], rows * (_rows(y) - t["stats"][0]))
        if "+proj" in self.kind:
            residual = _rows(t["residual"]).to(y.dtype) - t["residual_stats"][0]
            found["sum dz*(residual-mean)"] = errors.judge_sums(tiles[2], rows * residual)
        return found

    def _check_stem(self, t: Tensors, y: torch.Tensor, result: Any) -> dict[str, dict[str, Any]]:
        if self.kind == "stem_pool":
            oracle = F.max_pool2d(torch.relu(self._normalised(y, t["stats"])), 3, 2, 1)
            return {"out": errors.judge(result[0], oracle.to(self.dtype), oracle)}
        dz = self._unpooled(t, y)
        if self.kind == "stem_pool_grad_apply":
            oracle = self._applied(dz, y, t["coeffs"])
            return {"dy": errors.judge(result, oracle.to(self.dtype), oracle)}
        rows = _rows(dz)
        return {"sum dz": errors.judge_sums(result[0], rows),
                "sum dz*(y-mean)": errors.judge_sums(result[1], rows * (_rows(y) - t["stats"][0]))}  # fmt: skip

    def _unpooled(self, t: Tensors, y: torch.Tensor) -> torch.Tensor:
        """dout sent back through the windows and the ReLU, by the indices that the forward kernel wrote."""
        dout = torch.where(t["out"] <= 0, torch.zeros((), dtype=self.dtype, device=y.device), t["dout"]).to(y.dtype)
        tap = t["index"].long()
        p, q = (torch.arange(size, device=y.device) for size in dout.shape[2:])
        h, w = 2 * p[:, None] - 1 + tap // 3, 2 * q[None, :] - 1 + tap % 3
        dz = torch.zeros(*y.shape[:2], self.H * self.W, dtype=y.dtype, device=y.device)
        dz.scatter_add_(2, (h * self.W + w).flatten(2), dout.flatten(2))
        return dz.view(y.shape).contiguous(memory_format=torch.channels_last)


def _row(channels: torch.Tensor) -> torch.Tensor:
    return channels[None, :, None, None]


def _rows(image: torch.Tensor) -> torch.Tensor:
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def cases(dry: bool, batch: int = 256, dtype: str = "bfloat16") -> list[PassCase]:
    """Every pass at the shapes of ResNet-50 that it meets, the largest first."""
    wide = [(256, 56), (512, 28), (1024, 14), (2048, 7)]
    narrow = [(64, 56), (128, 28), (256, 14), (512, 7)]
    where = {
        "bn_act": narrow,
        "bn_act_grad_reduce": narrow[:2],
        "bn_grad_apply": [*narrow, *wide[:2]],
        "bn_stats": [*narrow[:2], wide[0]],
        "bn_finalize": [wide[0], wide[3]],
        "bn_grad_finalize": [wide[0], wide[3]],
    }
    if dry:
        return [PassCase(kind, 2, 16, 9, 9, "float32", interpreter=True) for kind in KINDS]
    found = []
    for kind in KINDS:
        shapes = [(64, 112)] if kind.startswith("stem") else where.get(kind, wide)
        found += [PassCase(kind, batch, c, side, side, dtype) for c, side in shapes]
    return found
