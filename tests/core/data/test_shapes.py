"""The drawing of shapes, against what its labels and masks say."""

import colorsys
import math

import numpy as np
import pytest

from dino_lab.core.data.shapes import (
    BACKGROUNDS,
    FACTORS,
    HUES,
    SHAPES,
    TEXTURES,
    ShapesKnobs,
    draw,
    draw_labels,
)
from dino_lab.core.settings import KnobError

CLEAR = {"lighting": 0.0, "noise": 0.0, "clutter": 0, "color_jitter": 0.0, "background_saturation": 0.0}
"""Nothing that could hide a label: what is left of the image follows from the labels and the mask."""


def square_of_shape(name: str, side: int = 401) -> np.ndarray:
    """Where the shape is, on a fine grid over [-1, 1] x [-1, 1]."""
    ticks = np.linspace(-1, 1, side, dtype=np.float32)
    return SHAPES[name](*np.meshgrid(ticks, ticks)) < 0


def test_the_same_knobs_draw_the_same_bytes():
    first, second = draw(ShapesKnobs(), "train", 6), draw(ShapesKnobs(), "train", 6)
    assert np.array_equal(first.images, second.images)
    assert np.array_equal(first.masks, second.masks)


def test_a_larger_set_begins_with_the_smaller_one():
    small, large = draw(ShapesKnobs(), "train", 5), draw(ShapesKnobs(), "train", 19)
    assert np.array_equal(large.images[:5], small.images)
    assert np.array_equal(large.masks[:5], small.masks)
    for factor in FACTORS:
        assert np.array_equal(large.labels[factor][:5], small.labels[factor])


def test_seed_and_split_draw_other_images():
    train = draw(ShapesKnobs(), "train", 8).images
    for other in (draw(ShapesKnobs(), "test", 8), draw(ShapesKnobs(draw_seed=1), "train", 8)):
        assert not (other.images == train).all(axis=(1, 2, 3)).any()


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_value_of_every_factor_is_drawn_equally_often(split):
    # 360 is a multiple of every number of values below.
    knobs = ShapesKnobs(shapes_number=5, colors_number=8, textures_number=6, backgrounds_number=4)
    labels = draw_labels(knobs, split, 360)
    for factor, names in knobs.factor_names().items():
        assert np.bincount(labels[factor], minlength=len(names)).tolist() == [360 // len(names)] * len(names)


def test_factors_are_independent_of_one_another():
    labels = draw_labels(ShapesKnobs(), "train", 8000)
    for first in FACTORS:
        for second in FACTORS:
            if first < second:
                table = np.histogram2d(labels[first], labels[second], [range(n + 1) for n in sizes(first, second)])[0]
                # 8,000 images in at most 72 cells: over 110 expected in each, so a half more is 5 deviations.
                expected = 8000 / table.size
                assert np.abs(table - expected).max() < expected / 2


def sizes(*factors: str) -> list[int]:
    names = ShapesKnobs().factor_names()
    return [len(names[factor]) for factor in factors]


def test_position_is_the_cell_of_the_masks_centroid():
    drawn = draw(ShapesKnobs(image_size=64, shape_scale=(0.2, 0.5)), "train", 144)
    ticks = (np.arange(64) + 0.5) / 64
    for mask, position in zip(drawn.masks, drawn.labels["position"], strict=True):
        row, column = (mask.sum(axis=axis) @ ticks / mask.sum() for axis in (1, 0))
        # Within half a pixel of a cell's border either cell will do.
        for centroid, cell in ((row, position // 3), (column, position % 3)):
            assert cell / 3 - 0.5 / 64 <= centroid <= (cell + 1) / 3 + 0.5 / 64


def test_the_shape_lies_wholly_inside_the_image():
    drawn = draw(ShapesKnobs(shape_scale=(0.6, 0.6)), "train", 72)
    border = np.ones((48, 48), bool)
    border[1:-1, 1:-1] = False
    # A tip may cover a border pixel, never a long piece of the border.
    assert drawn.masks[:, border].sum(axis=1).max() <= 4


def test_hue_of_the_foreground_is_the_colours():
    knobs = ShapesKnobs().but(CLEAR)
    drawn = draw(knobs, "train", 64)
    for image, mask, label in zip(drawn.images, drawn.masks, drawn.labels["color"], strict=True):
        # The strongest colour of the foreground: pixels of the edge are mixed with the grey background.
        pixels = image[mask == 1].astype(int)
        strongest = pixels[np.argmax(pixels.max(axis=1) - pixels.min(axis=1))]
        hue = 360 * colorsys.rgb_to_hsv(*strongest / 255)[0]
        wanted = HUES[knobs.factor_names()["color"][label]]
        assert abs((hue - wanted + 180) % 360 - 180) < 3


def test_background_is_grey_without_saturation_and_has_two_values_of_the_wanted_contrast():
    knobs = ShapesKnobs(backgrounds_number=2, background_contrast=0.4).but(CLEAR)
    drawn = draw(knobs, "train", 32)
    ticks = np.arange(48)
    far = np.add.outer((ticks % 47 == 0), (ticks % 47 == 0))  # the frame, where no shape reaches
    for image, mask, label in zip(drawn.images, drawn.masks, drawn.labels["background"], strict=True):
        frame = image[far & (mask == 0)].astype(int)
        bare = frame[frame.max(axis=1) - frame.min(axis=1) == 0]
        assert len(bare) > 0.9 * len(frame)
        if knobs.factor_names()["background"][label] == "zigzag":
            assert 0.6 * 0.4 - 0.01 <= (bare.max() - bare.min()) / 255 <= 0.4 + 0.01


def test_area_of_the_mask_follows_from_shape_and_size():
    drawn = draw(ShapesKnobs(image_size=128, shape_scale=(0.5, 0.5)), "train", 24)
    names = ShapesKnobs().factor_names()["shape"]
    for mask, label in zip(drawn.masks, drawn.labels["shape"], strict=True):
        # The grid of [-1, 1] holds 4 units of area, the radius is 1/4 of the image's side.
        wanted = square_of_shape(names[label]).mean() * 4 * 0.25**2
        assert mask.mean() == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("name", list(SHAPES))
def test_every_shape_is_centred_and_fits_its_circle(name):
    inside = square_of_shape(name)
    rows, columns = np.nonzero(inside)
    ticks = np.linspace(-1, 1, len(inside))
    assert np.hypot(ticks[rows], ticks[columns]).max() < 1.03
    assert np.hypot(ticks[rows].mean(), ticks[columns].mean()) < 0.03


@pytest.mark.parametrize("name", list(SHAPES))
def test_distances_of_a_shape_grow_at_the_rate_of_one(name):
    # Anti-aliasing is one pixel wide only if the signed distance has a slope of one across the edge.
    ticks = np.linspace(-1, 1, 401, dtype=np.float32)
    distance = SHAPES[name](*np.meshgrid(ticks, ticks))
    slope = np.hypot(*np.gradient(distance, ticks, ticks))
    assert np.median(slope[np.abs(distance) < 0.02]) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", [*TEXTURES, *BACKGROUNDS])
def test_patterns_stay_between_nought_and_one_and_show_both_colours(name):
    pattern = (TEXTURES | BACKGROUNDS)[name]
    stream = np.random.default_rng(0)
    u, v = np.meshgrid(np.linspace(-3, 3, 200, dtype=np.float32), np.linspace(-3, 3, 200, dtype=np.float32))
    values = pattern(u, v, stream.random((16, 16), dtype=np.float32), 0.05)
    assert values.min() >= 0
    assert values.max() <= 1
    if name != "plain":
        assert 0.15 < values.mean() < 0.9
        assert values.std() > 0.1


def test_light_and_noise_change_the_pixels_and_not_the_labels():
    knobs = ShapesKnobs().but(CLEAR)
    bare = draw(knobs, "train", 6)
    for changes in ({"lighting": 1.0}, {"noise": 0.1}):
        lit = draw(knobs.but(changes), "train", 6)
        assert np.array_equal(lit.masks, bare.masks)
        assert not (lit.images == bare.images).all(axis=(1, 2, 3)).any()


def test_noise_has_the_standard_deviation_of_its_knob():
    knobs = ShapesKnobs(background_contrast=0.0).but(CLEAR)
    noisy, bare = (draw(knobs.but({"noise": noise}), "train", 10).images.astype(float) for noise in (0.02, 0.0))
    inner = (bare > 50) & (bare < 205)  # neither black nor white cuts the noise off
    # Rounding adds a variance of 1/12.
    assert (noisy - bare)[inner].std() == pytest.approx(math.hypot(0.02 * 255, math.sqrt(1 / 12)), rel=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 8},
        {"shape_scale": [0.5, 0.3]},
        {"shape_scale": [0.3, 0.9]},
        {"shapes_number": 9},
        {"textures_number": 1},
        {"clutter": -1},
        {"noise": 0.6},
        {"lighting": 3.0},
        {"color_jitter": 1.1},
        {"background_saturation": 1.5},
        {"train_images": 0},
        {"draw_seed": -1},
        {"class_factor": "size"},
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_name(changes):
    with pytest.raises(KnobError, match=next(iter(changes))):
        ShapesKnobs().but(changes)
