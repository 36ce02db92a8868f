"""Files that somebody else wrote: bad ones, changed ones, and those that are decoded when they are needed."""

import errno
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dino_lab.core.data import encoded
from dino_lab.core.data.folder import ImageFolder

WHITE, GREY = (255, 255, 255), (128, 128, 128)
SIZES = pytest.mark.parametrize("image_size", [16, None], ids=["kept", "streamed"])


@pytest.fixture
def hostile(tmp_path: Path) -> ImageFolder:
    """One class with every kind of odd and bad image; the mean colour of the good ones is in their names."""
    folder = tmp_path / "hostile/train/all"
    folder.mkdir(parents=True)
    red = Image.new("RGB", (30, 20), "red")
    red.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "255,0,0 palette.png")
    transparent = Image.new("P", (20, 20), 1)
    transparent.putpalette([0, 0, 0, 255, 0, 0])
    transparent.save(folder / "255,0,0 transparent.png", transparency=b"\x00\x80")
    Image.new("L", (20, 20), 128).save(folder / "128,128,128 grey.png")
    Image.new("LA", (20, 20), (128, 9)).save(folder / "128,128,128 grey and alpha.png")
    Image.new("CMYK", (20, 40), (0, 0, 0, 0)).save(folder / "255,255,255 cmyk.jpg")
    Image.fromarray(np.full((20, 20), 128 * 257, np.uint16)).save(folder / "128,128,128 16 bits.png")
    Image.new("1", (20, 20), 1).save(folder / "255,255,255 1 bit.png")
    Image.new("RGB", (1, 1), "red").save(folder / "255,0,0 point.png")
    Image.new("RGB", (10_000, 9), "red").save(folder / "255,0,0 wide.png")
    red.save(folder / "255,0,0 as jpeg.png", format="JPEG")

    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("not an image")
    Image.effect_noise((64, 64), 50).save(folder / "cut.jpg")
    os.truncate(folder / "cut.jpg", 700)
    damaged = bytearray((folder / "128,128,128 grey.png").read_bytes())
    damaged[45] ^= 0xFF
    (folder / "corrupt.png").write_bytes(damaged)
    (folder / "folder of none").mkdir()
    (folder / ".hidden").write_text("not an image either")
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "all of it again").symlink_to("..")
    return ImageFolder(root=str(tmp_path / "hostile"), image_size=16, evaluation_split="held_out")


BAD = {"corrupt.png", "cut.jpg", "dangling.jpg", "empty.jpg", "loop.jpg", "pipe.jpg", "text.jpg"}


@SIZES
def test_bad_images_stop_before_the_first_step_all_in_one_error(hostile, image_size, tmp_path):
    settings = hostile.but({"image_size": image_size})
    for _ in range(2):  # the second time without reading them again
        with pytest.raises(ValueError, match=r"data\.bad_images = 'stop': 7 of 17 images in .*hostile/train") as error:
            settings.prepare(tmp_path / "data")
        lines = str(error.value).splitlines()[1:]
        assert {line.split(":")[0].removeprefix("train/all/") for line in lines} == BAD
        assert any("empty.jpg: cannot be decoded: the file is empty" in line for line in lines)


@SIZES
def test_bad_images_are_skipped_and_all_others_have_their_colors(hostile, image_size, tmp_path):
    settings = hostile.but({"image_size": image_size, "bad_images": "skip", "evaluation_split": "test"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = settings.build("train", tmp_path / "data")
    assert {Path(name).name for name in images.skipped} == BAD
    assert len(images) == 10 == len(images.labels["class"])
    means = [tuple(image.float().mean(dim=(0, 1)).round().int().tolist()) for image in images.images(np.arange(10))]
    near = [min([(255, 0, 0), GREY, WHITE], key=lambda c: np.abs(np.subtract(c, mean)).sum()) for mean in means]
    assert sorted(near) == sorted([(255, 0, 0)] * 5 + [GREY] * 3 + [WHITE] * 2)
    assert all(np.abs(np.subtract(a, b)).max() <= 2 for a, b in zip(means, near, strict=True))


@SIZES
def test_what_is_skipped_is_part_of_the_digest(hostile, image_size, tmp_path):
    settings = hostile.but({"image_size": image_size, "bad_images": "skip"})
    prepared = settings.prepare(tmp_path / "data")
    assert len(prepared.build("train", tmp_path / "data")) == 9
    assert len(prepared.build("test", tmp_path / "data")) == 1
    Image.new("RGB", (20, 20), "red").save(tmp_path / "hostile/train/all/text.jpg")
    with pytest.raises(ValueError, match="are others than those of this trial"):
        prepared.build("train", tmp_path / "data")


def test_streamed_images_have_their_own_sizes(hostile, tmp_path):
    settings = hostile.but({"image_size": None, "bad_images": "skip", "evaluation_split": "test"})
    images = settings.build("train", tmp_path / "data")
    shapes = sorted(tuple(image.shape[:2]) for image in images.images(np.arange(len(images))))
    assert shapes == [(1, 1), (9, 10_000), *[(20, 20)] * 5, *[(20, 30)] * 2, (40, 20)]


def test_stop_and_skip_share_the_pass(hostile, tmp_path, monkeypatch):
    hostile.but({"bad_images": "skip"}).build("train", tmp_path / "data")
    monkeypatch.setattr(encoded, "decode", lambda data: pytest.fail("decoded again"))
    with pytest.raises(ValueError, match="7 of 17"):
        hostile.build("train", tmp_path / "data")


ERRORS = [OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "denied"), MemoryError()]


@SIZES
@pytest.mark.parametrize("error", [*ERRORS, FileNotFoundError(errno.ENOENT, "gone")], ids=lambda error: repr(error))
def test_what_may_pass_stops_at_the_image_and_is_not_kept(error, image_size, write, tmp_path, monkeypatch):
    settings = write("imagefolder").but({"image_size": image_size, "bad_images": "skip"})
    read = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "07.png":
            raise error
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fail)
        with pytest.raises(ValueError, match=rf"train/dog/07\.png: cannot be read: {type(error).__name__}: "):
            settings.build("train", tmp_path / "data")
    images = settings.build("train", tmp_path / "data")
    assert (len(images), images.skipped) == (36, {})


def test_a_set_of_bad_images_alone_is_refused_though_they_are_skipped(tmp_path):
    (tmp_path / "all/train/one").mkdir(parents=True)
    (tmp_path / "all/train/one/0.jpg").write_text("none")
    settings = ImageFolder(root=str(tmp_path / "all"), image_size=8, bad_images="skip")
    with pytest.raises(ValueError, match=r"data\.bad_images = 'skip': none of 1 images in .*all/train can be decoded"):
        settings.build("train", tmp_path / "data")


def test_progress_that_refuses_stops_before_anything_is_written_or_read(write, tmp_path, monkeypatch):
    begun: list[str] = []
    monkeypatch.setattr(encoded, "mapped", lambda *_: begun.append("a map"))
    monkeypatch.setattr(encoded, "decode", lambda *_: begun.append("an image"))

    def refuse(done: int, total: int) -> None:
        raise RuntimeError(f"{done} of {total}")

    with pytest.raises(RuntimeError, match="0 of 36"):
        write("imagefolder").build("train", tmp_path / "data", progress=refuse)
    assert begun == []


def test_at_most_ten_bad_images_are_named(tmp_path):
    folder = tmp_path / "all/train/one"
    folder.mkdir(parents=True)
    for i in range(200):
        (folder / f"{i:03}.jpg").write_text("none")
    with pytest.raises(ValueError, match="200 of 200") as error:
        ImageFolder(root=str(tmp_path / "all"), image_size=8).build("train", tmp_path / "data")
    assert len(str(error.value).splitlines()) == 12
    assert str(error.value).endswith("and 190 more")


# ------------------------------------------------------------------------------------------------------ changed files


@SIZES
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_changed_byte_is_another_digest_and_is_refused_by_a_prepared_trial(image_size, split, write, tmp_path):
    settings = write("imagefolder").but({"image_size": image_size})
    prepared = settings.prepare(tmp_path / "data")
    path = tmp_path / f"files/{split}/cat/00.png"
    Image.new("RGB", (16, 16), (0, 1, 7)).save(path)
    assert settings.prepare(tmp_path / "data").digest != prepared.digest
    changed, same = ("train", "test") if split == "train" else ("test", "train")
    with pytest.raises(ValueError, match=r"data\.digest = '[0-9a-f-]*': the images in .* are others"):
        prepared.build(changed, tmp_path / "data")
    prepared.build(same, tmp_path / "data")


@SIZES
def test_files_that_move_or_are_touched_keep_their_digest(image_size, write, tmp_path):
    settings = write("imagefolder").but({"image_size": image_size})
    digest = settings.prepare(tmp_path / "data").digest
    for path in (tmp_path / "files").rglob("*.png"):
        os.utime(path, (1, 1))
    assert settings.prepare(tmp_path / "data").digest == digest
    (tmp_path / "files").rename(tmp_path / "moved")
    moved = settings.but({"root": str(tmp_path / "moved")})
    assert moved.prepare(tmp_path / "elsewhere").digest == digest


@SIZES
def test_a_renamed_file_is_another_digest(image_size, write, tmp_path):
    settings = write("imagefolder").but({"image_size": image_size})
    digest = settings.build("train", tmp_path / "data").digest
    (tmp_path / "files/train/cat/00.png").rename(tmp_path / "files/train/cat/a.png")
    assert settings.build("train", tmp_path / "data").digest != digest


def test_images_are_not_in_the_order_of_their_classes(write, tmp_path):
    labels = write("imagefolder").build("train", tmp_path / "data").labels["class"]
    assert len(set(labels[:8].tolist())) == 3


# ----------------------------------------------------------------------------------------------------- streamed files


class Images(torch.utils.data.Dataset):
    def __init__(self, images) -> None:
        self.images = images

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.images.images(np.array([i]))[0]


@pytest.mark.parametrize("name", ["imagefolder streamed", "parquet streamed", "webdataset streamed"])
def test_loaders_of_several_processes_read_what_one_reads(name, write, tmp_path):
    images = write(name).build("train", tmp_path / "data")
    chosen = [30, 2, 35, 7, 11, 0]
    loader = DataLoader(Images(images), batch_size=None, sampler=chosen, num_workers=2)
    for i, image in zip(chosen, loader, strict=True):
        assert torch.equal(image, images.images(np.array([i]))[0])
        assert (image[..., 1] == 20 * images.labels["class"][i]).all()


@pytest.mark.parametrize("name", ["imagefolder", "saved", "webdataset"])
def test_kept_and_streamed_images_are_the_same(name, write, tmp_path):
    settings = write(name)
    kept, streamed = (settings.but({"image_size": size}).build("train", tmp_path / "data") for size in (16, None))
    everything = np.arange(len(kept))
    assert torch.equal(kept.images(everything), torch.stack(streamed.images(everything)))
    assert torch.equal(kept.labels["class"], streamed.labels["class"])


def test_a_file_that_is_gone_in_the_middle_is_named(write, tmp_path):
    images = write("imagefolder streamed").build("train", tmp_path / "data")
    for path in (tmp_path / "files/train/cat").iterdir():
        path.unlink()
    (first, *_) = np.flatnonzero(images.labels["class"] == 0)
    with pytest.raises(ValueError, match=r"train/cat/\d+\.png: cannot be decoded any more"):
        images.images(np.array([first]))
