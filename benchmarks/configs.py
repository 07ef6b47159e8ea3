"""Configurations as records hold them: by their ``repr``."""

from __future__ import annotations

import ast
from typing import Any, TypeVar

Config = TypeVar("Config")


def parsed(text: str, make: type[Config]) -> Config:
    """The ``make`` of that ``repr``; what it does not name has its default."""
    call = ast.parse(text, mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != make.__name__:
        raise ValueError(f"not a {make.__name__}: {text}")
    values: dict[str, Any] = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    return make(**values)
