"""``python -m fused_resnet env``: what a bug report needs to say about the machine."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata

import torch
import triton

from . import __version__
from .plan import route, store, tables, target

PACKAGES = ("torchvision", "timm", "numpy", "nvidia-cudnn-frontend")
VARIABLES = (
    store.VARIABLE,
    "XDG_CACHE_HOME",
    "CUDA_",
    "CUBLAS_",
    "CUDNN_",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_",
    "TORCH",
    "TRITON_",
)


def environment() -> str:
    """Versions, GPUs, the routes that run on each device, and where compiled kernels are kept: one line each."""
    facts = list(_facts())
    width = max(len(name) for name, _ in facts) + 2
    return "\n".join(f"{name + ':':{width}}{value}" for name, value in facts)


def _facts() -> Iterator[tuple[str, str]]:
    yield "fused_resnet", __version__
    yield "torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}, cuDNN {_cudnn()})"
    yield "triton", triton.__version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "not installed"
    yield from _devices()
    yield (
        "dtypes",
        f"GPU: {', '.join(sorted(target.GPU_DTYPES))}; interpreter: {', '.join(sorted(target.INTERPRETER_DTYPES))}",
    )
    yield "triton cache", str(triton.knobs.cache.dir)
    yield "inductor cache", os.environ.get("TORCHINDUCTOR_CACHE_DIR", "PyTorch's default")
    yield "tuned for", ", ".join(sorted(tables.TABLES)) or "no GPU yet"
    found, complaints = store.read()
    counts = [f"{table.identity.gpu}, {len(table.entries)} layers, {len(table.routes)} blocks" for table in found]
    yield "measured here", f"{'; '.join(counts) or 'nothing'} (in {store.folder()})"
    for complaint in (*tables.COMPLAINTS, *complaints):
        yield "  passed over", complaint
    chosen = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(VARIABLES))
    yield "variables", " ".join(chosen) or "none of interest"


def _cudnn() -> str:
    return str(torch.backends.cudnn.version() or "none") if torch.backends.cudnn.is_available() else "none"


def _devices() -> Iterator[tuple[str, str]]:
    """The CPU and every GPU: what it is, and which routes run on it or why only the reference does."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices:
        try:
            found, reason = target.current(device), target.why_not(device)
        except RuntimeError as error:  # TRITON_INTERPRET came too late
            found, reason = None, str(error)
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            yield f"gpu {device.index}", f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}"
        if found is not None and not found.interpreter:
            yield (
                "  taken as",
                (
                    f"{found.sm_count} SMs, {found.shared_memory} B shared, {found.l2_bytes >> 20} MiB L2, "
                    f"{found.bandwidth / 1e12:.2f} TB/s, {found.matrix_rate / 1e12:.0f} TFLOP/s"
                ),
            )
        kernels = "in Triton's interpreter" if found is not None and found.interpreter else ""
        routes = route.ROUTES if found is not None else ("reference",)
        yield f"routes on {device.type}", ", ".join(routes) + (f" ({reason or kernels})" if reason or kernels else "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fused_resnet", description="Triton kernels that make ResNets train faster."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="versions, GPUs, routes and cache places, to paste into a bug report")
    parser.parse_args(arguments)
    print(environment())
    return 0


if __name__ == "__main__":
    sys.exit(main())
