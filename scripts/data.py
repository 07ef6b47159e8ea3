"""The image sets that scripts/compare and scripts/train learn from, each as batches of normalised images.

``digits`` (real 8x8 scans, inside scikit-learn's wheel) needs nothing but the wheel; ``fashion-mnist`` and ``cifar10``
are looked for on disk, then downloaded; ``imagefolder:PATH`` reads a tree of images; ``synthetic`` needs no file.
"""

from __future__ import annotations

import gzip
import socket
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Batch = tuple[torch.Tensor, torch.Tensor]


class DataError(Exception):
    """An image set cannot be had; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class ImageSet:
    """Training and held-out images with labels.

    In memory, images are uint8 ``[N, 1 or 3, H, W]`` and ``mean`` and ``std`` (per channel, of values from 0 to 1)
    normalise a batch as it is taken; from files they come normalised out of the loader, and ``mean`` is empty.
    """

    name: str
    train: Dataset
    test: Dataset
    num_classes: int
    size: tuple[int, int]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augment: bool = False  # training images in memory are shifted, and mirrored

    def count(self, split: str) -> int:
        return len(getattr(self, split))

    def to(self, device: torch.device) -> ImageSet:
        """The same set with its pixels on ``device``, where they are held in memory."""

        def move(split: Dataset) -> Dataset:
            return TensorDataset(*(t.to(device) for t in split.tensors)) if isinstance(split, TensorDataset) else split

        return replace(self, train=move(self.train), test=move(self.test))

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        epoch: int = 0,
        drop_last: bool = False,
        workers: int = 0,
    ) -> Iterator[Batch]:
        """Yields (images float32 ``[B, 3, H, W]`` channels_last, labels int64 ``[B]``) on ``device``.

        With ``seed`` in an order that (seed, epoch) alone decides; without, in the set's own order.
        """
        data = getattr(self, split)
        device = torch.device(device)
        order, chance = torch.arange(len(data)), torch.Generator()
        if seed is not None:
            order = torch.randperm(len(data), generator=chance.manual_seed(seed + epoch))
        if isinstance(data, TensorDataset):
            pixels, labels = data.tensors
            for index in order.to(pixels.device).split(batch_size):
                if drop_last and len(index) < batch_size:
                    return
                images = pixels[index].to(device, torch.float32) / 255
                shape = (1, len(self.mean), 1, 1)
                images = (images - images.new_tensor(self.mean).view(shape)) / images.new_tensor(self.std).view(shape)
                if self.augment and split == "train":
                    images = _shift_and_mirror(images, chance)
                images = images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
                yield images, labels[index].to(device)
        else:
            loader = DataLoader(
                Subset(data, order.tolist()),
                batch_size,
                drop_last=drop_last,
                num_workers=workers,
                pin_memory=device.type == "cuda",
            )
            for images, labels in loader:
                images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
                yield images, labels.to(device, non_blocking=True)


def _shift_and_mirror(images: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """Each image moved by up to an eighth of its size and, every other time, mirrored (He et al. 2015, section 4.2)."""
    n, channels, height, width = images.shape
    reach = (height // 8, width // 8)
    images = torch.nn.functional.pad(images, (reach[1], reach[1], reach[0], reach[0]))
    rows, columns = (
        torch.arange(extent) + torch.randint(2 * far + 1, (n, 1), generator=chance)
        for extent, far in zip((height, width), reach)
    )
    mirrored = torch.rand(n, 1, generator=chance) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns).to(images.device)[:, None, None, :]
    rows = rows.to(images.device)[:, None, :, None]
    pick = torch.arange(n, device=images.device)[:, None, None, None]
    return images[pick, torch.arange(channels, device=images.device)[None, :, None, None], rows, columns]


def load(
    spec: str,
    *,
    root: Path,
    seed: int = 0,
    image_size: int | None = None,
    limit: int | None = None,
    augment: bool = False,
) -> ImageSet:
    """The image set that ``spec`` names; raises :class:`DataError` with what to do where there is none.

    ``image_size`` is for ``imagefolder`` and ``synthetic``; ``limit`` keeps the first so many training images;
    ``augment`` varies the training images at random, except digits, which would become others.
    """
    kind, _, path = spec.partition(":")
    if kind == "digits":
        images = _digits(seed)
    elif kind == "fashion-mnist":
        images = _fashion_mnist(root)
    elif kind == "cifar10":
        images = _cifar10(root)
    elif kind == "imagefolder" and path:
        images = _image_folder(Path(path).expanduser(), image_size or 224, seed, augment)
    elif kind == "synthetic":
        images = _synthetic(image_size or 224, seed)
    else:
        raise DataError(f"unknown data set {spec!r}: digits, fashion-mnist, cifar10, imagefolder:PATH or synthetic")
    if kind in ("fashion-mnist", "cifar10"):
        images = replace(images, augment=augment)
    if limit is not None and limit < images.count("train"):
        train = images.train
        if isinstance(train, TensorDataset):
            train = TensorDataset(*(t[:limit] for t in train.tensors))
        else:
            # A folder lists its images class by class: the first so many of a shuffle hold every class.
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
            train = Subset(train, order[:limit].tolist())
        images = replace(images, train=train)
    return images


def _in_memory(name: str, train: Batch, test: Batch, num_classes: int) -> ImageSet:
    """Normalised by the training images' own mean and deviation, per channel."""
    values = train[0].to(torch.float64) / 255
    mean, std = values.mean((0, 2, 3)), values.std((0, 2, 3))
    height, width = train[0].shape[2:]
    return ImageSet(
        name,
        TensorDataset(*train),
        TensorDataset(*test),
        num_classes,
        (height, width),
        tuple(mean.tolist()),
        tuple(std.tolist()),
    )


def _digits(seed: int) -> ImageSet:
    """1797 scans of handwritten digits, 8x8 pixels; a fifth of them, the same for a seed, is held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = (torch.from_numpy(bunch.images) * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    held_out = len(pixels) // 5
    test, train = order[:held_out], order[held_out:]
    return _in_memory("digits", (pixels[train], labels[train]), (pixels[test], labels[test]), 10)


def _idx(path: Path) -> torch.Tensor:
    """An idx file (Yann LeCun's format: magic, sizes, bytes), packed or not, as a uint8 tensor."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        (magic,) = struct.unpack_from(">I", content)
        rank = magic & 0xFF
        if magic >> 8 != 0x08 or not 1 <= rank <= 4:
            raise ValueError(f"its first four bytes are {magic:#010x}")
        shape = struct.unpack_from(f">{rank}I", content, 4)
        return torch.frombuffer(bytearray(content[4 + 4 * rank :]), dtype=torch.uint8).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError, RuntimeError) as error:
        raise DataError(f"{path} is no whole idx file ({error}): delete it and fetch it anew") from error


def _fashion_mnist(root: Path) -> ImageSet:
    """60000 and 10000 photographs of clothes, 28x28 grey pixels (Xiao, Rasul and Vollgraf 2017)."""
    places = (root / "fashion-mnist", root / "FashionMNIST" / "raw", root, DEBIAN_FASHION_MNIST)

    def find() -> list[Path] | None:
        for place in places:
            files = [next((f for f in (place / n, place / n[:-3]) if f.is_file()), None) for n in FASHION_MNIST_FILES]
            if all(files):
                return [f for f in files if f]
        return None

    files = find()
    if files is None:
        cure = (
            f"on Debian and Ubuntu `apt install dataset-fashion-mnist` brings the full set, elsewhere put its four "
            f"*-ubyte.gz files into {places[0]}"
        )
        _download("Fashion-MNIST", "FashionMNIST", root, cure)
        files = find()
        if files is None:
            raise DataError(f"Fashion-MNIST was downloaded to {root}, but its files are not there: {cure}")
    parts = [_idx(file) for file in files]
    for pixels, labels in (parts[:2], parts[2:]):
        if pixels.dim() != 3 or labels.dim() != 1 or len(pixels) != len(labels):
            raise DataError(f"the files in {files[0].parent} are not Fashion-MNIST's: delete them and fetch them anew")
    train, test = ((pixels[:, None], labels.long()) for pixels, labels in (parts[:2], parts[2:]))
    return _in_memory("fashion-mnist", train, test, 10)


def _cifar10(root: Path) -> ImageSet:
    """50000 and 10000 photographs of ten kinds of things, 32x32 pixels in colour (Krizhevsky 2009)."""
    cure = f"put cifar-10-python.tar.gz (170 MB, from its author's page at the University of Toronto) into {root}"
    halves = _download("CIFAR-10", "CIFAR10", root, cure)
    train, test = (
        (torch.from_numpy(half.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(half.targets)) for half in halves
    )
    return _in_memory("cifar10", train, test, 10)


def _download(title: str, torchvision_name: str, root: Path, cure: str) -> list[Dataset]:
    """torchvision's two halves of a set, downloaded where they are not on disk yet."""
    import torchvision

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # a network that swallows packets would otherwise hold us up for minutes
    try:
        root.mkdir(parents=True, exist_ok=True)
        make = getattr(torchvision.datasets, torchvision_name)
        return [make(str(root), train=train, download=True) for train in (True, False)]
    except Exception as error:  # torchvision raises whatever the network, the archive or the disk raised
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
        raise DataError(f"{title} is not on disk and could not be downloaded ({reason}): {cure}") from error
    finally:
        socket.setdefaulttimeout(timeout)


def _image_folder(path: Path, size: int, seed: int, augment: bool) -> ImageSet:
    """``PATH/train/<class>/*`` and ``PATH/val/<class>/*``, or ``PATH/<class>/*``, of which a fifth is held out."""
    import torchvision
    from torchvision.transforms import v2

    def transform(*crop: v2.Transform) -> v2.Compose:
        pixels = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        return v2.Compose([*crop, *pixels])

    fixed = transform(v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size))
    varied = transform(v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()) if augment else fixed

    def folder(place: Path, crop: v2.Compose) -> torchvision.datasets.ImageFolder:
        try:
            return torchvision.datasets.ImageFolder(str(place), crop)
        except (FileNotFoundError, OSError) as error:
            cure = "one folder of images per class is needed, in it or in its train/ and val/"
            raise DataError(f"{place} holds no images that can be read: {cure}") from error

    halves = [path / "train", next((path / n for n in ("val", "test", "valid") if (path / n).is_dir()), path / "val")]
    if halves[0].is_dir() and halves[1].is_dir():
        train, test = (folder(half, crop) for half, crop in zip(halves, (varied, fixed)))
        if train.classes != test.classes:
            raise DataError(
                f"{halves[0]} and {halves[1]} do not hold the same classes: make their folders' names equal"
            )
        classes = len(train.classes)
    else:
        place = halves[0] if halves[0].is_dir() else path
        whole = folder(place, fixed)
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = max(1, len(whole) // 5)
        train, test = Subset(folder(place, varied), order[held_out:]), Subset(whole, order[:held_out])
        classes = len(whole.classes)
    return ImageSet(path.name, train, test, classes, (size, size))


def _synthetic(size: int, seed: int) -> ImageSet:
    """Noise with a faint pattern per class: for timing without any file; it can be learnt, and proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    classes, train, test = 10, 1280, 320
    labels = torch.randint(classes, (train + test,), generator=generator)
    patterns = torch.randint(0, 96, (classes, 3, size, size), generator=generator, dtype=torch.uint8)
    pixels = torch.randint(0, 160, (train + test, 3, size, size), generator=generator, dtype=torch.uint8)
    pixels += patterns[labels]
    return _in_memory("synthetic", (pixels[:train], labels[:train]), (pixels[train:], labels[train:]), classes)
