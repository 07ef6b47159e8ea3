"""Which route the caller asked for: per thread, read in forward only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

ROUTES = ("auto", "single", "gram", "staged", "reference")


class RouteRequest(NamedTuple):
    """The route asked for, and whether anything else is an error."""

    route: str = "auto"
    strict: bool = False


class RouteUnavailableError(RuntimeError):
    """A route was asked for strictly and cannot run; the message says why."""


class _Requests(threading.local):
    current = RouteRequest()


_requests = _Requests()


def check_route(route: str) -> str:
    """``route`` itself, or a ``ValueError`` that lists the routes there are."""
    if route not in ROUTES:
        raise ValueError(f"unknown route {route!r}; the routes are {', '.join(ROUTES)}")
    return route


def requested() -> RouteRequest:
    """What the innermost :func:`use_route` of this thread asked for."""
    return _requests.current


@contextmanager
def use_route(route: str, strict: bool = False) -> Iterator[None]:
    """Asks every fused operation called inside, on this thread, to take ``route``.

    "auto" lets the planner choose; "staged" runs the Triton kernels of the staged path; "gram" those by which the last
    convolution of a bottleneck never writes its output; "single" one kernel for a whole bottleneck with frozen
    statistics, where no gradient is asked for; "reference" runs plain PyTorch. An operation that cannot take the route
    runs "auto" instead; with ``strict=True`` it raises :class:`RouteUnavailableError` with the reason. Read in forward
    only: backward keeps what forward chose.
    """
    before = _requests.current
    _requests.current = RouteRequest(check_route(route), strict)
    try:
        yield
    finally:
        _requests.current = before
