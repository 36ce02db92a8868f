"""Shapes and digits: what they hold, and what makes them be drawn again."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from dino_lab.core.data.embedded import Digits, Shapes
from dino_lab.core.data.shapes import FACTORS, draw
from dino_lab.core.settings import KnobError

SMALL = Shapes(image_size=16, train_images=12, test_images=9)


def folders(cache_dir: Path) -> list[Path]:
    return [path for path in cache_dir.iterdir() if not path.name.startswith(".")]


def test_shapes_are_what_the_drawing_says(tmp_path):
    images = SMALL.build("test", tmp_path)
    drawn = draw(SMALL, "test", 9)
    assert np.array_equal(images.pixels.numpy(), drawn.images)
    assert np.array_equal(images.masks.numpy(), drawn.masks)
    for factor in FACTORS:
        assert np.array_equal(images.labels[factor].numpy(), drawn.labels[factor])


@pytest.mark.parametrize("factor", FACTORS)
def test_class_factor_chooses_the_class_and_draws_nothing_again(factor, tmp_path):
    SMALL.build("train", tmp_path)
    images = SMALL.but({"class_factor": factor}).build("train", tmp_path)
    assert torch.equal(images.labels["class"], images.labels[factor])
    assert images.classes["class"] == images.classes[factor]
    assert len(folders(tmp_path)) == 1


@pytest.mark.parametrize("knob", ["color_predicts_class", "background_predicts_class", "class_imbalance"])
def test_where_the_drawing_depends_on_the_class_another_class_is_another_drawing(knob, tmp_path):
    bound = SMALL.but({knob: 1.0 if knob != "class_imbalance" else 5.0, "class_factor": "shape", "train_images": 60})
    for factor in ("shape", "texture"):
        images = bound.but({"class_factor": factor}).build("train", tmp_path)
        drawn = draw(bound.but({"class_factor": factor}), "train", len(images))
        assert np.array_equal(images.pixels.numpy(), drawn.images)
    assert len(folders(tmp_path)) == 2


def test_digits_are_scikit_learns(tmp_path):
    digits = load_digits()
    train, test = (Digits(image_size=8).build(split, tmp_path) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    images = torch.cat([train.pixels, test.pixels])
    for channel in range(3):
        assert np.array_equal(images[..., channel].numpy(), np.rint(digits.images * (255 / 16)))
    for name in ("class", "digit"):
        assert np.array_equal(torch.cat([train.labels[name], test.labels[name]]).numpy(), digits.target)


def test_enlarged_digits_average_back_to_the_small_ones(tmp_path):
    small, large = (Digits(image_size=size).build("test", tmp_path).pixels[..., 0].float() for size in (8, 32))
    averaged = torch.nn.functional.avg_pool2d(large[:, None], 4)[:, 0]
    # Enlarging keeps the mean of the inside of an image; its edges are repeated.
    assert torch.allclose(averaged.mean(dim=(1, 2)), small.mean(dim=(1, 2)), atol=3)
    assert np.corrcoef(averaged.flatten(), small.flatten())[0, 1] > 0.95


def test_digits_refuse_a_size_below_their_own():
    with pytest.raises(KnobError, match="image_size"):
        Digits().but({"image_size": 7})


@pytest.mark.parametrize("settings", [SMALL, Digits(image_size=8)], ids=["shapes", "digits"])
def test_digest_is_the_hash_of_images_and_labels(settings, tmp_path):
    images = settings.build("test", tmp_path)
    factors = [factor for factor in images.labels if factor != "class"]
    bytes_ = images.pixels.numpy().tobytes() + b"".join(images.labels[factor].numpy().tobytes() for factor in factors)
    assert images.digest == hashlib.sha256(bytes_).hexdigest()


def test_other_settings_and_splits_lie_in_other_folders(tmp_path):
    digests = {
        SMALL.build("train", tmp_path).digest,
        SMALL.build("test", tmp_path).digest,
        SMALL.but({"noise": 0.1}).build("test", tmp_path).digest,
        SMALL.but({"train_images": 13}).build("train", tmp_path).digest,
    }
    assert len(digests) == len(folders(tmp_path)) == 4
