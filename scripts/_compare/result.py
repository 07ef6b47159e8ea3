"""What a comparison has found so far, and how its agreement is judged. Plain data: a Ctrl-C leaves what there is."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

# Relative error of a loss that rounding alone explains, where eager's own error happens to be smaller. In float32 it
# is that of a few activations so near to zero that a rounding error decides whether ReLU lets them pass: each changes
# a gradient by a thousandth or so. In float64 there are none of these: what is left is the arithmetic itself.
FLOORS = {"float64": 1e-9, "float32": 5e-3, "tf32": 5e-3, "float16": 5e-3, "bfloat16": 2e-2}
# Training magnifies rounding errors step by step. Once eager itself is this far from the higher precision, two right
# implementations may differ by as much, and a comparison says nothing more.
HORIZONS = {"float32": 1e-2, "tf32": 2e-2, "float16": 2e-2, "bfloat16": 4e-2}
TIMES_EAGER = 8.0  # a single loss is a lucky draw; the rule of the tests, nearer to 1, is for whole tensors


def distance(loss: float, true: float) -> float:
    """Relative, and finite where the loss has reached zero. NaN stays NaN."""
    return abs(loss - true) / max(abs(true), 1e-3)


@dataclass
class Candidate:
    """One way to run the model: ``losses`` one per step, ``times_ms`` one per timed step."""

    name: str
    losses: list[float] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)  # (steps trained, share of held-out images)
    accuracy_note: str = ""
    times_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    kernels: int | None = None  # Triton kernels launched in one step
    vendor_convs: int | None = None
    exact: bool = False  # ran in float64 itself
    note: str = ""

    @property
    def accuracy(self) -> float | None:
        return self.accuracies[-1][1] if self.accuracies else None

    def step_ms(self) -> tuple[float, float, float] | None:
        """Median, tenth and ninetieth percentile."""
        if len(self.times_ms) < 2:
            return None
        deciles = statistics.quantiles(self.times_ms, n=10, method="inclusive")
        return statistics.median(self.times_ms), deciles[0], deciles[-1]


@dataclass
class Cost:
    """A training step as ``explain`` counts it for a target, nothing of it measured."""

    title: str
    route: str
    flops: float
    bytes: float
    saved_bytes: float
    launches: int
    floor_us: float


@dataclass
class Result:
    """The whole comparison. ``truth`` holds the losses of the same steps in higher precision (``truth_name``)."""

    facts: dict[str, str] = field(default_factory=dict)
    batch_size: int = 0
    steps: int = 0
    floor: str = "float32"
    truth_name: str = "float64"
    truth: list[float] = field(default_factory=list)
    candidates: dict[str, Candidate] = field(default_factory=dict)
    projection: list[Cost] = field(default_factory=list)
    measured: bool = False
    interrupted: bool = False
    failures: list[str] = field(default_factory=list)

    def compared(self) -> int:
        """Steps until rounding alone has grown too large to compare by; at least one."""
        eager = self.candidates["eager"].losses if "eager" in self.candidates else []
        for step, pair in enumerate(zip(eager[: self.steps], self.truth)):
            if not distance(*pair) <= HORIZONS[self.floor]:
                return max(step, 1)
        return self.steps

    def error(self, name: str) -> float | None:
        """Largest relative distance of the compared losses from the higher precision's; None while there are none."""
        losses = self.candidates[name].losses if name in self.candidates else []
        distances = [distance(*pair) for pair in zip(losses[: self.compared()], self.truth)]
        if not distances:
            return None
        return float("nan") if any(math.isnan(d) for d in distances) else max(distances)

    def tolerance(self, name: str = "fused") -> float:
        """The largest error that ``name``'s losses may have."""
        if name in self.candidates and self.candidates[name].exact:
            return FLOORS["float64"]
        return max(FLOORS[self.floor], TIMES_EAGER * (self.error("eager") or 0.0))

    def agrees(self, name: str) -> bool | None:
        error = self.error(name)
        return None if error is None else error <= self.tolerance(name)

    def speed_up(self, name: str) -> float | None:
        eager, other = self.candidates.get("eager"), self.candidates.get(name)
        times = eager and eager.step_ms(), other and other.step_ms()
        return times[0][0] / times[1][0] if times[0] and times[1] else None

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        found["errors"] = {name: self.error(name) for name in self.candidates}
        found["tolerance"] = self.tolerance()
        return found
