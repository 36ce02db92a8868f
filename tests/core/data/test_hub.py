"""Data sets in the form of the Hugging Face hub."""

from importlib.util import find_spec

import datasets
import pytest

from dino_lab.core.data import hub
from dino_lab.core.data.hub import HuggingFace


def test_saved_and_parquet_folders_hold_the_same_images(write, tmp_path):
    saved = write("saved").build("train", tmp_path / "data")
    parquet = tmp_path / "parquet"
    datasets.load_from_disk(str(tmp_path / "files"))["train"].to_parquet(str(parquet / "train.parquet"))
    other = HuggingFace(path=str(parquet), image_size=16).build("train", tmp_path / "data")
    assert other.digest == saved.digest
    assert saved.classes["class"] == ("cat", "dog", "owl")


def test_a_changed_parquet_file_is_seen(write, tmp_path):
    settings = write("parquet streamed")
    prepared = settings.prepare(tmp_path / "data")
    table = datasets.load_dataset(str(tmp_path / "files"), cache_dir=str(tmp_path / "cache"))["train"]
    path = next((tmp_path / "files").glob("train*"))
    table.select([*range(1, 36), 0]).to_parquet(str(path))
    with pytest.raises(ValueError, match="are others than those of this trial"):
        prepared.build("train", tmp_path / "data")


def save(path, rows, **features):
    table = datasets.Dataset.from_dict(rows)
    if features:
        table = table.cast(datasets.Features({**table.features, **features}))
    table.save_to_disk(str(path))
    return HuggingFace(path=str(path), image_size=8, evaluation_split="held_out")


@pytest.fixture
def images(write, tmp_path):
    write("saved")
    rows = datasets.load_from_disk(str(tmp_path / "files"))["train"].cast_column("image", datasets.Image(decode=False))
    return [{"bytes": each["bytes"], "path": None} for each in rows[:4]["image"]]


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([7, 30, 7, 4], ("4", "7", "30"), [1, 2, 1, 0]),
        (["b", "a", "b", "c"], ("a", "b", "c"), [1, 0, 1, 2]),
    ],
)
def test_numbers_and_words_are_classes_in_their_order(labels, names, expected, images, tmp_path):
    settings = save(tmp_path / "set", {"image": images, "label": labels}, image=datasets.Image())
    built = settings.but({"evaluation_split": "test"}).build("train", tmp_path / "data")
    assert built.classes["class"] == names
    red = built.pixels[:, 0, 0, 0].tolist()
    assert [built.labels["class"][red.index(i)] for i in range(4)] == expected


def test_without_a_label_column_nothing_is_labelled(write, tmp_path):
    settings = write("saved").but({"label_column": None, "test_split": "none"})
    assert settings.prepare(tmp_path / "data").build("train", tmp_path / "data").labels == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_split": "training"}, r"data\.train_split = 'training': not in .*; known: train, test"),
        ({"test_split": "val"}, r"data\.test_split = 'val': not in .*; known: train, test"),
        ({"image_column": "img"}, r"data\.image_column = 'img': not in .*; known: image, label"),
        ({"label_column": "class"}, r"data\.label_column = 'class': not in .*; known: image, label"),
        ({"image_column": "label"}, r"data\.image_column = 'label': holds no images but ClassLabel"),
        ({"label_column": "image"}, r"data\.label_column = 'image': holds no classes but Image"),
    ],
)
def test_wrong_names_say_what_there_is(changes, message, write, tmp_path):
    with pytest.raises(ValueError, match=message):
        write("saved").but(changes).prepare(tmp_path / "data")


def test_rows_without_an_image_are_bad_images(images, tmp_path):
    settings = save(tmp_path / "set", {"image": [*images[:3], None], "label": [0, 1, 0, 1]}, image=datasets.Image())
    with pytest.raises(ValueError, match=r"train\[3\]: cannot be decoded: a row without an image"):
        settings.build("train", tmp_path / "data")


def test_splits_without_rows_are_refused(images, tmp_path):
    full = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]}).cast_column("image", datasets.Image())
    splits = datasets.DatasetDict({"train": full, "test": full.select([])})
    splits.save_to_disk(str(tmp_path / "saved"))
    for split, table in splits.items():
        table.to_parquet(str(tmp_path / f"parquet/{split}.parquet"))
    for folder in ("saved", "parquet"):
        with pytest.raises(ValueError, match=rf"data\.path = '.*/{folder}': cannot be loaded: "):
            HuggingFace(path=str(tmp_path / folder), image_size=8).prepare(tmp_path / "data")


def test_rows_without_a_label_are_refused(images, tmp_path):
    secret = datasets.ClassLabel(names=["cat", "dog"])
    settings = save(tmp_path / "set", {"image": images, "label": [0, 1, -1, 0]}, image=datasets.Image(), label=secret)
    with pytest.raises(ValueError, match="images without a label"):
        settings.build("train", tmp_path / "data")


def test_a_set_of_the_hub_is_not_fetched_unless_told(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=r"data\.path = 'lab/set': .*huggingface/lab--set.*`--download` does"):
        HuggingFace(path="lab/set").prepare(tmp_path)


def test_what_is_fetched_is_kept_and_needs_the_hub_no_more(write, tmp_path, monkeypatch):
    local = write("parquet streamed")
    # The hub is a folder here; what is run, and in which environment, is what would be.
    monkeypatch.setattr(hub, "_FETCH", hub._FETCH.replace("sys.argv[1:]", f"{local.path!r}, *sys.argv[2:]"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = HuggingFace(path="lab/set", image_size=16)
    prepared = settings.prepare(tmp_path / "data", download=True)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("the hub was asked"))
    images = prepared.build("test", tmp_path / "data")
    assert (images.pixels[..., 1] == 20 * images.labels["class"][:, None, None]).all()
    assert [path.name for path in (tmp_path / "data/downloads/huggingface").iterdir()] == ["lab--set"]


def test_a_fetch_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_FETCH", "print('ConnectionError: no route'); raise SystemExit(1)")
    with pytest.raises(ValueError, match=r"'lab/set': could not be fetched from the hub: ConnectionError: no route"):
        HuggingFace(path="lab/set").prepare(tmp_path, download=True)


def test_without_the_library_the_extra_is_named(write, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda name: None if name == "datasets" else find_spec(name))
    with pytest.raises(ValueError, match=r"data\.kind = 'huggingface': needs the extra"):
        write("saved").build("train", tmp_path)


def test_an_empty_folder_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data\.path = .*empty.*: cannot be loaded: "):
        HuggingFace(path=str(tmp_path / "empty")).build("train", tmp_path / "data")
