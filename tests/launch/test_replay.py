"""What was written down of a step and replayed is the step: numbers, launches and memory."""

from __future__ import annotations

import dis
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from fused_resnet.autograd import staged_backward, staged_forward
from fused_resnet.launch import record, replay
from fused_resnet.launch.check import dot_precision
from fused_resnet.launch.conv_fprop import conv_fprop
from fused_resnet.launch.replay import replaying
from fused_resnet.plan.config import GemmConfig
from fused_resnet.plan.problem import ConvProblem
from tests.conftest import INTERPRETED

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sequences that are written from here on."""
    sequences: list[Any] = []
    original = replay._Writer.sequence
    monkeypatch.setattr(
        replay._Writer, "sequence", lambda self, results: sequences.append(original(self, results)) or sequences[-1]
    )
    return sequences


# ----- bodies of PyTorch's own operators -----


class Counted:
    """A body that counts how often it ran itself."""

    def __init__(self, body: Callable[..., tuple[Tensor, ...]]) -> None:
        self.body, self.count = body, 0

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        self.count += 1
        return self.body(*arguments)


def launch_of(launched: Callable[[Tensor, Tensor], None], x: Tensor) -> Tensor:
    """What a kernel writes that reads ``x`` and does what ``launched`` says."""
    y, settings = torch.empty_like(x), cast(Any, SimpleNamespace(options={}))

    class Kernel:
        class fn:
            __name__ = "kernel"

        arg_names = ("a_ptr", "b_ptr")

        def __getitem__(self, grid: Any) -> Any:
            return launched

    record.launch(Kernel(), (1,), touched=(), flops=0, config=settings, device=x.device, a_ptr=x, b_ptr=y)
    return y


def double_rows(scale: float, x: Tensor, *rows: Tensor | None) -> tuple[Tensor, ...]:
    total = x * scale
    for row in rows:
        if row is not None:
            total = total + row[0]
    scratch = torch.empty_like(x)
    scratch.copy_(total)
    upper, _ = torch.max(scratch, dim=1)
    return total, upper


@pytest.mark.quick
def test_a_third_call_replays_with_its_own_tensors() -> None:
    body = Counted(double_rows)
    call = replaying(body)
    for round_ in range(4):
        x, row = torch.randn(3, 4), torch.randn(2, 4)
        total, upper = call(2.0, x, None, row)
        assert torch.equal(total, x * 2.0 + row[0]) and torch.equal(upper, total.max(1).values)
        assert body.count == min(round_ + 1, 2)


@pytest.mark.quick
@pytest.mark.parametrize(
    "other",
    [
        lambda x, row: (3.0, x, None, row),
        lambda x, row: (2.0, x, row, None),
        lambda x, row: (2.0, x, row, row.clone()),
        lambda x, row: (2.0, x.double(), None, row),
        lambda x, row: (2.0, x[:2], None, row),
        lambda x, row: (2.0, x.t().contiguous().t(), None, row),
        lambda x, row: (2.0, torch.cat([x.flatten()[:1], x.flatten()])[1:].view(3, 4), None, row),
    ],
    ids=["value", "place", "number", "dtype", "shape", "strides", "alignment"],
)
def test_another_kind_is_written_anew(other: Callable[[Tensor, Tensor], tuple[Any, ...]]) -> None:
    body = Counted(double_rows)
    call = replaying(body)
    x, row = torch.randn(3, 4), torch.randn(2, 4)
    call(2.0, x, None, row)
    call(2.0, x, None, row)
    arguments = other(x, row)
    for count in (3, 4, 4):
        for got, expected in zip(call(*arguments), double_rows(*arguments), strict=True):
            assert torch.equal(got, expected)
        assert body.count == count
    call(2.0, x, None, row)
    assert body.count == 4


@pytest.fixture
def conv_precision() -> Iterator[Callable[[str], None]]:
    """PyTorch's newer switch of TF32; with it set, its older one raises."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    yield lambda value: setattr(conv, "fp32_precision", value)
    conv.fp32_precision = before


@pytest.mark.quick
def test_tf32_is_part_of_the_kind_by_whichever_switch(conv_precision: Callable[[str], None]) -> None:
    body = Counted(lambda x: (x + (dot_precision() == "tf32"),))
    call = replaying(body)
    x = torch.zeros(1)
    assert [call(x)[0].item() for _ in range(3)] == [1.0] * 3
    conv_precision("ieee")
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        _ = torch.backends.cudnn.allow_tf32
    assert [call(x)[0].item() for _ in range(3)] == [0.0] * 3 and body.count == 4
    conv_precision("tf32")
    torch.backends.cudnn.allow_tf32 = False
    try:
        assert call(x)[0].item() == 0.0
    finally:
        torch.backends.cudnn.allow_tf32 = True
    assert call(x)[0].item() == 1.0 and body.count == 4


@pytest.mark.quick
def test_one_tensor_in_two_places() -> None:
    """Which of the two a line reads is not known: the body runs, and what two tensors had written stays theirs."""
    body = Counted(lambda a, b: (a - 2 * b,))
    call = replaying(body)
    a, b = torch.randn(4), torch.randn(4)
    for first, second in ((a, a), (a, a), (a, b), (a, b), (b, a), (b, b)):
        assert torch.equal(call(first, second)[0], first - 2 * second)
    assert body.count == 5


@pytest.mark.quick
def test_without_cudnn_a_convolution_may_return_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it then comes as NCHW, and is copied: of calls with cuDNN no copy was written down."""

    def body(x: Tensor) -> tuple[Tensor, ...]:
        has_cudnn = torch.backends.cudnn.enabled
        y = torch.empty_like(x, memory_format=torch.channels_last if has_cudnn else torch.contiguous_format).copy_(x)
        return (y.contiguous(memory_format=torch.channels_last),)

    counted = Counted(body)
    call = replaying(counted)
    x = torch.randn(2, 3, 4, 5)
    for enabled, count in ((True, 2), (False, 4), (True, 4)):
        monkeypatch.setattr(torch.backends.cudnn, "enabled", enabled)
        for _ in range(3):
            assert torch.equal(call(x)[0], x)
        assert counted.count == count


NEGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": lambda t: torch._neg_view(-t),
    "strided": lambda t: torch.complex(t, -t).conj().imag,
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
}


@pytest.mark.quick
@pytest.mark.parametrize("put_off", NEGATED)
@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
def test_what_pytorch_puts_off_is_carried_out_first(put_off: str, training: bool) -> None:
    """The memory of a gradient that is negated lazily holds its opposite, that of zeros nothing."""
    block, x = BLOCKS["identity"]().train(training), torch.randn(2, 16, 3, 3)
    dout = torch.randn(2, 16, 3, 3)
    for _ in range(4):
        leaf = x.clone().requires_grad_()
        lazy = NEGATED[put_off](dout)
        expected, got = (
            torch.autograd.grad(block(leaf), (leaf, *block.parameters()), each) for each in (lazy.clone(), lazy)
        )
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        assert expected[0].any() == (put_off != "zero")
    if put_off == "negated":
        lazy, plain = (block.eval()(each(x)) for each in (lambda t: torch._neg_view(-t), torch.clone))
        torch.testing.assert_close(lazy, plain)


@pytest.mark.quick
def test_the_gradient_of_a_complex_loss() -> None:
    block = BLOCKS["identity"]().double()
    x, results = torch.randn(2, 16, 3, 3, dtype=torch.float64), []
    for route in ("auto", "reference"):
        with fr.use_route(route):
            out = block(x)
        (torch.complex(torch.zeros_like(out), out).conj() * (1 + 1j)).real.sum().backward()
        results.append([p.grad for p in block.parameters()])
        block.zero_grad(set_to_none=True)
    torch.testing.assert_close(*results)


@pytest.mark.quick
def test_a_tensor_from_elsewhere_is_never_replayed() -> None:
    elsewhere = torch.ones(4)
    body = Counted(lambda a: (a + elsewhere,))
    call = replaying(body)
    a = torch.randn(4)
    call(a), call(a)
    elsewhere = torch.zeros(4)
    assert torch.equal(call(a)[0], a) and body.count == 3


@pytest.mark.quick
@pytest.mark.parametrize(
    "body", [lambda a: (a * a.sum().item(),), lambda a: (a + 1,) if torch.equal(a, a.abs()) else (a,)]
)
def test_what_reads_data_is_never_replayed(body: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    counted = Counted(body)
    call = replaying(counted)
    for value in (1.0, 2.0, 3.0, -1.0):
        a = torch.tensor([value, 2.0])
        assert torch.equal(call(a)[0], body(a)[0])
    assert counted.count == 4


@pytest.mark.quick
def test_threads_share_what_one_of_them_wrote() -> None:
    call = replaying(double_rows)

    def work(thread: int) -> None:
        for i in range(60):
            shape = (3, 1 + (thread + i) % 5)
            x, row = torch.full(shape, float(thread)), torch.full((2, shape[1]), float(i))
            total, upper = call(2.0, x, None, row)
            assert torch.equal(total, torch.full(shape, 2.0 * thread + i)) and torch.equal(upper, total.amax(1))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@pytest.mark.quick
def test_memory_is_freed_where_it_was_read_last() -> None:
    alive: list[int] = []
    made: list[Any] = []

    def launched(a_ptr: Tensor, b_ptr: Tensor) -> None:
        """Notes which of the tensors it was ever given are alive."""
        b_ptr.copy_(a_ptr + 1)
        alive.append(sum(reference() is not None for reference in made))
        made.append(weakref.ref(b_ptr))

    def body(x: Tensor) -> tuple[Tensor, ...]:
        for _ in range(3):
            x = launch_of(launched, x)
        torch.empty_like(x)
        return (x,)

    call = replaying(body)
    x = torch.zeros(5)
    for _ in range(2):
        assert torch.equal(call(x)[0], x + 3)
    alive.clear(), made.clear()
    assert torch.equal(call(x)[0], x + 3)
    assert alive == [0, 1, 1]


@pytest.mark.quick
def test_memory_that_nobody_reads_is_not_asked_for(written: list[Any]) -> None:
    def body(x: Tensor) -> tuple[Tensor, ...]:
        torch.empty(1000)
        return (x + 1,)

    call = replaying(body)
    call(torch.ones(2)), call(torch.ones(2))
    names = {instruction.argval for instruction in dis.get_instructions(written[0])}
    assert "empty_strided" not in names


@pytest.mark.quick
def test_what_launching_takes_of_pytorch_is_no_line_of_its_own(written: list[Any]) -> None:
    """Triton asks for scratch memory by PyTorch's operators, and its interpreter copies tensors."""

    def launched(a_ptr: Tensor, b_ptr: Tensor) -> None:
        b_ptr.copy_(torch.empty(0).set_(a_ptr.untyped_storage(), 0, (5,)) + 1)

    def body(x: Tensor) -> tuple[Tensor, ...]:
        return (launch_of(launched, x), torch.empty(0))

    call = replaying(body)
    for start in range(3):
        x = torch.full((5,), float(start))
        y, nothing = call(x)
        assert torch.equal(y, x + 1) and nothing.shape == (0,)
    (sequence,) = written
    used = [sequence.__globals__.get(name) for name in sequence.__code__.co_names]
    assert not {"set_", "add", "copy_"} & {getattr(each, "_opname", "") for each in used}


@pytest.mark.quick
def test_an_error_is_not_remembered() -> None:
    fails = True

    def body(x: Tensor) -> tuple[Tensor, ...]:
        if fails:
            raise RuntimeError("now")
        return (x + 1,)

    call = replaying(body)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="now"):
            call(torch.ones(2))
    fails = False
    for _ in range(3):
        assert torch.equal(call(torch.ones(2))[0], torch.full((2,), 2.0))


# ----- descriptors -----


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's tiles")
@pytest.mark.parametrize("form", ["box", "walk"])
def test_descriptors_are_made_of_the_tensors_at_hand(form: str) -> None:
    problem = ConvProblem(2, 4, 8, 16, 32, 3, 3, padding=(1, 1), dtype="float64")
    config = GemmConfig(16, 16, 16, num_warps=4, form=form)

    def direct(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y, tiles = conv_fprop(x, weight, problem, config, stats=True)
        assert tiles is not None
        return y, tiles.data

    body = Counted(direct)
    call = replaying(body)
    for _ in range(4):
        x = torch.randn(2, 16, 4, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(32, 16, 3, 3, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        for got, expected in zip(call(x, weight), direct(x, weight), strict=True):
            assert torch.equal(got, expected) and got.stride() == expected.stride()
    assert body.count == 2


# ----- blocks -----


BLOCKS: dict[str, Callable[[], torch.nn.Module]] = {
    "identity": lambda: fr.Bottleneck(16, 4),
    "projection": lambda: fr.Bottleneck(
        8, 4, 2, torch.nn.Sequential(torch.nn.Conv2d(8, 16, 1, 2, bias=False), torch.nn.BatchNorm2d(16))
    ),
    "basic": lambda: fr.BasicBlock(16, 16),
}


def step(block: torch.nn.Module, x: Tensor) -> list[Tensor]:
    block.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    out = block(leaf)
    out.square().sum().backward()
    assert leaf.grad is not None
    return [out.detach(), leaf.grad, *(p.grad for p in block.parameters() if p.grad is not None)]


@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("route", ["staged", "gram"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_replayed_steps_are_bit_for_bit_those_of_the_bodies(
    kind: str, route: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    block = BLOCKS[kind]().to(memory_format=torch.channels_last).train(training)
    channels = 8 if kind == "projection" else 16
    images = [torch.randn(3, channels, 5, 4).contiguous(memory_format=torch.channels_last) for _ in range(4)]
    state = {name: t.clone() for name, t in block.state_dict().items()}
    with fr.use_route(route):
        expected = []
        for x in images:
            replay.forget()
            expected.append(step(block, x))
        after = {name: t.clone() for name, t in block.state_dict().items()}
        block.load_state_dict(state)
        replay.forget()
        got = [step(block, images[0]), step(block, images[1])]
        with monkeypatch.context() as patch:
            for module, name in ((staged_forward, "forward"), (staged_backward, "backward")):
                patch.setattr(module, name, lambda *_: pytest.fail("the body ran"))
            got += [step(block, x) for x in images[2:]]
    for ours, theirs in zip(got, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
    for name, t in block.state_dict().items():
        assert torch.equal(t, after[name]), name


@pytest.mark.quick
def test_whoever_records_launches_sees_them_all() -> None:
    block, x = BLOCKS["identity"](), torch.randn(2, 16, 3, 3)
    seen = []
    for _ in range(2):
        step(block, x), step(block, x), step(block, x)
        with fr.record_launches() as launches:
            step(block, x)
        seen.append([(launch.kernel, launch.bytes, launch.flops) for launch in launches])
    assert seen[0] == seen[1] and len(seen[0]) > 15


# ----- as compiled kernels are launched -----


SCRIPT = """
    import pytest
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launched = []

    def said(argument):
        if isinstance(argument, torch.Tensor):
            return tuple(argument.shape), argument.stride(), argument.dtype
        if isinstance(argument, tuple):
            return type(argument), [*map(said, argument)]
        if hasattr(argument, "block_shape"):
            return said(argument.base), tuple(argument.shape), tuple(argument.strides), tuple(argument.block_shape)
        return argument

    class Launcher:
        def __init__(self, src, metadata):
            self.name, self.parameters = metadata.name, src.fn.arg_names

        def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
            assert len(arguments) == len(self.parameters)
            launched.append((self.name, function, packed, (x, y, z), stream, [*map(said, arguments)]))

    class Utilities:
        def load_binary(self, name, kernel, shared, device):
            return object(), object(), 32, 0, 1024

        def get_device_properties(self, device):
            return {"max_shared_mem": 232448}

        def unload_module(self, module):
            pass

    class Named:
        utils, launcher_cls = Utilities(), Launcher

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 7

    driver.set_active(Named())
    import fused_resnet as fr
    from fused_resnet.launch import replay
    from fused_resnet.plan.target import H100, Assumption, assume

    def step(block, x):
        launched.clear()
        out = block(x.clone().requires_grad_())
        out.backward(torch.ones_like(out))
        return list(launched)

    def check(route, width, size, dtype, training=True):
        block = fr.Bottleneck(4 * width, width).to(dtype, memory_format=torch.channels_last).train(training)
        x = torch.zeros(2, 4 * width, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        with assume(Assumption(H100)), fr.use_route(route):
            step(block, x)
            by_triton = step(block, x)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("Triton was asked again"))
                replayed = step(block, x)
            assert by_triton == replayed, (by_triton, replayed)
        print(route, len(by_triton), *sorted({name for name, *_ in by_triton}))

    check("staged", 16, 4, torch.bfloat16)
    check("gram", 64, 8, torch.bfloat16)
    check("staged", 16, 4, torch.float32, training=False)
"""


def test_compiled_kernels_are_launched_as_triton_launches_them(tmp_path: Path) -> None:
    """Through Triton's own code, for a GPU that is not there: a driver that takes down what it is given."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    staged, gram, frozen = done.stdout.splitlines()
    assert int(staged.split()[1]) > 15 and "conv_dgrad_kernel" in staged
    assert int(gram.split()[1]) > 15 and "gram_dgrad_kernel" in gram
    assert "bn_frozen" in frozen
