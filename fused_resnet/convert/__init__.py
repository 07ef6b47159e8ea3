"""Models people already have: their blocks' classes are changed for fused ones in place, and back."""

from .converting import convert, revert
from .patching import patch
from .report import Report

__all__ = ["Report", "convert", "patch", "revert"]
