"""Folders of photographs."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lab.core.data.folder import ImageFolder


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
    assert train.pixels.shape == (6, 16, 16, 3)
    labels = train.labels["class"].tolist()
    for image, label in zip(train.pixels, labels, strict=True):
        assert (image.float().std(dim=(0, 1)) < 1).all()
        color = image.float().mean(dim=(0, 1))
        near = min(range(6), key=lambda i: (color - torch.tensor(expected[i])).abs().sum().item())
        assert (color - torch.tensor(expected[near])).abs().max() <= 2
        assert label == near // 3
    assert sorted(labels) == [0, 0, 0, 1, 1, 1]
    assert train.classes == test.classes == {"class": ("cat", "dog")}
    assert sorted(test.labels["class"].tolist()) == [0, 1]


def test_a_changed_photograph_is_seen_and_a_bad_one_named(photographs, tmp_path):
    settings = ImageFolder(root=str(photographs), image_size=16)
    settings.build("train", tmp_path / "data")
    (photographs / "train/cat/0.png").write_bytes(b"no image any more")
    with pytest.raises(ValueError, match=r"cat/0\.png: cannot be decoded: no image that PIL knows"):
        settings.build("train", tmp_path / "data")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.root = 'nowhere': no folder 'train' \(data\.train_folder\) there$"):
        ImageFolder(root="nowhere").build("train", tmp_path)


def test_a_root_without_the_splits_says_what_it_has(photographs, tmp_path):
    with pytest.raises(ValueError, match=r"no folder 'test' \(data\.test_folder\) there; it has \['train', 'val'\]"):
        ImageFolder(root=str(photographs), test_folder="test").prepare(tmp_path / "data")


def test_splits_with_other_classes_are_refused(photographs, tmp_path):
    (photographs / "val/cat/0.png").unlink()
    (photographs / "val/cat").rmdir()
    with pytest.raises(ValueError, match=r"val and train differ in classes: \['cat'\]"):
        ImageFolder(root=str(photographs)).build("test", tmp_path / "data")


def test_a_class_without_images_is_refused(photographs, tmp_path):
    (photographs / "train/eel").mkdir()
    (photographs / "train/eel/.DS_Store").touch()
    with pytest.raises(ValueError, match=r"no image in .*train/eel"):
        ImageFolder(root=str(photographs)).build("train", tmp_path / "data")


def test_another_folder_with_the_same_names_ages_and_sizes_is_another_data_set(photographs, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for path in photographs.rglob("*.*"):
        copy = elsewhere / path.relative_to(photographs)
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), "pink").save(path, format="BMP")
        Image.new("RGB", (16, 16), "lime").save(copy, format="BMP")
        for each in (path, copy):
            os.utime(each, (0, 0))
    here, there = (
        ImageFolder(root=str(root), image_size=16).build("train", tmp_path / "data")
        for root in (photographs, elsewhere)
    )
    assert there.digest != here.digest


def test_a_folder_without_folders_is_trained_on_without_labels(photographs, tmp_path):
    settings = ImageFolder(root=str(photographs / "train"), train_folder="cat", image_size=8)
    (photographs / "train/cat/.hidden").write_text("not an image")
    prepared = settings.prepare(tmp_path / "data")
    train, bank = (prepared.build(split, tmp_path / "data") for split in ("train", "bank"))
    assert (len(train), train.labels, train.classes, bank.labels) == (3, {}, {}, {})
    assert sorted(train.pixels[:, 4, 4].tolist()) == [[0, 255, 0], [0, 255, 0], [255, 0, 0]]
    part = prepared.but({"fraction": 0.6}).build("train", tmp_path / "data")
    assert part.places.tolist() == [0, 1]


def test_no_test_folder_is_needed_where_nothing_is_evaluated_on_it(photographs, tmp_path):
    (photographs / "val").rename(photographs / "away")
    settings = ImageFolder(root=str(photographs), image_size=8, evaluation_split="held_out").prepare(tmp_path / "data")
    train, test = (settings.build(split, tmp_path / "data") for split in ("train", "test"))
    assert (len(train), len(test)) == (4, 2)
    assert sorted(test.labels["class"].tolist()) == [0, 1]


def test_folders_in_folders_of_classes_are_walked_and_links_followed(photographs, tmp_path):
    (tmp_path / "deep/deeper").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "deep/deeper/one.png")
    (photographs / "train/cat/link").symlink_to(tmp_path / "deep")
    (photographs / "train/readme.txt").write_text("beside the classes")
    images = ImageFolder(root=str(photographs), image_size=8).build("train", tmp_path / "data")
    assert images.labels["class"].bincount().tolist() == [4, 3]


def test_names_may_be_anything_that_a_file_system_takes(photographs, tmp_path):
    strange = [os.fsdecode(b"train/cat/\xff\xfe.png"), "train/cat/ü 'x' \n.png"]
    for name in strange:
        (photographs / name).write_text("none")
    settings = ImageFolder(root=str(photographs), image_size=None, bad_images="skip")
    for _ in range(2):
        assert set(settings.build("train", tmp_path / "data").skipped) == set(strange)
    assert len(settings.build("train", tmp_path / "data").images(np.arange(6))) == 6


def test_folders_are_entered_once_whatever_links_lead_to_them(photographs, tmp_path):
    (photographs / "train/cat/.hidden").mkdir()
    for name, target in {"all": "..", "itself": ".", "other": "../dog", "twice": "deep"}.items():
        (photographs / "train/cat" / name).symlink_to(target)
    (photographs / "train/cat/deep").mkdir()
    Image.new("RGB", (8, 8), "red").save(photographs / "train/cat/deep/one.png")
    images = ImageFolder(root=str(photographs), image_size=8).build("train", tmp_path / "data")
    assert images.labels["class"].bincount().tolist() == [4, 3]


@pytest.mark.parametrize("target", ["nowhere", "eel"])
def test_a_link_that_leads_nowhere_may_be_a_class_and_is_named(target, photographs, tmp_path):
    for split in ("train", "val"):
        (photographs / split / "eel").symlink_to(target)
    with pytest.raises(ValueError, match=r"data\.root = .*: train has links that lead nowhere: \['eel'\]"):
        ImageFolder(root=str(photographs)).build("train", tmp_path / "data")


def test_a_folder_that_cannot_be_listed_is_named(photographs, tmp_path, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "cat":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(ValueError, match=r"data\.root = .*: cannot be listed: .*denied: '.*train/cat'"):
        ImageFolder(root=str(photographs)).build("train", tmp_path / "data")
