"""Measured choices: what ``scripts/tune`` found on a GPU, and before that what was measured on this very machine.

A table is ``plan/tuned/<gpu>.json``::

    {"version": 1, "gpu": "NVIDIA H100 ...", "facts": {...},
     "entries": {problem_key(problem): {pass_name(...): {"config": {...} | null, "us": ..., "vendor_us": ...,
                                                         "passes_us": ..., "floor_us": ..., "source": "..."}}},
     "routes": {chain_key(problem): {"us": {"gram": ..., "staged": ..., "reference": ...}, "source": "..."}}}

The shipped ones are read when this module is imported: a file read inside a traced function would break the graph.
Those of this machine come from ``store`` by way of its ``load``, which modules call as they are made.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from .config import GemmConfig
from .plans import ChainProblem
from .problem import ConvProblem
from .target import Target

VERSION: Final = 1
PASSES: Final = ("fprop", "dgrad", "wgrad")
KINDS: Final = (*PASSES, "gram", "pair")
"""What is measured: the passes, the Gram matrix of a convolution's input, both gradients of a 1x1 in one kernel."""
_KNOWN_GPUS: Final = ("h200", "h100", "a100", "b200", "l40s", "l4", "a10g", "t4", "v100", "4090", "3090")


@dataclass(frozen=True)
class Entry:
    """One measured pass of one problem. Times are medians in microseconds; ``None`` was not measured."""

    ours: GemmConfig | None
    """The fastest correct configuration of ours; ``None`` where none was correct."""
    us: float | None
    vendor_us: float | None
    """The vendor's convolution alone."""
    passes_us: float
    """The passes over memory that the vendor's way needs besides and ours does in a prologue or an epilogue."""
    floor_us: float | None
    source: str
    before_us: float | None = None
    """The pass that ours needs before it, or its share of one that serves two kernels. ``None`` was not measured."""

    @property
    def whole_us(self) -> float | None:
        """Ours with the pass before it; ``None`` where either was not measured."""
        return None if self.ours is None or self.us is None or self.before_us is None else self.us + self.before_us

    @property
    def vendor_wins(self) -> bool:
        """Whether the vendor's convolution and the passes around it were faster than ours."""
        if self.ours is None or self.us is None:
            return True
        return self.vendor_us is not None and self.vendor_us + self.passes_us < self.us

    @property
    def config(self) -> GemmConfig | None:
        """What to launch: ours where it won, ``None`` for the vendor's."""
        return None if self.vendor_wins else self.ours

    @property
    def reason(self) -> str:
        """The measurement in words."""
        vendor = "not measured" if self.vendor_us is None else f"{self.vendor_us + self.passes_us:.0f} us"
        ours = "none correct" if self.ours is None or self.us is None else f"{self.us:.0f} us"
        return f"measured: ours {ours}, the vendor's with its passes {vendor} ({self.source})"


Table = Mapping[str, Mapping[str, Entry]]


@dataclass(frozen=True)
class RouteTimes:
    """What a whole chain took by each route that it can take, in microseconds, with its backward pass if it has one."""

    us: Mapping[str, float]
    source: str

    @property
    def reason(self) -> str:
        """The measurement in words, the fastest first."""
        times = ", ".join(f"{route} {us:.0f} us" for route, us in sorted(self.us.items(), key=lambda item: item[1]))
        return f"measured: {times} ({self.source})"


Routes = Mapping[str, RouteTimes]


def problem_key(problem: ConvProblem) -> str:
    """The name of a problem in a table. bfloat16 and float16 share one: they move the same bytes at the same rate."""
    return f"N{problem.N}-{_shape_key(problem)}-{_dtype_key(problem)}"


def _dtype_key(problem: ConvProblem) -> str:
    return "16bit" if problem.dtype in ("bfloat16", "float16") else problem.dtype


def _shape_key(p: ConvProblem) -> str:
    geometry = "".join(f"-{name}{a}x{b}" for name, (a, b) in (("s", p.stride), ("p", p.padding), ("d", p.dilation)))
    return f"H{p.H}-W{p.W}-Ci{p.Ci}-Co{p.Co}-R{p.R}-S{p.S}{geometry}-g{p.groups}"


def chain_key(problem: ChainProblem) -> str:
    """The name of a chain in a table's routes."""
    p, first = problem, problem.convs[0]
    convs = "/".join(_shape_key(conv) for conv in p.convs)
    flags = {"relu": p.relu, "batch": p.batch_statistics, "backward": p.backward}
    said = [name for name, is_so in flags.items() if is_so]
    said += [f"{word}-{name}" for word, names in (("again", p.recompute), ("keep", p.keep)) for name in names]
    shortcut = p.residual + (f":{_shape_key(p.projection)}" if p.projection else "")
    return f"N{first.N}-{convs}-{shortcut}-{_dtype_key(first)}-{'+'.join(said)}"


def pass_name(
    kind: str,
    *,
    prologue: bool = False,
    epilogue: bool = False,
    gram: bool = False,
    gram2: bool = False,
    formed: bool = False,
) -> str:
    """``kind`` of KINDS; ``"+in"`` where an operand is formed on load, ``"+out"`` where it masks, reduces or takes
    statistics, ``"+gram"`` where it is the Gram route's, ``"+gram2"`` that of a projection (fprop: of the convolution
    that it joins as a second product), ``"+formed"`` where a kernel before it formed its operand."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, not {kind!r}")
    flags = {"in": prologue, "out": epilogue, "gram": gram, "gram2": gram2, "formed": formed}
    return "+".join([kind, *(name for name, is_so in flags.items() if is_so)])


def gpu_slug(name: str) -> str:
    """The table's name for a device: ``"NVIDIA H100 80GB HBM3"`` is ``"h100"``."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return next((gpu for gpu in _KNOWN_GPUS if gpu in words), "-".join(words))


DAMAGED: Final = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What reading and parsing raise where a file does not hold a table."""


def _number(value: Any, least: float = 0.0) -> Any:
    """A time as it stands, or None. ValueError for anything else."""
    if value is None or (type(value) in (int, float) and least <= value < math.inf):
        return value
    raise ValueError(f"not a time: {value!r}")


def _entry(raw: Mapping[str, Any]) -> Entry:
    return Entry(
        ours=GemmConfig.from_dict(raw["config"]) if raw.get("config") else None,
        us=_number(raw.get("us")),
        vendor_us=_number(raw.get("vendor_us")),
        passes_us=_number(raw.get("passes_us")) or 0.0,
        floor_us=_number(raw.get("floor_us")),
        source=str(raw.get("source", "")),
        before_us=_number(raw.get("before_us"), -math.inf),
    )


def parse(document: Mapping[str, Any]) -> Table:
    """A table from its JSON form; one of :data:`DAMAGED` where it is none.

    One of another version is empty: its choices may mean something else now.
    """
    if document.get("version") != VERSION:
        return {}
    return {key: {name: _entry(raw) for name, raw in passes.items()} for key, passes in document["entries"].items()}


def parse_routes(document: Mapping[str, Any]) -> Routes:
    """The same of its routes."""
    if document.get("version") != VERSION:
        return {}
    return {
        key: RouteTimes({str(route): float(_number(us)) for route, us in raw["us"].items()}, str(raw.get("source", "")))
        for key, raw in document.get("routes", {}).items()
    }


class Shipped(NamedTuple):
    """The tables of a folder, by GPU, and in words what of it was passed over."""

    tables: Mapping[str, Table]
    routes: Mapping[str, Routes]
    complaints: tuple[str, ...]


def shipped(folder: Path) -> Shipped:
    tables, routes, complaints = {}, {}, []
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text())
            tables[path.stem], routes[path.stem] = parse(document), parse_routes(document)
        except OSError as error:
            complaints.append(f"{path} cannot be read ({error.strerror})")
        except DAMAGED as error:
            complaints.append(f"{path} is damaged ({type(error).__name__}: {str(error)[:80]})")
            tables.pop(path.stem, None)
    return Shipped(tables, routes, tuple(complaints))


_shipped: Final = shipped(Path(__file__).parent / "tuned")
TABLES: Final = _shipped.tables
ROUTES: Final = _shipped.routes
COMPLAINTS: Final = _shipped.complaints
"""What was wrong with a shipped file: ``store`` says it, with its own."""

_here: dict[tuple[str, int], tuple[Table, Routes]] = {}
"""Of this machine, by a GPU's name and compute capability: on top of what ships. Filled by :func:`install` alone."""
stale: list[Callable[[], None]] = []
"""What forgets plans; whoever keeps some adds its own."""


def forget_plans() -> None:
    """Has every plan made anew: what they were made of has changed."""
    for forget in stale:
        forget()


def install(gpu: str, capability: int, document: Mapping[str, Any]) -> None:
    """From here on what ``document`` holds goes before the shipped table of ``gpu``, pass by pass."""
    merged = dict(TABLES.get(gpu_slug(gpu), {}))
    for key, passes in parse(document).items():
        merged[key] = {**merged.get(key, {}), **passes}
    routes = {**ROUTES.get(gpu_slug(gpu), {}), **parse_routes(document)}
    _here[gpu, capability] = merged, routes
    forget_plans()


def uninstall() -> None:
    """Forgets every installed table: the shipped ones remain."""
    _here.clear()
    forget_plans()


def routes_of(problem: ChainProblem, target: Target) -> RouteTimes | None:
    """What was measured of a chain by route, of this very size."""
    _, routes = _tables_of(target)
    return routes.get(chain_key(problem))


def _tables_of(target: Target | str) -> tuple[Table, Routes]:
    if not isinstance(target, str) and (target.name, target.sm) in _here:
        return _here[target.name, target.sm]
    slug = gpu_slug(target if isinstance(target, str) else target.name)
    return TABLES.get(slug, {}), ROUTES.get(slug, {})


def lookup(
    problem: ConvProblem, pass_: str, target: Target | str, tables: Mapping[str, Table] | None = None
) -> Entry | None:
    """What was measured for ``pass_`` (of :func:`pass_name`) of ``problem`` on ``target`` (a Target or a name).

    The nearest thing measured counts where the very thing was not: another batch of the same layer within a factor
    of four, then another variant of the same pass, one with the same prologue first (but nothing stands in for a pass
    of the route "gram" or one from a formed dy, nor such a one for another). ``None`` where there is neither.
    """
    if tables is None:
        table = _tables_of(target)[0]
    else:
        table = tables.get(gpu_slug(target if isinstance(target, str) else target.name), {})
    if not table:
        return None
    key = problem_key(problem)
    passes = table.get(key)
    if passes is None:
        passes = _nearest_batch(table, problem, key)
    if not passes:
        return None
    if pass_.endswith(("gram", "+gram2", "+formed")):
        return passes.get(pass_)
    kind = pass_.partition("+")[0]
    same_prologue = kind + ("+in" if "+in" in pass_ else "")
    for name in (pass_, same_prologue, same_prologue + "+out", kind + "+out", kind, kind + "+in", kind + "+in+out"):
        if name in passes:
            return passes[name]
    return None


def _nearest_batch(table: Table, problem: ConvProblem, key: str) -> Mapping[str, Entry] | None:
    tail = key.partition("-")[2]
    best: Mapping[str, Entry] | None = None
    best_ratio = 4.0
    for other, passes in table.items():
        batch, _, other_tail = other.partition("-")
        if other_tail == tail and batch[1:].isdecimal():
            measured = int(batch[1:])
            ratio = max(measured, problem.N) / max(1, min(measured, problem.N))
            if ratio <= best_ratio:
                best, best_ratio = passes, ratio
    return best
