"""Image sets: what a batch is, that splits are disjoint and orders repeatable, and one sentence for what is missing."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import data
import pytest
import torch

pytestmark = pytest.mark.quick


def one_sentence(error: pytest.ExceptionInfo[data.DataError]) -> str:
    message = str(error.value)
    assert "\n" not in message and 20 < len(message) < 400
    return message


def write_idx(path: Path, values: torch.Tensor) -> None:
    content = struct.pack(f">I{values.dim()}I", 0x0800 + values.dim(), *values.shape) + bytes(values.flatten().tolist())
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(folder: Path, suffix: str = ".gz") -> None:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    for name, count in (("train", 40), ("t10k", 12)):
        pixels = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", pixels)
        write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", torch.arange(count, dtype=torch.uint8) % 10)


@pytest.fixture
def no_network(monkeypatch):
    """Downloads fail, as they do without a network."""
    torchvision = pytest.importorskip("torchvision")

    def refuse(*args, **kwargs):
        raise OSError("Name or service not known\nand more")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", refuse)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", refuse)
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", Path("/nonexistent"))


def test_digits_batches(tmp_path):
    digits = data.load("digits", root=tmp_path)
    assert (digits.count("train"), digits.count("test"), digits.size) == (1438, 359, (8, 8))
    batches = list(digits.batches("train", 64, seed=0, drop_last=True))
    assert len(batches) == 22
    images, labels = batches[0]
    assert images.shape == (64, 3, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.is_contiguous(memory_format=torch.channels_last)
    everything = torch.cat([images for images, _ in digits.batches("train", 1000)])
    assert len(everything) == 1438
    assert everything.mean().abs() < 1e-3 and (everything.std() - 1).abs() < 1e-3


def test_order_is_of_seed_and_epoch_alone(tmp_path):
    digits = data.load("digits", root=tmp_path)

    def labels(**keywords):
        return torch.cat([labels for _, labels in digits.batches("train", 64, **keywords)])

    assert labels(seed=3, epoch=1).equal(labels(seed=3, epoch=1))
    assert not labels(seed=3, epoch=1).equal(labels(seed=3, epoch=2))
    assert not labels(seed=3).equal(labels(seed=4))
    assert labels(seed=3).sort().values.equal(labels().sort().values)


def test_held_out_digits_are_not_trained_on(tmp_path):
    digits = data.load("digits", root=tmp_path, seed=5)
    seen = {bytes(image.flatten().tolist()) for image in digits.train.tensors[0]}
    held_out = [bytes(image.flatten().tolist()) for image in digits.test.tensors[0]]
    assert sum(image in seen for image in held_out) <= 1  # one digit is in the set twice


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_fashion_mnist_from_disk(tmp_path, no_network, suffix):
    write_fashion(tmp_path / "fashion-mnist", suffix)
    images = data.load("fashion-mnist", root=tmp_path, limit=32)
    assert (images.count("train"), images.count("test"), images.size, images.num_classes) == (32, 12, (28, 28), 10)
    assert next(images.batches("train", 8, seed=0))[0].shape == (8, 3, 28, 28)


def test_fashion_mnist_where_debian_puts_it(tmp_path, no_network, monkeypatch):
    write_fashion(tmp_path / "debian")
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    assert data.load("fashion-mnist", root=tmp_path / "nothing").count("train") == 40


def test_fashion_mnist_missing(tmp_path, no_network):
    with pytest.raises(data.DataError) as error:
        data.load("fashion-mnist", root=tmp_path)
    assert "dataset-fashion-mnist" in one_sentence(error)


@pytest.mark.parametrize("damage", ["truncated", "not packed", "other magic"])
def test_fashion_mnist_damaged(tmp_path, no_network, damage):
    folder = tmp_path / "fashion-mnist"
    write_fashion(folder)
    victim = folder / "train-images-idx3-ubyte.gz"
    whole = victim.read_bytes()
    victim.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "not packed": b"not packed",
            "other magic": gzip.compress(b"\1\2\3\4" * 9),
        }[damage]
    )
    with pytest.raises(data.DataError) as error:
        data.load("fashion-mnist", root=tmp_path)
    assert victim.name in one_sentence(error)


def test_cifar10_missing(tmp_path, no_network):
    with pytest.raises(data.DataError) as error:
        data.load("cifar10", root=tmp_path)
    assert "cifar-10-python.tar.gz" in one_sentence(error)


def write_images(folder: Path, classes: int, count: int) -> None:
    image = pytest.importorskip("PIL.Image")
    for c in range(classes):
        (folder / f"class{c}").mkdir(parents=True)
        for i in range(count):
            image.new("RGB", (20 + i, 30), (40 * c, 10 * i, 90)).save(folder / f"class{c}" / f"{i}.png")


def test_image_folder_with_halves(tmp_path):
    write_images(tmp_path / "train", 2, 5)
    write_images(tmp_path / "val", 2, 2)
    images = data.load(f"imagefolder:{tmp_path}", root=tmp_path, image_size=16, limit=6)
    assert (images.count("train"), images.count("test"), images.num_classes) == (6, 4, 2)
    batch, labels = next(images.batches("train", 4, seed=0))
    assert batch.shape == (4, 3, 16, 16) and labels.shape == (4,)


@pytest.mark.parametrize("augment", [False, True])
def test_image_folder_without_halves(tmp_path, augment):
    write_images(tmp_path, 3, 5)
    images = data.load(f"imagefolder:{tmp_path}", root=tmp_path, image_size=16, augment=augment)
    assert (images.count("train"), images.count("test"), images.num_classes) == (12, 3, 3)
    assert sorted([*images.train.indices, *images.test.indices]) == list(range(15))


def test_image_folder_empty_or_unequal(tmp_path):
    with pytest.raises(data.DataError) as error:
        data.load(f"imagefolder:{tmp_path}", root=tmp_path)
    assert "one folder of images per class" in one_sentence(error)
    write_images(tmp_path / "train", 2, 1)
    write_images(tmp_path / "val", 3, 1)
    with pytest.raises(data.DataError) as error:
        data.load(f"imagefolder:{tmp_path}", root=tmp_path)
    assert "the same classes" in one_sentence(error)


def test_synthetic_and_unknown(tmp_path):
    images = data.load("synthetic", root=tmp_path, image_size=16)
    assert next(images.batches("test", 4))[0].shape == (4, 3, 16, 16)
    with pytest.raises(data.DataError, match="unknown data set"):
        data.load("mnist", root=tmp_path)


def test_augmentation_moves_and_mirrors():
    images = torch.arange(64 * 16 * 16, dtype=torch.float32).reshape(64, 1, 16, 16)
    moved = data._shift_and_mirror(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and not moved.equal(images)
    assert moved.equal(data._shift_and_mirror(images, torch.Generator().manual_seed(0)))
    # Every value that is left is the same image's own; what came in from outside is zero.
    for before, after in zip(images, moved):
        assert set(after.flatten().tolist()) - {0.0} <= set(before.flatten().tolist())
    rising = moved[:, 0, 8, 5] < moved[:, 0, 8, 6]
    assert 10 < rising.sum() < 54
