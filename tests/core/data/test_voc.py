"""Folders of PASCAL VOC: photographs and the masks of their objects go the same way."""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from dino_lab.core.data.decoding import BadImage, square
from dino_lab.core.data.voc import PascalVOC, decode_mask, square_mask

PALETTE = [0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255] + [90] * 3 * 252
SIZES = {"train": [(40, 30), (30, 41), (32, 32)], "val": [(30, 40), (50, 36)]}
"""Width and height of each image."""


def drawn(width: int, height: int) -> np.ndarray:
    """Two objects on the background, and between them a border that is void."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[height // 4 : height // 2, width // 3 :] = 1
    mask[height // 2, :] = 255
    mask[height // 2 + 1 : height - 3, : width // 2] = 2
    return mask


def save_mask(mask: np.ndarray, path: Path) -> None:
    image = Image.fromarray(mask).convert("P")
    image.putdata(mask.flatten().tolist())
    image.putpalette(PALETTE)
    image.save(path)


@pytest.fixture
def voc(tmp_path: Path) -> PascalVOC:
    """Images that show their masks: an object's number is its channel."""
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "SegmentationObject", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for split, sizes in SIZES.items():
        names = [f"2007_{split}_{i}" for i in range(len(sizes))]
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name, (width, height) in zip(names, sizes, strict=True):
            mask = drawn(width, height)
            save_mask(mask, root / f"SegmentationObject/{name}.png")
            image = np.stack([255 * (mask == 1), 255 * (mask == 2), 0 * mask], axis=-1).astype(np.uint8)
            # Of whatever name, PIL reads what it is; without the losses of JPEG.
            Image.fromarray(image).save(root / f"JPEGImages/{name}.jpg", format="PNG")
    return PascalVOC(root=str(root), image_size=32)


def path(voc: PascalVOC, file: str) -> Path:
    return Path(voc.root) / file


# ------------------------------------------------------------------------------------------------------ what is there


@pytest.mark.parametrize(("split", "number"), [("train", 3), ("bank", 3), ("test", 2)])
def test_images_are_squares_with_masks_and_without_labels(voc, split, number, tmp_path):
    images = voc.build(split, tmp_path / "data")
    assert (len(images), images.split, images.labels, images.classes) == (number, split, {}, {})
    assert images.pixels.shape == (number, 32, 32, 3)
    assert images.masks.shape == (number, 32, 32)
    assert images.masks.dtype == torch.uint8
    for mask in images.masks:
        assert set(mask.unique().tolist()) == {0, 1, 2, 255}


def test_masks_lie_on_what_the_images_show(voc, tmp_path):
    for split in ("train", "test"):
        images = voc.build(split, tmp_path / "data")
        for image, mask in zip(images.pixels, images.masks, strict=True):
            for number in (1, 2):
                shown, marked = image[..., number - 1] > 127, mask == number
                assert (shown & marked).sum() > 0.9 * (shown | marked).sum()


def test_images_keep_the_order_of_the_list(voc, tmp_path):
    listed = path(voc, "ImageSets/Segmentation/train.txt")
    names = listed.read_text().split()
    before = voc.build("train", tmp_path / "data")
    listed.write_text("\n".join(names[::-1]))
    after = voc.build("train", tmp_path / "data")
    assert torch.equal(after.pixels, before.pixels.flip(0))
    assert torch.equal(after.masks, before.masks.flip(0))


@pytest.mark.parametrize("shape", [(30, 40), (41, 30), (32, 32), (375, 500), (333, 500), (7, 60), (100, 33)])
@pytest.mark.parametrize("size", [8, 32, 97])
def test_the_square_of_a_mask_is_torchvisions(shape, size):
    mask = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    theirs = Compose([Resize(size, InterpolationMode.NEAREST), CenterCrop(size)])(Image.fromarray(mask))
    assert np.array_equal(square_mask(mask, size), np.array(theirs))


@pytest.mark.parametrize("shape", [(60, 90), (91, 64), (300, 80)])
@pytest.mark.parametrize("size", [16, 48, 200])
def test_the_square_of_a_mask_is_where_the_square_of_its_image_is(shape, size):
    y, x = np.ogrid[: shape[0], : shape[1]]
    mask = ((y - shape[0] / 2.2) ** 2 + (x - shape[1] / 1.9) ** 2 < 20**2).astype(np.uint8)
    image = torch.from_numpy(np.repeat(255 * mask[..., None], 3, axis=-1))
    shown, marked = square(image, size)[..., 0].numpy() > 127, square_mask(mask, size) > 0
    middles = [np.argwhere(each).mean(axis=0) for each in (shown, marked)]
    assert np.abs(middles[0] - middles[1]).max() < 0.5 * min(1, size / min(shape)) + 0.1
    assert (shown & marked).sum() > 0.85 * (shown | marked).sum()


@pytest.mark.parametrize("mode", ["P", "L"])
def test_values_of_a_mask_are_its_pixels_and_not_its_colors(mode):
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    file = io.BytesIO()
    image = Image.fromarray(mask)
    if mode == "P":
        image = Image.new("P", (16, 16))
        image.putpalette(PALETTE)
        image.putdata(mask.flatten().tolist())
    image.save(file, format="PNG")
    assert np.array_equal(decode_mask(file.getvalue()), mask)


def test_a_mask_of_colors_is_refused():
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, format="PNG")
    with pytest.raises(BadImage, match="mode RGB; allowed are 8 bits that number the objects"):
        decode_mask(file.getvalue())


# --------------------------------------------------------------------------------------------- kept and told apart


def test_a_set_is_found_again_and_not_made_again(voc, tmp_path):
    told = []
    first = voc.build("train", tmp_path / "data", progress=lambda *done: told.append(done))
    again = voc.build("train", tmp_path / "data", progress=lambda *done: told.append(done))
    assert told == [(0, 3), (3, 3)]
    assert again.digest == first.digest


@pytest.mark.parametrize("file", ["JPEGImages/2007_val_0.jpg", "SegmentationObject/2007_val_0.png"])
def test_a_changed_photograph_or_mask_makes_another_set(voc, file, tmp_path):
    prepared = voc.prepare(tmp_path / "data")
    assert prepared.prepare(tmp_path / "data") == prepared
    train, test = (voc.build(split, tmp_path / "data").digest for split in ("train", "test"))
    assert prepared.digest == f"{train[:16]}-{test[:16]}"
    if file.endswith("png"):
        save_mask(drawn(30, 40)[::-1], path(voc, file))
    else:
        Image.new("RGB", (30, 40), "white").save(path(voc, file), format="PNG")
    assert voc.build("test", tmp_path / "data").digest != test
    assert voc.build("train", tmp_path / "data").digest == train
    with pytest.raises(
        ValueError, match=r"data\.digest = .*images or masks in .*val\.txt are others than those of this trial"
    ):
        prepared.build("test", tmp_path / "data")


def test_another_folder_with_the_same_names_ages_and_sizes_is_another_set(voc, tmp_path):
    there = PascalVOC(root=str(tmp_path / "there"), image_size=32)
    shutil.copytree(voc.root, there.root)
    for root, color in ((voc.root, "pink"), (there.root, "lime")):
        image = Path(root) / "JPEGImages/2007_val_0.jpg"
        Image.new("RGB", (30, 40), color).save(image, format="BMP")
        for file in Path(root).rglob("*.*"):
            os.utime(file, (0, 0))
    assert voc.build("test", tmp_path / "data").digest != there.build("test", tmp_path / "data").digest


def test_where_the_files_lie_is_no_part_of_a_prepared_sets_identity(voc, tmp_path):
    prepared = voc.prepare(tmp_path / "data")
    os.rename(voc.root, tmp_path / "moved")
    moved = PascalVOC(root=str(tmp_path / "moved"), image_size=32)
    assert moved.identity != voc.identity
    assert moved.prepare(tmp_path / "data").identity == prepared.identity
    assert moved.but({"image_size": 16}).prepare(tmp_path / "data").identity != prepared.identity


def test_held_out_images_have_their_masks(voc, tmp_path):
    settings = voc.but({"evaluation_split": "held_out"}).prepare(tmp_path / "data")
    everything = voc.build("train", tmp_path / "data")
    train, test = (settings.build(split, tmp_path / "data") for split in ("train", "test"))
    assert sorted([*train.places, *test.places]) == [0, 1, 2]
    assert len(settings.digest) == 16
    assert torch.equal(test.masks[test.places], everything.masks[test.places])


# ------------------------------------------------------------------------------------------------------------- errors


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"data\.root = 'nowhere': no ImageSets/Segmentation/train\.txt there; a folder"
    ):
        PascalVOC(root="nowhere").build("train", tmp_path)


def test_a_root_above_says_what_it_has(voc, tmp_path):
    above = PascalVOC(root=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"no ImageSets/Segmentation/val\.txt there; it has \['VOC2012'\]; a folder of"
    ):
        above.build("test", tmp_path / "data")


@pytest.mark.parametrize("file", ["JPEGImages/2007_train_1.jpg", "SegmentationObject/2007_train_1.png"])
def test_a_listed_image_without_photograph_or_mask_is_named(voc, file, tmp_path):
    path(voc, file).unlink()
    with pytest.raises(ValueError, match=rf"data\.root = .*: 1 files .*train\.txt lists are not there: {file}; each"):
        voc.build("train", tmp_path / "data")


def test_a_list_of_nothing_is_refused(voc, tmp_path):
    path(voc, "ImageSets/Segmentation/val.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"data\.root = .*: ImageSets/Segmentation/val\.txt lists no image"):
        voc.build("test", tmp_path / "data")


def test_a_list_that_cannot_be_read_is_named(voc, tmp_path):
    listed = path(voc, "ImageSets/Segmentation/val.txt")
    listed.unlink()
    listed.mkdir()
    with pytest.raises(ValueError, match=r"data\.root = .*: cannot be listed: .*val\.txt"):
        voc.build("test", tmp_path / "data")


def test_a_mask_of_another_size_is_named_with_both(voc, tmp_path):
    save_mask(drawn(40, 31), path(voc, "SegmentationObject/2007_train_0.png"))
    message = (
        r"SegmentationObject/2007_train_0\.png has 40 x 31 pixels, JPEGImages/2007_train_0\.jpg 40 x 30; they must"
    )
    with pytest.raises(ValueError, match=rf"data\.root = .*: {message}"):
        voc.build("train", tmp_path / "data")


@pytest.mark.parametrize("file", ["JPEGImages/2007_val_1.jpg", "SegmentationObject/2007_val_1.png"])
@pytest.mark.parametrize(("content", "why"), [(b"", "the file is empty"), (b"none", "no image that PIL knows")])
def test_a_bad_file_is_named_with_the_reason(voc, file, content, why, tmp_path):
    path(voc, file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"data\.root = .*: {file}: cannot be decoded: {why}"):
        voc.build("test", tmp_path / "data")


def test_a_file_that_cannot_be_read_is_named_and_nothing_kept(voc, tmp_path, monkeypatch):
    read = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "2007_val_1.png":
            raise PermissionError(13, "denied")
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fail)
        with pytest.raises(ValueError, match=r"SegmentationObject/2007_val_1\.png: cannot be read: PermissionError"):
            voc.build("test", tmp_path / "data")
    assert len(voc.build("test", tmp_path / "data")) == 2


def test_masks_without_any_object_are_refused(voc, tmp_path):
    for i, (width, height) in enumerate(SIZES["val"]):
        nothing = np.where(drawn(width, height) == 255, 255, 0).astype(np.uint8)
        save_mask(nothing, path(voc, f"SegmentationObject/2007_val_{i}.png"))
    with pytest.raises(ValueError, match=r"data\.root = .*: no mask of .*val\.txt has an object, 1 to 254"):
        voc.build("test", tmp_path / "data")


def test_progress_that_refuses_stops_before_anything_is_kept(voc, tmp_path):
    def refuse(done: int, total: int) -> None:
        raise RuntimeError(f"{done} of {total}")

    with pytest.raises(RuntimeError, match="0 of 3"):
        voc.build("train", tmp_path / "data", progress=refuse)
    assert not [each for each in (tmp_path / "data").iterdir() if each.is_dir()]
