"""Whether a chain takes the Gram route, and who runs its kernels there."""

from __future__ import annotations

from . import tables
from .config import GemmConfig, supports
from .defaults import default_config
from .gram import gram_config, has_pivot, is_centred
from .gram_dgrad import gram_dgrad_config
from .gram_wgrad import gram_wgrad_config
from .plans import ChainProblem, GramPlan, GramProjection
from .problem import ConvProblem
from .split import ELEMENT_BYTES
from .target import Target

MOST_GRAM_WIDTH = 512
"""A wider Gram matrix costs more than the output it saves (half of the convolution's own products at 1024)."""
GAINFUL_GRAM_WIDTH = 256
"""Up to here the Gram route is the faster one on an H100; at 512 the vendor's convolutions and the passes are. For a
projection's input, where the route itself was not timed, so much follows from the times of its parts."""
LEAST_GRAM_ROWS = 8


def why_not_gram(problem: ChainProblem, route: str) -> str:
    """Why the chain's last convolution writes its output, or "" where it need not."""
    last = problem.convs[-1]
    if len(problem.convs) < 2 or not last.is_gemm or last.Co <= last.Ci:
        return "the last convolution is not a 1x1 that widens: its output exists"
    if not problem.batch_statistics:
        return "with frozen statistics the normalisation is the convolution's epilogue already"
    if not problem.relu:
        return "without a ReLU at its end a chain is staged"
    if last.Ci > _most_width(route):
        return f"a Gram matrix {last.Ci} wide costs more than it saves"
    if last.dtype == "float32" and route != "gram":
        return "in float32 the Gram matrix takes float64 products, which may cost more than they save"
    if last.M < LEAST_GRAM_ROWS:
        return f"{last.M} rows are too few for a covariance"
    return ""


def why_not_gram_projection(projection: ConvProblem, route: str) -> str:
    """Why a projection writes its output on the Gram route, or "" where it need not."""
    if not projection.is_pointwise or projection.groups != 1 or projection.Co <= projection.Ci:
        return "it is not a 1x1 that widens"
    if projection.Ci > _most_width(route):
        return f"a Gram matrix {projection.Ci} wide costs more than it saves"
    return ""


def _most_width(route: str) -> int:
    return MOST_GRAM_WIDTH if route == "gram" else GAINFUL_GRAM_WIDTH


def gram_plan(last: ConvProblem, target: Target, projection: ConvProblem | None = None) -> GramPlan:
    stores_a = _stores_a(last, target, joined=projection is not None)
    fprop = fprop_name(stores_a, joined=projection is not None)
    epilogue = "residual" if projection is None else "projection"
    stores_dz = _stores_dz(last, target)
    dgrad = "dgrad+gram" if stores_dz else "dgrad+in+gram"
    return GramPlan(
        gram=_measured(last, "gram", target, _gram_config(last, target)),
        fprop=_measured(last, fprop, target, default_config(last, "fprop", target, epilogue=epilogue)),
        wgrad=_measured(last, "wgrad+in+gram", target, default_config(last, "wgrad", target)),
        masked_wgrad=_masked_wgrad(last, target),
        dgrad=_measured(last, dgrad, target, _gram_dgrad_config(last, target)),
        projection=None if projection is None else _gram_projection(projection, target),
        stores_a=stores_a,
        pivots=has_pivot(last.dtype),
        centres=is_centred(last.dtype),
        stores_dz=stores_dz,
    )


LEAST_STORED_WIDTH = 256
"""From here on so many tiles of output channels read the same input that forming it once should be faster: estimated
from the kernels' instructions, not measured."""


def _stores_a(last: ConvProblem, target: Target, joined: bool) -> bool:
    """Whether the Gram kernel writes a. ``joined``: fprop takes a projection as a second product."""
    formed, on_load = (tables.lookup(last, fprop_name(stores, joined), target) for stores in (True, False))
    if formed is not None and formed.whole_us is not None and on_load is not None and on_load.us is not None:
        return formed.whole_us < on_load.us
    return last.Ci >= LEAST_STORED_WIDTH


def _stores_dz(last: ConvProblem, target: Target) -> bool:
    """Whether the weight gradient writes the dz that it forms. So it does until both were measured."""
    written, on_load = (tables.lookup(last, name, target) for name in ("dgrad+gram", "dgrad+in+gram"))
    if written is None or written.whole_us is None or on_load is None or on_load.us is None:
        return True
    return written.whole_us <= on_load.us


def fprop_name(stores_a: bool, joined: bool) -> str:
    return tables.pass_name("fprop", prologue=not stores_a, gram=not joined, gram2=joined, formed=stores_a)


def _gram_projection(projection: ConvProblem, target: Target) -> GramProjection:
    return GramProjection(
        gram=_measured(projection, "gram", target, _gram_config(projection, target)),
        wgrad=_measured(projection, "wgrad+gram2", target, default_config(projection, "wgrad", target)),
        dgrad=_measured(projection, "dgrad+gram2", target, _gram_dgrad_config(projection, target)),
    )


def _gram_config(conv: ConvProblem, target: Target) -> GemmConfig:
    return gram_config(
        conv.M,
        conv.Ci,
        target.sm_count,
        itemsize=ELEMENT_BYTES.get(conv.dtype, 2),
        group_products=target.has_group_products,
        pivots=has_pivot(conv.dtype),
        interpreter=target.interpreter,
    )


def _gram_dgrad_config(conv: ConvProblem, target: Target) -> GemmConfig:
    return gram_dgrad_config(conv.M, conv.Ci, conv.Co, target, itemsize=ELEMENT_BYTES.get(conv.dtype, 2))


MOST_MASKED_WIDTH = 128
"""Up to here the weight gradient that forms dz on load is bound by memory, and saves reading dz."""


def _masked_wgrad(last: ConvProblem, target: Target) -> GemmConfig | None:
    """The weight gradient that forms dz, or None where a pass and the plain weight gradient are faster."""
    whole, parts = (tables.lookup(last, name, target) for name in ("wgrad+in+out+gram", "wgrad+in+gram"))
    if whole is not None and whole.us is not None and parts is not None and parts.whole_us is not None:
        masked = whole.us <= parts.whole_us
    else:
        masked = last.Ci <= MOST_MASKED_WIDTH or target.interpreter
    return _measured(last, "wgrad+in+out+gram", target, gram_wgrad_config(last, target)) if masked else None


def _measured(problem: ConvProblem, pass_: str, target: Target, default: GemmConfig) -> GemmConfig:
    entry, kind = tables.lookup(problem, pass_, target), pass_.partition("+")[0]
    if entry is not None and entry.ours is not None and supports(problem, kind, target, entry.ours, formed=True)[0]:
        return entry.ours
    return default
