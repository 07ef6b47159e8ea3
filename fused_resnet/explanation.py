"""What ``explain`` finds: the rows of a step, their sums, the same for eager PyTorch, the table that prints them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .plan.target import Target
from .projection import Projection


@dataclass(frozen=True)
class Row:
    """One operation, or the vendor's part of one. FLOPs and bytes are of a whole step, ``floor_us`` its least time.

    ``source``: "fused" (our kernels), "vendor" (the vendor's convolutions, called by our operators) or "eager".
    ``floor_us`` is None where the target is no GPU. ``projected_us`` (low, middle, high) is what :mod:`.projection`
    expects, of 16-bit steps on a GPU alone; None elsewhere.
    """

    name: str
    kind: str
    source: str
    route: str
    reason: str
    launches: int
    flops: int
    bytes: int
    saved_bytes: int
    floor_us: float | None
    projected_us: Projection | None = None


@dataclass(frozen=True)
class Step:
    """The rows of one step and their sums."""

    rows: tuple[Row, ...]
    batch: int

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def saved_bytes(self) -> int:
        """Bytes kept from forward for backward, parameters and the input apart."""
        return sum(row.saved_bytes for row in self.rows)

    @property
    def launches(self) -> int:
        return sum(row.launches for row in self.rows)

    @property
    def floor_us(self) -> float | None:
        """The sum of the rows' least times in microseconds; None where the target is no GPU."""
        floors = [row.floor_us for row in self.rows if row.floor_us is not None]
        return sum(floors) if len(floors) == len(self.rows) else None

    @property
    def projected_us(self) -> Projection | None:
        """The time of the step's kernels in microseconds (low, middle, high): a projection, nothing was measured."""
        found = [row.projected_us for row in self.rows if row.projected_us is not None]
        return Projection(*map(sum, zip(*found))) if found and len(found) == len(self.rows) else None

    @property
    def images_per_second(self) -> Projection | None:
        """The same as images per second, where the host keeps up (as in a CUDA graph)."""
        us = self.projected_us
        return us and Projection(*(1e6 * self.batch / time for time in reversed(us)))

    def totals(self) -> dict[str, Any]:
        names = ("flops", "bytes", "saved_bytes", "launches", "floor_us", "projected_us", "images_per_second")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Explanation(Step):
    """What :func:`explain` found: ``rows``, their totals as attributes, and ``eager``, the same for eager PyTorch.

    Nothing in it was measured: FLOPs and bytes are counted, ``floor_us`` is a bound from the target's sustained rates,
    ``projected_us`` and ``images_per_second`` are projections from recorded kernels.
    """

    eager: Step
    target: Target | None
    dtype: str
    training: bool

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        return {
            "target": self.target.name if self.target else None,
            "dtype": self.dtype,
            "batch": self.batch,
            "training": self.training,
            "totals": self.totals(),
            "rows": [asdict(row) for row in self.rows],
            "eager": {"totals": self.eager.totals(), "rows": [asdict(row) for row in self.eager.rows]},
        }

    def __str__(self) -> str:
        return _table(self)


# ---------------------------------------------------------------- the table


HEADINGS = (
    "operation",
    "kind",
    "source",
    "launches",
    "GFLOP",
    "MB",
    "saved MB",
    "floor us",
    "projected us",
    "route",
    "why",
)


def _table(explanation: Explanation) -> str:
    reasons = list(dict.fromkeys(row.reason for row in explanation.rows if row.reason))
    lines: list[tuple[str, ...]] = [HEADINGS]
    for row in explanation.rows:
        why = f"[{reasons.index(row.reason) + 1}]" if row.reason else ""
        lines.append((row.name, row.kind, row.source, *_figures(row), row.route, why))
    lines.append(("total", "", "", *_figures(explanation), "", ""))
    lines.append(("eager PyTorch", "", "", *_figures(explanation.eager), "", ""))

    widths = [max(map(len, column)) for column in zip(*lines)]
    ruler = "  ".join("-" * width for width in widths)
    printed = ["  ".join(_aligned(line, widths)).rstrip() for line in lines]
    where = explanation.target.name if explanation.target else "no GPU"
    step = "training step" if explanation.training else "forward"
    return "\n".join(
        [
            f"{step} of batch {explanation.batch} in {explanation.dtype} on {where}; counted, not measured",
            "",
            printed[0],
            ruler,
            *printed[1:-2],
            ruler,
            *printed[-2:],
            "",
            *(f"[{i + 1}] {reason}" for i, reason in enumerate(reasons)),
            _per_image("this plan", explanation),
            _per_image("eager PyTorch", explanation.eager),
        ]
    )


def _aligned(line: Sequence[str], widths: Sequence[int]) -> Iterable[str]:
    """Figures to the right, words to the left."""
    for heading, cell, width in zip(HEADINGS, line, widths):
        yield cell.ljust(width) if heading in ("operation", "kind", "source", "route", "why") else cell.rjust(width)


def _per_image(label: str, step: Step) -> str:
    images = max(step.batch, 1)
    text = f"{label}: {step.bytes / images / 1e6:.1f} MB and {step.flops / images / 1e9:.2f} GFLOP per image"
    if step.floor_us:
        text += f"; the floor allows {1e6 * images / step.floor_us:,.0f} images/s"
    rate = step.images_per_second
    if rate:
        text += f", projected: {rate.middle:,.0f} ({rate.low:,.0f} to {rate.high:,.0f}), not measured"
    return text


def _figures(item: Row | Step) -> tuple[str, ...]:
    floor = "-" if item.floor_us is None else f"{item.floor_us:,.1f}"
    projection = "-" if item.projected_us is None else f"{item.projected_us.middle:,.1f}"
    return (
        str(item.launches),
        f"{item.flops / 1e9:,.2f}",
        f"{item.bytes / 1e6:,.1f}",
        f"{item.saved_bytes / 1e6:,.1f}",
        floor,
        projection,
    )
