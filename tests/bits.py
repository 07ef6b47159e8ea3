"""ReLU masks as bits, by their definition."""

import torch


def pack(mask: torch.Tensor) -> torch.Tensor:
    """[M, C] of booleans as [M, ceil(C / 8)] bytes: bit j of byte b for channel 8b + j, zeros past the last one."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded.int() << torch.arange(8, device=mask.device)).sum(2).to(torch.uint8)


def relu_bits(out: torch.Tensor) -> torch.Tensor:
    """The mask of a ReLU with the output ``out`` [N, C, H, W]. NaN passes."""
    return pack(~(out <= 0).permute(0, 2, 3, 1).reshape(-1, out.shape[1]))
