"""A stand-in for the vendor's graph API (``nvidia-cudnn-frontend``): the operations that are used, over PyTorch.

Names, order and keywords of the arguments are those of the package (1.32 was read), and no others are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import grad

Pack = dict[Any, torch.Tensor]


class FakeTensor:
    """A node of the graph: how its value follows from those of the nodes before it."""

    def __init__(self, value: Callable[[Pack], torch.Tensor] | None = None) -> None:
        self.value = value
        self.dim: list[int] | None = None
        self.stride: list[int] | None = None
        self.output = False

    def set_output(self, value: bool) -> FakeTensor:
        self.output = value
        return self

    def set_data_type(self, _: object) -> FakeTensor:
        return self

    def set_dim(self, value: list[int]) -> FakeTensor:
        self.dim = value
        return self

    def set_stride(self, value: list[int]) -> FakeTensor:
        self.stride = value
        return self

    def of(self, pack: Pack) -> torch.Tensor:
        return pack[self] if self.value is None else self.value(pack)


class FakeCudnn:
    """The module and a graph in one."""

    data_type = SimpleNamespace(BFLOAT16=1, HALF=2, FLOAT=3)
    heur_mode = SimpleNamespace(A=0)
    reduction_mode = SimpleNamespace(ADD=0)
    cudnnGraphNotSupportedError: type[Exception] = RuntimeError

    def __init__(self) -> None:
        self.nodes: list[FakeTensor] = []

    def create_handle(self) -> int:
        return 1

    def set_stream(self, *, handle: int, stream: int) -> None:
        assert handle == 1

    def pygraph(
        self, *, handle: int, io_data_type: int, intermediate_data_type: int, compute_data_type: int
    ) -> FakeCudnn:
        self.nodes = []
        graph = FakeCudnn.__new__(type(self))
        graph.__dict__.update(self.__dict__, nodes=[])
        return graph

    def node(self, value: Callable[[Pack], torch.Tensor]) -> FakeTensor:
        made = FakeTensor(value)
        self.nodes.append(made)
        return made

    def tensor_like(self, template: torch.Tensor) -> FakeTensor:
        return FakeTensor()

    def mul(self, a: FakeTensor, b: FakeTensor) -> FakeTensor:
        return self.node(lambda pack: a.of(pack) * b.of(pack))

    def add(self, a: FakeTensor, b: FakeTensor) -> FakeTensor:
        return self.node(lambda pack: a.of(pack) + b.of(pack))

    def sub(self, a: FakeTensor, b: FakeTensor) -> FakeTensor:
        return self.node(lambda pack: a.of(pack) - b.of(pack))

    def relu(self, input: FakeTensor) -> FakeTensor:
        return self.node(lambda pack: torch.relu(input.of(pack)))

    def relu_backward(self, loss: FakeTensor, input: FakeTensor) -> FakeTensor:
        return self.node(lambda pack: torch.where(input.of(pack) <= 0, 0.0, loss.of(pack)))

    def reduction(self, input: FakeTensor, mode: int) -> FakeTensor:
        assert mode == self.reduction_mode.ADD
        return self.node(lambda pack: input.of(pack).sum((0, 2, 3), keepdim=True))

    def conv_fprop(
        self, image: FakeTensor, weight: FakeTensor, padding: list[int], stride: list[int], dilation: list[int]
    ) -> FakeTensor:
        more = {"padding": padding, "stride": stride, "dilation": dilation}
        return self.node(lambda pack: torch.conv2d(image.of(pack), weight.of(pack), None, **more))

    def conv_dgrad(
        self, loss: FakeTensor, filter: FakeTensor, padding: list[int], stride: list[int], dilation: list[int]
    ) -> FakeTensor:
        more = {"padding": padding, "stride": stride, "dilation": dilation}

        def value(pack: Pack) -> torch.Tensor:
            assert made.dim is not None, "the size of a strided convolution's input does not follow"
            return grad.conv2d_input(made.dim, filter.of(pack), loss.of(pack), **more)

        made = self.node(value)
        return made

    def conv_wgrad(
        self, image: FakeTensor, loss: FakeTensor, padding: list[int], stride: list[int], dilation: list[int]
    ) -> FakeTensor:
        more = {"padding": padding, "stride": stride, "dilation": dilation}

        def value(pack: Pack) -> torch.Tensor:
            assert made.dim is not None, "the size of a filter does not follow"
            return grad.conv2d_weight(image.of(pack), made.dim, loss.of(pack), **more)

        made = self.node(value)
        return made

    def genstats(self, input: FakeTensor) -> list[FakeTensor]:
        return [self.node(lambda pack, n=n: input.of(pack).pow(n).sum((0, 2, 3), keepdim=True)) for n in (1, 2)]

    def build(self, heuristics: list[Any]) -> None:
        assert heuristics

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, tensor_dict: Pack, workspace: torch.Tensor, handle: int) -> None:
        assert handle == 1
        outputs = [node for node in self.nodes if node.output]
        given = {key: t for key, t in tensor_dict.items() if key not in outputs}
        for node in outputs:
            out = tensor_dict[node]
            assert node.dim == list(out.shape) and node.stride == list(out.stride())
            out.copy_(node.of(given))
