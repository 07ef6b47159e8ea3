"""Reads the weights that a builder is given: a state dict, a checkpoint on disk, or torchvision's."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor] | str | os.PathLike[str] | Any


def read_weights(weights: Weights, name: str) -> Mapping[str, Tensor]:
    """The state dict that ``weights`` stands for; ``name`` is torchvision's name of the network.

    ``weights`` is a state dict, the path of a file that holds one (bare, or under "model" or "state_dict" as training
    scripts save it), a torchvision weights enum, or the name of one. Raises ``ValueError`` when it is none of these.
    """
    if isinstance(weights, Mapping):
        return weights
    if isinstance(weights, os.PathLike) or (isinstance(weights, str) and os.path.exists(weights)):
        return _read_file(Path(weights))
    if isinstance(weights, str):
        weights = _find_torchvision(weights, name)
    if not hasattr(weights, "get_state_dict"):
        raise ValueError(f"weights must be a state dict, a path or torchvision's, not {type(weights).__name__}")
    return weights.get_state_dict(progress=False, check_hash=True)


def _read_file(path: Path) -> Mapping[str, Tensor]:
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            return checkpoint[key]
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a state dict")
    return checkpoint


def _find_torchvision(weights: str, name: str) -> Any:
    """torchvision is optional, so it is looked for only when one of its names is given."""
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError as error:
        raise ValueError(f"there is no file {weights!r}, and torchvision, whose name it may be, is missing") from error
    try:
        return models.get_weight(weights) if "." in weights else models.get_model_weights(name)[weights]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{weights!r} is neither a file nor a name of torchvision's weights for {name}") from error
