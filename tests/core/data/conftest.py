"""Small data sets of every kind, in the files that they really come in.

In each, the green channel of an image is 20 times its label, and its red one tells it from the others.
"""

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import webdataset
from PIL import Image

from dino_lab.core.data.downloads import CIFAR10, CIFAR100, STL10, FashionMNIST
from dino_lab.core.data.embedded import Digits, Shapes
from dino_lab.core.data.folder import ImageFolder
from dino_lab.core.data.hub import HuggingFace
from dino_lab.core.data.shards import WebDataset
from dino_lab.core.data.source import Source

NAMES = ("cat", "dog", "owl")
TRAIN, TEST = 36, 9
"""Images of each split; 12 and 3 of each class."""


def picture(i: int, label: int, size: int = 16) -> np.ndarray:
    image = np.empty((size, size, 3), np.uint8)
    image[:] = (i, 20 * label, 7)
    return image


def png(i: int, label: int, size: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(i, label, size)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_folder(root: Path, names: tuple[str, ...] = NAMES) -> ImageFolder:
    for split, number in (("train", TRAIN), ("val", TEST)):
        for i in range(number):
            folder = root / split / names[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:02}.png").write_bytes(png(i, i % 3))
    return ImageFolder(root=str(root), image_size=16)


def write_shards(folder: Path) -> WebDataset:
    folder.mkdir()
    for split, number in (("train", TRAIN), ("test", TEST)):
        with webdataset.ShardWriter(str(folder / f"{split}-%03d.tar"), maxcount=10, verbose=0) as writer:
            for i in range(number):
                writer.write({"__key__": f"{i:04}", "png": png(i, i % 3), "cls": i % 3, "json": {"i": i}})
    return WebDataset(train_shards=str(folder / "train-*.tar"), test_shards=str(folder / "test-*.tar"), image_size=16)


def table(number: int) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    rows = {"image": [{"bytes": png(i, i % 3), "path": None} for i in range(number)]}
    return datasets.Dataset.from_dict(rows | {"label": [i % 3 for i in range(number)]}, features=features)


def write_saved(folder: Path) -> HuggingFace:
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": table(TRAIN), "test": table(TEST)}).save_to_disk(str(folder))
    return HuggingFace(path=str(folder), image_size=16)


def write_parquet(folder: Path) -> HuggingFace:
    for split, number in (("train", TRAIN), ("test", TEST)):
        table(number).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return HuggingFace(path=str(folder), image_size=16)


def write_fashion_mnist(root: Path) -> FashionMNIST:
    raw = root / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for prefix, number in (("train", 60), ("t10k", 20)):
        labels = np.arange(number, dtype=np.uint8) % 10
        images = np.broadcast_to(20 * labels[:, None, None], (number, 28, 28)).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, number, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, number) + labels.tobytes())
    return FashionMNIST(root=str(root))


def _planes(number: int, size: int) -> np.ndarray:
    images = np.stack([picture(i % 256, i % 10, size) for i in range(number)])
    return images.transpose(0, 3, 1, 2)


def write_cifar10(root: Path) -> CIFAR10:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batches = {f"data_batch_{i}": 20 for i in range(1, 6)} | {"test_batch": 20}
    for name, number in batches.items():
        rows = _planes(number, 32).reshape(number, -1)
        content = {"data": rows, "labels": [i % 10 for i in range(number)]}
        (folder / name).write_bytes(pickle.dumps(content))
    names = [f"class {i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return CIFAR10(root=str(root))


def write_cifar100(root: Path) -> CIFAR100:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, number in (("train", 40), ("test", 20)):
        content = {"data": _planes(number, 32).reshape(number, -1), "fine_labels": [i % 10 for i in range(number)]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}))
    return CIFAR100(root=str(root))


def write_stl10(root: Path) -> STL10:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for name, number in (("train", 40), ("test", 20), ("unlabeled", 30)):
        # Columns before rows, as in MATLAB; labels from 1.
        (folder / f"{name}_X.bin").write_bytes(_planes(number, 96).transpose(0, 1, 3, 2).tobytes())
        if name != "unlabeled":
            (folder / f"{name}_y.bin").write_bytes((np.arange(number) % 10 + 1).astype(np.uint8).tobytes())
    (folder / "fold_indices.txt").write_text("")
    return STL10(root=str(root))


WRITERS: dict[str, Callable[[Path], Source]] = {
    "shapes": lambda folder: Shapes(image_size=16, train_images=48, test_images=9, class_factor="shape"),
    "digits": lambda folder: Digits(image_size=8),
    "fashion_mnist": write_fashion_mnist,
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "stl10": lambda folder: write_stl10(folder).but({"train_split": "train"}),
    "stl10 unlabelled": write_stl10,
    "imagefolder": write_folder,
    "imagefolder streamed": lambda folder: write_folder(folder).but({"image_size": None}),
    "saved": write_saved,
    "parquet streamed": lambda folder: write_parquet(folder).but({"image_size": None}),
    "webdataset": write_shards,
    "webdataset streamed": lambda folder: write_shards(folder).but({"image_size": None}),
}


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Source]:
    """Writes a set by name and gives its settings."""
    for module in ("cifar", "stl10", "utils"):
        # The files are not the published ones; all else is torchvision's.
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).is_file()
        )
    return lambda name: WRITERS[name](tmp_path / "files")


@pytest.fixture(params=WRITERS)
def source(request: pytest.FixtureRequest, write: Callable[[str], Source]) -> Source:
    """A set of every kind in turn."""
    return write(request.param)
