"""What every data set promises."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from sklearn.datasets import load_digits

from dino_lab.core.data.embedded import Digits, Shapes
from dino_lab.core.data.images import ImageSet
from dino_lab.core.data.shapes import draw
from dino_lab.core.data.source import Source
from dino_lab.core.data.sources import DataSettings


def pixels(images: ImageSet, chosen: np.ndarray) -> list[torch.Tensor]:
    return list(images.images(chosen))


@pytest.mark.parametrize("split", ["train", "bank", "test"])
def test_every_set_keeps_the_contract(source: Source, split: str, tmp_path):
    images = source.build(split, tmp_path / "data")
    everything = np.arange(len(images))
    assert (images.name, images.split) == (source.kind, split)
    assert len(images) > 0
    assert images.labels.keys() == images.classes.keys()
    assert "class" in images.labels or (split == "train" and source.kind == "stl10")
    for factor, labels in images.labels.items():
        assert labels.dtype == torch.int64
        assert labels.shape == (len(images),)
        assert 0 <= labels.min() <= labels.max() < len(images.classes[factor])
    for image in pixels(images, everything):
        assert image.dtype == torch.uint8
        assert image.shape[2] == 3
        if source.image_size:
            assert image.shape[:2] == (source.image_size, source.image_size)
    if images.masks is not None:
        assert set(images.masks[images.places].unique().tolist()) == {0, 1}
    assert images.skipped == {}
    assert sum(images.class_counts.values()) == (len(images) if images.labels else 0)
    assert images.facts["images"] == len(images)


def test_every_image_has_its_own_label(source: Source, tmp_path):
    for split in ("bank", "test"):
        images = source.build(split, tmp_path / "data")
        assert labels_seen(source, split, images) == images.labels["class"].tolist()


def labels_seen(source: Source, split: str, images: ImageSet) -> list[int]:
    """The class of each image by its own pixels: a shade of green in what the tests write."""
    shown = pixels(images, np.arange(len(images)))
    if isinstance(source, Shapes):
        drawn = draw(source, "test" if split == "test" else "train", len(images))
        labels = drawn.labels[source.class_factor]
        by_pixels = {image.tobytes(): label for image, label in zip(drawn.images, labels, strict=True)}
        return [int(by_pixels[image.numpy().tobytes()]) for image in shown]
    if isinstance(source, Digits):
        small = load_digits()
        enlarged = torch.nn.functional.interpolate(
            torch.from_numpy(small.images).float()[:, None] * (255 / 16), size=source.image_size, mode="bilinear"
        )
        by_pixels = {
            image.round().to(torch.uint8).numpy().tobytes(): label
            for image, label in zip(enlarged[:, 0], small.target, strict=True)
        }
        return [int(by_pixels[image[..., 0].numpy().tobytes()]) for image in shown]
    return [int(image[..., 1].unique()) // 20 for image in shown]


def test_a_set_is_found_again_with_the_same_digest(source: Source, tmp_path):
    first = source.build("train", tmp_path / "data")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").glob("*/about.json")}
    second = source.build("train", tmp_path / "data")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").glob("*/about.json")} == kept
    assert second.digest == first.digest
    chosen = np.array([2, 0])
    assert all(torch.equal(a, b) for a, b in zip(pixels(first, chosen), pixels(second, chosen), strict=True))


def test_splits_have_different_digests(source: Source, tmp_path):
    train, test = (source.build(split, tmp_path / "data").digest for split in ("train", "test"))
    assert train != test


def test_a_subset_has_the_images_and_labels_that_were_chosen(source: Source, tmp_path):
    whole = source.build("bank", tmp_path / "data")
    part = whole.subset(np.array([5, 1, 3])).subset(np.array([2, 0]))
    assert len(part) == 2
    expected = pixels(whole, np.array([3, 5]))
    assert all(torch.equal(a, b) for a, b in zip(pixels(part, np.array([0, 1])), expected, strict=True))
    assert part.labels["class"].tolist() == whole.labels["class"][[3, 5]].tolist()
    if whole.masks is not None:
        assert torch.equal(part.masks[part.places], whole.masks[[3, 5]])
    assert part.digest not in (whole.digest, whole.subset(np.array([3, 4])).digest)


def test_a_prepared_set_is_the_same_set(source: Source, tmp_path):
    told = []
    prepared = source.prepare(tmp_path / "data", progress=lambda done, total: told.append((done, total)))
    assert prepared.build("train", tmp_path / "data").digest == source.build("train", tmp_path / "data").digest
    if source.kind in ("imagefolder", "huggingface", "webdataset"):
        assert told[-1][0] == told[-1][1] == 9
        assert prepared.digest == "-".join(
            source.build(split, tmp_path / "data").digest[:16] for split in ("train", "test")
        )
        assert prepared.prepare(tmp_path / "data") == prepared
    else:
        assert prepared == source


def test_knobs_that_choose_among_images_make_nothing_again(source: Source, tmp_path):
    def made() -> dict[Path, int]:
        return {path: path.stat().st_ino for path in (tmp_path / "data").glob("*/about.json")}

    names = source.build("bank", tmp_path / "data").classes["class"]
    before = made()
    held_out = {"evaluation_split": "held_out"}
    for change in ({"fraction": 0.5}, {"classes": list(names[1::-1])}, held_out, {"fraction": 0.5, **held_out}):
        source.but(change).build("bank", tmp_path / "data")
    assert made() == before


@pytest.mark.parametrize("evaluation_split", ["test", "held_out"])
def test_each_split_is_read_once_to_prepare_a_set_and_to_build_all_splits(
    source: Source, evaluation_split, tmp_path, monkeypatch
):
    source = source.but({"evaluation_split": evaluation_split})
    built = {split: source.build(split, tmp_path / "data") for split in ("train", "bank", "test")}
    found, read = [], type(source).read

    def noted(self, split, *args, **kwargs):
        found.append(split)
        return read(self, split, *args, **kwargs)

    monkeypatch.setattr(type(source), "read", noted)
    expected = ["train", *([] if source.bank_is_train else ["bank"]), *(["test"] if evaluation_split == "test" else [])]
    source.prepare(tmp_path / "data")
    assert found == expected
    found.clear()
    everything = source.build_all(tmp_path / "data")
    assert found == expected
    assert everything.keys() == built.keys()
    for split, images in everything.items():
        assert images.split == split
        assert images.digest == built[split].digest
        assert images.places.tolist() == built[split].places.tolist()


def test_without_labels_no_split_is_evaluated(write, tmp_path):
    source = write("saved").but({"label_column": None})
    assert source.build_all(tmp_path / "data").keys() == {"train", "bank"}


def test_kind_chooses_the_data_set():
    settings = TypeAdapter(DataSettings)
    assert settings.validate_python({"kind": "digits"}) == Digits()
    assert settings.validate_json(Shapes(noise=0.1).model_dump_json()) == Shapes(noise=0.1)
