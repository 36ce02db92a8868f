"""What torchvision fetches: read from its own files, fetched only when told to."""

import gzip
import hashlib
import io
import os
import tracemalloc

import numpy as np
import pytest
import torch

from dino_lab.core.data import downloads
from dino_lab.core.data.downloads import CIFAR10, CIFAR100, STL10, FashionMNIST

KINDS = [FashionMNIST, CIFAR10, CIFAR100, STL10]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_fetched_unless_told(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("the network was asked"))
    where = str(tmp_path / "downloads")
    with pytest.raises(ValueError, match=f"data.kind = '{kind().kind}': not there.*{where}; `--download` fetches it"):
        kind().prepare(tmp_path)
    with pytest.raises(ValueError, match=r"not there.* in /elsewhere"):
        kind(root="/elsewhere").build("train", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fetch_that_fails_is_said(kind, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    with pytest.raises(ValueError, match=r"could not be fetched into .*: "):
        kind().prepare(tmp_path, download=True)


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100", "stl10"])
def test_files_that_are_not_the_published_ones_are_told(name, write, tmp_path, monkeypatch):
    settings = write(name)
    monkeypatch.undo()  # the checksums count again
    message = rf"'{settings.kind}': not there, or not as published: {', '.join(settings.files())} in .*; `--download`"
    with pytest.raises(ValueError, match=message):
        settings.build("train", tmp_path / "data")


def serve(files: dict[str, bytes], asked: list[str]):
    """The network: these files by the ends of their addresses."""

    def urlopen(request):
        name = request.full_url.rsplit("/", 1)[1]
        response = io.BytesIO(files[name])
        response.url, response.length = request.full_url, len(files[name])
        asked.append(name)
        return response

    return urlopen


def test_a_file_cut_short_is_named_and_fetched_again_when_told(write, tmp_path, monkeypatch):
    settings = write("fashion_mnist")
    monkeypatch.undo()
    raw = tmp_path / "files/FashionMNIST/raw"
    whole = {path.name: path.read_bytes() for path in raw.iterdir()}
    sums = {name: hashlib.md5(content).hexdigest() for name, content in whole.items()}
    archives = {f"{name}.gz": gzip.compress(content) for name, content in whole.items()}
    # As published, but smaller.
    monkeypatch.setattr(downloads, "_FASHION_MNIST", sums)
    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in archives.items()]
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.resources", resources)
    asked: list[str] = []
    monkeypatch.setattr("urllib.request.urlopen", serve(archives, asked))
    for name in whole:
        (raw / f"{name}.gz").write_bytes(archives[f"{name}.gz"])
    expected = settings.build("train", tmp_path / "data").digest

    cut = "train-images-idx3-ubyte"
    for name in (cut, f"{cut}.gz"):
        os.truncate(raw / name, 500)
    complaint = (
        rf"data\.kind = 'fashion_mnist': not there, or not as published: FashionMNIST/raw/{cut} in .*files; `--d"
    )
    with pytest.raises(ValueError, match=complaint):
        settings.build("train", tmp_path / "elsewhere")
    assert asked == []
    assert settings.build("train", tmp_path / "elsewhere", download=True).digest == expected
    assert set(asked) == {f"{cut}.gz"}
    assert {path.name: path.read_bytes() for path in raw.glob("*ubyte")} == whole


def test_stl10_is_not_read_into_memory(write, tmp_path):
    settings = write("stl10")
    settings.build("test", tmp_path / "data")  # imports
    tracemalloc.start()
    settings.build("train", tmp_path / "data")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 70 * 3 * 96 * 96 / 2


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100", "stl10"])
def test_a_kept_set_needs_its_files_no_more(name, write, tmp_path):
    settings = write(name).prepare(tmp_path / "data")
    digest = settings.build("train", tmp_path / "data").digest
    (tmp_path / "files").rename(tmp_path / "away")
    assert settings.build("train", tmp_path / "data").digest == digest
    assert settings.build("test", tmp_path / "data").labels["class"].tolist()[:3] == [0, 1, 2]


def test_images_are_as_torchvision_has_them(write, tmp_path):
    from torchvision import datasets

    # Every pixel another: rows and columns are told apart.
    settings = write("stl10")
    rng = np.random.default_rng(0)
    (tmp_path / "files/stl10_binary/test_X.bin").write_bytes(rng.integers(0, 256, 20 * 3 * 96 * 96, np.uint8).tobytes())
    ours = settings.build("test", tmp_path / "data")
    theirs = datasets.STL10(tmp_path / "files", split="test")
    for i in (0, 19):
        assert np.array_equal(ours.pixels[i].numpy(), np.asarray(theirs[i][0]))


def test_another_size_is_resized_bicubic(write, tmp_path):
    settings = write("fashion_mnist")
    own, large = (settings.but({"image_size": size}).build("train", tmp_path / "data") for size in (28, 32))
    assert own.pixels.shape[1:] == (28, 28, 3)
    assert torch.equal(large.pixels, torch.full((60, 32, 32, 3), 1) * (20 * large.labels["class"])[:, None, None, None])


def test_numbers_of_training_images_are_the_published_ones():
    assert [kind().known_train_images for kind in KINDS] == [60_000, 50_000, 50_000, 100_000]
    assert STL10(train_split="train").known_train_images == 5_000
