"""Which of the images that lie there are used: fraction, classes, held-out images."""

import numpy as np
import pytest
import torch

from dino_lab.core.data.embedded import Digits, Shapes
from dino_lab.core.settings import KnobError

DIGITS = Digits(image_size=8)
UNEVEN = Shapes(image_size=16, train_images=100, class_factor="shape", class_imbalance=50.0)


@pytest.fixture
def data_dir(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "digits"


@pytest.mark.parametrize("settings", [DIGITS, UNEVEN], ids=["digits", "uneven"])
def test_a_fraction_has_the_same_share_of_each_class_and_is_part_of_a_larger_one(settings, data_dir):
    whole = settings.build("train", data_dir)
    numbers = whole.labels["class"].bincount()
    before = set(range(len(whole)))
    for fraction in (0.5, 0.2, 0.07, 0.001):
        part = settings.but({"fraction": fraction}).build("train", data_dir)
        found = part.labels["class"].bincount(minlength=len(numbers))
        assert (found == (fraction * numbers).round().clamp(min=1)).all()
        assert torch.equal(whole.labels["class"][part.places], part.labels["class"])
        assert (np.diff(part.places) > 0).all()
        assert set(part.places) < before
        before = set(part.places)


def test_a_fraction_is_of_what_is_trained_on_alone(data_dir):
    tenth = DIGITS.but({"fraction": 0.1})
    assert 140 <= len(tenth.build("train", data_dir)) <= 147
    for split in ("bank", "test"):
        assert tenth.build(split, data_dir).digest == DIGITS.build(split, data_dir).digest


def test_classes_are_kept_by_name_and_numbered_in_their_order(data_dir):
    some = DIGITS.but({"classes": ["7", "2"]})
    for split in ("train", "bank", "test"):
        whole, part = DIGITS.build(split, data_dir), some.build(split, data_dir)
        digits = whole.labels["digit"][part.places]
        assert torch.equal(part.labels["class"], (digits == 2).long())
        assert set(digits.tolist()) == {2, 7}
        assert len(part) == ((whole.labels["digit"] == 2) | (whole.labels["digit"] == 7)).sum()
        assert part.classes["class"] == ("7", "2")
        # The factor itself is as it was.
        assert torch.equal(part.labels["digit"], digits)
        assert part.class_counts == {"7": (digits == 7).sum(), "2": (digits == 2).sum()}


def test_the_order_of_classes_is_part_of_the_digest(data_dir):
    digests = {DIGITS.but({"classes": each}).build("train", data_dir).digest for each in (["1", "2"], ["2", "1"])}
    assert len(digests) == 2


def test_unknown_and_repeated_classes_are_refused(data_dir):
    with pytest.raises(ValueError, match=r"data\.classes = \['1', 'seven'\]: unknown \['seven'\]; known: 0, 1, 2, 3"):
        DIGITS.but({"classes": ["1", "seven"]}).build("train", data_dir)
    with pytest.raises(KnobError, match="twice"):
        DIGITS.but({"classes": ["1", "1"]})
    with pytest.raises(KnobError, match="classes"):
        DIGITS.but({"classes": []})


def test_preparing_finds_classes_that_do_not_exist(data_dir):
    for settings in (UNEVEN, DIGITS):
        with pytest.raises(ValueError, match=r"data\.classes = \['nonsense'\]: unknown \['nonsense'\]; known: "):
            settings.but({"classes": ["nonsense"]}).prepare(data_dir)


def test_a_split_without_images_is_refused(data_dir):
    one = Shapes(image_size=16, train_images=30, test_images=1, class_factor="shape")
    test = one.build("test", data_dir)
    (there,) = test.labels["class"].tolist()
    (other, *_) = set(test.classes["class"]) - {test.classes["class"][there]}
    with pytest.raises(ValueError, match=rf"data\.classes = \['{other}'\]: .* no image of them in its test split"):
        one.but({"classes": [other]}).prepare(data_dir)
    alone = one.but({"train_images": 1, "evaluation_split": "held_out"})
    with pytest.raises(ValueError, match=r"data\.evaluation_split = 'held_out': none is, as no class has two images"):
        alone.prepare(data_dir)


def test_at_most_twenty_known_classes_are_shown(write, tmp_path):
    settings = write("cifar100").but({"classes": ["tulip"]})
    with pytest.raises(ValueError, match=r"class 19 and 80 more$"):
        settings.build("train", tmp_path)


def test_held_out_images_are_a_tenth_of_each_class_and_neither_trained_on_nor_neighbours(data_dir):
    settings = DIGITS.but({"evaluation_split": "held_out"})
    train, bank, test = (settings.build(split, data_dir) for split in ("train", "bank", "test"))
    assert not set(train.places) & set(test.places)
    assert sorted([*train.places, *test.places]) == list(range(1437))
    assert bank.places.tolist() == train.places.tolist()
    assert test.split == "test"
    whole = DIGITS.build("train", data_dir)
    for label in range(10):
        of_class = np.flatnonzero(whole.labels["class"] == label)
        assert test.places[test.labels["class"] == label].tolist() == of_class[1::10].tolist()
    # The same images whatever part of the others is trained on.
    some = settings.but({"fraction": 0.1})
    assert some.build("test", data_dir).digest == test.digest
    assert set(some.build("train", data_dir).places) < set(train.places)


def test_without_such_knobs_every_image_is_in_its_place(data_dir):
    images = DIGITS.build("train", data_dir)
    assert images.places.tolist() == list(range(1437))


def test_pixels_are_shared_and_not_copied_by_any_choice(data_dir):
    choice = {"fraction": 0.5, "classes": ["1", "2"], "evaluation_split": "held_out"}
    part = DIGITS.but(choice).build("train", data_dir)
    assert len(part.pixels) == 1437
    assert torch.equal(part.images(np.array([4, 0])), part.pixels[part.places[[4, 0]]])


def test_training_images_are_known_only_where_nothing_chooses_among_them():
    assert Shapes(train_images=77).known_train_images == 77
    assert DIGITS.known_train_images == 1437
    for change in ({"fraction": 0.5}, {"classes": ["1"]}, {"evaluation_split": "held_out"}):
        assert DIGITS.but(change).known_train_images is None


@pytest.mark.parametrize("train_split", ["unlabeled", "train", "train+unlabeled"])
def test_stl10_has_labelled_neighbours_whatever_it_is_trained_on(train_split, write, tmp_path):
    settings = write("stl10 unlabelled").but({"train_split": train_split})
    train, bank, test = (settings.build(split, tmp_path) for split in ("train", "bank", "test"))
    assert len(train) == {"unlabeled": 30, "train": 40, "train+unlabeled": 70}[train_split]
    assert (len(bank), len(test)) == (40, 20)
    assert bool(train.labels) == (train_split == "train")
    red = [int(image[..., 0].unique()) for image in train.images(np.arange(len(train)))]
    assert (
        red
        == {"unlabeled": [*range(30)], "train": [*range(40)], "train+unlabeled": [*range(40), *range(30)]}[train_split]
    )

    held = settings.but({"evaluation_split": "held_out", "fraction": 0.5})
    train, bank, test = (held.build(split, tmp_path) for split in ("train", "bank", "test"))
    assert len(test) == 10
    assert not set(test.places) & (set(train.places) | set(bank.places))
    assert len(train) == {"unlabeled": 15, "train": 20, "train+unlabeled": 30}[train_split]
    assert len(bank) == 30


def test_images_without_labels_refuse_classes(write, tmp_path):
    with pytest.raises(ValueError, match=r"data\.classes = \['cat'\]: the images of .* have no labels"):
        write("stl10 unlabelled").but({"classes": ["cat"]}).build("train", tmp_path)
