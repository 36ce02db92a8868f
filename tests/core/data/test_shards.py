"""Tar files, read as the webdataset library reads them."""

import io
import os
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from dino_lab.core.data.shards import WebDataset


def write_tar(path, files: dict[str, bytes], **options) -> None:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_samples_are_those_of_the_library(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        {
            "./folder/0001.png": png(1),
            "./folder/0001.cls": b"4",
            "folder/0001.PNG": png(2),
            "folder/0001.cls": b" 2\n",
            "other.dir/0002.seg.png": png(9),
            "other.dir/0002.cls": b"0",
            "other.dir/0002.png": png(3),
            "other.dir/0002.jpg": b"a second image of the sample",
            "__meta__/ignored.png": png(9),
            "README": b"no extension",
            "last.cls": b"1",
            "last.png": png(4),
        },
        format=tarfile.PAX_FORMAT,
    )
    # A sample does not go on in the next file.
    write_tar(tmp_path / "b.tar", {"last.png": png(5), "last.cls": b"7"}, format=tarfile.GNU_FORMAT)

    library = webdataset.WebDataset([str(tmp_path / f"{name}.tar") for name in "ab"], shardshuffle=False)
    expected = [(sample["__key__"], sample["png"], int(sample["cls"])) for sample in library]
    settings = WebDataset(train_shards=str(tmp_path / "*.tar"))
    listing = settings.listing("train", tmp_path / "data", download=False)
    names = [listing.encoded.name(i).split(": ")[1] for i in range(len(listing.encoded))]
    labels = [int(listing.classes[label]) for label in listing.labels]
    read = [listing.encoded.read(i) for i in range(len(names))]
    assert list(zip(names, read, labels, strict=True)) == expected
    assert len(expected) == 5
    assert listing.classes == ("0", "1", "2", "4", "7")


def test_long_names_do_not_end_a_sample(tmp_path):
    key = "x" * 150
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        write_tar(
            tmp_path / "a.tar", {f"{key}.png": png(1), f"{key}.cls": b"0", "y.png": png(2), "y.cls": b"0"}, format=kind
        )
        images = WebDataset(train_shards=str(tmp_path / "a.tar"), image_size=8).build("train", tmp_path / f"data{kind}")
        assert sorted(images.pixels[:, 0, 0, 0].tolist()) == [1, 2]


def test_without_cls_nothing_is_labelled_and_no_test_shards_are_needed(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{i}.png": png(i) for i in range(5)})
    settings = WebDataset(train_shards=str(tmp_path / "*.tar"), image_size=8).prepare(tmp_path / "data")
    images = settings.build("train", tmp_path / "data")
    assert images.labels == {}
    assert sorted(images.pixels[:, 0, 0, 0].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": png(1), "a.cls": b"0", "b.png": png(2)}, r"data\.train_shards = .*: 1 of 2 samples have no \.cls"),
        ({"a.png": png(1), "a.cls": b"cat"}, r"a\.cls holds b'cat', which is no whole number"),
        (
            {"a.png": png(1), "a.cls": b"1" + 30 * b"0"},
            r"a\.cls holds b'10000000000000000000', which is no whole number",
        ),
        ({"a.png": png(1), "a.cls": 5000 * b"1"}, r"a\.cls holds b'11111111111111111111', which is no whole number"),
        ({"README": b"nothing"}, "no sample in"),
        ({"a.cls": b"0"}, r"train\.tar: a: cannot be decoded: a sample without an image"),
    ],
)
def test_wrong_samples_are_told(files, message, tmp_path):
    write_tar(tmp_path / "train.tar", files)
    with pytest.raises(ValueError, match=message):
        WebDataset(train_shards=str(tmp_path / "*.tar")).build("train", tmp_path / "data")


def test_a_file_that_is_twice_in_a_sample_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    with pytest.raises(ValueError, match=r"a\.tar: has a\.png twice in a row"):
        WebDataset(train_shards=str(tmp_path / "*.tar")).build("train", tmp_path / "data")


def test_patterns_that_match_nothing_are_told(write, tmp_path):
    with pytest.raises(ValueError, match=r"data\.train_shards = 'nowhere-\*\.tar': matches no file"):
        WebDataset(train_shards="nowhere-*.tar").prepare(tmp_path)
    settings = write("webdataset")
    with pytest.raises(ValueError, match=r"data\.test_shards = 'nowhere\.tar': matches no file"):
        settings.but({"test_shards": "nowhere.tar"}).prepare(tmp_path / "data")
    with pytest.raises(ValueError, match=r"data\.test_shards = None: needed unless"):
        settings.but({"test_shards": None}).prepare(tmp_path / "data")
    settings.but({"test_shards": None, "evaluation_split": "held_out"}).prepare(tmp_path / "data")


@pytest.mark.parametrize("damage", ["cut", "header", "compressed", "text"])
def test_what_is_no_whole_tar_file_is_told(damage, tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, {f"{i}.png": png(i) for i in range(5)})
    if damage == "cut":
        os.truncate(path, 3 * 1024 - 400)
    elif damage == "header":
        data = bytearray(path.read_bytes())
        data[2 * 1024 + 10] ^= 0xFF
        path.write_bytes(data)
    elif damage == "compressed":
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    else:
        path.write_text("a text")
    with pytest.raises(ValueError, match=r"a\.tar: no whole, plain tar file: "):
        WebDataset(train_shards=str(path)).build("train", tmp_path / "data")


def test_classes_of_the_test_split_are_those_of_the_training_split(tmp_path):
    write_tar(tmp_path / "train.tar", {"a.png": png(1), "a.cls": b"3", "b.png": png(2), "b.cls": b"5"})
    write_tar(tmp_path / "test.tar", {"a.png": png(1), "a.cls": b"5"})
    settings = WebDataset(
        train_shards=str(tmp_path / "train.tar"), test_shards=str(tmp_path / "test.tar"), image_size=8
    )
    test = settings.build("test", tmp_path / "data")
    assert (test.labels["class"].tolist(), test.classes["class"]) == ([1], ("3", "5"))
    write_tar(tmp_path / "test.tar", {"a.png": png(1), "a.cls": b"4"})
    with pytest.raises(ValueError, match=r"has classes that the training split has not: \['4'\]"):
        settings.build("test", tmp_path / "data")


def test_the_digest_of_the_test_split_does_not_depend_on_what_was_read_before(tmp_path):
    write_tar(tmp_path / "one.tar", {"a.png": png(1), "a.cls": b"5"})
    write_tar(tmp_path / "two.tar", {"a.png": png(1), "a.cls": b"3", "b.png": png(2), "b.cls": b"5"})
    write_tar(tmp_path / "test.tar", {"a.png": png(1), "a.cls": b"5"})
    one, two = (
        WebDataset(train_shards=str(tmp_path / name), test_shards=str(tmp_path / "test.tar"), image_size=8)
        for name in ("one.tar", "two.tar")
    )
    after = [settings.build("test", tmp_path / "data") for settings in (one, two)]
    alone = [settings.build("test", tmp_path / settings.train_shards[-7:-4]) for settings in (one, two)]
    assert [images.digest for images in after] == [images.digest for images in alone]
    assert after[0].digest != after[1].digest


def test_a_link_to_no_shard_is_named(write, tmp_path):
    settings = write("webdataset")
    (tmp_path / "files/train-999.tar").symlink_to("nowhere.tar")
    with pytest.raises(ValueError, match=r"data\.train_shards = .*No such file.*train-999\.tar"):
        settings.build("train", tmp_path / "data")


def test_shards_are_walked_once(write, tmp_path, monkeypatch):
    settings = write("webdataset streamed")
    first = settings.build("train", tmp_path / "data")
    monkeypatch.setattr("tarfile.open", lambda *_, **__: pytest.fail("walked again"))
    second = settings.build("train", tmp_path / "data")
    chosen = np.arange(5)
    assert all(torch.equal(a, b) for a, b in zip(first.images(chosen), second.images(chosen), strict=True))


def test_moved_shards_keep_their_digest_and_a_changed_byte_changes_it(write, tmp_path):
    settings = write("webdataset")
    digest = settings.prepare(tmp_path / "data").digest
    (tmp_path / "files").rename(tmp_path / "moved")
    changes = {f"{split}_shards": str(tmp_path / f"moved/{split}-*.tar") for split in ("train", "test")}
    moved = settings.but(changes)
    assert moved.prepare(tmp_path / "data").digest == digest
    path = tmp_path / "moved/train-000.tar"
    with path.open("r+b") as shard:
        place = path.read_bytes().index(b".cls")
        shard.seek((place // 512 + 1) * 512)
        shard.write(b"2")
    assert moved.prepare(tmp_path / "data").digest != digest
