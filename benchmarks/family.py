"""The networks that tables are made for, and what of them is worth measuring first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from fused_resnet.plan import tables
from fused_resnet.plan.estimate import gain_us
from fused_resnet.plan.plans import ChainProblem
from fused_resnet.plan.problem import ConvProblem
from fused_resnet.plan.target import Target

from . import problems
from .cases import ConvCase
from .passes import TILED, PassCase
from .passes import cases as cases_over_memory
from .roles import cases

BATCHES = (256, 128, 64, 512, 32)
UNKNOWN = 0.25
"""Of a kernel without an estimate: the part of its memory's time that measuring may gain."""
RULED = 0.05
"""The same of a pass over memory, whose rule was near the fastest wherever that is known."""


class Network(NamedTuple):
    """One of the ResNet family at a batch size, with the arguments of :func:`problems.layers`."""

    depth: int
    batch: int
    size: int = 224
    width: int = 64
    dtype: str = "bfloat16"
    base_width: int = 64
    groups: int = 1


FIRST = Network(50, 256)
_KINDS = ((50, 64, 1), (18, 64, 1), (101, 64, 1), (34, 64, 1), (152, 64, 1), (50, 128, 1), (101, 128, 1),
          (50, 4, 32), (101, 8, 32), (101, 4, 64))  # fmt: skip
FAMILY = tuple(
    Network(depth, batch, base_width=base_width, groups=groups)
    for batch in BATCHES
    for depth, base_width, groups in _KINDS
)
"""18 to 152 layers, wide and ResNeXt, at every batch; :data:`FIRST` is ResNet-50 at 256."""
TINY = (Network(50, 2, 32, 8, "float32"), Network(50, 2, 32, 8, "float32", 8, 16))
"""For a rehearsal."""


class Work(NamedTuple):
    """One thing to measure: a convolution's pass, a whole block by its routes, or a pass over memory. ``gain``:
    microseconds over all networks."""

    name: str
    gain: float
    case: ConvCase | None = None
    chain: ChainProblem | None = None
    over_memory: PassCase | None = None


def work(networks: Sequence[Network], target: Target) -> list[Work]:
    """Everything that ``networks`` are made of: what the first one holds goes before the rest, passes before blocks
    there, and otherwise what should gain most. Of the passes over memory the first one's, after its blocks: their tiles
    follow a rule, and what is measured is what the rule is held against.

    A pass gains what it takes beyond its floor, as measured if it was and else as estimated; a block's choice of a
    route a quarter of what its passes do.
    """
    passes: dict[str, tuple[int, int, ConvCase]] = {}
    chains: dict[str, tuple[int, int, ChainProblem]] = {}
    for rank, network in enumerate(networks):
        for layer in problems.layers(*network):
            for case in cases(layer) if layer.problem.groups == 1 else ():
                earliest, count, _ = passes.get(name_of(case), (rank, 0, case))
                passes[name_of(case)] = earliest, count + layer.count, case
        for chain, times in problems.blocks(*network).items():
            earliest, count, _ = chains.get(name_of_chain(chain), (rank, 0, chain))
            chains[name_of_chain(chain)] = earliest, count + times, chain
    gains: Counter[ConvProblem] = Counter()
    rows = []
    for name, (rank, count, case) in passes.items():
        gain = predicted_gain_us(case, target)
        gains[case.problem] += gain
        rows.append((rank > 0, 0, Work(name, count * gain, case)))
    for name, (rank, count, chain) in chains.items():
        gain = UNKNOWN * sum(gains[conv] for conv in chain.convs)
        rows.append((rank > 0, int(rank == 0), Work(name, count * gain, chain=chain)))
    for memory in cases_over_memory(target.interpreter, networks[0].batch):
        if memory.kind in TILED:
            gain = RULED * 2 * memory.rows * memory.C * memory.dtype.itemsize / target.bandwidth * 1e6
            rows.append((False, 2, Work(memory.name, gain, over_memory=memory)))
    return [item for *_, item in sorted(rows, key=lambda row: (row[0], row[1], -row[2].gain))]


def predicted_gain_us(case: ConvCase, target: Target) -> float:
    """What measuring a pass may gain: as it runs now, measured or estimated, beyond its floor."""
    known = tables.lookup(case.problem, case.variant, target)
    if known is not None and known.us is not None and known.floor_us is not None:
        return max(0.0, known.us - known.floor_us)
    if case.kind in ("gram", "pair") or case.masked or case.problem.is_stem:
        return UNKNOWN * case.bytes / target.bandwidth * 1e6
    return gain_us(case.problem, case.kind, target, case.candidates(target)[0])


def name_of(case: ConvCase) -> str:
    """A case's name; that of another batch than FIRST's says so."""
    return case.name + f", batch {case.problem.N}" * (FIRST.batch != case.problem.N)


def name_of_chain(chain: ChainProblem) -> str:
    first, last = chain.convs[0], chain.convs[-1]
    kernels = "-".join(f"{conv.R}x{conv.S}" for conv in chain.convs)
    batch = f", batch {first.N}" * (FIRST.batch != first.N)
    groups = f", {chain.convs[1].groups} groups" * (chain.convs[1].groups > 1)
    return f"routes {kernels}/{chain.convs[1].stride[0]} {first.H}px {first.Ci}->{last.Ci}->{last.Co}{groups}{batch}"
