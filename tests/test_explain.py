"""explain: its counts are those of a real step, and eager PyTorch's are the paper count."""

import copy
import json

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.explain import GLUE, explain
from fused_resnet.launch.record import record_launches
from fused_resnet.plan.target import A100, INTERPRETER, Target, current

from .conftest import INTERPRETED

BATCH = (4, 16, 8, 8)


def block(stride=2, **options):
    projection = nn.Sequential(nn.Conv2d(16, 32, 1, stride=stride, bias=False), nn.BatchNorm2d(32))
    return fr.Bottleneck(16, 8, stride, projection, **options)


def network():
    return nn.Sequential(block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def of(explanation, *sources):
    return [row for row in explanation.rows if row.source in sources]


def total(rows):
    return [sum(getattr(row, name) for row in rows) for name in ("launches", "flops", "bytes")]


class TestAgainstARealStep:
    """One eager forward and backward under ``record_launches`` is what "fused" and "vendor" rows say."""

    def check(self, model, device, shape=BATCH, dtype=torch.float32, training=True):
        model.to(device)
        x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        explanation = explain(model, example_input=x, dtype=dtype, training=training)
        with record_launches() as launches, torch.set_grad_enabled(training):
            out = model(x)
            if training:
                # explain's own loss: the memory that the gradient comes in decides whether it is copied
                labels = out.new_zeros(out.shape[:1] + out.shape[2:], dtype=torch.long)
                nn.functional.cross_entropy(out, labels).backward()
        real = [len(launches), sum(entry.flops for entry in launches), sum(entry.bytes for entry in launches)]
        assert total(of(explanation, "fused", "vendor")) == real
        assert launches

    def test_a_projected_bottleneck(self, device):
        self.check(network(), device)

    def test_contiguous_and_channels_last_parameters(self, device):
        self.check(fr.ConvBNReLU(16, 8, 3), device)
        self.check(fr.ConvBNReLU(16, 8, 3).to(memory_format=torch.channels_last), device)

    def test_a_stem(self, device):
        self.check(fr.Stem(3, 16), device, (2, 3, 16, 16))

    def test_frozen_statistics(self, device):
        self.check(block().eval(), device)

    def test_forward_alone(self, device):
        self.check(block(), device, training=False)

    def test_frozen_parameters(self, device):
        model = block()
        for parameter in model.conv1.parameters():
            parameter.requires_grad_(False)
        model.bn2.requires_grad_(False)
        self.check(model, device)

    def test_a_sum_of_batch_norm_and_residual(self, device):
        class Sum(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = fr.BNAddReLU(16)

            def forward(self, x):
                return self.layer(x, x)

        self.check(Sum(), device)


@pytest.mark.quick
class TestEager:
    def test_resnet50_moves_what_it_moves_on_paper(self):
        """463 to 479 MB per image by how BatchNorm's passes are counted; here backward reads both operands twice."""
        with torch.device("meta"):
            model = fr.reference.resnet50().to(memory_format=torch.channels_last)
        explanation = explain(model, (256, 3, 224, 224), target="h100")
        assert 478e6 < explanation.eager.bytes / 256 < 480e6
        assert 24.2e9 < explanation.eager.flops / 256 < 24.5e9
        assert explanation.totals() == explanation.eager.totals()
        assert {row.source for row in explanation.rows} == {"eager"}
        assert 256 / explanation.floor_us * 1e6 == pytest.approx(5_900, rel=0.01)

    def test_plain_blocks_and_ours_cost_the_same_eagerly(self):
        with torch.device("meta"):
            plain, ours = fr.reference.resnet18(), fr.resnet18()
        found = [explain(model, (32, 3, 64, 64), target="h100").eager for model in (plain, ours)]
        assert found[0].flops == found[1].flops
        assert found[0].bytes == pytest.approx(found[1].bytes, rel=0.01)

    def test_rows_of_a_small_plain_network(self):
        model = nn.Sequential(nn.Conv2d(16, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        rows = {row.name: row for row in explain(model, BATCH, dtype=torch.float32, target="h100").rows}
        assert set(rows) == {"0", "1", "2", "loss", "optimizer"}
        assert [rows[name].kind for name in ("0", "1", "2")] == ["Conv2d", "BatchNorm2d", "ReLU"]
        y = 4 * (4 * 8 * 6 * 6)
        assert rows["0"].flops == 2 * 2 * (4 * 6 * 6) * 8 * 16 * 9  # the input needs no gradient
        assert 8 * y <= rows["1"].bytes < 8 * y + 2000
        assert rows["2"].bytes == 5 * y and rows["2"].saved_bytes == y
        assert rows["optimizer"].bytes == 5 * 4 * sum(p.numel() for p in model.parameters())

    def test_what_is_saved_is_counted_once(self):
        """A ReLU's output is also the next convolution's input."""
        model = nn.Sequential(nn.ReLU(), nn.Conv2d(16, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False))
        x = torch.empty(BATCH, requires_grad=True)
        explanation = explain(model, example_input=x, dtype=torch.float32, target="h100", optimizer=None)
        saved = sum(row.saved_bytes for row in explanation.rows if row.name != "loss")
        assert saved == 4 * 4 * 8 * 8 * (16 + 8)

    def test_backward_belongs_to_the_module_whose_forward_it_is(self):
        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Conv2d(16, 16, 1, bias=False), nn.Conv2d(16, 16, 1, bias=False)

            def forward(self, x):
                return self.second(self.first(x) * 2)

        rows = {row.name: row for row in explain(Shared(), BATCH, dtype=torch.float32, target="h100").rows}
        one = 2 * 4 * 64 * 16 * 16
        assert (rows["first"].flops, rows["second"].flops) == (2 * one, 3 * one)
        assert rows["(model)"].launches == 2  # the product, and its gradient


@pytest.mark.quick
class TestPlans:
    def test_a_fused_network_moves_and_saves_less(self):
        with torch.device("meta"):
            model = fr.resnet50().to(memory_format=torch.channels_last)
        explanation = explain(model, (256, 3, 224, 224), target="h100")
        assert explanation.bytes < 235e6 * 256  # 232.8 MB per image, and a little room
        assert explanation.bytes < 0.491 * explanation.eager.bytes
        assert explanation.saved_bytes < 0.6 * explanation.eager.saved_bytes
        assert 1.0 < explanation.flops / explanation.eager.flops < 1.06  # the Gram matrices, and the products behind
        assert explanation.floor_us < explanation.eager.floor_us
        assert sum(row.source == "fused" and row.kind == "Bottleneck" for row in explanation.rows) == 16
        assert sum(row.name == GLUE for row in explanation.rows) == 1
        assert all(row.reason for row in of(explanation, "fused", "vendor"))

    @pytest.mark.parametrize("target", ["h200", A100, Target("own", 90, 16, 232_448, 1 << 20, 1e12, 1e14)])
    def test_targets_by_name_and_of_one_s_own(self, target):
        explanation = explain(block(), BATCH, target=target)
        assert of(explanation, "fused") and explanation.floor_us > 0
        assert explanation.target.name == (target if isinstance(target, str) else target.name)

    def test_without_a_target_it_is_what_would_run_here(self, device):
        explanation = explain(block().to(device), BATCH, dtype=torch.float32)
        assert explanation.target == current(device)
        assert of(explanation, "fused")
        if INTERPRETED:
            assert explanation.target is INTERPRETER and explanation.floor_us is None

    @pytest.mark.skipif(not INTERPRETED, reason="a GPU takes bfloat16")
    def test_a_dtype_that_does_not_run_here_says_why(self):
        (row,) = (row for row in explain(block(), BATCH).rows if row.kind == "Bottleneck")
        assert (row.source, row.route) == ("eager", "reference") and "bfloat16" in row.reason

    def test_a_requested_route_is_honoured(self):
        with fr.use_route("reference"):
            explanation = explain(block(), BATCH, target="h100")
        assert not of(explanation, "fused", "vendor")
        assert explanation.rows[0].reason == "asked for"

    def test_a_block_whose_child_is_watched_runs_child_by_child(self):
        model = block()
        model.conv2.register_forward_hook(lambda *_: None)
        explanation = explain(model, BATCH, target="h100")
        assert not of(explanation, "fused")
        names = {row.name for row in explanation.rows}
        assert {"conv1", "conv2", "conv3", "downsample.0"} <= names

    def test_forward_alone_costs_less_and_saves_nothing(self):
        step, forward = (explain(block(), BATCH, target="h100", training=training) for training in (True, False))
        assert forward.bytes < step.bytes and forward.saved_bytes == 0
        assert {row.name for row in forward.rows}.isdisjoint({"loss", "optimizer"})

    def test_modes_are_honoured(self):
        train, frozen = (explain(block().train(mode), BATCH, target="h100") for mode in (True, False))
        assert frozen.bytes < train.bytes and frozen.saved_bytes < train.saved_bytes


@pytest.mark.quick
class TestTheReport:
    def test_totals_are_sums_of_rows(self):
        explanation = explain(network(), BATCH, target="h100")
        for step in (explanation, explanation.eager):
            for name in ("flops", "bytes", "saved_bytes", "launches"):
                assert getattr(step, name) == sum(getattr(row, name) for row in step.rows)
            assert step.floor_us == pytest.approx(sum(row.floor_us for row in step.rows))

    def test_it_is_json(self):
        explanation = explain(network(), BATCH, target="h100")
        read = json.loads(json.dumps(explanation.to_dict()))
        assert read["target"] == "h100" and read["batch"] == 4 and read["dtype"] == "bfloat16"
        assert read["totals"]["bytes"] == explanation.bytes
        assert read["eager"]["totals"]["launches"] == explanation.eager.launches
        assert [row["name"] for row in read["rows"]] == [row.name for row in explanation.rows]

    def test_it_prints_a_table(self):
        text = str(explain(network(), BATCH, target="h100"))
        assert "training step of batch 4 in bfloat16 on h100; counted, not measured" in text
        assert "Bottleneck" in text and "eager PyTorch" in text and "[1]" in text and "projected" in text

    def test_without_rates_no_floor_is_claimed(self):
        explanation = explain(nn.Conv2d(16, 8, 1), BATCH, dtype=torch.float32, target=INTERPRETER)
        assert explanation.floor_us is None and "projected:" not in str(explanation)


@pytest.mark.quick
class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({}, TypeError),
            ({"input_shape": BATCH, "example_input": torch.empty(BATCH)}, TypeError),
            ({"example_input": ()}, TypeError),
            ({"input_shape": BATCH, "dtype": torch.int8}, ValueError),
            ({"input_shape": BATCH, "optimizer": "lion"}, ValueError),
            ({"input_shape": BATCH, "target": "h101"}, KeyError),
            ({"input_shape": BATCH, "target": 90}, TypeError),
            ({"input_shape": "224"}, TypeError),
            ({"input_shape": (1, 16, 8.0, 8)}, TypeError),
            ({"input_shape": (-1, 16, 8, 8)}, TypeError),
        ],
    )
    def test_bad_ones_are_refused(self, arguments, error):
        with pytest.raises(error):
            explain(nn.Conv2d(16, 8, 1), **arguments)

    def test_several_inputs_and_outputs(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(16, 8, 1)

            def forward(self, a, b):
                return {"a": self.conv(a), "b": (self.conv(b) * 2)}

        inputs = (torch.empty(BATCH), torch.empty(BATCH))
        explanation = explain(Two(), example_input=inputs, target="h100")
        assert explanation.batch == 4 and explanation.flops == 2 * 2 * 2 * 4 * 64 * 16 * 8

    def test_meta_models_need_no_memory(self):
        with torch.device("meta"):
            model = fr.resnet152()
        assert of(explain(model, (2, 3, 64, 64), target="h100"), "fused")

    def test_wrapped_models(self):
        model = block()
        expected = explain(model, BATCH, target="h100").totals()
        assert explain(torch.compile(model, backend="eager"), BATCH, target="h100").totals() == expected

    @pytest.mark.filterwarnings("ignore")
    def test_scripted_models_are_refused(self):
        with pytest.raises(TypeError, match="scripted"):
            explain(nn.Sequential(torch.jit.script(nn.Conv2d(16, 8, 1))), BATCH, target="h100")

    def test_deep_copies_that_fail_are_not_asked_for(self):
        """A process group cannot be copied; a module that holds one is explained all the same."""

        class ProcessGroup:
            def __deepcopy__(self, memo):
                raise TypeError("cannot pickle")

        model = block()
        model.process_group = ProcessGroup()
        with pytest.raises(TypeError):
            copy.deepcopy(model)
        assert of(explain(model, BATCH, target="h100"), "fused")
