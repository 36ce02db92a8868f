"""Batches: the same crops of an image whoever makes them, in whatever company, kept or read from files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dino_lab.core.data.batches import Batches, Wholes
from dino_lab.core.data.crops import Crops, whole
from dino_lab.core.data.images import ImageSet
from dino_lab.core.data.random import order
from dino_lab.core.data.sources import ImageFolder, Shapes

CPU = torch.device("cpu")
CROPS = Crops(global_crops_size=16, local_crops_size=8, local_crops_number=3)
IMAGES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of many sizes, some larger than is worked on in batches."""
    root = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for split, number in (("train", IMAGES), ("val", 4)):
        for i in range(number):
            coarse = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            size = (int(generator.integers(10, 90)), int(generator.integers(10, 90)))
            (root / split / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(root / split / "ab"[i % 2] / f"{i}.jpg")
    return root


@pytest.fixture(params=["kept", "streamed"])
def images(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> ImageSet:
    if request.param == "kept":
        return Shapes(image_size=16, train_images=IMAGES, test_images=4).build("train", tmp_path)
    return ImageFolder(root=str(folder)).build("train", tmp_path)


def crops_of_each(batches: Batches, *, epochs: int, loader_workers: int = 0) -> dict[tuple[int, int], list[Tensor]]:
    """(epoch, image) -> its crops, whatever batch they came in."""
    steps = range(epochs * batches.steps_per_epoch)
    found = {}
    for step, (global_crops, local_crops, labels) in zip(
        steps, batches.load(steps, loader_workers=loader_workers), strict=True
    ):
        epoch, place = divmod(step, batches.steps_per_epoch)
        chosen = order(batches.seed, epoch, IMAGES)[place * batches.batch_size :][: batches.batch_size]
        assert torch.equal(labels, batches.images.labels["class"][torch.from_numpy(chosen)])
        for i, image in enumerate(chosen.tolist()):
            found[epoch, image] = [global_crops[:, i], local_crops[:, i]]
    return found


def assert_same(ours: dict[tuple[int, int], list[Tensor]], theirs: dict[tuple[int, int], list[Tensor]]) -> None:
    assert ours.keys() == theirs.keys()
    for key, crops in ours.items():
        assert all(map(torch.equal, crops, theirs[key])), key


@pytest.mark.parametrize(("batch_size", "loader_workers"), [(4, 0), (24, 0), (8, 1), (4, 3)])
def test_an_image_gets_the_same_crops_for_any_number_of_workers_and_batch_size(
    images: ImageSet, batch_size: int, loader_workers: int
) -> None:
    expected = crops_of_each(Batches(images, batch_size=8, seed=3, crops=CROPS, device=CPU), epochs=2)
    assert len(expected) == 2 * IMAGES
    batches = Batches(images, batch_size=batch_size, seed=3, crops=CROPS, device=CPU)
    assert_same(crops_of_each(batches, epochs=2, loader_workers=loader_workers), expected)


@pytest.mark.parametrize("parts", [1, 2])
def test_ranks_have_shares_of_each_part_of_a_batch(images: ImageSet, parts: int) -> None:
    whole = Batches(images, batch_size=12, seed=3, crops=CROPS, device=CPU)[1]
    of_ranks = []
    for rank in range(3):
        batches = Batches(images, batch_size=12, seed=3, crops=CROPS, device=CPU, parts=parts)
        batches.rank, batches.workers = rank, 3
        of_ranks.append([crops.chunk(parts, dim=-1 if crops.ndim == 1 else 1) for crops in batches[1]])
    for ours, *theirs in zip(whole, *of_ranks, strict=True):
        together = [share for part in zip(*theirs, strict=True) for share in part]
        assert torch.equal(torch.cat(together, dim=-1 if ours.ndim == 1 else 1), ours)


def test_more_images_than_are_worked_on_at_once_are_one_batch(tmp_path: Path) -> None:
    images = Shapes(image_size=16, train_images=150, test_images=4).build("train", tmp_path)
    global_crops, local_crops, labels = Batches(images, batch_size=150, seed=3, crops=CROPS, device=CPU)[0]
    assert global_crops.shape == (2, 150, 3, 16, 16)
    assert local_crops.shape == (3, 150, 3, 8, 8)
    alone = Batches(images, batch_size=1, seed=3, crops=CROPS, device=CPU)
    for place in (0, 63, 64, 149):
        for together, one in zip((global_crops, local_crops), alone[place][:2], strict=True):
            assert torch.equal(together[:, place : place + 1], one)
        assert labels[place] == alone[place][2]


def test_images_that_nobody_labelled_have_no_class(images: ImageSet, folder: Path, tmp_path: Path) -> None:
    flat = ImageFolder(root=str(folder / "train"), train_folder="a").build("train", tmp_path)
    assert Batches(flat, batch_size=5, seed=0, crops=CROPS, device=CPU)[0][2].tolist() == [-1] * 5


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_wholes_are_all_images_in_order(images: ImageSet, loader_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino_lab.core.data.batches._WHOLE_IMAGES", 7)
    parts = list(Wholes(images, 16).load(loader_workers=loader_workers))
    assert max(map(len, parts)) <= 7
    assert torch.equal(torch.cat(parts), whole(images.images(np.arange(IMAGES)), 16))


def test_a_batch_larger_than_the_data_set_is_refused(images: ImageSet) -> None:
    with pytest.raises(ValueError, match=rf"batch_size = 25: exceeds the {IMAGES} images of {images.name}"):
        Batches(images, batch_size=IMAGES + 1, seed=0, crops=CROPS, device=CPU)
