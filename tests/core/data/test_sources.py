"""Data sets: what they hold, and that they are drawn once and found again."""

import hashlib
import multiprocessing
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from sklearn.datasets import load_digits

from dino_lab.core.data.shapes import FACTORS, draw
from dino_lab.core.data.sources import DataSettings, Digits, ImageFolder, Shapes, _kept
from dino_lab.core.settings import KnobError

SMALL = Shapes(image_size=16, train_images=12, test_images=9)


def only_folder(cache_dir: Path) -> Path:
    (folder,) = cache_dir.iterdir()
    return folder


@pytest.mark.parametrize("settings", [SMALL, Digits(image_size=8)], ids=["shapes", "digits"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_set_keeps_the_contract(settings, split, tmp_path):
    images = settings.build(split, tmp_path)
    number, size = len(images.images), settings.image_size
    assert (images.name, images.split) == (settings.kind, split)
    assert images.images.shape == (number, size, size, 3)
    assert images.images.dtype == torch.uint8
    assert images.labels.keys() == images.classes.keys()
    assert "class" in images.labels
    for factor, labels in images.labels.items():
        assert labels.dtype == torch.int64
        assert labels.shape == (number,)
        assert labels.min() >= 0
        assert labels.max() < len(images.classes[factor])
    if images.masks is not None:
        assert images.masks.shape == (number, size, size)
        assert set(images.masks.unique().tolist()) == {0, 1}


def test_shapes_are_what_the_drawing_says(tmp_path):
    images = SMALL.build("test", tmp_path)
    drawn = draw(SMALL, "test", 9)
    assert np.array_equal(images.images.numpy(), drawn.images)
    assert np.array_equal(images.masks.numpy(), drawn.masks)
    for factor in FACTORS:
        assert np.array_equal(images.labels[factor].numpy(), drawn.labels[factor])


@pytest.mark.parametrize("factor", FACTORS)
def test_class_factor_chooses_the_class_and_draws_nothing_again(factor, tmp_path):
    SMALL.build("train", tmp_path)
    images = SMALL.but({"class_factor": factor}).build("train", tmp_path)
    assert torch.equal(images.labels["class"], images.labels[factor])
    assert images.classes["class"] == images.classes[factor]
    only_folder(tmp_path)


def test_digits_are_scikit_learns(tmp_path):
    digits = load_digits()
    train, test = (Digits(image_size=8).build(split, tmp_path) for split in ("train", "test"))
    assert (len(train.images), len(test.images)) == (1437, 360)
    images = torch.cat([train.images, test.images])
    for channel in range(3):
        assert np.array_equal(images[..., channel].numpy(), np.rint(digits.images * (255 / 16)))
    for name in ("class", "digit"):
        assert np.array_equal(torch.cat([train.labels[name], test.labels[name]]).numpy(), digits.target)


def test_enlarged_digits_average_back_to_the_small_ones(tmp_path):
    small, large = (Digits(image_size=size).build("test", tmp_path).images[..., 0].float() for size in (8, 32))
    averaged = torch.nn.functional.avg_pool2d(large[:, None], 4)[:, 0]
    # Enlarging keeps the mean of the inside of an image; its edges are repeated.
    assert torch.allclose(averaged.mean(dim=(1, 2)), small.mean(dim=(1, 2)), atol=3)
    assert np.corrcoef(averaged.flatten(), small.flatten())[0, 1] > 0.95


@pytest.mark.parametrize("settings", [SMALL, Digits(image_size=8)], ids=["shapes", "digits"])
def test_digest_is_the_hash_of_images_and_labels(settings, tmp_path):
    images = settings.build("test", tmp_path)
    factors = [factor for factor in images.labels if factor != "class"]
    bytes_ = images.images.numpy().tobytes() + b"".join(images.labels[factor].numpy().tobytes() for factor in factors)
    assert images.digest == hashlib.sha256(bytes_).hexdigest()


def test_a_drawing_is_found_again_and_not_drawn_again(tmp_path):
    first = SMALL.build("train", tmp_path)
    files = sorted(only_folder(tmp_path).iterdir())
    before = [(file.stat().st_mtime_ns, file.stat().st_ino) for file in files]
    second = SMALL.build("train", tmp_path)
    assert [(file.stat().st_mtime_ns, file.stat().st_ino) for file in files] == before
    assert torch.equal(first.images, second.images)
    assert first.digest == second.digest


def test_other_settings_and_splits_lie_in_other_folders(tmp_path):
    digests = {
        SMALL.build("train", tmp_path).digest,
        SMALL.build("test", tmp_path).digest,
        SMALL.but({"noise": 0.1}).build("test", tmp_path).digest,
        SMALL.but({"train_images": 13}).build("train", tmp_path).digest,
    }
    assert len(digests) == len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("file", ["images.npy", "labels.npy", "masks.npy", "about.json"])
@pytest.mark.parametrize("kept_bytes", [0, 40, -1], ids=["empty", "header cut", "last byte missing"])
def test_a_file_cut_short_is_noticed_and_drawn_again(file, kept_bytes, tmp_path):
    whole = SMALL.build("train", tmp_path).images.clone()
    path = only_folder(tmp_path) / file
    os.truncate(path, kept_bytes % path.stat().st_size if kept_bytes else 0)
    assert torch.equal(SMALL.build("train", tmp_path).images, whole)
    assert path.stat().st_size > 0
    only_folder(tmp_path)  # the broken one is gone


def test_a_missing_file_is_drawn_again(tmp_path):
    SMALL.build("train", tmp_path)
    (only_folder(tmp_path) / "labels.npy").unlink()
    assert len(SMALL.build("train", tmp_path).labels["class"]) == 12


def test_writing_to_the_images_leaves_the_cache_as_it_was(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of arrays that are not writable
        images = SMALL.build("train", tmp_path).images
    before = images.clone()
    images.zero_()
    assert torch.equal(SMALL.build("train", tmp_path).images, before)


def test_processes_that_draw_at_once_leave_one_whole_drawing(tmp_path):
    settings = Shapes(image_size=16, train_images=300)
    # Forked, so that neither has to import torch first and both draw at the same moment.
    processes = multiprocessing.get_context("fork")
    start, digests = processes.Barrier(2), processes.SimpleQueue()

    def build() -> None:
        start.wait()
        digests.put(settings.build("train", tmp_path).digest)

    both = [processes.Process(target=build) for _ in range(2)]
    for process in both:
        process.start()
    found = {digests.get() for _ in both}
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert found == {settings.build("train", tmp_path).digest}
    only_folder(tmp_path)


def test_the_first_to_finish_wins_and_the_other_uses_what_it_left(tmp_path):
    def quick(folder: Path) -> dict[str, np.ndarray]:
        return {"images": np.ones(3, np.uint8)}

    def overtaken(folder: Path) -> dict[str, np.ndarray]:
        _kept(tmp_path, {"kind": "race"}, quick)
        return {"images": np.zeros(3, np.uint8)}

    kept, _ = _kept(tmp_path, {"kind": "race"}, overtaken)
    assert kept["images"].tolist() == [1, 1, 1]
    only_folder(tmp_path)


def test_kind_chooses_the_data_set():
    settings = TypeAdapter(DataSettings)
    assert settings.validate_python({"kind": "digits"}) == Digits()
    assert settings.validate_json(Shapes(noise=0.1).model_dump_json()) == Shapes(noise=0.1)


def test_digits_refuse_a_size_below_their_own():
    with pytest.raises(KnobError, match="image_size"):
        Digits().but({"image_size": 7})


# ------------------------------------------------------------------------------------------------ folders of images


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two classes; one colour an image, in every mode and shape that photographs come in."""
    root = tmp_path / "photographs"
    colors = {"train/cat": ["red", "lime"], "train/dog": ["blue"], "val/cat": ["white"], "val/dog": ["black"]}
    for folder, names in colors.items():
        (root / folder).mkdir(parents=True)
        for i, name in enumerate(names):
            Image.new("RGB", (30 + 10 * i, 20), name).save(root / folder / f"{i}.png")
    Image.open(root / "train/cat/1.png").convert("P").save(root / "train/cat/2.png")
    Image.new("L", (16, 16), 128).save(root / "train/dog/1.jpg")
    Image.new("CMYK", (16, 40), (0, 0, 0, 0)).save(root / "train/dog/2.jpg")
    return root


def test_photographs_of_every_mode_become_squares_with_their_folder_as_class(photographs, tmp_path):
    settings = ImageFolder(root=str(photographs), image_size=16)
    train, test = (settings.build(split, tmp_path / "data") for split in ("train", "test"))
    expected = [(255, 0, 0), (0, 255, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (255, 255, 255)]
    assert train.images.shape == (6, 16, 16, 3)
    labels = train.labels["class"].tolist()
    for image, label in zip(train.images, labels, strict=True):
        assert (image.float().std(dim=(0, 1)) < 1).all()
        color = image.float().mean(dim=(0, 1))
        near = min(range(6), key=lambda i: (color - torch.tensor(expected[i])).abs().sum().item())
        assert (color - torch.tensor(expected[near])).abs().max() <= 2
        assert label == near // 3
    assert sorted(labels) == [0, 0, 0, 1, 1, 1]
    # Mixed, so that the first ones, the bank of k-NN, are of all classes.
    assert labels != sorted(labels)
    assert train.classes == test.classes == {"class": ("cat", "dog")}
    assert sorted(test.labels["class"].tolist()) == [0, 1]


def test_the_shorter_side_is_resized_and_the_middle_kept(tmp_path):
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = 200
    (tmp_path / "photographs/train/only").mkdir(parents=True)
    Image.fromarray(wide).save(tmp_path / "photographs/train/only/wide.png")
    settings = ImageFolder(root=str(tmp_path / "photographs"), image_size=10)
    image = settings.build("train", tmp_path / "data").images[0].int()
    assert (image[:, 1:-1] - 200).abs().max() <= 20  # bicubic rings at an edge


def test_photographs_are_decoded_once_and_found_by_their_names(photographs, tmp_path):
    settings = ImageFolder(root=str(photographs), image_size=16)
    first = settings.build("train", tmp_path / "data")
    (photographs / "train/cat/0.png").write_bytes(b"no image any more")
    assert settings.build("train", tmp_path / "data").digest == first.digest
    (photographs / "train/cat/0.png").rename(photographs / "train/cat/other.png")
    with pytest.raises(ValueError, match=r"cat/other\.png: cannot be decoded"):
        settings.build("train", tmp_path / "data")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.root = 'nowhere'"):
        ImageFolder(root="nowhere").build("train", tmp_path)


def test_splits_with_other_classes_are_refused(photographs, tmp_path):
    (photographs / "val/cat/0.png").unlink()
    (photographs / "val/cat").rmdir()
    with pytest.raises(ValueError, match=r"val and train differ in classes: \['cat'\]"):
        ImageFolder(root=str(photographs)).build("test", tmp_path / "data")


def test_another_folder_with_the_same_names_is_another_data_set(photographs, tmp_path):
    here = ImageFolder(root=str(photographs), image_size=16).build("train", tmp_path / "data")
    elsewhere = tmp_path / "elsewhere"
    for path in photographs.rglob("*.*"):
        copy = elsewhere / path.relative_to(photographs)
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), "pink").save(copy)
    there = ImageFolder(root=str(elsewhere), image_size=16).build("train", tmp_path / "data")
    assert there.digest != here.digest
