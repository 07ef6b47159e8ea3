"""What the public operations take: records of convolutions and BatchNorms, and the checks before any kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

Pair = tuple[int, int]

RECOMPUTABLE = ("y1",)
"""What a block can compute again in backward: its first convolution's output, from its input."""
KEEPABLE = ("a1",)
"""What a block can keep for backward: that output behind its BatchNorm and ReLU."""


class Conv(NamedTuple):
    """A convolution without bias. ``weight``: [Co, Ci / groups, R, S]."""

    weight: Tensor
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1


class BatchNorm(NamedTuple):
    """What a BatchNorm computes with, read at call time.

    ``weight`` and ``bias`` may be None (1 and 0). ``training``: normalise with the batch's own statistics; the running
    ones, if given, are then updated, and ``num_batches_tracked``, if given, counts up. ``momentum`` None is the
    cumulative average. ``group``: the registered name of the process group whose batches are normalised together, in
    training (``nn.SyncBatchNorm``); None: this process's batch alone.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None = None
    momentum: float | None = 0.1
    eps: float = 1e-5
    training: bool = True
    group: str | None = None

    @property
    def sync(self) -> str:
        """The group of which the statistics are, or ""."""
        return self.group if self.group and self.training else ""


Layer = tuple[Conv, BatchNorm]


def member(module: nn.Module, members: dict[str, Any], name: str) -> Any:
    """``getattr(module, name)`` of what is mostly in ``members``, one of its registries, in a quarter of the time."""
    return members[name] if name in members else getattr(module, name)


def batch_norm_of(module: nn.BatchNorm2d | nn.SyncBatchNorm) -> BatchNorm:
    """The record of a BatchNorm as it stands now: its mode, momentum and eps included, and its process group."""
    training, tracks = module.training, module.track_running_stats
    parameters, buffers = module._parameters, module._buffers
    mean, var = member(module, buffers, "running_mean"), member(module, buffers, "running_var")
    return BatchNorm(
        member(module, parameters, "weight"),
        member(module, parameters, "bias"),
        mean if tracks or not training else None,
        var if tracks or not training else None,
        member(module, buffers, "num_batches_tracked") if tracks and training else None,
        module.momentum,
        module.eps,
        training or (mean is None and var is None),
        _group_of(module) if training and isinstance(module, nn.SyncBatchNorm) else None,
    )


def _group_of(module: nn.SyncBatchNorm) -> str | None:
    """The name of its process group; None where there is nobody else to ask, as PyTorch has it."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = module.process_group or dist.group.WORLD
    assert group is not None
    return group.group_name if dist.get_world_size(group) > 1 else None


def conv_of(module: nn.Conv2d) -> Conv:
    """The record of an ``nn.Conv2d``. ValueError: it has a bias, or pads otherwise than by a number of zeros."""
    if not isinstance(module, nn.Conv2d):
        raise TypeError(f"expected an nn.Conv2d, got a {type(module).__name__}")
    if module.bias is not None:
        raise ValueError("a convolution with a bias has no record: a BatchNorm behind it takes the bias away")
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise ValueError(f"the padding must be a number of zeros, got {module.padding!r} of {module.padding_mode}")
    return plain_conv_of(module)


def plain_conv_of(module: nn.Conv2d) -> Conv:
    """:func:`conv_of` for a convolution that was looked at before."""
    weight = member(module, module._parameters, "weight")
    return Conv(weight, module.stride, module.padding, module.dilation, module.groups)  # type: ignore[arg-type]


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for ``device`` (the meta device has none)."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def check_layers(layers: Sequence[Layer], count: int) -> None:
    if len(layers) != count:
        raise ValueError(f"expected {count} (conv, bn) layers, got {len(layers)}")


def check_tensor(x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor, got a {type(x).__name__}")


def check_image(x: Tensor) -> None:
    check_tensor(x)
    if x.layout != torch.strided:
        raise TypeError(f"expected a dense tensor, got a {x.layout} one")
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    if not x.is_floating_point():
        raise TypeError(f"expected a floating-point input, got {x.dtype}")


def check_layer(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, conv: Conv, bn: BatchNorm, name: str
) -> tuple[int, int, int, int]:
    """The output's shape; raises where eager would, before anything is touched."""
    if len(shape) != 4:
        raise ValueError(f"expected 4D input (got {len(shape)}D input)")
    n, ci, h, w = shape
    if not isinstance(conv, Conv):
        raise TypeError(f"{name}: expected a Conv, got a {type(conv).__name__} (conv_of makes one of a module)")
    weight = conv.weight
    if len(weight.shape) != 4:
        raise ValueError(f"{name}: the weight must be [Co, Ci / groups, R, S], got shape {tuple(weight.shape)}")
    co, ci_per_group, r, s = weight.shape
    if conv.groups < 1 or co % conv.groups or ci != ci_per_group * conv.groups:
        raise ValueError(
            f"{name}: a weight of shape {tuple(weight.shape)} in {conv.groups} group(s) expects "
            f"{ci_per_group * conv.groups} input channels, got {ci}"
        )
    if weight.device != device:
        raise ValueError(f"{name}: the input is on {device} and the weight on {weight.device}")
    if weight.dtype != dtype and not is_autocast(device):
        raise TypeError(f"{name}: the input is {dtype} and the weight {weight.dtype}; use autocast, or one dtype")
    (sh, sw), (ph, pw), (dh, dw) = conv.stride, conv.padding, conv.dilation
    if sh < 1 or sw < 1 or dh < 1 or dw < 1 or ph < 0 or pw < 0:
        raise ValueError(f"{name}: stride and dilation must be at least 1 and padding at least 0, got {conv[1:4]}")
    p, q = (h + 2 * ph - dh * (r - 1) - 1) // sh + 1, (w + 2 * pw - dw * (s - 1) - 1) // sw + 1
    if p < 1 or q < 1:
        raise ValueError(f"{name}: a {r}x{s} filter does not fit an input of {h}x{w} with padding {conv.padding}")
    check_bn(bn, co, device, name)
    if bn.training and not bn.group:
        check_count((n, co, p, q))
    return n, co, p, q


def check_residual(residual: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(residual.shape) != shape:
        raise ValueError(f"the residual must have shape {shape}, got {tuple(residual.shape)}")
    if residual.device != device:
        raise ValueError(f"the input is on {device} and the residual on {residual.device}")
    if not residual.is_floating_point():
        raise TypeError(f"expected a floating-point residual, got {residual.dtype}")


MOST_LAYERS = 3
_NAMES = tuple([f"conv{i + 1}" for i in range(MOST_LAYERS)])


def check_chain(
    x: Tensor,
    layers: Sequence[Layer],
    projection: Layer | None,
    residual: Tensor | None,
    kind: str,
    dtype: torch.dtype,
) -> tuple[int, ...]:
    """The output's shape; raises where eager would, before anything is touched."""
    check_image(x)
    shape = shortcut = tuple(x.shape)
    for name, (conv, bn) in zip(_NAMES, layers, strict=False):
        shape = check_layer(shape, dtype, x.device, conv, bn, name)
    if projection is not None:
        shortcut = check_layer(shortcut, dtype, x.device, *projection, "projection")
    elif residual is not None:
        check_residual(residual, shape, x.device)
        shortcut = shape
    if kind != "none" and shortcut != shape:
        raise ValueError(f"the residual branch gives {shape} and the shortcut ({kind}) {shortcut}")
    return shape


VECTORS = ("weight", "bias", "running_mean", "running_var")


def check_bn(bn: BatchNorm, channels: int, device: torch.device, name: str) -> None:
    if not isinstance(bn, BatchNorm):
        raise TypeError(
            f"{name}: expected a BatchNorm, got a {type(bn).__name__} (batch_norm_of makes one of a module)"
        )
    shape = (channels,)
    for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
        fits = t is None or (t.shape == shape and t.device == device and t.is_floating_point() and t.is_contiguous())
        if not fits:
            _check_vectors(bn, shape, device, name)
            break
    counter = bn.num_batches_tracked
    if counter is not None and bn.training:
        if counter.dtype != torch.int64 or counter.numel() != 1:
            raise TypeError(f"{name}: num_batches_tracked must be one int64, got {counter.dtype} of {counter.numel()}")
        if counter.device != device:
            raise ValueError(f"{name}: the input is on {device} and num_batches_tracked on {counter.device}")
    if not bn.eps > 0:
        raise ValueError(f"{name}: batch_norm eps must be positive, but got {bn.eps}")
    if not bn.training and (bn.running_mean is None or bn.running_var is None):
        raise ValueError(f"{name}: expected running_mean and running_var to be given when training=False")


def _check_vectors(bn: BatchNorm, shape: tuple[int], device: torch.device, name: str) -> None:
    """Finds the words for a vector that does not fit. Weight and bias may be strided."""
    for field, t in zip(VECTORS, (bn.weight, bn.bias, bn.running_mean, bn.running_var), strict=True):
        if t is None:
            continue
        if t.shape != shape:
            raise ValueError(f"{name}: the BatchNorm's {field} must have shape {shape}, got {tuple(t.shape)}")
        if not t.is_floating_point():
            raise TypeError(f"{name}: the BatchNorm's {field} must be floating-point, got {t.dtype}")
        if not t.is_contiguous() and field.startswith("running"):
            raise ValueError(f"{name}: the BatchNorm's {field} must be contiguous, got strides {t.stride()}")
        if t.device != device:
            raise ValueError(f"{name}: the input is on {device} and the BatchNorm's {field} on {t.device}")


def check_count(shape: Sequence[int]) -> None:
    n, _, p, q = shape
    if n * p * q == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")


class MemoryOptions(NamedTuple):
    """What a block keeps for backward beyond what it must, and what of that it computes again: names, each once."""

    recompute: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()


_NO_OPTIONS = MemoryOptions()


def memory_options(recompute: Sequence[str], keep: Sequence[str]) -> MemoryOptions:
    """The options as given, without repetitions. ValueError for names that there are not."""
    if not (recompute or keep):
        return _NO_OPTIONS
    for option, names, known in (("recompute", recompute, RECOMPUTABLE), ("keep", keep, KEEPABLE)):
        if isinstance(names, str) or set(names) - set(known):
            raise ValueError(f"{option} takes a sequence of {', '.join(map(repr, known))}, got {names!r}")
    return MemoryOptions(tuple(dict.fromkeys(recompute)), tuple(dict.fromkeys(keep)))
