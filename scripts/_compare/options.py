"""The options of scripts/compare. Standard library only: they are checked before anything is installed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from networks import NAMES, name_of_network

DATA = ("digits", "fashion-mnist", "cifar10", "imagefolder:PATH", "synthetic")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
COMPILE_MODES = ("default", "max-autotune", "reduce-overhead", "off")
EPOCHS = {"digits": 6, "fashion-mnist": 3, "cifar10": 5, "imagefolder": 1, "synthetic": 1}

DESCRIPTION = """\
Trains the same ResNet eagerly, compiled (torch.compile) and fused, from the same weights on the same real images, and
ends with one table and a picture. With an NVIDIA GPU it measures speed and memory. Without one it trains the eager
model to real accuracy, runs the fused one for a few steps in Triton's interpreter, shows that the losses agree, and
prints what is projected for an H100: no speed is measured then, and none is claimed."""

EPILOG = """\
examples:
  scripts/compare                                            the default: scikit-learn's digits, a minute or three
  scripts/compare --data fashion-mnist --epochs 2            28x28 photographs of clothes
  scripts/compare --model resnet50 --data imagefolder:/data/imagenet --batch-size 256 --epochs 1
  scripts/compare --model resnet50 --data synthetic          ResNet-50 at 224x224 on a GPU, nothing to download

exit status: 0 all is well; 1 the losses disagree, or no fused kernel ran; 2 bad input; 130 stopped by Ctrl-C"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One sentence, without the page of usage."""
        self.exit(2, f"{self.prog}: {message} (--help lists every option)\n")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _model(text: str) -> str:
    try:
        return name_of_network(text)
    except ValueError:
        known = ", ".join(NAMES)
        raise argparse.ArgumentTypeError(
            f"there is no model {text!r}; there are {known}, cifar_resnet20, plain18"
        ) from None


def _data(text: str) -> str:
    kind, _, path = text.partition(":")
    if kind == "imagefolder":
        if not path:
            raise argparse.ArgumentTypeError("imagefolder needs a path: imagefolder:/path/to/images")
        if not Path(path).expanduser().is_dir():
            raise argparse.ArgumentTypeError(f"{path!r} is not a directory")
    elif text not in DATA:
        raise argparse.ArgumentTypeError(f"unknown data set {text!r}; there are {', '.join(DATA)}")
    return text


def _device(text: str) -> str:
    kind, _, index = text.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdigit())):
        raise argparse.ArgumentTypeError(f"unknown device {text!r}; there are auto, cpu, cuda and cuda:N")
    return text


def parser() -> argparse.ArgumentParser:
    p = _Parser(
        prog="scripts/compare",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = p.add_argument_group("what is trained")
    what.add_argument(
        "--model",
        default="small",
        type=_model,
        metavar="NAME",
        help="small (default; four bottleneck blocks), "
        + ", ".join(NAMES[1:])
        + ", cifar_resnet20, cifar_plain20, plain18, ... by depth",
    )
    what.add_argument(
        "--data", default="digits", type=_data, metavar="SET", help=" | ".join(DATA) + " (default digits)"
    )
    what.add_argument(
        "--data-root",
        type=Path,
        default=Path("~/.cache/fused_resnet/data"),
        metavar="DIR",
        help="where image sets are looked for and downloaded to (default %(default)s)",
    )
    what.add_argument(
        "--image-size",
        type=_positive,
        metavar="N",
        help="pixels a side, for imagefolder and synthetic (default 224 with a GPU, 32 without)",
    )
    what.add_argument(
        "--limit",
        type=_positive,
        metavar="N",
        help="use only the first N training images (default: all with a GPU, 10000 without)",
    )
    how = p.add_argument_group("how")
    how.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="images a step (default 64)")
    how.add_argument(
        "--precision",
        default="auto",
        choices=PRECISIONS,
        help="autocast dtype over float32 weights (default bfloat16 with a GPU, float32 without)",
    )
    how.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help="steps whose losses are compared one by one (default 10 with a GPU, 6 in the interpreter)",
    )
    how.add_argument(
        "--epochs",
        type=_positive,
        metavar="N",
        help="training until the accuracy is taken (default "
        + ", ".join(f"{epochs} on {name}" for name, epochs in EPOCHS.items())
        + ")",
    )
    how.add_argument("--lr", type=_positive_float, default=0.15, help="peak learning rate of SGD (default %(default)s)")
    how.add_argument("--seed", type=_seed, default=0, help="of weights, order of the images and splits (default 0)")
    how.add_argument("--device", default="auto", type=_device, help="auto (default), cpu, cuda or cuda:N")
    how.add_argument(
        "--compile-mode",
        default="default",
        choices=COMPILE_MODES,
        help="torch.compile's mode, or off (default default)",
    )
    how.add_argument(
        "--timed-steps",
        type=_positive,
        default=40,
        metavar="N",
        help="steps timed per candidate, on a GPU (default 40, at least 20)",
    )
    how.add_argument("--workers", type=int, default=4, metavar="N", help="loader processes for imagefolder (default 4)")
    how.add_argument(
        "--out",
        type=Path,
        default=Path("out/compare"),
        metavar="DIR",
        help="picture, table and record (default %(default)s)",
    )
    return p


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Checked options; bad ones end the program with one sentence and status 2."""
    p = parser()
    options = p.parse_args(arguments)
    kind = options.data.partition(":")[0]
    if options.image_size and kind not in ("imagefolder", "synthetic"):
        p.error(f"--image-size is for imagefolder and synthetic; {kind} comes in its own size")
    if options.batch_size < 2:
        p.error("--batch-size must be at least 2: batch statistics of a single value do not exist")
    if options.timed_steps < 20:
        p.error("--timed-steps must be at least 20: a median of fewer says little")
    if options.workers < 0:
        p.error("--workers cannot be negative")
    if options.device == "cpu" and options.precision in ("bfloat16", "float16"):
        p.error(f"--precision {options.precision} needs a GPU: without one the kernels run interpreted, in float32")
    options.epochs = options.epochs or EPOCHS[kind]
    options.data_root = options.data_root.expanduser()
    return options


if __name__ == "__main__":
    parse(sys.argv[1:])
