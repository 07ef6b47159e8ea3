"""What every test stands on: the strict interpreter where there is no GPU, NaN in fresh memory, one thread."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

# What somebody measured on this machine changes no test's plans.
os.environ["FUSED_RESNET_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), "fused_resnet-tests-find-nothing-here")

import pytest  # noqa: E402  (threads are counted at import)
import torch  # noqa: E402

EMULATED = int(os.environ.get("FUSED_RESNET_EMULATE") or 0)
"""The compute capability whose code runs on the CPU (tests/ptx), or 0."""

if not torch.cuda.is_available() and not EMULATED:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it at import

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from . import strict_interpreter

SEED = 20240229


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: the two-minute selection (pytest -m quick)")
    config.addinivalue_line("markers", "slow: takes tens of seconds")
    config.addinivalue_line("markers", "gpu: needs a GPU")
    torch.set_num_threads(1)
    if INTERPRETED:
        strict_interpreter.install(SEED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "test_compiled.py" not in item.nodeid)  # minutes each: the others run beside them
    if not torch.cuda.is_available() or INTERPRETED:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and kernels that are compiled"))
    if not INTERPRETED:
        for item in items:
            if "float64" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="float64 runs in the interpreter only"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU through the interpreter."""
    return torch.device("cpu" if INTERPRETED or EMULATED else "cuda")


@pytest.fixture(scope="session", autouse=True)
def emulation() -> Iterator[None]:
    """Where it was asked for, compiled kernels run on the CPU, and plans are those for the GPU."""
    if not EMULATED:
        yield
        return
    from fused_resnet.plan.target import A100, H100, Assumption, assume

    from .ptx.emulate import emulated

    with emulated(EMULATED), assume(Assumption(H100 if EMULATED == 90 else A100)):
        yield


@pytest.fixture(scope="module")
def ieee() -> Iterator[None]:
    """Convolutions of float32 by float32 products: PyTorch's switch off, which our kernels follow."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers, and the same order of programs, whichever tests ran before."""
    torch.manual_seed(SEED)
    if INTERPRETED:
        strict_interpreter.install(SEED)


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    """What other tests called is not found again: a test may have put something else in the place of a function."""
    from fused_resnet import functional
    from fused_resnet.launch import replay

    replay.forget()
    functional._settled.clear()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN (integers: their maximum), so that an element nobody wrote is seen."""
    previous = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        yield
    torch.use_deterministic_algorithms(previous[0], warn_only=previous[1])
