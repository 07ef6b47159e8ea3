"""The vendor's graph API (``nvidia-cudnn-frontend``): a convolution with its prologue and statistics as one graph.

What its runtime fusion takes is the vendor's affair: where it refuses a graph, or is not installed, the candidate is
left out with its own words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .cases import ConvCase


class Unavailable(Exception):
    """A candidate that cannot run here, and why."""


def conv_graph(case: ConvCase, t: dict[str, Any]) -> Callable[[], dict[str, torch.Tensor]]:
    """``[relu(x * scale + shift)] -> conv -> [sum, sum of squares]``, built once; a call runs it and returns tensors.

    Unavailable: the package is missing, or the vendor supports no such graph.
    """
    try:
        import cudnn
    except ImportError:
        raise Unavailable("nvidia-cudnn-frontend is not installed") from None
    types = {"bfloat16": cudnn.data_type.BFLOAT16, "float16": cudnn.data_type.HALF, "float32": cudnn.data_type.FLOAT}
    p, half, single = case.problem, types[case.problem.dtype], cudnn.data_type.FLOAT
    try:
        handle = cudnn.create_handle()
        graph = cudnn.pygraph(handle=handle, io_data_type=half, intermediate_data_type=single, compute_data_type=single)
        x, w = graph.tensor_like(t["x"]), graph.tensor_like(t["w"])
        pack, operand = {x: t["x"], w: t["w"]}, x
        if case.affine:
            rows = [row[None, :, None, None].contiguous(memory_format=torch.channels_last) for row in t["affine"]]
            scale, shift = (graph.tensor_like(row) for row in rows)
            pack |= {scale: rows[0], shift: rows[1]}
            operand = graph.relu(graph.add(graph.mul(x, scale), shift))
        padding, stride, dilation = list(p.padding), list(p.stride), list(p.dilation)
        y = graph.conv_fprop(image=operand, weight=w, padding=padding, stride=stride, dilation=dilation)
        y.set_output(True).set_data_type(half)
        like = t["x"]
        out = torch.empty(
            (p.N, p.Co, p.P, p.Q), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
        )
        pack[y], results = out, {"y": out}
        if case.stats:
            for name, total in zip(("sum", "sum of squares"), graph.genstats(y), strict=True):
                total.set_output(True).set_data_type(single)
                results[name] = torch.empty((1, p.Co, 1, 1), device=like.device)
                pack[total] = results[name]
        graph.build([cudnn.heur_mode.A])
        workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=like.device)
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError) as error:
        reason = str(error).strip()
        raise Unavailable(f"the vendor's graph API refuses: {reason[:200] or type(error).__name__}") from error

    def run() -> dict[str, torch.Tensor]:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(pack, workspace, handle=handle)
        return results

    return run
