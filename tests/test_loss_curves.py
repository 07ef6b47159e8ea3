"""Training, not one step: the routes' loss curves from equal weights cannot be told apart."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fused_resnet as fr
from tests.conftest import INTERPRETED
from tests.planted_bugs import Bug, planted

STEPS, BATCH, SEEDS = 30, 16, (0, 1, 2)


def network() -> nn.Module:
    projection = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        fr.Bottleneck(16, 8, 2, projection),
        fr.Bottleneck(32, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    ).to(memory_format=torch.channels_last)


def digits() -> tuple[Tensor, Tensor]:
    """Real handwriting, at twice its 8 x 8 pixels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return nn.functional.interpolate(images, scale_factor=2), torch.tensor(data.target)


def curve(route: str, seed: int, steps: int = STEPS) -> Tensor:
    torch.manual_seed(seed)
    model = network()
    images, labels = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for rows in torch.randperm(len(images))[: steps * BATCH].view(steps, BATCH):
        x = images[rows].contiguous(memory_format=torch.channels_last)
        with fr.use_route(route, strict=True):
            loss = nn.functional.cross_entropy(model(x), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)

if __name__ == "__main__":
    import time
    from tests import strict_interpreter
    torch.backends.cudnn.allow_tf32=False
    torch.set_num_threads(1)
    strict_interpreter.install(0)
    for seed in SEEDS:
        ref = curve("reference", seed)
        print(ref)
        for r in ("staged","gram"):
            t=time.time(); c=curve(r, seed); print(r, seed, time.time()-t, (c-ref).abs().cummax(0).values[::5])
        bug = Bug("x", "kernels.gram_bn", "-sum_dz - sum_a", "-sum_a", ())
        with planted(bug):
            c=curve(r, seed); print('bug', seed, (c-ref).abs().cummax(0).values[::5])
