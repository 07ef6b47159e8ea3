"""What :func:`convert` and :func:`revert` did, module by module."""

from __future__ import annotations

from dataclasses import dataclass, field

Named = tuple[str, str]
"""(qualified name, reason)."""


@dataclass(frozen=True)
class Report:
    """``converted``, ``kept`` and ``fused_now``: lists of (qualified name, reason). ``str()`` makes a table of it.

    ``fused_now`` are those of the converted that would run fused as the model stands; an edit may change that later.
    """

    converted: list[Named] = field(default_factory=list)
    kept: list[Named] = field(default_factory=list)
    fused_now: list[Named] = field(default_factory=list)

    def __str__(self) -> str:
        fused = dict(self.fused_now)
        rows = [(name, "fused" if name in fused else "converted", fused.get(name, why)) for name, why in self.converted]
        rows += [(name, "kept", why) for name, why in self.kept]
        if not rows:
            return "no residual block found"
        rows = [(name or "(model)", what, why) for name, what, why in rows]
        head = ("module", "", "")
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(2)]
        lines = [
            "  ".join((row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2])).rstrip() for row in (head, *rows)
        ]
        counts = f"{len(self.converted)} converted, {len(self.fused_now)} of them fused now, {len(self.kept)} kept"
        return "\n".join([*lines, counts])
