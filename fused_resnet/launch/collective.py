"""What processes tell each other: one collective operation, recorded like a kernel."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .record import note


def all_gather(packed: torch.Tensor, group: str) -> torch.Tensor:
    """[R, n]: ``packed`` [n] of each of the R processes of the group by that registered name, in their order.

    Waited for by the current stream, not by the host. On ``meta`` tensors nothing travels.
    """
    ranks = dist.distributed_c10d._resolve_process_group(group).size()  # type: ignore[arg-type]
    if packed.device.type == "meta":
        gathered = packed.new_empty(ranks * packed.numel())
    else:
        sent = torch.ops._c10d_functional.all_gather_into_tensor(packed, ranks, group)
        gathered = torch.ops._c10d_functional.wait_tensor(sent)
    note("all_gather", 0, (packed, gathered), {"group": group, "ranks": ranks})
    return gathered.view(ranks, -1)
