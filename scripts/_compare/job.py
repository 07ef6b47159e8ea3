"""The main job: the same weights, the same batches, three ways to run them."""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import data
import networks
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.explain import explain

from .result import Candidate, Cost, Result
from .trainer import Trainer

Say = Callable[[str], None]

TRUTH = {"float32": "float64", "bfloat16": "float32", "float16": "float32"}
WARM_UP_STEPS = 10
STEPS_A_TURN = 5
EXACT_STEPS = 3  # in the interpreter, in float64 as well


class JobError(Exception):
    """The job cannot go on; the message is one sentence that says what to do."""


def build(family: Any, model: str, images: data.ImageSet) -> nn.Module:
    """A network of ``family`` (fused_resnet, or its reference) for these images."""
    # Branches that start as zero are the usual recipe (Goyal et al. 2017), and they keep the first steps from
    # magnifying a rounding error a thousandfold, which would leave nothing to compare.
    return networks.build(family, model, images.num_classes, images.size, zero_init_residual=True)


class Job:
    """Fills ``result`` part by part, so that an interruption leaves the finished parts."""

    def __init__(
        self,
        options: argparse.Namespace,
        device: torch.device,
        result: Result,
        say: Say,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """``stopped`` tells before each training step whether somebody asked to stop."""
        self.options, self.device, self.result, self.say, self.stopped = options, device, result, say, stopped
        self.gpu = device.type == "cuda"
        self.precision = options.precision
        if self.precision == "auto":
            self.precision = "bfloat16" if self.gpu else "float32"
        if self.precision == "bfloat16" and self.gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise JobError("this GPU has no bfloat16: use --precision float16")
        self.images = data.load(
            options.data,
            root=options.data_root,
            seed=options.seed,
            image_size=options.image_size or (224 if self.gpu else 32),
            limit=options.limit or (None if self.gpu else 10_000),
        )
        self.per_epoch = self.images.count("train") // options.batch_size
        if not self.per_epoch:
            raise JobError(
                f"{self.images.name} has {self.images.count('train')} training images, fewer than one batch of "
                f"{options.batch_size}: use a smaller --batch-size"
            )
        self.total = self.per_epoch * options.epochs
        self.trainers: dict[str, Trainer] = {}
        torch.manual_seed(options.seed)
        try:
            self.weights = build(fr.reference, options.model, self.images).state_dict()
        except ValueError as error:  # a depth that does not exist
            raise JobError(f"--model {options.model}: {error}") from error
        self._describe()

    def _describe(self) -> None:
        r, o = self.result, self.options
        r.batch_size, r.measured = o.batch_size, False
        r.steps = min(o.steps or (10 if self.gpu else 6), self.total)
        r.truth_name = TRUTH[self.precision]
        tf32 = self.gpu and self.precision == "float32" and torch.backends.cudnn.allow_tf32
        r.floor = "tf32" if tf32 else self.precision
        parameters = sum(self.weights[name].numel() for name in self.weights if name.endswith(("weight", "bias")))
        height, width = self.images.size
        name = "small bottleneck ResNet" if o.model == "small" else o.model
        r.facts = {
            "model": f"{name}, {parameters / 1e6:.1f} million parameters",
            "images": f"{self.images.name}, {height}x{width}, {self.images.count('train')} to train on, "
            f"{self.images.count('test')} held out",
            "training": f"batch {o.batch_size}, {self.precision}{' (tf32)' if tf32 else ''}, channels_last, "
            f"{o.epochs} epochs of {self.per_epoch} steps, seed {o.seed}",
            "device": torch.cuda.get_device_name(self.device)
            if self.gpu
            else f"CPU ({platform.machine()}), no GPU used",
            "versions": f"torch {torch.__version__}, triton {_triton_version()}, Python {platform.python_version()}",
        }

    def run(self) -> None:
        for title, text in self.result.facts.items():
            self.say(f"  {title:<9} {text}")
        if self.gpu:
            torch.backends.cudnn.benchmark = True
            self.images = self.images.to(self.device) if _fits(self.images) else self.images
        self._truth()
        self._train("eager", fr.reference, self.total)
        if not self.gpu:
            self.result.candidates["compiled"] = Candidate(
                "compiled", note="skipped: it is about speed, and there is no GPU"
            )
            self._train("fused float64", fr, min(EXACT_STEPS, self.result.steps), precision="float64")
            self._train("fused", fr, self.result.steps)
            self._check_fused()
            self._fused_accuracy()
        else:
            if self.options.compile_mode == "off":
                self.result.candidates["compiled"] = Candidate("compiled", note="left out: --compile-mode off")
            else:
                self._train_compiled()
            self._train("fused", fr, self.total)
            self._check_fused()
            if not self.result.failures:
                self._measure()
        self._project()

    def _batches(self) -> Iterator[data.Batch]:
        o = self.options
        for epoch in itertools.count():
            for batch in self.images.batches(
                "train", o.batch_size, device=self.device, seed=o.seed, epoch=epoch, drop_last=True, workers=o.workers
            ):
                if self.stopped():  # a KeyboardInterrupt inside a finaliser is dropped: here it comes again
                    raise KeyboardInterrupt
                yield batch

    def _held_out(self) -> Iterator[data.Batch]:
        o = self.options
        return self.images.batches("test", o.batch_size, device=self.device, workers=o.workers)

    def _trainer(self, family: Any, precision: str, compile_mode: str = "off") -> Trainer:
        model = build(family, self.options.model, self.images)
        model.load_state_dict(self.weights)
        return Trainer(
            model,
            precision=precision,
            device=self.device,
            lr=self.options.lr,
            total=self.total,
            compile_mode=compile_mode,
        )

    def _truth(self) -> None:
        """The compared steps once more in higher precision: what eager and fused are both measured against."""
        r = self.result
        self.say(f"\nthe first {r.steps} steps in {r.truth_name}: what all are measured against")
        tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            trainer = self._trainer(fr.reference, r.truth_name)
            r.truth = [trainer.step(*batch).item() for batch in itertools.islice(self._batches(), r.steps)]
        finally:
            torch.backends.cudnn.allow_tf32 = tf32

    def _train(
        self, name: str, family: Any, steps: int, compile_mode: str = "off", precision: str | None = None
    ) -> None:
        """Trains one candidate for ``steps`` steps, evaluating it after every epoch that it completes."""
        c = self.result.candidates[name] = Candidate(name, exact=precision == "float64")
        self.say(f"\n{name}: {steps} steps" + (" in Triton's interpreter" if family is fr and not self.gpu else ""))
        before = torch.cuda.memory_allocated(self.device) if self.gpu else 0
        trainer = self.trainers[name] = self._trainer(family, precision or self.precision, compile_mode)
        losses: list[Tensor] = []
        start = spoken = time.monotonic()
        each_step = steps <= 20 and not self.gpu
        try:
            for batch in itertools.islice(self._batches(), steps):
                if family is fr and not trainer.taken:
                    losses.append(self._first_fused_step(trainer, c, batch))
                else:
                    losses.append(trainer.step(*batch))
                if trainer.taken == min(3, steps) and self.gpu:
                    # The first steps search for algorithms and compile; their memory is not the training's.
                    torch.cuda.synchronize(self.device)
                    torch.cuda.reset_peak_memory_stats(self.device)
                ends_epoch = trainer.taken % self.per_epoch == 0
                if each_step or ends_epoch or trainer.taken == steps or time.monotonic() - spoken > 10:
                    _flush(losses, c)
                    spoken = time.monotonic()
                    spent = f"{spoken - start:5.1f} s"
                    if ends_epoch:
                        c.accuracies.append((trainer.taken, trainer.accuracy(self._held_out())))
                        epoch = trainer.taken // self.per_epoch
                        found = f"held-out accuracy {c.accuracy:7.2%}"
                        self.say(f"  epoch {epoch:3d}  loss {c.losses[-1]:.4f}  {found}  {spent}")
                    else:
                        self.say(f"  step {trainer.taken:4d}  loss {c.losses[-1]:.6f}  {spent}")
        finally:
            _flush(losses, c)
        if self.gpu:
            c.peak_bytes = torch.cuda.max_memory_allocated(self.device) - before

    def _train_compiled(self) -> None:
        """torch.compile may fail for reasons of its own (no C compiler, say): then it is left out, with the reason."""
        try:
            self._train("compiled", fr.reference, self.total, self.options.compile_mode)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # anything may come out of a compiler
            self.trainers.pop("compiled", None)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.result.candidates["compiled"] = Candidate("compiled", note=f"left out, torch.compile failed: {reason}")
            self.say(f"  torch.compile failed: {reason}")

    def _first_fused_step(self, trainer: Trainer, c: Candidate, batch: data.Batch) -> Tensor:
        """Counts what really ran: a fused model that quietly ran something else would agree for nothing."""
        with fr.record_launches() as launches:
            loss = trainer.step(*batch)
        c.vendor_convs = sum(launch.kernel.startswith("vendor") for launch in launches)
        c.kernels = len(launches) - c.vendor_convs
        return loss

    def _check_fused(self) -> None:
        r, c = self.result, self.result.candidates["fused"]
        if not c.kernels:
            r.failures.append("the fused model launched no fused kernel; fr.explain(model, input_shape) says why")
        for name in r.candidates:
            if r.agrees(name) is False:
                r.failures.append(
                    f"the losses of {name} disagree: they are {r.error(name):.1e} from {r.truth_name}'s, "
                    f"where {r.tolerance(name):.1e} is allowed"
                )

    def _fused_accuracy(self) -> None:
        """The weights that eager trained, in the fused network: one pass over the held-out images."""
        fused = self.trainers["fused"]
        fused.model.load_state_dict(self.trainers["eager"].model.state_dict())
        self.say("\nfused, with the weights that eager trained: the held-out images")
        c = self.result.candidates["fused"]
        c.accuracies.append((0, fused.accuracy(self._held_out())))
        c.accuracy_note = "eager's weights"
        self.say(f"  held-out accuracy {c.accuracy:7.2%}")

    def _measure(self) -> None:
        """Candidates in turns, each step between two CUDA events (design: one process, A B A B, medians)."""
        batches = list(itertools.islice(self._batches(), 8))
        turns = math.ceil(self.options.timed_steps / STEPS_A_TURN)
        self.say(f"\nmeasuring: {turns} turns of {STEPS_A_TURN} steps each, {' / '.join(self.trainers)} by turns")
        for trainer in self.trainers.values():
            for batch in itertools.islice(itertools.cycle(batches), WARM_UP_STEPS):
                trainer.step(*batch)
        stream = itertools.cycle(batches)
        for turn in range(turns):
            for name, trainer in self.trainers.items():
                torch.cuda.synchronize(self.device)
                trainer.step(*next(stream))  # refills the queue and the caches; not timed
                events = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS_A_TURN + 1)]
                events[0].record()
                for event in events[1:]:
                    trainer.step(*next(stream))
                    event.record()
                torch.cuda.synchronize(self.device)
                times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
                self.result.candidates[name].times_ms += times
            self.result.measured = (turn + 1) * STEPS_A_TURN >= 20
            if turn == turns - 1 or turn % 4 == 3:
                self.say(f"  turn {turn + 1} of {turns}")

    def _project(self) -> None:
        """What explain counts for an H100 in bfloat16; for the small model, ResNet-50 at 224x224 beside it."""
        o = self.options
        self.say("\ncounting what an H100 would have to do")
        size = self.images.size
        cases = [(o.model, self.images, (o.batch_size, 3, *size))]
        if o.model == "small":
            imagenet = data.ImageSet("imagenet", self.images.train, self.images.test, 1000, (224, 224))
            cases.append(("resnet50", imagenet, (256, 3, 224, 224)))
        for model, images, shape in cases:
            network = build(fr, model, images)
            found = explain(network, shape, target="h100")
            title = f"{'this model' if model == 'small' else model}, {'x'.join(map(str, shape))}"
            for route, cost in (("eager", found.eager), ("fused", found)):
                self.result.projection.append(
                    Cost(title, route, cost.flops, cost.bytes, cost.saved_bytes, cost.launches, cost.floor_us)
                )


def _flush(losses: list[Tensor], candidate: Candidate) -> None:
    """Reads the losses that are still on the device: one wait for many steps."""
    if losses:
        candidate.losses += torch.stack(losses).tolist()
        losses.clear()


def _fits(images: data.ImageSet) -> bool:
    """Held in memory, and small enough to be held in the GPU's."""
    tensors = getattr(images.train, "tensors", None)
    return tensors is not None and tensors[0].numel() < 2**31


def _triton_version() -> str:
    import triton

    return triton.__version__
