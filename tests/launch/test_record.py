"""The record of launches: what is kept, for whom, and that nothing runs on meta tensors."""

import threading
from types import SimpleNamespace

import pytest
import torch

from fused_resnet.launch.record import Launch, launch, nbytes, note, record_launches, rehearse_launches
from fused_resnet.plan.config import GemmConfig, PassConfig

pytestmark = pytest.mark.quick


class Kernel:
    """Stands in for a Triton kernel: ``kernel[grid](...)`` keeps what it was called with."""

    arg_names = ("rows",)

    def __init__(self, name):
        self.fn = SimpleNamespace(__name__=name)
        self.calls = []

    def __getitem__(self, grid):
        return lambda **arguments: self.calls.append((grid, arguments))


def run(kernel, device="cpu", grid=(4,), config=PassConfig(8, 16), touched=(), **arguments):  # noqa: B008
    launch(kernel, grid, touched=touched, flops=7, config=config, device=torch.device(device), **arguments)


def test_bytes_of_tensors_and_of_counts():
    assert nbytes([torch.zeros(3, 5), torch.zeros(4, dtype=torch.float16), None, 100]) == 60 + 8 + 100
    assert nbytes([]) == 0


def test_an_entry_says_what_ran():
    config = PassConfig(8, 16, num_warps=2)
    with record_launches() as launches:
        run(Kernel("pass_kernel"), config=config, touched=(torch.zeros(10), 2))
    assert launches == [Launch("pass_kernel", 7, 42, {"block_m": 8, "block_c": 16, "num_warps": 2})]


def test_a_kernel_gets_its_grid_arguments_and_options():
    kernel = Kernel("gemm_kernel")
    run(kernel, grid=(2, 3), config=GemmConfig(16, 32, 64, num_warps=4, num_stages=2), rows=5)
    run(kernel, grid=(1,), config=GemmConfig(16, 32, 64, maxnreg=128), rows=6)
    run(kernel, grid=(1,), config=PassConfig(8, 16, num_warps=1))
    assert kernel.calls == [
        ((2, 3), {"rows": 5, "num_warps": 4, "num_stages": 2}),
        ((1,), {"rows": 6, "num_warps": 8, "num_stages": 3, "maxnreg": 128}),
        ((1,), {"num_warps": 1}),
    ]


def test_meta_tensors_are_recorded_and_not_run():
    kernel = Kernel("pass_kernel")
    with record_launches() as launches:
        run(kernel, device="meta", touched=(torch.empty(10, device="meta"),))
    assert kernel.calls == [] and launches[0].bytes == 40


def test_an_empty_grid_does_not_run():
    kernel = Kernel("pass_kernel")
    run(kernel, grid=(0, 4))
    assert kernel.calls == []


def test_records_nest_and_end_with_their_block():
    with record_launches() as outer:
        note("a", 0, (), {})
        with record_launches() as inner:
            note("b", 0, (), {})
        note("c", 0, (), {})
    note("d", 0, (), {})
    assert [entry.kernel for entry in outer] == ["a", "b", "c"]
    assert [entry.kernel for entry in inner] == ["b"]


def test_equal_records_are_told_apart():
    """Two empty records are equal as lists; leaving one must not close the other."""
    with record_launches() as outer:
        with record_launches():
            pass
        note("a", 0, (), {})
    assert [entry.kernel for entry in outer] == ["a"]


def test_a_record_ends_with_an_error_too():
    with pytest.raises(ZeroDivisionError), record_launches() as launches:
        note("a", 0, (), {})
        _ = 1 / 0
    note("b", 0, (), {})
    assert len(launches) == 1


def test_other_threads_are_recorded():
    """The backward pass of a GPU runs in threads of its own."""
    with record_launches() as launches:
        thread = threading.Thread(target=note, args=("a", 1, (), {}))
        thread.start()
        thread.join()
    assert [entry.kernel for entry in launches] == ["a"]


def test_recording_from_many_threads_loses_nothing():
    with record_launches() as launches:
        threads = [threading.Thread(target=lambda: [note("a", 1, (), {}) for _ in range(200)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(launches) == 1600


def test_a_rehearsal_reaches_no_other_record():
    with record_launches() as real:
        run(Kernel("before"))
        with rehearse_launches() as rehearsed:
            run(Kernel("rehearsed"), device="meta")
            other = threading.Thread(target=run, args=(Kernel("meanwhile"),))
            other.start()
            other.join()
        run(Kernel("after"))
    assert [entry.kernel for entry in real] == ["before", "meanwhile", "after"]
    assert [entry.kernel for entry in rehearsed] == ["rehearsed"]
