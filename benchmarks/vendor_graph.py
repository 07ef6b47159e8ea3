"""The vendor's graph API (``nvidia-cudnn-frontend``): a pass of a convolution with all that ours fuses, as one graph.

    fprop   [relu(x * scale + shift)] -> conv -> [sum, sum of squares]
    dgrad   [A * dz + B * y + C] -> conv -> [+ residual] -> [mask -> sum dz, sum dz * (y - mean)]
    wgrad   [relu(x * scale + shift)], [A * dz + B * y + C] -> conv

What its runtime fusion takes is the vendor's affair: where it refuses a graph, or is not installed, the candidate is
left out with its own words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import errors
from .cases import ConvCase

Tensors = dict[str, torch.Tensor]
SUMS = 1e-3
"""How far its sums may be from those of what it stored, over those of the absolute values: it adds before it rounds."""


class Unavailable(Exception):
    """A candidate that cannot run here, and why."""


class _Graph:
    """A graph under construction, and the tensors that its nodes stand for."""

    def __init__(self, cudnn: Any, case: ConvCase, t: dict[str, Any]) -> None:
        types = cudnn.data_type
        self.cudnn, self.case, self.t, self.p = cudnn, case, t, case.computed
        self.half = {"bfloat16": types.BFLOAT16, "float16": types.HALF, "float32": types.FLOAT}[self.p.dtype]
        self.single = types.FLOAT
        self.handle = cudnn.create_handle()
        self.graph = cudnn.pygraph(handle=self.handle, io_data_type=self.half, intermediate_data_type=self.single,
                                   compute_data_type=self.single)  # fmt: skip
        self.pack: dict[Any, torch.Tensor] = {}
        self.results: Tensors = {}

    def given(self, t: torch.Tensor) -> Any:
        node = self.graph.tensor_like(t)
        self.pack[node] = t
        return node

    def channels(self, row: torch.Tensor) -> Any:
        return self.given(row.float()[None, :, None, None].contiguous(memory_format=torch.channels_last))

    def affine(self, node: Any, scale: torch.Tensor, shift: torch.Tensor) -> Any:
        return self.graph.add(self.graph.mul(node, self.channels(scale)), self.channels(shift))

    @staticmethod
    def shaped(node: Any, like: torch.Tensor) -> Any:
        """With the layout of ``like``: what the vendor infers of it may be another, or nothing."""
        return node.set_dim(list(like.shape)).set_stride(list(like.stride()))

    def result(self, name: str, node: Any, out: torch.Tensor, dtype: Any) -> None:
        self.shaped(node, out).set_output(True).set_data_type(dtype)
        self.pack[node] = self.results[name] = out

    def summed(self, name: str, node: Any) -> None:
        total = self.graph.reduction(node, mode=self.cudnn.reduction_mode.ADD)
        self.result(name, total, self.sums(self.p.Ci), self.single)

    def sums(self, channels: int) -> torch.Tensor:
        empty = torch.empty((1, channels, 1, 1), device=self.t["w"].device)
        return empty.contiguous(memory_format=torch.channels_last)

    def image(self, channels: int, height: int, width: int) -> torch.Tensor:
        shape, w = (self.p.N, channels, height, width), self.t["w"]
        return torch.empty(shape, dtype=w.dtype, device=w.device, memory_format=torch.channels_last)

    def operands(self) -> dict[str, Any]:
        """x as normalised and dy as formed, where the case has them."""
        t, found = self.t, {name: self.given(self.t[name]) for name in ("x", "dy") if name in self.t}
        if self.case.affine:
            found["x"] = self.graph.relu(self.affine(found["x"], *t["affine"]))
        if self.case.coeffs:
            a, b, c = t["coeffs"]
            scaled = self.graph.mul(found["dy"], self.channels(a))
            found["dy"] = self.graph.add(scaled, self.affine(self.given(t["y"]), b, c))
        return found

    def fprop(self, geometry: dict[str, list[int]]) -> None:
        p, w = self.p, self.given(self.t["w"])
        y = self.graph.conv_fprop(image=self.operands()["x"], weight=w, **geometry)
        self.result("y", y, self.image(p.Co, p.P, p.Q), self.half)
        if self.case.stats:
            for name, total in zip(("sum", "sum of squares"), self.graph.genstats(y), strict=True):
                self.result(name, total, self.sums(p.Co), self.single)

    def dgrad(self, geometry: dict[str, list[int]]) -> None:
        p, t, w = self.p, self.t, self.given(self.t["w"])
        out = self.image(p.Ci, p.H, p.W)
        dx = self.shaped(self.graph.conv_dgrad(loss=self.operands()["dy"], filter=w, **geometry), out)
        if self.case.residual:
            dx = self.graph.add(dx, self.given(t["residual"]))
        if self.case.stats:
            mean, _, scale, shift = t["mask_stats"]
            y = self.given(t["mask_input"])
            dx = self.graph.relu_backward(loss=dx, input=self.affine(y, scale, shift))
            self.summed("sum", dx)
            self.summed("sum of products", self.graph.mul(dx, self.graph.sub(y, self.channels(mean))))
        self.result("dx", dx, out, self.half)

    def wgrad(self, geometry: dict[str, list[int]]) -> None:
        operands = self.operands()
        dw = self.graph.conv_wgrad(image=operands["x"], loss=operands["dy"], **geometry)
        self.result("dw", dw, torch.empty_like(self.t["w"]), self.half)

    def built(self) -> Callable[[], Tensors]:
        p = self.p
        geometry = {"padding": list(p.padding), "stride": list(p.stride), "dilation": list(p.dilation)}
        getattr(self, self.case.kind)(geometry)
        self.graph.build([self.cudnn.heur_mode.A])
        workspace = torch.empty(self.graph.get_workspace_size(), dtype=torch.uint8, device=self.t["w"].device)

        def run() -> Tensors:
            self.cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
            self.graph.execute(self.pack, workspace, handle=self.handle)
            return self.results

        return run


def conv_graph(case: ConvCase, t: dict[str, Any]) -> Callable[[], Tensors]:
    """The graph of ``case`` on the tensors ``t``, built once; a call runs it and returns what it made.

    Unavailable: the package is missing, or the vendor supports no such graph.
    """
    try:
        import cudnn
    except ImportError:
        raise Unavailable("nvidia-cudnn-frontend is not installed") from None
    try:
        return _Graph(cudnn, case, t).built()
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError) as error:
        reason = str(error).strip()
        raise Unavailable(f"the vendor's graph API refuses: {reason[:200] or type(error).__name__}") from error


def verdicts(case: ConvCase, t: dict[str, Any], found: Tensors) -> dict[str, dict[str, Any]]:
    """What a run of :func:`conv_graph` made, judged as ours is; its sums by what it stored itself."""
    name = {"fprop": "y", "dgrad": "dx", "wgrad": "dw"}[case.kind]
    judged = {name: errors.judge_part(found[name], case.references(t))}
    rows = found[name].permute(0, 2, 3, 1).flatten(0, 2).float()
    terms = {"sum": rows, "sum of squares": rows.square()}
    if "sum of products" in found:
        y = t["mask_input"].permute(0, 2, 3, 1).flatten(0, 2).float()
        terms["sum of products"] = rows * (y - t["mask_stats"][0])
    for what in terms.keys() & found.keys():
        judged[what] = errors.judge_sums(found[what].flatten()[None], terms[what], most=SUMS)
    return judged
