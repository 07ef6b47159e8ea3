"""Every benchmark of kernels, layers, blocks and networks: the one list that ``pytest benchmarks`` is made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from fused_resnet.launch.record import rehearse_launches
from fused_resnet.plan.cost import floor_seconds
from fused_resnet.plan.target import H100, Target

from . import modules, passes, problems
from .cases import ConvCase
from .modules import BlockCase, ModelCase
from .passes import PassCase
from .roles import cases

Subject = ConvCase | PassCase | BlockCase | ModelCase
LEVELS = ("kernel", "layer", "block", "forward", "step", "memory")
CANDIDATES = ("eager", "graph", "compile", "max-autotune", "ours", "ours graph")
MOST_SINGLE_WIDTH = 64


@dataclass(frozen=True)
class Entry:
    """One operation at one shape, and who runs it. ``subject`` knows how, and when the result is right."""

    level: str
    subject: Subject
    candidates: tuple[str, ...]
    test: str
    """The tests below ``tests/`` that judge the operation at small shapes, and have to be green before a figure counts.
    Whether it is right at this very shape is asked again, in the process that times it, before it is timed."""

    @property
    def operation(self) -> str:
        return self.subject.name.partition(" ")[0].rstrip(",")

    @property
    def name(self) -> str:
        return self.subject.name

    @property
    def group(self) -> str:
        return f"{self.level}: {self.name}"

    def cost(self, target: Target = H100) -> modules.Cost:
        """FLOPs and bytes of what ours launches for ``target``, and their floor."""
        if isinstance(self.subject, (BlockCase, ModelCase)):
            return modules.cost(self.subject, target)
        return _kernel_cost(self.subject, target)


@cache
def _kernel_cost(case: ConvCase | PassCase, target: Target) -> modules.Cost:
    """Of the launches of the planner's default, counted without data."""
    config = case.candidates(target)[0] if isinstance(case, ConvCase) else case.config(target.sm_count)
    with rehearse_launches():
        t = case.inputs("meta")
    with rehearse_launches() as launches:
        case.ours(t, config)
    flops, nbytes = (sum(getattr(launch, what) for launch in launches) for what in ("flops", "bytes"))
    return modules.Cost(flops, nbytes, 1e6 * floor_seconds(launches, target), nbytes)


def _test_of(case: ConvCase) -> str:
    """The file of the launcher that runs the case."""
    if case.problem.is_stem:
        return "launch/test_stem_conv.py"
    if case.kind == "gram":
        return "launch/test_gram.py"
    if case.role == "projection" and case.gram:
        return "launch/test_gram_projection.py"
    if case.gram and (case.kind == "dgrad" or case.writes_dz):
        return f"launch/test_gram_{case.kind}.py"
    return f"launch/test_conv_{case.kind}.py"


def convolutions(kind: str) -> list[Entry]:
    """Each pass of ``kind`` of ResNet-50's convolutions, batch 256, as its role in a block has it."""
    distinct = {case.name: case for layer in problems.layers(50) for case in cases(layer, (kind,))}
    found = []
    for case in distinct.values():
        candidates = ("vendor", "ours")
        if not case.gram and case.kind != "pair":
            candidates += ("vendor graph",)
        found.append(Entry("kernel", case, candidates, _test_of(case)))
    return found


def passes_of(*launchers: str) -> list[Entry]:
    """The passes over memory that these launchers make, whatever their options."""
    found = []
    for case in passes.cases(dry=False):
        launcher = case.kind.partition("+")[0]
        if launcher in launchers:
            file = next(name for name in ("stem_pool", "bn_act_grad", "bn_grad", "bn_act", "bn") if name in case.kind)
            file = {"bn": "bn_stats", "bn_grad": "bn_act_grad"}.get(file, file)
            found.append(Entry("kernel", case, ("ours",), f"launch/test_{file}.py"))
    return found


def layers() -> list[Entry]:
    return [Entry("layer", case, CANDIDATES, _module_test(case)) for case in modules.LAYERS]


def blocks() -> list[Entry]:
    """Of every stage, forward and backward on each route; and with frozen statistics, forward alone."""
    found = []
    for case in (*modules.BLOCKS, *modules.FROZEN):
        routes: tuple[str, ...] = ("ours graph, staged",)
        if case.kind == "Bottleneck":
            if case.training:
                routes += ("ours graph, gram",)
            elif case.planes <= MOST_SINGLE_WIDTH:
                routes += ("ours graph, single",)
        found.append(Entry("block", case, CANDIDATES + routes, _module_test(case)))
    return found


def _module_test(case: BlockCase) -> str:
    return "modules/test_layers.py" if case.kind in ("Stem", "ConvBNReLU", "BNAddReLU") else "modules/test_blocks.py"


def forwards() -> list[Entry]:
    return [Entry("forward", case, CANDIDATES, "modules/test_resnet.py") for case in modules.FORWARDS]


def steps() -> list[Entry]:
    """Whole training steps; at batch 256 on the staged route and compiled by torch, too."""
    found = []
    for case in modules.STEPS:
        more = ("ours compile", "ours graph, staged") if case.batch == 256 else ()
        found.append(Entry("step", case, CANDIDATES + more, "modules/test_resnet.py"))
    return found


def memory() -> list[Entry]:
    """The peak of a training step. Not in a CUDA graph, whose memory belongs to the graph when it is replayed."""
    cases = [case for case in modules.STEPS if case.batch == 256]
    return [Entry("memory", case, ("eager", "compile", "ours"), "test_memory.py") for case in cases]


KERNELS = ("fprop", "dgrad", "wgrad", "gram", "pair")
PASSES = ("bn_stats", "bn_finalize", "bn_act", "bn_act_grad_reduce", "bn_grad_finalize", "bn_grad_apply",
          "stem_pool", "stem_pool_grad_reduce", "stem_pool_grad_apply")  # fmt: skip


def entries() -> Iterator[Entry]:
    """All of them."""
    for kind in KERNELS:
        yield from convolutions(kind)
    yield from passes_of(*PASSES)
    for level in (layers, blocks, forwards, steps, memory):
        yield from level()


def runs(found: Iterable[Entry]) -> list[tuple[Entry, str]]:
    """Each entry with each of its candidates: what one test times."""
    return [(entry, candidate) for entry in found for candidate in entry.candidates]


def identify(value: object) -> str:
    return value.name if isinstance(value, Entry) else str(value)
