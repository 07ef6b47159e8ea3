"""Residual blocks as their families build them, in neutral terms: one file per family, none imports its library."""
