"""Models people already have: their blocks' classes are changed for fused ones in place, and back; folded copies."""

from .converting import convert, revert
from .folding import fold
from .patching import patch
from .report import Report

__all__ = ["Report", "convert", "fold", "patch", "revert"]
