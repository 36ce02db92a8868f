"""The drawing of shapes, against what its labels and masks say."""

import colorsys
import hashlib
import math

import numpy as np
import pytest
from scipy import stats

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

SKEWED = {
    "class_factor": "shape",
    "color_predicts_class": 0.7,
    "background_predicts_class": 0.4,
    "class_imbalance": 10.0,
}
"""Everything that makes the training split another than the test split."""


def square_of_shape(name: str, side: int = 401) -> np.ndarray:
    """Where the shape is, on a fine grid over [-1, 1] x [-1, 1]."""
    ticks = np.linspace(-1, 1, side, dtype=np.float32)
    return SHAPES[name](*np.meshgrid(ticks, ticks)) < 0


def test_the_same_knobs_draw_the_same_bytes():
    first, second = draw(ShapesKnobs(), "train", 6), draw(ShapesKnobs(), "train", 6)
    assert np.array_equal(first.images, second.images)
    assert np.array_equal(first.masks, second.masks)


@pytest.mark.parametrize(
    ("changes", "train", "test"),
    [
        ({}, "a7444d7064b7be3e", "a2b4dc98e04e0a96"),
        (
            {"class_factor": "shape", "draw_seed": 7, "colors_number": 3, "backgrounds_number": 5},
            "8b11eeab2e5a9d6f",
            "8c7fa0c3557950ee",
        ),
    ],
)
def test_labels_are_those_of_this_version_of_the_drawing(changes, train, test):
    for split, known in (("train", train), ("test", test)):
        labels = draw_labels(ShapesKnobs().but(changes), split, 500)
        bytes_ = b"".join(labels[factor].tobytes() for factor in FACTORS)
        assert hashlib.sha256(bytes_).hexdigest()[:16] == known


@pytest.mark.parametrize(("split", "known"), [("train", [114.0, 111.62, 110.66]), ("test", [82.41, 77.22, 77.7])])
def test_images_are_those_of_this_version_of_the_drawing(split, known):
    # By mean, not by hash: the last bit of a sine is another one on another processor.
    assert draw(ShapesKnobs(), split, 8).images.mean(axis=(0, 1, 2)) == pytest.approx(known, abs=0.02)


@pytest.mark.parametrize("changes", [{}, SKEWED], ids=["plain", "skewed"])
def test_a_larger_set_begins_with_the_smaller_one(changes):
    knobs = ShapesKnobs().but(changes)
    small, large = draw(knobs, "train", 5), draw(knobs, "train", 19)
    assert np.array_equal(large.images[:5], small.images)
    assert np.array_equal(large.masks[:5], small.masks)
    larger = draw_labels(knobs, "train", 3001)
    for factor in FACTORS:
        assert np.array_equal(large.labels[factor][:5], small.labels[factor])
        assert np.array_equal(larger[factor][:19], large.labels[factor])


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


@pytest.mark.parametrize("changes", [{"color_predicts_class": 0.7}, {"background_predicts_class": 0.4}, SKEWED])
def test_the_test_split_knows_nothing_of_skewed_training(changes):
    plain = ShapesKnobs(class_factor="shape")
    skewed, usual = (draw(knobs, "test", 12) for knobs in (plain.but(changes), plain))
    assert np.array_equal(skewed.images, usual.images)
    many, usual = (draw_labels(knobs, "test", 2000) for knobs in (plain.but(changes), plain))
    for factor in FACTORS:
        assert np.array_equal(many[factor], usual[factor])


@pytest.mark.parametrize("factor", ["color", "background"])
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.95])
def test_a_factor_predicts_the_class_with_its_probability_and_is_else_as_usual(factor, probability):
    plain = ShapesKnobs(class_factor="position")
    usual = draw_labels(plain, "train", 40000)
    biased = draw_labels(plain.but({f"{factor}_predicts_class": probability}), "train", 40000)
    own = usual["position"] % 8
    followed = biased[factor] == own
    assert np.array_equal(biased[factor][~followed], usual[factor][~followed])
    # Where the usual value is the class's own, one cannot see which of the two it is.
    seen = usual[factor] != own
    for position in range(9):
        chosen = followed[seen & (usual["position"] == position)]
        # Some 3,900 images: a probability that is wrong by 0.05 is six standard deviations away or more.
        assert stats.binomtest(int(chosen.sum()), len(chosen), probability).pvalue > 1e-4
    for other in FACTORS:
        assert other == factor or np.array_equal(biased[other], usual[other])


def test_colour_and_background_follow_the_class_independently():
    knobs = ShapesKnobs(class_factor="shape", color_predicts_class=0.5, background_predicts_class=0.5)
    labels = draw_labels(knobs, "train", 20000)
    color, background = (labels[factor] == labels["shape"] for factor in ("color", "background"))
    assert stats.pearsonr(color, background).pvalue > 1e-3


def test_a_certain_colour_determines_the_class_and_is_the_one_drawn():
    knobs = ShapesKnobs(class_factor="shape", color_predicts_class=1.0)
    labels = draw_labels(knobs, "train", 2000)
    assert np.array_equal(labels["color"], labels["shape"])
    # An image is another one if and only if its colour is.
    usual = draw_labels(knobs.but({"color_predicts_class": 0.0}), "train", 16)["color"]
    biased, plain = (draw(knobs.but({"color_predicts_class": p}), "train", 16).images for p in (1.0, 0.0))
    assert np.array_equal((biased != plain).any(axis=(1, 2, 3)), labels["color"][:16] != usual)


def test_more_classes_than_colours_share_them_in_turn():
    knobs = ShapesKnobs(class_factor="shape", shapes_number=8, colors_number=3, color_predicts_class=1.0)
    labels = draw_labels(knobs, "train", 200)
    assert np.array_equal(np.array([0, 1, 2, 0, 1, 2, 0, 1])[labels["shape"]], labels["color"])


@pytest.mark.parametrize(("factor", "imbalance"), [("position", 2.0), ("texture", 20.0), ("color", 100.0)])
def test_classes_fall_off_exponentially_and_other_factors_not_at_all(factor, imbalance):
    plain = ShapesKnobs(class_factor=factor)
    usual = draw_labels(plain, "train", 20000)
    labels = draw_labels(plain.but({"class_imbalance": imbalance}), "train", 20000)
    classes_number = len(plain.factor_names()[factor])
    # From the largest class to the smallest by equal ratios.
    sizes = [1.0]
    for _ in range(classes_number - 1):
        sizes.append(sizes[-1] / imbalance ** (1 / (classes_number - 1)))
    expected = 20000 * np.array(sizes) / sum(sizes)
    counts = np.bincount(labels[factor], minlength=classes_number)
    assert expected[0] / expected[-1] == pytest.approx(imbalance)
    assert stats.chisquare(counts, expected).pvalue > 1e-3
    for other in FACTORS:
        assert other == factor or np.array_equal(labels[other], usual[other])


def test_classes_of_a_long_tail_come_in_no_order():
    labels = draw_labels(ShapesKnobs(class_imbalance=10.0), "train", 20000)["color"]
    halves = [np.bincount(half, minlength=8) for half in (labels[:10000], labels[10000:])]
    assert stats.chi2_contingency(halves).pvalue > 1e-3


def test_a_factor_follows_the_class_of_the_long_tail():
    knobs = ShapesKnobs(class_factor="shape", color_predicts_class=1.0, class_imbalance=10.0)
    labels = draw_labels(knobs, "train", 2000)
    assert np.array_equal(labels["color"], labels["shape"])


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
        {"color_predicts_class": 1.1},
        {"background_predicts_class": -0.1},
        {"class_imbalance": 0.5},
        {"class_imbalance": 1001.0},
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_name(changes):
    with pytest.raises(KnobError, match=next(iter(changes))):
        ShapesKnobs().but(changes)


@pytest.mark.parametrize("factor", ["color", "background"])
def test_a_factor_that_is_the_class_cannot_predict_it(factor):
    with pytest.raises(KnobError, match=rf"{factor}_predicts_class = 0\.5: .*class_factor = '{factor}'"):
        ShapesKnobs().but({"class_factor": factor, f"{factor}_predicts_class": 0.5})
