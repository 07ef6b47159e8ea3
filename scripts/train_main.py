"""The program of scripts/train, once there is a Python with PyTorch."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import data
import networks
import torch
from torch import Tensor, nn

import fused_resnet as fr

EPILOG = """\
examples:
  scripts/train --data digits --epochs 10
  scripts/train --data cifar10 --model cifar_resnet56 -b 128 --epochs 160 --lr-step-size 80 --output-dir out/cifar
  scripts/train --data-path /data/imagenet --model resnet50 -b 256 --amp --lr 0.1 --epochs 90 --output-dir out/resnet50
  scripts/train --data-path /data/imagenet --model resnet50 --resume out/resnet50/checkpoint.pth --amp

Of torchvision's recipe, what matters to a ResNet is here, under the same names and with the same defaults."""


class TrainError(Exception):
    """Training cannot begin or go on; the message is one sentence."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="scripts/train",
        description="Trains a ResNet through the fused kernels.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = "digits, fashion-mnist, cifar10, imagefolder:PATH or synthetic"
    p.add_argument("--data", metavar="SET", help=f"{kinds} (default digits)")
    p.add_argument("--data-path", metavar="DIR", help="the same as --data imagefolder:DIR (with train/ and val/)")
    p.add_argument("--data-root", type=Path, default=Path("~/.cache/fused_resnet/data"), help="where sets are kept")
    p.add_argument("--model", default="small", type=networks.name_of_network, help=", ".join(networks.NAMES) + ", ...")
    p.add_argument("--route", default="auto", choices=("auto", "staged", "reference"), help="how blocks run")
    p.add_argument("--eager", action="store_true", help="the same network in plain PyTorch")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    p.add_argument("-b", "--batch-size", default=32, type=int)
    p.add_argument("--epochs", default=90, type=int)
    p.add_argument("-j", "--workers", default=16, type=int, help="loader processes, for image folders (default 16)")
    p.add_argument("--opt", default="sgd", choices=("sgd", "sgd_nesterov", "rmsprop", "adamw"))
    p.add_argument("--lr", default=0.1, type=float)
    p.add_argument("--momentum", default=0.9, type=float)
    p.add_argument("--wd", "--weight-decay", default=1e-4, type=float, dest="weight_decay")
    p.add_argument("--norm-weight-decay", type=float, help="weight decay of normalisation (default: that of the rest)")
    p.add_argument("--label-smoothing", default=0.0, type=float)
    p.add_argument("--lr-scheduler", default="steplr", choices=("steplr", "cosineannealinglr", "exponentiallr"))
    p.add_argument("--lr-warmup-epochs", default=0, type=int)
    p.add_argument("--lr-warmup-method", default="constant", choices=("constant", "linear"))
    p.add_argument("--lr-warmup-decay", default=0.01, type=float)
    p.add_argument("--lr-step-size", default=30, type=int)
    p.add_argument("--lr-gamma", default=0.1, type=float)
    p.add_argument("--lr-min", default=0.0, type=float)
    p.add_argument("--print-freq", default=10, type=int, help="steps between two lines (default 10)")
    p.add_argument("--output-dir", type=Path, help="where checkpoints go (default: none are written)")
    p.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    p.add_argument("--start-epoch", default=0, type=int)
    p.add_argument("--test-only", action="store_true", help="only evaluate")
    p.add_argument("--weights", help="a checkpoint or a name of torchvision's weights to start from")
    p.add_argument("--amp", action="store_true", help="autocast (bfloat16 where the GPU has it, else float16)")
    p.add_argument("--clip-grad-norm", type=float)
    p.add_argument("--zero-init-residual", action="store_true")
    p.add_argument("--train-crop-size", default=224, type=int, help="for image folders and synthetic (default 224)")
    p.add_argument("--no-augment", action="store_true", help="leave the training images as they are")
    p.add_argument("--limit", type=int, help="use only so many training images")
    p.add_argument("--use-deterministic-algorithms", action="store_true")
    p.add_argument("--seed", default=0, type=int)
    return p


def check(args: argparse.Namespace) -> None:
    """One sentence for what cannot work, before any data is read."""
    if args.data and args.data_path:
        raise TrainError("--data and --data-path both name the images: give one of them")
    for name in ("batch_size", "epochs", "print_freq", "lr_step_size"):
        if getattr(args, name) < 1:
            raise TrainError(f"--{name.replace('_', '-')} must be at least 1")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise TrainError(f"--device {args.device}: PyTorch sees no CUDA GPU here; --device cpu runs without one")
    if args.amp and not args.device.startswith("cuda"):
        raise TrainError("--amp is for a GPU: leave it away with --device cpu")
    if args.resume and not args.resume.is_file():
        raise TrainError(f"--resume {args.resume}: there is no such file")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainError("training runs on one GPU: start it without torchrun, or with --nproc-per-node 1")
    if args.eager and args.route != "auto":
        raise TrainError("--route is for the fused network: leave it away with --eager")


def parameter_groups(model: nn.Module, norm_weight_decay: float | None) -> list[dict[str, Any]]:
    """All parameters, those of normalisation apart where they have a weight decay of their own."""
    if norm_weight_decay is None:
        return [{"params": list(model.parameters())}]
    norms = [p for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters(False)]
    apart = set(map(id, norms))
    others = [p for p in model.parameters() if id(p) not in apart]
    return [{"params": others}, {"params": norms, "weight_decay": norm_weight_decay}]


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(model, args.norm_weight_decay)
    if args.opt == "adamw":
        return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay)
    common = {"lr": args.lr, "momentum": args.momentum, "weight_decay": args.weight_decay}
    if args.opt == "rmsprop":
        return torch.optim.RMSprop(groups, **common, eps=0.0316, alpha=0.9)
    return torch.optim.SGD(groups, **common, nesterov=args.opt == "sgd_nesterov")


def make_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """One step an epoch: a warm-up, then the chosen decay, as torchvision's reference composes them."""
    schedulers = torch.optim.lr_scheduler
    after = max(args.epochs - args.lr_warmup_epochs, 1)
    main: torch.optim.lr_scheduler.LRScheduler
    if args.lr_scheduler == "steplr":
        main = schedulers.StepLR(optimizer, args.lr_step_size, args.lr_gamma)
    elif args.lr_scheduler == "cosineannealinglr":
        main = schedulers.CosineAnnealingLR(optimizer, after, args.lr_min)
    else:
        main = schedulers.ExponentialLR(optimizer, args.lr_gamma)
    if not args.lr_warmup_epochs:
        return main
    kind = schedulers.LinearLR if args.lr_warmup_method == "linear" else schedulers.ConstantLR
    key = "start_factor" if args.lr_warmup_method == "linear" else "factor"
    warm_up = kind(optimizer, **{key: args.lr_warmup_decay}, total_iters=args.lr_warmup_epochs)
    return schedulers.SequentialLR(optimizer, [warm_up, main], [args.lr_warmup_epochs])


def evaluate(forward: Callable[[Tensor], Tensor], model: nn.Module, batches: Any, context: Callable[[], Any]) -> str:
    """Top-1, top-5 and loss over the held-out images, as a line."""
    model.eval()
    totals: Tensor | None = None
    with torch.inference_mode(), context():
        for images, labels in batches:
            scores = forward(images).float()
            best = scores.topk(min(5, scores.shape[1]), 1).indices == labels[:, None]
            loss = nn.functional.cross_entropy(scores, labels, reduction="sum")
            seen = torch.stack([best[:, 0].sum(), best.sum(), loss, loss.new_tensor(len(labels))])
            totals = seen if totals is None else totals + seen
    model.train()
    if totals is None:
        raise TrainError("there are no held-out images to evaluate on")
    top1, top5, loss_sum, count = totals.tolist()
    return f"held-out: loss {loss_sum / count:.4f}  top-1 {top1 / count:.2%}  top-5 {top5 / count:.2%}"


class Training:
    """Model, optimizer, schedule and images of one run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        torch.manual_seed(args.seed)
        torch.use_deterministic_algorithms(args.use_deterministic_algorithms)
        torch.backends.cudnn.benchmark = not args.use_deterministic_algorithms
        spec = f"imagefolder:{args.data_path}" if args.data_path else args.data or "digits"
        self.images = data.load(
            spec,
            root=args.data_root.expanduser(),
            seed=args.seed,
            image_size=args.train_crop_size,
            limit=args.limit,
            augment=not args.no_augment,
        )
        self.steps = self.images.count("train") // args.batch_size
        if not self.steps:
            raise TrainError(f"there are only {self.images.count('train')} training images: lower --batch-size")
        keywords: dict[str, Any] = {"zero_init_residual": args.zero_init_residual}
        if args.weights:
            keywords["weights"] = args.weights
        family = fr.reference if args.eager else fr
        try:
            model = networks.build(family, args.model, self.images.num_classes, self.images.size, **keywords)
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            raise TrainError(f"--model {args.model}: {str(error).splitlines()[0]}") from error
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.forward = torch.compile(self.model) if args.compile else self.model
        self.optimizer = make_optimizer(args, self.model)
        self.scheduler = make_scheduler(args, self.optimizer)
        half = torch.bfloat16 if args.amp and torch.cuda.is_bf16_supported(False) else torch.float16
        self.context = (lambda: torch.autocast(self.device.type, half)) if args.amp else nullcontext
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp and half is torch.float16)
        self.loss = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
        if args.resume:
            self.load(args.resume)

    def batches(self, split: str, epoch: int = 0) -> Any:
        a, training = self.args, split == "train"
        seed = a.seed if training else None
        return self.images.batches(
            split, a.batch_size, device=self.device, seed=seed, epoch=epoch, drop_last=training, workers=a.workers
        )

    def epoch(self, epoch: int) -> None:
        """One pass over the training images, with a line every ``--print-freq`` steps."""
        a, since, start = self.args, 0, time.monotonic()
        for step, (images, labels) in enumerate(self.batches("train", epoch), 1):
            self.optimizer.zero_grad(set_to_none=True)
            with self.context():
                loss = self.loss(self.forward(images), labels)
            self.scaler.scale(loss).backward()
            if a.clip_grad_norm is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), a.clip_grad_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            since += len(images)
            if step % a.print_freq == 0 or step == self.steps:
                value = loss.item()
                if not math.isfinite(value):
                    raise TrainError(f"the loss is {value} in epoch {epoch}, step {step}: a lower --lr may help")
                rate, since, start = since / (time.monotonic() - start), 0, time.monotonic()
                lr = self.optimizer.param_groups[0]["lr"]
                place = f"epoch {epoch}  step {step}/{self.steps}"
                print(f"{place}  loss {value:.4f}  lr {lr:.5g}  {rate:,.0f} images/s", flush=True)
        self.scheduler.step()

    def save(self, epoch: int) -> None:
        """Writes ``model_<epoch>.pth`` and ``checkpoint.pth``, whole or not at all."""
        if self.args.output_dir is None:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "args": {key: str(value) for key, value in vars(self.args).items()},
        }
        self.args.output_dir.mkdir(parents=True, exist_ok=True)
        for name in (f"model_{epoch}.pth", "checkpoint.pth"):
            unfinished = self.args.output_dir / f".{name}"
            torch.save(state, unfinished)
            unfinished.replace(self.args.output_dir / name)

    def load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            if not self.args.test_only:
                self.optimizer.load_state_dict(state["optimizer"])
                self.scheduler.load_state_dict(state["lr_scheduler"])
                if state["scaler"] and self.scaler.is_enabled():
                    self.scaler.load_state_dict(state["scaler"])
            self.args.start_epoch = state["epoch"] + 1
        except Exception as error:  # unpickling raises anything
            reason = str(error).splitlines()[0]
            raise TrainError(f"--resume {path}: not a checkpoint of this model and optimizer ({reason})") from error

    def run(self) -> None:
        a = self.args
        parameters = sum(p.numel() for p in self.model.parameters())
        how = "plain PyTorch" if a.eager else f"fused, route {a.route}"
        print(f"{a.model}, {parameters / 1e6:.1f} million parameters, {how}, {a.device}")
        print(f"{self.images.name}: {self.images.count('train')} training images, {self.images.count('test')} held out")
        with fr.use_route(a.route):
            if a.test_only:
                print(evaluate(self.forward, self.model, self.batches("test"), self.context))
                return
            for epoch in range(a.start_epoch, a.epochs):
                self.epoch(epoch)
                self.save(epoch)
                print(evaluate(self.forward, self.model, self.batches("test"), self.context), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 trained, 2 bad input."""
    args = parser().parse_args(arguments)
    try:
        check(args)
        Training(args).run()
    except (TrainError, data.DataError) as error:
        print(f"scripts/train: {error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError:
        print(f"scripts/train: the GPU's memory does not hold a batch of {args.batch_size}: lower it", file=sys.stderr)
        return 2
    return 0
