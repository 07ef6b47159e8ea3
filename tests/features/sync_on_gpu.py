"""What each of two processes does on one GPU for test_sync_on_gpu.py: our blocks beside PyTorch's own SyncBatchNorm.

``python -m tests.features.sync_on_gpu RANK FOLDER [DEVICE]``. The process group is gloo's, since NCCL
takes one process a GPU.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import reference
from tests.features.sync_case import RANKS, gathers

LIMITS = {torch.float32: 5e-3, torch.bfloat16: 6e-2}
"""Of the relative RMS difference: PyTorch rounds, too, and a ReLU may let through what it does not for us."""


def blocks(device: str) -> list[nn.Module]:
    """One over its own input and one with a projection, both wide enough for whole tiles."""
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(64, 128, 1, 2, bias=False), nn.BatchNorm2d(128))
    made = [reference.Bottleneck(128, 32), reference.Bottleneck(64, 32, 2, down)]
    return [
        nn.SyncBatchNorm.convert_sync_batchnorm(each).to(device, memory_format=torch.channels_last) for each in made
    ]


def results(block: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        out = block(x)
    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    out.backward(torch.randn(out.shape, generator=generator).to(out))
    found = {"out": out.detach(), "dx": x.grad, **{name: p.grad for name, p in block.named_parameters()}}
    return found | {name: b for name, b in block.named_buffers() if b.is_floating_point()}


def main(rank: int, folder: Path, device: str = "cuda") -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.backends.cudnn.allow_tf32 = False
    failures = []
    for route in ("staged", "gram"):
        for theirs in blocks(device):
            for dtype in LIMITS if device == "cuda" else (torch.float32,):
                ours, beside = copy.deepcopy(theirs), copy.deepcopy(theirs)
                fr.convert(ours)
                generator = torch.Generator().manual_seed(rank)
                x = torch.randn((3 - rank, ours.conv1.in_channels, 14, 14), generator=generator) + rank
                x = x.to(device, memory_format=torch.channels_last)
                with fr.use_route(route), fr.record_launches() as launches:
                    mine = results(ours, x, dtype)
                if device == "cpu":  # where PyTorch has no SyncBatchNorm of its own
                    fr.convert(beside)
                with fr.use_route("reference"):
                    expected = results(beside, x, dtype)
                for name, value in expected.items():
                    error = ((mine[name] - value).float().norm() / value.float().norm()).item()
                    if not error <= LIMITS[dtype]:
                        failures.append(f"{route} {type(theirs.downsample).__name__} {dtype} {name}: {error:.1e}")
                norms = sum(isinstance(module, nn.SyncBatchNorm) for module in ours.modules())
                if gathers(launches) != 2 * norms:
                    failures.append(f"{route}: {gathers(launches)} collectives for {norms} norms")
    (folder / f"rank{rank}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
